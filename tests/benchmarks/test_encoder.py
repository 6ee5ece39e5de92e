"""What the encoder benchmark decides by itself: which rates are tried, which are best, and the order of the rows."""

from __future__ import annotations

from benchmarks.encoder import TRIED, Rates, best_of, in_batches, slug


def test_lora_has_as_many_tries_as_full_all_under_names_of_their_own() -> None:
    assert len(TRIED["lora"]) == len(TRIED["full"]) == 4
    for tried in TRIED.values():
        assert len({slug(rates) for rates in tried}) == len(tried)
    assert {rates.head for rates in TRIED["lora"]} == {rates.head for rates in TRIED["full"]}


def test_the_best_rates_are_those_of_the_highest_accuracy_and_of_equals_the_lowest() -> None:
    low, middle, high = Rates(0.001, 0.1), Rates(0.003, 0.01), Rates(0.003, 0.1)
    assert best_of({high: 0.6, low: 0.5, middle: 0.5}) == high
    assert best_of({high: 0.5, middle: 0.5, low: 0.4}) == middle


def test_every_epoch_has_every_row_once_in_batches_of_like_lengths() -> None:
    rows = [{"text": "x" * (n % 40 + 1), "label": n} for n in range(64)]
    found = in_batches(rows, 8, 16, seed=0)
    assert found == in_batches(rows, 8, 16, seed=0)
    for epoch in (found[:64], found[64:]):
        assert sorted(row["label"] for row in epoch) == list(range(64))
    spread = [len({len(row["text"]) for row in found[start : start + 8]}) for start in range(0, 128, 8)]
    assert max(spread) <= 8
    assert found[:64] != found[64:]
