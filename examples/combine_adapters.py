"""Make one adapter of two, a smaller one of that, and compare them: python examples/combine_adapters.py"""

from __future__ import annotations

from pathlib import Path

import lora_kit as lk

STORE = Path(__file__).parents[1] / "adapters"


def main() -> None:
    """Combine in rank space, without a base, and say what a smaller rank loses."""
    both = lk.combine([(STORE / "pirate", 0.7), (STORE / "scene", 0.3)], method="cat")
    print(f"pirate and scene: rank {both.config.r}, error {both.record['made']['error']}")
    for rank in (8, 4):
        small = lk.resize(both, rank=rank)
        print(f"at rank {rank}: {small.num_parameters:,} weights, error {small.record['made']['error']}")
    both.save("adapters/pirate-scene")


if __name__ == "__main__":
    main()
