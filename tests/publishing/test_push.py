"""`push`: what leaves, what its card says, and what happens where the hub, a server on this machine, says no."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import ConfigError, ExportError, PublishError, VerificationError
from lora_kit.publishing.commit import PushReport, push
from lora_kit.publishing.push import PushPlan, plan_push
from tests.support import tiny
from tests.support.hub_cache import add_repository
from tests.support.hub_server import Hub, serve_hub
from tests.support.merging import base_folder

REPOSITORY, BASE = "me/mine", "organization/tiny-llama"
METRICS = {"accuracy": 0.9, "train_loss": 0.25}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("bases") / "llama", tiny.llama())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter as a training leaves it: with a recipe that names data, a report, and metrics."""
    folder = tmp_path / "adapters" / "mine"
    config = lk.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        base_model_name_or_path=str(base),
    )
    data = {"train": "clients/acme.jsonl", "validation": None, "max_length": 64, "separator": "\n"}
    record = {
        "metrics": METRICS,
        "recipe": {"base": str(base), "data": data, "out": "adapters/mine", "task": "causal-lm"},
    }
    files = {"recipe.yaml": b"data: {train: clients/acme.jsonl}\n", "report.html": b"<p>a row of acme</p>"}
    lk.attach(lk.load_base(base).model, config, name="mine").save("mine", folder, record=record, files=files)
    return folder


def pushed(folder: Path, **options: object) -> tuple[PushPlan, PushReport]:
    plan = plan_push(folder, REPOSITORY, base=BASE)
    return plan, push(plan, **options)  # type: ignore[arg-type]


def card_of(plan: PushPlan) -> tuple[dict[str, object], str]:
    """The YAML of a card, and its text."""
    content = plan.files["README.md"]
    assert isinstance(content, bytes)
    head, _, body = content.decode().removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), body


def test_what_is_pushed_is_there_whole_after_one_commit(hub: Hub, adapter: Path) -> None:
    plan, report = pushed(adapter)
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    assert repository.commits == ["0" * 40, report.commit]
    sent = {name for name in repository.files if name != ".gitattributes"}
    assert sent == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lora_kit.json"} == set(plan.files)
    assert repository.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


def test_what_was_pushed_is_the_same_adapter_and_its_card_loads_it(
    hub: Hub, adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = pushed(adapter)
    landed = tmp_path / "landed"
    landed.mkdir()
    for name, data in hub.repositories[REPOSITORY].files.items():
        (landed / name).write_bytes(data)
    assert lk.Adapter.load(landed) == lk.Adapter.load(adapter)
    cache = tmp_path / "cache"
    add_repository(cache, REPOSITORY, landed)
    add_repository(cache, BASE, base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    space: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", card_of(plan)[1], re.S):
        exec(block, space)
    bank = lk.attach(lk.load_base(base).model, slots=1)
    bank.load("x", adapter)
    bank.use("x")
    torch.testing.assert_close(
        tiny.logits(space["base"].model, tiny.batch()),  # type: ignore[attr-defined]
        tiny.logits(bank.model, tiny.batch()),
    )


def test_no_data_is_named_unless_it_was_asked_for(adapter: Path) -> None:
    plan = plan_push(adapter, REPOSITORY, base=BASE)
    for name, content in plan.files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        assert b"acme" not in data, name
    assert {"recipe.yaml", "report.html"} <= set(plan.left_out)
    assert "datasets" not in card_of(plan)[0]
    named = plan_push(adapter, REPOSITORY, base=BASE, datasets=["organization/open-data"])
    assert card_of(named)[0]["datasets"] == ["organization/open-data"]


def test_the_card_says_what_it_is_made_for_what_was_measured_and_what_not_to_expect(adapter: Path) -> None:
    fields, body = card_of(plan_push(adapter, REPOSITORY, base=BASE, license="apache-2.0"))
    assert fields["base_model"] == BASE
    assert fields["base_model_relation"] == "adapter"
    assert fields["library_name"] == "peft"
    assert fields["license"] == "apache-2.0"
    assert fields["metrics"] == ["accuracy"]
    assert fields["pipeline_tag"] == "text-generation"
    assert "at most 64 tokens" in body
    assert "| adapter\\_model.safetensors |" in body or "| adapter_model.safetensors |" in body
    assert "No license" not in body


def test_what_its_owner_wrote_on_the_card_stays(adapter: Path) -> None:
    card = adapter / "README.md"
    text = card.read_text().replace("tags:\n", "language: en\ntags:\n- mine\n")
    card.write_text(text + "\n## Limits\n\nOnly for jokes.\n")
    fields, body = card_of(plan_push(adapter, REPOSITORY, base=BASE))
    assert fields["language"] == "en"
    assert "mine" in fields["tags"]  # type: ignore[operator]
    assert body.count("## Limits") == 1
    assert "Only for jokes." in body


def test_an_adapter_that_is_not_as_it_was_saved_does_not_leave(adapter: Path) -> None:
    (adapter / "recipe.yaml").write_text("base: other\n")
    with pytest.raises(VerificationError, match=r"recipe\.yaml changed"):
        plan_push(adapter, REPOSITORY, base=BASE)


def test_a_base_that_is_a_folder_needs_a_name_that_others_know(adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"its base is '.*llama', a folder"):
        plan_push(adapter, REPOSITORY)
    with pytest.raises(ConfigError, match="is no id of the hub"):
        plan_push(adapter, REPOSITORY, base="/models/llama")


@pytest.mark.parametrize("repository", ["mine", "me/mine/sub", "me/mine@main", "../mine", ""])
def test_a_repository_is_an_organization_and_a_name(repository: str, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="no id of a repository"):
        plan_push(adapter, repository, base=BASE)


def test_a_path_of_this_machine_does_not_leave(adapter: Path) -> None:
    (adapter / "lora_kit.json").unlink()
    (adapter / "metrics.jsonl").write_text('{"step": 1, "file": "/home/anna/acme.jsonl"}\n')
    with pytest.raises(ExportError, match=r"metrics.jsonl names a folder of this machine.*/home/anna"):
        plan_push(adapter, REPOSITORY, base=BASE)


def test_a_merged_model_is_pushed_with_its_card(hub: Hub, adapter: Path, base: Path, tmp_path: Path) -> None:
    lk.merge(base, adapter, tmp_path / "merged")
    plan, _ = pushed(tmp_path / "merged")
    fields, body = card_of(plan)
    assert (fields["base_model"], fields["base_model_relation"]) == (BASE, "finetune")
    assert "load_base('me/mine')" in body
    assert "model.safetensors" in hub.repositories[REPOSITORY].files
    assert str(base).encode() not in b"".join(hub.repositories[REPOSITORY].files.values())


def test_a_model_trained_in_every_weight_is_pushed(hub: Hub, tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "full", tiny.llama())
    (folder / "recipe.yaml").write_text(
        "base: ~/models/llama\nmethod: full\ndata: {train: acme.jsonl, max_length: 64}\n"
    )
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "eval_perplexity": 1.5}\n')
    plan, _ = pushed(folder)
    fields, body = card_of(plan)
    assert fields["tags"] == ["fine-tuned", "lora-kit"]
    assert fields["metrics"] == ["perplexity"]
    assert "load_base('me/mine')" in body
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.repositories[REPOSITORY].files)
    assert "recipe.yaml" in plan.left_out


def test_a_folder_that_is_neither_is_an_error(base: Path) -> None:
    with pytest.raises(ExportError, match="neither an adapter, nor a model"):
        plan_push(base, REPOSITORY, base=BASE)


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("/repos/create", 401, "token is not valid"),
        ("/repos/create", 403, "may not write"),
        ("/preupload/main", 404, "no such organization"),
        ("/objects/batch", 403, "may not write"),
        ("/commit/main", 409, "changed meanwhile"),
        ("/commit/main", 500, "the push failed"),
    ],
)
def test_where_the_hub_says_no_nothing_is_in_the_repository(
    end: str, status: int, message: str, hub: Hub, adapter: Path
) -> None:
    if end != "/repos/create":
        hub.put(REPOSITORY)
    hub.answers[end] = status
    with pytest.raises(PublishError, match=message) as caught:
        pushed(adapter)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert not any(repository.files for repository in hub.repositories.values())


def test_a_connection_that_breaks_in_the_commit_leaves_nothing(hub: Hub, adapter: Path) -> None:
    hub.broken.add("/commit/main")
    with pytest.raises(PublishError, match="push failed"):
        pushed(adapter)
    assert set(hub.repositories[REPOSITORY].files) == {".gitattributes"}
    hub.broken.clear()
    pushed(adapter)
    assert "adapter_model.safetensors" in hub.repositories[REPOSITORY].files


def test_without_a_token_or_a_network_nothing_is_asked(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PublishError, match="no token"):
        pushed(adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        pushed(adapter)
    assert hub.requests == []


def test_a_commit_of_somebody_else_in_between_is_a_conflict(hub: Hub, adapter: Path) -> None:
    hub.before_commit = lambda repository: repository.commits.append("1" * 40)
    with pytest.raises(PublishError, match="changed meanwhile"):
        pushed(adapter)
    assert set(hub.repositories[REPOSITORY].files) == {".gitattributes"}


def test_what_is_there_is_written_over_only_with_replace(hub: Hub, adapter: Path) -> None:
    held = hub.put(REPOSITORY, NOTES__md=b"mine", adapter_model__bin=b"old")
    with pytest.raises(PublishError, match="holds files already"):
        pushed(adapter)
    assert set(held.files) == {"NOTES.md", "adapter_model.bin"}
    _, report = pushed(adapter, replace=True)
    assert report.removed == ("adapter_model.bin",)
    assert held.files["NOTES.md"] == b"mine"
    assert "adapter_model.bin" not in held.files


def test_a_public_repository_is_pushed_to_only_where_that_is_asked_for(hub: Hub, adapter: Path) -> None:
    hub.put(REPOSITORY, private=False)
    with pytest.raises(PublishError, match="is public"):
        pushed(adapter)
    assert hub.repositories[REPOSITORY].files == {}
    pushed(adapter, visibility="public")
    assert hub.repositories[REPOSITORY].files


def test_the_verb_lists_what_it_would_send_and_then_sends_it(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(adapter), "--repo", REPOSITORY, "--base", BASE]
    assert main([*command, "--dry-run"]) == 0
    assert "recipe.yaml" in capsys.readouterr().out
    assert hub.requests == []
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == hub.repositories[REPOSITORY].commits[-1]
    assert main(command) == 3
    assert "--replace" in capsys.readouterr().err
