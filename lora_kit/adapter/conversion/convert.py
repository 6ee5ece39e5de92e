"""Recognize which tool wrote an adapter, and convert it to an adapter of ours with the same updates."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.conversion.foreign_files import ForeignFiles
from lora_kit.adapter.conversion.formats import ConversionHints, TranslatedAdapter, from_loralib, from_mlx, from_peft
from lora_kit.adapter.conversion.litgpt import from_litgpt
from lora_kit.adapter.conversion.other_tools import refuse_other_tools
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, format_list
from lora_kit.io.text import escape_text

_Translate = Callable[[ForeignFiles, ConversionHints], TranslatedAdapter]

_LAYOUTS: Final[Mapping[str, tuple[re.Pattern[str], _Translate]]] = {
    "litgpt": (
        re.compile(r"transformer\.h\.\d+\.(attn\.(qkv|attn|proj)|mlp\.(fc|fc_1|fc_2|proj))\.lora_[AB]"),
        from_litgpt,
    ),
    "loralib": (re.compile(r".*\.lora_[AB]", re.DOTALL), from_loralib),
    "mlx-lm": (re.compile(r".*\.lora_[ab]", re.DOTALL), from_mlx),
    "PEFT": (re.compile(r".*\.lora_.*", re.DOTALL), from_peft),
}
"""What matches a key of each layout, and what translates it; the first that a file has a key of is the file's."""


@dataclass(frozen=True, kw_only=True)
class ForeignAdapter:
    """An adapter that another tool wrote.

    Attributes:
        layout: `PEFT`, `loralib`, `litgpt` or `mlx-lm`.
        adapter: an adapter of ours with the same updates.
        notes: how it was converted, in words.
        open: what the files do not say, in words; the values that depend on it are a guess.
    """

    layout: str
    adapter: Adapter
    notes: tuple[str, ...]
    open: tuple[str, ...]


def read_foreign_adapter(
    source: str | Path,
    *,
    lora_alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    renames: Mapping[str, str] | None = None,
    base: str | None = None,
) -> ForeignAdapter:
    """Read an adapter that another tool wrote, guessing what its files leave open; arguments as in `convert`.

    Raises:
        AdapterError: its layout is unknown, or its tensors do not match its config.
        ConfigError: its config is wrong.
    """
    files = ForeignFiles.of(Path(source))
    hints = ConversionHints(lora_alpha=lora_alpha, enable_lora=enable_lora, renames=renames or {}, base=base)
    layout, translate = _recognize_layout(files)
    try:
        result = translate(files, hints)
        config = result.config if base is None else dataclasses.replace(result.config, base_model_name_or_path=base)
        facts = {"layout": layout, "file": files.weights.name, "sha256": files.sha256, "notes": result.notes}
        adapter = Adapter(config, result.tensors, record={"converted": facts})
        _refuse_uncovered_layers(adapter)
    except LoraKitError as error:
        raise type(error)(f"{escape_text(source)}: {error.message}", hint=error.hint) from None
    return ForeignAdapter(layout=layout, adapter=adapter, notes=tuple(result.notes), open=tuple(result.open))


def convert(
    source: str | Path,
    *,
    lora_alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    renames: Mapping[str, str] | None = None,
    base: str | None = None,
) -> Adapter:
    """Convert an adapter that another tool wrote to an adapter of ours with the same updates.

    Args:
        source: a folder or a weight file: PEFT of any age, also state dicts of live and wrapped models and training
            checkpoints around them; loralib; litgpt; mlx-lm.
        lora_alpha: numerator of the scaling, where the files do not say it (loralib, PEFT's weights alone).
        enable_lora: which of the equal parts of a fused projection have LoRA weights, where the files do not say it.
        renames: from beginnings of module paths in the files to those in the base.
        base: name of the base.

    Raises:
        ConfigError: the files do not say something that is not an argument either; or the config is wrong.
        AdapterError: the layout is unknown, or the tensors do not match the config.
    """
    foreign = read_foreign_adapter(source, lora_alpha=lora_alpha, enable_lora=enable_lora, renames=renames, base=base)
    if foreign.open:
        raise ConfigError(f"{escape_text(source)}: its files do not give {'; '.join(foreign.open)}", hint="give it")
    return foreign.adapter


def _refuse_uncovered_layers(adapter: Adapter) -> None:
    """Raise AdapterError for LoRA weights that the config does not cover, so that nothing would load them."""
    config = adapter.config
    paths = [path for path, lora in adapter.all_pairs().items() if lora.kind != "parameter"]
    uncovered = [path for path in paths if not config.names_layer(path) and not config.ties_weights]
    if uncovered:
        raise AdapterError(
            f"the file has LoRA weights for {format_list(uncovered, most=4)}, which target_modules does not match",
            hint="look at adapter_config.json, or rename the modules",
        )


def _recognize_layout(source: ForeignFiles) -> tuple[str, _Translate]:
    keys = list(source.tensors)
    shown = ", ".join(escape_text(key) for key in keys[:3]) or "none"
    refuse_other_tools(source.weights, keys)
    for layout, (pattern, translate) in _LAYOUTS.items():
        if any(pattern.fullmatch(key) for key in keys):
            return layout, translate
    if source.fields and source.fields.get("modules_to_save"):
        return "PEFT", from_peft
    raise AdapterError(
        f"{escape_text(source.weights)} has no keys of an adapter: {shown}",
        hint="PEFT, loralib, litgpt and mlx-lm are supported",
    )
