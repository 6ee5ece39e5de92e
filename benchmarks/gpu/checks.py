"""Is every path right on this device? Each check compares with fp64, and raises where the two differ."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lora_kit as lk
from benchmarks.gpu.bases import TINY, llama
from benchmarks.gpu.graphs import captured
from benchmarks.models import adapters, bank_of, lora
from lora_kit.ops import dispatch
from lora_kit.ops.cross_entropy import chunked_cross_entropy
from lora_kit.ops.lora import lora_add, lora_add_rows, lora_linear

Check = Callable[[torch.device], None]


def all_checks() -> dict[str, Check]:
    """Every check by name, the smallest things first."""
    kernels = {f"kernels: {name}": partial(check_kernels, name) for name in kernel_checks().CHECKS}
    operations = {
        f"{name}, {dtype}": partial(check_operation, operation, dtype)
        for name, operation in OPERATIONS.items()
        for dtype in BOUND
    }
    models: dict[str, Check] = {
        "bank: one adapter, then one per row": check_bank,
        "bank: generate": check_generate,
        "bank: training, with and without checkpointing": check_training,
        "bank: torch.compile, swaps without recompiling": check_compiled,
        "bank: CUDA graphs, swaps without capturing again": check_graphs,
    }
    losses = {f"chunked_cross_entropy, {dtype}": partial(check_loss, dtype) for dtype in BOUND}
    return {**kernels, **operations, **losses, **models}


def agree(result: Tensor, expected: Tensor, *, bound: float) -> None:
    """Raise unless the relative error of the whole is within the bound; NaN never is."""
    error = float((result.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())
    if not error <= bound:
        raise ValueError(f"relative error {error:.1e}, where {bound:.0e} is the bound")


def kernel_checks() -> Any:
    """The module `tests/support/kernels.py`."""
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.append(root)
    return importlib.import_module("tests.support.kernels")


def check_kernels(name: str, device: torch.device) -> None:
    kernel_checks().CHECKS[name](dispatch.choose_kernels(device, torch.float32), device)


# The operations, forward and backward, their factors in fp32

BOUND: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SCALING: Final = 0.3
SLOTS: Final = [1, 0, 3, 3, 2, 0]

Tensors = Mapping[str, Tensor]
Operation = tuple[Callable[[Tensors], Tensor], Callable[[Tensors], Tensor]]
"""What lora_kit computes of named tensors, and what fp64 does."""

OPERATIONS: Final[dict[str, Operation]] = {
    "lora_linear": (
        lambda t: lora_linear(t["x"], t["weight"], None, t["a"][1], t["b"][1], SCALING),
        lambda t: t["x"] @ t["weight"].mT + SCALING * (t["x"] @ t["a"][1].mT @ t["b"][1].mT),
    ),
    "lora_add": (
        lambda t: lora_add(t["y"] * 1, t["x"], t["a"][1], t["b"][1], SCALING),
        lambda t: t["y"] + SCALING * (t["x"] @ t["a"][1].mT @ t["b"][1].mT),
    ),
    "lora_add_rows": (
        lambda t: lora_add_rows(t["y"] * 1, t["x"], t["a"], t["b"], t["scaling"].float(), t["slots"]),
        lambda t: t["y"] + t["scaling"][t["slots"]].view(-1, 1, 1) * _by_row(t),
    ),
}


def _by_row(t: Tensors) -> Tensor:
    return t["x"] @ t["a"][t["slots"]].mT @ t["b"][t["slots"]].mT


def check_operation(operation: Operation, dtype: torch.dtype, device: torch.device) -> None:
    """Output, with and without gradients wanted, and the gradients."""
    ours, exact = operation
    given = _random_tensors(dtype, device)
    wanted = {name: given[name].detach().requires_grad_() for name in ("y", "x", "a", "b")}
    others = {name: tensor.detach().double().requires_grad_() for name, tensor in wanted.items()}
    doubled = {name: tensor if name == "slots" else tensor.double() for name, tensor in given.items()}
    result, expected = ours({**given, **wanted}), exact({**doubled, **others})
    agree(result, expected, bound=BOUND[dtype])
    with torch.no_grad():
        agree(ours({**given, **wanted}), expected, bound=BOUND[dtype])
    result.backward(given["dy"])
    expected.backward(given["dy"].double())
    for name, tensor in wanted.items():
        own, other = tensor.grad, others[name].grad
        if other is not None:
            assert own is not None, name
            factor = slice(1, None) if name in "ab" else slice(None)  # what slot 0 is given goes nowhere
            agree(own[factor], other[factor], bound=BOUND[dtype])


def _random_tensors(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    rows, tokens, size_in, size_out, rank, slots = len(SLOTS), 50, 200, 136, 16, 4
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, of)

    tensors = {
        "y": made(rows, tokens, size_out),
        "dy": made(rows, tokens, size_out),
        "x": made(rows, tokens, size_in),
        "weight": made(size_out, size_in),
        "a": made(slots, rank, size_in, of=torch.float32),
        "b": made(slots, size_out, rank, of=torch.float32),
        "scaling": made(slots, of=torch.float32) / 8,
        "slots": torch.tensor(SLOTS, device=device),
    }
    for name in ("a", "b", "scaling"):
        tensors[name][0] = 0
    return tensors


def check_loss(dtype: torch.dtype, device: torch.device) -> None:
    """Loss and gradient over several chunks, a third of the rows without a label."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 64, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(500, 64, generator=generator).to(device, dtype) / 8
    labels = torch.randint(500, (100,), generator=generator).to(device)
    labels[::3] = -100
    exact = hidden.detach().double().requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, labels, chunk=30)
    expected = cross_entropy(exact @ weight.double().mT, labels, reduction="sum")
    agree(loss, expected, bound=BOUND[dtype])
    loss.backward()
    expected.backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    agree(hidden.grad, exact.grad, bound=BOUND[dtype])


# A bank on a tiny Llama in fp32, against the same Llama in fp64 with the updates in its weights

Names = list[str | None]
MIXED: Final[Names] = ["b", None, "c", "a"]
REROUTED: Final[Names] = ["a", "c", "c", None]
SWAPS: Final[list[tuple[Names, list[Names]]]] = [
    (["a"] * 4, [["b"] * 4, [None] * 4]),
    (MIXED, [REROUTED, MIXED]),
]
"""A batch that is compiled or captured, and batches that must then work without doing that again."""

CLOSE: Final = 1e-5


class Tiny:
    """The model, three adapters of different ranks, a batch of four rows."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = llama(TINY, layers=2, device=device, dtype=torch.float32)
        self.exact = llama(TINY, layers=2, device=device, dtype=torch.float64)
        self.exact.load_state_dict(self.model.state_dict())
        self.values = dict(zip("abc", adapters(self.model, [4, 16, 8]), strict=True))
        self.ids = torch.randint(3, TINY.vocabulary, (4, 12), generator=torch.Generator().manual_seed(1)).to(device)

    def logits(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return found

    def loss(self, logits: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())

    def pairs(self, name: str | None) -> dict[str, Tensor]:
        """An adapter's tensors in fp64 on the device."""
        return {key: t.to(self.device, torch.float64) for key, t in self.values[name].tensors.items()} if name else {}

    def exact_logits(self, pairs: Mapping[str, Tensor]) -> Tensor:
        """In fp64, with W + 2 B A for every pair (alpha is 2 r), differentiable with respect to the pairs."""
        weights = {}
        for path, layer in self.exact.named_modules():
            key = f"base_model.model.{path}.lora_{{}}.weight"
            if key.format("A") in pairs:
                weights[f"{path}.weight"] = layer.weight + 2 * pairs[key.format("B")] @ pairs[key.format("A")]
        found: Tensor = torch.func.functional_call(self.exact, weights, kwargs={"input_ids": self.ids}).logits
        return found

    def agree(self, logits: Tensor, names: Names) -> None:
        """Every row of the logits is what the adapter named for it gives in fp64."""
        for row, name in enumerate(names):
            with torch.no_grad():
                agree(logits[row], self.exact_logits(self.pairs(name))[row], bound=CLOSE)


def check_bank(device: torch.device) -> None:
    tiny = Tiny(device)
    bank = bank_of(tiny.model, tiny.values)
    for name in ("a", "b", None):
        bank.use(name)
        tiny.agree(tiny.logits(), [name] * 4)
    for names in (MIXED, REROUTED):
        with bank.rows(names):
            tiny.agree(tiny.logits(), names)


def check_generate(device: torch.device) -> None:
    """Greedy tokens of a mixed batch: the logits that fp64 has at each step have them on top."""
    tiny = Tiny(device)
    bank = bank_of(tiny.model, tiny.values)
    length = tiny.ids.shape[1]
    with bank.rows(MIXED), torch.inference_mode():
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tiny.ids)}
        tokens = tiny.model.generate(input_ids=tiny.ids, **options).clone()
    tiny.ids = tokens
    for row, name in enumerate(MIXED):
        with torch.no_grad():
            steps = tiny.exact_logits(tiny.pairs(name))[row, length - 1 : -1]
        chosen = steps.gather(1, tokens[row, length:, None]).squeeze(1)
        if not (chosen >= steps.amax(1) - 1e-4).all():
            raise ValueError(f"row {row} ({name}): tokens were chosen that are not the likeliest in fp64")


def check_training(device: torch.device) -> None:
    """Loss and every gradient of a trainable adapter."""
    tiny = Tiny(device)
    bank = lk.attach(tiny.model, lora(16), name="b")
    pairs = {key: tensor.requires_grad_() for key, tensor in tiny.pairs("b").items()}
    exact = tiny.loss(tiny.exact_logits(pairs))
    expected = dict(zip(pairs, torch.autograd.grad(exact, list(pairs.values())), strict=True))
    for checkpointing in ("without", "with"):
        if checkpointing == "with":
            tiny.model.train().gradient_checkpointing_enable({"use_reentrant": False})
        bank.restore("b", tiny.values["b"])
        loss = tiny.loss(tiny.model(input_ids=tiny.ids, use_cache=False).logits)
        agree(loss.detach(), exact.detach(), bound=CLOSE)
        leaves = bank.parameters("b")
        with torch.no_grad():
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.copy_(gradient)  # so that a snapshot says which tensor it is of
        for key, gradient in bank.snapshot("b").tensors.items():
            agree(gradient.to(device), expected[key], bound=10 * CLOSE)


def check_compiled(device: torch.device) -> None:
    torch._dynamo.reset()
    tiny = Tiny(device)
    bank = bank_of(tiny.model, tiny.values)
    tiny.model.forward = torch.compile(tiny.model.forward, backend="inductor" if device.type == "cuda" else "aot_eager")
    for before, after in SWAPS:
        with bank.rows(before):
            tiny.agree(tiny.logits(), before)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for names in after:
                with bank.rows(names):
                    tiny.agree(tiny.logits(), names)


def check_graphs(device: torch.device) -> None:
    tiny = Tiny(device)
    bank = bank_of(tiny.model, tiny.values)
    for before, after in SWAPS:
        with bank.rows(before):
            replay = captured(tiny.logits, device)
            tiny.agree(replay(), before)
        for names in after:
            with bank.rows(names):
                tiny.agree(replay(), names)
