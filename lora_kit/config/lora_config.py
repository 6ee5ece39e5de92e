"""LoraConfig: the config of an adapter, in PEFT's field names. No torch here: reading a config allocates nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from lora_kit.config import validation
from lora_kit.config.combinations import check_combinations
from lora_kit.config.module_patterns import PatternTable, matches, suffixes_of
from lora_kit.config.peft_fields import (
    CARRIED_FIELDS,
    FIELDS_NAMING_CODE,
    FIXED_FIELDS,
    GAUSSIAN,
    INITS_OF_PEFT,
    UNSUPPORTED_FIELDS,
    is_dispensable,
    parse_saved_init,
    refuse_unsupported,
    to_plain_value,
)
from lora_kit.config.validation import MAX_RANK
from lora_kit.errors import ConfigError
from lora_kit.io.strict_json import JsonObject, parse_object
from lora_kit.io.text import format_value

__all__ = ["ALL_LINEAR", "MAX_RANK", "NO_TARGETS", "LoraConfig"]

ALL_LINEAR: Final = "all-linear"
NO_TARGETS: Final = "dummy-target-modules"
"""What PEFT writes for `target_modules` where an adapter has `modules_to_save` only."""

_WEIGHT_BASED_INIT: Final = re.compile(r"pissa(_niter_[1-9]\d?)?|olora")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r"""A low-rank update of chosen linear layers: `y = base(x) + scaling · B A x`.

    `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732).

    Attributes:
        r: rank of the update; 1 to 65,536.
        lora_alpha: numerator of the scaling; finite and not zero.
        lora_dropout: probability of dropping an element of a layer's input on its way to A, in training; 0 to below 1.
        target_modules: `"all-linear"`; or names, each matching a module of that path or whose path ends in `.name`; or
            one regular expression that must match a whole path. Empty for an adapter of `modules_to_save` only.
        target_parameters: parameters that get LoRA weights though their module is not a linear layer, by ends of their
            paths: the fused experts of a mixture (`mlp.experts.gate_up_proj`), the weight of its router. Not together
            with dropout, DoRA, or patterns of ranks and alphas.
        exclude_modules: names or one regular expression, as above, that are left out.
        layers_to_transform: indices of the layers to adapt; all of them if None.
        layers_pattern: names of the module lists that those indices count in (`layers`, `h`); any if None.
        rank_pattern: exceptions to `r`: from a name or regular expression that matches the end of a path to the rank.
            The first match wins.
        alpha_pattern: exceptions to `lora_alpha`, in the same way.
        use_rslora: rank-stabilized scaling.
        use_dora: train a magnitude for every row of the adapted weight as well (Liu et al. 2024, arXiv 2402.09353).
        modules_to_save: modules trained in full and saved beside the LoRA weights (a classification head): every module
            whose path ends in one of these names, as in PEFT, so that `classifier` means `pre_classifier` as well.
        trainable_token_indices: tokens whose rows of the input embedding are trained and saved, and nothing else of it:
            new tokens. Or a mapping from names of embeddings (and of heads that are not tied) to such tokens. A head
            that shares the embedding's weight has the same rows.
        init_lora_weights: how A and B begin: True, `"gaussian"`, False, `"pissa"`, `"pissa_niter_N"` or `"olora"`.
            True: A Kaiming-uniform, B zero. `"gaussian"`: A normal with deviation 1/r, B zero. False:
            both random, so that a fresh adapter changes the output (for tests). `"pissa"`, `"olora"`: from the layer's
            own weight, which is not changed: see `lora_kit.layers.initialization`; saved as plain LoRA weights of rank
            2r. `"pissa_niter_N"`: by N iterations, 1 to 99, quick where weights are large (16 is usual). `"eva"`,
            `"mica"`, `"orthogonal"`: how PEFT initialized a saved adapter; a label, with which nothing is trained here.
        fan_in_fan_out: the covered weights are stored (in, out), as those of transformers' Conv1D are. A label for
            other tools: here the layer itself says it.
        base_model_name_or_path: name of the base; a label for other tools.
        revision: of the base; a label for other tools.
        task_type: PEFT's name of the task; a label for other tools.
        inference_mode: a label for other tools.
        extra: unknown fields of a foreign config, kept when it is saved again.

    Raises:
        ConfigError: on construction, for a value of the wrong type or out of range.

    Example:
        lk.LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
        lk.LoraConfig(target_modules=(), modules_to_save=("score",))      # a head alone
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
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)

    if TYPE_CHECKING:
        # The accepted types, which include lists, as in PEFT. The fields have the types that these are converted to.
        def __init__(
            self,
            *,
            r: int = ...,
            lora_alpha: float = ...,
            lora_dropout: float = ...,
            target_modules: str | Collection[str] = ...,
            target_parameters: str | Collection[str] = ...,
            exclude_modules: str | Collection[str] | None = ...,
            layers_to_transform: int | Sequence[int] | None = ...,
            layers_pattern: str | Collection[str] | None = ...,
            rank_pattern: Mapping[str, int] = ...,
            alpha_pattern: Mapping[str, float] = ...,
            use_rslora: bool = ...,
            use_dora: bool = ...,
            modules_to_save: str | Collection[str] = ...,
            trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = ...,
            init_lora_weights: bool | str = ...,
            fan_in_fan_out: bool = ...,
            base_model_name_or_path: str | None = ...,
            revision: str | None = ...,
            task_type: str | None = ...,
            inference_mode: bool = ...,
            extra: Mapping[str, object] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        self._parse_numbers()
        self._parse_names()
        self._parse_patterns()
        self._check_init()
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"):
            value = getattr(self, name)
            validation.require(isinstance(value, bool), name, value, "true or false")
        for name in ("base_model_name_or_path", "revision", "task_type"):
            value = getattr(self, name)
            validation.require(value is None or isinstance(value, str), name, value, "a string or null")
        self._set("extra", MappingProxyType(dict(self.extra)))
        check_combinations(self)

    def _parse_numbers(self) -> None:
        self._parse("r", validation.parse_rank)
        self._parse("lora_alpha", validation.parse_alpha)
        dropout = self.lora_dropout
        in_range = validation.is_finite_number(dropout) and 0 <= dropout < 1
        validation.require(in_range, "lora_dropout", dropout, "a number from 0 to below 1")

    def _parse_names(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            self._parse(name, validation.parse_names_or_expression, (ALL_LINEAR,))
        for name in ("target_parameters", "modules_to_save", "layers_pattern"):
            self._parse(name, validation.parse_names)
        for name in ("target_modules", "target_parameters", "modules_to_save"):
            self._set(name, getattr(self, name) or ())

    def _parse_patterns(self) -> None:
        self._parse("layers_to_transform", validation.parse_layer_indices)
        self._parse("rank_pattern", validation.parse_pattern_table, validation.parse_rank)
        self._parse("alpha_pattern", validation.parse_pattern_table, validation.parse_alpha)
        self._parse("trainable_token_indices", validation.parse_token_indices)

    def _check_init(self) -> None:
        init = self.init_lora_weights
        known = isinstance(init, bool) or init in (GAUSSIAN, *INITS_OF_PEFT) or self.starts_from_weight
        words = "true, false, 'gaussian', 'pissa', 'pissa_niter_N' with N from 1 to 99, or 'olora'"
        validation.require(known, "init_lora_weights", init, words)

    def _parse(self, name: str, parser: Callable[..., object], *more: object) -> None:
        self._set(name, parser(name, getattr(self, name), *more))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Callable[[JsonObject], LoraConfig], tuple[JsonObject]]:
        # Mapping proxies do not pickle; the plain fields do.
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: dict(value) if isinstance(value, MappingProxyType) else value for name, value in values.items()}
        return _rebuild, (plain,)

    @property
    def starts_from_weight(self) -> bool:
        """Whether the LoRA weights of a fresh adapter are computed from the layer's weight (PiSSA, OLoRA)."""
        init = self.init_lora_weights
        return isinstance(init, str) and _WEIGHT_BASED_INIT.fullmatch(init) is not None

    @property
    def ties_weights(self) -> bool:
        """Whether what is tied to the input embedding was trained with it (PEFT's `ensure_weight_tying`)."""
        return bool(self.extra.get("ensure_weight_tying"))

    def names_layer(self, path: str) -> bool:
        """Return whether `target_modules` may mean the layer of this path; `all-linear` may mean any."""
        names = self.target_modules
        if isinstance(names, str):
            return names == ALL_LINEAR or matches(names, path)
        return not set(names).isdisjoint(suffixes_of(path))

    def rank_of(self, path: str) -> int:
        """Return the rank at the module of this path: the first `rank_pattern` that matches, else `r`."""
        return self._ranks.first(path, default=self.r) if self.rank_pattern else self.r

    def alpha_of(self, path: str) -> float:
        """Return the alpha at the module of this path: the first `alpha_pattern` that matches, else `lora_alpha`."""
        return self._alphas.first(path, default=self.lora_alpha) if self.alpha_pattern else self.lora_alpha

    def scaling_of(self, path: str) -> float:
        """Return the factor of `B A x` at the module of this path: alpha/r, or alpha/sqrt(r) with `use_rslora`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def tokens_of(self, path: str) -> tuple[int, ...]:
        """Return the tokens whose rows are trained in the embedding of this path; none where it is not named."""
        tokens = self.trainable_token_indices
        if tokens is None or isinstance(tokens, tuple):
            return tokens or ()  # which embedding a list belongs to, only the model says
        return next((tokens[name] for name in suffixes_of(path) if name in tokens), ())

    @functools.cached_property
    def _ranks(self) -> PatternTable[int]:
        return PatternTable(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> PatternTable[float]:
        return PatternTable(self.alpha_pattern)

    @property
    def largest_rank(self) -> int:
        """The largest rank any module of this adapter can have; 0 where it has no LoRA weights."""
        return max(self.r, *self.rank_pattern.values(), 0) if self.target_modules or self.target_parameters else 0

    @classmethod
    def of(cls, config: object) -> LoraConfig:
        """Return the config of a fresh adapter from a LoraConfig, a mapping of PEFT's fields, or a `peft.LoraConfig`.

        Raises:
            ConfigError: it is something else, or has an invalid value; see `from_dict`.
        """
        if isinstance(config, cls):
            return config
        convert = getattr(config, "to_dict", None)
        if callable(convert) and hasattr(config, "peft_type"):
            config = convert()
        if isinstance(config, Mapping):
            # `from_dict` rejects PiSSA and OLoRA, since tensors of a saved adapter would then need a changed base. An
            # adapter that is yet to be trained may start so.
            init = config.get("init_lora_weights", True)
            return dataclasses.replace(cls.from_dict({**config, "init_lora_weights": True}), init_lora_weights=init)
        raise ConfigError(f"a LoraConfig was expected, {type(config).__name__} was given")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LoraConfig:
        """Build a config from the fields of an `adapter_config.json`; unknown ones go to `extra`.

        Raises:
            ConfigError: it is of another kind of adapter, has an invalid value, or a field that changes the arithmetic
                in a way that is not supported.
        """
        kind = fields.get("peft_type", "LORA")
        kind = getattr(kind, "value", kind)
        if kind != "LORA":
            raise ConfigError(
                f"peft_type is {format_value(kind)}: only LORA adapters are read",
                hint="convert it to LoRA in PEFT first",
            )
        refuse_unsupported(fields)
        own = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {name: value for name, value in fields.items() if name in own}
        if known.get("target_modules", ()) in (None, NO_TARGETS):
            known["target_modules"] = ()
        for name in ("modules_to_save", "target_parameters"):
            known[name] = known.get(name) or ()
        for name in ("rank_pattern", "alpha_pattern"):
            known[name] = known.get(name) or {}
        if isinstance(init := known.get("init_lora_weights"), str):
            known["init_lora_weights"] = parse_saved_init(init)
        if known.get("task_type") is not None:
            known["task_type"] = getattr(known["task_type"], "value", known["task_type"])
        extra = {
            name: value
            for name, value in fields.items()
            if name not in own and name not in FIXED_FIELDS and not is_dispensable(name, value)
        }
        return cls(**known, extra={name: getattr(value, "value", value) for name, value in extra.items()})

    @classmethod
    def from_json(cls, text: str, *, source: str = "adapter_config.json") -> LoraConfig:
        """Parse the text of an `adapter_config.json`.

        Args:
            source: the file, for messages.

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
        """Names in `extra` that PEFT's LoraConfig does not know either."""
        return sorted(set(self.extra) - set(CARRIED_FIELDS) - set(FIELDS_NAMING_CODE) - set(UNSUPPORTED_FIELDS))

    @property
    def fields_naming_code(self) -> list[str]:
        """Names in `extra` of fields that ask PEFT to import code. They are carried; nothing is imported."""
        return [name for name, harmless in FIELDS_NAMING_CODE.items() if self.extra.get(name) not in harmless]

    def to_dict(self) -> JsonObject:
        """Return PEFT's fields as JSON values, in a fixed order; newer ones only where they say something."""
        fields = {f.name: to_plain_value(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        fields["target_modules"] = fields["target_modules"] or NO_TARGETS
        fields["modules_to_save"] = fields["modules_to_save"] or None
        fields = {**FIXED_FIELDS, **{name: to_plain_value(value) for name, value in self.extra.items()}, **fields}
        return {name: value for name, value in sorted(fields.items()) if not is_dispensable(name, value)}

    def to_json(self) -> str:
        """Return the text of an `adapter_config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _rebuild(values: JsonObject) -> LoraConfig:
    return LoraConfig(**values)
