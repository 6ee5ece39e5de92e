"""Which tool wrote an adapter, and the adapter of ours that says the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.conversion.foreign_files import ForeignFiles
from lora_kit.adapter.conversion.formats import ConversionHints, TranslatedAdapter, from_loralib, from_mlx, from_peft
from lora_kit.errors import AdapterError, ConfigError, LoraKitError
from lora_kit.io.text import escape_text

_LAYOUTS: Final[Mapping[str, tuple[tuple[str, ...], Callable[[ForeignFiles, ConversionHints], TranslatedAdapter]]]] = {
    "loralib": ((".lora_A", ".lora_B"), from_loralib),
    "mlx-lm": ((".lora_a", ".lora_b"), from_mlx),
    "PEFT": (("",), from_peft),
}
"""By how their keys end; PEFT's may end in anything once `lora_` is in them."""
_DIFFUSION_SUFFIXES: Final = (".lora_down.weight", ".lora_up.weight")


@dataclass(frozen=True, kw_only=True)
class ForeignAdapter:
    """An adapter that another tool wrote.

    Attributes:
        layout: `PEFT`, `loralib` or `mlx-lm`.
        adapter: the same updates as an adapter of ours.
        notes: what was done for that, in words.
        open: what the files do not say; values that depend on it are a guess as long as there is anything.
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
    """Read what another tool wrote; see `convert`, which refuses what this leaves open.

    Raises:
        AdapterError, ConfigError: it is no adapter of a layout that is known, or does not fit together.
    """
    found = ForeignFiles.of(Path(source))
    given = ConversionHints(lora_alpha=lora_alpha, enable_lora=enable_lora, renames=renames or {}, base=base)
    layout, made = _recognize_layout(found)
    try:
        said = made(found, given)
        config = said.config if base is None else dataclasses.replace(said.config, base_model_name_or_path=base)
        facts = {"layout": layout, "file": found.weights.name, "sha256": found.sha256, "notes": said.notes}
        adapter = Adapter(config, said.tensors, record={"converted": facts})
    except LoraKitError as error:
        raise type(error)(f"{escape_text(source)}: {error.message}", hint=error.hint) from None
    return ForeignAdapter(layout=layout, adapter=adapter, notes=tuple(said.notes), open=tuple(said.open))


def convert(
    source: str | Path,
    *,
    lora_alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    renames: Mapping[str, str] | None = None,
    base: str | None = None,
) -> Adapter:
    """An adapter of ours from what another tool wrote, with the same updates.

    Args:
        source: a folder or a weight file: PEFT of any age, also state dicts of wrapped models; loralib; mlx-lm.
        lora_alpha: numerator of the scaling, where the files do not say it (loralib).
        enable_lora: which of the equal parts of a fused projection have a pair, where the files do not say it.
        renames: beginnings of module paths, and what stands there in the base.
        base: what the base is called.

    Raises:
        ConfigError: the files leave open what was not given either.
        AdapterError: it is no adapter of a layout that is known, or does not fit together.
    """
    found = read_foreign_adapter(source, lora_alpha=lora_alpha, enable_lora=enable_lora, renames=renames, base=base)
    if found.open:
        raise ConfigError(f"{escape_text(source)}: not said: {'; '.join(found.open)}", hint="give it")
    return found.adapter


def _recognize_layout(source: ForeignFiles) -> tuple[str, Callable[[ForeignFiles, ConversionHints], TranslatedAdapter]]:
    keys = list(source.tensors)
    shown = ", ".join(escape_text(key) for key in keys[:3]) or "none"
    if any(key.endswith(_DIFFUSION_SUFFIXES) for key in keys):
        raise AdapterError(f"{escape_text(source.weights)} has names of a tool for diffusion models: {shown}")
    for layout, (ends, made) in _LAYOUTS.items():
        if any(".lora_" in key and key.endswith(ends) for key in keys):
            return layout, made
    if source.fields and source.fields.get("modules_to_save"):
        return "PEFT", from_peft
    raise AdapterError(
        f"{escape_text(source.weights)} has no names of an adapter: {shown}", hint="PEFT, loralib and mlx-lm are read"
    )
