"""Fused experts in rank space: what PEFT gives by changing the weights, without a changed weight."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kit as lk
from lora_kit.errors import RoutingError
from lora_kit.layers.parameter import LoraParameter

EXPERTS, USED, ROWS, TOKENS, WIDTH, INNER = 5, 2, 3, 4, 16, 24
_SAME: Final = {"hidden_size": WIDTH, "num_experts_per_tok": USED, "num_local_experts": EXPERTS}
KINDS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "plain": ("mixtral", "MixtralExperts", {**_SAME, "intermediate_size": INNER}),
    "transposed, with biases and its own gate": ("gpt_oss", "GptOssExperts", {**_SAME, "intermediate_size": INNER}),
    "without a gate": (
        "nemotron_h", "NemotronHExperts", {**_SAME, "n_routed_experts": EXPERTS, "moe_intermediate_size": INNER},
    ),
    "with a norm": (
        "muse_spark_text", "MuseSparkExperts",
        {**_SAME, "moe_hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_attention_heads": 4},
    ),
}  # fmt: skip
CLOSE: Final[dict[str, Any]] = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """Fused experts of transformers, to which tokens are sent without a router."""

    def __init__(self, kind: str, **more: Any) -> None:
        super().__init__()
        family, name, fields = KINDS[kind]
        place = family.removesuffix("_text")
        module = importlib.import_module(f"transformers.models.{place}.modeling_{place}")
        self.experts = getattr(module, name)(transformers.AutoConfig.for_model(family, **{**fields, **more}))
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.reshape(-1, states.shape[-1])
        scores = torch.rand(len(tokens), EXPERTS, generator=torch.Generator().manual_seed(3))
        weights, index = scores.to(tokens).topk(USED)
        found: Tensor = self.experts(tokens, index, weights)
        return found.view(states.shape)


def states(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    drawn = torch.randn(ROWS, TOKENS, width, generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype).requires_grad_(True)


def targets(net: Any) -> list[str]:
    return [f"experts.{name}" for name, p in net.experts.named_parameters() if p.ndim == 3]


def by_peft(net: nn.Module, folder: Path, **fields: Any) -> Any:
    """A random adapter of PEFT's, saved; and the model that uses it."""
    fields = {"r": 3, "lora_alpha": 4, "target_modules": [], "target_parameters": targets(net), **fields}
    torch.manual_seed(5)
    tuned = peft.get_peft_model(net, peft.LoraConfig(init_lora_weights=False, **fields))
    tuned.save_pretrained(str(folder))
    return tuned


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a model gives, and the gradient with respect to what it is given."""
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def gradients_by_key(bank: lk.AdapterBank, name: str) -> Mapping[str, Tensor]:
    """The gradients of an adapter, as its tensors are called."""
    kept = bank.snapshot(name)
    with torch.no_grad():
        for leaf in bank.parameters(name):
            assert leaf.grad is not None
            leaf.copy_(leaf.grad)
    found = bank.snapshot(name).tensors
    bank.restore(name, kept)
    return found


def rank_space(monkeypatch: pytest.MonkeyPatch, *, used: bool) -> None:
    """Fail when experts are computed the other way."""

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("the other way")

    monkeypatch.setattr(LoraParameter, "compute_updated_weight" if used else "_forward_in_rank_space", fails)


def follows(net: Callable[[], nn.Module], folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
    """Outputs and all gradients of an adapter are those of PEFT."""
    theirs = by_peft(net().to(dtype), folder, **fields)
    wanted, into = gradients(theirs, states(dtype))
    model = net().to(dtype)
    bank = lk.attach(model, lk.LoraConfig.of(theirs.peft_config["default"]), name="a", dtype=torch.float32)
    bank.restore("a", lk.Adapter.load(folder))
    found, came = gradients(model, states(dtype))
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(came, into, **CLOSE)
    wanted_by_key = {key.replace(".default", ""): p.grad for key, p in theirs.named_parameters() if "lora_" in key}
    found_by_key = gradients_by_key(bank, "a")
    assert found_by_key.keys() == wanted_by_key.keys()
    for key, gradient in found_by_key.items():
        torch.testing.assert_close(gradient.to(dtype), wanted_by_key[key], msg=key, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["all", "the first", "the last"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_rank_space_give_what_peft_gives_and_the_same_gradients(
    kind: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_space(monkeypatch, used=True)
    names = targets(Net(kind))
    chosen = {"all": names, "the first": names[:1], "the last": names[-1:]}[which]
    follows(lambda: Net(kind), tmp_path, target_parameters=chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_in_double_precision_both_ways_are_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for used in (True, False):
        with monkeypatch.context() as patch:
            model = Net(kind).double()
            torch.manual_seed(5)
            config = lk.LoraConfig(
                r=3, target_modules=(), target_parameters=tuple(targets(model)), init_lora_weights=False
            )
            bank = lk.attach(model, config, name="a")
            if used:
                rank_space(patch, used=True)
            else:
                patch.setattr(LoraParameter, "_can_use_rank_space", lambda *_: False)
            found.append((*gradients(model, states(torch.double)), *gradients_by_key(bank, "a").values()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # the masters, and their gradients, are fp32


def test_experts_of_sizes_that_no_kernel_takes_and_of_16_bits_follow_peft(tmp_path: Path) -> None:
    fields = {"intermediate_size": 7}
    follows(lambda: Net("plain", **fields), tmp_path / "odd")
    theirs = by_peft(Net("plain").bfloat16(), tmp_path / "bf16")
    model = Net("plain").bfloat16()
    bank = lk.attach(model, slots=1)
    bank.load("a", tmp_path / "bf16")
    bank.use("a")
    with torch.no_grad():
        found, wanted = model(states(torch.bfloat16)), theirs(states(torch.bfloat16))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


def test_under_autocast_experts_follow_peft(tmp_path: Path) -> None:
    theirs = by_peft(Net("plain"), tmp_path)
    model = Net("plain")
    model.experts.config._experts_implementation = "grouped_mm"  # as models have it, which leaves autocast out
    theirs.base_model.model.experts.get_base_layer().config._experts_implementation = "grouped_mm"
    bank = lk.attach(model, slots=1, dtype=torch.float32)
    bank.load("a", tmp_path)
    bank.use("a")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(states()), theirs(states()), **CLOSE)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made within."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.size = max(self.size, tensor.numel())
        return made


@pytest.mark.parametrize("routed", ["one", "rows"])
def test_nothing_as_large_as_a_parameter_is_made_in_a_training_step(routed: str) -> None:
    model = Net("plain", hidden_size=128, intermediate_size=128)
    config = lk.LoraConfig(r=2, target_modules=(), target_parameters=tuple(targets(model)), init_lora_weights=False)
    bank = lk.attach(model, config, name="a")
    bank.add("b", config)
    smallest = min(p.numel() for p in model.experts.base_layer.base_layer.parameters())
    with Largest() as seen, bank.rows(["a", "b", None] if routed == "rows" else ["a"] * 3):
        gradients(model, states(width=128))
    assert 0 < seen.size < smallest


def several(kind: str, **more: Any) -> tuple[Net, lk.AdapterBank]:
    """A model with trainable adapters: of all parameters, of one of them, and of another rank."""
    model = Net(kind)
    bank = lk.attach(model, dtype=torch.float32)
    names = targets(model)
    torch.manual_seed(7)
    for name, rank, chosen in (("all", 3, names), ("one", 2, names[:1]), ("more", 5, names)):
        fields = {"r": rank, "target_modules": [], "target_parameters": chosen, "init_lora_weights": False, **more}
        bank.add(name, lk.LoraConfig(**fields))
    return model, bank


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [["one", "more", "all"], ["all", None, "one"]])
def test_rows_of_several_adapters_give_what_each_gives_alone_and_the_same_gradients(
    kind: str, names: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_space(monkeypatch, used=True)
    model, bank = several(kind)
    alone: list[Tensor] = []
    wanted: dict[str, Mapping[str, Tensor]] = {}
    for row, name in enumerate(names):
        bank.use(name)
        y = model(states())[row]
        alone.append(y.detach())
        if name is not None:
            y.square().sum().backward()
            wanted[name] = gradients_by_key(bank, name)
    model.zero_grad(set_to_none=True)
    with bank.rows(names):
        y, _ = gradients(model, states())
    torch.testing.assert_close(y, torch.stack(alone), **CLOSE)
    for name, by_key in wanted.items():
        for key, gradient in gradients_by_key(bank, name).items():
            torch.testing.assert_close(gradient, by_key[key], rtol=1e-4, atol=5e-5)


def test_the_base_is_what_it_was_bit_for_bit_and_so_is_an_adapter_after_a_swap() -> None:
    base = Net("plain")(states())
    model, bank = several("plain")
    assert torch.equal(model(states()), base)
    bank.use("all")
    first = model(states())
    bank.use("more")
    assert not torch.equal(model(states()), first)
    with bank.rows(["one", None, "more"]):
        model(states())
    bank.use("all")
    assert torch.equal(model(states()), first)
    bank.use(None)
    assert torch.equal(model(states()), base)


def test_what_is_kept_of_an_adapter_is_not_given_to_the_next_one_in_its_slot(tmp_path: Path) -> None:
    _, made = several("plain")
    for name in ("all", "more"):
        made.save(name, tmp_path / name)
    wanted = {}
    for name in ("all", "more"):
        made.use(name)
        wanted[name] = made.model(states()).detach()
    model = Net("plain")
    bank = lk.attach(model, slots=1, dtype=torch.float32)
    for name in ("all", "more", "all"):
        bank.load("it", tmp_path / name)
        bank.use("it")
        with torch.inference_mode():
            torch.testing.assert_close(model(states()), wanted[name], **CLOSE)
        gradients(model, states())  # with what was made in inference mode
        bank.use(None)
        bank.unload("it")


def test_what_is_kept_of_one_adapter_is_not_given_to_another(tmp_path: Path) -> None:
    _, made = several("plain")
    wanted = {}
    for name in ("all", "one", "more"):
        made.save(name, tmp_path / name)
        made.use(name)
        wanted[name] = made.model(states()).detach()
    bank = lk.attach(Net("plain"), dtype=torch.float32)
    for name in wanted:
        bank.load(name, tmp_path / name)
    each = ["all"], ["one"], ["more"], ["all"], ["all", "one", "more"], ["more", "one", "all"], ["more"]
    for names in (names * (ROWS // len(names)) for names in each):
        with bank.rows(names), torch.no_grad():
            found = bank.model(states())
        torch.testing.assert_close(found, torch.stack([wanted[name][row] for row, name in enumerate(names)]), **CLOSE)


def test_experts_that_are_hooked_are_called_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = several("plain")
    bank.use("all")
    wanted, seen = model(states()), []
    model.experts.base_layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    rank_space(monkeypatch, used=False)
    torch.testing.assert_close(model(states()), wanted, **CLOSE)
    assert seen == [1]


class Repeating(nn.Module):
    """Experts that are given every token once for each of them, one expert after another."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.Llama4TextConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS)
        module = importlib.import_module("transformers.models.llama4.modeling_llama4")
        self.experts = module.Llama4TextExperts(config)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.reshape(-1, states.shape[-1])
        found: Tensor = self.experts(tokens.repeat(EXPERTS, 1)).view(EXPERTS, *states.shape).sum(0)
        return found


def test_experts_that_do_not_say_which_row_a_token_is_of_refuse_rows_and_follow_peft(tmp_path: Path) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    follows(Repeating, tmp_path, target_parameters=names)
    model = Repeating()
    bank = lk.attach(model, slots=1, dtype=torch.float32)
    bank.load("a", tmp_path)
    with bank.rows(["a", None, "a"]), pytest.raises(RoutingError, match="does not say which row"):
        model(states())
