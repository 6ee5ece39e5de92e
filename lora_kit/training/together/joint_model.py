"""The model that computes the frozen layers of several adapters at once, from the base's own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from lora_kit.torch_utils import use_autocast
from lora_kit.training.together.body_stand_in import ProbeRequest
from lora_kit.training.together.joint_layers import join_layers
from lora_kit.training.together.packed_rows import PackedRows, RowBlock, run_packed, use_packed_attention
from lora_kit.training.together.shared_weights import copy_without_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By dtype: how far hidden states may be off, in parts of the largest, because sums are in another order."""


class JointModel:
    """A base whose layers know the adapters of several models.

    Args:
        base: the model; its tensors are used, and nothing of it changes.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        model = copy_without_tensors(base)
        use_packed_attention(model)
        model.train()
        self._body: nn.Module = model.base_model
        if getattr(self._body, "pooler", None) is not None:
            vars(self._body)["_modules"]["pooler"] = None  # each adapter's own model pools its own rows
        self._before: dict[str, nn.Module] = {}
        self._counterparts: dict[nn.Module, dict[nn.Module, nn.Module]] = {}

    def join(self, owners: Sequence[nn.Module]) -> None:
        """Let these be the bodies that rows may belong to."""
        for path, layer in self._before.items():
            self._body.set_submodule(path, layer)
        self._before = join_layers(self._body, owners)
        shared = {
            path: module
            for path, module in self._body.named_modules()
            if not any(path.startswith(f"{above}.") for above in self._before)
        }
        self._counterparts = {
            owner: {module: owner.get_submodule(path) for path, module in shared.items()} for owner in owners
        }

    def forward(self, blocks: Sequence[RowBlock], autocast: torch.dtype | None) -> list[Tensor]:
        """Return the last hidden states of each block with their graph, (rows, length, width)."""
        rows = PackedRows(blocks, [self._counterparts[block.owner] for block in blocks])
        device = blocks[0].inputs["input_ids"].device
        with use_autocast(device, autocast):
            return run_packed(self._body, rows)

    def reason_not_joint(self, owner: nn.Module, probe: ProbeRequest) -> str | None:
        """Return why rows of an owner cannot be computed with others; None where they can.

        They are computed beside a copy of themselves, which must give what the owner's body gave.
        """
        blocks = [RowBlock(owner, probe.inputs, probe.stream.copy()) for _ in range(2)]
        try:
            with torch.no_grad():
                results = self.forward(blocks, probe.autocast)
        except Exception as error:  # a model may do anything with an attention that it does not know
            return " ".join(str(error).split())[:200] or type(error).__name__
        bound = _TOLERANCE.get(probe.expected.dtype, 1e-4) * float(probe.expected.abs().max().clamp(min=1.0))
        off = max(float((result - probe.expected).abs().max()) for result in results)
        return None if off <= bound else f"hidden states are {off:.2g} off in a packed forward"


def reason_no_joint_body(model: PreTrainedModel) -> str | None:
    """Return why a model has no body that could compute rows of several adapters; None where it may."""
    if model.base_model is model:
        return "its body and its head are one module"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}, not sdpa"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    return None
