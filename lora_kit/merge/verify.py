"""Proving a merge from what was written: every tensor reads back, and the logits are those of base + adapter."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import VerificationError, listed

logger = logging.getLogger(__name__)

_ROWS: Final = 2
_LENGTH: Final = 24
_MARGIN: Final = 3.0
"""How many times the response to one draw of rounding noise a difference may be."""
_FLOOR: Final = 16 * torch.finfo(torch.float32).eps
"""Share of the largest logit by which two orders of one fp32 sum may differ, times the root of the changed tensors."""


def check_read_back(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Raise VerificationError unless what was read back has the same names and the same bits."""
    names = sorted(set(written) ^ set(read))
    if names:
        raise VerificationError(f"the folder read back has other tensors than were merged: {listed(names)}")
    changed = [name for name, tensor in written.items() if not _same_bits(tensor, read[name])]
    if changed:
        raise VerificationError(
            f"tensors read back differ from what was merged: {listed(changed)}", hint="is the disk sound?"
        )


def probe(model: Any) -> Tensor:
    """Logits of the model for fixed random tokens, computed in fp32: (rows, ...) on the CPU."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    length = min(_LENGTH, context) if isinstance(context, int) and context > 0 else _LENGTH
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (_ROWS, length), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with in_fp32(model), torch.inference_mode():
        logits: Tensor = model(**inputs).logits
    return logits.detach().float().cpu()


def rounding_bound(model: nn.Module, logits: Tensor, *, paths: Collection[str], dtype: torch.dtype) -> float:
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
    with in_fp32(model):
        for parameter in chosen:
            generator = torch.Generator(parameter.device).manual_seed(0)
            noise = torch.empty_like(parameter).uniform_(-unit, unit, generator=generator)
            parameter.data.mul_(1 + noise)
        response = float((probe(model) - logits).abs().max())
    return _MARGIN * response + _FLOOR * math.sqrt(max(len(chosen), 1)) * float(logits.abs().max())


def check_logits(difference: float, bound: float, effect: float) -> None:
    """Raise VerificationError for a difference above its bound; warn of a bound that could hide the adapter itself."""
    if not difference <= bound:
        raise VerificationError(
            f"a logit of the merged model is {difference:.3g} away from base + adapter; the bound is {bound:.3g}",
            hint="nothing was written",
        )
    if effect <= bound:
        logger.warning("the adapter changes no logit by more than %.3g, less than rounding may (%.3g)", effect, bound)


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """The model with its parameters in fp32, which holds half precisions exactly; afterwards as it was, bit for bit."""
    before = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)
