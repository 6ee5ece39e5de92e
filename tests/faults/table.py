"""The table of faults, by area."""

from __future__ import annotations

from collections.abc import Mapping

from tests.faults.bases import BASES
from tests.faults.changing import CHANGING
from tests.faults.computing import LAYERS, ROUTING
from tests.faults.configs import CONFIGS
from tests.faults.exports import EXPORTS
from tests.faults.fault import Fault
from tests.faults.foreign_files import FILES
from tests.faults.hostile import RECIPES, RECORDS, SAID
from tests.faults.labels import ARGUMENTS, LABELS
from tests.faults.overlaps import OVERLAPS
from tests.faults.row_files import DATA
from tests.faults.running import RUNNING
from tests.faults.sweeps import SWEEPS
from tests.faults.weight_files import WEIGHT_FILES
from tests.faults.writing import WRITING

AREAS: Mapping[str, tuple[Fault, ...]] = {
    "weight file": WEIGHT_FILES,
    "config": CONFIGS,
    "base": BASES,
    "writing": WRITING,
    "an output that is an input": OVERLAPS,
    "running": RUNNING,
    "routing": ROUTING,
    "layers": LAYERS,
    "files of others": FILES,
    "files for others": EXPORTS,
    "rows": (*DATA, *LABELS),
    "recipe": (*RECIPES, *ARGUMENTS),
    "record": RECORDS,
    "sweep": SWEEPS,
    "what is said": SAID,
    "read while it changes": CHANGING,
}
