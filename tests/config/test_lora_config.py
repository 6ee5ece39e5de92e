"""Configs of others: what is wrong is refused before anything is allocated, what is only unknown is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import time
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG
from lora_kit.config.lora_config import LoraConfig
from lora_kit.config.module_patterns import matches
from lora_kit.errors import AdapterError, ConfigError, LoraKitError
from tests.support import folders, tiny

SLOW = r"(.|\w)*[^_a-z]"
"""Takes for ever on any path of a layer."""

PEFT_0_10 = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    ]
)
"""Fields of LoraConfig in PEFT 0.10, which fails on any other."""


def refused(folder: Path) -> LoraKitError:
    """The error that loading raises: typed, of what was given, naming the folder, in a few words."""
    with pytest.raises(LoraKitError) as caught:
        lk.Adapter.load(folder)
    error = caught.value
    assert isinstance(error, ConfigError | AdapterError)
    assert error.exit_code == 2
    assert folder.name in str(error)
    assert len(str(error)) < 2_000
    return error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "line 1 column 1"),
        (b'{"r": 8,\n "lora_alpha"', "line 2 column"),
        (b"[1, 2]", "object was expected, found list"),
        (b"null", "object was expected, found NoneType"),
        (b'{"r": "\xff\xfe"}', "not UTF-8 at line 1 column 8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x": ' + b'{"a":' * 300 + b"1" + b"}" * 301, "nested more than"),
        (b'{"x": "' + b"a" * 2**20 + b'"}', "at most 1,048,576 are expected"),
        (b'{"r": 8, "r": 16}', "'r' occurs twice"),
        (b'{"r": 8, "lora_alpha": NaN}', "NaN is not a number"),
        (b'{"r": 8, "note": [-Infinity]}', "-Infinity is not a number"),
        (b'{"r": 8, "lora_alpha": 1e999}', "too large"),
        (b'{"r": ' + b"9" * 5_000 + b"}", "a number of 5,000 digits"),
        (b'\x00{"r": 8}', "line 1 column 1"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_config_that_is_no_sound_json_object_is_refused_with_the_place(
    tmp_path: Path, text: bytes, told: str
) -> None:
    folder = folders.foreign(tmp_path / "broken")
    (folder / CONFIG).write_bytes(text)
    assert told in str(refused(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", value) for value in (0, -4, 3_000_000, 10**30, "8", 8.5, 8.0, True, None, [8], {})),
        *(("lora_alpha", value) for value in (0, "16", True, None, 1e300, [16])),
        *(("lora_dropout", value) for value in (-0.1, 1, 1.5, "0", True)),
        *(("target_modules", value) for value in (5, [1], [""], {"q_proj": 1}, [["q_proj"]], True)),
        *(("target_modules", value) for value in ("(", "(?R)", "(?P<x>.)(?P<x>.)", "a{99999999999}", "[z-a]", "*")),
        *(("target_modules", value) for value in ("(" * 5_000 + ")" * 5_000, "a" * 20_000)),
        *(("modules_to_save", value) for value in (3, [None], [""])),
        *(("layers_to_transform", value) for value in (-1, "0", [True], [0.0], [-2], True)),
        *(("rank_pattern", value) for value in ([1], "x", {"q_proj": 0}, {"q_proj": True}, {"q_proj": "4"}, {"(": 4})),
        *(("rank_pattern", value) for value in ({"q_proj": 10**9}, {f"a{i}*": 1 for i in range(2_000)})),
        *(("alpha_pattern", value) for value in ({"q_proj": 0}, {"q_proj": True}, {"q_proj": None}, {"(": 4})),
        *(("init_lora_weights", value) for value in (1, "pissa", "olora", "nonsense", [])),
        *((flag, 1) for flag in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode")),
        *((label, 7) for label in ("base_model_name_or_path", "revision", "task_type")),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    error = refused(folders.foreign(tmp_path / "broken", **{field: value}))
    assert field in str(error) or "regular expression" in str(error) or "pattern" in str(error)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 10**400, 1 << 20_000],
    ids=["nan", "inf", "-inf", "400 digits", "20,000 bits"],
)
def test_numbers_that_are_not_finite_are_refused_from_python_too(value: float) -> None:
    for fields in ({"lora_alpha": value}, {"r": value}, {"lora_dropout": value}, {"alpha_pattern": {"q_proj": value}}):
        with pytest.raises(ConfigError):
            LoraConfig(**fields)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PREFIX_TUNING", "lora", 5, ["LORA"], None])
def test_another_kind_of_adapter_is_refused_by_what_it_is(tmp_path: Path, kind: Any) -> None:
    error = refused(folders.foreign(tmp_path / "other", peft_type=kind))
    assert repr(kind) in str(error)
    assert error.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 2]]),
        ("lora_bias", True),
        ("bias", "all"),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
    ],
)
def test_a_field_that_would_change_the_arithmetic_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    assert field in str(refused(folders.foreign(tmp_path / "other", **{field: value})))


def test_fields_that_name_code_are_said_and_never_acted_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('it ran')")
    mapping = {"base_model_class": "Trap", "parent_library": "trap"}
    folder = folders.foreign(tmp_path / "x", auto_mapping=mapping, megatron_config={"a": 1}, megatron_core="trap")
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        config = lk.Adapter.load(folder).config
    assert "auto_mapping, megatron_config, megatron_core" in caplog.text
    assert config.to_dict()["auto_mapping"] == mapping


def test_unknown_fields_are_warned_about_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folders.foreign(tmp_path / "x", from_the_future={"a": [1, None, "ä"]}, **{"steer\x1b[31m": 1})
    adapter = lk.Adapter.load(folder)
    assert "from_the_future" in caplog.text
    assert "steer" in caplog.text
    assert "\x1b" not in caplog.text
    adapter.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert again["from_the_future"] == {"a": [1, None, "ä"]}
    assert lk.Adapter.load(tmp_path / "again").config == adapter.config


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*a){200}", "((a*)*)*b", SLOW, "(?:(?:a{1000}){1000}){1000}", "(" * 60 + "a" + ")+" * 60],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_for_ever_is_bounded_in_time(tmp_path: Path, field: str, pattern: str) -> None:
    began = time.process_time()
    values = {"target_modules": ["q_proj"], field: {pattern: 4} if field.endswith("_pattern") else pattern}
    with contextlib.suppress(ConfigError):
        config = LoraConfig.from_dict(values)
        for name in [f"{'a' * 300}{number}!" for number in range(40)]:
            config.rank_of(name)
            config.alpha_of(name)
            for expression in (config.target_modules, config.exclude_modules):
                if isinstance(expression, str):
                    matches(expression, name)
    assert time.process_time() - began < 5


def test_a_pattern_that_is_a_little_slow_every_time_is_refused_in_the_end() -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="takes too long"):
        any(matches(r"(.|\w)*[^a-z\d]", "a" * 14 + str(number)) for number in range(1_000, 10_000))
    assert time.process_time() - began < 20


def test_a_bank_refuses_a_pattern_that_backtracks_and_is_as_it_was() -> None:
    model = tiny.llama()
    bank, keys = lk.attach(model, slots=2), set(model.state_dict())
    with pytest.raises(ConfigError, match="takes too long"):
        lk.attach(tiny.llama(), LoraConfig(target_modules=SLOW))
    with pytest.raises(ConfigError, match="takes too long"):
        bank.load("x", lk.Adapter(folders.config(exclude_modules=SLOW), folders.tensors()))
    assert bank.names == ()
    assert set(model.state_dict()) == keys


@given(st.text(max_size=30), st.text(alphabet="ab.()|*+?[]{}^$\\1,", max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_pattern_is_matched_or_refused(text: str, pattern: str) -> None:
    with contextlib.suppress(ConfigError):
        assert matches(pattern, text) in (True, False)


def test_the_first_pattern_that_matches_wins_be_it_a_name_or_an_expression() -> None:
    config = LoraConfig(r=1, rank_pattern={"b": 2, r"a\..*": 3, "a.b": 4, "b.c": 5, "c": 6})
    ranks = {path: config.rank_of(path) for path in ("b", "x.b", "a.b", "a.x", "b.c", "x.c", "bb", "cc", "a")}
    assert ranks == {"b": 2, "x.b": 2, "a.b": 2, "a.x": 3, "b.c": 5, "x.c": 6, "bb": 1, "cc": 1, "a": 1}


def test_one_pattern_for_every_module_is_looked_up_quickly() -> None:
    paths = [
        f"model.layers.{layer}.{name}" for layer in range(500) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    config = LoraConfig(rank_pattern={path: number % 7 + 1 for number, path in enumerate(paths)})
    began = time.process_time()
    assert [config.rank_of(path) for path in paths] == [number % 7 + 1 for number in range(len(paths))]
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "name",
    ["https://example.invalid/x", "/etc/passwd", "../../secret", "a\nb\x1b[2J", "x" * 5_000, "наме", "`$(id)`|"],
)
def test_the_name_of_a_base_is_a_label_shown_escaped(tmp_path: Path, name: str) -> None:
    adapter = lk.Adapter.load(folders.foreign(tmp_path / "x", base_model_name_or_path=name))
    adapter.save(tmp_path / "again")
    assert lk.Adapter.load(tmp_path / "again").config.base_model_name_or_path == name
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in card.splitlines())
    assert "\n\x1b" not in card
    assert adapter.base is None


def test_a_config_of_today_has_only_fields_of_peft_0_10() -> None:
    assert set(LoraConfig(r=4).to_dict()) <= PEFT_0_10
    of_peft = LoraConfig.of(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert set(of_peft.to_dict()) <= PEFT_0_10
    assert LoraConfig.from_dict(of_peft.to_dict()) == of_peft
    telling = LoraConfig(r=4, exclude_modules=("q_proj",), trainable_token_indices=(3,))
    assert set(telling.to_dict()) - PEFT_0_10 == {"exclude_modules", "trainable_token_indices"}


@pytest.mark.parametrize("name", ["mood", "pirate", "scene"])
def test_leaving_fields_out_changes_no_identity(name: str) -> None:
    adapter = lk.Adapter.load(Path(__file__).parents[2] / "adapters" / name)
    assert adapter.digest == adapter.record["digest"]
    assert lk.Adapter(LoraConfig.from_dict(adapter.config.to_dict()), adapter.tensors).digest == adapter.digest


def test_a_config_survives_pickle_and_json() -> None:
    config = LoraConfig(rank_pattern={"a": 2, r"b\d": 3}, alpha_pattern={"a": 1.5}, modules_to_save=("score",))
    assert config.rank_of("x.a") == 2
    assert pickle.loads(pickle.dumps(config)) == config == LoraConfig.from_json(config.to_json())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*folders.config().to_dict(), "trainable_token_indices", "extra", "from_the_future", "auto_mapping"]
)


@given(st.dictionaries(FIELDS, JSON, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_config_is_read_or_refused_and_what_is_read_is_written_alike(fields: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        config = LoraConfig.from_json(json.dumps({"target_modules": ["q_proj"], **fields}))
        assert LoraConfig.from_json(config.to_json()) == config
