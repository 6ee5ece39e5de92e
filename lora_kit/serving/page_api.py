"""The page at `/`: static files of this package, which ask nothing of other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import FileResponse

_FOLDER: Final = Path(__file__).parent / "page"
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing but this server's own files runs in the page, whatever an adapter or a model writes."""
PAGE_FILES: Final = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
"""File by path."""

router = APIRouter(include_in_schema=False)


def _add_file(path: str, name: str) -> None:
    @router.get(path)
    async def _send_file() -> FileResponse:
        return FileResponse(_FOLDER / name, headers=_HEADERS)


for _path, _name in PAGE_FILES.items():
    _add_file(_path, _name)
