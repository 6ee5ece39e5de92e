"""Parameters that transformers fuses from several stored tensors, as it does with the experts of a mixture.

Nothing here knows the layout. transformers' own conversion is run twice: on meta tensors, which shows the shapes, and
on row indices, which shows where each row goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_kit.errors import BaseModelError
from lora_kit.io.text import escape_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FusedPiece(NamedTuple):
    """A stored tensor that is some rows of one matrix of a parameter.

    Attributes:
        name: of the stored tensor.
        expert: index of the matrix.
        begin: its first row.
        end: the row after its last.
    """

    name: str
    expert: int
    begin: int
    end: int


@dataclass(frozen=True)
class FusedWeights:
    """One or several parameters, and the stored tensors that they are fused from.

    Attributes:
        key: state dict key of the first of those parameters.
        converter: transformers' `WeightConverter`.
        sources: stored tensors by the converter's pattern and by name, in transformers' order.
    """

    key: str
    converter: Any
    sources: dict[str, dict[str, Tensor]]

    def find_filled_keys(self, model: PreTrainedModel) -> list[str]:
        """Return the state dict keys that these tensors fill.

        Raises:
            BaseModelError: a tensor is missing or has another shape, so that they do not fill what the model has.
        """
        try:
            fused = self._convert({p: [t.to("meta") for t in own.values()] for p, own in self.sources.items()}, model)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise self._mismatch_error(escape_text(str(error).split("\n", 1)[0])) from None
        state, first = model.state_dict(), self.converter.target_patterns[0]
        by_key = {self.key.replace(first, target): tensor for target, tensor in fused.items()}
        for key, tensor in by_key.items():
            shape = tensor[0].shape if isinstance(tensor, list) else tensor.shape
            if key in state and shape != state[key].shape:
                raise self._mismatch_error(f"they make {tuple(shape)}, and the model has {tuple(state[key].shape)}")
        return [key for key in by_key if key in state]

    def _mismatch_error(self, reason: str) -> BaseModelError:
        names = [name for own in self.sources.values() for name in own]
        return BaseModelError(
            f"{len(names)} tensors like {escape_text(names[0])} do not make up {self.key}: {reason}",
            hint="one is missing or damaged",
        )

    def _convert(self, tensors: dict[str, list[Tensor]], model: PreTrainedModel) -> dict[str, Any]:
        """Return what transformers makes of tensors in the place of the stored ones, by target pattern."""
        fused: dict[str, Any] = tensors
        for operation in self.converter.operations:
            fused = operation.convert(
                fused,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.key,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        return fused

    def find_pieces(self, model: PreTrainedModel) -> tuple[FusedPiece, ...] | None:
        """Return the rows of the parameter that each stored tensor is; None where one is not consecutive rows."""
        stored = [(name, tensor) for own in self.sources.values() for name, tensor in own.items()]
        shape = model.state_dict()[self.key].shape
        if len(shape) != 3 or any(tensor.ndim != 2 or tensor.shape[1] != shape[2] for _, tensor in stored):
            return None
        indices, begins, count = dict[str, list[Tensor]](), list[int](), 0
        for pattern, own in self.sources.items():
            for tensor in own.values():
                rows = torch.arange(count, count + len(tensor)).unsqueeze(1)
                indices.setdefault(pattern, []).append(rows)
                begins.append(count)
                count += len(tensor)
        fused = next(iter(self._convert(indices, model).values()))
        if fused.shape != (*shape[:2], 1) or count != fused.numel():
            return None
        positions = torch.empty(count, dtype=torch.int64)
        positions[fused.reshape(-1)] = torch.arange(count)
        pieces = []
        for (name, tensor), begin in zip(stored, begins, strict=True):
            targets = positions[begin : begin + len(tensor)]
            expert, row = divmod(int(targets[0]), shape[1])
            if not torch.equal(targets, targets[0] + torch.arange(len(tensor))) or row + len(tensor) > shape[1]:
                return None
            pieces.append(FusedPiece(name, expert, row, row + len(tensor)))
        return tuple(pieces)
