"""mlx-lm: `adapters.safetensors` and its `adapter_config.json`.

The files are those that `load_adapters` reads: one rank and one scale for all layers, `<path>.lora_a` (in, r) and
`<path>.lora_b` (r, out), with `<path>.m` (out,) where all of them are DoRAs, keys relative to a layer, `num_layers`
counted from the last one, with -1 for all.
https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py
https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/dora.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Final

from lora_kit.exporters.plain_lora import ExportCase, write_json, write_tensors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapters.safetensors"
_LAYER: Final = re.compile(r"model\.layers\.\d+\.(.+)")
_OUTSIDE_LAYERS: Final = ("lm_head", "model.embed_tokens")


def find_unsupported(case: ExportCase) -> Iterator[str]:
    """Yield what mlx-lm cannot read."""
    for path in case.adapter.pairs():
        if path in _OUTSIDE_LAYERS:
            if case.require_config("whether embedding and head are tied").get("tie_word_embeddings"):
                yield f"target_modules: {path} is tied in this base, and mlx-lm would use the update in both places"
        elif not _LAYER.fullmatch(path):
            yield f"target_modules: {path} is not one of the layers that mlx-lm adapts (model.layers)"


def write(case: ExportCase, folder: Path) -> None:
    """Write the config and the weights."""
    plain = case.plain
    keys = {match[1] if (match := _LAYER.fullmatch(path)) else path for path in plain.weights}
    fields = {
        "fine_tune_type": "dora" if case.adapter.config.use_dora else "lora",
        "model": case.base_path,
        "num_layers": -1,
        "lora_parameters": {
            "rank": plain.rank,
            "scale": plain.alpha / plain.rank,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    write_json(folder / CONFIG, fields)
    tensors = {}
    for path, weights in plain.weights.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = weights.a.T.contiguous(), weights.b.T.contiguous()
        if weights.magnitude is not None:
            tensors[f"{path}.m"] = weights.magnitude
    write_tensors(folder / WEIGHTS, tensors)


def format_command(case: ExportCase) -> str:
    """Return the command that loads it, in Markdown."""
    return f"""```sh
mlx_lm.generate --model {case.base_argument} --adapter-path {quote(case.folder)} --prompt "..."
```"""
