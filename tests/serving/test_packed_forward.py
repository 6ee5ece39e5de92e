"""Which bases a packed forward computes rightly: found out by trying, before the first request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lora_kit as lk
from lora_kit.errors import BaseModelError
from lora_kit.models.loading import Base
from lora_kit.serving.engine import EngineRequest
from lora_kit.serving.packed_forward import PackedForward
from lora_kit.serving.rows_engine import RowsEngine
from lora_kit.serving.sampler import SamplingSettings
from tests.support.merge_families import SMALL


def make_base(kind: str, **fields: Any) -> Base:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return Base(model=model, tokenizer=lk.load_base("kit-base").tokenizer, name=kind)


def write_alone(base: Base, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    return list(base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :])


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi3", {}),
        ("gemma", {}),
        ("olmo2", {}),
        ("granite", {}),
    ],
)
def test_a_decoder_with_plain_attention_writes_what_it_writes_alone(kind: str, fields: dict[str, Any]) -> None:
    base = make_base(kind, **fields)
    prompts = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [3, 4, 5, 6, 12, 13]]
    expected = [write_alone(base, prompt) for prompt in prompts]
    engine = RowsEngine(base, rows=2, positions=32, step_tokens=5)
    written: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        settings = SamplingSettings(max_tokens=8, min_tokens=8)
        engine.submit(EngineRequest(str(number), prompt, settings, end_tokens=frozenset({SMALL["eos_token_id"]})))
    while engine.running or engine.waiting:
        for event in engine.step():
            if event.chosen is not None:
                written.setdefault(event.request_id, []).append(event.chosen.token)
    engine.close()
    assert [written[str(number)] for number in range(len(prompts))] == expected
    assert write_alone(base, prompts[0]) == expected[0]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("gemma2", {"query_pre_attn_scalar": 8}), ("mamba", {"state_size": 4}), ("bloom", {"n_layer": 2, "n_head": 4})],
)
def test_another_base_is_an_error_before_the_first_request_and_is_left_as_it_was(
    kind: str, fields: dict[str, Any]
) -> None:
    base = make_base(kind, **fields)
    before = base.model.config._attn_implementation
    with pytest.raises(BaseModelError, match="cannot be served"):
        PackedForward(base, None)
    assert base.model.config._attn_implementation == before
