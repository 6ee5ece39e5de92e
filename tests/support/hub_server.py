"""A hub on this machine: what huggingface_hub asks when a repository is made and written to, over HTTP."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest


@dataclass
class Repository:
    """A repository of the hub: what it holds, and its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        repositories: by id.
        uploads: large files that were sent, by sha256; they are in no repository before a commit names them.
        answers: statuses that are returned instead of the right one, by what the path ends with.
        broken: ends of paths at which the connection is closed without an answer.
        requests: method and path of each request.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    token: str = "hf_right"
    before_commit: Any = None

    def put(self, repository: str, *, private: bool = True, **files: bytes) -> Repository:
        """Make a repository that is there already."""
        made = Repository(private, {name.replace("__", "."): data for name, data in files.items()}, ["0" * 40])
        self.repositories[repository] = made
        return made


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if any(path.endswith(end) for end in self.hub.broken):
            self.close_connection = True
            self.connection.close()
            return
        status = next((code for end, code in self.hub.answers.items() if path.endswith(end)), None)
        if (
            status is None
            and not path.startswith("/upload/")
            and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        ):
            status = 401
        self._send(status, {"error": "no"}) if status else self._send(*self._route(path, body))

    def _send(self, status: int, fields: object) -> None:
        data = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> tuple[int, object]:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/upload/"):
            self.hub.uploads[path.removeprefix("/upload/")] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self._offer_upload(each) for each in json.loads(body)["objects"]]}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            return 200, {"files": [self._choose_mode(each) for each in json.loads(body)["files"]]}
        name, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if action:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return self._describe(path.removeprefix("/api/models/"))

    def _create(self, fields: dict[str, Any]) -> tuple[int, object]:
        name = f"{fields['organization']}/{fields['name']}"
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        private = fields.get("visibility", "public") == "private" or fields.get("private", False)
        self.hub.repositories[name] = Repository(private, {".gitattributes": b""}, ["0" * 40])
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}

    def _describe(self, name: str) -> tuple[int, object]:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        siblings = [{"rfilename": file} for file in repository.files]
        facts = {"id": name, "private": repository.private, "sha": repository.commits[-1], "siblings": siblings}
        return 200, {**facts, "tags": [], "downloads": 0, "likes": 0}

    def _choose_mode(self, fields: dict[str, Any]) -> dict[str, Any]:
        large = fields["path"].endswith((".safetensors", ".png"))
        return {"path": fields["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _offer_upload(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "actions": {"upload": {"href": f"{self.hub.url}/upload/{fields['oid']}"}}}

    def _commit(self, name: str, operations: list[dict[str, Any]]) -> tuple[int, object]:
        repository = self.hub.repositories[name]
        if self.hub.before_commit is not None:
            self.hub.before_commit(repository)
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header" and value.get("parentCommit") not in (None, repository.commits[-1]):
                return 412, {"error": "A commit has happened since. Please refresh and try again."}
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                data = self.hub.uploads[value["oid"]]
                assert (hashlib.sha256(data).hexdigest(), len(data)) == (value["oid"], value["size"])
                files[value["path"]] = data
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(hashlib.sha1(repr(sorted(files)).encode()).hexdigest())
        oid = repository.commits[-1]
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}


@contextlib.contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start a hub on the loopback address, and have huggingface_hub ask it with a right token."""
    import huggingface_hub.constants as constants

    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
