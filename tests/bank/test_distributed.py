"""A model with a bank in torch's DistributedDataParallel: a plain loop in two processes trains what one would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lora_kit.bank.attach import attach
from lora_kit.config.lora_config import LoraConfig
from tests.support import tiny
from tests.support.worlds import in_processes

STEPS = 3


def run_loop(*, distributed: bool) -> dict[str, Tensor]:
    """Return what a loop of plain gradient descent trains, each process on its rows of the batch."""
    if distributed:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    model = tiny.llama()
    torch.manual_seed(0)
    bank = attach(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), name="sql")
    wrapped: Any = DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.SGD(bank.parameters("sql"), lr=1.0)
    batch = {name: rows.chunk(size)[rank] for name, rows in tiny.batch(rows=4).items()}
    for _ in range(STEPS):
        wrapped(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(bank.snapshot("sql").tensors)


def test_a_loop_in_two_processes_trains_what_one_does() -> None:
    expected = run_loop(distributed=False)
    for found in in_processes(lambda: run_loop(distributed=True)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_B" in name) > 1e-4


@pytest.mark.slow
def test_what_two_processes_train_is_the_same_in_both() -> None:
    first, second = in_processes(lambda: run_loop(distributed=True))
    assert all(torch.equal(first[name], second[name]) for name in first)
