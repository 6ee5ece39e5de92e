"""Answers as tokens: those that generation would have to write after the tokens that it is given."""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit.data.answer_ends import count_shared, find_special_names
from lora_kit.data.answers import Answer
from lora_kit.errors import DataError
from lora_kit.models.protocols import Tokenizer


def encode_answers(tokenizer: Tokenizer, answers: Sequence[Answer]) -> tuple[list[int], list[bool], list[Answer]]:
    """Return the tokens through the last answer, on which of them there is a loss, and the answers that are learned.

    The text is tokenized once. The last answer begins where the tokens of its prompt end; where a token would reach
    over that border, the two are tokenized apart, as generation has them. An earlier answer is learned if its prompt
    and the text through it begin the whole, as text and as tokens.

    Raises:
        DataError: the tokenizer cannot tokenize the last answer apart from its prompt.
    """
    last = answers[-1]
    candidates = [answer for answer in answers[:-1] if last.through.startswith(answer.through)]
    texts = [last.through, last.prompt, *(text for answer in candidates for text in (answer.prompt, answer.through))]
    ids, prompt, *others = _tokenize(tokenizer, texts)
    if ids[: len(prompt)] != prompt:
        ids = prompt + _tokenize_after(tokenizer, prompt, ids, last.text)
    loss_mask = [False] * len(ids)
    kept: list[Answer] = []
    for answer, before, through in zip([*candidates, last], [*others[::2], prompt], [*others[1::2], ids], strict=True):
        if ids[: len(before)] == before and ids[: len(through)] == through:
            for start, stop in _find_learned_tokens(tokenizer, answer, before, through):
                loss_mask[start:stop] = [True] * (stop - start)
            kept.append(answer)
    return ids, loss_mask, kept


def _find_learned_tokens(
    tokenizer: Tokenizer, answer: Answer, before: Sequence[int], through: Sequence[int]
) -> list[tuple[int, int]]:
    """Return which tokens of an answer are learned: (start, stop); a token that a span covers in part is.

    Args:
        before: the tokens of its prompt.
        through: the tokens of its prompt and its text.
    """
    if answer.spans == ((len(answer.prompt), len(answer.through)),):
        return [(len(before), len(through))]
    learned = []
    for start, stop in answer.spans:
        head, tail = _tokenize(tokenizer, [answer.through[:start], answer.through[:stop]])
        first, end = count_shared(head, through), count_shared(tail, through)
        end += end < len(tail)
        learned.append((max(first, len(before)), min(end, len(through))))
    return learned


def _tokenize_after(tokenizer: Tokenizer, prompt: list[int], whole: list[int], text: str) -> list[int]:
    """Return the tokens of a text that follows others, without the space that some tokenizers put before a text.

    Args:
        whole: the tokens of the prompt and the text at once, which must decode to the same.
    """
    expected = _decode(tokenizer, whole)
    # A special token, or a letter that the text will not join: what is put before a text then belongs to it.
    for anchor in [*find_special_names(tokenizer), "\n", "a", ".", "0"]:
        alone, joined = _tokenize(tokenizer, [anchor, anchor + text])
        if joined[: len(alone)] == alone and _decode(tokenizer, prompt + joined[len(alone) :]) == expected:
            return joined[len(alone) :]
    raise DataError(f"the tokenizer cannot tokenize {text[:40]!r} apart from what precedes it")


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids
