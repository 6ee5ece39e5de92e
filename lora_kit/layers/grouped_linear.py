"""Block-diagonal linear layers with LoRA weights beside them (the output projection of DeepSeek V4's attention)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.layers.initialization import A, B
from lora_kit.layers.introspect import unwrap_module
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.token_runs import RunRoute, check_runs
from lora_kit.ops.lora_functions import guard_backward


def is_grouped_linear(module: nn.Module) -> bool:
    """Return whether a linear layer has one block of its weight for each group of its input.

    The weight is (groups · out, in): group g of the input (..., groups, in) meets the rows from g · out on, and the
    output is (..., groups, out).
    """
    module = unwrap_module(module)
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    groups = module.__dict__.get("n_groups")
    return isinstance(groups, int) and groups > 0 and module.out_features % groups == 0


class LoraGroupedLinear(LoraLinear):
    """base(x) + scaling · B_g A x_g for every group g, where B_g are the rows of B that belong to the group.

    So the update is that of the weight W + scaling · B A, and a merge is that of any linear layer.
    """

    def reason_no_runs(self) -> str | None:
        return "a block-diagonal layer is given its tokens by group"

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        route = self.routing.get_route()
        y: Tensor = self.call_base(x, *args, **kwargs)
        if isinstance(route, RunRoute):
            check_runs(self, route)
            return y
        if self._is_routed_by_index(route, x):
            self.routing.check_rows(route, x, self)
            index, dropped = self.routing.get_index(route, x), self._drop_rows(route, x)
            a, b = self._get_stacks(A, B)
            return _add_to_groups(y, dropped, a[index], b[index], self.scaling[index])
        entry = self._get_entry(route)
        if entry is None:
            return y
        x = functional.dropout(x, entry.dropout, self.training)
        a, b = entry.tensors[A], entry.tensors[B]
        scaling = torch.full((1,), entry.scaling, device=y.device)
        updated = _add_to_groups(y, x, a.unsqueeze(0), b.unsqueeze(0), scaling)
        guard_backward(updated, entry.list_read_as(y.dtype))
        return updated


def _add_to_groups(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor) -> Tensor:
    """Return y + scaling · B_g A x_g, a new tensor.

    Args:
        y: (n, ..., groups, out).
        x: (n, ..., groups, in).
        a: (R, r, in); n is a multiple of R, and each run of n/R entries belongs to one row.
        b: (R, groups · out, r).
        scaling: (R,) fp32.
    """
    rows, groups, size_out = a.shape[0], y.shape[-2], y.shape[-1]
    a, b = a.to(y.dtype), b.to(y.dtype).view(rows, groups, size_out, -1)
    h = torch.einsum("ntgi,nri->ntgr", x.to(y.dtype).reshape(rows, -1, groups, x.shape[-1]), a)
    h = h * scaling.to(y.dtype).view(-1, 1, 1, 1)
    return y + torch.einsum("ntgr,ngor->ntgo", h, b).view(y.shape)
