"""A frozen base of which each process keeps a part: FSDP2 gathers a layer where it computes, and drops it again.

The adapter stays whole in every process: its gradients are summed as without shards. FSDP2 would not take it, since
lora_B is stored by columns: its gradient is quicker so.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from lora_kit.targets.fingerprint import keep_fingerprint
from lora_kit.training.loop.contexts import find_repeated_layers


def shard_base(model: nn.Module) -> None:
    """Leave this process its part of every frozen weight of a model; every process has to do so.

    From then on all processes must run as many forwards and backwards as each other. The fingerprint of the model is
    that of the whole weights.

    Raises:
        BaseModelError: the model has no repeated layers.
    """
    from torch.distributed.fsdp import fully_shard

    # It warns of changes in place to what the model returns; the loss makes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    keep_fingerprint(model)
    for layer in find_repeated_layers(model):
        fully_shard(layer, ignored_params=trained)
    fully_shard(model, ignored_params=trained)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_base` has sharded a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def count_own_bytes(model: nn.Module) -> int:
    """Return the bytes of the frozen weights that this process keeps."""
    from torch.distributed.tensor import DTensor

    frozen = [parameter.data for parameter in model.parameters() if not parameter.requires_grad]
    own: list[torch.Tensor] = [part.to_local() if isinstance(part, DTensor) else part for part in frozen]
    return sum(part.nbytes for part in own)
