"""A conversation: one history, any adapter for the next answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.errors import ConfigError, DataError, LoraKitError
from lora_kit.serving.chat_session import COMMANDS, ChatSession, run_command
from lora_kit.serving.sampler import SamplingSettings
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.server_settings import ServerSettings
from tests.support import random_adapters

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, folder = lk.load_base("kit-base", dtype="fp32"), tmp_path_factory.mktemp("store")
    for seed, name in enumerate(("one", "two")):
        adapter = random_adapters.made(base, seed=seed, target_modules="all-linear")
        record = {"recipe": {"data": {"chat_template": PLAIN}}}
        lk.Adapter(adapter.config, adapter.tensors, record=record).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def served(store: Path) -> Iterator[ServedModel]:
    served = ServedModel(ServerSettings(base="kit-base", store=store, dtype="fp32", slots=2, max_rank=16, rows=2))
    yield served
    served.close()


@pytest.fixture
def session(served: ServedModel, store: Path) -> ChatSession:
    session = ChatSession(served, SamplingSettings(max_tokens=6, min_tokens=6), store)
    session.use("one")
    return session


def test_history_and_a_swap_in_mid_conversation(session: ChatSession, served: ServedModel, store: Path) -> None:
    first = "".join(session.ask("hello"))
    assert session.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    run_command(session, "/use two")
    second = "".join(session.ask("and now"))
    alone = ChatSession(served, session.settings, store, messages=session.messages[:2])
    alone.use("two")
    assert "".join(alone.ask("and now")) == second
    other = ChatSession(served, session.settings, store, messages=session.messages[:2])
    other.use("one")
    assert "".join(other.ask("and now")) != second


def test_commands_change_what_they_say(session: ChatSession, tmp_path: Path) -> None:
    run_command(session, "/system be brief")
    list(session.ask("hello"))
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    run_command(session, f"/save {tmp_path / 'talk.jsonl'}")
    saved = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert saved["messages"] == session.messages
    run_command(session, "/undo")
    assert [message["role"] for message in session.messages] == ["system"]
    assert "× 0.5" in run_command(session, "/scale 0.5")
    assert "kit-base" in run_command(session, "/base")
    with pytest.raises(ConfigError, match="no scale"):
        run_command(session, "/scale 2")


@pytest.mark.parametrize("line", ["/usee two", "/use", "/use nothing", "/scale x", "/save", "/ask"])
def test_wrong_commands_change_nothing(session: ChatSession, line: str) -> None:
    before = (session.label, session.scale, list(session.messages))
    with pytest.raises(LoraKitError):
        run_command(session, line)
    assert (session.label, session.scale, session.messages) == before


def test_an_answer_that_is_broken_off_is_not_in_the_history(session: ChatSession) -> None:
    answer = session.ask("hello")
    next(answer)
    answer.close()
    assert session.messages == []
    with pytest.raises(DataError):
        session.save(Path("nowhere.jsonl"))


def test_the_base_answers_in_the_template_of_the_adapter_before_it(session: ChatSession) -> None:
    session.use(None)
    assert session.label == "kit-base"
    assert "".join(session.ask("hello"))
    alone = ChatSession(session.served, session.settings, session.store, label="kit-base")
    with pytest.raises(DataError, match="kit-base has no chat template"):
        list(alone.ask("hello"))


def test_every_command_is_listed() -> None:
    assert {usage.split()[0] for usage in COMMANDS} == {
        "/use", "/base", "/scale", "/system", "/undo", "/clear", "/save", "/help", "/quit",
    }  # fmt: skip
