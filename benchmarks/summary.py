"""The pages and plots, made from the results: nothing here measures, and no number of a page is typed."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import RESULTS, filled, quartiles, ratio, read, table
from benchmarks.training.training import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUITES: Final = ("training", "inference", "counts", "control", "merge", "algebra", "job", "quantized")
_HERE: Final = Path(__file__).resolve().parent
_COLORS: Final = {"lora_kit": "tab:green", "peft": "tab:orange", "full fine-tuning": "0.6"}


def suite(name: str) -> Any:
    """The module of a suite: `rows()` measures, `page(results)` tells."""
    return importlib.import_module(f"benchmarks.{name}.{name}")


def write_all() -> None:
    """Every page and plot whose result is there."""
    rows = {name: read(name).get("rows", {}) for name in SUITES}
    if rows["training"] and rows["inference"]:
        draw_ratios({**rows["training"], **rows["inference"]}, RESULTS / "ratios.svg")
    if loads := _loads(rows["control"]):
        draw_loads(loads["load_ms"], RESULTS / "loads.svg")
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """What the pages say: one per suite, the table of `benchmarks/README.md`, a paragraph of the repository's README.

    Raises:
        ValueError: a page has no marks for what belongs into it.
    """
    results = {name: read(name) for name in SUITES}
    rows = {name: result.get("rows", {}) for name, result in results.items()}
    found = {_HERE / name / "README.md": page(name, result) for name, result in results.items() if result}
    found[_HERE / "README.md"] = filled(_HERE / "README.md", headline(rows))
    if all(rows.values()):
        found[_HERE.parent / "README.md"] = filled(_HERE.parent / "README.md", prose(rows), mark="speed")
    return found


def page(name: str, result: Mapping[str, Any]) -> str:
    """A suite's page: its question, how to ask it, the tables, and where they were made."""
    module = suite(name)
    question, _, method = (module.__doc__ or "").strip().partition("\n\n")
    parts = [
        f"# {question}",
        method,
        f"    python -m benchmarks {name} --write",
        module.page(result["rows"]),
        made(result),
    ]
    return "\n\n".join(parts) + "\n"


def made(result: Mapping[str, Any]) -> str:
    """Versions and machine in a line."""
    machine = result["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
    return f"{machine['device']}, {machine['threads']} of {machine['cores']} cores; {versions}."


def headline(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of `benchmarks/README.md`: every row that has an aim, and what has no floor."""
    lines = []
    for name in SUITES:
        for label, row in suite(name).rows().items():
            if row.aim and label in rows[name]:
                lines.append([label, *_cells(rows[name][label]), f"≤ {row.aim:g}"])
    if loads := _loads(rows["control"]):
        lines += [_swap_line(loads["swap_us"]), _load_line(loads["load_ms"])]
    lines += [_job_line(label, row["ratios"]) for label, row in rows["job"].items()]
    return table(["work", "floor", "lora_kit", "peft", "aim"], lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Floor, lora_kit and PEFT of a row: ratios to the floor where it was timed, else what was counted."""
    if "timings" in row:
        timings = row["timings"]
        floor = f"{1e3 * next(iter(timings.values()))['median']:,.0f} ms"
        return [floor, f"{ratio(timings['lora_kit'])} ×", f"{ratio(timings['peft'])} ×"]
    counted = next(iter(row.values()))
    return ["–", *(f"{counted[case]:.2f}" for case in ("lora_kit", "peft"))]


def _loads(control: Mapping[str, Any]) -> dict[str, Any]:
    return next((row for row in control.values() if "load_ms" in row), {})


def _swap_line(swap_us: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    most = max(swap_us["lora_kit"], key=int)
    own, other = swap_us["lora_kit"][most], swap_us["peft"][most]
    return [f"swap, {most} adapters in 224 layers", "–", f"{own[1]:,.1f} µs", f"{other[1]:,.0f} µs", "≤ 50 µs"]


def _load_line(load_ms: Mapping[str, Sequence[float]]) -> list[str]:
    cells = ["{:,.0f} → {:,.0f} ms".format(*_early_late(load_ms[case])) for case in ("lora_kit", "peft")]
    count = len(load_ms["lora_kit"])
    return [f"load one more, the 2nd–9th → the last 8 of {count}", "–", *cells, "flat"]


def prose(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the repository's README says about speed."""
    loads, start = _loads(rows["control"]), rows["control"]["start"]
    most = max(loads["swap_us"]["lora_kit"], key=int)
    own_swap, other_swap = (loads["swap_us"][case][most][1] for case in ("lora_kit", "peft"))
    own, other = (_early_late(loads["load_ms"][case]) for case in ("lora_kit", "peft"))

    def times(suite_name: str, label: str) -> str:
        timings = rows[suite_name][label]["timings"]
        return f"{timings['lora_kit']['ratio']:.2f} × (PEFT: {timings['peft']['ratio']:.2f})"

    fp32, bf16, dora = Setting("fp32").label, Setting("bf16").label, Setting("fp32", variant="DoRA").label
    made_on = read("training")
    machine, peft = made_on["machine"], made_on["versions"]["peft"]
    sentences = [
        f"On {machine['device']} with {machine['threads']} threads, PEFT {peft} beside it in the same run",
        "([benchmarks](benchmarks/)), medians: of the frozen base's time a training step takes",
        f"{times('training', f'training step, {fp32}')} in fp32",
        f"and {times('training', f'training step, {bf16}')} in bf16; decoding a batch of 8 with 8 different",
        f"adapters {times('inference', 'decode 8 adapters in 8 rows, fp32')}, of 32 with 32",
        f"{times('inference', 'decode 32 adapters in 32 rows, fp32')},",
        f"a prefill of 8 × 64 tokens with 8 adapters {times('inference', 'prefill 8 adapters in 8 rows, fp32')}.",
        f"A DoRA's training step takes {times('training', f'training step, {dora}')}, decoding with one",
        f"{times('inference', 'decode 1 adapter in 8 rows, fp32, DoRA')}.",
        _jobs(rows["job"]),
        f"With {most} adapters loaded in 224 layers a swap takes {own_swap:.1f} µs (PEFT: {other_swap / 1e3:.0f} ms);",
        f"loading one more takes {own[0]:.0f} ms at the beginning and {own[1]:.0f} ms at the end",
        f"(PEFT: {other[0]:.0f} and {other[1]:.0f} ms).",
        _merge(rows["merge"]),
        f"`import lora_kit` takes {start['import_ms']['lora_kit'][1]:.0f} ms beyond torch,",
        f"`lora-kit --help` {start['timings']['lora-kit --help']['median']:.2f} s.",
    ]
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def _jobs(rows: Mapping[str, Any]) -> str:
    """What whole trainings cost, over all settings."""
    speeds, shares = (sorted(row["ratios"][key][1] for row in rows.values()) for key in ("speed", "bytes"))
    return (
        f"Whole trainings in {len(rows)} settings run at {speeds[0]:.2f} to {speeds[-1]:.2f} × the tokens/s of TRL "
        f"with PEFT, in {shares[0]:.2f} to {shares[-1]:.2f} × its memory above the loaded model, with the same losses."
    )


def _merge(rows: Mapping[str, Any]) -> str:
    """What the largest merge costs."""
    label, row = list(rows.items())[-1]
    own, other = (
        f"{row['timings'][case]['ratio']:.2f} × and {row['bytes'][case] / 1e6:,.0f} MB of memory"
        for case in ("lora_kit", "peft")
    )
    return (
        f"Of the time of copying and hashing the files, a merge into {label.removeprefix('merge, ')} takes {own} "
        f"(PEFT, which does not check what it wrote: {other})."
    )


def _job_line(label: str, ratios: Mapping[str, Sequence[float]]) -> list[str]:
    own = f"{ratios['speed'][1]:.2f} × the tokens/s, {ratios['bytes'][1]:.2f} × the memory of TRL"
    return [f"whole {label}", "–", own, "TRL with PEFT: 1", "≥ 1.3 ×, ≤ 0.8 ×"]


def _early_late(load_ms: Sequence[float]) -> tuple[float, float]:
    """Medians of the 2nd to the 9th load, and of the last eight."""
    return quartiles(load_ms[1:9])[1], quartiles(load_ms[-8:])[1]


# Plots


def draw_ratios(rows: Mapping[str, Any], file: Path) -> None:
    """Every timed row: the ratio to its floor, with quartiles."""
    timed = {label: row["timings"] for label, row in rows.items() if "timings" in row}
    axes, save = _figure(9, 0.27 * len(timed) + 1.2)
    for place, timings in enumerate(timed.values()):
        for case, color in _COLORS.items():
            if case in timings:
                found = timings[case]
                ends = [[found["ratio"] - found["low"]], [found["high"] - found["ratio"]]]
                name = case if place == 0 else None
                axes.errorbar(found["ratio"], place, xerr=ends, fmt="o", markersize=4, color=color, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(timed)), labels=list(timed), fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="time over that of the frozen base (median, quartiles)", xscale="log")
    ticks = [1, 1.25, 1.5, 2, 3, 4, 6, 8]
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(file)


def draw_loads(load_ms: Mapping[str, Sequence[float]], file: Path) -> None:
    """The time of every load, the first to the last."""
    axes, save = _figure(7, 3.2)
    for case, values in load_ms.items():
        axes.plot(range(1, len(values) + 1), values, ".-", markersize=4, linewidth=0.8, color=_COLORS[case], label=case)
    axes.set(xlabel="adapter", ylabel="ms to load it", yscale="log", title="one more adapter, 224 layers")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    save(file)


def _figure(width: float, height: float) -> tuple[Axes, Any]:
    """Axes, and a function that saves them as an SVG whose bytes depend on what is drawn alone."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)

    def save(file: Path) -> None:
        with matplotlib.rc_context({"svg.hashsalt": "lora_kit", "svg.fonttype": "none"}):
            figure.savefig(file, format="svg", metadata={"Date": None})

    return figure.subplots(), save
