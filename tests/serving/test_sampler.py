"""How one request's tokens are chosen."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kit.errors import ConfigError
from lora_kit.serving.sampler import Sampler, SamplingSettings

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])


def make_sampler(prompt: tuple[int, ...] = (), ends: frozenset[int] = frozenset(), **settings: object) -> Sampler:
    return Sampler(SamplingSettings(**settings), prompt, ends)  # type: ignore[arg-type]


def draw(sampler: Sampler, count: int = 400) -> list[int]:
    return [sampler.choose(LOGITS).token for _ in range(count)]


def test_temperature_zero_takes_the_most_probable_token() -> None:
    assert draw(make_sampler(), 3) == [1, 1, 1]


def test_one_seed_draws_the_same_tokens_whatever_else_draws() -> None:
    first, second = make_sampler(temperature=1.0, seed=3), make_sampler(temperature=1.0, seed=3)
    torch.manual_seed(0)
    drawn = draw(first, 20)
    torch.rand(5)
    assert draw(second, 20) == drawn
    assert draw(make_sampler(temperature=1.0, seed=4), 20) != drawn


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    drawn = draw(make_sampler(temperature=2.0, seed=0), 4000)
    expected = torch.softmax(LOGITS / 2, 0)
    for token, probability in enumerate(expected.tolist()):
        assert drawn.count(token) / 4000 == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"top_k": 2}, {1, 4}),
        ({"top_p": 0.5}, {1, 4}),
        ({"top_p": 0.1}, {1}),
        ({"min_p": 0.5}, {1, 4}),
        ({"min_p": 0.3, "top_k": 3}, {1, 2, 4}),
        ({"top_k": 3, "top_p": 0.99}, {1, 2, 4}),
    ],
)
def test_rare_tokens_are_left_out(settings: dict[str, float], left: set[int]) -> None:
    assert set(draw(make_sampler(temperature=1.0, seed=1, **settings))) == left


def test_penalties_are_those_of_the_api() -> None:
    sampler = make_sampler(presence_penalty=0.25, frequency_penalty=0.5)
    # 3.0; then 3 - 0.75 = 2.25 against 2.5; then both are penalized: 2.25, 1.75 against 2.0.
    assert draw(sampler, 3) == [1, 4, 1]


def test_the_repetition_penalty_counts_the_prompt_too() -> None:
    assert draw(make_sampler(prompt=(1,), repetition_penalty=2.0), 1) == [4]


def test_a_bias_is_added_to_a_token() -> None:
    assert draw(make_sampler(logit_bias={3: 100.0}), 2) == [3, 3]


def test_an_end_token_waits_for_the_least_number_of_tokens() -> None:
    assert draw(make_sampler(ends=frozenset({1}), min_tokens=2), 3) == [4, 4, 1]


def test_probabilities_are_those_before_any_setting() -> None:
    chosen = make_sampler(logprobs=2, logit_bias={0: 100.0}).choose(LOGITS)
    expected = torch.log_softmax(LOGITS, 0)
    assert chosen.token == 0
    assert chosen.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in chosen.top] == [1, 4]
    assert make_sampler().choose(LOGITS).logprob is None


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        make_sampler().choose(torch.full((4,), math.nan))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"seed": -1},
        {"presence_penalty": 3.0},
        {"repetition_penalty": 0.0},
        {"logit_bias": {1: 1000.0}},
        {"logprobs": 21},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
        {"max_tokens": 4, "min_tokens": 5},
    ],
)
def test_values_out_of_range_are_config_errors(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SamplingSettings(**settings)  # type: ignore[arg-type]
