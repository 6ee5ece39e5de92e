"""A page that shows a training as it goes, served on this machine only, from files that are only read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from lora_kit.errors import LoraKitError, StorageError
from lora_kit.reporting.page import PALETTE
from lora_kit.runs.run_status import read_status

_PAGE: Final = Path(__file__).with_name("run_page.html")
_PALETTE_MARK: Final = "/* palette */\n"
"""Where the colors stand in it."""
_ADDRESS: Final = "127.0.0.1"
_HOSTS: Final = (_ADDRESS, "localhost")
"""Names under which a browser on this machine asks; another one is a page that pretends to be this machine."""
_MAX_POINTS: Final = 2_000
"""Lines of a log that are sent to the page, at most: the newest, and of the others every so many."""


class RunPageServer(ThreadingHTTPServer):
    """Serves the page of one training.

    Args:
        out: of the training.
        port: on the loopback interface; 0 for any that is free.

    Raises:
        StorageError: the port is taken, or not allowed.
    """

    daemon_threads = True

    def __init__(self, out: Path, *, port: int) -> None:
        self.out = out
        page = _PAGE.read_text("utf-8").replace(_PALETTE_MARK, PALETTE.read_text("utf-8"))
        self.page, self.policy = page.encode(), _build_policy(page)
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            what = f"port {port} of {_ADDRESS} cannot be used: {getattr(error, 'strerror', None) or error}"
            raise StorageError(what, hint="--port 0 takes one that is free") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{_ADDRESS}:{self.server_port}/"

    def read_state(self) -> bytes:
        """Return the state of the training as JSON, or the error that says why it is not known."""
        try:
            status = read_status(self.out)
        except LoraKitError as error:
            return json.dumps({"out": str(self.out), "state": "unknown", "error": str(error), "log": []}).encode()
        thinned = status.log[:: -(-len(status.log) // _MAX_POINTS) or 1]
        log = thinned if not status.log or thinned[-1] is status.log[-1] else (*thinned, status.log[-1])
        return json.dumps({**status.to_json(), "log": [dict(entry) for entry in log]}).encode()


def serve_run_page(out: Path, *, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve the page of a training until the process is interrupted.

    Args:
        on_ready: called with the address once it is served.

    Raises:
        StorageError: the port cannot be used.
    """
    with RunPageServer(out, port=port) as server:
        on_ready(server.url)
        server.serve_forever()


def _build_policy(page: str) -> str:
    """Return a content security policy that runs nothing but the page's own script, whatever a log says."""
    (script,), (style,) = (
        re.findall(r"<script>(.*?)</script>", page, re.S),
        re.findall(r"<style>(.*?)</style>", page, re.S),
    )
    allowed = "; ".join(f"{kind}-src {_hash_source(text)}" for kind, text in (("script", script), ("style", style)))
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"{closed}; {allowed}; connect-src 'self'"


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Handler(BaseHTTPRequestHandler):
    """Answers requests for the page and for the state."""

    server: RunPageServer

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in _HOSTS:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.path == "/":
            self._send(self.server.page, "text/html; charset=utf-8")
        elif self.path == "/state.json":
            self._send(self.server.read_state(), "application/json")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log no request: the page asks every second."""
