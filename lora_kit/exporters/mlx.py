"""mlx-lm: `adapters.safetensors` and its `adapter_config.json`.

What is written is what `load_adapters` reads: one rank and one scale for all layers, `<path>.lora_a` (in, r) and
`<path>.lora_b` (r, out), keys relative to a layer, `num_layers` counted from the last one, -1 for all.
https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Final

from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.exporters.servers import find_unsupported_by_all
from lora_kit.io.safetensors import encode_safetensors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapters.safetensors"
_LAYER: Final = re.compile(r"model\.layers\.\d+\.(.+)")
_OUTSIDE_LAYERS: Final = ("lm_head", "model.embed_tokens")


def find_unsupported(case: ExportCase) -> Iterator[str]:
    yield from find_unsupported_by_all(case)
    for path in case.adapter.pairs():
        if path in _OUTSIDE_LAYERS:
            if case.require_config("whether embedding and head are tied").get("tie_word_embeddings"):
                yield f"target_modules: {path} is tied in this base, and mlx-lm would use the update in both places"
        elif not _LAYER.fullmatch(path):
            yield f"target_modules: {path} is not where mlx-lm has its layers (model.layers)"


def write(case: ExportCase, folder: Path) -> None:
    plain = case.plain
    keys = {found[1] if (found := _LAYER.fullmatch(path)) else path for path in plain.pairs}
    fields = {
        "fine_tune_type": "lora",
        "model": case.base_path,
        "num_layers": -1,
        "lora_parameters": {
            "rank": plain.rank,
            "scale": plain.alpha / plain.rank,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    (folder / CONFIG).write_text(f"{json.dumps(fields, indent=2)}\n", "utf-8")
    tensors = {}
    for path, pair in plain.pairs.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = pair.a.T.contiguous(), pair.b.T.contiguous()
    with (folder / WEIGHTS).open("wb") as file:
        for piece in encode_safetensors(tensors):
            file.write(piece)


def format_command(case: ExportCase) -> str:
    return f"""```sh
mlx_lm.generate --model {quote(case.base_name)} --adapter-path {quote(str(case.out))} --prompt "..."
```"""
