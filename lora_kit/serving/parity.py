"""`check_parity`: whether a server answers as our own bank does, alone and with many requests at once.

Servers have been seen to answer requests to the base with an adapter's weights, but only where requests share a batch;
so a check that asks one after another proves little. Who answered for whom is named.
"""

from __future__ import annotations

import concurrent.futures
import json
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.bank import AdapterBank
from lora_kit.errors import BaseModelError, ConfigError
from lora_kit.generation.adapter_args import read_adapter
from lora_kit.generation.generate import attach_adapters, route_rows
from lora_kit.models.loading import Base
from lora_kit.models.tasks import CAUSAL_LM

_TIMEOUT_SECONDS: Final = 600
_PROMPT_LENGTHS: Final = (4, 60)


@dataclass(frozen=True)
class ParityQuestion:
    """A prompt to one model, and our own answer to it.

    Attributes:
        model: as the server calls it.
        prompt: token ids.
        answer: token ids, decoded greedily in fp32 by our bank, alone.
        text: of the answer.
    """

    model: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class WrongAnswer:
    """An answer that is not ours.

    Attributes:
        model: who was asked.
        answered_by: whose answer it is; None if it is nobody's.
        together: how many requests were on their way at once.
        shared: how many tokens it begins with alike; None where the server gives no token ids.
    """

    model: str
    answered_by: str | None
    together: int
    shared: int | None


@dataclass(frozen=True)
class ParityReport:
    """What came of a check.

    Attributes:
        asked: requests.
        wrong: answers that are not ours.
    """

    asked: int
    wrong: tuple[WrongAnswer, ...]

    def to_json(self) -> dict[str, Any]:
        return {"asked": self.asked, "wrong": [vars(each) for each in self.wrong]}


def write_questions(
    base: Base, adapters: Mapping[str, Adapter | None], *, prompts: int, new_tokens: int, seed: int = 0
) -> list[ParityQuestion]:
    """Return every prompt to every model, with our own answers.

    Args:
        base: in fp32, or whatever the server computes in.
        adapters: by the server's names; None for the base.
        prompts: how many; they are random tokens, so that answers differ.
        new_tokens: of an answer; an end token is a token like any other.

    Raises:
        BaseModelError: the base is not a decoder.
        AdapterError: an adapter does not match the base.
    """
    if base.task != CAUSAL_LM:
        raise BaseModelError(f"{base.name}: only decoders are compared; its task is {base.task}")
    generator, vocabulary = random.Random(seed), base.model.config.get_text_config().vocab_size
    texts = [
        tuple(generator.randrange(vocabulary) for _ in range(generator.randint(*_PROMPT_LENGTHS)))
        for _ in range(prompts)
    ]
    with attach_adapters(base.model, adapters) as bank:
        return [_answer(base, bank, name, prompt, new_tokens=new_tokens) for name in adapters for prompt in texts]


@torch.no_grad()
def _answer(
    base: Base, bank: AdapterBank | None, name: str, prompt: tuple[int, ...], *, new_tokens: int
) -> ParityQuestion:
    ids = torch.tensor([prompt], device=base.device)
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    with route_rows(bank, [name]):
        written = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    answer = tuple(written[0, len(prompt) :].tolist())
    return ParityQuestion(name, prompt, answer, base.tokenizer.decode(list(answer), skip_special_tokens=True))


def check_parity(
    address: str,
    questions: Sequence[ParityQuestion],
    *,
    key: str | None = None,
    together: Sequence[int] = (1, 16),
    requests: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Ask a server of OpenAI's API, and compare.

    Args:
        address: of the server, without `/v1`.
        questions: with our own answers.
        key: bearer key.
        together: how many requests are on their way at once, for each round.
        requests: of a round; drawn from the questions. None for each question once.
        progress: called with the requests answered and all of them.

    Raises:
        ConfigError: the server cannot be reached, or rejects a request.
    """
    generator, rounds = random.Random(seed), []
    for count in together:
        asked = list(questions) if requests is None else [generator.choice(questions) for _ in range(requests)]
        generator.shuffle(asked)
        rounds.append((count, asked))
    total, done, wrong = sum(len(asked) for _, asked in rounds), 0, list[WrongAnswer]()
    for count, asked in rounds:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            for question, answer in zip(asked, pool.map(lambda q: _ask(address, q, key), asked), strict=True):
                wrong += _judge(question, answer, questions, count)
                done += 1
                if progress is not None:
                    progress(done, total)
    return ParityReport(total, tuple(wrong))


def _ask(address: str, question: ParityQuestion, key: str | None) -> Mapping[str, Any]:
    count = len(question.answer)
    body = {"model": question.model, "prompt": list(question.prompt), "temperature": 0, "max_tokens": count}
    body |= {"min_tokens": count, "ignore_eos": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{address.rstrip('/')}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            choices: list[Mapping[str, Any]] = json.load(answer)["choices"]
    except urllib.error.HTTPError as error:
        said = error.read(500).decode("utf-8", "replace")
        raise ConfigError(f"the server rejects a request to {question.model!r}: {error.code}: {said}") from None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{address} does not answer: {error}", hint="give the address of the server") from None
    return choices[0]


def _judge(
    question: ParityQuestion, answer: Mapping[str, Any], questions: Sequence[ParityQuestion], together: int
) -> list[WrongAnswer]:
    def is_answer(other: ParityQuestion) -> bool:
        ids = answer.get("token_ids")
        return tuple(ids) == other.answer if ids is not None else answer.get("text") == other.text

    if is_answer(question):
        return []
    same_prompt = (other for other in questions if other.prompt == question.prompt)
    answered_by = next((other.model for other in same_prompt if is_answer(other)), None)
    return [WrongAnswer(question.model, answered_by, together, _count_shared(question, answer.get("token_ids")))]


def _count_shared(question: ParityQuestion, ids: Sequence[int] | None) -> int | None:
    if ids is None:
        return None
    equal = (count for count, (ours, theirs) in enumerate(zip(question.answer, ids, strict=False)) if ours != theirs)
    return next(equal, min(len(ids), len(question.answer)))


def read_named_adapters(names: Sequence[str], *, store: Path) -> dict[str, Adapter | None]:
    """Return adapters by what the server calls them: `NAME=ADAPTER`, or an adapter under its own name.

    Raises:
        UnknownAdapterError, AdapterError: one is not there, or cannot be read.
    """
    named = [text.rpartition("=") for text in names]
    return {name or Path(adapter).name: read_adapter(adapter, store=store) for name, _, adapter in named}
