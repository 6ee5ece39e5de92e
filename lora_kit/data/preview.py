"""One sample as the model will see it: its text, and on which parts of it there is a loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from lora_kit.data.answer_ends import count_shared
from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.data.chat import ChatEncoder, ChatSample
from lora_kit.data.messages import Conversation
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import tokenize_text
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.tasks import TARGET, TEXT_KINDS


@dataclass(frozen=True)
class Span:
    """Neighboring tokens that are all learned, or all not.

    Attributes:
        text: the decoded tokens, including special tokens.
        tokens: the number of tokens.
        learned: whether the loss is taken on them.
    """

    text: str
    tokens: int
    learned: bool


def preview_sample(tokenizer: Tokenizer, samples: EncodedDataset, index: int) -> list[Span]:
    """Return a sample as spans; what a decoder writes follows what its encoder reads.

    If something is predicted of the whole text, no token is learned; of a labeled word the first token is.
    """
    sample = samples[index]
    ids, labels = sample["input_ids"].tolist(), sample["labels"]
    learned = [False] * len(ids) if samples.kind in (*TEXT_KINDS, TARGET) else (labels != IGNORE_INDEX).tolist()
    if samples.kind == TARGET:
        ids, learned = ids + labels.tolist(), learned + [True] * len(labels)
    spans, start = [], 0
    for flag, group in groupby(learned):
        count = len(list(group))
        text = str(tokenizer.decode(ids[start : start + count], skip_special_tokens=False))
        spans.append(Span(text, count, flag))
        start += count
    return spans


def count_learned_by_role(
    conversation: Conversation, tokenizer: Tokenizer, sample_format: SampleFormat
) -> dict[str, tuple[int, int]]:
    """Return how many tokens of each role are learned, and how many there are, in all samples of a conversation.

    What a template puts around a message counts as that message's; the beginning of an answer is the assistant's.

    Raises:
        RowError: the conversation cannot be encoded.
    """
    assert sample_format.template is not None
    limit, learn = sample_format.max_length, sample_format.learn
    encoder = ChatEncoder(tokenizer, sample_format.template, max_length=limit, learn=learn)
    counts: dict[str, tuple[int, int]] = {}
    for sample in encoder.encode(conversation).samples:
        start = 0
        for index, message in enumerate(sample.conversation.messages):
            end = _find_message_end(sample, index, tokenizer, sample_format.template, start)
            learned, tokens = counts.get(message.role, (0, 0))
            counts[message.role] = learned + sum(sample.loss_mask[start:end]), tokens + end - start
            start = end
    return counts


def _find_message_end(sample: ChatSample, index: int, tokenizer: Tokenizer, template: ChatTemplate, start: int) -> int:
    """Return where the tokens of a message end: where they start if no conversation may end with that message."""
    until = sample.conversation.until(index + 1)
    if until == sample.conversation:
        return len(sample.ids)
    try:
        text = template.render(tokenizer, until)
    except DataError:
        return start
    return max(start, count_shared(tokenize_text(tokenizer, text), sample.ids))
