"""Tiny bases with a head that knows labels by name, in an order that sorting them would not give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.support import texts, tiny

POSITIVE_ROWS = [{"text": f"text {number}", "label": "negative" if number == 3 else "positive"} for number in range(6)]
"""Five positive texts and a negative one."""


def save_sentiment_base(folder: Path, *, labels: Sequence[str] = ("positive", "negative", "neutral")) -> Path:
    """Save a base that gives every text its first label; the weights of its head are large."""
    if folder.exists():
        return folder
    model = tiny.bert(labels=len(labels))
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.classifier.bias.zero_()[0] = 100.0
    model.save_pretrained(folder)
    texts.bert_tokenizer().save_pretrained(folder)
    return folder
