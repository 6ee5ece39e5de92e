"""Programs that read PEFT's format: PEFT itself, vLLM, SGLang and Text Generation Inference, and what each ignores.

What they read, by their sources (versions differ; `tests/programs` runs PEFT and vLLM):

- vLLM: `PEFTHelper` rejects use_dora, modules_to_save and ranks above `--max-lora-rank`, which is one of a few values
  (vllm/config/lora.py); older versions ignore rank_pattern and alpha_pattern.
  https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py
- SGLang: `LoRAAdapter` scales by lora_alpha / r, whatever use_rslora and the patterns say. It stacks q/k/v and gate/up,
  which must have one rank, looks k and v up beside q, and up beside gate, and fails where q has no v.
  https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora.py
- TGI: `LoraWeights.prepare_weights` stacks one kind of layer over the whole model: a kind that any layer lacks is left
  out silently; patterns and embeddings are not read.
  https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/adapters/lora.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import Final

from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.adapter.model_card import format_inline_code
from lora_kit.adapter.peft_keys import lora_weight_keys
from lora_kit.errors import format_list
from lora_kit.exporters.plain_lora import ExportCase, write_json, write_tensors
from lora_kit.io.text import escape_text
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, PROBLEM_TYPES, TASK_SPECS, find_task_by_peft_type

VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of `--max-lora-rank`."""
_VLLM_DEFAULT_RANK: Final = 16
_VLLM_SLOT_ISSUES: Final = (
    "https://github.com/vllm-project/vllm/issues/48421",
    "https://github.com/vllm-project/vllm/issues/49656",
)
"""Requests without an adapter get that of the last slot."""
_TGI_KINDS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TGI_MARKS: Final = re.compile(r"[=,@\s]+")
"""What Text Generation Inference takes apart a list of adapters by."""
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
_NUMBERED_LAYER: Final = re.compile(r"(^|\.)layers\.\d+\.")
_READ_BESIDE: Final = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers that SGLang looks up only beside another one."""


# What they cannot read


def find_dora(case: ExportCase) -> Iterator[str]:
    """Yield that an adapter is a DoRA, for the programs without it."""
    if case.adapter.config.use_dora:
        yield "use_dora: a DoRA rescales every row of the whole weight; merge it instead"


def find_unlike_layers(case: ExportCase) -> Iterator[str]:
    """Yield what an adapter has besides LoRA weights of linear layers and embeddings: only PEFT reads it."""
    config, adapter = case.adapter.config, case.adapter
    if config.target_parameters:
        yield f"target_parameters: {format_list(config.target_parameters)} would be left out"
    if adapter.tokens():
        yield f"trainable_token_indices: those of {format_list(sorted(adapter.tokens()))} would be left out"
    for path, weights in adapter.all_pairs().items():
        if weights.kind not in ("linear", "embedding", "parameter"):
            yield f"target_modules: {path} is neither a linear layer nor an embedding"


def find_unsupported_by_all(case: ExportCase) -> Iterator[str]:
    """Yield what no program but PEFT can read."""
    config = case.adapter.config
    if config.modules_to_save:
        yield f"modules_to_save: {format_list(config.modules_to_save)} would be left out; merge it instead"
    if not case.adapter.pairs():
        yield "target_modules: there are no LoRA weights"


def find_unsupported_by_vllm(case: ExportCase) -> Iterator[str]:
    """Yield what vLLM cannot serve."""
    if case.plain.rank > VLLM_RANKS[-1]:
        yield f"r: {case.plain.rank} is above {VLLM_RANKS[-1]}, the largest that can be served; resize it"


def find_unsupported_by_sglang(case: ExportCase) -> Iterator[str]:
    """Yield what SGLang ignores or fails on."""
    paths = case.adapter.pairs().keys()
    for path in paths:
        start, _, leaf = path.rpartition(".")
        if not _NUMBERED_LAYER.search(path) and leaf not in ("lm_head", "embed_tokens"):
            yield f"target_modules: {path} is in no numbered layer (layers.0), and would be left out"
        beside = _READ_BESIDE.get(leaf)
        if beside and f"{start}.{beside}" not in paths:
            yield f"target_modules: {path} is read only beside a {beside} of the same layer, which has no LoRA weights"
        if leaf == "q_proj" and f"{start}.v_proj" not in paths:
            yield f"target_modules: {path} is stacked with the v_proj of the same layer, which has no LoRA weights"


def find_unsupported_by_tgi(case: ExportCase) -> Iterator[str]:
    """Yield what Text Generation Inference ignores."""
    kinds: dict[str, set[int]] = {}
    for path, weights in case.adapter.pairs().items():
        match = _LAYER.fullmatch(path)
        if match and match[2] in _TGI_KINDS and weights.kind == "linear":
            kinds.setdefault(match[2], set()).add(int(match[1]))
        elif path != "lm_head":
            yield f"target_modules: {path} is not read; {format_list(_TGI_KINDS)} and lm_head of a decoder are"
    count = _count_layers(case, kinds.values())
    for kind, numbers in kinds.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            layers = format_list([str(number) for number in missing])
            left_out = f"{kind} of every layer would be left out, as layer {layers} has none"
            yield f"target_modules: {left_out}; merge it instead"


def _count_layers(case: ExportCase, covered: Iterable[set[int]]) -> int:
    """Return how many layers the base has: from its config, or as many as are covered where bare names cover all."""
    config = case.adapter.config
    if case.base_config is not None:
        return int(case.base_config.get("num_hidden_layers") or 0)
    names = isinstance(config.target_modules, tuple) and not any("." in name for name in config.target_modules)
    if not names or config.layers_to_transform is not None or config.exclude_modules:
        return int(case.require_config("whether every layer has LoRA weights").get("num_hidden_layers") or 0)
    return max((max(numbers) + 1 for numbers in covered), default=0)


# What is written


def write_peft(case: ExportCase, folder: Path) -> None:
    """Write the adapter as it is: PEFT reads all of it."""
    write_json(folder / CONFIG, {**case.adapter.config.to_dict(), "base_model_name_or_path": case.base_path})
    write_tensors(folder / WEIGHTS, case.adapter.tensors)


def write_plain(case: ExportCase, folder: Path) -> None:
    """Write the adapter without any field that some version of some program ignores."""
    config, plain = case.adapter.config, case.plain
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": case.base_path,
        "r": plain.rank,
        "lora_alpha": plain.alpha,
        "target_modules": _list_target_names(case),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.fan_in_fan_out,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for path, weights in plain.weights.items():
        key_a, key_b = lora_weight_keys(path, weights.kind)
        tensors[key_a], tensors[key_b] = weights.a, weights.b
    write_json(folder / CONFIG, fields)
    write_tensors(folder / WEIGHTS, tensors)


def _list_target_names(case: ExportCase) -> list[str]:
    """Return module names that cover exactly what the adapter covers."""
    config = case.adapter.config
    narrowed = config.exclude_modules or config.layers_to_transform is not None
    if isinstance(config.target_modules, tuple) and not narrowed:
        return sorted(config.target_modules)
    return sorted(case.adapter.pairs())


# How it is loaded


def format_vllm_module(name: str, folder: str) -> str:
    """Return an adapter as `--lora-modules` of vLLM takes it, quoted for a shell.

    It is `name=folder`, read up to the first `=`; with a comma anywhere it would be taken for JSON.
    """
    text = f"{name}={folder}"
    return quote(escape_text(json.dumps({"name": name, "path": folder}) if "=" in name or "," in text else text))


def _format_sglang_path(name: str, folder: str) -> str:
    """Return an adapter as `--lora-paths` of SGLang takes it, quoted for a shell: `name=folder`, or JSON."""
    is_json = "=" in name
    return quote(escape_text(json.dumps({"lora_name": name, "lora_path": folder}) if is_json else f"{name}={folder}"))


def format_peft_command(case: ExportCase) -> str:
    task = find_task_by_peft_type(case.adapter.config.task_type) or TASK_SPECS[CAUSAL_LM]
    labels = case.adapter.record.get("labels")
    count = f", num_labels={len(labels)}" if isinstance(labels, list) and not task.is_generative else ""
    problem_type = PROBLEM_TYPES.get(str(case.adapter.record.get("problem")))
    count += f", problem_type={problem_type!r}" if problem_type and task.name == CLASSIFY else ""
    base = repr(case.base_name)
    if case.base_name.startswith("~/"):
        base = f"os.path.expanduser({base})"
    return f"""```python
import os, peft, transformers

model = transformers.{task.auto_class}.from_pretrained({base}{count})
model = peft.PeftModel.from_pretrained(model, {case.folder!r})
```"""


def format_vllm_command(case: ExportCase) -> str:
    limits = f"--max-loras 2 --max-lora-rank {choose_vllm_rank(case.plain.rank)}"
    module = f"--lora-modules {format_vllm_module(case.name, case.folder)}"
    return f"""```sh
vllm serve {case.base_argument} --enable-lora {limits} {module}{_format_template(case)}
```
Requests name it as their model: {format_inline_code(f'"model": {json.dumps(case.name)}')}.

`--max-loras` is one more than there are adapters. With exactly as many, vLLM (seen in 0.32 on a CPU)
answers requests to the base with the adapter of the last slot when they share a batch with requests to adapters:
{" and ".join(_VLLM_SLOT_ISSUES)}."""


def format_sglang_command(case: ExportCase) -> str:
    options = f"--enable-lora --lora-paths {_format_sglang_path(case.name, case.folder)}{_format_template(case)}"
    return f"""```sh
python -m sglang.launch_server --model-path {case.base_argument} {options}
```
Requests to `/generate` name it: {format_inline_code(f'"lora_path": {json.dumps(case.name)}')}."""


def format_tgi_command(case: ExportCase) -> str:
    name = _TGI_MARKS.sub("-", case.name)
    adapter = quote(escape_text(f"{name}={case.folder}"))
    return f"""```sh
text-generation-launcher --model-id {case.base_argument} --lora-adapters {adapter}
```
Requests name it among their parameters: {format_inline_code(f'"adapter_id": {json.dumps(name)}')}."""


def _format_template(case: ExportCase) -> str:
    """Return the flag that gives a server the chat template of the training, after a blank; empty without one."""
    return "" if case.template_argument is None else f" --chat-template {case.template_argument}"


def list_vllm_requirements(case: ExportCase) -> list[str]:
    """Return what vLLM must be started with, where its default does not do."""
    rank = choose_vllm_rank(case.plain.rank)
    larger = [f"--max-lora-rank {rank} (the default is {_VLLM_DEFAULT_RANK})"] if rank > _VLLM_DEFAULT_RANK else []
    return [*larger, "--max-loras: one more than there are adapters (the default is 1)"]


def choose_vllm_rank(rank: int) -> int:
    """Return the smallest `--max-lora-rank` that takes this rank."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), VLLM_RANKS[-1])
