"""A served classifier: texts of adapters with different labels in one batch get what `predict` says of each alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import lora_kit as lk
from lora_kit.cli import main
from lora_kit.serving.http_app import build_app
from lora_kit.serving.open_base import choose_task
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.server_settings import ServerSettings
from tests.support import texts, tiny
from tests.support.labeled_bases import save_sentiment_base

INPUTS = ["good", "a bad film, and long", "so", "what a day", "no: not this one"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "mood": {"labels": ["sad", "glad"]},
    "topic": {"labels": ["art", "law", "sport", "trade", "war"]},
    "tags": {"labels": ["new", "old", "odd", "raw"], "problem": "multi-label", "thresholds": [0.4, 0.5, 0.6, 0.5]},
    "stars": {"labels": ["value"], "problem": "regression"},
}


def make_adapter(base: Path, seed: int, record: dict[str, Any]) -> lk.Adapter:
    """A random adapter with a head of its own, which is a saved module."""
    label2id = {name: number for number, name in enumerate(record["labels"])}
    loaded = lk.load_base(base, task="classify", label2id=label2id, problem=record.get("problem"))
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "task_type": "SEQ_CLS"}
    bank = lk.attach(
        loaded.model,
        lk.LoraConfig.from_dict({**config, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
        name="made",
    )
    with torch.no_grad():
        for leaf in bank.parameters("made"):
            leaf.add_(torch.randn_like(leaf) * 0.5)
    adapter, fingerprint = bank.snapshot("made"), bank.fingerprint()
    bank.detach()
    return lk.Adapter(adapter.config, adapter.tensors, record={"base": fingerprint, **record})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentiment_base(tmp_path_factory.mktemp("base") / "sentiment")


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for seed, (name, record) in enumerate(ADAPTERS.items()):
        make_adapter(base, seed, record).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def served(base: Path, store: Path) -> Iterator[ServedModel]:
    served = ServedModel(ServerSettings(base=str(base), store=store, dtype="fp32", slots=3, max_rank=4, rows=4))
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(served: ServedModel) -> Iterator[TestClient]:
    with TestClient(build_app(served), base_url="http://127.0.0.1") as client:
        yield client


def classify(client: TestClient, model: str, inputs: Any = INPUTS) -> Any:
    answer = client.post("/v1/classify", json={"model": model, "input": inputs})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def assert_same(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert given.get("labels") == expected.get("labels")
    assert given.get("value", 0.0) == pytest.approx(expected.get("value", 0.0), abs=1e-4)
    assert given.get("probabilities", {}) == pytest.approx(expected.get("probabilities", {}), abs=1e-5)


def test_each_adapter_and_the_base_predict_what_they_predict_alone(client: TestClient, base: Path, store: Path) -> None:
    for name in (base.name, *ADAPTERS):
        adapter = None if name == base.name else store / name
        expected = [each.to_json() for each in lk.predict(str(base), adapter, INPUTS)]
        for given, own in zip(classify(client, name), expected, strict=True):
            assert_same(given, own)
    assert {each["label"] for each in classify(client, "topic")} != {classify(client, "topic")[0]["label"]}


def test_mixed_batches_over_fewer_slots_answer_as_alone(client: TestClient) -> None:
    asked = [(name, text) for name in ADAPTERS for text in INPUTS] * 2
    alone = {(name, text): classify(client, name, text)[0] for name, text in set(asked)}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: classify(client, *each)[0], asked))
    for each, answer in zip(asked, answers, strict=True):
        assert_same(answer, alone[each])


def test_two_texts_are_one_input(client: TestClient, base: Path, store: Path) -> None:
    expected = lk.predict(str(base), store / "mood", [("good", "bad")])[0].to_json()
    assert_same(classify(client, "mood", [["good", "bad"]])[0], expected)


def test_an_embedding_is_the_mean_of_the_last_layer(client: TestClient, served: ServedModel, base: Path) -> None:
    loaded = lk.load_base(base, task="classify")
    ids = loaded.tokenizer(INPUTS[1], return_tensors="pt")["input_ids"]
    expected = loaded.model.base_model(input_ids=ids).last_hidden_state.mean(1)[0]
    body = {"model": base.name, "input": INPUTS}
    answer = client.post("/v1/embeddings", json=body).json()
    assert answer["data"][1]["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
    packed = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][1]["embedding"]
    numbers = torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.float32)
    assert numbers.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    own = client.post("/v1/embeddings", json={"model": "mood", "input": ids[0].tolist()}).json()["data"][0]["embedding"]
    assert own != pytest.approx(expected.tolist(), abs=1e-2)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/classify", {"model": "nobody", "input": "a"}, 404),
        ("/v1/classify", {"model": "mood", "input": []}, 400),
        ("/v1/classify", {"model": "mood", "input": " "}, 400),
        ("/v1/classify", {"model": "mood", "input": ["a"] * 1000}, 400),
        ("/v1/classify", {"model": "mood", "input": "a", "temperature": 1}, 400),
        ("/v1/embeddings", {"model": "mood", "input": "a" * 1000}, 400),
        ("/v1/embeddings", {"model": "mood", "input": [[]]}, 400),
        ("/v1/embeddings", {"model": "mood", "input": [10**9]}, 400),
        ("/v1/embeddings", {"model": "mood", "input": "a", "dimensions": 4}, 400),
        ("/v1/completions", {"model": "mood", "prompt": "a"}, 400),
    ],
)
def test_what_is_wrong_is_the_clients_fault(client: TestClient, path: str, body: Any, status: int) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_an_adapter_with_more_labels_than_the_server_has_is_an_error_that_tells_what_to_do(
    client: TestClient, base: Path, store: Path
) -> None:
    make_adapter(base, 9, {"labels": [f"l{n}" for n in range(7)]}).save(store / "wide")
    answer = client.post("/v1/classify", json={"model": "wide", "input": "a"})
    assert answer.status_code == 400
    assert "--labels 7" in answer.json()["error"]["message"]


def test_a_load_states_the_effect_and_adapters_are_listed(client: TestClient) -> None:
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "prod", "lora_path": "topic"})
    assert loaded.json()["largest_change_of_a_logit"] > 0
    assert client.put("/v1/adapters/prod/pin").status_code == 200
    assert classify(client, "prod", "good") == classify(client, "topic", "good")
    rows = {each["label"]: each for each in client.get("/v1/adapters").json()["data"]}
    assert rows["prod"]["in_slot"]
    assert rows["prod"]["pinned"]
    client.post("/v1/unload_lora_adapter", json={"lora_name": "prod"})


def test_chat_with_a_classifier_is_an_error_that_tells_what_to_do(
    base: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--base", str(base), "--adapter", "mood", "--store", str(store)]) == 2
    assert "lora-kit predict" in capsys.readouterr().err


def test_the_task_follows_the_adapters_else_the_base(base: Path, store: Path, tmp_path: Path) -> None:
    folders = [store / name for name in ADAPTERS]
    settings = ServerSettings(base="kit-base", store=store)
    assert choose_task(settings, folders) == "classify"
    assert choose_task(settings, []) == "causal-lm"
    assert choose_task(ServerSettings(base=str(base), store=store), []) == "classify"
    encoder = tmp_path / "encoder"
    tiny.bert().save_pretrained(encoder)
    texts.bert_tokenizer().save_pretrained(encoder)
    config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    (encoder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}), encoding="utf-8")
    assert choose_task(ServerSettings(base=str(encoder), store=store), []) == "classify"
