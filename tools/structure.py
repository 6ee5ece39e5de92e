"""What the tree of the package looks like, in numbers and places.

`python -m tools.structure` prints every finding and ends with 1 if something that must not occur does; with `--report`
it only prints. `tests/test_structure.py` asserts the same findings one by one.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from tools.words import (
    GENERATED_PAGES,
    GLOSSARY,
    NOT_PARTICIPLES,
    ORDINARY_PHRASES,
    ORDINARY_PLACES,
    PARTICIPLE_NAMES,
    PARTICIPLES,
)

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = ROOT / "lora_kit"
TESTS: Final = ROOT / "tests"
ROOMS: Final = (
    "version",
    "errors",
    "names",
    "cpu_threads",
    "io",
    "reporting",
    "config",
    "torch_utils",
    "ops",
    "layers",
    "adapter",
    "targets",
    "bank",
    "models",
    "data",
    "generation",
    "evaluation",
    "runs",
    "training",
    "sweeps",
    "merging",
    "algebra",
    "exporters",
    "publishing",
    "doctor",
    "demo",
    "serving",
    "cli",
    "__main__",
)
"""The rooms of the package in order: a module imports only from its own room and from rooms before it."""
REPEATED_FILES: Final = {
    "__init__.py": "every package has one",
    "__main__.py": "`python -m` looks for this name",
}
"""File names that may occur twice, with the reason. `cli/<verb>.py` may, too: it is named for its verb."""
MAX_FUNCTION_LINES: Final = 60
MAX_FILE_LINES: Final = 350
_LOG_METHODS: Final = {"debug", "info", "warning", "error", "exception", "critical", "warn"}
_NOT_PROSE: Final = (
    re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL),
    re.compile(r"^<!-- ([\w ]+): (?:begin|made by).*?^<!-- (?:\1: end|end of \1) -->$", re.MULTILINE | re.DOTALL),
    re.compile(r"\]\([^)\s]+\)"),
)
"""Fenced code, regions between marks that a program writes, and where links lead."""
_TABLE_ROW: Final = re.compile(r"^\|.*$", re.MULTILINE)
_MESSAGE_KEYWORDS: Final = {"hint", "help"}

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    """One place and what is there."""

    place: str
    what: str


@dataclass(frozen=True)
class Check:
    """A question about the tree, and whether every finding is a defect.

    Attributes:
        title: what is counted.
        find: returns the findings.
        fails: whether one finding is enough for exit status 1.
    """

    title: str
    find: Callable[[], list[Finding]]
    fails: bool = True


# Reading


def source_files(top: Path = PACKAGE) -> list[Path]:
    """Return the Python files under `top`, sorted."""
    return sorted(top.rglob("*.py"))


@functools.cache
def parse(file: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def room_of(file: Path) -> str:
    """Return the folder or module directly under the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def place_of(file: Path, line: int | None = None) -> str:
    """Return `path:line` from the root of the project."""
    return f"{file.relative_to(ROOT)}" + (f":{line}" if line else "")


def functions(file: Path) -> Iterator[Function]:
    """Yield the functions and methods of a file, nested ones too."""
    return (node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length_of(node: Function) -> int:
    """Return the number of lines from `def` to the last statement, docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


# Names


def repeated_file_names() -> list[Finding]:
    """Find file names that occur twice in the package, outside `cli/`."""
    places: dict[str, list[Path]] = defaultdict(list)
    for file in source_files():
        if file.name not in REPEATED_FILES and room_of(file) != "cli":
            places[file.name].append(file)
    return _findings_of_repeated(places)


def repeated_class_names() -> list[Finding]:
    """Find class names that are defined twice in the package."""
    places: dict[str, list[Path]] = defaultdict(list)
    for file in source_files():
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(file)
    return _findings_of_repeated(places)


def participle_names() -> list[Finding]:
    """Find functions whose name begins with a participle (`fitted`, `found_in`); a property is a value and may."""
    return [
        Finding(place_of(file, node.lineno), node.name)
        for file in source_files()
        for node in functions(file)
        if _begins_with_participle(node.name) and not _is_property(node)
    ]


def _begins_with_participle(name: str) -> bool:
    if name in PARTICIPLE_NAMES:
        return False
    first = name.lstrip("_").split("_")[0]
    return first in PARTICIPLES or (first.endswith("ed") and first not in NOT_PARTICIPLES)


def _is_property(node: Function) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


def _findings_of_repeated(places: dict[str, list[Path]]) -> list[Finding]:
    return [
        Finding(", ".join(place_of(file) for file in files), name)
        for name, files in sorted(places.items())
        if len(files) > 1
    ]


# Imports


def imported_modules(file: Path, top: Path = PACKAGE) -> Iterator[str]:
    """Yield the dotted names of everything a file imports, inside functions too; relative imports are made absolute."""
    package = [top.name, *file.relative_to(top).parts[:-1]]
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from lora_kit import bank` names a room; `from lora_kit.bank import attach` already does.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "lora_kit" else iter([module])


def imported_rooms(file: Path) -> set[str]:
    """Return the rooms of the package that a file imports from."""
    names = [name.split(".") for name in imported_modules(file)]
    return {parts[1] if len(parts) > 1 else "the package itself" for parts in names if parts[0] == "lora_kit"}


def upward_imports() -> list[Finding]:
    """Find imports from rooms that come later in `ROOMS`."""
    found = []
    for file in source_files():
        if file == PACKAGE / "__init__.py":
            continue
        allowed = set(ROOMS[: ROOMS.index(room_of(file)) + 1]) if room_of(file) in ROOMS else set()
        found += [Finding(place_of(file), room) for room in sorted(imported_rooms(file) - allowed)]
    return found


def imports_between_tests() -> list[Finding]:
    """Find test files that import from a test file; what tests share belongs to `tests/support/`."""
    return [
        Finding(place_of(file, node.lineno), ast.unparse(node))
        for file in source_files(TESTS)
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Import | ast.ImportFrom) and _imports_a_test(node)
    ]


def _imports_a_test(node: ast.Import | ast.ImportFrom) -> bool:
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    parts = [part for name in [*modules, *(alias.name for alias in node.names)] for part in name.split(".")]
    return parts[0] == "tests" and any(part.startswith("test_") for part in parts)


# Words


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of what people read: docstrings, and literals in `raise`, logging calls, hints and help."""
    for node in ast.walk(parse(file)):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_logged = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _LOG_METHODS
        is_message = isinstance(node, ast.keyword) and node.arg in _MESSAGE_KEYWORDS
        if is_docstring or is_logged or is_message or isinstance(node, ast.Raise):
            yield from _literals(node)


def _literals(node: ast.AST) -> Iterator[tuple[int, str]]:
    constants = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
    return ((part.lineno, part.value) for part in constants if isinstance(part.value, str))


def glossary_words() -> list[Finding]:
    """Find words that the glossary replaces, in prose; names of code and ordinary uses do not count."""
    found = {
        Finding(place_of(file, line + offset), f"{word!r}: say {better}")
        for file in source_files()
        for line, text in prose(file)
        for offset, word, better in _replaced_words(text, ordinary=_ordinary_text(place_of(file)))
    }
    return sorted(found)


def glossary_words_in_documents() -> list[Finding]:
    """Find words that the glossary replaces in the documents; code and generated tables do not count."""
    found = {
        Finding(place_of(page, 1 + offset), f"{word!r}: say {better}")
        for page in documents()
        for offset, word, better in _replaced_words(page_prose(page), ordinary=_ordinary_text(place_of(page)))
    }
    return sorted(found)


def documents() -> list[Path]:
    """Return the documents in Markdown: those at the top, of the adapters, and the pages of docs/."""
    return [*sorted(ROOT.glob("*.md")), ROOT / "adapters" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_prose(page: Path) -> str:
    """Return the text of a page with blanks, line by line, in place of code and of what a program writes."""
    text = page.read_text(encoding="utf-8")
    patterns = [*_NOT_PROSE, *([_TABLE_ROW] if place_of(page) in GENERATED_PAGES else [])]
    for pattern in patterns:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    return text


def _replaced_words(text: str, *, ordinary: re.Pattern[str]) -> Iterator[tuple[int, str, str]]:
    plain = ordinary.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    for pattern, better in GLOSSARY.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", plain, re.IGNORECASE):
            yield plain.count("\n", 0, match.start()), match.group(), better


@functools.cache
def _ordinary_text(place: str) -> re.Pattern[str]:
    """Return the pattern of the text of a file in which no word is looked for."""
    local = (pattern for (beginning, pattern) in ORDINARY_PLACES if place.startswith(beginning))
    phrases = "|".join([*ORDINARY_PHRASES, *local])
    return re.compile(rf"`[^`]*`|^ +\w+(, \w+)*:|\b(?:{phrases})\b", re.IGNORECASE | re.MULTILINE)


# Sizes


def long_functions() -> list[Finding]:
    """Find functions of more than `MAX_FUNCTION_LINES` lines."""
    return [
        Finding(place_of(file, node.lineno), f"{node.name}: {length_of(node)} lines")
        for file in source_files()
        for node in functions(file)
        if length_of(node) > MAX_FUNCTION_LINES
    ]


def long_files() -> list[Finding]:
    """Find files of more than `MAX_FILE_LINES` lines."""
    sizes = ((file, count_lines(file)) for file in source_files())
    return [Finding(place_of(file), f"{lines} lines") for file, lines in sizes if lines > MAX_FILE_LINES]


def uses_of_any() -> list[Finding]:
    """Count `Any` in annotations and code by room; import lines do not count."""
    counts: dict[str, int] = defaultdict(int)
    for file in source_files():
        counts[room_of(file)] += count_any(file)
    return [Finding(room, str(count)) for room, count in sorted(counts.items(), key=lambda item: -item[1]) if count]


def count_lines(file: Path) -> int:
    """Return the number of lines of a file."""
    return len(file.read_text(encoding="utf-8").splitlines())


def count_any(file: Path) -> int:
    """Return how often a file uses the name `Any` outside of imports, in quoted annotations too."""
    tokens = (node for node in ast.walk(parse(file)) if isinstance(node, ast.Name | ast.Attribute))
    return sum(getattr(node, "id", getattr(node, "attr", "")) == "Any" for node in tokens)


CHECKS: Final = (
    Check("file names that repeat", repeated_file_names),
    Check("class names that repeat", repeated_class_names),
    Check("functions that begin with a participle", participle_names),
    Check("imports that go upwards", upward_imports),
    Check("imports from test file to test file", imports_between_tests),
    Check("words that the glossary replaces", glossary_words),
    Check("words that the glossary replaces, in documents", glossary_words_in_documents),
    Check(f"functions over {MAX_FUNCTION_LINES} lines", long_functions),
    Check(f"files over {MAX_FILE_LINES} lines", long_files),
    Check("uses of Any by room", uses_of_any, fails=False),
)


# Printing


def print_check(check: Check) -> int:
    """Print a check's findings and return how many of them are defects."""
    found = check.find()
    total = sum(int(finding.what) for finding in found) if check.find is uses_of_any else len(found)
    print(f"{check.title}: {total}")
    for finding in found:
        print(f"  {finding.place}: {finding.what}")
    return len(found) if check.fails else 0


def print_sizes() -> None:
    """Print median, 90th percentile and maximum of the functions' lines, and a row for each room."""
    lengths = sorted(length_of(node) for file in source_files() for node in functions(file))
    p90 = statistics.quantiles(lengths, n=10)[-1]
    print(f"functions: {len(lengths)}, median {statistics.median(lengths):g}, p90 {p90:g}, longest {lengths[-1]} lines")
    print(f"\n{'room':<12} {'files':>5} {'lines':>6} {'Any':>4}  longest function")
    rooms: dict[str, list[Path]] = defaultdict(list)
    for file in source_files():
        rooms[room_of(file)].append(file)
    for room, files in sorted(rooms.items(), key=lambda item: item[0]):
        print(_row(room, files))
    print(_row("together", source_files()))


def _row(room: str, files: Iterable[Path]) -> str:
    files = list(files)
    lines, uses = sum(map(count_lines, files)), sum(map(count_any, files))
    longest = max(((length_of(node), node.name) for file in files for node in functions(file)), default=(0, "-"))
    return f"{room:<12} {len(files):>5} {lines:>6} {uses:>4}  {longest[1]} ({longest[0]})"


def main() -> int:
    """Print all checks and sizes; return 1 if a check fails and `--report` was not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only print; the exit status is 0")
    only_report = parser.parse_args().report
    defects = sum([print_check(check) for check in CHECKS])
    print_sizes()
    return 1 if defects and not only_report else 0


if __name__ == "__main__":
    sys.exit(main())
