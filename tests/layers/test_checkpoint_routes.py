"""Gradient checkpointing recomputes with the route of its forward: whatever is used by then, in whichever thread."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.utils import checkpoint

import lora_kit as lk
from lora_kit.errors import RoutingError
from lora_kit.layers.checkpoint_routes import keep_routes
from tests.support import tiny

Bench = tuple[nn.Module, lk.AdapterBank]
MODES = ("plain", "non-reentrant", "reentrant")


def bench(mode: str) -> Bench:
    model = tiny.llama()
    bank = lk.attach(model, dtype=torch.float32)
    for name, rank in (("t1", 4), ("t2", 2)):
        bank.add(name, lk.LoraConfig(r=rank, init_lora_weights=False))
    model.train()
    if mode != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    return model, bank


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    loss: Tensor = model(**tiny.batch(seed=seed), use_cache=False).logits.square().mean()
    return loss


def use_another_before_backward(model: nn.Module, bank: lk.AdapterBank) -> None:
    bank.use("t1")
    loss = loss_of(model)
    bank.use("t2")
    loss.backward()


def sum_the_losses_of_two(model: nn.Module, bank: lk.AdapterBank) -> None:
    bank.use("t1")
    first = loss_of(model)
    bank.use("t2")
    (first + loss_of(model, 1)).backward()


def leave_using_before_backward(model: nn.Module, bank: lk.AdapterBank) -> None:
    with bank.using("t1"):
        loss = loss_of(model)
    loss.backward()


def leave_rows_before_backward(model: nn.Module, bank: lk.AdapterBank) -> None:
    with bank.rows(["t1", None, "t2"]):
        loss = loss_of(model)
    loss.backward()


def go_back_in_another_thread(model: nn.Module, bank: lk.AdapterBank) -> None:
    with bank.rows(["t1", "t2", "t1"]):
        loss = loss_of(model)
    bank.use("t2")
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


def gradients(mode: str, work: Callable[[nn.Module, lk.AdapterBank], None]) -> list[Tensor | None]:
    model, bank = bench(mode)
    work(model, bank)
    return [parameter.grad for name in bank.names for parameter in bank.parameters(name)]


WORKS = (
    use_another_before_backward,
    sum_the_losses_of_two,
    leave_using_before_backward,
    leave_rows_before_backward,
    go_back_in_another_thread,
)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_gradients_are_those_without_checkpointing(work: Callable[..., None], mode: str) -> None:
    for plain, found in zip(gradients("plain", work), gradients(mode, work), strict=True):
        assert (plain is None) == (found is None)
        if plain is not None and found is not None:
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_call_of_torchs_checkpoint_keeps_its_routes_too(reentrant: bool) -> None:
    found = []
    for wrap in (False, True):
        model, bank = bench("plain")
        bank.use("t1")
        embedded = model.get_input_embeddings()(tiny.batch()["input_ids"]).detach().requires_grad_()

        def forward(x: Tensor, model: Any = model) -> Tensor:
            logits: Tensor = model(inputs_embeds=x, use_cache=False).logits
            return logits

        y = checkpoint.checkpoint(forward, embedded, use_reentrant=reentrant) if wrap else forward(embedded)
        bank.use(None)
        y.square().mean().backward()
        found.append([parameter.grad for parameter in bank.parameters("t1")])
        assert bank.active is None
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_training_with_checkpoints_keeps_its_routes() -> None:
    found = []
    for compiled in (False, True):
        model, bank = bench("plain")
        bank.use("t1")
        call = torch.compile(model, backend="aot_eager") if compiled else model
        if compiled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        loss = loss_of(call)
        bank.use("t2")
        loss.backward()
        found.append([parameter.grad for parameter in bank.parameters("t1")])
    for plain, each in zip(*found, strict=True):
        torch.testing.assert_close(each, plain, rtol=1e-4, atol=1e-6)


def test_torch_calls_what_is_wrapped() -> None:
    """Fails where torch renames the two functions, or calls them by another way."""
    lk.attach(tiny.llama())
    for function in (checkpoint.CheckpointFunction.forward, checkpoint._checkpoint_without_reentrant_generator):
        assert hasattr(function, "_lora_kit_routes")
        assert next(iter(inspect.signature(inspect.unwrap(function)).parameters)) in ("ctx", "fn")
    seen: list[Any] = []
    model, bank = bench("plain")

    def note(x: Tensor) -> Tensor:
        seen.append(bank.active)
        return model.lm_head(x)

    for reentrant in (False, True):
        bank.use("t1")
        x = torch.randn(2, 32, requires_grad=True)
        y = (
            checkpoint.checkpoint(note, x, use_reentrant=reentrant, early_stop=False)
            if not reentrant
            else (checkpoint.checkpoint(note, x, use_reentrant=True))
        )
        bank.use("t2")
        y.sum().backward()
    assert seen == ["t1"] * 4


def test_a_recomputation_leaves_the_thread_as_it_was() -> None:
    _, bank = bench("plain")
    bank.use("t1")
    call = keep_routes(lambda: bank.active)
    seen: list[Any] = []

    def work() -> None:
        seen.append(call())
        bank_default_now = bank.active
        seen.append(bank_default_now)

    bank.use("t2")
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["t1", "t2"]


def test_a_checkpoint_that_torch_applies_to_a_module_keeps_its_routes() -> None:
    found = []
    for wrap in (False, True):
        model, bank = bench("plain")
        if wrap:
            for layer in model.model.layers:
                composable_checkpoint(layer)
        bank.use("t1")
        loss = loss_of(model)
        bank.use("t2")
        loss.backward()
        found.append([parameter.grad for parameter in bank.parameters("t1")])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


class _ComputeAgain(torch.autograd.Function):
    """Computes a function again in its backward, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.function(x).backward(gradient)
        return None, x.grad


class ComputesAgain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ComputeAgain.apply(self.layer, x)
        return y


def test_layers_that_a_function_of_others_computes_again_have_the_adapter_of_the_forward_or_raise() -> None:
    torch.manual_seed(0)
    bank, x = lk.attach(ComputesAgain()), torch.randn(2, 4, requires_grad=True)
    for name in ("a", "b"):
        bank.add(name, lk.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    for name in ("a", "b", "a"):  # one after the other
        bank.use(name)
        bank.model(x).sum().backward()
        other = "b" if name == "a" else "a"
        assert all(parameter.grad is not None for parameter in bank.parameters(name))
        for parameter in bank.parameters(name):
            parameter.grad = None
        assert all(parameter.grad is None for parameter in bank.parameters(other))
    bank.use("a")
    loss = bank.model(x).sum()
    bank.use("b")
    with pytest.raises(RoutingError, match="computed again in a backward"):
        loss.backward()
    loss = bank.model(x).sum()
    bank.use("a")
    with pytest.raises(RoutingError, match="computed again in a backward"):
        (loss + bank.model(x).sum()).backward()
