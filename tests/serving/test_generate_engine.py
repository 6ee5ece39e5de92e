"""The engine over `generate`: bases without plain attention write what they write alone, each row by its adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lora_kit as lk
from lora_kit.models.loading import Base
from lora_kit.models.tasks import CAUSAL_LM, SEQ2SEQ
from lora_kit.serving.adapter_slots import AdapterSlots, NoFreeSlotError
from lora_kit.serving.engine import EngineRequest, Event, RequestError
from lora_kit.serving.generate_engine import GenerateEngine
from lora_kit.serving.sampler import SamplingSettings
from tests.support import random_adapters
from tests.support.merge_families import SMALL

PROMPTS = ([3, 4, 5, 6, 7, 8, 9], [10, 11], [3, 4, 5, 6, 12, 13])
KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}
TARGETS = {"gemma2": ["q_proj"], "bloom": ["query_key_value"], "mamba": ["in_proj"], "t5": ["q", "wo", "lm_head"]}


def make_base(kind: str) -> Base:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], "tie_word_embeddings": False})
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    task = SEQ2SEQ if kind == "t5" else CAUSAL_LM
    return Base(model=model, tokenizer=lk.load_base("kit-base").tokenizer, name=kind, task=task)


def make_adapter(base: Base, *, seed: int = 0) -> lk.Adapter:
    return random_adapters.made(base, seed=seed, target_modules=TARGETS[base.name], r=2, lora_alpha=128)


def write_alone(base: Base, prompt: list[int], adapter: lk.Adapter | None, count: int = 6) -> list[int]:
    bank, ids = lk.attach(base.model, slots=1, max_rank=4), torch.tensor([prompt])
    try:
        if adapter is not None:
            bank.load("alone", adapter)
            bank.use("alone")
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
        written = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return list(written[0, 1 if base.task == SEQ2SEQ else len(prompt) :][:count].tolist())
    finally:
        bank.detach()


class Run:
    """An engine with one adapter in a slot, and what came of its requests."""

    def __init__(self, base: Base, *adapters: lk.Adapter, slots: int = 2, rows: int = 8) -> None:
        self.bank = lk.attach(base.model, slots=slots, max_rank=4)
        self.engine = GenerateEngine(base, self.bank, rows=rows, positions=40)
        self.slots = AdapterSlots(self.bank, self.engine, slots=slots)
        self.adapters, self.ends = adapters, frozenset({SMALL["eos_token_id"]})
        self.tokens, self.events = dict[str, list[int]](), list[Event]()

    def ask(self, name: str, prompt: list[int], adapter: lk.Adapter | None, count: int = 6) -> None:
        lease = None if adapter is None else self.slots.lease(adapter)
        settings = SamplingSettings(max_tokens=count, min_tokens=count)
        self.engine.submit(EngineRequest(name, prompt, settings, lease, self.ends))

    def step(self) -> None:
        for event in self.engine.step():
            self.events.append(event)
            if event.chosen is not None:
                self.tokens.setdefault(event.request_id, []).append(event.chosen.token)

    def finish(self) -> None:
        while self.engine.running or self.engine.waiting:
            self.step()

    def close(self) -> None:
        self.engine.close()
        self.bank.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_adapters_and_lengths_write_what_they_write_alone(kind: str) -> None:
    base = make_base(kind)
    adapter = make_adapter(base)
    asked = {f"{n}{'a' if a else ''}": (prompt, a) for n, prompt in enumerate(PROMPTS) for a in (None, adapter)}
    expected = {name: write_alone(base, prompt, a) for name, (prompt, a) in asked.items()}
    assert expected["0"] != expected["0a"]
    run = Run(base)
    for name, (prompt, own) in asked.items():
        run.ask(name, prompt, own)
    run.finish()
    run.close()
    assert run.tokens == expected


def test_where_padding_changes_a_row_only_prompts_of_one_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("gemma2")
    expected = [write_alone(base, prompt, None) for prompt in PROMPTS]
    own = base.model.forward

    def forward_without_mask(*args: Any, attention_mask: Any = None, **options: Any) -> Any:
        return own(*args, **options)

    monkeypatch.setattr(base.model, "forward", forward_without_mask)
    run = Run(base)
    assert not run.engine.pads
    for number, prompt in enumerate(PROMPTS):
        run.ask(str(number), prompt, None)
    run.finish()
    run.close()
    assert [run.tokens[str(number)] for number in range(len(PROMPTS))] == expected


def test_settings_of_the_base_change_no_request() -> None:
    base = make_base("t5")
    expected = write_alone(base, PROMPTS[0], None)
    settings = {"num_beams": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "do_sample": True}
    for name, value in settings.items():
        setattr(base.model.generation_config, name, value)
    run = Run(base)
    run.ask("a", PROMPTS[0], None)
    run.finish()
    run.close()
    assert run.tokens["a"] == expected


def test_a_cancelled_row_leaves_the_others_and_an_exception_ends_its_batch_alone() -> None:
    base = make_base("bloom")
    expected = write_alone(base, PROMPTS[1], None, count=6)
    run = Run(base)
    run.ask("long", PROMPTS[0], None, count=20)
    run.ask("short", PROMPTS[1], None)
    run.step()
    run.engine.cancel("long")
    run.finish()
    assert run.tokens["short"] == expected
    assert [e.finish.reason for e in run.events if e.request_id == "long" and e.finish] == ["cancelled"]

    def fail(*arguments: object) -> None:
        raise RuntimeError("planted")

    run.ask("bad", PROMPTS[0], None)
    hook = base.model.transformer.h[0].register_forward_pre_hook(fail)
    run.finish()
    hook.remove()
    assert run.events[-1].finish is not None
    assert "planted" in run.events[-1].finish.message
    run.ask("again", PROMPTS[1], None)
    run.finish()
    run.close()
    assert run.tokens["again"] == expected


def test_an_adapter_whose_row_has_ended_keeps_its_slot_until_the_batch_has() -> None:
    base = make_base("bloom")
    one, two = make_adapter(base, seed=1), make_adapter(base, seed=2)
    expected = write_alone(base, PROMPTS[0], None, count=12)
    run = Run(base, slots=1)
    lease = run.slots.lease(one)
    settings = SamplingSettings(max_tokens=1)
    run.engine.submit(EngineRequest("short", PROMPTS[1], settings, lease, run.ends))
    run.ask("long", PROMPTS[0], None, count=12)
    run.step()
    run.slots.release(lease)
    with pytest.raises(NoFreeSlotError):
        run.slots.lease(two)
    run.finish()
    run.slots.release(run.slots.lease(two))
    run.close()
    assert run.tokens["long"] == expected


def test_what_can_never_run_is_an_error_at_once() -> None:
    run = Run(make_base("bloom"))
    for prompt, count in (([], 2), ([10**6], 2), ([3] * 30, 20)):
        with pytest.raises(RequestError):
            run.ask("x", prompt, None, count=count)
    run.close()
