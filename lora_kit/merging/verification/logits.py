"""The last check, for who asks for it: the logits of the merged folder are those of base + adapter."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.bank.attach import attach
from lora_kit.errors import MergeError, VerificationError, format_list
from lora_kit.merging.checkpoint.meta_model import TaskHead
from lora_kit.merging.merge_report import LogitCheck
from lora_kit.merging.planned_tensors import WeightedAdapter
from lora_kit.models.loading import load_base

logger = logging.getLogger(__name__)

_LOADING_TASKS: Final = {None: "causal-lm", "CAUSAL_LM": "causal-lm", "SEQ_CLS": "classify"}
_PROBE_ROWS: Final = 2
_PROBE_LENGTH: Final = 24
_MARGIN: Final = 3.0
"""How many times the response to one draw of rounding noise a difference may be."""
_FLOOR: Final = 16 * torch.finfo(torch.float32).eps
"""Share of the largest logit by which two orders of one fp32 sum may differ, times the root of the changed tensors."""


def check_logits_comparable(parts: Sequence[WeightedAdapter]) -> None:
    """Raise MergeError where logits cannot be compared."""
    head = TaskHead.of(parts[0].adapter)
    if head.task not in _LOADING_TASKS:
        raise MergeError(
            f"logits of {head.task} are not compared",
            hint=f"those of {format_list([*filter(None, _LOADING_TASKS)])} are",
        )
    if len(parts) > 1 or any(part.weight != 1 for part in parts):
        raise MergeError("logits are compared for one adapter of weight 1", hint="merge these with verify='weights'")


def check_logits(
    base: str | Path,
    folder: Path,
    part: WeightedAdapter,
    *,
    head: TaskHead,
    paths: Collection[str] | None,
    dtype: torch.dtype,
    allow: Collection[str],
) -> LogitCheck:
    """Load both models and compare them on fixed random tokens.

    Args:
        base: as `load_base` takes it. folder: the merged model.
        paths: modules whose weights were rounded to `dtype`; None: all of them.

    Raises:
        VerificationError: the difference is more than rounding explains.
    """
    given: dict[str, Any] = {"task": _LOADING_TASKS[head.task]}
    if given["task"] == "classify":
        numbers = {label: number for number, label in enumerate(head.labels)}
        given |= {"label2id": numbers} if numbers else {"num_labels": head.num_labels}
    model = load_base(base, **given).model
    bank = attach(model, dtype=torch.float32)
    bank.load(part.name, part.adapter, allow=allow)
    without = compute_probe_logits(model)
    with bank.using(part.name):
        wanted = compute_probe_logits(model)
    del model, bank
    merged = load_base(folder, **given).model
    found = compute_probe_logits(merged)
    everything = [path for path, _ in merged.named_modules()]
    result = LogitCheck(
        largest_difference=float((found - wanted).abs().max()),
        bound=estimate_rounding_bound(merged, found, paths=everything if paths is None else paths, dtype=dtype),
        effect=float((wanted - without).abs().max()),
    )
    _check_bound(result)
    return result


def _check_bound(found: LogitCheck) -> None:
    """Raise VerificationError for a difference above its bound; warn of a bound that could hide the adapter itself."""
    if not found.largest_difference <= found.bound:
        raise VerificationError(
            f"a logit of the merged model is {found.largest_difference:.3g} away from base + adapter; the bound is "
            f"{found.bound:.3g}",
            hint="nothing was written",
        )
    if found.effect <= found.bound:
        told = "the adapter changes no logit by more than %.3g, less than rounding may (%.3g)"
        logger.warning(told, found.effect, found.bound)


def compute_probe_logits(model: Any) -> Tensor:
    """Logits of the model for fixed random tokens, computed in fp32: (rows, ...) on the CPU."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    length = min(_PROBE_LENGTH, context) if isinstance(context, int) and context > 0 else _PROBE_LENGTH
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (_PROBE_ROWS, length), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with use_fp32(model), torch.inference_mode():
        logits: Tensor = model(**inputs).logits
    return logits.detach().float().cpu()


def estimate_rounding_bound(model: nn.Module, logits: Tensor, *, paths: Collection[str], dtype: torch.dtype) -> float:
    """What the difference of two logits may be when the modules of these paths were rounded once to `dtype`.

    A rounding moves a weight w by a random part of u·|w|, u being half the dtype's epsilon. So the model is given such
    noise on purpose, w(1 + u·ξ) with ξ uniform on [-1, 1], and the largest change of a logit is the measure. The
    model's weights are not to be used afterwards.

    Args:
        model: a model that computes `logits` for the probe.
        logits: those logits.

    Returns:
        `_MARGIN` times that change, and the differences of fp32 sums taken in another order.
    """
    unit = max(
        torch.finfo(dtype).eps / 2, 4 * torch.finfo(torch.float32).eps
    )  # below that the noise itself is rounded away
    chosen = [p for path in paths for p in model.get_submodule(path).parameters(recurse=False) if p.is_floating_point()]
    with use_fp32(model):
        for parameter in chosen:
            generator = torch.Generator(parameter.device).manual_seed(0)
            noise = torch.empty_like(parameter).uniform_(-unit, unit, generator=generator)
            parameter.data.mul_(1 + noise)
        response = float((compute_probe_logits(model) - logits).abs().max())
    return _MARGIN * response + _FLOOR * math.sqrt(max(len(chosen), 1)) * float(logits.abs().max())


@contextmanager
def use_fp32(model: nn.Module) -> Iterator[None]:
    """The model with its parameters in fp32, which holds half precisions exactly; afterwards as it was, bit for bit."""
    before = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)
