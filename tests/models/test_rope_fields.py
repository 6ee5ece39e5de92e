"""What older readers find of a config's rotary embeddings is what transformers 5 wrote."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from lora_kit.models.rope_fields import add_older_rope_fields

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3", {}, {"rope_theta": 10_000.0, "rope_scaling": None}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    ("phi", {"rope_theta": 7.0, "partial_rotary_factor": 0.25}, {"rope_theta": 7.0, "partial_rotary_factor": 0.25}),
    ("gpt_neox", {"rotary_emb_base": 20_000}, {"rotary_emb_base": 20_000, "rotary_pct": 0.25}),
    (
        "phi3",
        {"rope_theta": 5e5, "rope_scaling": LONGROPE, "original_max_position_embeddings": 2048},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}},
    ),
    (
        "gemma3_text",
        {"rope_theta": 5.0, "rope_local_base_freq": 3.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_theta": 5.0, "rope_local_base_freq": 3.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    ("modernbert", {"global_rope_theta": 7.0}, {"global_rope_theta": 7.0, "local_rope_theta": 10_000.0}),
    ("bert", {}, {}),
]


@pytest.mark.parametrize(("model_type", "fields", "older"), CASES, ids=[case[0] for case in CASES])
def test_the_older_fields_alone_say_the_same(
    model_type: str, fields: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    fields = copy.deepcopy({"max_position_embeddings": 4096, **fields})  # transformers changes what it is given
    config = transformers.AutoConfig.for_model(model_type, **fields)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    before = dict(written)
    add_older_rope_fields(written)
    assert {name: written[name] for name in older} == older
    assert {name: written[name] for name in before} == before
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert without_type(rope_of(tmp_path)) == without_type(getattr(config, "rope_parameters", None))
    alone = {name: value for name, value in written.items() if name != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(alone), encoding="utf-8")
    assert without_type(rope_of(tmp_path)) == without_type(getattr(config, "rope_parameters", None))


def rope_of(folder: Path) -> Any:
    return getattr(transformers.AutoConfig.from_pretrained(folder), "rope_parameters", None)


def without_type(rope: dict[str, Any] | None) -> dict[str, Any]:
    """Without the older name of `rope_type`, which says the same."""
    return {name: value for name, value in (rope or {}).items() if name != "type"}


def test_what_a_config_says_already_stays_and_parts_are_completed() -> None:
    rope = {"rope_type": "default", "rope_theta": 7.0}
    config: dict[str, Any] = {"rope_theta": 5.0, "rope_parameters": rope, "text_config": {"rope_parameters": rope}}
    add_older_rope_fields(config)
    assert config["rope_theta"] == 5.0
    assert config["text_config"]["rope_theta"] == 7.0
