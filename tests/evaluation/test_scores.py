"""The arithmetic of the metrics against numbers worked out elsewhere: scikit-learn, seqeval, rouge-score, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora_kit.errors import ConfigError
from lora_kit.evaluation.metrics import (
    BASIC_METRICS,
    METRICS,
    metrics_for_task,
    select_generation_metrics,
    validate_metrics,
)
from lora_kit.evaluation.scores import find_entities, score_labels, score_texts
from lora_kit.models.tasks import TASKS

ALL = ("accuracy", "f1", "f1_macro", "f1_micro", "exact_match")


def labeled(true: list[int], given: list[int], labels: int) -> dict[str, float]:
    names = [f"l{number}" for number in range(labels)]
    return score_labels(ALL, [[one] for one in true], [[one] for one in given], labels=names)


def test_f1_of_three_labels_is_what_scikit_learn_gives() -> None:
    # f1_score([0,1,2,2,1,0,0,2], [0,2,2,2,1,1,0,0], average=...) of scikit-learn 1.9
    found = labeled([0, 1, 2, 2, 1, 0, 0, 2], [0, 2, 2, 2, 1, 1, 0, 0], 3)
    assert found["f1_macro"] == pytest.approx(0.611111111111111)
    assert found["f1_micro"] == pytest.approx(0.625)
    assert found["f1"] == found["f1_macro"]
    assert found["accuracy"] == 0.625


def test_f1_of_two_labels_is_that_of_the_second() -> None:
    # as above with [0,1,1,0,1,1,0] and [1,1,0,0,1,1,1]; average="binary" counts label 1
    found = labeled([0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1], 2)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx(0.5333333333333333)
    assert found["f1_micro"] == pytest.approx(4 / 7)


def test_labels_that_never_occur_are_no_part_of_the_mean() -> None:
    # as above with [0,1,1,0] and [3,1,0,0]: a label that is predicted and never true counts, others do not
    found = labeled([0, 1, 1, 0], [3, 1, 0, 0], 9)
    assert found["f1_macro"] == pytest.approx(0.38888888888888884)
    assert labeled([1, 1], [1, 1], 2)["f1_macro"] == 1.0
    assert labeled([0, 0], [0, 0], 2)["f1"] == 0.0


def test_a_label_that_a_file_does_not_have_has_no_f1() -> None:
    found = score_labels(["f1_per_label", "f1_macro"], [[0], [0], [0]], [[0], [0], [2]], labels=["a", "b", "c", "d"])
    assert [found[f"f1[{name}]"] for name in "ac"] == [pytest.approx(0.8), 0.0]
    assert math.isnan(found["f1[b]"])
    assert math.isnan(found["f1[d]"])
    assert found["f1_macro"] == pytest.approx(0.4)


def test_f1_of_tagged_words_is_that_of_whole_entities() -> None:
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    true = [[1, 2, 0, 3], [0, 0], [3, 4, 4]]
    given = [[1, 0, 0, 3], [0, 1], [3, 4, 4]]
    # Entities right: LOC at 3, LOC at 0–2. Wrong: PER of one word, PER in the second row. Missed: PER of two words.
    found = score_labels(ALL, true, given, labels=labels)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert found["accuracy"] == pytest.approx(7 / 9)
    assert found["exact_match"] == pytest.approx(1 / 3)


def test_an_entity_begins_at_b_and_where_the_kind_changes() -> None:
    tags = ["B-A", "I-A", "B-A", "O", "I-A", "I-B", "I-B", "O"]
    assert find_entities(tags) == [(0, 2, "A"), (2, 3, "A"), (4, 5, "A"), (5, 7, "B")]


def test_words_whose_labels_mark_no_entities_are_counted_one_by_one() -> None:
    found = score_labels(ALL, [[0, 1], [1]], [[0, 0], [1]], labels=["NOUN", "VERB"])
    assert found["f1"] == found["f1_macro"] == pytest.approx(2 / 3)


def test_rouge_is_what_rouge_score_gives_with_the_nearest_reference() -> None:
    # RougeScorer(["rougeL"]).score_multi(...) of rouge-score 0.1.2
    cases = [
        (["the cat sat on the mat"], "the cat lay on a mat", 2 / 3),
        (["A-b c!", "c d e f"], "a b C", 1.0),
        (["x y z"], "", 0.0),
        (["one two three four", "four three two one zero"], "one three two one", 2 / 3),
    ]
    for references, text, expected in cases:
        assert score_texts(["rouge"], [text], [references])["rouge"] == pytest.approx(expected)
    together = score_texts(["rouge"], [text for _, text, _ in cases], [references for references, _, _ in cases])
    assert together["rouge"] == pytest.approx(sum(expected for _, _, expected in cases) / 4)


def test_bleu_and_chrf_are_sacrebleus_over_the_whole_corpus() -> None:
    import sacrebleu

    texts = ["the cat sat on the mat today", "a dog ran far away from us"]
    references = [["the cat sat on a mat today", "the cat was on the mat today"], ["a dog ran far away from them"]]
    streams: list[Any] = [[references[0][0], references[1][0]], [references[0][1], None]]
    found = score_texts(["bleu", "chrf"], texts, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(texts, streams).score
    assert found["chrf"] == sacrebleu.corpus_chrf(texts, streams).score
    alone = score_texts(["bleu"], texts, [each[:1] for each in references])
    assert found["bleu"] > alone["bleu"] + 1


def test_an_exact_match_is_one_with_any_reference_but_for_white_space_around_it() -> None:
    texts = [" yes\n", "no", "Yes", "a  b"]
    assert score_texts(["exact_match"], texts, [["no", "yes"], ["yes"], ["yes"], ["a b"]])["exact_match"] == 0.25


def test_every_metric_knows_which_way_is_better() -> None:
    assert [name for name in METRICS if not METRICS[name].greater_is_better] == ["loss", "perplexity", "mae"]


@pytest.mark.parametrize("task", TASKS)
def test_what_training_always_measures_fits_its_task(task: str) -> None:
    assert set(BASIC_METRICS[task]) <= set(metrics_for_task(task))
    assert not select_generation_metrics(BASIC_METRICS[task], task)


def test_metrics_are_refused_by_name_and_by_task() -> None:
    assert validate_metrics(["bleu", "loss", "bleu"], "causal-lm") == ("bleu", "loss")
    with pytest.raises(ConfigError, match="did you mean 'perplexity'"):
        validate_metrics(["perplxity"], "causal-lm")
    with pytest.raises(ConfigError, match="does not fit task classify"):
        validate_metrics(["bleu"], "classify")
    assert select_generation_metrics(["loss", "exact_match", "bleu"], "seq2seq") == ("exact_match", "bleu")
    assert select_generation_metrics(["exact_match"], "tokens") == ()


def test_a_metric_without_its_package_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.evaluation.metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-kit\[eval\]'"):
        validate_metrics(["bleu"], "causal-lm")
    assert validate_metrics(["exact_match"], "causal-lm") == ("exact_match",)
