"""From a messy file to rows that can be trained on: what is found, mended, split and written."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.data.batches import join_samples
from lora_kit.data.encode import encode
from lora_kit.data.preparation.examine import bin_lengths, find_leaks, normalize_input
from lora_kit.data.preparation.labels import choose_spellings, find_lookalikes
from lora_kit.data.preparation.prepare import Preparation, prepare
from lora_kit.data.preparation.split import choose_share, split
from lora_kit.data.preparation.training_defaults import choose_epochs, choose_learning_rate, choose_train_section
from lora_kit.data.preview import preview_sample
from lora_kit.data.rows import Rows, read_rows
from lora_kit.errors import DataError, LoraKitError, StorageError
from lora_kit.training.recipe.load import load_recipe
from tests.support import texts, tiny

PAIRS = [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(20)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny base: 64 tokens at once, one per character, no chat template."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny.llama().save_pretrained(folder)
    texts.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def rows_of(values: list[tuple[Any, ...]], format_: str = "completion") -> Rows:
    return Rows(Path("rows.jsonl"), format_, tuple(values), tuple(range(1, len(values) + 1)))


# The split


def test_the_split_does_not_depend_on_the_order_of_the_rows() -> None:
    values = [(f"ask {n}", f"say {n}") for n in range(200)]
    train, aside = split(rows_of(values), share=0.1)
    assert len(aside) == 20
    assert sorted(train + aside) == list(range(200))
    shuffled = values[:]
    random.Random(0).shuffle(shuffled)
    again = split(rows_of(shuffled), share=0.1)[1]
    assert {shuffled[place] for place in again} == {values[place] for place in aside}
    other = split(rows_of(values), share=0.1, seed=1)[1]
    assert {values[place] for place in other} != {values[place] for place in aside}


def test_rows_with_one_input_stay_on_one_side() -> None:
    values = [(f"Ask  {n}" if n % 2 else f"ask {n // 2 * 2 + 1}", f"say {n}") for n in range(100)]
    rows = rows_of(values)
    train, aside = split(rows, share=0.2)
    assert len(aside) == 20
    assert not find_leaks(rows.only(train), rows.only(aside))
    assert len({normalize_input(rows, values[place]) for place in aside}) == 10


def test_every_label_is_trained_on_and_gives_its_share() -> None:
    values = [(f"text {n}", "often") for n in range(80)] + [(f"more {n}", "rare") for n in range(19)] + [("x", "once")]
    rows = rows_of(values, "label")
    train, aside = split(rows, share=0.1)
    counted = [values[place][1] for place in aside]
    assert (counted.count("often"), counted.count("rare"), counted.count("once")) == (8, 2, 0)
    assert {values[place][1] for place in train} == {"often", "rare", "once"}


def test_a_text_with_two_labels_is_trained_on() -> None:
    values = [("same", "yes"), ("Same", "no"), *((f"text {n}", "yes") for n in range(9))]
    for seed in range(20):
        assert not {0, 1} & set(split(rows_of(values, "label"), share=0.5, seed=seed)[1])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_small_file_gives_one_row_and_keeps_one(count: int) -> None:
    train, aside = split(rows_of([(f"ask {n}", "x") for n in range(count)]), share=0.01)
    assert (len(train), len(aside)) == (count - 1, 1)
    train, aside = split(rows_of([(f"ask {n}", "x") for n in range(count)]), share=0.99)
    assert train
    assert aside


def test_rows_with_one_and_the_same_input_cannot_be_split() -> None:
    with pytest.raises(DataError, match="no row can be set aside"):
        split(rows_of([("tell me", f"story {n}") for n in range(9)]), share=0.5)


# What is found


def test_everything_that_is_wrong_is_found_by_line(here: Path, base: str) -> None:
    rows: list[Any] = [
        *PAIRS,
        {"prompt": "ask 3", "completion": "say 3"},
        {"prompt": "ask", "completion": " "},
        {"prompt": 3, "completion": "x"},
        {"prompt": "a", "completion": "b" * 80},
        {"prompt": "a" * 80, "completion": "b", "id": 1},
    ]
    found = prepare(texts.write(here / "rows.jsonl", rows), base=base)
    part = found.parts[0]
    assert part.examined.duplicates == {21: 4}
    assert [(fault.line, fault.kind) for fault in part.examined.faults] == [(22, "empty"), (23, "bad"), (24, "long")]
    assert part.examined.measured.cut == (25,)
    assert part.examined.unused == ("id",)
    assert part.examined.total == 25
    assert found.files == {}
    assert sorted(path.name for path in here.iterdir()) == ["rows.jsonl"]
    assert part.to_json()["tokens"]["longest"] == 83
    learned = part.examined.measured.encoded
    assert part.examined.learned == learned.num_labels / len(learned.ids)


def test_leaks_and_conflicts_are_found_whatever_the_case(here: Path, base: str) -> None:
    train = texts.write(here / "a.jsonl", [{"text": t, "label": n} for t, n in (("One", 0), ("two", 1), ("one ", 1))])
    valid = texts.write(here / "b.jsonl", [{"text": "TWO", "label": 1}, {"text": "six", "label": 0}])
    found = prepare(train, here / "out", validation=valid, base=base)
    assert found.parts[0].leaks == {2: 1}
    assert found.parts[0].examined.conflicts == {3: 1}
    assert [row["text"] for row in lines(here / "out" / "train.jsonl")] == ["One", "two", "one "]
    found = prepare(train, here / "out", validation=valid, base=base, drop=["leaks"], replace=True)
    assert [row["text"] for row in lines(here / "out" / "train.jsonl")] == ["One", "one "]
    assert [row["text"] for row in lines(here / "out" / "validation.jsonl")] == ["TWO", "six"]
    assert found.parts[0].dropped == {"leaks": [2]}


def test_conflicts_are_left_out_with_the_rows_they_contradict(here: Path, base: str) -> None:
    rows = [
        {"text": t, "label": n} for t, n in (("One", 0), ("two", 1), ("one ", 1), ("ONE", 0), ("six", 0), ("ten", 1))
    ]
    train = texts.write(here / "a.jsonl", rows)
    found = prepare(train, here / "out", base=base, share=0, drop=["conflicts"])
    assert found.parts[0].dropped == {"conflicts": [1, 3, 4]}
    assert [row["text"] for row in lines(here / "out" / "train.jsonl")] == ["two", "six", "ten"]


def test_a_misspelt_label_is_told_and_put_right(here: Path, base: str) -> None:
    rows = [{"text": f"text {n}", "label": ("positive", "negative")[n % 2]} for n in range(60)]
    train = texts.write(here / "a.jsonl", [*rows, {"text": "good", "label": "Postive"}])
    found = prepare(train, base=base).parts[0].examined
    assert found.lookalikes == {"Postive": "positive"}
    found = prepare(train, here / "out", base=base, share=0, relabel={"Postive": "positive"}).parts[0].examined
    assert found.labels == {"positive": 31, "negative": 30}
    assert lines(here / "out" / "train.jsonl")[-1]["label"] == "positive"
    valid = texts.write(here / "b.jsonl", [{"text": "bad", "label": "negatve"}])
    both = {"Postive": "positive", "negatve": "negative"}
    rows[0]["label"] = "negatve"
    train = texts.write(here / "c.jsonl", [*rows, {"text": "good", "label": "Postive"}])
    found_both = prepare(train, here / "both", validation=valid, base=base, relabel=both)
    assert [part.examined.faults for part in found_both.parts] == [(), ()]
    assert json.loads((here / "out" / "manifest.json").read_text())["settings"]["relabel"] == {"Postive": "positive"}


def test_numbers_are_relabeled_as_numbers_and_are_not_taken_for_misspelt(here: Path, base: str) -> None:
    rows = [{"text": f"text {n}", "label": n % 2 + 10} for n in range(60)]
    train = texts.write(here / "a.jsonl", [*rows, {"text": "good", "label": 12}])
    assert prepare(train, base=base).parts[0].examined.lookalikes == {}
    prepare(train, here / "out", base=base, share=0, relabel={"12": "11"})
    assert lines(here / "out" / "train.jsonl")[-1]["label"] == 11
    with pytest.raises(DataError, match="has no label 'postive' to rename"):
        prepare(train, base=base, relabel={"postive": "positive"})


def test_a_label_that_is_not_trained_on_is_a_fault_of_the_validation(here: Path, base: str) -> None:
    train = texts.write(here / "a.jsonl", [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}])
    valid = texts.write(here / "b.jsonl", [{"text": "six", "label": "z"}, {"text": "ten", "label": "x"}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: label 'z' is not one of .*--drop bad"):
        prepare(train, here / "out", validation=valid, base=base)
    assert prepare(train, here / "out", validation=valid, base=base, drop=["bad"]).parts[1].dropped == {"bad": [1]}


def test_a_histogram_counts_every_length_once() -> None:
    assert bin_lengths([1, 16, 17, 32, 33, 200]) == [(1, 16, 2), (17, 32, 2), (33, 64, 1), (65, 128, 0), (129, 256, 1)]
    assert bin_lengths([]) == []


# What is written


def test_nothing_is_written_while_rows_are_wrong(here: Path, base: str) -> None:
    file = texts.write(here / "rows.jsonl", [*PAIRS, {"prompt": "ask", "completion": ""}])
    with pytest.raises(DataError, match=r"rows\.jsonl:21: completion is empty .*--drop empty"):
        prepare(file, here / "out", base=base)
    assert not (here / "out").exists()
    found = prepare(file, here / "out", base=base, drop=["empty"])
    assert found.parts[0].dropped == {"empty": [21]}
    assert len(found.train) + len(found.validation or ()) == 20


def test_repeats_stay_unless_they_are_dropped(here: Path, base: str) -> None:
    file = texts.write(here / "rows.jsonl", [PAIRS[0], *PAIRS])
    kept = prepare(file, here / "a", base=base, share=0)
    assert len(kept.train) == 21
    assert kept.validation is None
    assert not (here / "a" / "validation.jsonl").exists()
    prepare(file, here / "b", base=base, share=0, drop=["duplicates"])
    assert lines(here / "b" / "train.jsonl") == PAIRS


def test_the_manifest_vouches_for_every_file(here: Path, base: str) -> None:
    file = texts.write(here / "rows.jsonl", PAIRS)
    found = prepare(file, here / "out", base=base, share=0.2, seed=3)
    manifest = json.loads((here / "out" / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(found.to_json()))
    assert set(contents(here / "out")) == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        data = (here / "out" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["bytes"] == len(data)
    assert manifest["files"]["validation.jsonl"]["rows"] == 4
    assert manifest["settings"]["seed"] == 3
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_same_file_gives_the_same_bytes(here: Path, base: str) -> None:
    file = texts.write(here / "rows.jsonl", PAIRS)
    prepare(file, "out", base=base)
    first = contents(here / "out")
    prepare(file, "out", base=base, replace=True)
    assert contents(here / "out") == first


def test_an_output_that_is_there_is_replaced_only_on_request_and_only_if_it_is_ours(here: Path, base: str) -> None:
    file = texts.write(here / "rows.jsonl", PAIRS)
    prepare(file, here / "out", base=base)
    before = contents(here / "out")
    with pytest.raises(StorageError, match="exists already"):
        prepare(file, here / "out", base=base, seed=1)
    assert contents(here / "out") == before
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(StorageError, match="holds something else"):
        prepare(file, here / "mine", base=base, replace=True)


@pytest.mark.parametrize("failing", ["write_bytes", "fsync"])
def test_a_write_that_fails_leaves_what_was_there(
    here: Path, base: str, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = texts.write(here / "rows.jsonl", PAIRS)
    prepare(file, here / "out", base=base)
    before = contents(here / "out")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*(("pathlib.Path.write_bytes", fail) if failing == "write_bytes" else ("os.fsync", fail)))
        with pytest.raises(StorageError, match="No space left"):
            prepare(file, here / "out", base=base, seed=5, replace=True)
    assert contents(here / "out") == before
    assert sorted(path.name for path in here.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop": ["emtpy"]}, "did you mean 'empty'"),
        ({"share": 1.0}, "share .* below 1"),
        ({"share": -0.1}, "share .* below 1"),
        ({"max_length": 65}, "sees 64 tokens at once"),
        ({"max_length": 1}, "at least 2"),
        ({"template": "plain"}, "a chat template was given"),
        ({"rename": {"nothing": "prompt"}}, "has no nothing to rename"),
        ({"base": "nowhere/at-all/x"}, "no such folder"),
        ({"encoding": "klingon"}, "encoding 'klingon' is not known"),
    ],
)
def test_settings_that_are_wrong_write_nothing(here: Path, base: str, settings: dict[str, Any], message: str) -> None:
    file = texts.write(here / "rows.jsonl", PAIRS)
    with pytest.raises(LoraKitError, match=message):
        prepare(file, here / "out", **{"base": base, **settings})
    assert not (here / "out").exists()


def test_a_file_with_no_good_row_is_refused_with_its_lines(here: Path, base: str) -> None:
    with pytest.raises(DataError, match=r":1: text is empty"):
        prepare(texts.write(here / "rows.jsonl", [{"text": ""}]), base=base)
    (here / "rows.jsonl").write_text("\n{\n")
    with pytest.raises(DataError, match=r":2: not JSON"):
        prepare(here / "rows.jsonl", base=base)


# From any layout to a recipe


CHAT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}


def prepared(here: Path, base: str, rows: list[Any]) -> Preparation:
    return prepare(texts.write(here / "rows.jsonl", rows), "out", base=base, share=0.5)


@pytest.mark.parametrize(
    ("rows", "written", "task"),
    [
        (PAIRS[:2], PAIRS[0], "causal-lm"),
        (
            [{"instruction": "add", "input": n, "output": "3"} for n in ("a", "b")],
            {"prompt": "add\n\na", "completion": "3"},
            "causal-lm",
        ),
        (
            [CHAT, {"conversations": [{"from": "human", "value": "ho"}, CHAT["conversations"][1]]}],
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
            "causal-lm",
        ),
        ([{"text": t, "label": n} for t, n in (("a", 1), ("b", 0), ("c", 1))], {"text": "a", "label": 1}, "classify"),
        ([{"text": "ä b"}, {"text": "c d"}], {"text": "ä b"}, "causal-lm"),
    ],
)
def test_what_is_written_can_be_trained_on(
    here: Path, base: str, rows: list[Any], written: dict[str, Any], task: str
) -> None:
    found = prepared(here, base, rows)
    assert found.recipe is not None
    recipe = load_recipe(found.recipe)
    assert (recipe.base, recipe.task, recipe.out) == (base, task, "adapters/out")
    assert written in [*lines(Path(recipe.data.train)), *lines(Path(recipe.data.validation or ""))]
    assert recipe.data.chat_template == ("plain" if "conversations" in rows[0] else None)
    report = lk.train(recipe, overrides={"train.max_steps": 1, "lora.r": 2, "train.report_to": "none"})
    assert report.after is not None
    record = lk.Adapter.load(report.out).record["recipe"]["data"]
    assert ("Assistant:" in (record["chat_template"] or "")) == ("conversations" in rows[0])
    assert (report.out / "chat_template.jinja").exists() == ("conversations" in rows[0])


# The preview


def test_a_preview_shows_the_sample_and_where_the_loss_is(here: Path) -> None:
    tokenizer = texts.tokenizer()
    rows = read_rows(texts.write(here / "rows.jsonl", [{"prompt": "ab", "completion": "cd"}]))
    found = preview_sample(tokenizer, encode(rows, tokenizer, max_length=9), 0)
    assert [(span.text.replace(" ", ""), span.tokens, span.learned) for span in found] == [
        ("ab\n", 3, False),
        ("cd</s>", 3, True),
    ]


def test_a_label_shows_no_learned_token() -> None:
    samples = join_samples([([4, 5], [1])], kind="label")
    assert [(span.tokens, span.learned) for span in preview_sample(texts.tokenizer(), samples, 0)] == [(2, False)]


# Labels that are one label


def test_swapped_letters_are_one_slip() -> None:
    assert find_lookalikes({"refund": 40, "refnud": 1, "card": 30, "cadr": 1}) == {"refnud": "refund", "cadr": "card"}
    assert find_lookalikes({"refund": 40, "dnufer": 1, "abcd": 40, "badc": 1}) == {}


def test_labels_that_differ_in_case_or_blanks_are_renamed_together(here: Path, base: str) -> None:
    spellings = ["refund"] * 4 + ["Refund", "refund ", "REFUND"] + ["card lost"] * 3 + ["card_lost", "Card  Lost"]
    train = texts.write(here / "a.jsonl", [{"text": f"t{n}", "label": label} for n, label in enumerate(spellings)])
    valid = texts.write(here / "b.jsonl", [{"text": "v1", "label": "ReFund"}, {"text": "v2", "label": "card lost"}])
    expected = {
        "Refund": "refund", "refund ": "refund", "REFUND": "refund", "card_lost": "card lost",
        "Card  Lost": "card lost",
    }  # fmt: skip
    assert prepare(train, base=base).parts[0].examined.variants == expected
    found = prepare(train, here / "out", base=base, validation=valid, relabel="auto")
    assert found.parts[0].examined.labels == {"refund": 7, "card lost": 5}
    assert found.parts[0].examined.relabeled == expected
    assert found.parts[1].examined.relabeled == {"ReFund": "refund"}
    assert [row["label"] for row in lines(here / "out" / "validation.jsonl")] == ["refund", "card lost"]
    assert json.loads((here / "out" / "manifest.json").read_text())["sources"][0]["relabeled"] == expected
    with pytest.raises(DataError, match="relabel 'all' is not known"):
        prepare(train, base=base, relabel="all")


def test_labels_of_one_row_each_are_the_reason_why_nothing_is_set_aside(here: Path, base: str) -> None:
    file = texts.write(here / "rows.jsonl", [{"text": f"t{number}", "label": f"n{number}"} for number in range(30)])
    with pytest.raises(DataError, match="each of the 30 labels has one input only, and no label is set aside whole"):
        prepare(file, base=base)


@pytest.mark.parametrize(
    ("counts", "known", "expected"),
    [
        ({"refund": 40, "refnud": 1, "Refund ": 2}, (), {"refnud": "refund", "Refund ": "refund"}),
        ({"refund": 40, "refun": 2}, (), {"refun": "refund"}),
        ({"refund": 40, "Refnud": 1}, (), {"Refnud": "refund"}),
        ({"refund": 40, "refunded": 1}, (), {}),
        ({"refund": 19, "refnud": 1}, (), {}),
        ({"car": 40, "cat": 1}, (), {}),
        ({"1000": 40, "1001": 1}, (), {}),
        ({"refnud": 3, "lost": 1}, ("refund", "loss"), {"refnud": "refund"}),
        ({"cards": 1}, ("carda", "cardb"), {}),
    ],
)  # fmt: skip
def test_auto_renames_what_differs_in_case_blanks_or_one_slip(
    counts: dict[str, int], known: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert choose_spellings(counts, known=known) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(3, 0), (24, 0), (25, 5), (60, 12), (100, 20), (200, 20), (400, 20), (2000, 100)]
)
def test_a_validation_has_rows_enough_or_none(count: int, expected: int) -> None:
    share = choose_share(count)
    rows = Rows(Path("x"), "text", tuple((f"text {n}",) for n in range(count)), tuple(range(count)))
    assert (len(split(rows, share=share)[1]) if share else 0) == expected


def test_rows_are_set_aside_for_a_test_that_no_other_side_has(here: Path, base: str) -> None:
    rows = [{"text": f"text {n} of {n % 40}", "label": "ab"[n % 2]} for n in range(100)]
    source = texts.write(here / "rows.jsonl", rows + rows[:10])
    sides = ("train", "validation", "test")

    def inputs(out: str, **settings: Any) -> list[set[str]]:
        found = prepare(source, here / out, base=base, **settings)
        assert found.to_json()["rows"] == {side: len(getattr(found, side) or ()) for side in sides}
        return [
            {json.loads(line)["text"] for line in (here / out / f"{side}.jsonl").read_text().splitlines()}
            for side in sides
        ]

    train, validated, tested = inputs("one", test=0.2)
    assert (len(train | validated | tested), len(train) + len(validated) + len(tested)) == (100, 100)
    assert 15 <= len(tested) <= 22
    assert inputs("two", test=0.2, share=0.4)[2] == tested
    with pytest.raises(DataError, match=r"0\.6 and 0\.4, which leaves no row to train on"):
        prepare(source, here / "three", base=base, share=0.6, test=0.4)


def test_a_recipe_learns_by_the_width_of_its_base_and_the_number_of_rows() -> None:
    assert [choose_learning_rate(width) for width in (16, 128, 256, 768, 4096, None)] == [
        4e-3,
        4e-3,
        2e-3,
        1e-3,
        3e-4,
        5e-4,
    ]
    assert [choose_epochs(rows) for rows in (1, 160, 200, 400, 800, 100_000)] == [10, 10, 8, 4, 3, 3]
    assert choose_learning_rate(384, has_labels=True) == choose_learning_rate(384) / 2 == 1e-3
    assert [choose_epochs(200, labels=labels) for labels in (0, 20, 21, 77)] == [8, 8, 16, 16]
    section = choose_train_section(rows=200, task="classify", hidden_size=384, labels=77)
    assert (section["head_learning_rate"], section["warmup_steps"], section["num_train_epochs"]) == (0.01, 0.1, 16)
    assert not {"head_learning_rate", "warmup_steps"} & {
        *choose_train_section(rows=200, task="causal-lm", hidden_size=256)
    }


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_what_a_chat_needs_is_in_the_recipe(tmp_path: Path) -> None:
    file = texts.write(tmp_path / "a.jsonl", [CHAT] * 3)
    template = "{% if brief %}!{% endif %}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ eos_token }}"
    template += "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    found = prepare(
        file, tmp_path / "out", share=0, template=template, template_variables={"brief": True}, learn="last"
    )
    assert found.recipe is not None
    data = load_recipe(found.recipe).data
    assert (dict(data.chat_template_kwargs), data.learn) == ({"brief": True}, "last")
    tokens = found.parts[0].examined.measured.lengths
    plain = prepare(file, share=0, template=template).parts[0].examined.measured.lengths
    assert tokens == tuple(length + 1 for length in plain)  # the mark that the variable adds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "last"}, "learn was given, which is for conversations"),
        ({"template": "plain"}, "a chat template was given, which is for conversations"),
        ({"learn": "lst"}, "learn 'lst' is not known"),
    ],
)
def test_what_is_for_conversations_is_rejected_for_other_rows(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = texts.write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    with pytest.raises(DataError, match=message):
        prepare(file, **options)


def test_a_file_of_which_nothing_is_left_says_what_was_wrong(tmp_path: Path) -> None:
    file = texts.write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": 5}] * 3)
    with pytest.raises(DataError, match="completion must be a string"):
        prepare(file, tmp_path / "out", drop=["bad"])
    file = texts.write(tmp_path / "b.jsonl", [{**CHAT, "tools": [{"name": "f", "parameters": {}}]}] * 3)
    with pytest.raises(DataError, match="no row is left: 3 bad") as error:
        prepare(file, tmp_path / "out", drop=["bad"], template="plain")
    assert "line 1: " in error.value.hint
