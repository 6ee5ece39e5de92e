"""An optional last check: the logits of the merged model are those of base + adapter."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lora_kit.bank.attach import attach
from lora_kit.errors import MergeError, VerificationError, format_list
from lora_kit.merging.checkpoint.meta_model import TaskHead
from lora_kit.merging.merge_report import LogitCheck
from lora_kit.merging.planned_tensors import WeightedAdapter
from lora_kit.models.loading import load_base
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, TASK_SPECS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_COMPARABLE_TASKS: Final = (CAUSAL_LM, CLASSIFY)
_PROBE_ROWS: Final = 2
_PROBE_LENGTH: Final = 24
_MARGIN: Final = 3.0
"""Largest difference as a multiple of the response to one draw of rounding noise."""
_FLOOR: Final = 16 * torch.finfo(torch.float32).eps
"""Share of the largest logit by which two orders of one fp32 sum may differ, times the root of the changed tensors."""


def check_logits_comparable(adapters: Sequence[WeightedAdapter]) -> None:
    """Raise MergeError where logits cannot be compared."""
    head = TaskHead.of(adapters[0].adapter)
    if head.spec.name not in _COMPARABLE_TASKS:
        raise MergeError(
            f"logits of {head.task} are not compared",
            hint=f"those of {format_list([TASK_SPECS[task].peft_type for task in _COMPARABLE_TASKS])} are",
        )
    if len(adapters) > 1 or adapters[0].weight != 1:
        raise MergeError("logits are compared for one adapter of weight 1", hint="merge these with verify='weights'")


def check_logits(
    base: str | Path,
    folder: Path,
    weighted: WeightedAdapter,
    *,
    head: TaskHead,
    paths: Collection[str] | None,
    dtype: torch.dtype,
    allow: Collection[str],
) -> LogitCheck:
    """Load both models and compare them on fixed random tokens.

    Args:
        base: as `load_base` takes it.
        folder: of the merged model.
        weighted: the adapter.
        head: of both models.
        paths: modules whose weights were rounded to `dtype`; None: all of them.
        dtype: of the merged weights.
        allow: as in `AdapterBank.load`.

    Raises:
        VerificationError: the difference is more than rounding explains.
    """
    given: dict[str, Any] = {"task": head.spec.name}
    if given["task"] == CLASSIFY:
        numbers = {label: number for number, label in enumerate(head.labels)}
        given |= {"label2id": numbers} if numbers else {"num_labels": head.num_labels}
        given["problem"] = head.problem
    model = load_base(base, **given).model
    bank = attach(model, dtype=torch.float32)
    # A DoRA's norm has unrounded factors where the weights do, as in the merge.
    with use_fp32(model) if dtype == torch.float32 else nullcontext():
        bank.load(weighted.name, weighted.adapter, allow=allow)
    without = compute_probe_logits(model)
    with bank.using(weighted.name):
        expected = compute_probe_logits(model)
    del model, bank
    merged = load_base(folder, **given).model
    actual = compute_probe_logits(merged)
    everything = [path for path, _ in merged.named_modules()]
    result = LogitCheck(
        largest_difference=float((actual - expected).abs().max()),
        bound=estimate_rounding_bound(merged, actual, paths=everything if paths is None else paths, dtype=dtype),
        effect=float((expected - without).abs().max()),
    )
    _check_bound(result)
    return result


def _check_bound(check: LogitCheck) -> None:
    """Raise VerificationError for a difference above its bound; warn of a bound that could hide the adapter itself."""
    if not check.largest_difference <= check.bound:
        raise VerificationError(
            f"a logit of the merged model is {check.largest_difference:.3g} away from base + adapter; the bound is "
            f"{check.bound:.3g}",
            hint="nothing was written",
        )
    if check.effect <= check.bound:
        message = "the adapter changes no logit by more than %.3g, and rounding may change one by %.3g"
        logger.warning(message, check.effect, check.bound)


def compute_probe_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of a model for fixed random tokens, computed in fp32: (rows, ...) on the CPU."""
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


def estimate_rounding_bound(
    model: PreTrainedModel, logits: Tensor, *, paths: Collection[str], dtype: torch.dtype
) -> float:
    """Return the largest difference of a logit that rounding the weights of some modules to `dtype` explains.

    A rounding moves a weight w by a random part of u·|w|, where u is half the dtype's epsilon. So the model gets such
    noise on purpose, w(1 + u·ξ) with ξ uniform on [-1, 1], and the largest change of a logit is measured. The model's
    weights must not be used afterwards.

    Args:
        model: computes `logits` for the probe.
        logits: of the probe.
        paths: of the modules that were rounded.
        dtype: that they were rounded to.

    Returns:
        `_MARGIN` times that change, plus the difference of fp32 sums in another order.
    """
    # Noise below a few epsilons of fp32 would be rounded away.
    unit = max(torch.finfo(dtype).eps / 2, 4 * torch.finfo(torch.float32).eps)
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
    """Compute in fp32, which holds 16-bit values exactly; afterwards the model is bitwise what it was."""
    before = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)
