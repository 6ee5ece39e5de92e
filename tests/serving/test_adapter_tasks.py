"""A store with adapters of several tasks: a server offers those of its own, and names the command for the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import lora_kit as lk
from lora_kit.errors import LoraKitError
from lora_kit.serving.adapter_labels import AdapterLabels, set_aliases
from lora_kit.serving.http_app import build_app
from lora_kit.serving.serve import serve
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.server_settings import ServerSettings
from lora_kit.serving.vllm_handover import LAUNCH, write_vllm_handover
from tests.support import random_adapters

COMMAND = "lora-kit serve --task classify"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that generates, one that names no task, and a classifier with its head."""
    folder = tmp_path_factory.mktemp("store")
    base = lk.load_base("kit-base", dtype="fp32", device="cpu")
    for seed, (name, task) in enumerate({"pirate": "CAUSAL_LM", "untold": None}.items()):
        random_adapters.made(base, seed=seed, target_modules=["q_proj"], task_type=task).save(folder / name)
    labels = {"card": 0, "login": 1}
    base = lk.load_base("kit-base", task="classify", label2id=labels, dtype="fp32", device="cpu")
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    made = random_adapters.made(base, seed=2, **fields)
    lk.Adapter(made.config, made.tensors, record={**made.record, "labels": list(labels)}).save(folder / "tickets")
    return folder


def open_client(store: Path, task: str | None) -> Iterator[TestClient]:
    served = ServedModel(ServerSettings(base="kit-base", store=store, task=task, dtype="fp32", slots=2, rows=2))
    with TestClient(build_app(served), base_url="http://127.0.0.1") as client:
        yield client
    served.close()


@pytest.fixture(scope="module")
def generating(store: Path) -> Iterator[TestClient]:
    yield from open_client(store, None)


@pytest.fixture(scope="module")
def classifying(store: Path) -> Iterator[TestClient]:
    yield from open_client(store, "classify")


def list_models(client: TestClient) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def test_only_the_adapters_of_the_servers_task_are_listed(generating: TestClient, classifying: TestClient) -> None:
    assert list_models(generating) == ["kit-base", "pirate", "untold"]
    assert list_models(classifying) == ["kit-base", "tickets", "untold"]
    assert [each["label"] for each in generating.get("/v1/adapters").json()["data"]] == ["pirate", "untold"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tickets", "prompt": "a"}),
        ("/v1/chat/completions", {"model": "tickets", "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/classify", {"model": "tickets", "input": ["a"]}),
        ("/v1/classify", {"model": "pirate", "input": ["a"]}),
        ("/v1/embeddings", {"model": "kit-base", "input": ["a"]}),
        ("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "tickets"}),
    ],
)
def test_what_needs_another_task_is_an_error_with_the_command(
    generating: TestClient, path: str, body: dict[str, object]
) -> None:
    answer = generating.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert COMMAND in error["message"]
    assert (error["param"], error["code"]) == ("model", "unsupported")


def test_a_classifying_server_answers_with_its_own_and_names_the_task_of_the_others(classifying: TestClient) -> None:
    answer = classifying.post("/v1/classify", json={"model": "tickets", "input": ["a"]})
    assert set(answer.json()["data"][0]["probabilities"]) == {"card", "login"}
    for path, body in {"/v1/classify": {"input": ["a"]}, "/v1/completions": {"prompt": "a"}}.items():
        message = classifying.post(path, json={"model": "pirate", **body}).json()["error"]["message"]
        assert "lora-kit serve --task causal-lm" in message


def test_labels_and_aliases_of_another_task_are_not_offered(store: Path, tmp_path: Path) -> None:
    every = AdapterLabels(store, base_name="kit-base", state_file=tmp_path / "state")
    every.load("mine", "tickets")
    every.alias("prod", "tickets")
    labels = AdapterLabels(store, base_name="kit-base", task="causal-lm", state_file=tmp_path / "state")
    assert labels.names() == ("pirate", "untold")
    assert labels.peek("prod") is None
    for ask in (
        lambda: labels.resolve("prod"),
        lambda: labels.resolve("mine"),
        lambda: labels.alias("new", "tickets"),
        lambda: set_aliases({"new": "tickets"}, labels),
    ):
        with pytest.raises(LoraKitError, match="task classify"):
            ask()
    with pytest.raises(LoraKitError, match="another adapter"):
        labels.load("tickets", "pirate")


def test_the_start_says_once_what_is_not_offered(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    with caplog.at_level(logging.WARNING):
        serve(ServerSettings(base="kit-base", store=store, port=0, dtype="fp32", slots=1, rows=1))
    assert caplog.messages.count(f"not offered: tickets (classify): {COMMAND}") == 1


def test_a_handover_leaves_out_what_the_server_does_not_offer(store: Path, tmp_path: Path) -> None:
    settings = ServerSettings(base="kit-base", store=store, dtype="fp32")
    notes = write_vllm_handover(settings, tmp_path / "out")
    assert f"not offered: tickets (classify): {COMMAND}" in notes
    assert "tickets" not in (tmp_path / "out" / LAUNCH).read_text("utf-8")
