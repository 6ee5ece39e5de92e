"""Parameters that transformers makes of several stored tensors: fused experts, of which files hold each one apart.

Nothing here knows what is done to the tensors: transformers' own operations are asked, with tensors without numbers
for the shapes, and with the numbers of the rows for where each row goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kit.errors import BaseModelError
from lora_kit.io.text import escape_text


class FusedPiece(NamedTuple):
    """A stored tensor that is some rows of one matrix of a parameter.

    Attributes:
        expert: which of the matrices. begin, end: which rows.
    """

    name: str
    expert: int
    begin: int
    end: int


@dataclass(frozen=True)
class FusedWeights:
    """One parameter, or several, and the stored tensors that it is made of.

    Attributes:
        key: of the first of those parameters.
        converter: transformers' own.
        sources: stored tensors by the converter's pattern and their name, in the order that transformers takes them.
    """

    key: str
    converter: Any
    sources: dict[str, dict[str, Tensor]]

    def check(self, model: Any) -> list[str]:
        """The keys that it fills.

        Raises:
            BaseModelError: the tensors do not make up what the model has there: one is missing, or of another shape.
        """
        try:
            made = self._convert({p: [t.to("meta") for t in own.values()] for p, own in self.sources.items()}, model)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise self._misfit(escape_text(str(error).split("\n", 1)[0])) from None
        places, first = model.state_dict(), self.converter.target_patterns[0]
        found = {self.key.replace(first, target): tensor for target, tensor in made.items()}
        for key, tensor in found.items():
            shape = tensor[0].shape if isinstance(tensor, list) else tensor.shape
            if key in places and shape != places[key].shape:
                raise self._misfit(f"they make {tuple(shape)}, and the model has {tuple(places[key].shape)}")
        return [key for key in found if key in places]

    def _misfit(self, told: str) -> BaseModelError:
        names = [name for own in self.sources.values() for name in own]
        return BaseModelError(
            f"{len(names)} tensors like {escape_text(names[0])} do not make up {self.key}: {told}",
            hint="one is missing, or damaged",
        )

    def _convert(self, tensors: dict[str, list[Tensor]], model: Any) -> dict[str, Any]:
        """What transformers makes of tensors in the place of the stored ones, by its patterns of the targets."""
        made: dict[str, Any] = tensors
        for operation in self.converter.operations:
            made = operation.convert(
                made,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.key,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        return made

    def find_pieces(self, model: Any) -> tuple[FusedPiece, ...] | None:
        """What each stored tensor is in the parameter; None where one is not rows of a matrix in their order."""
        stored = [(name, tensor) for own in self.sources.values() for name, tensor in own.items()]
        shape = model.state_dict()[self.key].shape
        if len(shape) != 3 or any(tensor.ndim != 2 or tensor.shape[1] != shape[2] for _, tensor in stored):
            return None
        numbers, begins, count = dict[str, list[Tensor]](), list[int](), 0
        for pattern, own in self.sources.items():
            for tensor in own.values():
                rows = torch.arange(count, count + len(tensor)).unsqueeze(1)
                numbers.setdefault(pattern, []).append(rows)
                begins.append(count)
                count += len(tensor)
        made = next(iter(self._convert(numbers, model).values()))
        if made.shape != (*shape[:2], 1) or count != made.numel():
            return None
        places = torch.empty(count, dtype=torch.int64)
        places[made.reshape(-1)] = torch.arange(count)
        found = []
        for (name, tensor), begin in zip(stored, begins, strict=True):
            own_places = places[begin : begin + len(tensor)]
            expert, row = divmod(int(own_places[0]), shape[1])
            if not torch.equal(own_places, own_places[0] + torch.arange(len(tensor))) or row + len(tensor) > shape[1]:
                return None
            found.append(FusedPiece(name, expert, row, row + len(tensor)))
        return tuple(found)
