"""The page at `/`: its files fit together, ask nothing of other machines and put no text in as markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import lora_kit as lk
from lora_kit.reporting.page import PALETTE
from lora_kit.runs import run_page
from lora_kit.serving import page_api
from lora_kit.serving.http_app import build_app
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.server_settings import ServerSettings
from tests.support import random_adapters

FOLDER = Path(page_api.__file__).parent / "page"
HTML, SCRIPT, STYLE = ((FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", "page.js", "page.css"))


class Elements(HTMLParser):
    """The ids of a page, what its labels are for, and its elements with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside_label: list[bool] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside_label.append("label" in self._open)
        if tag not in ("input", "meta", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag


PAGE = Elements(HTML)
IDS = [own["id"] for _, own in PAGE.elements if own.get("id")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = tmp_path_factory.mktemp("store")
    adapter = random_adapters.made(lk.load_base("kit-base", dtype="fp32"), seed=0, target_modules=["q_proj"], r=2)
    adapter.save(store / "one")
    served = ServedModel(ServerSettings(base="kit-base", store=store, dtype="fp32", slots=1, max_rank=4, rows=2))
    with TestClient(build_app(served), base_url="http://127.0.0.1") as client:
        yield client
    served.close()


def test_every_file_is_sent_with_a_policy_that_lets_nothing_else_run(client: TestClient) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/palette.css", "text/css"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
    ):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/page/index.html").status_code == 404


def test_every_color_that_a_page_names_is_in_the_palette() -> None:
    """It is written once, for this page and for that of a training."""
    colors = set(re.findall(r"(--[\w-]+):", PALETTE.read_text("utf-8")))
    for text in (STYLE, (Path(run_page.__file__).with_name("run_page.html")).read_text("utf-8")):
        named = set(re.findall(r"var\((--[\w-]+)\)", text))
        assert named
        assert named <= colors
        assert not re.search(r"--[\w-]+:\s*(?:light-dark|#)", text)


def test_no_file_asks_anything_of_another_machine_or_makes_markup_of_text() -> None:
    for text in (HTML, SCRIPT, STYLE):
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|\.on[a-z]+ ?=", SCRIPT
    )
    assert not [own for _, own in PAGE.elements if any(name.startswith("on") or name == "style" for name in own)]


def test_the_script_finds_every_element_that_it_looks_for() -> None:
    assert len(IDS) == len(set(IDS))
    assert set(re.findall(r'byId\("([^"]+)"\)', SCRIPT)) <= set(IDS)
    named = [
        own[name] for _, own in PAGE.elements for name in ("for", "aria-labelledby", "aria-describedby") if name in own
    ]
    assert named
    assert set(named) <= set(IDS)


def test_every_field_has_a_label() -> None:
    targets = {own.get("for") for tag, own in PAGE.elements if tag == "label"}
    for (tag, own), is_inside in zip(PAGE.elements, PAGE.inside_label, strict=True):
        if tag in ("input", "select", "textarea"):
            assert is_inside or own.get("id") in targets, own


def test_every_path_of_the_script_is_one_of_the_api(client: TestClient) -> None:
    known = {re.sub(r"\{\w+\}", "*", path) for path in client.get("/openapi.json").json()["paths"]}
    used = re.findall(r'[`"](v1/[^`"]*|metrics)[`"]', SCRIPT)
    assert len(used) > 8
    assert {"/" + re.sub(r"\$\{[^}]*\}", "*", path) for path in used} <= known


def test_an_answer_names_the_content_that_gave_it(client: TestClient) -> None:
    body = {"model": "one", "prompt": "The fox", "max_tokens": 2}
    digest = client.get("/v1/adapters/one").json()["digest"]
    for streams in (False, True):
        answer = client.post("/v1/completions", json={**body, "stream": streams})
        assert answer.headers["lora-kit-digest"] == digest
    assert "lora-kit-digest" not in client.post("/v1/completions", json={**body, "model": "kit-base"}).headers


def test_a_card_is_sent_as_it_is_and_only_that_of_an_adapter(client: TestClient) -> None:
    adapter = client.get("/v1/adapters/one").json()
    assert adapter["card"].startswith("---") or adapter["card"].startswith("#")
    assert adapter["rank"] == 2
    for label in ("nothing", "..", "kit-base", "%2e%2e%2fone"):
        assert client.get(f"/v1/adapters/{label}").status_code in (404, 405)
