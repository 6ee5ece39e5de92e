"""Load a base with its tokenizer: on a device, in a dtype, quantized on request.

Code that comes with a model is never run, a missing weight is an error, and the pad token always exists.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from lora_kit.errors import BaseModelError, LoraKitError
from lora_kit.io.text import check_one_of
from lora_kit.layers.introspect import pause_packing
from lora_kit.models.checkpoint_head import read_base_config
from lora_kit.models.head_config import set_labels, set_problem
from lora_kit.models.heads import (
    check_loading_info,
    renew_label_layer,
)
from lora_kit.models.input_lengths import count_reserved_positions, count_reserved_positions_of, max_length_of
from lora_kit.models.locate import BaseSource, locate_base, translate_load_errors
from lora_kit.models.model_record import read_model_record
from lora_kit.models.prompt_tokens import prepare_decoder_inputs
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.quantization import (
    QUANTIZATIONS,
    build_quantization_kwargs,
    quantization_method_of,
    refuse_already_quantized,
    refuse_misread_weights,
    silence_cast_warnings,
)
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import (
    CAUSAL_LM,
    CLASSIFY,
    PROBLEMS,
    SEQ2SEQ,
    TASK_SPECS,
    TASKS,
    find_problem_by_type,
)
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.torch_utils import parse_float_dtype, preserve_random_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_HEAD_SEED: Final = 0
"""Seed of a new head that the checkpoint does not have: every load of a base gives the same head."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded base model with its tokenizer.

    Attributes:
        model: a `transformers.PreTrainedModel` in evaluation mode, on its device.
        tokenizer: with a pad token.
        name: as the caller gave it: a hub id, a folder or `kit-base`.
        task: one of `TASKS`.
        new_modules: paths of modules of the body that the checkpoint does not have: they belong to the new head.
        record: how it is asked, where its folder says it; see `lora_kit.adapter.use_record`.
    """

    model: Any  # transformers does not declare what it adds to its models: generate, labels of a config, …
    tokenizer: Tokenizer
    name: str
    task: str = CAUSAL_LM
    new_modules: tuple[str, ...] = ()
    record: Mapping[str, object] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """Id of the pad token, which every base has once it is loaded."""
        pad = self.tokenizer.pad_token_id
        assert pad is not None, "load_base sets a pad token"
        return pad

    @property
    def problem(self) -> str | None:
        """What the head predicts of a whole text, one of `lora_kit.models.tasks.PROBLEMS`; None for other tasks."""
        return find_problem_by_type(self.model.config.problem_type) if self.task == CLASSIFY else None

    def fingerprint(self) -> dict[str, Any]:
        """Return what distinguishes this base from others; see `lora_kit.targets.fingerprint`."""
        return fingerprint(self.model, name=self.name)

    @property
    def decoder_inputs(self) -> Callable[[Tensor], Tensor] | None:
        """Function from labels to the inputs of the decoder, see `prepare_decoder_inputs`; None without an encoder."""
        return functools.partial(prepare_decoder_inputs, self.model) if self.task == SEQ2SEQ else None

    @property
    def takes_token_types(self) -> bool:
        """Whether the model reads which of two texts a token belongs to; RoBERTa and DistilBERT do not."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        takes = "token_type_ids" in inspect.signature(model.forward).parameters
        return takes and getattr(model.config, "type_vocab_size", None) != 1

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once; 2^30 where neither the model nor the tokenizer says."""
        return max_length_of(self.model.config, self.tokenizer) - count_reserved_positions(self.model)


def load_base(
    base: str | Path,
    *,
    task: str = CAUSAL_LM,
    num_labels: int | None = None,
    label2id: Mapping[str, int] | None = None,
    problem: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
) -> Base:
    """Load a base model and its tokenizer, ready to attach adapters to.

    Args:
        base: a local folder, `kit-base` (which comes with the package and needs no network), or a hub id; the id may
            have a revision (`organization/name@revision`) and a subfolder (`organization/name/subfolder`).
        task: `causal-lm`; `classify` for a head over the whole text, `tokens` for one over each token; `seq2seq`.
        num_labels: size of that head; needed for those two unless `label2id` is given or the checkpoint has a head.
        label2id: label names to their numbers, kept in the model's config. The checkpoint's head is used if its labels
            are these in this order, or as many without names; otherwise the layer that predicts them is new, with a
            warning.
        problem: what `classify` predicts: `single-label`, `multi-label` or `regression`, which has one output; None for
            what the checkpoint says, else one label.
        dtype: `bf16`, `fp16`, `fp32` or a torch.dtype; None or `auto` for the checkpoint's own.
        device: where to put the model; None for CUDA where there is a device and the CPU otherwise.
        quantize: one of `QUANTIZATIONS`, through bitsandbytes; None for the weights as the checkpoint has them.

    Raises:
        BaseModelError: no base of that name, missing or truncated files, weights that do not fill the model, a base to
            quantize that is already quantized, or 4-bit weights that bitsandbytes reads wrong on this device.
        ConfigError: an unknown dtype.

    Example:
        base = lk.load_base("kit-base", dtype="fp32")
    """
    _check_option("task", task, TASKS)
    _check_option("problem", problem, PROBLEMS)
    _check_option("quantize", quantize, QUANTIZATIONS)
    torch_dtype = _resolve_dtype(dtype)
    torch_device = _resolve_device(device)
    source, name = locate_base(base), str(base)
    with silence_libraries(), translate_load_errors(name):
        config = read_base_config(source)
        if task == CLASSIFY:
            set_problem(config, problem)
        replaced = set_labels(config, name, task=task, num_labels=num_labels, label2id=label2id)
        _check_architecture(name, config, task)
        refuse_already_quantized(name, config, quantize)
        tokenizer = _load_tokenizer(source, config, task=task)
        labels = tuple(label2id or ())
        model, new_modules = _load_model(
            source, config, task, dtype=torch_dtype, device=torch_device, quantize=quantize, labels=labels
        )
    if replaced:
        _replace_head(model, name, task, replaced)
    _ensure_pad_token(model, tokenizer, name, task)
    model.config._name_or_path = name  # PEFT writes it into adapters: the name as given, not the package's folder
    model.eval()
    record = read_model_record(source)
    return Base(model=model, tokenizer=tokenizer, name=name, task=task, new_modules=new_modules, record=record)


@dataclass(frozen=True)
class InputSpec:
    """What is known about the input of a base without its weights.

    Attributes:
        tokenizer: of the base.
        max_length: tokens that the base reads at once, as `Base.max_length`.
        is_encoder_decoder: whether it has an encoder and a decoder.
        hidden_size: width of its layers; None where the config does not say it.
    """

    tokenizer: Tokenizer
    max_length: int
    is_encoder_decoder: bool
    hidden_size: int | None = None

    @property
    def generative_task(self) -> str:
        """The task in which this base generates text."""
        return SEQ2SEQ if self.is_encoder_decoder else CAUSAL_LM


def load_input_spec(base: str | Path) -> InputSpec:
    """Load the tokenizer of a base, and what its config says about its input.

    Raises:
        BaseModelError: no base of that name, or no tokenizer that can be read.
    """
    source = locate_base(base)
    with silence_libraries(), translate_load_errors(str(base)):
        config = read_base_config(source)
        tokenizer = _load_tokenizer(source, config)
        max_length = max_length_of(config, tokenizer) - count_reserved_positions_of(config)
    width = getattr(config.get_text_config(), "hidden_size", None)
    return InputSpec(tokenizer, max_length, _is_encoder_decoder(config), width if isinstance(width, int) else None)


def _is_encoder_decoder(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _check_option(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None:
        check_one_of(name, value, known, error=BaseModelError)


def _resolve_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    return "auto" if dtype is None or dtype == "auto" else parse_float_dtype(dtype)


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch_device = torch.device(device)
    except RuntimeError:
        raise BaseModelError(f"device {device!r} is not known", hint="give cpu, cuda or cuda:0") from None
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device {device!r} was given, but torch finds no CUDA device", hint="use cpu")
    return torch_device


def _replace_head(model: PreTrainedModel, name: str, task: str, reason: str) -> None:
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(_HEAD_SEED)
        renew_label_layer(model, task)
    logger.warning("%s: the head's last layer is new; the one in the checkpoint is not used: %s", name, reason)


def _check_architecture(name: str, config: PretrainedConfig, task: str) -> None:
    if task == SEQ2SEQ and not _is_encoder_decoder(config):
        raise BaseModelError(f"{name}: task seq2seq needs an encoder and a decoder", hint="task: causal-lm")
    if task == CAUSAL_LM and _is_encoder_decoder(config):
        raise BaseModelError(f"{name} has an encoder, which task causal-lm does not use", hint="task: seq2seq")


def _load_tokenizer(source: BaseSource, config: PretrainedConfig, *, task: str | None = None) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, config=config, **source.loading_options)
    except Exception as error:  # of files of the wrong shape: an AttributeError of a list, a TypeError of a number
        if "trust_remote_code" in str(error) or isinstance(error, (MemoryError, LoraKitError)):
            raise
        raise BaseModelError(
            f"{source.location}: no tokenizer that can be read", hint="a base needs tokenizer.json beside its weights"
        ) from error
    if task == CLASSIFY and _is_encoder_decoder(config):
        # Their heads read the state at the last end of a text, and want as many ends in each text of a batch.
        tokenizer.split_special_tokens = True
    return cast("Tokenizer", tokenizer)  # transformers declares the special tokens only at run time


def _load_model(
    source: BaseSource,
    config: PretrainedConfig,
    task: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    quantize: str | None,
    labels: Sequence[str],
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model, and the paths of modules in its body that belong to its new head."""
    import transformers

    auto_class = getattr(transformers, TASK_SPECS[task].auto_class)
    with preserve_random_states(device):
        torch.manual_seed(_HEAD_SEED)
        model, info = auto_class.from_pretrained(
            source.location,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(labels),
            **source.loading_options,
            **build_quantization_kwargs(quantize, quantization_method_of(config), device),
        )
    new_modules = check_loading_info(source.location, task, info, labels=labels)
    if not getattr(model, "is_quantized", False):
        return model.to(device), new_modules
    refuse_misread_weights(source.location, model)
    pause_packing(model)
    silence_cast_warnings()
    return model, new_modules


def _ensure_pad_token(model: PreTrainedModel, tokenizer: Tokenizer, name: str, task: str) -> None:
    """Make sure that there is a pad token that the model can read.

    Reusing EOS is safe: padding is masked by its position, never by its id.
    """
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        reason = "no pad token" if tokenizer.pad_token_id is None else f"pad token outside its {rows:,} embeddings"
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
            raise BaseModelError(f"{name}: {reason}, and no EOS token to use instead")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s: %s; %r is used with an attention mask", name, reason, tokenizer.eos_token)
    config = model.config.get_text_config()
    # A decoder that classifies finds the last token that is not padding by this id.
    if config.pad_token_id is None or config.pad_token_id >= rows or task == CLASSIFY:
        config.pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and (generation.pad_token_id is None or generation.pad_token_id >= rows):
        generation.pad_token_id = tokenizer.pad_token_id
