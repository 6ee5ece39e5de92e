"""The loss over a frozen head in chunks: what the plain loss gives, whatever the chunk, without a batch of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kit.errors import DataError
from lora_kit.ops.cross_entropy import chunked_cross_entropy

N, D, V = 13, 7, 11
IGNORED = -100


def given(*, dtype: torch.dtype = torch.float64, n: int = N, d: int = D, v: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, d), weight (v, d), and labels (n,) of which every third is missing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64) / d**0.5
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::3] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """The loss as anyone would write it."""
    logits = functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def with_gradient(loss: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of a third of it: what comes in from above is multiplied with."""
    return loss.detach(), torch.autograd.grad(loss / 3, hidden)[0]


class Allocated(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(found) if isinstance(leaf, Tensor)
        ]
        self.largest = max([self.largest, *sizes])
        return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, N, None])
def test_the_plain_loss_and_its_gradient(chunk: int | None, biased: bool, smoothing: float) -> None:
    hidden, weight, labels = given()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64) if biased else None
    own = with_gradient(
        chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk, smoothing=smoothing), hidden
    )
    for found, expected in zip(own, with_gradient(plain(hidden, weight, labels, bias, smoothing), hidden), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_the_derivative(smoothing: float) -> None:
    hidden, weight, labels = given()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)

    def loss(states: Tensor) -> Tensor:
        return chunked_cross_entropy(states, weight, labels, bias=bias, chunk=4, smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, hidden)


def test_rows_without_a_label_get_no_gradient_and_cost_nothing() -> None:
    hidden, weight, labels = given()
    loss, gradient = with_gradient(chunked_cross_entropy(hidden, weight, labels), hidden)
    without = labels == IGNORED
    assert not gradient[without].any()
    assert gradient[~without].any(1).all()
    kept = hidden.detach()[~without]
    assert torch.equal(loss, chunked_cross_entropy(kept, weight, labels[~without]))
    spoilt = torch.where(without[:, None], torch.nan, hidden.detach())
    assert torch.equal(loss, chunked_cross_entropy(spoilt, weight, labels))


def test_no_label_at_all_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    hidden, weight, labels = given()
    loss, gradient = with_gradient(chunked_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED)), hidden)
    assert loss == 0
    assert not gradient.any()


def test_another_index_can_mean_no_label() -> None:
    hidden, weight, labels = given()
    renamed = labels.where(labels != IGNORED, torch.tensor(-1))
    expected = chunked_cross_entropy(hidden, weight, labels)
    assert torch.equal(chunked_cross_entropy(hidden, weight, renamed, ignore_index=-1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_no_further_from_the_truth_than_the_plain_loss(dtype: torch.dtype, scale: float) -> None:
    """Against fp64 on the same rounded inputs: confident predictions (large logits) and unsure ones."""
    hidden, weight, labels = given(dtype=dtype, n=60, d=64, v=700)
    hidden = (hidden.detach() * scale).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    truth = with_gradient(plain(exact, weight.double(), labels), exact)
    own = with_gradient(chunked_cross_entropy(hidden, weight, labels, chunk=16), hidden)
    other = with_gradient(plain(hidden, weight, labels), hidden)
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(way, truth, strict=True)] for way in (own, other)
    ]
    assert own[0].dtype == torch.float32
    assert own[1].dtype == dtype
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= max(1.02 * theirs, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_computes_as_a_plain_head_does(dtype: torch.dtype) -> None:
    hidden, weight, labels = given(dtype=torch.float32, n=60, d=64, v=700)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = chunked_cross_entropy(hidden.to(dtype), weight, labels)
        other = plain(hidden.to(dtype), weight, labels)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, other, rtol=1e-5, atol=0)
    assert float((own - plain(hidden, weight, labels)).detach().abs()) > 1e-4  # it did compute in bf16
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (own, other)]
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02)


def test_without_gradients_none_is_formed() -> None:
    hidden, weight, labels = given()
    expected = chunked_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        found = chunked_cross_entropy(hidden, weight, labels)
    assert found.grad_fn is None
    assert torch.equal(found, expected)
    assert chunked_cross_entropy(hidden.detach(), weight, labels).grad_fn is None


def test_logits_of_the_batch_never_exist() -> None:
    hidden, weight, labels = given(dtype=torch.float32, n=300, d=8, v=500)
    with Allocated() as counted:
        chunked_cross_entropy(hidden, weight, labels, chunk=10).backward()
    assert counted.largest == 10 * 500
    with Allocated() as counted:
        plain(hidden, weight, labels).backward()
    assert counted.largest == 300 * 500


def test_what_is_kept_for_the_backward_is_the_gradient_alone() -> None:
    hidden, weight, labels = given(dtype=torch.float32, n=300, d=8, v=500)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, labels)
    rows = int((labels != IGNORED).sum())
    assert sorted(tensor.shape for tensor in kept) == [(rows,), (rows, 8)]


def misfits() -> Iterator[Any]:
    hidden, weight, labels = given()
    outside, below = labels.clone(), labels.clone()
    outside[1], below[1] = V, -3
    yield pytest.param({"hidden": hidden[None]}, "the shapes are", id="hidden of three axes")
    yield pytest.param({"weight": weight[:, 1:]}, "the shapes are", id="another width")
    yield pytest.param({"labels": labels[1:]}, "the shapes are", id="fewer labels")
    yield pytest.param({"bias": weight[0]}, "the shapes are", id="bias of the width")
    yield pytest.param({"labels": labels.int()}, "must be int64", id="int32 labels")
    yield pytest.param({"labels": outside}, "label 11 is outside the 11 classes", id="label beyond")
    yield pytest.param({"labels": below}, "label -3 is outside the 11 classes", id="label below")
    yield pytest.param({"weight": weight.float()}, "must be of one dtype", id="two dtypes")
    yield pytest.param({"weight": weight.clone().requires_grad_()}, "requires a gradient", id="trained head")


@pytest.mark.parametrize(("changes", "message"), list(misfits()))
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], message: str) -> None:
    hidden, weight, labels = given()
    arguments: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels, **changes}
    with pytest.raises(DataError, match=message):
        chunked_cross_entropy(**arguments)
