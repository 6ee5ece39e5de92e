"""How a command lives in its process."""

from __future__ import annotations

import gc
import subprocess
import sys

from lora_kit.cli.process import collect_garbage_less_often

_AT_THE_END = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from lora_kit.cli.process import collect_garbage_less_often
for _ in range(2):
    with collect_garbage_less_often():
        pass
"""


def test_a_command_leaves_garbage_collection_as_it_was() -> None:
    before = gc.get_threshold()
    with collect_garbage_less_often():
        assert gc.get_threshold()[0] >= 5_000
    assert gc.get_threshold() == before


def test_what_the_user_chose_of_garbage_collection_stays() -> None:
    before = gc.get_threshold()
    try:
        for chosen in (0, 60_000):
            gc.set_threshold(chosen)
            with collect_garbage_less_often():
                assert gc.get_threshold()[0] == chosen
    finally:
        gc.set_threshold(*before)


def test_python_does_not_look_for_garbage_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", _AT_THE_END], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
