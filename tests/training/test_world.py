"""What the processes of a training decide together, and what becomes of them where one fails."""

from __future__ import annotations

import math
import queue
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import skip_first_batches
from torch import nn

from lora_kit.errors import REPORTED_ELSEWHERE, ConfigError, RecipeError, StorageError
from lora_kit.training.loop import world as module
from lora_kit.training.loop.dealt_batches import DealtBatches, deal_batches, take_share
from lora_kit.training.loop.heartbeat import Heartbeat
from lora_kit.training.loop.launcher import count_by_machine
from lora_kit.training.loop.signals import StopRequest
from lora_kit.training.loop.store_exchange import PeerError
from lora_kit.training.loop.world import ALONE, World, join_world
from tests.support.worlds import in_processes, in_threads


def test_every_process_gets_what_the_first_one_decides() -> None:
    def decide(world: World) -> tuple[int, bytes]:
        return world.ask_first(lambda: world.rank), world.ask_first(lambda: bytes([world.rank]) * 2**23)

    assert in_threads(decide, size=3) == [(0, bytes(2**23))] * 3


def test_values_are_gathered_in_the_order_of_the_processes_and_no_key_is_left() -> None:
    def gather(world: World) -> tuple[list[list[int]], int]:
        values = [world.gather(10 * turn + world.rank) for turn in range(5)]
        world.meet()
        return values, world._exchange._store.num_keys()

    for values, keys in in_threads(gather, size=3):
        assert values == [[10 * turn + rank for rank in range(3)] for turn in range(5)]
        assert keys < 20


def test_a_process_alone_decides_for_itself() -> None:
    assert ALONE.ask_first(lambda: 5) == 5
    assert ALONE.gather("a") == ["a"]
    ALONE.meet()
    with join_world() as world:
        assert world is ALONE


@pytest.mark.parametrize(
    ("local_ranks", "counts"),
    [((0, 1, 2), (3,)), ((0, 1, 0, 1), (2, 2)), ((0, 0, 1, 2), (3, 1)), ((0, 1, 2, 0, 1, 0), (3, 2, 1))],
)
def test_processes_are_counted_by_machine(local_ranks: tuple[int, ...], counts: tuple[int, ...]) -> None:
    assert count_by_machine(local_ranks) == counts


def test_processes_that_do_not_come_are_an_error_that_says_how_many_there_must_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_JOIN_TIMEOUT", timedelta(seconds=1))

    def wait() -> None:
        monkeypatch.setenv("WORLD_SIZE", "3")
        with join_world():
            pytest.fail("joined")

    (error,) = in_processes(wait, size=1)
    assert isinstance(error, StorageError)
    assert "3 processes should meet at 127.0.0.1" in str(error)
    assert "1/3 clients joined" in str(error)


def test_a_group_that_is_there_already_is_used_and_left_as_in_a_worker_of_ray() -> None:
    """Which makes it before it calls a function, in a thread that is not the main one."""

    def work() -> tuple[list[int], bool]:
        dist.init_process_group("gloo")
        found: list[Any] = []

        def train() -> None:
            for _ in range(2):
                with join_world() as world, StopRequest(alone=False):
                    found.append(world.gather(world.rank))

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        return found, dist.is_initialized()

    assert in_processes(work) == [([[0, 1]] * 2, True)] * 2


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two; a whole number from 1 was expected"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "1" * 5000}, "WORLD_SIZE is 1"),
        ({"RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE is 2, and RANK, MASTER_PORT not set"),
        ({"RANK": "2"}, "RANK is 2; a whole number from 0 to 1 was expected"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is -1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ],
)
def test_an_environment_that_is_not_of_a_launcher_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    for name, value in {**LAUNCHED, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), join_world():
        pytest.fail("joined")


def test_gradients_and_notes_are_summed_and_missing_ones_stay_missing() -> None:
    def work(world: World) -> tuple[Any, ...]:
        leaves = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in SHAPES]
        leaves[0].grad = torch.full((2, 3), 1.0 + world.rank).t().contiguous().t()
        if world.rank == 1:
            leaves[1].grad = torch.ones(4, dtype=torch.bfloat16)
        notes = world.sum_gradients(leaves, [torch.tensor(5.0), torch.tensor(world.rank)])
        return [leaf.grad for leaf in leaves], [float(note) for note in notes]

    for gradients, notes in in_threads(work):
        torch.testing.assert_close(gradients[0], torch.full((2, 3), 3.0))
        torch.testing.assert_close(gradients[1], torch.ones(4, dtype=torch.bfloat16))
        assert gradients[2] is None
        assert notes == [10.0, 1.0]


SHAPES = (((2, 3), torch.float32), ((4,), torch.bfloat16), ((2,), torch.float32))


def test_notes_are_summed_exactly_where_every_gradient_is_of_16_bits() -> None:
    def work(world: World) -> float:
        leaf = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        return float(world.sum_gradients([leaf], [torch.tensor(1001.0)])[0])

    assert in_threads(work) == [2002.0, 2002.0]


def test_the_error_of_one_process_is_raised_in_all_and_reported_by_one() -> None:
    def fail(world: World) -> None:
        if world.rank == 2:
            raise RecipeError("the recipe is wrong", hint="change it")
        world.meet()

    errors = in_threads(fail, size=3)
    assert [str(error) for error in errors] == ["the recipe is wrong (change it)"] * 3
    assert {type(error) for error in errors} == {RecipeError}
    assert [getattr(error, REPORTED_ELSEWHERE, False) for error in errors] == [False, True, True]


def test_an_error_that_cannot_be_pickled_is_passed_on_in_words() -> None:
    class Local(Exception):
        pass

    def fail(world: World) -> None:
        if world.rank == 0:
            raise Local("it is broken")
        world.meet()

    first, second = in_threads(fail)
    assert isinstance(first, Local)
    assert str(second) == "Local: it is broken"


def test_a_process_that_is_slow_to_notice_leaves_the_report_to_another(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)

    def fail(world: World) -> None:
        if world.rank == 0:
            time.sleep(0.5)
            raise PeerError("late")
        raise RecipeError("early")

    errors = in_threads(fail)
    assert [str(error) for error in errors] == ["early", "early"]
    assert [getattr(error, REPORTED_ELSEWHERE, False) for error in errors] == [True, False]


def test_a_lost_process_is_an_error_of_the_machine_that_says_how_to_resume(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)

    def lose(world: World) -> None:
        world.describe_resume = lambda: "resume from step 4"
        raise PeerError("Connection closed by peer")

    for error in in_threads(lose):
        assert isinstance(error, StorageError)
        assert "one of the 2 processes was lost" in str(error)
        assert "resume from step 4" in str(error)


def test_rows_are_dealt_in_their_order_and_a_short_batch_as_evenly_as_it_goes() -> None:
    batches = [[4, 1, 3, 0, 7, 9], [5, 2], [8]]

    def deal(world: World) -> list[list[int]]:
        return list(DealtBatches(batches if world.is_first else [], world))

    dealt = in_threads(deal, size=3)
    assert dealt == [[[4, 1], [5], [8]], [[3, 0], [2], []], [[7, 9], [], []]]
    for batch, *shares in zip(batches, *dealt, strict=True):
        assert [row for share in shares for row in share] == batch


def test_the_epoch_reaches_the_sampler_behind_a_dealt_loader() -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Sampler(range(4))
    loader = deal_batches(torch.utils.data.DataLoader(range(4), 2, sampler=sampler), ALONE)  # type: ignore[arg-type]
    skipping = skip_first_batches(loader, 1)
    for epoch, each in enumerate((loader, skipping), start=1):
        each.batch_sampler.batch_sampler.set_epoch(epoch)
        assert sampler.epoch == epoch


def test_shares_are_the_whole() -> None:
    for count in range(12):
        shares = [take_share(range(count), World(rank, 5)) for rank in range(5)]
        assert [row for share in shares for row in share] == list(range(count))
        assert max(map(len, shares)) == math.ceil(count / 5)


def test_a_process_that_beats_no_more_is_noticed_and_one_that_is_only_slow_is_not() -> None:
    store, lost = dist.HashStore(), queue.Queue[tuple[int, int | None]]()

    def start(rank: int) -> Heartbeat:
        beat = Heartbeat(
            store, rank, 3, on_lost=lambda other: lost.put((rank, other)), beat_seconds=0.02, lost_seconds=0.6
        )
        beat.start()
        return beat

    beats = [start(rank) for rank in range(3)]
    time.sleep(0.8)  # longer than what counts as lost
    assert lost.empty()
    beats[2].stop()
    assert {lost.get(timeout=20), lost.get(timeout=20)} == {(0, 2), (1, 2)}


def test_a_store_that_is_gone_is_noticed() -> None:
    lost = queue.Queue[int | None]()

    class Gone(dist.HashStore):
        def set(self, *_: object) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

    Heartbeat(Gone(), 0, 2, on_lost=lost.put, beat_seconds=0.02, lost_seconds=0.2).start()
    assert lost.get(timeout=20) is None


def test_a_signal_that_a_launcher_passes_on_is_the_one_that_was_received(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest(alone=False) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        now = time.monotonic()
        monkeypatch.setattr("time.monotonic", lambda: now + 60)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_a_process_alone_at_once() -> None:
    def receive_two() -> None:
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on after the second signal")

    with pytest.raises(SystemExit):
        receive_two()
