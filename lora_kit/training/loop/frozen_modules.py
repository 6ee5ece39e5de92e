"""Which modules of a model run in evaluation mode while it is trained: those that no gradient reaches.

Below the lowest adapted layer nothing learns. Dropout there would only add noise to what the adapter is given, and a
normalization would change its running statistics, which belong to the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_kit.torch_utils import use_eval_mode


def find_modules_without_gradient(model: nn.Module, sample: Mapping[str, Tensor]) -> list[nn.Module]:
    """Return the modules whose outputs depend on nothing that is trained, with everything inside them.

    A probe: one forward in evaluation mode, in which no random number is drawn. Nothing is known of the family. It
    takes no more memory than a forward without gradients: what autograd would keep for a backward is dropped at once.

    Args:
        sample: inputs of the model, on its device, without labels.
    """
    without: set[nn.Module] = set()
    reached: set[nn.Module] = set()

    def note_output(module: nn.Module, _: object, output: object) -> None:
        tensors = list(_iterate_floats(output))
        if tensors and not any(tensor.requires_grad for tensor in tensors) and _has_trained_parts(module):
            # An expert to which no token of the sample was routed: with other tokens it has a part in this output.
            for tensor in tensors:
                tensor.requires_grad_()
        (reached if any(tensor.requires_grad for tensor in tensors) else without).add(module)

    handles = [module.register_forward_hook(note_output) for module in model.modules()]
    try:
        with (
            use_eval_mode(model),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_keep_nothing, _refuse_backward),
            torch.compiler.set_stance("force_eager"),
        ):
            model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    inside = dict.fromkeys(
        part for module in model.modules() if module in without - reached for part in module.modules()
    )
    return [module for module in inside if module not in reached and not _has_trained_parts(module)]


def _keep_nothing(_: object) -> None:
    """Stand for a tensor that a backward would read."""


def _refuse_backward(_: object) -> Tensor:
    raise AssertionError("a probe has no backward")


def _has_trained_parts(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _iterate_floats(output: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a module's output: a tensor, or a tuple or mapping of outputs."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _iterate_floats(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _iterate_floats(part)
