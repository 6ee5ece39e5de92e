"""The generated parts of the READMEs and the plots, from the results: nothing here measures, no number is typed."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import HERE, README, RESULTS, quartiles, ratio, read, replace_marked, table
from benchmarks.training_step import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUITES: Final = (
    "training_step",
    "inference",
    "op_counts",
    "load_and_swap",
    "merge",
    "resize",
    "end_to_end",
    "quantized",
    "breakdown",
)
"""What `python -m benchmarks` measures; the other questions have commands of their own."""
_COLORS: Final = {"lora_kit": "tab:green", "peft": "tab:orange", "full fine-tuning": "0.6"}


def suite(name: str) -> Any:
    """Return the module of a suite: its `rows()` measure, its `page(rows)` is the tables of its section."""
    return importlib.import_module(f"benchmarks.{name}")


def write_all() -> None:
    """Every page and plot whose result is there."""
    rows = {name: read(name).get("rows", {}) for name in SUITES}
    if rows["training_step"] and rows["inference"]:
        draw_ratios({**rows["training_step"], **rows["inference"]}, RESULTS / "ratios.svg")
    if loads := _loads(rows["load_and_swap"]):
        draw_loads(loads["load_ms"], RESULTS / "loads.svg")
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Return `benchmarks/README.md` and the repository's README with everything in them that is generated.

    Raises:
        ValueError: a page has no marks for what belongs into it.
    """
    results = {name: read(name) for name in SUITES}
    rows = {name: result.get("rows", {}) for name, result in results.items()}
    text = replace_marked(README.read_text(encoding="utf-8"), headline(rows), mark="table")
    for name, result in results.items():
        if result:
            text = replace_marked(text, section(name, result), mark=name)
    found = {README: text}
    if all(rows.values()):
        front = HERE.parent / "README.md"
        found[front] = replace_marked(front.read_text(encoding="utf-8"), speed(rows), mark="speed")
    return found


def section(name: str, result: Mapping[str, Any]) -> str:
    """Return a suite's section: its question, how it is answered, the command, the tables, and where they were made."""
    module = suite(name)
    question, _, method = (module.__doc__ or "").strip().partition("\n\n")
    command = f"    python -m benchmarks {name} --write"
    return "\n\n".join([f"## {question}", method, command, module.page(result["rows"]), made(result)])


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
    if loads := _loads(rows["load_and_swap"]):
        lines += [_swap_line(loads["swap_us"]), _load_line(loads["load_ms"])]
    lines += [_job_line(label, row["ratios"]) for label, row in rows["end_to_end"].items()]
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


def speed(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the repository's README says about speed: a line on the conditions and a short table."""
    made_on = read("training_step")
    machine, peft = made_on["machine"], made_on["versions"]["peft"]
    conditions = (
        f"Medians on {machine['device']} with {machine['threads']} threads, PEFT {peft} beside it in the same run "
        "([benchmarks](benchmarks/README.md)); × is the time over that of the frozen base without adapters, "
        "unless another peer is named."
    )
    lines = [
        *_ratio_lines(rows),
        *_load_lines(_loads(rows["load_and_swap"])),
        _merge_line(rows["merge"]),
        _jobs_line(rows["end_to_end"]),
        _start_line(rows["load_and_swap"]["start"]),
    ]
    return f"{textwrap.fill(conditions, 120)}\n\n{table(['work', 'lora_kit', 'PEFT'], lines)}"


def _ratio_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows whose time is divided by that of the frozen base."""
    fp32, bf16, dora = Setting("fp32").label, Setting("bf16").label, Setting("fp32", variant="DoRA").label
    named = {
        "training step, fp32": rows["training_step"][f"training step, {fp32}"],
        "training step, bf16": rows["training_step"][f"training step, {bf16}"],
        "training step of a DoRA, fp32": rows["training_step"][f"training step, {dora}"],
        "decoding 8 rows with 8 adapters": rows["inference"]["decode 8 adapters in 8 rows, fp32"],
        "decoding 32 rows with 32 adapters": rows["inference"]["decode 32 adapters in 32 rows, fp32"],
        "decoding 8 rows with one DoRA": rows["inference"]["decode 1 adapter in 8 rows, fp32, DoRA"],
        "prefill of 8 × 64 tokens with 8 adapters": rows["inference"]["prefill 8 adapters in 8 rows, fp32"],
    }
    cases = ("lora_kit", "peft")
    return [[work, *(f"{row['timings'][case]['ratio']:.2f} ×" for case in cases)] for work, row in named.items()]


def _load_lines(loads: Mapping[str, Any]) -> list[list[str]]:
    """Return what a swap and a further load take."""
    most = max(loads["swap_us"]["lora_kit"], key=int)
    own, other = (loads["swap_us"][case][most][1] for case in ("lora_kit", "peft"))
    cells = ["{:,.0f} → {:,.0f} ms".format(*_early_late(loads["load_ms"][case])) for case in ("lora_kit", "peft")]
    return [
        [f"swap, {most} adapters in 224 layers", f"{own:.1f} µs", f"{other / 1e3:,.0f} ms"],
        [f"loading one more, at the beginning → with {most} loaded", *cells],
    ]


def _merge_line(rows: Mapping[str, Any]) -> list[str]:
    """Return what the largest merge takes, divided by a copy of the folder; PEFT does not check what it wrote."""
    label, row = list(rows.items())[-1]
    own, other = (
        f"{row['timings'][case]['ratio']:.2f} ×, {row['bytes'][case] / 1e6:,.0f} MB" for case in ("lora_kit", "peft")
    )
    work = f"merge into {label.removeprefix('merge, ')}, beside copying and hashing them; memory"
    return [work, f"{own}, verified", f"{other}, not verified"]


def _jobs_line(rows: Mapping[str, Any]) -> list[str]:
    """Return what whole trainings take beside TRL, over all settings."""
    speeds, shares = (sorted(row["ratios"][key][1] for row in rows.values()) for key in ("speed", "bytes"))
    own = f"{speeds[0]:.2f}–{speeds[-1]:.2f} × the tokens/s, {shares[0]:.2f}–{shares[-1]:.2f} × the memory"
    return [f"whole trainings in {len(rows)} settings with the same losses, beside TRL with PEFT", own, "1"]


def _start_line(start: Mapping[str, Any]) -> list[str]:
    """Return what starting takes."""
    own = f"{start['import_ms']['lora_kit'][1]:.0f} ms; {start['timings']['lora-kit --help']['median']:.2f} s"
    peft = f"{start['import_ms']['peft'][1]:,.0f} ms; –"
    return ["import beyond torch; `lora-kit --help`", own, peft]


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
