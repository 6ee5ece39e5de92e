"""LoraConfig: what an adapter is, in PEFT's field names. No torch here: reading a config allocates nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from lora_kit.errors import ConfigError
from lora_kit.patterns import MAX_EXPRESSIONS, PatternTable, expression, is_plain_name
from lora_kit.strictjson import parse_object, shown

MAX_RANK: Final = 65_536
"""Above any useful rank; a config asking for more is refused before anything is allocated."""
MAX_ALPHA: Final = 1e30
"""So that the scaling is finite in fp32."""
MAX_NAMES: Final = 65_536
"""Entries a list of names or a table of patterns may have."""
ALL_LINEAR: Final = "all-linear"
NO_TARGETS: Final = "dummy-target-modules"
"""What PEFT writes for `target_modules` when an adapter has saved modules only."""

_GAUSSIAN: Final = "gaussian"

# Fields of PEFT that change the arithmetic, with the value that leaves it as it is. Anything else is refused by name.
_UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
}
_ALWAYS: Final[Mapping[str, str]] = {"peft_type": "LORA", "bias": "none"}
"""Fields that have one value here."""
# Fields of PEFT that name code to import, with the values that name none.
_NAMING_CODE: Final[Mapping[str, tuple[Any, ...]]] = {
    "auto_mapping": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
}
# Fields of PEFT that say how training began or ran, or what this version wrote; they do not change what the tensors
# mean.
_CARRIED: Final = (
    "peft_version",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r"""A low-rank update of chosen linear layers: `y = base(x) + scaling · B A x`.

    `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732).

    Attributes:
        r: rank of the update; 1 to 65,536.
        lora_alpha: numerator of the scaling; finite and not zero.
        lora_dropout: probability of dropping an element of a layer's input on its way to A, in training; 0 to below 1.
        target_modules: `"all-linear"`; or names, each matching a module of that path or whose path ends in `.name`; or
            one regular expression that must match a whole path. Empty for an adapter of saved modules only.
        target_parameters: parameters that get pairs where their module is no linear layer, by ends of their paths: the
            fused experts of a mixture (`mlp.experts.gate_up_proj`), the weight of its router. Not with dropout, DoRA,
            or patterns of ranks and alphas.
        exclude_modules: names or one regular expression, as above, taken out again.
        layers_to_transform: indices of the layers to adapt; all of them if None.
        layers_pattern: names of the module lists those indices count in (`layers`, `h`); any if None.
        rank_pattern, alpha_pattern: exceptions to `r` and `lora_alpha`: a name or regular expression that matches the
            end of a path, to its value. The first match wins.
        use_rslora: rank-stabilised scaling.
        use_dora: train a length for every row of the adapted weight as well (Liu et al. 2024, arXiv 2402.09353).
        modules_to_save: modules trained and saved whole beside the low-rank pairs (a classification head).
        init_lora_weights: True: A Kaiming-uniform, B zero. `"gaussian"`: A normal with deviation 1/r, B zero. False:
            both random, so that a fresh adapter does something (for tests).
        fan_in_fan_out: the covered weights are stored (in, out), as transformers' Conv1D does. For other tools; here
            the layer itself is asked.
        base_model_name_or_path, revision, task_type, inference_mode: labels carried for other tools.
        extra: unknown fields of a foreign config, kept when it is saved again.

    Raises:
        ConfigError: on construction, for a value of the wrong type or out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        dropout = self.lora_dropout
        _require(_is_number(dropout) and 0 <= dropout < 1, "lora_dropout", dropout, "a number from 0 to below 1")
        self._set("target_modules", _names("target_modules", self.target_modules, regex_allowed=True) or ())
        self._set("target_parameters", _names("target_parameters", self.target_parameters) or ())
        self._set("exclude_modules", _names("exclude_modules", self.exclude_modules, regex_allowed=True))
        self._set("modules_to_save", _names("modules_to_save", self.modules_to_save) or ())
        self._set("layers_pattern", _names("layers_pattern", self.layers_pattern))
        self._set("layers_to_transform", _indices("layers_to_transform", self.layers_to_transform))
        self._set("rank_pattern", _pattern("rank_pattern", self.rank_pattern, _check_rank))
        self._set("alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _check_alpha))
        init = self.init_lora_weights
        _require(isinstance(init, bool) or init == _GAUSSIAN, "init_lora_weights", init, "true, false or 'gaussian'")
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("base_model_name_or_path", "revision", "task_type"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, str), name, value, "a string or null")
        self._set("extra", MappingProxyType(dict(self.extra)))
        if self.target_parameters:
            self._check_parameters()
        if not self.target_modules and not self.modules_to_save and not self.target_parameters:
            raise ConfigError(
                "target_modules and modules_to_save are both empty: this adapter would hold nothing",
                hint="name layers to adapt, or a head to train with modules_to_save",
            )

    def _check_parameters(self) -> None:
        bare = [name for name in self.target_parameters if "." not in name]
        if bare:
            raise ConfigError(
                f"target_parameters names {shown(bare[0])} without its module",
                hint="as in experts.gate_up_proj: a weight file says modules, not parameters",
            )
        for name in ("lora_dropout", "use_dora", "rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise ConfigError(
                    f"target_parameters with {name}={shown(_plain(getattr(self, name)))} is not supported",
                    hint=f"leave {name} out, or target modules only",
                )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies do not pickle; the plain fields do.
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: dict(value) if isinstance(value, MappingProxyType) else value for name, value in values.items()}
        return _rebuild, (plain,)

    def rank_of(self, path: str) -> int:
        """The rank at the module of this path: the first `rank_pattern` that matches, else `r`."""
        return self._ranks.first(path, default=self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha at the module of this path: the first `alpha_pattern` that matches, else `lora_alpha`."""
        return self._alphas.first(path, default=self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """What `B A x` is multiplied by at the module of this path: alpha/r, or alpha/sqrt(r) with `use_rslora`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    @functools.cached_property
    def _ranks(self) -> PatternTable:
        return PatternTable(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> PatternTable:
        return PatternTable(self.alpha_pattern)

    @property
    def largest_rank(self) -> int:
        """The largest rank any module of this adapter can have; 0 where there are no pairs."""
        return max(self.r, *self.rank_pattern.values(), 0) if self.target_modules or self.target_parameters else 0

    @classmethod
    def of(cls, config: Any) -> LoraConfig:
        """A LoraConfig from one, from a mapping of PEFT's fields, or from a `peft.LoraConfig`."""
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if callable(getattr(config, "to_dict", None)) and hasattr(config, "peft_type"):
            return cls.from_dict(config.to_dict())
        raise ConfigError(f"a LoraConfig was expected, {type(config).__name__} was given")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LoraConfig:
        """From the fields of an `adapter_config.json`; unknown ones go to `extra`.

        Raises:
            ConfigError: for another kind of adapter, or a field of PEFT's that changes the arithmetic and is not
                supported.
        """
        kind = fields.get("peft_type", "LORA")
        kind = getattr(kind, "value", kind)
        if kind != "LORA":
            raise ConfigError(
                f"peft_type is {shown(kind)}: only LORA adapters are read", hint="convert it to LoRA in PEFT first"
            )
        _refuse_unsupported(fields)
        own = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {name: value for name, value in fields.items() if name in own}
        if known.get("target_modules", ()) in (None, NO_TARGETS):
            known["target_modules"] = ()
        for name in ("modules_to_save", "target_parameters"):
            known[name] = known.get(name) or ()
        for name in ("rank_pattern", "alpha_pattern"):
            known[name] = known.get(name) or {}
        if isinstance(known.get("init_lora_weights"), str) and known["init_lora_weights"] != _GAUSSIAN:
            _refuse_moving_init(known["init_lora_weights"])
        if known.get("task_type") is not None:
            known["task_type"] = getattr(known["task_type"], "value", known["task_type"])
        extra = {name: value for name, value in fields.items() if name not in own and name not in _ALWAYS}
        return cls(**known, extra={name: getattr(value, "value", value) for name, value in extra.items()})

    @classmethod
    def from_json(cls, text: str, *, source: str = "adapter_config.json") -> LoraConfig:
        """From the text of an `adapter_config.json`.

        Raises:
            ConfigError: naming `source`, with line and column where the text is not JSON.
        """
        try:
            fields = parse_object(text)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error.message}", hint=error.hint) from None

    @property
    def unknown_fields(self) -> list[str]:
        """Names in `extra` that PEFT's LoraConfig does not have either."""
        return sorted(set(self.extra) - set(_CARRIED) - set(_NAMING_CODE) - set(_UNSUPPORTED))

    @property
    def fields_naming_code(self) -> list[str]:
        """Names in `extra` of fields that ask PEFT to import something. They are carried, and never acted on."""
        return [name for name, neutral in _NAMING_CODE.items() if self.extra.get(name) not in neutral]

    def to_dict(self) -> dict[str, Any]:
        """PEFT's fields as JSON values, in a fixed order."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        if not fields["target_parameters"]:  # which few adapters have
            del fields["target_parameters"]
        fields["target_modules"] = fields["target_modules"] or NO_TARGETS
        fields["modules_to_save"] = fields["modules_to_save"] or None
        return dict(sorted({**_ALWAYS, **{k: _plain(v) for k, v in self.extra.items()}, **fields}.items()))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _rebuild(values: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**values)


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if fields.get("enable_lora"):
        raise ConfigError(
            f"enable_lora={shown(fields['enable_lora'])} is of PEFT before 0.3: pairs for parts of a layer",
            hint="`lora-kit convert` makes plain pairs of them",
        )
    for name, neutral in _UNSUPPORTED.items():
        if name in fields and fields[name] not in neutral:
            raise ConfigError(f"{name}={shown(fields[name])} is not supported", hint="load this adapter with PEFT")


def _refuse_moving_init(init: str) -> None:
    raise ConfigError(
        f"init_lora_weights={shown(init)} starts from a changed base, so its tensors do not fit the original one",
        hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
    )


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}; {shown(value)} was given")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _check_rank(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and 1 <= value <= MAX_RANK, name, value, f"a whole number from 1 to {MAX_RANK:,}")


def _check_alpha(name: str, value: Any) -> None:
    _require(_is_number(value) and 0 < abs(value) <= MAX_ALPHA, name, value, "a finite number other than 0")


def _names(name: str, value: Any, *, regex_allowed: bool = False) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not regex_allowed:
            return (value,)
        if value != ALL_LINEAR:
            expression(value)
        return value
    _require(isinstance(value, (list, tuple, set, frozenset)), name, value, "a name, or a list of names")
    _require(all(isinstance(item, str) and item for item in value), name, value, "a list of names")
    _require(len(value) <= MAX_NAMES, name, value, f"a list of at most {MAX_NAMES:,} names")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _indices(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    items = (value,) if isinstance(value, int) else value
    whole = isinstance(items, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in items)
    _require(whole and all(i >= 0 for i in items), name, value, "a list of layer numbers from 0")
    return tuple(items) or None


def _pattern(name: str, value: Any, check: Callable[[str, Any], None]) -> Mapping[str, Any]:
    _require(isinstance(value, Mapping), name, value, "a mapping from module names to numbers")
    _require(all(isinstance(key, str) for key in value), name, value, "a mapping from module names to numbers")
    expressions = [key for key in value if not is_plain_name(key)]
    few = len(value) <= MAX_NAMES and len(expressions) <= MAX_EXPRESSIONS
    _require(few, name, value, f"a mapping of at most {MAX_NAMES:,} names and {MAX_EXPRESSIONS:,} expressions")
    for key, item in value.items():
        check(f"{name}[{shown(key)}]", item)
    for key in expressions:
        expression(rf"(.*\.)?({key})")
    return MappingProxyType(dict(value))


def _plain(value: Any) -> Any:
    """JSON values: tuples and sets become lists, mappings dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
