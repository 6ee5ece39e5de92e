"""The API over HTTP: answers are those of each adapter alone, errors are in OpenAI's envelope."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import lora_kit as lk
from lora_kit.errors import StorageError
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import tokenize_prompt
from lora_kit.serving.access import hash_key
from lora_kit.serving.http_app import build_app
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.server_settings import ServerSettings
from tests.support import random_adapters

PROMPT = "The fox and the crow"
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"], "r": 2},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "r": 3},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [40, 41, 42]},
}


@pytest.fixture(scope="module")
def base() -> Base:
    return lk.load_base("kit-base", dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def store(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for seed, (name, fields) in enumerate(FEATURES.items()):
        random_adapters.made(base, seed=seed, **{"target_modules": "all-linear", **fields}).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def offline(base: Base, store: Path) -> dict[str, list[int]]:
    """What each adapter, and the base, writes alone: 12 tokens, greedily."""
    return {name: write_alone(base, None if name == "kit-base" else store / name) for name in ("kit-base", *FEATURES)}


def write_alone(base: Base, folder: Path | None, prompt: str = PROMPT, count: int = 12) -> list[int]:
    ids = torch.tensor([tokenize_prompt(base.tokenizer, prompt)])
    bank = lk.attach(base.model, slots=1, max_rank=16)
    try:
        if folder is not None:
            bank.load("alone", folder)
            bank.use("alone")
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
        written = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return list(written[0, ids.shape[1] :].tolist())
    finally:
        bank.detach()


@pytest.fixture(scope="module")
def served(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    state = tmp_path_factory.mktemp("state") / "state.json"
    settings = ServerSettings(base="kit-base", store=store, dtype="fp32", slots=4, max_rank=16, rows=8, state=state)
    served = ServedModel(settings)
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(served: ServedModel) -> Iterator[TestClient]:
    with TestClient(build_app(served), base_url="http://127.0.0.1") as client:
        yield client


def complete(client: TestClient, model: str, prompt: Any = PROMPT, **fields: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 12, "min_tokens": 12, "return_token_ids": True}
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, **options, **fields})


def test_every_kind_of_adapter_answers_as_alone(client: TestClient, offline: dict[str, list[int]]) -> None:
    assert len({tuple(tokens) for tokens in offline.values()}) == len(offline)  # each changes something
    for model, tokens in offline.items():
        answer = complete(client, model)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == tokens, model


def test_many_at_once_answer_as_alone(client: TestClient, offline: dict[str, list[int]]) -> None:
    models = list(offline) * 6
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda model: complete(client, model).json(), models))
    wrong = [m for m, a in zip(models, answers, strict=True) if a["choices"][0]["token_ids"] != offline[m]]
    assert not wrong


def test_a_prefix_of_another_adapter_is_never_read(client: TestClient, base: Base, store: Path) -> None:
    long = " ".join(["the fox ran"] * 12)
    expected = {name: write_alone(base, store / name, long) for name in ("plain", "head")}
    for name in ("plain", "head", "plain", "head"):
        answer = complete(client, name, long).json()
        assert answer["choices"][0]["token_ids"] == expected[name]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def read_stream(client: TestClient, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_is_the_whole_answer_in_parts(client: TestClient) -> None:
    whole = complete(client, "plain").json()
    body = {"model": "plain", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "min_tokens": 12}
    chunks = read_stream(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert text == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_several_prompts_and_several_answers_come_in_their_order(client: TestClient) -> None:
    ids = client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    answer = complete(client, "plain", [PROMPT, "A storm"], n=2).json()
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["token_ids"] == choices[1]["token_ids"] != choices[2]["token_ids"]
    assert complete(client, "plain", ids).json()["choices"][0]["token_ids"] == choices[0]["token_ids"]


def test_a_seed_repeats_a_sample_and_n_answers_differ(client: TestClient) -> None:
    fields = {"temperature": 1.5, "seed": 7, "n": 3}
    first, second = (complete(client, "plain", **fields).json()["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert len({choice["text"] for choice in first}) > 1


def test_a_stop_text_ends_the_answer(client: TestClient) -> None:
    text = complete(client, "kit-base").json()["choices"][0]["text"]
    stop = text[5:8]
    choice = complete(client, "kit-base", stop=[stop], min_tokens=0).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_probabilities_are_reported(client: TestClient) -> None:
    logprobs = complete(client, "plain", logprobs=2).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 12
    assert all(
        max(top.values()) == pytest.approx(own)
        for top, own in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
    )


def test_a_scale_of_zero_is_the_base_and_of_one_the_adapter(client: TestClient, offline: dict[str, list[int]]) -> None:
    assert complete(client, "plain", lora_scale=0.0).json()["choices"][0]["token_ids"] == offline["kit-base"]
    assert complete(client, "plain", lora_scale=1.0).json()["choices"][0]["token_ids"] == offline["plain"]
    assert complete(client, "dora", lora_scale=0.5).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nothing"}, 404, "model"),
        ({"model": "../plain"}, 404, "model"),
        ({"model": "plain@0123456789ab"}, 404, "model"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [99999]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 100}, 400, "n"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"temprature": 1}, 400, "temprature"),
        ({"best_of": 5}, 400, "best_of"),
        ({"max_tokens": 10**400}, 400, "max_tokens"),
        ({"prompt": ["a"] * 1000}, 400, "prompt"),
        ({"prompt": ["a"] * 100, "n": 16}, 400, "prompt"),
    ],
)
def test_what_is_wrong_is_said_in_the_envelope(
    client: TestClient, body: dict[str, Any], status: int, param: str
) -> None:
    answer = client.post("/v1/completions", json={"model": "plain", "prompt": PROMPT, "max_tokens": 2, **body})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert param in str(error["param"])
    assert error["message"]
    assert complete(client, "plain").status_code == 200  # nobody else suffers


def test_neutral_values_of_other_fields_pass(client: TestClient) -> None:
    neutral = {"repetition_penalty": 1.0, "best_of": 1, "echo": False, "suffix": None, "user": "me", "tools": []}
    assert complete(client, "plain", **neutral).status_code == 200


def test_the_chat_template_is_needed_for_conversations_of_several_messages(client: TestClient) -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "x"},
    ]
    answer = client.post("/v1/chat/completions", json={"model": "kit-base", "messages": messages})
    assert answer.status_code == 400
    assert "template" in answer.json()["error"]["message"]


def test_models_list_the_base_and_the_store(client: TestClient) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert {*models} == {"kit-base", *FEATURES}
    complete(client, "plain")
    adapters = {each["label"]: each for each in client.get("/v1/adapters").json()["data"]}
    assert adapters["plain"]["in_slot"]
    assert adapters["plain"]["hits"] >= 1


def test_labels_aliases_and_pins_change_at_run_time(client: TestClient, offline: dict[str, list[int]]) -> None:
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "prod", "lora_path": "plain"})
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["largest_change_of_a_logit"] > 0
    assert client.put("/v1/aliases/chat", json={"label": "prod"}).status_code == 200
    assert complete(client, "chat").json()["choices"][0]["token_ids"] == offline["plain"]
    client.post("/v1/load_lora_adapter", json={"lora_name": "prod", "lora_path": "head"})
    assert complete(client, "chat").json()["choices"][0]["token_ids"] == offline["head"]
    assert client.put("/v1/adapters/prod/pin").status_code == 200
    assert client.delete("/v1/adapters/prod/pin").status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "prod"}).status_code == 200
    assert complete(client, "chat").status_code == complete(client, "prod").status_code == 404
    for path in ("/etc", "../plain", "nothing"):
        answer = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert answer.status_code == 404


def test_health_metrics_and_tokens(client: TestClient) -> None:
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/ready").status_code == 200
    assert "vllm:generation_tokens_total" in client.get("/metrics").text
    ids = client.post("/tokenize", json={"prompt": "hello there", "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "hello there"
    assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_other_hosts_and_large_bodies_are_turned_away(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
    answer = client.post("/v1/completions", content=b" " * (5 * 2**20), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_more_adapters_than_slots_all_answer(client: TestClient, offline: dict[str, list[int]]) -> None:
    models = [name for name in FEATURES for _ in range(3)]  # 6 adapters, 4 slots
    with ThreadPoolExecutor(18) as pool:
        answers = list(pool.map(lambda model: complete(client, model), models))
    assert [answer.status_code for answer in answers] == [200] * len(models)
    assert all(a.json()["choices"][0]["token_ids"] == offline[m] for m, a in zip(models, answers, strict=True))


def test_the_description_names_the_form_of_each_answer(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert set(paths[path]["post"]["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "507" in paths["/v1/aliases/{alias}"]["put"]["responses"]


def list_open_routes(client: TestClient) -> set[str]:
    """The paths of the API that answer anything but 401 to a client without a key."""
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) > 12
    asked = [(method, path, re.sub(r"\{\w+\}", "plain", path)) for path, own in paths.items() for method in own]
    return {path for method, path, address in asked if client.request(method, address).status_code != 401}


def test_keys_decide_what_may_be_asked(served: ServedModel, store: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    entries = [
        {"name": "me", "sha256": hash_key("mine"), "adapters": ["plain"]},
        {"name": "boss", "sha256": hash_key("boss"), "admin": True},
    ]
    keys.write_text(json.dumps({"keys": entries}), encoding="utf-8")
    own = ServedModel(ServerSettings(base="kit-base", store=store, dtype="fp32", slots=2, max_rank=16, keys=keys))
    try:
        with TestClient(build_app(own), base_url="http://127.0.0.1") as client:
            assert list_open_routes(client) == {"/health", "/ready"}
            assert complete(client, "plain").status_code == 401
            mine, boss = ({"Authorization": f"Bearer {key}"} for key in ("mine", "boss"))
            client.headers.update(mine)
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["plain"]
            assert complete(client, "plain").status_code == 200
            assert complete(client, "head").status_code == complete(client, "kit-base").status_code == 404
            assert client.put("/v1/aliases/chat", json={"label": "plain"}).status_code == 403
            assert client.put("/v1/aliases/chat", json={"label": "plain"}, headers=boss).status_code == 200
    finally:
        own.close()


def test_a_failing_forward_ends_its_own_requests_only(client: TestClient, served: ServedModel, base: Base) -> None:
    layer = served._base.model.model.layers[0]
    started = threading.Event()

    def fail(*arguments: object) -> None:
        if not started.is_set():
            started.set()
            raise RuntimeError("planted")

    hook = layer.register_forward_pre_hook(fail)
    try:
        answer = complete(client, "plain")
        assert answer.status_code == 500
        assert "planted" in answer.json()["error"]["message"]
        assert complete(client, "plain").status_code == 200
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "plain", "prompt": "\xff\xfe"}',
        b'{"model": "plain", "prompt": "\\ud800"}',
        b'{"model": "plain", "prompt": "a", "lora_scale": NaN}',
        b'{"model": "plain", "prompt": "a", "temperature": -Infinity}',
        b'{"model": "plain", "prompt": "a", "logit_bias": {"5": NaN}}',
        b'{"model": "plain", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "plain", "prompt": "a", "repetition_penalty": 1e-300}',
        b"null",
    ],
)
def test_a_body_that_no_client_should_send_is_the_clients_fault(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_the_smallest_temperature_and_top_p_take_the_most_probable_token(
    client: TestClient, offline: dict[str, list[int]]
) -> None:
    for fields in ({"temperature": 1e-300}, {"temperature": 5, "top_p": 1e-300}):
        assert complete(client, "plain", **fields).json()["choices"][0]["token_ids"] == offline["plain"]


def test_an_unexpected_error_is_in_the_envelope_and_tells_nothing(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("/a/path/of/the/server")

    monkeypatch.setattr(served.labels, "names", fail)
    with TestClient(build_app(served), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.get("/v1/models")
    assert answer.status_code == 500
    assert "path" not in answer.json()["error"]["message"]


def list_pinned(served: ServedModel) -> set[str]:
    uses = served.worker.call(served.worker.slots.describe).result(timeout=60)
    return {digest for digest, use in uses.items() if use.pinned}


def test_a_pin_follows_its_label_and_leaves_with_it(client: TestClient, served: ServedModel) -> None:
    digests = [
        client.post("/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": path}).json()["digest"]
        for path in ("plain", "head", "plain")
    ]
    assert client.put("/v1/adapters/kept/pin").status_code == 200
    assert list_pinned(served) == {digests[0]}
    client.post("/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": "head"})
    assert list_pinned(served) == {digests[1]}
    client.post("/v1/unload_lora_adapter", json={"lora_name": "kept"})
    assert not list_pinned(served)


def test_no_slot_for_a_load_is_said_and_heals(client: TestClient, offline: dict[str, list[int]]) -> None:
    pinned = ("plain", "dora", "head", "embedding")  # as many as there are slots
    assert all(client.put(f"/v1/adapters/{name}/pin").status_code == 200 for name in pinned)
    for answer in (
        client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "whole"}),
        client.put("/v1/adapters/whole/pin"),
    ):
        assert answer.status_code == 429
        assert "slot" in answer.json()["error"]["message"]
    assert all(client.delete(f"/v1/adapters/{name}/pin").status_code == 200 for name in pinned)
    assert complete(client, "whole").json()["choices"][0]["token_ids"] == offline["whole"]


def test_a_full_disk_at_the_state_file_changes_nothing(
    client: TestClient, offline: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise StorageError(f"{path.name}: no space left")

    monkeypatch.setattr("lora_kit.serving.adapter_labels.write_file", fail)
    answer = client.put("/v1/aliases/full", json={"label": "plain"})
    assert answer.status_code == 507
    assert "no space" in answer.json()["error"]["message"]
    assert complete(client, "full").status_code == 404
    assert complete(client, "plain").json()["choices"][0]["token_ids"] == offline["plain"]
    monkeypatch.undo()
    assert client.put("/v1/aliases/full", json={"label": "plain"}).status_code == 200
    assert client.delete("/v1/aliases/full").status_code == 200


def test_a_stuck_forward_shows_in_health(client: TestClient, served: ServedModel) -> None:
    began, go_on = threading.Event(), threading.Event()
    object.__setattr__(served.settings, "stuck_seconds", 0.05)
    try:
        stuck = served.worker.call(lambda: (began.set(), go_on.wait(60)))
        assert began.wait(60)
        time.sleep(0.2)
        assert client.get("/health").status_code == 503
    finally:
        go_on.set()
        object.__setattr__(served.settings, "stuck_seconds", 30.0)
    stuck.result(timeout=60)
    assert client.get("/health").status_code == 200
