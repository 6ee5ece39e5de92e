"""What the encoder benchmark decides by itself: the next rate to try, and the order of the rows."""

from __future__ import annotations

from benchmarks.encoder.encoder import best_of, beyond, in_batches


def test_a_rate_is_tried_beyond_the_best_one_until_it_lies_between_others() -> None:
    judged = {0.001: 0.2, 0.003: 0.5, 0.01: 0.6}
    assert beyond(judged) == [0.03]
    assert beyond({**judged, 0.03: 0.7}) == [0.1]
    assert beyond({**judged, 0.03: 0.4}) == []
    assert beyond({0.001: 0.6, 0.003: 0.5, 0.01: 0.4}) == [0.0003]
    assert best_of({0.01: 0.5, 0.003: 0.5, 0.001: 0.1}) == 0.003


def test_every_epoch_has_every_row_once_in_batches_of_like_lengths() -> None:
    rows = [{"text": "x" * (n % 40 + 1), "label": n} for n in range(64)]
    found = in_batches(rows, 8, 16, seed=0)
    assert found == in_batches(rows, 8, 16, seed=0)
    for epoch in (found[:64], found[64:]):
        assert sorted(row["label"] for row in epoch) == list(range(64))
    spread = [len({len(row["text"]) for row in found[start : start + 8]}) for start in range(0, 128, 8)]
    assert max(spread) <= 8
    assert found[:64] != found[64:]
