"""What is measured: each section returns a JSON object, and stops in time.

Cases of a comparison take turns, ratios are taken within a round, and what is compared is first shown to compute the
same. Weights are random and in memory once: every case has modules of its own around the same tensors.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lora_kit as lk
from benchmarks.gpu.bases import Shape, in_4bit, llama, twin
from benchmarks.gpu.checks import agree
from benchmarks.gpu.graphs import captured
from benchmarks.harness import Effort, median_us, peak_bytes
from benchmarks.models import adapters, bank_of, in_peft, lora, token_ids
from lora_kit.ops import dispatch, torch_kernels
from lora_kit.ops.cross_entropy import chunked_cross_entropy

R: Final = 16
OUT_OF_TIME: Final = "out of time"
NEAR: Final = 0.05
"""How far logits in bf16 may be apart where the same is computed in another order."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes.

    Attributes:
        layers: decoder layers where training is measured.
        few: where decoding is: all layers are alike, and PEFT takes minutes to hold 64 adapters in 32 of them.
        compiled: where torch.compile is, which takes its time for every layer.
        batch, length: of a training step.
        tokens: in one product of one adapter. mixed: rows and tokens a row where each row has its own adapter.
        decoding: rows, and how many adapters they share.
        calls: of one product in one CUDA graph.
    """

    device: torch.device
    shape: Shape
    layers: int
    few: int
    compiled: int
    batch: int
    length: int
    tokens: tuple[int, ...]
    mixed: tuple[tuple[int, int], ...]
    decoding: tuple[tuple[int, int], ...]
    calls: int
    effort: Effort


@dataclass
class Deadline:
    """Until when a section may go on."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)


Section = Callable[[Plan, Deadline], dict[str, Any]]


def ceilings(plan: Plan, deadline: Deadline) -> dict[str, Any]:
    """What this device can do: bytes per second in a copy (read and written), operations per second in a product."""
    size, copied = (8192, 1 << 31) if plan.device.type == "cuda" else (256, 1 << 20)
    a, b = (torch.randn(size, size, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(copied // 2, device=plan.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    timings = plan.effort.compare({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    bandwidth, rate = 2 * copied / timings["copy"].median, 2 * size**3 / timings["product"].median
    return {"bytes per second": bandwidth, "bf16 operations per second": rate}


# One product


@dataclass(frozen=True)
class Product:
    """The update of one layer: `rows` of `tokens` each; one adapter for all, or (`routed`) one for each row.

    Attributes:
        factors: dtype of A and B: fp32 masters in training, a bf16 slab where adapters are served.
        backward: dX += s (dY B) A instead of y += s (x Aᵀ) Bᵀ.
    """

    layer: str
    size_in: int
    size_out: int
    tokens: int
    rows: int = 1
    routed: str = ""
    r: int = R
    factors: torch.dtype = torch.bfloat16
    backward: str = ""

    @property
    def label(self) -> str:
        what = f"{self.rows} rows x {self.tokens}, an adapter each" if self.routed else f"{self.tokens} tokens"
        return f"{self.layer} {self.size_in}->{self.size_out}, r={self.r}, {what}{self.backward and ', backward'}"

    def bytes_and_operations(self) -> tuple[int, int]:
        """The fewest there can be: each input read once, y read and written once."""
        n, both = self.rows * self.tokens, self.size_in + self.size_out
        factors = (self.rows if self.routed else 1) * self.r * both * self.factors.itemsize
        return 2 * n * (self.size_in + 2 * self.size_out) + factors, 2 * n * self.r * both

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        slots = self.rows + 1 if self.routed else 1
        a, b = (
            made(slots, self.r, self.size_in, dtype=self.factors),
            made(slots, self.r, self.size_out).to(self.factors),
        )
        scaling = torch.full((slots,), 1 / self.size_in, device=device)
        if self.routed:
            a[0], b[0], scaling[0] = 0, 0, 0
        return {
            "x": made(self.rows, self.tokens, self.size_in),
            "y": made(self.rows, self.tokens, self.size_out),
            "a": a,
            "b": b.mT,  # a slab has the rank before the features in memory
            "scaling": scaling,
            "slots": torch.randperm(self.rows, device=device) + 1,
            "weight": made(self.size_out, self.size_in),
        }

    def base(self, t: Mapping[str, Tensor]) -> Tensor:
        """The product of the base layer, or of its backward."""
        return t["y"] @ t["weight"] if self.backward else t["x"] @ t["weight"].mT

    def update(self, body: dispatch.Kernels, t: Mapping[str, Tensor]) -> None:
        if self.routed:
            body.add_rows_(t["y"], t["x"], t["a"], t["b"], t["scaling"], t["slots"])
        elif self.backward:
            body.add_(t["x"][0], t["y"][0], t["b"][0].mT, t["a"][0].mT, 1 / self.size_out)
        else:
            body.add_(t["y"][0], t["x"][0], t["a"][0], t["b"][0], 1 / self.size_in)

    def changed(self, body: dispatch.Kernels, t: Mapping[str, Tensor]) -> Tensor:
        """What an update makes of fresh copies."""
        fresh = {**t, "x": t["x"].clone(), "y": t["y"].clone()}
        self.update(body, fresh)
        return fresh["x" if self.backward else "y"]


def products(plan: Plan) -> list[Product]:
    made = []
    for layer, sizes in plan.shape.linears.items():
        for tokens in plan.tokens:
            training = tokens >= 4096
            made.append(Product(layer, *sizes, tokens, factors=torch.float32 if training else torch.bfloat16))
            if training:
                made.append(Product(layer, *sizes, tokens, factors=torch.float32, backward="yes"))
        made += [Product(layer, *sizes, tokens, rows, "yes") for rows, tokens in plan.mixed]
    layer, sizes = next(iter(plan.shape.linears.items()))
    made += [Product(layer, *sizes, tokens, r=64) for tokens in plan.tokens]
    return made


def kernels(plan: Plan, deadline: Deadline) -> dict[str, Any]:
    """Plain bodies against Triton's, and against the product of the base layer that they are added to."""
    effort = Effort(plan.effort.rounds, plan.effort.seconds / 20)
    return {
        product.label: one_product(product, plan, effort) if deadline.left > 2 else OUT_OF_TIME
        for product in products(plan)
    }


def one_product(product: Product, plan: Plan, effort: Effort) -> dict[str, Any]:
    """Many calls in one CUDA graph over several sets of tensors: neither launches nor the cache are measured."""
    chosen = dispatch.choose_kernels(plan.device, torch.bfloat16)
    moved, operations = product.bytes_and_operations()
    sets = [product.tensors(plan.device) for _ in range(max(2, min(8, (1 << 28) // moved)))]
    agree(product.changed(chosen, sets[0]), product.changed(torch_kernels, sets[0]), bound=NEAR)
    calls = plan.calls if product.rows * product.tokens <= 512 else max(2, plan.calls // 10)

    def over_sets(call: Callable[[Mapping[str, Tensor]], Any]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for number in range(calls):
                call(sets[number % len(sets)])
            return sets[0]["y"]

        return captured(run, plan.device)

    cases = {"base": over_sets(product.base), "plain": over_sets(partial(product.update, torch_kernels))}
    if chosen is not torch_kernels:
        cases["triton"] = over_sets(partial(product.update, chosen))
    timings = effort.compare(cases)
    return {
        "bytes": moved,
        "operations": operations,
        "microseconds": {name: 1e6 * timing.median / calls for name, timing in timings.items()},
        "over the base": {name: timing.ratio for name, timing in timings.items()},
    }


# The loss


def loss(plan: Plan, deadline: Deadline) -> dict[str, Any]:
    """The loss of a batch over a frozen head, and its gradient to the hidden states: in chunks, and from all logits."""
    rows, width = plan.batch * plan.length, plan.shape.width
    hidden = torch.randn(rows, width, device=plan.device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(plan.shape.vocabulary, width, device=plan.device, dtype=torch.bfloat16) / width**0.5
    labels = torch.randint(plan.shape.vocabulary, (rows,), device=plan.device)
    cases: dict[str, Callable[[], Tensor]] = {
        "all logits": lambda: cross_entropy((hidden @ weight.mT).float(), labels, reduction="sum"),
        "chunks": lambda: chunked_cross_entropy(hidden, weight, labels),
    }
    (expected,), (found,) = (torch.autograd.grad(case(), [hidden]) for case in cases.values())
    agree(found, expected, bound=NEAR)
    steps = {name: partial(lambda case: torch.autograd.grad(case(), [hidden]), case) for name, case in cases.items()}
    timings = plan.effort.compare(steps)
    return {
        name: {"median": timing.median, "ratio": timing.ratio, "peak bytes": peak_bytes(steps[name])}
        for name, timing in timings.items()
    }


# Training


@dataclass
class Trained:
    """One case: a whole training step, optimizer included (the frozen base has none)."""

    model: Any
    leaves: Sequence[Tensor]
    ids: Tensor
    embedded: Tensor | None = None
    autocast: bool = False

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.leaves, lr=1e-5, fused=True) if self.embedded is None else None

    def loss(self) -> Tensor:
        context = torch.autocast(self.ids.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        given = {"input_ids": self.ids} if self.embedded is None else {"inputs_embeds": self.embedded}
        with context:
            loss: Tensor = self.model(**given, labels=self.ids, use_cache=False).loss
        return loss

    def step(self) -> None:
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        for leaf in self.leaves:
            leaf.grad = None


def trained_cases(base: Any, ids: Tensor) -> dict[str, Trained]:
    """The frozen base with the gradient to its input, lora_kit, PEFT as it comes, and PEFT with bf16 adapters."""
    value = adapters(base, [R])[0]
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    cases = {"frozen base": Trained(twin(base).train(), [embedded], ids, embedded)}
    ours = twin(base).train()
    bank = lk.attach(ours, lora(R), name="a")
    bank.restore("a", value)
    cases["lora_kit"] = Trained(ours, bank.parameters("a"), ids)
    for name, dtype in (("peft, fp32 adapters, autocast", "fp32"), ("peft, bf16 adapters", "bf16")):
        wrapped = in_peft(twin(base), {"a": value}, adapter_dtype=dtype).train()
        leaves = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        cases[name] = Trained(wrapped, leaves, ids, autocast=dtype == "fp32")
    losses = {}
    for name, case in cases.items():
        with torch.no_grad():
            losses[name] = case.loss().item()
    assert abs(losses["lora_kit"] - losses["peft, bf16 adapters"]) < NEAR, losses
    assert all(loss == loss for loss in losses.values()), losses
    return cases


def trained(plan: Plan, deadline: Deadline, base: Any) -> dict[str, Any]:
    """Tokens per second and peak memory of a step, with and without checkpointing."""
    ids = token_ids(plan.batch, plan.length).to(plan.device)
    cases = trained_cases(base, ids)
    found: dict[str, Any] = {"batch": plan.batch, "length": plan.length, "r": R, "layers": plan.layers}
    for kept in ("every activation", "one activation a layer"):
        if deadline.left < 10:
            found[kept] = OUT_OF_TIME
            continue
        if kept != "every activation":
            for case in cases.values():
                case.model.gradient_checkpointing_enable({"use_reentrant": False})
        peaks = {name: _peak(case.step) for name, case in cases.items()}
        fitting = {name: case.step for name, case in cases.items() if peaks[name] is not None}
        timings = plan.effort.compare(fitting)
        found[kept] = {
            name: {
                "peak bytes above the model": peak,
                **({"tokens per second": ids.numel() / timings[name].median, **asdict(timings[name])} if peak else {}),
            }
            for name, peak in peaks.items()
        }
    return found


def _peak(step: Callable[[], None]) -> int | None:
    """Peak memory of a step above what was held before; None where it does not fit the device."""
    try:
        step()  # so that what stays, such as the optimizer's state, is there before
        return peak_bytes(step)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return None


def training_bf16(plan: Plan, deadline: Deadline) -> dict[str, Any]:
    return trained(plan, deadline, llama(plan.shape, layers=plan.layers, device=plan.device))


def training_4bit(plan: Plan, deadline: Deadline) -> dict[str, Any]:
    return trained(plan, deadline, in_4bit(llama(plan.shape, layers=plan.layers, device=plan.device)))


# Many adapters


def values_of(base: Any, count: int) -> dict[str, lk.Adapter]:
    """Adapters by name, up to eight different ones: what they hold matters less than that each has its own slot."""
    made = adapters(base, [R] * min(count, 8))
    return {f"a{number}": made[number % len(made)] for number in range(count)}


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Of the last position of each row."""
    found: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1, **more).logits
    return found


def decoding(plan: Plan, deadline: Deadline) -> dict[str, Any]:
    """One token for each of some rows that share 1, 8 or 64 adapters, beside the bare base and PEFT.

    A forward of one token a row without a cache: all linear layers as in decoding, and nothing of attention, which is
    the same for all. Launched from Python, and as a CUDA graph, which PEFT's branches do not allow.
    """
    base = llama(plan.shape, layers=plan.few, device=plan.device)
    found: dict[str, Any] = {"layers": plan.few, "r": R}
    values = values_of(base, max(count for _, count in plan.decoding))
    ours, theirs, held = twin(base), None, 0
    bank = bank_of(ours, values)
    for rows, count in sorted(plan.decoding, key=lambda each: each[1]):
        if deadline.left < 10:
            found[f"{rows} rows, {count} adapters"] = OUT_OF_TIME
            continue
        names = [f"a{row % count}" for row in range(rows)]
        ids = token_ids(rows, 1).to(plan.device)
        # PEFT is given the adapters it needs and no more, since it takes ever longer to add one.
        if count > held and deadline.left > count:
            theirs, held = in_peft(twin(base), {name: values[name] for name in dict.fromkeys(names)}).eval(), count
        cases = {"frozen base": partial(logits_of, base, ids), "lora_kit": partial(logits_of, ours, ids)}
        if held >= count:
            cases["peft"] = partial(logits_of, theirs, ids, adapter_names=names)
        with bank.rows(names):
            results = {name: run().clone() for name, run in cases.items()}
            if "peft" in results:
                agree(results["lora_kit"], results["peft"], bound=NEAR)
            launched = plan.effort.compare(cases)
            graphs = {name: captured(cases[name], plan.device) for name in ("frozen base", "lora_kit")}
            agree(graphs["lora_kit"](), results["lora_kit"], bound=NEAR)
            replayed = plan.effort.compare(graphs)
        found[f"{rows} rows, {count} adapters"] = {
            "launched": {name: asdict(timing) for name, timing in launched.items()},
            "as a graph": {name: asdict(timing) for name, timing in replayed.items()},
        }
    return found


def swapping(plan: Plan, deadline: Deadline) -> dict[str, Any]:
    """A swap costs one write: under a CUDA graph without capturing, under torch.compile without compiling again."""
    base = llama(plan.shape, layers=plan.compiled, device=plan.device)
    values = values_of(base, 8)
    ours, ids = twin(base), token_ids(8, 1).to(plan.device)
    bank = bank_of(ours, values)
    names = list(values)
    found: dict[str, Any] = {"layers": plan.compiled, "adapters": len(names), "rows": len(ids)}

    def swap() -> None:
        names.append(names.pop(0))
        bank.use(names[0])

    found["microseconds of a swap"] = median_us(swap, repetitions=200)
    step = partial(logits_of, ours, ids)
    eager = _after_each_swap(bank, names, step)
    bank.use(names[0])
    replay = captured(step, plan.device)
    for own, other in zip(_after_each_swap(bank, names, replay), eager, strict=True):
        agree(own, other, bound=NEAR)

    def swap_and_replay() -> None:
        swap()
        replay()

    cases = {"replay": replay, "swap and replay": swap_and_replay}
    found["CUDA graph"] = {name: asdict(timing) for name, timing in plan.effort.compare(cases).items()}
    if deadline.left > 30 or plan.device.type != "cuda":
        found["torch.compile"] = _compiled(plan, base, ours, bank, names, ids, eager)
    return found


def _after_each_swap(bank: lk.AdapterBank, names: Sequence[str], run: Callable[[], Tensor]) -> list[Tensor]:
    results = []
    for name in [*sorted(names), None]:
        bank.use(name)
        results.append(run().clone())
    return results


def _compiled(
    plan: Plan, base: Any, ours: Any, bank: lk.AdapterBank, names: Sequence[str], ids: Tensor, eager: Sequence[Tensor]
) -> dict[str, Any]:
    """Compiled once for one adapter and once for mixed rows; from then on, to compile again is an error."""
    torch._dynamo.reset()
    steps = {"frozen base": partial(logits_of, base, ids), "lora_kit": partial(logits_of, ours, ids)}
    for model in (base, ours):
        model.forward = torch.compile(model.forward, backend="inductor" if plan.device.type == "cuda" else "aot_eager")
    batches = {"one adapter": [names[0]] * len(ids), "one per row": names[: len(ids)]}
    for batch in batches.values():
        with bank.rows(batch):
            for step in steps.values():
                step()
    found: dict[str, Any] = {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for own, other in zip(_after_each_swap(bank, names, steps["lora_kit"]), eager, strict=True):
            agree(own, other, bound=NEAR)
        for label, batch in batches.items():
            with bank.rows(batch):
                found[label] = {name: asdict(timing) for name, timing in plan.effort.compare(steps).items()}
    return found
