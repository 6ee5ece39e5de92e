"""What can be counted exactly, on any machine?

Operations per adapted layer, and what is kept for the backward, of a Llama of two decoder layers of width 512 with r=16
on all linears: 14 adapted layers. Operations are those that compute something; views are not. The frozen base's own is
included (1 in a forward, 2 with its backward), and so is a share of what is done once for all layers. Bytes are those
of the distinct storages that autograd keeps, weights not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kit as lk
from benchmarks.harness import Effort, Row, table
from benchmarks.models import ALL, DTYPES, adapters, bank_of, in_peft, llama, token_ids

R, LAYERS, ROWS = 16, 2, 32
CASES: Final = ("lora_kit", "peft", "peft, bf16 adapters")
FREE: Final = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
"""Operations that compute nothing and yet are not marked as views."""


class Operations(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> int:
    with Operations() as seen:
        run()
    return seen.count


def kept(run: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Bytes that the forward of a call keeps for its backward, each storage once and weights not at all."""
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def trainable(model: Any, *, case: str, value: lk.Adapter) -> Any:
    """A model in training mode with one adapter of a case."""
    if case == "lora_kit":
        lk.attach(model, value.config, name="a0").restore("a0", value)
        return model.train()
    return in_peft(model, {"a0": value}, adapter_dtype="bf16" if case.endswith("bf16 adapters") else "fp32").train()


def cases_of(dtype: str) -> tuple[str, ...]:
    return CASES if dtype == "bf16" else CASES[:2]


def in_training(dtype: str, _effort: Effort) -> dict[str, Any]:
    """Operations of a forward and its backward, per adapted layer."""
    value = adapters(llama(layers=LAYERS), [R])[0]
    inputs = llama(dtype=dtype).get_input_embeddings()(token_ids(4, 64)).detach().requires_grad_()

    def count(model: Any) -> int:
        return operations(lambda: model(inputs_embeds=inputs).logits.sum().backward())

    base = llama(layers=LAYERS, dtype=dtype).requires_grad_(False)
    cases = {case: trainable(copy.deepcopy(base), case=case, value=value) for case in cases_of(dtype)}
    return {"operations": {case: per_layer(count(model), count(base), own=2) for case, model in cases.items()}}


def per_layer(count: int, base: int, *, own: int) -> float:
    return own + (count - base) / (LAYERS * len(ALL))


def in_forward(how: str, count: int, _effort: Effort) -> dict[str, Any]:
    """Operations of a forward of 32 rows, per adapted layer.

    Args:
        how: `used` by all rows; or routed: the `first` forward after `rows`, or a `later` one.
        count: different adapters among the rows.
    """
    values = {f"a{number}": value for number, value in enumerate(adapters(llama(layers=LAYERS), [R] * count))}
    base, ours, theirs = (llama(layers=LAYERS).requires_grad_(False) for _ in range(3))
    bank, wrapped = bank_of(ours, values), in_peft(theirs, values).eval()
    names = [f"a{row * 7 % count}" for row in range(ROWS)]

    @torch.no_grad()  # inference_mode would hide what some operations are composed of
    def count_of(model: Any, **more: Any) -> int:
        return operations(lambda: model(input_ids=token_ids(ROWS, 4), use_cache=False, **more))

    with bank.using("a0") if how == "used" else bank.rows(names):
        counts = [count_of(ours) for _ in ("first", "later")]
    by_row = {} if how == "used" else {"adapter_names": names}
    found = {"lora_kit": counts[how == "later"], "peft": count_of(wrapped, **by_row)}
    floor = count_of(base)
    return {"operations": {case: per_layer(count, floor, own=1) for case, count in found.items()}}


class Shared(nn.Module):
    """Linears that read the same x, as q, k and v do."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(512, 512, bias=False, dtype=dtype) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


def by_layers(count: int, dtype: str, _effort: Effort) -> dict[str, Any]:
    """Bytes kept by layers that share their input, as multiples of that input."""
    torch.manual_seed(0)
    names = [f"linears.{number}" for number in range(count)]
    maker = Shared(count, torch.float32)
    value = lk.attach(maker, lk.LoraConfig(r=R, lora_alpha=2 * R, target_modules=tuple(names)), name="a0").snapshot(
        "a0"
    )
    x = torch.randn(4, 256, 512).to(DTYPES[dtype]).requires_grad_()
    found = {}
    for case in cases_of(dtype):
        model = trainable(Shared(count, DTYPES[dtype]).requires_grad_(False), case=case, value=value)
        found[case] = kept(partial(model, x), model.parameters()) / x.untyped_storage().nbytes()
    return {"inputs": found}


def by_model(dtype: str, _effort: Effort) -> dict[str, Any]:
    """Bytes kept by one forward of the reference setting with its loss."""
    from benchmarks.training_step import Setting, build

    setting = Setting(dtype)
    value = adapters(setting.base(), [setting.r])[0]
    found = {}
    for case in setting.cases:
        built = build(case, setting, value)
        found[case] = kept(built.loss, built.weights)
    return {"bytes": found}


def rows() -> dict[str, Row]:
    found = {"operations, one adapter in use": Row(partial(in_forward, "used", 1), "short", aim=3)}
    for how in ("first", "later"):
        for count in (1, 8, 32):
            name = f"operations, {count} adapter{'s'[: count > 1]} in 32 rows, {how} forward after routing"
            found[name] = Row(partial(in_forward, how, count), "short")
    for dtype in DTYPES:
        found[f"operations, forward and backward, {dtype}"] = Row(partial(in_training, dtype), "short")
    for dtype in DTYPES:
        found[f"inputs kept by one layer, {dtype}"] = Row(partial(by_layers, 1, dtype), "short", aim=1.1)
        found[f"inputs kept by q, k and v, {dtype}"] = Row(partial(by_layers, 3, dtype), "short", aim=1.1)
    for dtype in DTYPES:
        found[f"bytes kept by the reference model, {dtype}"] = Row(partial(by_model, dtype))
    return found


def page(results: Mapping[str, Any]) -> str:
    def of(unit: str) -> dict[str, dict[str, float]]:
        return {name: row[unit] for name, row in results.items() if unit in row}

    def cells(values: Mapping[str, float], wanted: Iterable[str], form: str) -> list[str]:
        return [form.format(values[case]) if case in values else "–" for case in wanted]

    whole = ["frozen base", *CASES, "full fine-tuning"]
    return "\n\n".join(
        [
            "Operations per adapted layer:",
            table(
                ["", *CASES[:2]], [[name, *cells(row, CASES[:2], "{:.2f}")] for name, row in of("operations").items()]
            ),
            "Kept for the backward, as multiples of the input:",
            table(["", *CASES], [[name, *cells(row, CASES, "{:.2f}")] for name, row in of("inputs").items()]),
            "Kept for the backward of the reference training step, in millions of bytes:",
            table(
                ["", *whole],
                [
                    [name, *cells({case: value / 1e6 for case, value in row.items()}, whole, "{:.1f}")]
                    for name, row in of("bytes").items()
                ],
            ),
        ]
    )
