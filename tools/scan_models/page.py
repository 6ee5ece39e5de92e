"""docs/models-scan.md: how many classes work, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import transformers

from tools.scan_models.trial import CUT, FAILS, NOT_TRIED, REFUSED, WORKS

PAGE: Final = Path(__file__).parents[2] / "docs" / "models-scan.md"
_HEAD: Final = """# Every class of transformers

Made by `python -m tools.scan_models`, an opt-in job of half an hour. Of every model class of transformers {version} it
makes a tiny model with random weights, by shrinking the class's own default config, and tries an adapter with
`target_modules="all-linear"` on it, in fp32 on a CPU:

- attached, no output changes, bit for bit;
- two steps of training move the LoRA weights of every layer whose own weight receives a gradient when the model is
  trained alone;
- to the base and back is bit for bit;
- merged in memory, the outputs are those of the adapter, or the merge is refused with a reason.

A class is *not tried* where the tiny model does not run or train by itself: its sizes depend on each other in ways that
shrinking does not know, or it needs inputs that cannot be guessed. What [models](models.md) says of the families there
is tested in more depth.
"""


def write_page(rows: Mapping[str, Mapping[str, str]], *, total: int) -> None:
    """Write the page."""
    PAGE.write_text("\n".join([_HEAD.format(version=transformers.__version__), *_list_lines(rows, total)]) + "\n")


def _list_lines(rows: Mapping[str, Mapping[str, str]], total: int) -> Iterator[str]:
    counts = Counter(row["status"] for row in rows.values())
    families = {status: {r["family"] for r in rows.values() if r["status"] == status} for status in counts}
    yield "| | classes | families |"
    yield "|---|---|---|"
    yield f"| reached | {len(rows)} of {total} | {len({row['family'] for row in rows.values()})} |"
    for status in (WORKS, REFUSED, FAILS, NOT_TRIED):
        yield f"| {status} | {counts[status]} | {len(families.get(status, ()))} |"
    merges = sum("merge refused" in row["detail"] for row in rows.values() if row["status"] == WORKS)
    yield ""
    yield f"Of those that work, {merges} refuse the merge in memory, because weights are shared."
    for status, title in ((FAILS, "Fails"), (REFUSED, "Refused"), (NOT_TRIED, "Not tried")):
        yield f"\n## {title}\n"
        yield "| class | reason |"
        yield "|---|---|"
        for name, row in sorted(rows.items()):
            if row["status"] == status:
                yield f"| {name} | {_escape(row['detail'])} |"
    yield "\n## Works\n"
    yield ", ".join(name for name, row in sorted(rows.items()) if row["status"] == WORKS) + "."


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
