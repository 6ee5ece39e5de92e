"""Generation side by side: rows of one batch, each with its own adapter, prompt, length and end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lora_kit as lk
from lora_kit.errors import AdapterError, ConfigError, DataError, UnknownAdapterError
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import _RowStreamer, generate
from lora_kit.generation.prompts import find_separator
from lora_kit.models.loading import Base
from tests.support import texts, tiny
from tests.support.random_adapters import made
from tests.support.sequences import both

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(model=tiny.llama(), tokenizer=texts.tokenizer(), name="tiny")


def test_a_row_writes_what_its_adapter_writes_alone(base: Base) -> None:
    rows: list[lk.Adapter | None] = [made(base, seed=1), None, made(base, seed=2, separator=" -> "), made(base, seed=3)]
    together = generate(base, rows, "one two", sampling=SHORT)
    alone = [generate(base, [row], "one two", sampling=SHORT)[0] for row in rows]
    assert [row.text for row in together] == [row.text for row in alone]
    assert len({row.text for row in together}) > 1
    assert together[1].name == "base"


def test_the_base_row_writes_what_transformers_writes(base: Base) -> None:
    ids = torch.tensor([base.tokenizer("one two")["input_ids"]])
    expected = base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    found = generate(base, [None, made(base, seed=1)], "one two", sampling=SHORT)[0]
    assert found.text == base.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_prompts_are_put_as_in_training(base: Base) -> None:
    rows = [made(base, seed=1, separator="\n=> "), made(base, seed=2, separator=""), made(base, seed=3), None]
    assert [row.prompt for row in generate(base, rows, "ask", sampling=SHORT)] == ["ask\n=> ", "ask", "ask", "ask\n=> "]
    raw = generate(base, rows, "ask", sampling=SHORT, template="raw")
    assert [row.prompt for row in raw] == ["ask"] * 4
    assert generate(base, [None], "ask", sampling=SHORT)[0].prompt == "ask"


def test_a_record_without_a_separator_means_the_default_one(base: Base) -> None:
    adapter = made(base, seed=1)
    with_recipe = lk.Adapter(adapter.config, adapter.tensors, record={"recipe": {"data": "rows.jsonl"}})
    assert find_separator(with_recipe) == "\n"
    assert find_separator(adapter) == ""
    assert find_separator(lk.Adapter(adapter.config, adapter.tensors, record={"recipe": "nonsense"})) == ""


def test_a_row_stops_at_its_end_of_text(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.tensor([base.tokenizer("one")["input_ids"]])
    ids = base.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = ids[4]
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", end)
    stopped, other = generate(base, [None, made(base, seed=1)], "one", sampling=SHORT)
    assert (stopped.ended, stopped.tokens) == ("eos", ids.index(end) + 1)
    assert stopped.text == base.tokenizer.decode(ids[: ids.index(end) + 1], skip_special_tokens=True)
    assert other == generate(base, [made(base, seed=1)], "one", sampling=SHORT)[0]
    assert other.tokens != stopped.tokens


def test_text_grows_to_the_result(base: Base) -> None:
    seen: dict[int, list[str]] = {}
    rows = [None, made(base, seed=1)]
    found = generate(base, rows, "one", sampling=SHORT, on_text=lambda row, text: seen.setdefault(row, []).append(text))
    for row, result in enumerate(found):
        assert seen[row][-1] == result.text
        assert all(later.startswith(earlier) for earlier, later in zip(seen[row], seen[row][1:], strict=False))
        assert len(seen[row]) > 1


def test_a_token_costs_the_same_however_long_the_answer_is(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = type(base.tokenizer).decode

    def count(self: object, token_ids: list[int], **options: object) -> str:
        decoded.append(len(token_ids))
        return decode(self, token_ids, **options)

    monkeypatch.setattr(type(base.tokenizer), "decode", count)
    found = generate(base, [None], "one", sampling=Sampling(max_new_tokens=40), on_text=lambda *_: None)
    assert found[0].tokens == 40
    assert decoded.pop() == 40  # of the result
    assert max(decoded) < 20


@pytest.mark.parametrize("cut", [0, 1])
def test_a_character_of_several_tokens_is_reported_whole(cut: int) -> None:
    base = lk.load_base("kit-base")
    seen: list[str] = []
    streamer = _RowStreamer(base, [frozenset()], on_text=lambda _, text: seen.append(text))
    ids = base.tokenizer("a 🦊", add_special_tokens=False)["input_ids"]
    shown = ids[: len(ids) - cut]
    for value in (torch.tensor([ids]), *(torch.tensor([token]) for token in shown)):
        streamer.put(value)
    before = list(seen)
    streamer.end()
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in before)
    assert seen[-1] == base.tokenizer.decode(shown)


def test_sampling_repeats_with_its_seed_and_leaves_the_generator_alone(base: Base) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=5.0, seed=3)
    before = torch.get_rng_state()
    one, two = (generate(base, [None, made(base, seed=1)], "one", sampling=sampling) for _ in range(2))
    other = generate(base, [None], "one", sampling=Sampling(max_new_tokens=8, temperature=5.0, seed=4))
    assert [row.text for row in one] == [row.text for row in two]
    assert other[0].text != one[0].text
    torch.manual_seed(1)  # `made` seeds the generator; from here on nothing may move it
    before = torch.get_rng_state()
    generate(base, [None], "one", sampling=sampling)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loaded_base_is_left_as_it_was(base: Base) -> None:
    adapter = made(base, seed=1)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    generate(base, [adapter, adapter, None], "one", sampling=SHORT)
    assert base.model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    wrong = made(Base(model=tiny.gpt2(), tokenizer=base.tokenizer, name="other"), seed=1)
    with pytest.raises(AdapterError):
        generate(base, [wrong], "one", sampling=SHORT)
    assert base.model.state_dict().keys() == before.keys()


def test_writing_ends_where_the_context_does(base: Base) -> None:
    found = generate(base, [None], "a" * 60, sampling=Sampling(max_new_tokens=20))[0]
    assert found.tokens <= 4
    assert found.ended in ("context", "eos")
    with pytest.raises(DataError, match="64"):
        generate(base, [None], "a" * 64, sampling=SHORT)


@pytest.mark.parametrize("prompt", ["", " \n", "\udc80"], ids=["empty", "blank", "not UTF-8"])
def test_a_prompt_without_text_is_refused(base: Base, prompt: str) -> None:
    with pytest.raises(DataError):
        generate(base, [None], prompt, sampling=SHORT)


def test_no_rows_are_refused(base: Base) -> None:
    with pytest.raises(ConfigError):
        generate(base, [], "one")


def test_an_unknown_adapter_is_an_error_and_never_the_base(base: Base, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError, match="nobody"):
        generate(base, ["nobody"], "one", store=tmp_path)


def test_an_adapter_that_writes_no_text_is_refused(base: Base) -> None:
    with pytest.raises(AdapterError, match="is for task classify, which predicts labels of texts, and writes none"):
        generate(base, [made(base, seed=1, task_type="SEQ_CLS")], "one")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_adapters_are_labeled_by_folder_and_told_apart(base: Base, tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "sql", tmp_path / "b" / "sql"
    made(base, seed=1).save(one)
    made(base, seed=2).save(two)
    found = generate(base, [one, one, None], "one", sampling=SHORT)
    assert [row.name for row in found] == ["sql", "sql", "base"]
    assert found[0].text == found[1].text
    names = [row.name for row in generate(base, [one, two], "one", sampling=SHORT)]
    assert len(set(names)) == 2
    assert all(name.startswith("sql@") for name in names)


def test_kit_base_answers_by_name(tmp_path: Path) -> None:
    found = generate("kit-base", [None], "Once upon a time", sampling=Sampling(max_new_tokens=5))
    assert found[0].tokens == 5 or found[0].ended == "eos"


def test_an_encoder_and_decoder_answers_by_its_folder(tmp_path: Path) -> None:
    model = both("bart")
    model.model.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    adapter = made(model, seed=1, separator="", task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"])
    seen: list[str] = []
    rows = [None, adapter]
    found = generate(str(tmp_path / "base"), rows, "one", sampling=SHORT, on_text=lambda row, text: seen.append(text))
    for row, result in zip(rows, found, strict=True):
        assert result == generate(model, [row], "one", sampling=SHORT)[0]
        assert result.prompt == "one"
    assert {row.text for row in found} <= set(seen)
    assert found[0].text != found[1].text
    ids = model.tokenizer("one", return_tensors="pt")["input_ids"]
    alone = model.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0]
    assert generate(str(tmp_path / "base"), [None], "one", sampling=SHORT)[0].text == model.tokenizer.decode(
        alone, skip_special_tokens=True
    )
    with pytest.raises(AdapterError, match="different tasks"):
        generate(model, [adapter, made(model, seed=2, task_type="CAUSAL_LM", target_modules=["q_proj"])], "one")
