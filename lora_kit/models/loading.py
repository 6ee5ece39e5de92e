"""Loading a base with its tokenizer, on a device, in a dtype, quantised.

Code that comes with a model is never run, a weight that is missing is an error, and the pad token always exists.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.errors import BaseModelError, format_list, suggest_nearest
from lora_kit.layers.introspect import pause_packing
from lora_kit.models.heads import check_loading_info
from lora_kit.models.locate import locate, silence_libraries, translate_load_errors
from lora_kit.models.prompt_tokens import prepare_decoder_inputs
from lora_kit.models.quantization import (
    QUANTIZATIONS,
    build_quantization_kwargs,
    quantization_method_of,
    refuse_already_quantized,
    refuse_misread_weights,
    silence_cast_warnings,
)
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.torch_utils import parse_float_dtype

logger = logging.getLogger(__name__)

TASKS: Final = ("causal-lm", "classify", "tokens", "seq2seq")
"""Text that goes on; a label for a text; a label for each word; a text for a text, by an encoder and a decoder."""
_HEAD_SEED: Final = 0
"""A head that the checkpoint does not have is drawn from this seed, so that one base is the same base every time."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded base model with its tokenizer.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: with a pad token.
        name: what it was asked for by: a hub id, a folder or `kit-base`.
        task: one of `TASKS`.
    """

    model: Any
    tokenizer: Any
    name: str
    task: str = "causal-lm"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def fingerprint(self) -> dict[str, Any]:
        """What tells this base from others; see `lora_kit.targets.fingerprint`."""
        return fingerprint(self.model, name=self.name)

    @property
    def decoder_inputs(self) -> Callable[[Tensor], Tensor] | None:
        """What a decoder reads while it learns to write labels, see `decoder_inputs`; None without an encoder."""
        return functools.partial(prepare_decoder_inputs, self.model) if self.task == "seq2seq" else None

    @property
    def max_length(self) -> int:
        """Tokens the model can see at once; 2^30 where neither the model nor the tokenizer says."""
        return _max_length_of(self.model.config, self.tokenizer)


def load_base(
    base: str | Path,
    *,
    task: str = "causal-lm",
    num_labels: int | None = None,
    label2id: Mapping[str, int] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
) -> Base:
    """A base model and its tokenizer, ready to attach adapters to.

    Args:
        base: a hub id, a local folder, or `kit-base` (which comes with the package and needs no network).
        task: `causal-lm`; `classify` for a head over the whole text, `tokens` for one over each token; `seq2seq`.
        num_labels: size of that head; needed for those two unless `label2id` is given or the checkpoint has a head.
        label2id: names of the labels to their numbers, kept in the model's config.
        dtype: `bf16`, `fp16`, `fp32` or a torch.dtype; None or `auto` for the checkpoint's own.
        device: where to put it; None for CUDA where there is one and the CPU otherwise.
        quantize: one of `QUANTIZATIONS`, through bitsandbytes; None for the weights as they are: also those of a
            checkpoint that is quantised already, by whatever package transformers reads it with.

    Raises:
        BaseModelError: nothing of that name, files that are missing or torn, weights that do not fill the model or
            that are quantised already, or 4-bit weights that bitsandbytes reads wrong on this device.
        ConfigError: an unknown dtype.

    Example:
        base = lk.load_base("kit-base", dtype="fp32")
        base.model, base.tokenizer
    """
    _check_one_of("task", task, TASKS)
    _check_one_of("quantize", quantize, QUANTIZATIONS)
    torch_dtype = _resolve_dtype(dtype)
    place = _resolve_device(device)
    source, offline = locate(base)
    name = str(base)
    with silence_libraries(), translate_load_errors(name):
        config = _load_config(source, task=task, num_labels=num_labels, label2id=label2id, offline=offline)
        _check_architecture(name, config, task)
        refuse_already_quantized(name, config, quantize)
        tokenizer = _load_tokenizer(source, config, offline=offline)
        model = _load_model(source, config, task, dtype=torch_dtype, device=place, quantize=quantize, offline=offline)
    _ensure_pad_token(model, tokenizer, name, task)
    # What adapters are said to be made for: the name it was asked for by, not where the package happens to lie.
    model.config._name_or_path = name
    model.eval()
    return Base(model=model, tokenizer=tokenizer, name=name, task=task)


@dataclass(frozen=True)
class InputSpec:
    """How a base reads, known without its weights.

    Attributes:
        tokenizer: of the base.
        max_length: tokens it can see at once, as `Base.max_length`.
        both: whether it has an encoder and a decoder.
    """

    tokenizer: Any
    max_length: int
    both: bool


def load_input_spec(base: str | Path) -> InputSpec:
    """The tokenizer of a base and what its config says of its input.

    Raises:
        BaseModelError: nothing of that name, or no tokenizer that can be read.
    """
    source, offline = locate(base)
    with silence_libraries(), translate_load_errors(str(base)):
        config = _load_config(source, task="causal-lm", num_labels=None, label2id=None, offline=offline)
        tokenizer = _load_tokenizer(source, config, offline=offline)
    return InputSpec(tokenizer, _max_length_of(config, tokenizer), bool(getattr(config, "is_encoder_decoder", False)))


def _max_length_of(config: Any, tokenizer: Any) -> int:
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min([limit for limit in limits if isinstance(limit, int) and limit > 0] + [1 << 30])


def _check_one_of(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        hint = suggest_nearest(str(value), known) or f"known: {format_list(known)}"
        raise BaseModelError(f"{name} {value!r} is not known", hint=hint)


def _resolve_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    return "auto" if dtype is None or dtype == "auto" else parse_float_dtype(dtype)


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise BaseModelError(f"device {device!r} is not known", hint="cpu, cuda or cuda:0") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device {device!r} was asked for, and torch sees no CUDA device", hint="use cpu")
    return place


def _load_config(
    source: str, *, task: str, num_labels: int | None, label2id: Mapping[str, int] | None, offline: bool
) -> Any:
    from transformers import AutoConfig

    labels: dict[str, Any] = {}
    if label2id is not None:
        if num_labels is not None and num_labels != len(label2id):
            raise BaseModelError(f"num_labels is {num_labels} and label2id names {len(label2id)} labels")
        labels = {"label2id": dict(label2id), "id2label": {number: label for label, number in label2id.items()}}
    elif num_labels is not None:
        labels = {"num_labels": num_labels}
    if task == "classify":
        labels["problem_type"] = "single_label_classification"
    return AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=False, **labels)


def _check_architecture(name: str, config: Any, task: str) -> None:
    both = bool(getattr(config, "is_encoder_decoder", False))
    if task == "seq2seq" and not both:
        raise BaseModelError(f"{name}: task seq2seq needs an encoder and a decoder", hint="task: causal-lm")
    if task == "causal-lm" and both:
        raise BaseModelError(f"{name} has an encoder, which task causal-lm has no use for", hint="task: seq2seq")


def _load_tokenizer(source: str, config: Any, *, offline: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, config=config, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise BaseModelError(
            f"{source}: no tokenizer that can be read", hint="a base needs its tokenizer.json beside its weights"
        ) from error


def _load_model(
    source: str,
    config: Any,
    task: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    quantize: str | None,
    offline: bool,
) -> Any:
    import transformers

    kinds = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classify": transformers.AutoModelForSequenceClassification,
        "tokens": transformers.AutoModelForTokenClassification,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(_HEAD_SEED)
        model, info = kinds[task].from_pretrained(
            source,
            config=config,
            dtype=dtype,
            local_files_only=offline,
            trust_remote_code=False,
            output_loading_info=True,
            **build_quantization_kwargs(quantize, quantization_method_of(config), device),
        )
    check_loading_info(source, task, info)
    if not getattr(model, "is_quantized", False):
        return model.to(device)
    refuse_misread_weights(source, model)
    pause_packing(model)
    silence_cast_warnings()
    return model


def _ensure_pad_token(model: Any, tokenizer: Any, name: str, task: str) -> None:
    """Make the pad token exist. Reusing EOS is safe: padding is masked by its place, never by its id."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BaseModelError(f"{name}: the tokenizer has neither a pad token nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s: no pad token; %r is used, behind an attention mask", name, tokenizer.eos_token)
    config = model.config.get_text_config()
    # Decoders that classify look for the last token that is not padding, by this id.
    if config.pad_token_id is None or task == "classify":
        config.pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
