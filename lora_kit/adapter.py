"""Adapter: an immutable value of config and tensors that knows no model, and the folder it is on disk.

The folder is PEFT's (`adapter_config.json`, `adapter_model.safetensors`, `README.md`) and one file more,
`lora_kit.json`, with digests of the others, the adapter's identity and the base it was made for. `adapters/README.md`
describes every field.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from lora_kit.config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, listed
from lora_kit.files import exists, folder_exists, printable, read_json, read_regular, read_text, write_folder
from lora_kit.strictjson import shown
from lora_kit.weights import DTYPES, check_safetensors, parse_pickle, parse_safetensors

logger = logging.getLogger(__name__)

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
OLD_WEIGHTS: Final = "adapter_model.bin"
CARD: Final = "README.md"
RECORD: Final = "lora_kit.json"
FORMAT: Final = 1
"""Version of `lora_kit.json`."""
PREFIX: Final = "base_model.model."
"""Before every key of PEFT's weight files."""
ALLOWANCES: Final = ("other-base", "extra-keys", "changed-files", "unmatched-targets")
"""What a caller may let pass: another base than the adapter's, tensors beyond its config, files changed since they were
saved, names in its config that the model does not have."""

_PAIR_KEY: Final = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?(embedding)|\.weight)")
_MAGNITUDE_SUFFIX: Final = ".lora_magnitude_vector"
_COPY_SUFFIX: Final = ".base_layer.weight"
"""PEFT writes the frozen table of an adapted embedding beside its pair, under this suffix."""
_CONFIG_LIMIT: Final = 2**20
_RECORD_LIMIT: Final = 16 * 2**20
_NAME_LIMIT: Final = 1_000
_MISFITS_SHOWN: Final = 200
_READS: Final = 3
"""Times a folder is read anew because another one took its place meanwhile."""
_RECORD_TYPES: Final[Mapping[str, type]] = {
    "base": dict,
    "files": dict,
    "labels": list,
    "metrics": dict,
    "recipe": dict,
    "versions": dict,
}
_IDENTITY_FIELDS: Final = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)


@dataclass(frozen=True)
class Pair:
    """The update of one layer, `B A` before scaling.

    Attributes:
        a: (r, in); for an embedding (r, entries).
        b: (out, r); for an embedding (dim, r).
        kind: `linear` or `embedding`.
        magnitude: (out,), of a DoRA only.
    """

    a: Tensor
    b: Tensor
    kind: str
    magnitude: Tensor | None = None


def magnitude_key(path: str) -> str:
    """The key of a DoRA's magnitude in PEFT's weight file for the layer of this path."""
    return f"{PREFIX}{path}{_MAGNITUDE_SUFFIX}"


def pair_keys(path: str, kind: str) -> tuple[str, str]:
    """The keys of A and B in PEFT's weight file for the layer of this path."""
    if kind == "embedding":
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


class Adapter:
    """Config, named tensors and identity; equal where the digests are equal.

    Args:
        config: what the adapter is.
        tensors: by PEFT's keys; on the CPU, not to be written to.
        record: further facts carried in `lora_kit.json` (base, recipe, seed, metrics, versions).

    Raises:
        AdapterError: on construction, listing every tensor that does not fit the config.
    """

    def __init__(
        self,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        *,
        record: Mapping[str, Any] | None = None,
        allow: Collection[str] = (),
    ) -> None:
        check_allowances(allow)
        self.config = config
        self.tensors: Mapping[str, Tensor] = MappingProxyType({key: t.detach() for key, t in tensors.items()})
        self.record: Mapping[str, Any] = MappingProxyType(dict(record or {}))
        self._pairs, self._saved, self._copies, misfits = _sorted_out(config, self.tensors, allow)
        if misfits:
            told = misfits[:_MISFITS_SHOWN]
            if len(misfits) > len(told):
                told.append(f"and {len(misfits) - len(told):,} more")
            raise AdapterError("the tensors do not fit the config:\n  " + "\n  ".join(told))
        if self._pairs and not any(pair.b.any() for pair in self._pairs.values()):
            logger.warning("every lora_B is zero: this adapter does nothing")

    @property
    def base(self) -> Mapping[str, Any] | None:
        """Fingerprint of the base it was made for, where it is known."""
        return self.record.get("base")

    def pairs(self) -> Mapping[str, Pair]:
        """The low-rank pairs by path of their layer."""
        return MappingProxyType(self._pairs)

    def saved(self) -> Mapping[str, Tensor]:
        """The tensors of modules saved whole, by path (`score.weight`)."""
        return MappingProxyType(self._saved)

    def base_copies(self) -> Mapping[str, Tensor]:
        """Weights of the base that PEFT wrote along with an adapted embedding, by path of the layer."""
        return MappingProxyType(self._copies)

    @property
    def num_parameters(self) -> int:
        """Elements of the pairs and saved modules."""
        copies = sum(tensor.numel() for tensor in self._copies.values())
        return sum(tensor.numel() for tensor in self.tensors.values()) - copies

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the tensors and of the config fields that give them meaning; names and labels do not count."""
        fields = self.config.to_dict()
        meaning = {name: _number(fields[name]) for name in sorted(_IDENTITY_FIELDS)}
        sha = hashlib.sha256(json.dumps(meaning).encode())
        for key in sorted(self.tensors):
            tensor = self.tensors[key]
            sha.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = f"{len(self._pairs)} pairs, r={self.config.r}, {self.num_parameters:,} parameters"
        return f"Adapter({size}, {self.digest[:12]})"

    @classmethod
    def load(cls, folder: str | Path, *, allow: Collection[str] = ()) -> Adapter:
        """Read an adapter folder, strictly.

        Args:
            allow: of `ALLOWANCES`: what may pass instead of being refused.

        Raises:
            AdapterError, ConfigError: what is wrong with which file; nothing is kept.
        """
        check_allowances(allow)
        folder = Path(folder)
        for _ in range(_READS):
            found = _identity(folder)
            try:
                return cls._read(folder, allow)
            except LoraKitError:
                if _identity(folder) == found:
                    raise
        return cls._read(folder, allow)

    @classmethod
    def _read(cls, folder: Path, allow: Collection[str]) -> Adapter:
        shown_as = printable(folder)
        if not folder_exists(folder):
            raise AdapterError(f"{shown_as} is not a folder", hint="an adapter is a folder with an adapter_config.json")
        if not exists(folder / CONFIG):
            raise ConfigError(f"{shown_as} has no {CONFIG}", hint="is it an adapter folder?")
        text = read_text(folder / CONFIG, limit=_CONFIG_LIMIT)
        record = _read_record(folder)
        facts = None if record is None or "changed-files" in allow else _facts(record, shown_as)
        config = LoraConfig.from_json(text, source=printable(folder / CONFIG))
        _say_what_is_not_used(config, shown_as)
        weights = _weights_file(folder)
        data = _read_weights(weights, None if facts is None else facts.get(weights.name))
        with ThreadPoolExecutor(max_workers=1) as pool:
            # Hashing a file takes as long as all the rest, and needs no lock of the interpreter.
            files: dict[str, bytes | memoryview] = {CONFIG: text.encode(), weights.name: data}
            checked = None if facts is None else pool.submit(_check_files, facts, files, shown_as)
            try:
                adapter = cls(config, _parse(weights, data), record=record, allow=allow)
                digest = adapter.digest if checked else None
            except AdapterError as error:
                if checked:
                    checked.result()  # that the file was changed is said before what is wrong in it
                where = "" if error.message.startswith(shown_as) else f"{shown_as}: "
                raise AdapterError(f"{where}{error.message}", hint=error.hint) from None
            if checked:
                checked.result()
        if record is not None and digest is not None and record.get("digest") != digest:
            raise AdapterError(f"{shown_as}: the digest in {RECORD} is not that of the adapter", hint="save it again")
        return adapter

    def save(
        self,
        folder: str | Path,
        *,
        record: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        replace: bool = False,
    ) -> Path:
        """Write the folder, all or nothing, synced to disk.

        Args:
            record: facts to add to those the adapter carries: `base`, `recipe`, `seed`, `metrics`.
            files: further files of the folder (a recipe, a picture), by name.
            replace: an adapter that is there may be replaced.

        Raises:
            StorageError: the folder exists, or the disk refuses; what was there is as it was.
            ConfigError: `record` is not JSON, or a name in `files` is not one for a further file.
        """
        folder = Path(folder)
        facts = {**self.record, **(record or {})}
        contents = dict(files or {})
        _check_names(contents)
        contents[CARD] = _card(Path(os.path.abspath(folder)).name, self, facts).encode()
        contents[CONFIG] = _limited(_json(self.config.to_dict(), CONFIG), CONFIG, _CONFIG_LIMIT)
        # Copied, since the library refuses tensors that share memory.
        plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()}
        contents[WEIGHTS] = safetensors.torch.save(plain, metadata={"format": "pt"})
        facts["format"] = FORMAT
        facts["digest"] = self.digest
        facts["files"] = {name: _fact(data) for name, data in sorted(contents.items())}
        facts["versions"] = _versions()
        # Last, because it vouches for the others.
        contents[RECORD] = _limited(_json(facts, RECORD), RECORD, _RECORD_LIMIT)
        write_folder(folder, contents, replace=replace, owned=is_adapter_folder)
        return folder


def is_adapter_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / RECORD).is_file()


def check_allowances(allow: Collection[str]) -> None:
    unknown = [name for name in allow if name not in ALLOWANCES]
    if isinstance(allow, str) or unknown:
        raise ConfigError(f"allow={allow!r} was given; expected any of {listed(ALLOWANCES)}")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder is at a path just now."""
    try:
        status = os.stat(folder)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _number(value: Any) -> Any:
    """16.0 is 16: a number's identity is its value."""
    if isinstance(value, Mapping):
        return {key: _number(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fact(data: bytes | memoryview) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _read_record(folder: Path) -> dict[str, Any] | None:
    """What `lora_kit.json` says; None where there is none."""
    if not exists(folder / RECORD):
        logger.info(
            "%s has no %s: neither its files nor the base it was made for can be checked", printable(folder), RECORD
        )
        return None
    record = read_json(folder / RECORD, limit=_RECORD_LIMIT)
    for name, kind in _RECORD_TYPES.items():
        if not isinstance(record.get(name), (kind, type(None))):
            raise AdapterError(f"{printable(folder / RECORD)}: {name} is {shown(record[name])}; it is damaged")
    return record


def _facts(record: Mapping[str, Any], shown_as: str) -> Mapping[str, Any]:
    """What a record says of the files beside it."""
    if record.get("format") != FORMAT:
        raise AdapterError(f"{shown_as}/{RECORD} has format {shown(record.get('format'))}; format {FORMAT} is read")
    return record.get("files") or {}


def _check_files(facts: Mapping[str, Any], files: Mapping[str, bytes | memoryview], shown_as: str) -> None:
    for name, data in files.items():
        _check_size(facts.get(name), len(data), f"{shown_as}/{name}")
        if facts[name].get("sha256") != _fact(data)["sha256"]:
            raise AdapterError(
                f"{shown_as}/{name} was changed since it was saved", hint="allow 'changed-files' to go on"
            )


def _check_size(fact: Any, size: int, shown_as: str) -> None:
    expected = fact.get("size") if isinstance(fact, dict) else None
    if not isinstance(expected, int):
        raise AdapterError(f"{RECORD} does not vouch for {shown_as}", hint="was the folder put together by hand?")
    if size != expected:
        what = "truncated or replaced" if size < expected else "replaced"
        raise AdapterError(f"{shown_as}: {what}: {size:,} bytes, {expected:,} are expected")


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS, OLD_WEIGHTS):
        if exists(folder / name):
            if name == OLD_WEIGHTS:
                logger.warning("%s: reading plain tensors from %s, an older format", printable(folder), name)
            return folder / name
    raise AdapterError(f"{printable(folder)} has neither {WEIGHTS} nor {OLD_WEIGHTS}")


def _read_weights(path: Path, fact: Any | None) -> memoryview:
    """The bytes of a weight file, once its size and its header promise that they are worth reading."""

    def accept(file: BufferedReader, size: int) -> None:
        if fact is not None:
            _check_size(fact, size, printable(path))
        if path.name == WEIGHTS:
            check_safetensors(file, size, source=printable(path))

    return read_regular(path, accept=accept)


def _parse(path: Path, data: memoryview) -> dict[str, Tensor]:
    parse = parse_pickle if path.name == OLD_WEIGHTS else parse_safetensors
    return parse(data, source=printable(path))


def _say_what_is_not_used(config: LoraConfig, shown_as: str) -> None:
    if config.unknown_fields:
        names = [printable(name) for name in config.unknown_fields]
        logger.warning("%s: unknown fields are kept as they are: %s", shown_as, listed(names))
    if config.fields_naming_code:
        names = config.fields_naming_code
        logger.info("%s: fields that name code are kept and not acted on: %s", shown_as, listed(names))


def _check_names(files: Mapping[str, bytes]) -> None:
    for name in files:
        if name in (CARD, CONFIG, WEIGHTS, OLD_WEIGHTS, RECORD) or name in ("", ".", "..") or set(name) & {"/", "\0"}:
            raise ConfigError(f"{shown(name)} cannot be the name of a further file of an adapter")


def _json(value: Any, name: str) -> bytes:
    try:
        text = json.dumps(_finite(value), indent=2, sort_keys=name == RECORD, ensure_ascii=name != RECORD)
        return f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"what is to be written to {name} is not JSON: {error}") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a metric that is none is written as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _limited(data: bytes, name: str, limit: int) -> bytes:
    """What is written must be what can be read."""
    if len(data) > limit:
        raise ConfigError(f"{name} would have {len(data):,} bytes; at most {limit:,} are read")
    return data


def _sorted_out(
    config: LoraConfig, tensors: Mapping[str, Tensor], allow: Collection[str]
) -> tuple[dict[str, Pair], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Pairs, saved tensors and copies of base weights, each by path, and every misfit in words."""
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    misfits: list[str] = []
    if not tensors:
        misfits.append("the file holds no tensors")
    for key, tensor in tensors.items():
        misfits += _unfit_values(key, tensor)
        bare = key.removeprefix(PREFIX)
        found = _PAIR_KEY.fullmatch(bare) if bare != key else None
        if not key.isprintable() or len(key) > _NAME_LIMIT:
            misfits.append(f"{printable(key)} is not the name of a tensor")
        elif found:
            kind = "embedding" if found["embedding"] else "linear"
            halves.setdefault((found["path"], kind), {})[found["side"]] = tensor
        elif bare != key and bare.endswith(_MAGNITUDE_SUFFIX):
            halves.setdefault((bare.removesuffix(_MAGNITUDE_SUFFIX), "linear"), {})["magnitude"] = tensor
        elif bare != key and _in_saved_module(bare, config):
            saved[bare] = tensor
        elif bare != key and bare.endswith(_COPY_SUFFIX):
            copies[bare.removesuffix(_COPY_SUFFIX)] = tensor
        elif "extra-keys" not in allow:
            expected = f"keys begin with {PREFIX}" if bare == key else "neither a pair nor in modules_to_save"
            misfits.append(f"{key} is not expected: {expected}")
    pairs = {}
    for (path, kind), sides in halves.items():
        missing = [side for side in "AB" if side not in sides]
        wrong = [f"{path}: lora_{side} is missing" for side in missing] or _unfit_pair(
            path, sides["A"], sides["B"], config
        )
        wrong += _unfit_magnitude(path, sides, config)
        if path in pairs:
            wrong.append(f"{path}: pairs for a linear layer and for an embedding")
        misfits += wrong
        if not wrong:
            pairs[path] = Pair(sides["A"], sides["B"], kind, sides.get("magnitude"))
    misfits += [f"modules_to_save names {name}, of which the file holds nothing" for name in _absent(config, saved)]
    if config.target_modules and not halves and tensors:
        misfits.append("the config has target_modules, but the file holds no pair")
    return pairs, saved, copies, misfits


def _unfit_values(key: str, tensor: Tensor) -> list[str]:
    if tensor.dtype not in DTYPES.values() or tensor.device.type != "cpu":
        return [f"{printable(key)} is {tensor.dtype} on {tensor.device}; plain numbers on the CPU are expected"]
    if not tensor.is_floating_point():
        if ".lora_" in key or key.endswith((".weight", ".bias")):
            return [f"{printable(key)} has dtype {tensor.dtype}; a floating dtype is expected"]
        return []
    if not _all_finite(tensor):
        return [f"{printable(key)} holds NaN or infinity"]
    return []


def _all_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, in fp32 too."""
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    # NaN and infinity always show in a sum, which takes one pass and no memory; a sum that overflows says nothing.
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _unfit_pair(path: str, a: Tensor, b: Tensor, config: LoraConfig) -> list[str]:
    if a.ndim != 2 or b.ndim != 2:
        return [f"{path}: A {tuple(a.shape)} and B {tuple(b.shape)} are not matrices"]
    rank = config.rank_of(path)
    if (a.shape[0], b.shape[1]) == (rank, rank):
        return []
    hint = "; A looks transposed" if a.shape[1] == rank and a.shape[0] != rank else ""
    return [f"{path}: the config says rank {rank}, the tensors are A {tuple(a.shape)} and B {tuple(b.shape)}{hint}"]


def _unfit_magnitude(path: str, sides: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    magnitude, b = sides.get("magnitude"), sides.get("B")
    if config.use_dora != (magnitude is not None):
        return [
            f"{path}: use_dora is {config.use_dora}, and a magnitude is {'missing' if magnitude is None else 'there'}"
        ]
    if magnitude is not None and b is not None and magnitude.shape != b.shape[:1]:
        return [f"{path}: the magnitude is {tuple(magnitude.shape)}, {tuple(b.shape[:1])} is expected"]
    return []


def _in_saved_module(key: str, config: LoraConfig) -> bool:
    """Whether a key (`model.score.weight`) lies in one of the modules saved whole."""
    return any(f".{name}." in f".{key}" for name in config.modules_to_save)


def _absent(config: LoraConfig, saved: Mapping[str, Tensor]) -> list[str]:
    return [name for name in config.modules_to_save if not any(f".{name}." in f".{key}" for key in saved)]


def _versions() -> dict[str, str]:
    from lora_kit import __version__

    return {"lora_kit": __version__, "torch": str(torch.__version__)}


def _cell(value: object) -> str:
    return printable(value).replace("|", "\\|")


def _card(name: str, adapter: Adapter, facts: Mapping[str, Any]) -> str:
    """The model card: what the adapter is, how it did, how to load it."""
    config = adapter.config
    base = config.base_model_name_or_path or "unknown"
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    rows = [
        ("base", base),
        ("rank, alpha", f"{config.r}, {config.lora_alpha:g}" if config.target_modules else "no low-rank pairs"),
        ("target modules", targets or "none"),
        ("modules saved whole", ", ".join(config.modules_to_save) or "none"),
        ("parameters", f"{adapter.num_parameters:,}"),
        ("digest", adapter.digest),
    ]
    metrics = facts.get("metrics")
    rows += [
        (key, f"{value:.6g}" if isinstance(value, float) else str(value))
        for key, value in (metrics if isinstance(metrics, Mapping) else {}).items()
    ]
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)
    label, path = json.dumps(name), json.dumps(f"path/to/{name}")
    base_line = f"base_model: {json.dumps(base)}\n" if base != "unknown" else ""
    return f"""---
library_name: peft
{base_line}tags:
- lora
---
# {printable(name)}

A LoRA adapter trained with lora_kit.

| | |
|---|---|
{table}

```python
import lora_kit as lk

bank = lk.attach(model, slots=1)
bank.load({label}, {path})
bank.use({label})
```
It is in PEFT's format: `peft.PeftModel.from_pretrained(model, {path})` loads it as well.
"""
