"""`make serve-check`: what the server promises, measured; with --write into `results/serve.json`.

python -m benchmarks.serving_check [exactness storm faults load load_wide zipf latency clients] [--short] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import serving_clients, serving_exact, serving_faults, serving_latency, serving_load
from benchmarks.harness import environment, quiet, read, write

MOST_MEMORY: Final = 1.05
"""After the second half of a storm, over that after its first."""


def parts(*, short: bool) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    rounds = 2 if short else 5
    return {
        "exactness": lambda: serving_exact.exactness(27 if short else 100),
        "storm": lambda: serving_exact.storm(20 if short else 200),
        "faults": serving_faults.faults,
        "load": lambda: serving_load.measure(rounds, peft_rounds=1 if short else 2, count=32 if short else 64),
        "load_wide": lambda: serving_load.measure(rounds, peft_rounds=0, base=serving_load.load_wide()),
        "zipf": lambda: serving_load.measure_zipf(1 if short else 3, offered=64 if short else 1000),
        "latency": lambda: serving_latency.latency(16 if short else 64),
        "clients": serving_clients.clients,
    }


def misses(result: Mapping[str, Any]) -> list[str]:
    """What does not hold of a result, a line each."""
    found = [f"{name}: {fact}" for name, holds, fact in facts(result) if not holds]
    for name in ("load", "load_wide", "zipf"):
        for ratio, (_, middle, _) in result.get(name, {}).get("ratios", {}).items():
            if middle < serving_load.AIMS[ratio]:
                found.append(f"{name}: {ratio} is {middle:.2f}; at least {serving_load.AIMS[ratio]:g} was expected")
    return found


def facts(result: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """Name, whether it holds, and what was found."""
    exact, storm, faults = (result.get(name, {}) for name in ("exactness", "storm", "faults"))
    found = []
    if exact:
        right = [exact["right"], exact["right, the cache warm"]]
        found.append(("exactness", all(each == exact["asked"] for each in right), f"{right} of {exact['asked']}"))
        planted = exact["right, with a cache that ignores the digest"]
        found.append(("a planted mistake", planted < exact["asked"], f"{planted} right"))
    if storm:
        is_well = not storm["wrong"] and not storm["failed"] and storm["memory"] < MOST_MEMORY
        found.append(("storm", is_well, json.dumps(storm)))
    if faults:
        found += [(name, faults[name] == expected, str(faults[name])) for name, expected in FAULTS.items()]
        name = "after kill -9: CPU seconds to the first answer"
        found.append((name, faults[name] < 5, str(faults[name])))
    clients = {name: told for name, told in result.get("clients", {}).items() if isinstance(told, dict)}
    if "vllm" in clients:
        asked, answered = clients["vllm"]["asked"], clients["vllm"]["answered"]
        found.append(("vllm bench serve", asked == answered, f"{answered} of {asked} answered"))
    if "schemathesis" in clients:
        wrong, requests = clients["schemathesis"]["wrong"], clients["schemathesis"]["requests"]
        found.append(("schemathesis", not wrong and requests > 500, f"{wrong} wrong of {requests:,}"))
    return found


FAULTS: Final[dict[str, Any]] = {
    "beyond the context": 400,
    "a token out of range": 400,
    "an unknown adapter": 404,
    "a folder deleted, and torn": [404, 400],
    "300 clients that hang up, then running": 0,
    "a full disk at the state file": {"status": 507, "the alias is not there": True, "with space again": 200},
    "good answers all the time": True,
    "after kill -9: labels, aliases, pins are there": True,
    "an exception in a layer, then the next request": [500, 200],
    "a stuck forward: health while it hangs, and after": [503, 200],
}
"""What each fault must give."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--short", action="store_true", help="fewer requests and rounds; seconds instead of minutes")
    parser.add_argument("--write", action="store_true", help="put the figures into results/serve.json")
    arguments = parser.parse_args()
    known = parts(short=arguments.short)
    if unknown := set(arguments.parts) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    quiet()
    result: dict[str, Any] = {}
    for name in arguments.parts or known:
        result[name] = known[name]()
        print(json.dumps({name: result[name]}, indent=2), flush=True)
    if arguments.write:
        held = {key: value for key, value in read("serve").items() if key in known and key not in environment()}
        write("serve", {**held, **result})
    if found := misses(result):
        print("\n".join(found), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
