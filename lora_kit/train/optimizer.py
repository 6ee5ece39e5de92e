"""What is done to an optimiser after transformers made it: a learning rate of its own for B (LoRA+)."""

from __future__ import annotations

from typing import Any

import torch

from lora_kit.layers import AloneLayer, B, LoraLinear


def raise_rate_of_b(optimizer: torch.optim.Optimizer, model: Any, ratio: float) -> None:
    """Give the B of every layer but embeddings `ratio` times the learning rate: Hayou et al. 2024, arXiv:2402.12354.

    A and B of an embedding keep their rate: there it is A that begins at zero.

    Args:
        optimizer: that has made no step yet.
        model: whose parameters it has.
    """
    layers = [module for module in model.modules() if isinstance(module, (LoraLinear, AloneLayer))]
    chosen = {
        id(leaf) for layer in layers for name, leaf in layer.named_parameters(recurse=False) if name.startswith(B)
    }
    for group in list(optimizer.param_groups):
        raised = [tensor for tensor in group["params"] if id(tensor) in chosen]
        if raised:
            group["params"] = [tensor for tensor in group["params"] if id(tensor) not in chosen]
            optimizer.add_param_group({**group, "params": raised, "lr": group["lr"] * ratio})
