"""Linear layers inside the experts of a mixture."""

from __future__ import annotations

from torch import Tensor

from lora_kit.errors import RoutingError
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.route import Route
from lora_kit.ops.lora_spans import LoraSpan


class LoraExpert(LoraLinear):
    """A linear layer of one expert of a mixture, which is given the tokens routed to that expert, of whatever rows."""

    def reason_no_runs(self) -> str | None:
        return "an expert does not see which run a token belongs to"

    def _list_spans(self, route: Route, x: Tensor) -> list[LoraSpan]:
        return []

    def _forward_rows(self, route: Route, y: Tensor, x: Tensor) -> Tensor:
        if not route.mixed:
            return super()._forward_rows(route, y, x)
        if any(self.entries[slot] for slot in route.rows):
            raise RoutingError(
                "an expert does not see which row a token belongs to, so rows of adapters that cover it cannot differ",
                hint="use() one adapter at a time, or adapters that leave the experts alone",
            )
        return y
