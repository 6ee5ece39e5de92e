"""Looking at adapters without a base model: what is in a store, and what one adapter is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit import foreign
from lora_kit.adapter import CONFIG, OLD_WEIGHTS, RECORD, WEIGHTS, Adapter, Pair
from lora_kit.config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, UnknownAdapterError, listed, nearest

STORE: Final = Path("adapters")
"""Where adapters are looked up by name: one folder per task, in the working directory."""
KIT_BASE: Final = "kit-base"


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """One line of a store.

    Attributes:
        name: the folder's name: a label, not an identity.
        folder: where it is.
        rank, alpha, targets: from its config; None or empty where it cannot be read.
        base: name of the base it says it was made for.
        bytes: size of the folder's files.
        metrics: what its record says was measured.
        digest: its identity; empty where it is broken.
        problem: why it cannot be loaded; empty for a sound adapter.
    """

    name: str
    folder: Path
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    base: str | None = None
    bytes: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        return jsonable(self)


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """What an adapter does to one module: `delta = scaling · B A`.

    Attributes:
        path: the module's path in the base.
        kind: `linear` or `embedding`.
        shape: (out, in) of the delta; (dim, entries) for an embedding.
        rank: rows of A.
        scaling: what `B A` is multiplied by.
        norm: Frobenius norm of the delta.
        values: its singular values, falling, one for each rank; of a DoRA, before its rows are rescaled.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    norm: float
    values: tuple[float, ...]

    @property
    def effective_rank(self) -> float:
        """`exp(-Σ p log p)` of `p = values / Σ values` (Roy, Vetterli 2007): how many directions the delta has.

        1 where one is all of it, the rank where all weigh the same, 0 for a delta of zero.
        """
        total = math.fsum(self.values)
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    def ranks_for(self, energy: float) -> int:
        """The fewest ranks that hold this share of `‖delta‖²`; at least 1."""
        squares = [value**2 for value in self.values]
        wanted, held = energy * math.fsum(squares), 0.0
        for rank, square in enumerate(squares, 1):
            held += square
            if held >= wanted:
                return rank
        return len(squares)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What one adapter is made of.

    Attributes:
        name, folder: the folder it was read from.
        config: PEFT's fields.
        layers: one entry per low-rank pair.
        saved: shapes of the modules saved whole, by key.
        parameters: number of values it holds.
        bytes: size of the folder's files.
        digest: its identity.
        base: fingerprint of the base it was made for; None where it says nothing.
        record: what its `lora_kit.json` carries.
        notes: what had to be done to read it, and what its files do not say, where another tool wrote it in its way.
        tokens: which tokens it has rows of, by path of the embedding or head.
    """

    name: str
    folder: Path
    config: LoraConfig
    layers: tuple[LayerSummary, ...]
    saved: Mapping[str, tuple[int, ...]]
    parameters: int
    bytes: int
    digest: str
    base: Mapping[str, Any] | None
    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.sqrt(sum(layer.norm**2 for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        return {**jsonable(self), "config": self.config.to_dict(), "norm": self.norm}


def inspect(adapter: str | Path, *, store: str | Path = STORE) -> Inspection:
    """What an adapter is made of; it is read strictly, as loading it would.

    What another tool wrote in a way that is not loaded as it is, is explained: as `lora_kit.foreign` reads it.

    Args:
        adapter: a folder, the name of one in `store`, or a weight file of another tool.
        store: where names are looked up.

    Raises:
        UnknownAdapterError: no such folder and no such name.
        AdapterError, ConfigError: it cannot be read.
    """
    folder = Path(adapter) if Path(adapter).is_file() else find_adapter(adapter, store=store)
    value, notes = _loaded(folder)
    return Inspection(
        name=folder.resolve().name,
        folder=folder,
        config=value.config,
        layers=layers_of(value),
        saved={key: tuple(tensor.shape) for key, tensor in value.saved().items()},
        parameters=value.num_parameters,
        bytes=folder.stat().st_size if folder.is_file() else folder_bytes(folder),
        digest=value.digest,
        base=value.base if isinstance(value.base, Mapping) else None,
        record=value.record,
        notes=notes,
        tokens={path: held.indices for path, held in value.tokens().items()},
    )


def _loaded(path: Path) -> tuple[Adapter, tuple[str, ...]]:
    """An adapter, and how another tool wrote it where it cannot be loaded as it is."""
    try:
        return Adapter.load(path), ()
    except (AdapterError, ConfigError) as error:
        if (path / RECORD).exists():
            raise  # of ours: that something is wrong with it is not to be explained away
        refusal = error if path.is_dir() else AdapterError(f"{path} is no adapter")
    try:
        found = foreign.read(path)
    except LoraKitError:
        raise refusal from None
    told = (f"written by {found.layout}: `lora-kit convert` makes an adapter of ours of it", *found.notes)
    return found.adapter, (*told, *(f"not said: {what}; shown as if scaling were 1" for what in found.open))


def list_adapters(store: str | Path = STORE) -> list[AdapterSummary]:
    """Every adapter folder of a store by name, broken ones too, with the reason in `problem`.

    A folder counts as an adapter when it holds an adapter's config or weights; other folders and files are passed over.

    Raises:
        AdapterError: the store is not a folder.
    """
    store = Path(store)
    if not store.is_dir():
        raise AdapterError(f"{str(store)!r} is not a folder", hint="give the folder that holds one folder per adapter")
    return [_summary(folder) for folder in sorted(store.iterdir()) if _looks_like_adapter(folder)]


def find_adapter(adapter: str | Path, *, store: str | Path = STORE) -> Path:
    """The folder of an adapter given as a folder, or by its name in the store.

    Raises:
        UnknownAdapterError: neither exists; names the nearest one of the store.
    """
    given, store = Path(adapter), Path(store)
    bare_name = len(given.parts) == 1 and given.name == str(adapter) != ".."
    if bare_name and not _looks_like_adapter(given) and _looks_like_adapter(store / given):
        return store / given
    if str(adapter) and given.is_dir():
        return given
    known = [folder.name for folder in sorted(store.iterdir()) if _looks_like_adapter(folder)] if store.is_dir() else []
    error = UnknownAdapterError(str(adapter), known)
    error.hint = nearest(given.name, known) or f"a folder, or a name in {store}/: {listed(known)}"
    raise error


def base_of(adapters: Sequence[str | Path], *, store: str | Path = STORE) -> str:
    """The base to use where none is given: `kit-base`, if that is what every adapter was made for.

    Any other name in an adapter's config was written by whoever made it: it is shown, never loaded by itself.

    Raises:
        ConfigError: an adapter names another base, or none.
    """
    for adapter in adapters:
        named = Adapter.load(find_adapter(adapter, store=store)).config.base_model_name_or_path
        if named != KIT_BASE:
            said = f"names {named!r} as its base" if named else "names no base"
            raise ConfigError(
                f"adapter {str(adapter)!r} {said}, and no base was given", hint="give the base with --base"
            )
    return KIT_BASE


def layers_of(adapter: Adapter) -> tuple[LayerSummary, ...]:
    """One summary per low-rank pair, by path, numbers in it as numbers."""
    pairs = sorted(adapter.all_pairs().items(), key=lambda item: _natural(item[0]))
    return tuple(_layer(path, pair, adapter.config) for path, pair in pairs)


def singular_values(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Those of `B A` in rank space: with `B = Q_b R_b` and `Aᵀ = Q_a R_a` they are the ones of `R_b R_aᵀ`.

    Shapes: b (out, r), a (r, in), of any floating dtype; float64 (min(r, out, in),), falling. The product is never
    formed, and nothing is squared.
    """
    b, a = b.detach().double(), a.detach().double()
    return torch.linalg.svdvals(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T)


def folder_bytes(folder: Path) -> int:
    """Bytes of the regular files directly in a folder; links are not followed."""
    return sum(entry.lstat().st_size for entry in folder.iterdir() if entry.is_file() and not entry.is_symlink())


def jsonable(value: Any) -> Any:
    """JSON values of dataclasses, mappings and sequences; anything else, NaN and infinities too, as its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _layer(path: str, pair: Pair, config: LoraConfig) -> LayerSummary:
    scaling = config.scaling_of(path)
    by_expert = [singular_values(b, a) for a, b in pair.by_expert(config.rank_of(path))]
    values = abs(scaling) * torch.cat(by_expert).sort(descending=True).values
    return LayerSummary(
        path=path,
        kind=pair.kind,
        shape=(pair.b.shape[0], pair.a.shape[1]),
        rank=pair.a.shape[0],
        scaling=scaling,
        norm=float(values.norm()),
        values=tuple(values.tolist()),
    )


def _summary(folder: Path) -> AdapterSummary:
    try:
        adapter = Adapter.load(folder)
    except (LoraKitError, OSError) as error:
        problem = error.message if isinstance(error, LoraKitError) else error.strerror or type(error).__name__
        return AdapterSummary(
            name=folder.name,
            folder=folder,
            bytes=folder_bytes(folder),
            problem=problem,
            **_config_fields(_config_alone(folder)),
        )
    metrics = adapter.record.get("metrics")
    return AdapterSummary(
        name=folder.name,
        folder=folder,
        bytes=folder_bytes(folder),
        digest=adapter.digest,
        metrics=metrics if isinstance(metrics, Mapping) else {},
        **_config_fields(adapter.config),
    )


def _config_alone(folder: Path) -> LoraConfig | None:
    """The config of a broken adapter, where that much can be read."""
    file = folder / CONFIG
    try:
        if not file.is_file() or file.stat().st_size > 2**20:
            return None
        return LoraConfig.from_json(file.read_text("utf-8"))
    except (LoraKitError, OSError, ValueError):
        return None


def _config_fields(config: LoraConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    targets = config.target_modules
    return {
        "rank": config.r if targets else None,
        "alpha": config.lora_alpha if targets else None,
        "targets": ((targets,) if isinstance(targets, str) else targets)
        + config.modules_to_save
        + (("trainable_token_indices",) if config.trainable_token_indices else ()),
        "base": config.base_model_name_or_path,
    }


def _looks_like_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() or (folder / name).is_symlink() for name in (CONFIG, WEIGHTS, OLD_WEIGHTS))
