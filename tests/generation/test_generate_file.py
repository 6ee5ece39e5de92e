"""Files of prompts: the answers of one prompt alone, in batches, by the adapters that rows name, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import ConfigError, DataError, StorageError
from lora_kit.generation.batch_generator import BatchGenerator
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate_file import PARTIAL_SUFFIX
from lora_kit.models.loading import Base
from tests.support import texts, tiny
from tests.support.random_adapters import made

Capture = pytest.CaptureFixture[str]
SHORT = Sampling(max_new_tokens=8)
PROMPTS = ["one two", "b", "three one two one", "two", "one", "b c d"]


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(model=tiny.llama(), tokenizer=texts.tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def store(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(("one", "two"), start=1):
        made(base, seed=seed, separator=" -> " if name == "one" else "\n").save(folder / name)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return texts.write(tmp_path / "prompts.jsonl", [{"prompt": text, "id": f"p{n}"} for n, text in enumerate(PROMPTS)])


def run(base: Base, adapters: Any, data: Path, store: Path, **options: Any) -> list[Any]:
    return lk.generate_file(base, adapters, data, **{"sampling": SHORT, "store": store, "batch_size": 3, **options})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_each_row_gets_the_answer_that_its_prompt_gets_alone(base: Base, store: Path, data: Path) -> None:
    out = data.with_name("out.jsonl")
    found = run(base, [None, "one", "two"], data, store, out=out)
    lines = read(out)
    assert lines == [each.to_json() for each in found]
    assert [(line["line"], line["id"], line["adapter"]) for line in lines] == [
        (n + 1, f"p{n}", name) for n in range(len(PROMPTS)) for name in ("base", "one", "two")
    ]
    for line in lines[::2]:
        adapters = [None if line["adapter"] == "base" else line["adapter"], "one"]  # the base as beside the first
        alone = lk.generate(base, adapters, line["prompt"], sampling=SHORT, store=store)[0]
        assert (line["text"], line["tokens"], line["ended"]) == (alone.text, alone.tokens, alone.ended)
    assert not Path(f"{out}{PARTIAL_SUFFIX}").exists()


def test_a_row_names_the_adapter_that_answers_it(base: Base, store: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "one", "adapter": name} for name in ("two", "one", None)]
    data = texts.write(tmp_path / "prompts.jsonl", rows)
    found = [each.generation for each in run(base, [], data, store)]
    assert [each.name for each in found] == ["two", "one", "base"]
    expected = lk.generate(base, ["two", "one", None], "one", sampling=SHORT, store=store)
    assert [each.text for each in found] == [each.text for each in expected]
    for given, flags in (["one"], "--adapter"), ([None], "--compare"), ([None, "one"], "--adapter and --compare"):
        with pytest.raises(ConfigError, match=f"leave {flags} out"):
            run(base, given, data, store)


def test_lines_and_conversations_are_prompts(base: Base, store: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone two\r\n\nb\n")
    found = run(base, ["one"], tmp_path / "prompts.txt", store)
    assert [(each.row.line, each.row.prompt) for each in found] == [(1, "one two"), (3, "b")]
    said = texts.write(tmp_path / "said.jsonl", [{"messages": [{"role": "user", "content": "one two"}]}])
    (same,) = run(base, ["one"], said, store)
    assert same.generation == found[0].generation
    assert same.to_json()["messages"] == [{"role": "user", "content": "one two"}]


def test_a_run_that_was_killed_answers_only_what_is_missing(
    base: Base, store: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [each.to_json() for each in run(base, ["one", "two"], data, store)]
    out = data.with_name("out.jsonl")
    answer, sizes = BatchGenerator.answer, list[int]()

    def die_in_third(self: BatchGenerator, rows: Any, *, number: int = 0) -> Any:
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(rows))
        return answer(self, rows, number=number)

    monkeypatch.setattr(BatchGenerator, "answer", die_in_third)
    with pytest.raises(KeyboardInterrupt):
        run(base, ["one", "two"], data, store, out=out)
    partial = Path(f"{out}{PARTIAL_SUFFIX}")
    with partial.open("ab") as torn:  # a line that the kill has cut off
        torn.write(b'{"7": {"name": "on')
    assert not out.exists()
    with pytest.raises(StorageError, match="--replace starts anew"):
        run(base, ["one"], data, store, out=out)
    sizes.clear()
    monkeypatch.setattr(
        BatchGenerator, "answer", lambda self, rows, number=0: sizes.append(len(rows)) or answer(self, rows)
    )
    seen: list[tuple[int, int]] = []
    run(base, ["one", "two"], data, store, out=out, batch_size=2, on_progress=lambda *done: seen.append(done))
    assert sum(sizes) == len(expected) - 6
    assert seen[-1] == (len(expected), len(expected))
    assert read(out) == expected
    assert not partial.exists()


def test_a_damaged_line_of_the_answers_so_far_is_answered_anew_and_said(
    base: Base, store: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = data.with_name("out.jsonl")
    partial = Path(f"{out}{PARTIAL_SUFFIX}")
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.generation.generate_file.write_file", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(base, ["one"], data, store, out=out)
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    lines[2] = bytes([*lines[2][:-9], lines[2][-9] ^ 1, *lines[2][-8:]])
    partial.write_bytes(b"".join(lines))
    expected = [each.to_json() for each in run(base, ["one"], data, store)]
    run(base, ["one"], data, store, out=out)
    assert "line 3 is damaged; its answers and those after it are given anew" in caplog.text
    assert read(out) == expected


@pytest.mark.parametrize("mine", [b"mine", b"mine\n", b'{"lora_kit'])
@pytest.mark.parametrize("replace", [False, True])
def test_a_file_of_somebody_else_in_the_place_of_the_answers_so_far_stays(
    base: Base, store: Path, data: Path, mine: bytes, replace: bool
) -> None:
    out = data.with_name("out.jsonl")
    partial = Path(f"{out}{PARTIAL_SUFFIX}")
    partial.write_bytes(mine)
    if mine.startswith(b"{"):  # as far as a kill let ours get
        run(base, ["one"], data, store, out=out, replace=replace)
        assert not partial.exists()
        return
    with pytest.raises(StorageError, match=r"out\.jsonl\.partial is in the way, and is not of lora_kit"):
        run(base, ["one"], data, store, out=out, replace=replace)
    assert partial.read_bytes() == mine
    assert not out.exists()


def test_sampled_answers_repeat_after_a_kill(
    base: Base, store: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=5.0, seed=3)
    expected = [each.to_json() for each in run(base, ["one"], data, store, sampling=sampling)]
    assert expected != [each.to_json() for each in run(base, ["one"], data, store, sampling=SHORT)]
    out, answer = data.with_name("out.jsonl"), BatchGenerator.answer

    def die_in_second(self: BatchGenerator, rows: Any, *, number: int = 0) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return answer(self, rows, number=number)

    with monkeypatch.context() as patch:
        patch.setattr(BatchGenerator, "answer", die_in_second)
        with pytest.raises(KeyboardInterrupt):
            run(base, ["one"], data, store, sampling=sampling, out=out)
    run(base, ["one"], data, store, sampling=sampling, out=out)
    assert read(out) == expected


def test_a_prompt_that_nearly_fills_the_context_shortens_no_neighbor(base: Base, store: Path, tmp_path: Path) -> None:
    data = texts.write(tmp_path / "prompts.jsonl", [{"prompt": "a" * 58}, {"prompt": "b"}])
    long, short = (each.generation for each in run(base, [None], data, store))
    assert long.tokens < 8
    assert short == lk.generate(base, [None], "b", sampling=SHORT)[0]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a"}, {"prompt": ""}, {"text": "b"}], ":2: .*\n.*:3: prompt or messages is expected"),
        ([{"prompt": "a"}, {"prompt": "a" * 70}], ":2: the prompt has"),
        ([{"prompt": "a", "adapter": "one"}, {"prompt": "a"}], ":2: adapter is missing"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], ":1: the last"),
        ([{"messages": [{"role": r, "content": "a"} for r in ("system", "user")]}], ":1: .*no chat template"),
        ([{"messages": [{"role": "system", "content": "a"}]}], ":1: .*instructions only"),
        ([{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}], ":1: prompt and messages are both"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_answered_are_listed(
    base: Base, store: Path, tmp_path: Path, rows: list[Any], told: str
) -> None:
    data = texts.write(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(DataError, match=told):
        run(base, [], data, store, out=tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_adapters_that_rows_name_and_do_not_exist_are_all_listed(
    base: Base, store: Path, tmp_path: Path, capsys: Capture
) -> None:
    rows = [{"prompt": "a", "adapter": name} for name in ("one", "tow", "tow", None, "three")]
    data = texts.write(tmp_path / "prompts.jsonl", rows)
    told = ":2: no adapter is called 'tow'\n.*:5: no adapter is called 'three' "
    with pytest.raises(DataError, match=told) as caught:
        run(base, [], data, store)
    assert caught.value.hint.endswith("holds one, two")
    assert main(["generate", "--data", str(data), "--store", str(store)]) == 2
    assert ":2: no adapter is called 'tow'" in capsys.readouterr().err


def test_answers_are_jsonl_and_never_replace_the_prompts(base: Base, store: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="answers are written as JSONL"):
        run(base, ["one"], data, store, out=data.with_name("o.csv"))
    link = data.with_name("link.jsonl")
    link.symlink_to(data)
    lines = data.with_name("out.jsonl.partial.txt")
    lines.write_text("a\n", encoding="utf-8")
    data.with_name(f"out.jsonl{PARTIAL_SUFFIX}").hardlink_to(lines)
    for read_from, out in (data, data), (data, link), (lines, data.with_name("out.jsonl")):
        before = read_from.read_bytes()
        with pytest.raises(StorageError, match="is an input"):
            run(base, ["one"], read_from, store, out=out, replace=True)
        assert read_from.read_bytes() == before


def test_the_command_answers_a_file_and_a_prompt(
    base: Base, store: Path, data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    base.model.save_pretrained("base")
    base.tokenizer.save_pretrained("base")
    common = ["--base", "base", "--store", str(store), "--max-new-tokens", "8"]
    assert main(["generate", "-a", "one", "-a", "two", "--data", "prompts.jsonl", "--out", "out.jsonl", *common]) == 0
    out, _ = capsys.readouterr()
    assert "written: out.jsonl, 12 answers" in out
    assert main(["generate", "-a", "one", "-a", "two", "--data", "prompts.jsonl", *common]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == read(Path("out.jsonl"))
    assert main(["generate", "one two", "-a", "one", "--json", *common]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["text"] == read(Path("out.jsonl"))[0]["text"]
    assert main(["generate", "one", "--data", "prompts.jsonl", *common]) == 2
    assert main(["generate", "-a", "one", "--data", "prompts.jsonl", "--out", "out.jsonl", *common]) == 3
