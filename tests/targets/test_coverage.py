"""Which modules a config covers, and how many parameters that makes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_kit as lk
from lora_kit.errors import ConfigError, TargetError
from lora_kit.models.heads import find_head_modules
from lora_kit.targets.coverage import find_coverage, find_shortest_names
from tests.support import tiny

# transformers 5 calls ViT's projections as everybody else does.
RENAMED = {"ViTForImageClassification": {"query": "q_proj", "value": "v_proj"}}
COUNTS = json.loads((Path(__file__).parent / "counts.json").read_text())["rows"]


def paths(model: nn.Module, **fields: Any) -> list[str]:
    return [target.path for target in find_coverage(model, lk.LoraConfig(**fields)).targets]


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"{row['model']}-{'-'.join(row['targets'])}")
def test_published_parameter_counts_are_reproduced(row: dict[str, Any]) -> None:
    config_class = getattr(transformers, row["class"]).config_class
    with torch.device("meta"):
        model = getattr(transformers, row["class"])(config_class(**row["config"]))
    if "all" in row:
        assert sum(p.numel() for p in model.parameters()) + row["trainable"] == row["all"]
    targets = [RENAMED.get(row["class"], {}).get(name, name) for name in row["targets"]]
    saved = row.get("modules_to_save", ())
    dora = row.get("use_dora", False)
    config = lk.LoraConfig(r=row["r"], target_modules=targets, modules_to_save=saved, use_dora=dora)
    assert find_coverage(model, config).parameters == row["trainable"]


def test_all_linear_leaves_the_output_head_alone() -> None:
    covered = paths(tiny.llama())
    assert len(covered) == 14
    assert not any("lm_head" in path or "embed" in path for path in covered)
    assert not any(path.startswith("classifier") for path in paths(tiny.bert()))


HEADS = {
    "deberta": (
        transformers.DebertaV2ForSequenceClassification,
        transformers.DebertaV2Config,
        ("classifier", "pooler"),
    ),
    "xlnet": (
        transformers.XLNetForSequenceClassification,
        transformers.XLNetConfig,
        ("logits_proj", "sequence_summary"),
    ),
}
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("family", HEADS)
def test_all_linear_and_feature_extraction_agree_on_what_a_head_is(family: str) -> None:
    model_class, config_class, head = HEADS[family]
    small = {"d_model": 32, "n_head": 4, "n_layer": 1, "d_inner": 48, "vocab_size": 96} if family == "xlnet" else SMALL
    model = model_class(config_class(**small))
    assert sorted(find_head_modules(model, "classify")) == sorted(head)
    covered = paths(model)
    assert covered
    assert not [path for path in covered if path.split(".")[0] in head]


def test_names_match_whole_path_components() -> None:
    assert paths(tiny.llama(), target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert paths(tiny.llama(), target_modules=["self_attn.q_proj"]) == paths(tiny.llama(), target_modules=["q_proj"])
    with pytest.raises(TargetError, match="nothing in the model matches proj"):
        find_coverage(tiny.llama(), lk.LoraConfig(target_modules=["proj"]))


def test_a_string_is_a_regular_expression_over_whole_paths() -> None:
    assert len(paths(tiny.llama(), target_modules=r".*\.(q|v)_proj")) == 4
    with pytest.raises(TargetError):
        find_coverage(tiny.llama(), lk.LoraConfig(target_modules=r"(q|v)_proj"))


def test_exclusion_and_layer_choice_narrow_the_match() -> None:
    model = tiny.llama()
    assert paths(model, target_modules=["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert paths(model, target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers") == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert not any("mlp" in path for path in paths(model, exclude_modules=r".*mlp.*"))
    assert not any("down_proj" in path for path in paths(model, exclude_modules=["down_proj"]))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_modules": ["q_proj", "FAKE"]}, "FAKE"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"modules_to_save": ["score"]}, "score"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 9]}, "layers_to_transform=9"),
        ({"target_modules": ["input_layernorm"]}, "LlamaRMSNorm"),
        ({"target_modules": "nothing"}, "nothing"),
    ],
)
def test_what_matches_nothing_is_an_error_that_names_it(fields: dict[str, Any], told: str) -> None:
    model = tiny.llama()
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=told):
        lk.attach(model, lk.LoraConfig(**fields))
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pattern_that_backtracks_for_ever_is_refused_in_bounded_time() -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match="too long"):
        find_coverage(tiny.llama(), lk.LoraConfig(target_modules=r"(?:.|[a-z]|\w)*(?<=\d)"))
    assert time.process_time() - started < 5


def test_patterns_set_rank_and_alpha_by_layer() -> None:
    config = lk.LoraConfig(r=4, rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 6}, alpha_pattern={"q_proj": 32})
    ranks = {target.path: (target.rank, target.scaling) for target in find_coverage(tiny.llama(), config).targets}
    assert ranks["model.layers.0.self_attn.q_proj"] == (2, 16.0)
    assert ranks["model.layers.0.self_attn.v_proj"] == (4, 2.0)
    assert ranks["model.layers.1.self_attn.v_proj"][0] == 6


def test_attention_that_reads_weights_past_a_wrapper_is_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(TargetError, match="MultiheadAttention"):
        find_coverage(model, lk.LoraConfig(target_modules=["out_proj"]))
    assert not any("self_attn" in path for path in paths(model))


def test_the_saved_names_select_exactly_what_was_covered() -> None:
    model = tiny.llama()
    assert find_shortest_names(model, find_coverage(model, lk.LoraConfig())) == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )
    part = find_coverage(model, lk.LoraConfig(layers_to_transform=[1]))
    assert paths(model, target_modules=find_shortest_names(model, part)) == [target.path for target in part.targets]


def test_the_report_says_what_was_found() -> None:
    report = str(find_coverage(tiny.bert(), lk.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])))
    assert "query: 2 layers, rank 8" in report
    assert "classifier: saved in full" in report


def test_a_path_that_is_the_end_of_others_is_saved_as_an_expression(tmp_path: Path) -> None:
    def make_model() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"proj": nn.Identity(), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
        return nn.ModuleDict({"inner": inner, "proj": nn.Linear(4, 4)})

    bank = lk.attach(make_model(), lk.LoraConfig(r=2, target_modules="all-linear"), name="a")
    covered = [target.path for target in bank.coverage("a").targets]
    assert covered == ["inner.layers.0", "inner.layers.1", "inner.layers.2", "proj"]
    bank.save("a", tmp_path / "a")
    again = lk.attach(make_model())
    again.load("a", tmp_path / "a")
    assert [target.path for target in again.coverage("a").targets] == covered
    theirs = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "a"))
    assert sum(hasattr(module, "lora_A") for module in theirs.modules()) == len(covered)
