"""Tools whose adapters are not converted: each is known by the names in its files, and the error gives the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from lora_kit.errors import AdapterError
from lora_kit.io.text import escape_text


class OtherTool(NamedTuple):
    """A tool whose files are recognized and not read.

    Attributes:
        name: of the tool.
        key: matches keys of its files.
        reason: why they are not read.
        hint: what to do instead.
    """

    name: str
    key: re.Pattern[str]
    reason: str
    hint: str


_OF_DIFFUSION: Final = "its layers are those of an image or video model; only models of transformers are supported"
_USE_THEIR_TOOL: Final = "use it in the program that it was trained for"
OTHER_TOOLS: Final = (
    OtherTool("kohya's sd-scripts", re.compile(r"lora_(unet|te\d?|transformer)_.*"), _OF_DIFFUSION, _USE_THEIR_TOOL),
    OtherTool("ComfyUI", re.compile(r"(diffusion_model|text_encoders?)\..*lora.*"), _OF_DIFFUSION, _USE_THEIR_TOOL),
    OtherTool(
        "diffusers",
        re.compile(r"(unet|text_encoder\w*|transformer\.\w*blocks)\..*lora.*"),
        _OF_DIFFUSION,
        _USE_THEIR_TOOL,
    ),
    OtherTool("a tool for diffusion models", re.compile(r".*\.lora_(down|up)\.weight"), _OF_DIFFUSION, _USE_THEIR_TOOL),
    OtherTool(
        "torchtune",
        re.compile(r"(layers\.\d+\.(attn|mlp)\.\w+|output)\.(lora_[ab]\.weight|magnitude)"),
        "its layers have other names, and the rows of q and k another order",
        "give the adapter_model.safetensors that torchtune writes beside it, in PEFT's format",
    ),
)
"""In the order in which they are tried."""


def refuse_other_tools(file: Path, keys: Iterable[str]) -> None:
    """Raise AdapterError for a file with keys of a tool whose adapters are not converted."""
    keys = list(keys)
    for tool in OTHER_TOOLS:
        key = next((key for key in keys if tool.key.fullmatch(key)), None)
        if key is not None:
            raise AdapterError(
                f"{escape_text(file)} has keys of {tool.name}, such as {escape_text(key)}: {tool.reason}",
                hint=tool.hint,
            )


class TrainingState(NamedTuple):
    """A folder in which each process of a training left its part of every tensor.

    Attributes:
        kind: what it is.
        patterns: of files or folders in it.
        hint: what joins the parts.
    """

    kind: str
    patterns: tuple[str, ...]
    hint: str


_JOIN_ZERO: Final = (
    "`python zero_to_fp32.py CHECKPOINT whole`, a script that DeepSpeed leaves in the checkpoint, joins them"
)
TRAINING_STATES: Final = (
    TrainingState(
        "a universal checkpoint of DeepSpeed", ("zero/*/fp32.pt",), f"{_JOIN_ZERO} in the one that it was made of"
    ),
    TrainingState("a checkpoint of DeepSpeed", ("global_step*", "*zero_pp_rank_*optim_states.pt"), _JOIN_ZERO),
    TrainingState(
        "a distributed checkpoint of PyTorch", ("*.distcp", "*/*.distcp"), "`accelerate merge-weights` joins them"
    ),
)


def refuse_training_state(folder: Path) -> None:
    """Raise AdapterError for a folder of `TRAINING_STATES`."""
    for state in TRAINING_STATES:
        if any(any(folder.glob(pattern)) for pattern in state.patterns):
            raise AdapterError(
                f"{escape_text(folder)} is {state.kind}, with parts of tensors",
                hint=f"{state.hint}; then convert what that writes, with its adapter_config.json beside it",
            )
