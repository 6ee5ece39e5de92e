"""What training went wrong with elsewhere: each complaint is a check that finds mistakes.

A check is what the person who trains would have noticed. It is made twice: on the code as it is, and with a mistake of
one line planted in it, where it must fail.

A check that fails is what is wanted here, many times over, so pytest is not to explain each failure: without being cut
short, as on a CI, the differences of long lists take it minutes. PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.config.lora_config import LoraConfig
from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset
from lora_kit.data.encode import encode
from lora_kit.data.rows import read_rows
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import (
    AdapterError,
    BaseModelError,
    DataError,
    LoraKitError,
    RoutingError,
    TargetError,
    VerificationError,
)
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.evaluation.measure import measure
from lora_kit.generation.prompts import find_template
from lora_kit.models.loading import load_base
from lora_kit.models.prompt_tokens import tokenize_prompt
from lora_kit.ops.lora import lora_add, lora_linear
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.interrupted import long_recipe, results, unbroken
from tests.support.labeled_bases import POSITIVE_ROWS, save_sentiment_base
from tests.support.planting import Mistake, plant
from tests.support.training import LABELED, At, base_of, recipe_of, same_state, state

ROWS = [
    {"prompt": "one", "completion": "two"},
    {"prompt": "a longer prompt", "completion": "x"},
    {"prompt": "b", "completion": "a longer completion"},
    {"prompt": "cc", "completion": "dddd"},
    {"prompt": "e", "completion": "f g h"},
    {"prompt": "i", "completion": "jj"},
    {"prompt": "kk", "completion": "l"},
    {"prompt": "mmmm", "completion": "nnnnnnn"},
]
TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "so"},
]


def samples_of(
    folder: Path, rows: Sequence[dict[str, Any]], *, tokenizer: Any = None, **settings: Any
) -> EncodedDataset:
    given = {"max_length": 64, **settings}
    return encode(read_rows(texts.write(folder / "some.jsonl", rows)), tokenizer or texts.tokenizer(), **given)


def trained(
    folder: Path, rows: Sequence[dict[str, Any]], *, data: dict[str, Any] | None = None, **section: Any
) -> Adapter:
    """Two epochs of plain gradient steps, large enough to be seen."""
    plain = {"max_steps": -1, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 1.0, "save_strategy": "no",
             "train_sampling_strategy": "sequential", **section}  # fmt: skip
    recipe = recipe_of(folder, rows=list(rows), train=plain)
    recipe["data"] = {"train": recipe["data"]["train"], **(data or {})}
    return Adapter.load(train(recipe, base=base_of(), replace=True).out)


def assert_same(adapters: list[Adapter]) -> None:
    """The same adapter to 1e-6, and one that has learned something."""
    first = adapters[0].tensors
    assert max(float(tensor.abs().max()) for name, tensor in first.items() if "lora_B" in name) > 1e-3
    for other in adapters[1:]:
        for name, tensor in first.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=0, atol=1e-6)


def assert_refused(error: type[LoraKitError], call: Callable[[], Any]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError("it was taken as if nothing were wrong")


# The checks


def accumulation(folder: Path) -> None:
    """1 × 8 is 8 × 1, whatever the micro-batches; and so it is where the last window of an epoch is short."""
    for pairs in ([(8, 1), (1, 8), (3, 3)], [(6, 1), (2, 3)]):
        found = []
        for size, times in pairs:
            section: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
            found.append(trained(folder, ROWS, **section))
        assert_same(found)


def padding(folder: Path) -> None:
    """A row's loss does not depend on the rows beside it, nor on the token that pads."""
    for kind, rows in (("llama", ROWS), ("bert", LABELED)):
        base = base_of(kind)
        labels = {"label2id": {"no": 0, "yes": 1}} if kind == "bert" else {}
        samples = samples_of(folder, rows, tokenizer=base.tokenizer, **labels)
        alone = measure(base.model, samples, Collator(texts.PAD), batch_size=1)
        for pad in (texts.PAD, texts.EOS):
            beside = measure(base.model, samples, Collator(pad), batch_size=len(samples))
            assert beside.loss == pytest.approx(alone.loss, abs=1e-6)


def packing(folder: Path) -> None:
    """Training on samples in shared rows is training on each alone."""
    found = []
    for packed in (False, True):
        found.append(trained(folder, ROWS, data={"packing": packed, "max_length": 40}, per_device_train_batch_size=8))
    assert_same(found)


def end_is_learned(folder: Path) -> None:
    """Every answer is learned with its end, though the token that ends it also pads."""
    tokenizer = texts.tokenizer(pad="")
    tokenizer.pad_token = tokenizer.eos_token
    template = ChatTemplate(TURNS, "turns")
    for rows, ends in ((ROWS, 1), ([{"text": "abc"}, {"text": "a"}], 1), ([{"messages": TALK}], 2)):
        samples = samples_of(folder, rows, tokenizer=tokenizer, max_length=200, template=template)
        batch = Collator(tokenizer.pad_token_id)(list(samples))
        assert (batch["labels"] == texts.EOS).sum(1).tolist() == [ends] * len(rows)
        last = [labels[labels != IGNORE_INDEX][-1].item() for labels in batch["labels"]]
        assert last == [texts.EOS] * len(rows)


def beginning_once(folder: Path) -> None:
    """One BOS before a sample and before a prompt, whether or not the text brings it."""
    tokenizer = texts.tokenizer(bos="<s>")
    pairs = [{"prompt": "<s>ab", "completion": "c"}, {"prompt": "ab", "completion": "c"}]
    for rows in (pairs, [{"text": "<s>ab"}, {"text": "ab"}], [{"messages": TALK}]):
        samples = samples_of(folder, rows, tokenizer=tokenizer, max_length=200, template=ChatTemplate(TURNS, "turns"))
        for sample in samples:
            ids = sample["input_ids"].tolist()
            assert (ids[0], ids.count(texts.BOS)) == (texts.BOS, 1)
    assert tokenize_prompt(tokenizer, "<s>ab") == tokenize_prompt(tokenizer, "ab")


def response_is_kept(folder: Path) -> None:
    """A row that is too long loses the beginning of its prompt: never its answer, never the end of the question."""
    sample = samples_of(folder, [{"prompt": "abcdefghijkl", "completion": "uvwxyz"}], max_length=10)[0]
    words = texts.tokenizer().convert_ids_to_tokens(sample["input_ids"].tolist())
    assert words == ["k", "l", "\n", *"uvwxyz", "</s>"]
    assert (sample["labels"] != IGNORE_INDEX).sum() == 7


def nothing_to_learn(folder: Path) -> None:
    """A row without a token to learn is refused, not trained on as nothing."""
    long, empty = {"prompt": "a", "completion": "b" * 12}, {"messages": TALK[:1]}
    for row in (long, empty):
        template = ChatTemplate(TURNS, "turns")
        assert_refused(DataError, partial(samples_of, folder, [row], max_length=8, template=template))


def only_answers(folder: Path) -> None:
    """The loss of a conversation is on what the assistant says."""
    tokenizer = texts.tokenizer()
    template = ChatTemplate(TURNS, "turns")
    sample = samples_of(folder, [{"messages": TALK}], tokenizer=tokenizer, max_length=200, template=template)[0]
    learned = sample["labels"][sample["labels"] != IGNORE_INDEX].tolist()
    assert tokenizer.convert_ids_to_tokens(learned) == ["y", "o", "</s>", "s", "o", "</s>"]


def excluded_answer(folder: Path) -> None:
    """An answer with `train: false` is read and not learned."""
    tokenizer = texts.tokenizer()
    messages = [TALK[0], {**TALK[1], "train": False}, *TALK[2:]]
    samples = samples_of(folder, [{"messages": messages}], max_length=200, template=ChatTemplate(TURNS, "turns"))
    learned = [label for sample in samples for label in sample["labels"].tolist() if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(learned) == ["s", "o", "</s>"]


def tool_result(folder: Path) -> None:
    """What a tool gives back is read by the next answer, and never learned itself."""
    tokenizer = texts.tokenizer()
    calls = "{% for c in m.tool_calls %}({{ c.function.name }}{{ c.function.arguments.n }}){% endfor %}"
    template = ChatTemplate(TURNS.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls), "calls")
    call = {"name": "add", "arguments": '{"n": 7}'}
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    messages = [TALK[0], said, {"role": "tool", "content": "42"}, TALK[1]]
    samples = samples_of(folder, [{"messages": messages}], max_length=200, template=template)
    learned = [label for sample in samples for label in sample["labels"].tolist() if label != IGNORE_INDEX]
    assert "".join(tokenizer.convert_ids_to_tokens(learned)) == "(add7)</s>yo</s>"


def answer_border(folder: Path) -> None:
    """An answer begins with the token after those that generation is given, and ends with the one it stops at."""
    tokenizer = texts.tokenizer()
    sample = samples_of(folder, [{"messages": TALK[:2]}], max_length=200, template=ChatTemplate(TURNS, "turns"))[0]
    prompt = tokenizer("[user]hi</s>\n[assistant]", add_special_tokens=False)["input_ids"]
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    start = ids.index(texts.BOS) + 1
    assert ids[start : start + len(prompt)] == prompt
    assert [label != IGNORE_INDEX for label in labels] == [False] * (start + len(prompt)) + [True, True, True]
    assert ids[-1] == texts.EOS


def template_is_kept(folder: Path) -> None:
    """An adapter brings the template it was trained with, also to a base that has none."""
    recipe = recipe_of(folder, rows=[{"messages": TALK}], steps=1, train={"save_strategy": "no"})
    recipe["data"] = {"train": recipe["data"]["train"], "max_length": 60}
    base = base_of()
    base.tokenizer.chat_template = TURNS
    found = find_template(Adapter.load(train(recipe, base=base).out))
    assert found is not None
    assert found.text == TURNS


def going_on(folder: Path) -> None:
    """A run that was stopped within its second epoch ends with the bytes, and the log, of one that was not."""
    recipe = long_recipe(folder, steps=6, train={"train_sampling_strategy": "group_by_length"})
    del recipe["data"]["validation"]

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, base=base_of(), callbacks=[At(5, stop)])
    assert train(recipe, base=base_of()).resumed == 4
    if not _UNBROKEN:
        _UNBROKEN.append(unbroken(recipe))
    assert results(Path(recipe["out"])) == _UNBROKEN[0]


_UNBROKEN: list[Any] = []
"""What the run of `going_on` comes to when nothing stops it: the same every time."""


def base_is_whole(folder: Path) -> None:
    """A base of which a weight is missing is refused: it would be trained on noise."""
    model = tiny.llama()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(folder / "base", state_dict=kept)
    texts.tokenizer().save_pretrained(folder / "base")
    assert_refused(BaseModelError, lambda: load_base(folder / "base"))


def only_the_adapter(folder: Path) -> None:
    """Every tensor of the base is bitwise what it was; of tied weights, training the one leaves the other alone."""
    for lora in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}):
        base = base_of("llama", tie=True)
        before = state(base.model)
        recipe = recipe_of(folder, steps=2, lora=lora, train={"save_strategy": "no"})
        adapter = Adapter.load(train(recipe, base=base, replace=True).out)
        assert same_state(base.model, before)
        embedding, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
        ids, hidden = torch.arange(9), torch.randn(3, 32)
        plain = embedding(ids), head(hidden)
        bank = attach(base.model, slots=1)
        bank.load("one", adapter)
        with bank.using("one"), torch.no_grad():
            now = base.model.get_input_embeddings()(ids), base.model.get_output_embeddings()(hidden)
        trains_the_head = "modules_to_save" in lora
        assert torch.equal(now[0], plain[0]) == trains_the_head
        assert torch.equal(now[1], plain[1]) != trains_the_head


def _pieces() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (5, 32), W (24, 32), A (4, 32) and B (24, 4), the pair as leaves."""
    torch.manual_seed(0)
    x, weight, a, b = torch.randn(5, 32), torch.randn(24, 32) / 6, torch.randn(4, 32) / 6, torch.randn(24, 4)
    return x.requires_grad_(), weight, a.requires_grad_(), b.requires_grad_()


def autocast(folder: Path) -> None:
    """Under autocast a layer gives what autocast's own products give, in their dtype, with fp32 gradients."""
    del folder
    for black_box in (False, True):
        found = []
        for ours in (True, False):
            x, weight, a, b = _pieces()
            with torch.autocast("cpu", torch.bfloat16):
                if not ours:
                    y = functional.linear(x, weight) + 2 * functional.linear(functional.linear(x, a), b)
                elif black_box:
                    y = lora_add(functional.linear(x, weight), x, a, b, 2.0)
                else:
                    y = lora_linear(x, weight, None, a, b, 2.0)
            assert y.dtype == torch.bfloat16
            y.float().square().sum().backward()
            found.append([y.detach().float(), *(leaf.grad for leaf in (x, a, b))])
        for mine, theirs in zip(*found, strict=True):
            assert mine.dtype == theirs.dtype == torch.float32
            assert (mine - theirs).abs().max() < 3e-2 * theirs.abs().max()


def views(folder: Path) -> None:
    """A base whose output is part of something larger finds the rest of it as it was."""
    del folder
    x, weight, a, b = _pieces()
    larger = functional.linear(x, weight).detach()
    before = larger.clone()
    y = lora_add(larger[:, :24], x, a, b, 2.0)
    assert torch.equal(larger, before)
    assert not torch.equal(y, before)


def dropout(folder: Path) -> None:
    """What is dropped on the way forward is dropped on the way back."""
    del folder
    x, weight, a, b = _pieces()
    torch.manual_seed(1)
    y = lora_linear(x, weight, None, a, b, 2.0, dropout=0.5)
    y.square().sum().backward()
    mine = a.grad
    x, weight, a, b = _pieces()
    torch.manual_seed(1)
    dropped = functional.dropout(x, 0.5)
    (functional.linear(x, weight) + 2 * (dropped @ a.mT) @ b.mT).square().sum().backward()
    torch.testing.assert_close(mine, a.grad)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.project = nn.Linear(8, 8)


def attention_reads_past(folder: Path) -> None:
    """A module that reads its weight past any wrapper is refused, not trained in vain."""
    del folder
    assert_refused(TargetError, lambda: attach(_Attention(), LoraConfig(target_modules=("out_proj",)), name="a"))


def past_a_wrapper(folder: Path) -> None:
    """A layer whose weight the base reads itself learns nothing, and that is said; elsewhere nothing is said."""
    for reads_past in (False, True):
        base = base_of()
        for layer in base.model.model.layers if reads_past else ():
            layer.mlp.forward = partial(_reading_past, layer.mlp)
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, told=told: told.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("lora_kit.training.loop.unused_parameters")
        logger.addHandler(handler)
        try:
            train(recipe_of(folder, train={"save_strategy": "no"}), base=base, replace=True)
        finally:
            logger.removeHandler(handler)
        named = [f"model.layers.{number}.mlp.up_proj" for number in (0, 1) if reads_past]
        assert [all(name in line for name in named) for line in told] == [True] * reads_past


def _reading_past(mlp: Any, x: Tensor) -> Tensor:
    found: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * functional.linear(x, mlp.up_proj.weight))
    return found


def not_a_number(folder: Path) -> None:
    """A loss that is not a number stops the training, and leaves nothing that could be taken for an adapter."""

    def poison(model: Any) -> None:
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    recipe = recipe_of(folder, train={"save_strategy": "no"})
    assert_refused(VerificationError, lambda: train(recipe, base=base_of(), callbacks=[At(1, poison)]))
    assert not (folder / "out").exists()


def head_in_its_order(folder: Path) -> None:
    """A head that knows the labels gives each its own row, in training, in evaluation and where it is loaded."""
    base = str(save_sentiment_base(folder / "base", labels=("positive", "negative")))
    section = {"learning_rate": 1e-9, "save_strategy": "no"}
    recipe = {**recipe_of(folder, rows=POSITIVE_ROWS, train=section), "base": base, "task": "classify"}
    report = train(recipe)
    adapter = Adapter.load(report.out)
    assert adapter.record["labels"] == ["positive", "negative"]
    assert report.before is not None
    assert report.before.accuracy == 5 / 6
    turned = Adapter(adapter.config, adapter.tensors, record={**adapter.record, "labels": ["negative", "positive"]})
    assert evaluate(base, [None, turned], recipe["data"]["train"]).results[0].metrics["accuracy"] == 5 / 6
    other = load_base(base, task="classify", label2id={"negative": 0, "positive": 1})
    assert other.model.classifier.bias.count_nonzero() == 0


def _two_adapters() -> tuple[Any, Any]:
    model = tiny.llama()
    bank = attach(model, dtype=torch.float32)
    for name, rank in (("a", 4), ("b", 2)):
        bank.add(name, LoraConfig(r=rank, init_lora_weights=False))
    return model, bank


def threads_route_for_themselves(folder: Path) -> None:
    """What one thread uses is not what another computes with."""
    del folder
    model, bank = _two_adapters()
    alone = {}
    for name in ("a", "b"):
        bank.use(name)
        alone[name] = tiny.logits(model, tiny.batch())
    bank.use("a")
    assert not torch.equal(alone["a"], alone["b"])
    found = []

    def work() -> None:
        with bank.using("b"):
            found.append(tiny.logits(model, tiny.batch()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(found[0], alone["b"])
    bank.use("b")
    bank.use("a")
    assert torch.equal(tiny.logits(model, tiny.batch()), alone["a"])


def recomputation(folder: Path) -> None:
    """Gradient checkpointing trains the adapter of the forward, whatever is used by the time of the backward."""
    del folder
    for reentrant in (None, False, True):
        model, bank = _two_adapters()
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        bank.use("a")
        loss = model(**tiny.batch(), use_cache=False).logits.square().mean()
        bank.use("b")
        loss.backward()
        gradients = [leaf.grad for leaf in bank.parameters("a")]
        if reentrant is None:
            expected = gradients
        for mine, theirs in zip(expected, gradients, strict=True):
            assert theirs is not None
            assert (mine - theirs).abs().max() < 1e-6


# The mistakes


@dataclass(frozen=True)
class Trap:
    """A check and the mistakes that it must find.

    Attributes:
        raises: what it may fail with.
    """

    check: Callable[[Path], None]
    mistakes: tuple[Mistake, ...]
    raises: tuple[type[Exception], ...] = (AssertionError,)


TRAPS = (
    Trap(
        threads_route_for_themselves,
        (
            Mistake("layers.routing:Routing.get_route", "self._current.get() or self._begin()", "self.default"),
            Mistake("layers.routing:Routing.get_upcoming", "route = self.stack.get_route()", "route = self.default"),
        ),
    ),
    Trap(
        recomputation,
        (
            Mistake("layers.routing:Routing.repeat_forward", "self._assign(route)", "self._assign(current)"),
            Mistake("layers.checkpoint_routes:keep_routes", "if not saved:", "if saved:"),
        ),
        (AssertionError, RuntimeError, RoutingError),
    ),
    Trap(
        accumulation,
        (
            Mistake(
                "training.loop.trainer:Trainer._compute_label_loss",
                "/ num_items_in_batch",
                "/ (labels != -100).sum() / self.args.gradient_accumulation_steps",
            ),
            Mistake(
                "training.loop.trainer:Trainer._forward_and_backward",
                "in self._split(batch)",
                "in self._split(batch)[:1]",
            ),
            Mistake(
                "training.loop.length_buckets:split_by_length", "length=int(longest[0])", "length=int(longest[-1])"
            ),
        ),
    ),
    Trap(
        padding,
        (
            Mistake("data.batches:Collator.__call__", "for row in ids], batch_first=True", "for row in ids], True, 1"),
            Mistake("data.batches:Collator.__call__", "padding_value=IGNORE_INDEX", "padding_value=self.pad_token_id"),
        ),
    ),
    Trap(
        packing,
        (
            Mistake("data.packing:PackedDataset.__getitem__", "torch.arange(len(part[", "torch.ones(len(part["),
            Mistake("training.loop.length_buckets:_trim_padding", '{"attention_mask"} if', "set() if"),
        ),
        (AssertionError, RuntimeError),
    ),
    Trap(
        end_is_learned,
        (
            Mistake("data.row_encoders:_append_eos", "[*ids, eos]", "ids"),
            Mistake(
                "data.batches:Collator.__call__",
                "padding_value=IGNORE_INDEX)",
                "padding_value=IGNORE_INDEX).masked_fill(pad_sequence(ids, True) == self.pad_token_id, IGNORE_INDEX)",
            ),
            Mistake("data.answers:_cut_at_end", "rest[: start + len(name)]", "rest[:start]"),
        ),
    ),
    Trap(
        beginning_once,
        (
            Mistake("models.prompt_tokens:strip_special_tokens", "ids[len(prefix) :] if", "ids if"),
            Mistake("models.prompt_tokens:tokenize_text", "add_special_tokens=False", "add_special_tokens=True"),
        ),
    ),
    Trap(
        response_is_kept,
        (
            Mistake(
                "data.row_encoders:encode_completions",
                "prompt[max(0, len(prompt) - budget) :]",
                "prompt[: max(0, budget)]",
            ),
            Mistake("data.row_encoders:encode_completions", "_append_eos(raw_completion, eos)", "raw_completion[:4]"),
            Mistake("data.row_encoders:encode_completions", "len(prefix) - len(completion)", "len(prefix)"),
        ),
    ),
    Trap(
        nothing_to_learn,
        (Mistake("data.encode:encode_with_faults", "if row.error)", "if False)"),),
    ),
    Trap(
        only_answers,
        (
            Mistake("data.answer_tokens:encode_answers", "[False] * len(ids)", "[True] * len(ids)"),
            Mistake("data.answer_tokens:_find_learned_tokens", "[(len(before), len(through))]", "[(0, len(through))]"),
        ),
    ),
    Trap(
        excluded_answer,
        (
            Mistake("data.messages:find_learned_answers", "message.train is not False", "True"),
            Mistake("data.read_messages:_read_loss_keys", "all(given)", "True"),
        ),
    ),
    Trap(
        tool_result,
        (
            Mistake("data.messages:find_learned_answers", 'message.role == "assistant"', 'message.role != "user"'),
            Mistake("data.read_messages:_read_arguments", "json.dumps(parsed, ensure_ascii=False)", '"{}"'),
        ),
        (AssertionError, DataError),
    ),
    Trap(
        answer_border,
        (
            Mistake("data.answer_tokens:_find_learned_tokens", "[(len(before), len", "[(len(before) + 1, len"),
            Mistake("data.answer_tokens:_find_learned_tokens", "[(len(before), len", "[(len(before) - 1, len"),
            Mistake("data.answers:_cut_at_end", "rest[: start + len(name)]", "rest[:start]"),
        ),
    ),
    Trap(
        template_is_kept,
        (Mistake("training.job.resolve:_resolve_data", "chat_template=text", "chat_template=None"),),
    ),
    Trap(
        going_on,
        (
            Mistake(
                "training.loop.resumable:ResumableTrainer.begin_epoch",
                'self._own_state["epoch_random"]',
                "capture_random_states()",
            ),
            Mistake(
                "training.loop.resumable:ResumableTrainer._load_rng_state",
                'self._own_state["random"]',
                "capture_random_states()",
            ),
            Mistake("training.loop.resumable:ResumableTrainer._load_weights", "tensor.copy_(saved[name])", "pass"),
            Mistake(
                "training.loop.resumable:ResumableTrainer._write_checkpoint_files",
                "self.optimizer.state_dict()",
                '{**self.optimizer.state_dict(), "state": {}}',
            ),
            Mistake(
                "training.loop.resumable:ResumableTrainer._write_checkpoint_files",
                "self.lr_scheduler.state_dict()",
                '{**self.lr_scheduler.state_dict(), "last_epoch": 0}',
            ),
            Mistake(
                "training.loop.resumable:ResumableTrainer._collect_loop_state",
                "self._loss_sum.cpu()",
                "0 * self._loss_sum.cpu()",
            ),
        ),
    ),
    Trap(
        base_is_whole,
        (Mistake("models.heads:check_loading_info", "if absent or mismatched", "if mismatched"),),
    ),
    Trap(
        only_the_adapter,
        (
            Mistake(
                "layers.saved_module:SavedModule.make_identity_stack",
                "repeat(slots, *[1] * tensor.ndim)",
                "expand(slots, *tensor.shape)",
            ),
        ),
    ),
    Trap(
        autocast,
        (
            Mistake("ops.lora:lora_linear", "dtype = autocast_dtype_of(x)", "dtype = None"),
            Mistake("ops.lora_functions:LoraAddFunction.forward", "cast_once(x, y.dtype)", "x"),
        ),
        (AssertionError, RuntimeError),
    ),
    Trap(
        views,
        (Mistake("ops.lora_functions:can_overwrite", " and not y._is_view()", ""),),
    ),
    Trap(
        dropout,
        (Mistake("ops.lora_functions:_Dropout.redraw_mask", "generator.set_state(self.state)", "pass"),),
    ),
    Trap(
        attention_reads_past,
        (
            Mistake(
                "targets.bypassed_layers:find_bypassed_layers", "isinstance(module, nn.MultiheadAttention)", "False"
            ),
        ),
    ),
    Trap(
        past_a_wrapper,
        (
            Mistake(
                "training.loop.unused_parameters:UnusedParameterCallback.on_pre_optimizer_step",
                "tensor.grad is None",
                "False",
            ),
        ),
    ),
    Trap(
        head_in_its_order,
        (
            Mistake("models.heads:order_labels", "known if set(names)", "tuple(names) if set(names)"),
            Mistake("models.heads:reason_new_head", "list(head) == list(labels)", "set(head) == set(labels)"),
            Mistake("evaluation.adapter_format:_use_head_order", "set(labels) != set(", "set(labels) == set("),
        ),
    ),
    Trap(
        not_a_number,
        (Mistake("training.loop.trainer:Trainer.log", "not math.isfinite(logs.get(key, 0.0))", "False"),),
        (AdapterError,),  # no adapter is made of such tensors; but that is found out only at the very end
    ),
)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.check.__name__)
def test_the_check_passes(tmp_path: Path, trap: Trap) -> None:
    trap.check(tmp_path)


PLANTED = [pytest.param(trap, mistake, id=f"{trap.check.__name__}, {mistake}")
           for trap in TRAPS for mistake in trap.mistakes]  # fmt: skip


@pytest.mark.parametrize(("trap", "mistake"), PLANTED)
def test_the_check_finds_the_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: Trap, mistake: Mistake
) -> None:
    plant(monkeypatch, mistake)
    with pytest.raises(trap.raises):
        trap.check(tmp_path)
