"""Which models are run without their head, and batches in parts."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

from lora_kit.errors import VerificationError
from lora_kit.evaluation.label_loss import LabelLoss
from lora_kit.evaluation.loss import LossHead, probe_head
from lora_kit.training.loop.length_buckets import choose_bucket_sizes, split_by_length
from tests.support import heads, tiny

IGNORED = -100


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three rows and their labels, of which the first five positions have none."""
    inputs = tiny.batch(3, 9)
    labels = inputs["input_ids"].clone()
    labels[:, :5] = IGNORED
    return inputs, labels


@pytest.mark.parametrize(
    "make", [tiny.llama, tiny.gpt2, heads.phi, heads.neox, lambda: heads.changed(heads.CastUp)],
    ids=["llama", "gpt2", "phi", "neox", "cast up"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_without_the_head_is_the_models_own(make: Any, dtype: torch.dtype) -> None:
    model = frozen(make().to(dtype))
    inputs, labels = batch()
    before = copy.deepcopy(dict(vars(model.get_output_embeddings())))
    head = probe_head(model, inputs)
    assert head.linear is model.get_output_embeddings(), head.reason
    with torch.no_grad():
        with head.skip():
            given = model(**inputs).logits
        assert given.shape == (3, 9, 32)
        own = head.loss(given, labels)
        logits = model(**inputs).logits
    assert own.dtype == torch.float32
    kept = labels[:, 1:] != IGNORED
    expected = functional.cross_entropy(logits[:, :-1][kept].float(), labels[:, 1:][kept], reduction="sum")
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=0)
    assert vars(model.get_output_embeddings()).keys() == before.keys()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (heads.gemma2, "changes its logits"),
        (heads.granite, "changes its logits"),
        (heads.cohere, "changes its logits"),
        (lambda: heads.changed(heads.Sliced), "changes its logits"),
        (lambda: heads.changed(heads.WrittenInto), "changes its logits"),
        (lambda: heads.changed(heads.CastDown), "changes its logits"),
        (lambda: heads.changed(heads.Twice), "uses its head 2 times"),
        (lambda: heads.changed(heads.LastOnly), "other positions"),
    ],
    ids=["soft cap", "divided", "scaled", "sliced", "written into", "cast down", "used twice", "last position only"],
)
def test_what_a_model_does_to_its_logits_is_seen(make: Any, reason: str) -> None:
    model = frozen(make())
    training, state = model.train().training, torch.get_rng_state()
    head = probe_head(model, batch()[0])
    assert head.linear is None
    assert reason in head.reason
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.lm_head)


def test_a_head_that_is_not_plain_and_frozen_stays_in_the_model() -> None:
    inputs, _ = batch()
    assert probe_head(tiny.llama(), inputs).reason == "the head is trained"
    with torch.no_grad():
        assert probe_head(tiny.llama(), inputs).linear is not None  # nobody asks for its gradient
    hooked = frozen(tiny.llama())
    hooked.lm_head.register_forward_pre_hook(lambda *_: None)
    assert probe_head(hooked, inputs).reason == "the head has hooks"
    replaced = frozen(tiny.llama())
    replaced.lm_head.forward = replaced.lm_head.forward
    assert probe_head(replaced, inputs).reason == "the head has a forward of its own"
    other = frozen(tiny.llama())
    other.lm_head = type("Special", (torch.nn.Linear,), {})(32, 96, bias=False)
    assert probe_head(other, inputs).reason == "the head is a Special"


def test_the_head_is_there_again_after_an_error() -> None:
    model = frozen(tiny.llama())
    head = probe_head(model, batch()[0])

    def interrupted() -> None:
        with head.skip():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model(**batch()[0]).logits.shape == (3, 9, 96)


def test_a_model_that_behaves_otherwise_later_is_noticed() -> None:
    model = frozen(tiny.llama())
    inputs, labels = batch()
    head = probe_head(model, inputs)
    with pytest.raises(VerificationError, match="as in the probe"):
        head.loss(model(**inputs).logits, labels)


def test_labels_of_whole_texts_are_scored_from_the_logits() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    assert torch.equal(LossHead(None, label_loss=LabelLoss()).loss(logits, labels), expected)


# Parts


def cost(lengths: list[int], sizes: list[int], part: int) -> int:
    starts = [0, *itertools.accumulate(sizes)]
    return sum(size * lengths[start] + part for size, start in zip(sizes, starts, strict=False))


@pytest.mark.parametrize("part", [0, 3, 20, 1000])
def test_parts_cost_as_little_as_any(part: int) -> None:
    lengths = [31, 30, 17, 9, 9, 2, 1]
    cuts = itertools.product([False, True], repeat=len(lengths) - 1)
    ends = ([number + 1 for number, cut in enumerate(way) if cut] + [len(lengths)] for way in cuts)
    ways = [[end - start for start, end in itertools.pairwise([0, *way])] for way in ends]
    assert len(ways) == 64
    found = choose_bucket_sizes(lengths, overhead=part)
    assert sum(found) == len(lengths)
    assert cost(lengths, found, part) == min(cost(lengths, way, part) for way in ways)


def test_rows_of_one_length_stay_together() -> None:
    assert choose_bucket_sizes([7, 7, 7], overhead=1) == [3]
    assert choose_bucket_sizes([7], overhead=1) == [1]
    assert choose_bucket_sizes([7, 7, 2], overhead=0) == [2, 1]


def test_parts_hold_every_row_once_without_needless_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.training.loop.length_buckets.BUCKET_OVERHEAD_TOKENS", {"cpu": 0})
    lengths = torch.tensor([2, 9, 3, 9])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.arange(36).view(4, 9) * mask
    parts = split_by_length({"input_ids": ids, "attention_mask": mask, "labels": torch.arange(4)})
    assert [part["input_ids"].shape for part in parts] == [(2, 9), (1, 3), (1, 2)]
    assert torch.cat([part["labels"] for part in parts]).tolist() == [1, 3, 2, 0]
    for part in parts:
        rows = part["labels"]
        width = part["input_ids"].shape[1]
        assert torch.equal(part["input_ids"], ids[rows, :width])
        assert torch.equal(part["attention_mask"], mask[rows, :width])
        assert not ids[rows, width:].any()
