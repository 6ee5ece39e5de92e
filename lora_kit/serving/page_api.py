"""The page at `/`: static files of this package, which ask nothing of other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import FileResponse

from lora_kit.reporting.page import PALETTE

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
PAGE_FILES: Final = {
    "/": _FOLDER / "index.html",
    "/palette.css": PALETTE,
    "/page.css": _FOLDER / "page.css",
    "/page.js": _FOLDER / "page.js",
}
"""File by path."""

router = APIRouter(include_in_schema=False)


def _add_file(path: str, file: Path) -> None:
    @router.get(path)
    async def _send_file() -> FileResponse:
        return FileResponse(file, headers=_HEADERS)


for _path, _file in PAGE_FILES.items():
    _add_file(_path, _file)
