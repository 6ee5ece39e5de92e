"""What does a training step cost, beside the frozen base, PEFT and full fine-tuning?

A step is forward, loss and backward; no optimizer. The floor is the frozen base: forward, loss, and the gradient to its
input. Before anything is timed, lora_kit's loss and the gradients of its adapter are compared with PEFT's. The case
"peft, adopted" is the PeftModel after `lk.adopt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

import lora_kit as lk
from benchmarks.harness import MEMORY_IN_USE, Effort, Row, in_own_process, peak_bytes, ratios, table
from benchmarks.models import ALL, QV, adapters, in_peft, llama, token_ids

BATCH, LENGTH = 4, 256
CASES: Final = ("frozen base", "lora_kit", "peft", "peft, adopted", "peft, bf16 adapters", "full fine-tuning")


@dataclass(frozen=True)
class Setting:
    """One model and adapter to train; the defaults are the reference setting."""

    dtype: str = "fp32"
    width: int = 512
    r: int = 16
    targets: tuple[str, ...] = ALL
    checkpointing: str = "none"
    variant: str = "LoRA"

    @property
    def label(self) -> str:
        layers = "all linears" if self.targets == ALL else "q, v"
        kept = "" if self.checkpointing == "none" else ", checkpointing"
        variant = "" if self.variant == "LoRA" else f", {self.variant}"
        return f"{self.dtype}, width {self.width}, r={self.r}, {layers}{kept}{variant}"

    @property
    def cases(self) -> tuple[str, ...]:
        return CASES if self.dtype == "bf16" else tuple(case for case in CASES if "bf16" not in case)

    def adapter(self) -> lk.Adapter:
        return adapters(self.base(), [self.r], targets=self.targets, use_dora=self.variant == "DoRA")[0]

    def base(self) -> Any:
        """The model in training mode. Only full fine-tuning and adapters ask for a gradient later."""
        model = llama(width=self.width, dtype=self.dtype).train().requires_grad_(False)
        if self.checkpointing == "layers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model


def settings() -> list[Setting]:
    """The reference, and each of its choices varied alone, in both dtypes."""
    varied: list[dict[str, Any]] = [
        {},
        {"width": 256},
        {"width": 1024},
        {"r": 8},
        {"r": 64},
        {"targets": QV},
        {"checkpointing": "layers"},
        {"variant": "DoRA"},
    ]
    return [replace(Setting(dtype), **change) for dtype in ("fp32", "bf16") for change in varied]


@dataclass(frozen=True)
class Built:
    """One case, ready to run.

    Attributes:
        loss: runs the forward.
        leaves: what has a gradient after a step.
        weights: all of the model's.
        value: what the adapter holds, under PEFT's keys; None where there is none.
    """

    loss: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    weights: Sequence[Tensor]
    value: Callable[[], Mapping[str, Tensor]] | None

    def step(self) -> None:
        self.loss().backward()
        for leaf in self.leaves:
            leaf.grad = None


def build(case: str, setting: Setting, adapter: lk.Adapter) -> Built:
    """One case by name; each has a model of its own with the same weights."""
    model, inputs = setting.base(), token_ids(BATCH, LENGTH)
    given: dict[str, Tensor] = {"input_ids": inputs}
    value: Callable[[], Mapping[str, Tensor]] | None = None
    if case == "frozen base":
        given = {"inputs_embeds": model.get_input_embeddings()(inputs).detach().requires_grad_()}
    elif case == "full fine-tuning":
        model.requires_grad_(True)
    elif case == "lora_kit":
        bank = lk.attach(model, adapter.config, name="a0")
        bank.restore("a0", adapter)
        value = lambda: bank.snapshot("a0").tensors  # noqa: E731
    else:
        import peft

        model = in_peft(model, {"a0": adapter}, adapter_dtype="bf16" if case.endswith("bf16 adapters") else "fp32")
        if case.endswith("adopted"):
            lk.adopt(model)
        value = lambda: peft.get_peft_model_state_dict(model, adapter_name="a0")  # noqa: E731
    weights = list(model.parameters())
    leaves = [tensor for tensor in (*weights, *given.values()) if tensor.requires_grad]
    return Built(lambda: model(**given, labels=inputs).loss, leaves, weights, value)


def gradients(built: Built) -> tuple[float, dict[str, Tensor]]:
    """The loss of a case, and the gradients of its adapter under PEFT's keys. Its adapter is spoilt by that."""
    loss = built.loss()
    loss.backward()
    with torch.no_grad():
        for leaf in built.leaves:
            assert leaf.grad is not None
            leaf.copy_(leaf.grad)
    assert built.value
    return loss.item(), {key: tensor.detach().double() for key, tensor in built.value().items()}


def check(setting: Setting, adapter: lk.Adapter) -> None:
    """lora_kit computes what PEFT computes: the loss, and each tensor's gradient to rounding."""
    loss, own = gradients(build("lora_kit", setting, adapter))
    other_loss, other = gradients(build("peft", setting, adapter))
    loss_bound, bound = (1e-5, 1e-4) if setting.dtype == "fp32" else (1e-3, 0.1)
    if abs(loss - other_loss) > loss_bound * other_loss:
        raise ValueError(f"{setting.label}: the loss is {loss}, PEFT's is {other_loss}")
    if own.keys() != other.keys():
        raise ValueError(f"{setting.label}: not the tensors of PEFT: {own.keys() ^ other.keys()}")
    for key, gradient in other.items():
        error = float((own[key] - gradient).norm() / gradient.norm())
        if error > bound:
            raise ValueError(f"{setting.label}: the gradient of {key} differs from PEFT's by {error:.1e} of its size")


def timed(setting: Setting, effort: Effort) -> dict[str, Any]:
    adapter = setting.adapter()
    check(setting, adapter)
    cases = {case: build(case, setting, adapter).step for case in effort.of(setting.cases)}
    return {"timings": effort.compare(cases)}


def peak(case: str, setting: Setting) -> int:
    """Peak memory of one step above the loaded model, in bytes. The libraries are warm: a step was taken before."""
    built = build(case, setting, setting.adapter())
    built.step()
    return peak_bytes(built.step)


def peaks(setting: Setting, effort: Effort) -> dict[str, Any]:
    """Peak memory of each case in a process of its own."""
    measure = partial(in_own_process, peak, environment=MEMORY_IN_USE)
    return {"bytes": {case: measure(case, setting) for case in effort.of(setting.cases)}}


def rows() -> dict[str, Row]:
    aims = {Setting("fp32"): 1.12, Setting("bf16"): 1.25}
    found = {}
    for setting in settings():
        short: Any = "short" if setting in aims else "full"
        found[f"training step, {setting.label}"] = Row(partial(timed, setting), short, aims.get(setting))
    for setting in settings():
        if setting.width == 512 and setting.r == 16:
            short = "short" if setting == Setting("bf16") else "full"
            found[f"memory, {setting.label}"] = Row(partial(peaks, setting), short)
    return found


def page(results: Mapping[str, Any]) -> str:
    steps = {name.removeprefix("training step, "): row["timings"] for name, row in results.items() if "timings" in row}
    peaked = {name.removeprefix("memory, "): row["bytes"] for name, row in results.items() if "bytes" in row}
    head = ["", *CASES]
    lines = [
        [name, *(f"{row[case] / 1e6:.0f} MB" if case in row else "–" for case in CASES)] for name, row in peaked.items()
    ]
    return "\n\n".join(
        [
            "Time of a step over that of the frozen base: median over the rounds, and its quartiles.",
            ratios(steps, CASES),
            "Peak memory of a step above the loaded model.",
            table(head, lines),
        ]
    )
