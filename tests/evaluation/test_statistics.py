"""Correlations, ranks, AUROC, F1 of sets and thresholds, by hand and against torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, multilabel_f1_score
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from lora_kit.evaluation.scores import score_labels
from lora_kit.evaluation.statistics import (
    compute_auroc,
    compute_mean_absolute_error,
    compute_pearson,
    compute_ranks,
    compute_spearman,
)
from lora_kit.evaluation.thresholds import choose_thresholds

X = torch.tensor([1.0, 2.0, 2.0, 4.0, 5.0])
Y = torch.tensor([2.0, 1.0, 3.0, 3.0, 9.0])


def test_correlations_are_what_they_are_by_hand_and_elsewhere() -> None:
    assert compute_ranks(X).tolist() == [1.0, 2.5, 2.5, 4.0, 5.0]
    assert compute_pearson(X, Y) == pytest.approx(16.6 / math.sqrt(10.8 * 39.2))
    assert compute_spearman(X, Y) == pytest.approx(7.25 / 9.5)
    assert compute_mean_absolute_error(X, Y) == pytest.approx(1.6)
    torch.manual_seed(0)
    one, other = torch.randn(50).round(decimals=1), torch.randn(50).round(decimals=1)
    assert compute_pearson(one, other) == pytest.approx(float(pearson_corrcoef(one, other)), abs=1e-6)
    assert compute_spearman(one, other) == pytest.approx(float(spearman_corrcoef(one, other)), abs=1e-5)


def test_what_does_not_vary_has_no_correlation() -> None:
    assert math.isnan(compute_pearson(torch.ones(4), X[:4]))
    assert math.isnan(compute_spearman(X[:1], Y[:1]))
    assert math.isnan(compute_auroc(X, torch.ones(5, dtype=torch.bool)))


def test_auroc_counts_pairs_and_a_tie_half() -> None:
    scores, has_label = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True])
    assert compute_auroc(scores, has_label) == 3.5 / 4
    torch.manual_seed(0)
    scores, has_label = torch.rand(40).round(decimals=1), torch.rand(40) > 0.5
    assert compute_auroc(scores, has_label) == pytest.approx(float(binary_auroc(scores, has_label.long())), abs=1e-6)


def test_f1_of_sets_is_counted_label_by_label() -> None:
    torch.manual_seed(0)
    true, predicted = torch.randint(0, 2, (20, 3)), torch.randint(0, 2, (20, 3))
    rows = [[row.nonzero().flatten().tolist() for row in each] for each in (true, predicted)]
    names = ("accuracy", "f1", "f1_micro", "f1_macro", "f1_per_label")
    found = score_labels(names, *rows, labels="abc", is_set=True)
    each = multilabel_f1_score(predicted, true, num_labels=3, average="none").tolist()
    assert [found[f"f1[{name}]"] for name in "abc"] == pytest.approx(each)
    assert found["f1_macro"] == found["f1"] == pytest.approx(sum(each) / 3)
    assert found["f1_micro"] == pytest.approx(float(multilabel_f1_score(predicted, true, 3, average="micro")))
    assert found["accuracy"] == (true == predicted).all(1).float().mean()
    assert "f1_per_label" not in found
    assert score_labels(["f1_micro", "f1_macro"], [[]], [[]], labels="ab", is_set=True) == {
        "f1_micro": 0.0, "f1_macro": 0.0,
    }  # fmt: skip


def f1_at(limit: float, scores: torch.Tensor, has_label: torch.Tensor) -> float:
    predicted = scores >= limit
    return float(2 * (predicted & has_label).sum() / (predicted.sum() + has_label.sum()))


def test_a_threshold_has_the_best_f1_of_all_that_could_be_chosen() -> None:
    torch.manual_seed(0)
    scores = torch.rand(60, 4).round(decimals=2)
    labels = (scores + 0.4 * torch.randn(60, 4) > 0.7).float()
    labels[:, 3] = 0
    chosen = choose_thresholds(scores, labels)
    assert chosen[3] == 0.5
    for number in range(3):
        column, has_label = scores[:, number], labels[:, number].bool()
        best = max(f1_at(limit / 1000, column, has_label) for limit in range(1001))
        assert f1_at(chosen[number], column, has_label) == pytest.approx(best)


def test_texts_that_0_5_tells_apart_keep_it() -> None:
    assert choose_thresholds(torch.tensor([[0.1], [0.9]]), torch.tensor([[0.0], [1.0]])) == (0.5,)
