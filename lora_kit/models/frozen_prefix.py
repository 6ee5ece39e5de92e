"""The frozen layers below the lowest trained one: for a sample they give the same in every epoch, so once is enough.

The cut knows no family of models. The layers of a model's repeated list that no gradient reaches get a stand-in for
their forward, which hands on what the last of them gave before; embeddings, masks, positions and rotary angles are
still the model's own. A probe compares the logits with and without; where one bit differs, nothing is cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_kit.errors import VerificationError
from lora_kit.torch_utils import use_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_ERRORS: Final = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, VerificationError)
"""What a model may raise whose layers use more of those below than the states that these hand on."""


class _PrefixReachedError(Exception):
    """Ends a forward behind its frozen layers.

    Attributes:
        output: what the last of them gave.
    """

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


class LayerOutput(NamedTuple):
    """What a layer of a prefix gives.

    Attributes:
        states: (rows, length, width).
        returned: number of values of the tuple that the layer returns; 0 for states alone.
    """

    states: Tensor
    returned: int


@dataclass(frozen=True)
class FrozenPrefix:
    """The frozen layers at the beginning of a model's repeated layers.

    Attributes:
        path: of the list of layers, such as `model.layers`.
        layers: those that are frozen, in order.
        total: number of layers of the list.
    """

    path: str
    layers: tuple[nn.Module, ...]
    total: int

    def compute_output(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> LayerOutput:
        """Return what the last of the layers gives. The layers above are not computed.

        Args:
            inputs: of the model: `input_ids` (rows, length) and so on, without labels.

        Raises:
            VerificationError: the model does not reach the layers, or they give something else.
        """
        output = self._run_to_end(model, inputs)
        states, returned = (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[:2] != inputs["input_ids"].shape:
            raise VerificationError(f"{self.path} has other positions than the inputs")
        return LayerOutput(states, returned)

    def _run_to_end(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> object:
        handle = self.layers[-1].register_forward_hook(_end_forward)
        try:
            model(**inputs)
        except _PrefixReachedError as reached:
            return reached.output
        finally:
            handle.remove()
        raise VerificationError(f"the model does not compute {self.path}")

    @contextlib.contextmanager
    def replace_by(self, output: LayerOutput) -> Iterator[None]:
        """Have the layers hand on these states until the block ends; None for the values beside them."""
        states, returned = output
        result = (states, *[None] * (returned - 1)) if returned else states

        def hand_on(*args: object, **kwargs: object) -> object:
            return result

        for layer in self.layers:
            vars(layer)["forward"] = hand_on
        try:
            yield
        finally:
            for layer in self.layers:
                del vars(layer)["forward"]


def _end_forward(module: nn.Module, args: object, output: object) -> None:
    raise _PrefixReachedError(output)


@dataclass(frozen=True)
class PrefixStates:
    """What a model's frozen layers gave for each sample, without padding.

    Attributes:
        prefix: the layers.
        states: of all samples, one after another: (tokens, width), on the CPU or in a file.
        offsets: index of the first token of each sample, and the number of tokens: int64 (samples + 1,).
        returned: as in `LayerOutput`.
    """

    prefix: FrozenPrefix
    states: Tensor
    offsets: Tensor
    returned: int

    def __getitem__(self, index: int) -> Tensor:
        """Return the states of a sample: (length, width)."""
        return self.states[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def replace_layers(self, indices: Sequence[int], device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Have the layers hand on the states of these samples, padded on the right to the longest."""
        states = pad_sequence([self[index] for index in indices], batch_first=True)
        return self.hand_on(states.to(device))

    def hand_on(self, states: Tensor) -> contextlib.AbstractContextManager[None]:
        """Have the layers hand on padded states of some samples: (rows, longest, width)."""
        return self.prefix.replace_by(LayerOutput(states, self.returned))


def find_frozen_prefix(model: nn.Module, frozen: Collection[nn.Module]) -> FrozenPrefix | None:
    """Return the frozen layers with the most weights that begin one of a model's lists of layers; None without any.

    Args:
        frozen: the modules whose outputs depend on nothing that is trained.
    """
    known = set(frozen)
    prefixes = [
        FrozenPrefix(path, tuple(takewhile(known.__contains__, module)), len(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    return max((prefix for prefix in prefixes if prefix.layers), key=_count_weights, default=None)


def _count_weights(prefix: FrozenPrefix) -> int:
    return sum(weight.numel() for layer in prefix.layers for weight in layer.parameters())


def estimate_saved_share(model: nn.Module, prefix: FrozenPrefix) -> float:
    """Return the share of a training step's products that the frozen layers take, by the number of their weights.

    A frozen layer below the trained ones is run forward; one above them backward, too, for the gradient of its input.
    """
    below = _count_weights(prefix)
    embeddings = {
        id(weight) for part in model.modules() if isinstance(part, nn.Embedding) for weight in part.parameters()
    }
    total = sum(weight.numel() for weight in model.parameters() if id(weight) not in embeddings)
    return below / max(1, below + 2 * (total - below))


def reason_not_replaceable(model: PreTrainedModel, prefix: FrozenPrefix, batch: Mapping[str, Tensor]) -> str | None:
    """Return why what frozen layers give cannot be kept and handed on later; None if it can.

    Args:
        batch: inputs of the model on its device, without labels, of samples of unlike length, padded on the right:
            `input_ids` and `attention_mask` (rows, length).
    """
    if any("forward" in vars(layer) or layer._compiled_call_impl is not None for layer in prefix.layers):
        return f"the forward of {prefix.path} is replaced already, or compiled"
    inputs = select_model_inputs(batch)
    mask = batch["attention_mask"].bool()
    try:
        with use_eval_mode(model), torch.no_grad():
            whole = model(**inputs).logits
            output = prefix.compute_output(model, inputs)
            kept = torch.where(mask[..., None], output.states, output.states.new_zeros(()))
            with prefix.replace_by(output._replace(states=kept)):
                resumed = model(**inputs).logits
    except _PROBE_ERRORS as error:
        return f"the model needs more than the states of {prefix.path} ({type(error).__name__})"
    per_token = whole.shape[:2] == mask.shape and "decoder_input_ids" not in batch
    if not torch.equal(whole[mask] if per_token else whole, resumed[mask] if per_token else resumed):
        return f"with the states of {prefix.path} alone the model gives other logits"
    return None


def select_model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a model is given of a batch: of packed rows the positions instead of the mask."""
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask" or "position_ids" not in batch}
