"""A forward and a generation keep the route that they began with, and layers are given the rows of the batch."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import BankError, RoutingError
from tests.support import tiny

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
IDS = tiny.batch()["input_ids"]


def bench(model: nn.Module | None = None, **config: Any) -> tuple[Any, lk.AdapterBank]:
    """A model with two adapters that differ from each other and from the base."""
    model = tiny.llama() if model is None else model.eval()
    bank = lk.attach(model, dtype=torch.float32)
    torch.manual_seed(1)
    for name in ("a", "b"):
        bank.add(name, lk.LoraConfig(r=4, init_lora_weights=False, **config))
    return model, bank


def logits_with(bank: lk.AdapterBank, name: str | None) -> Tensor:
    with bank.using(name):
        return tiny.logits(bank.model, {"input_ids": IDS})


def is_of(found: Tensor, bank: lk.AdapterBank, name: str | None) -> bool:
    return torch.equal(found, logits_with(bank, name)) and not torch.equal(found, logits_with(bank, "b"))


class Do(transformers.LogitsProcessor):
    """Something that a generation calls at each of its steps."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        self.work()
        return scores


def use(bank: lk.AdapterBank) -> None:
    bank.use("b")


OPEN: list[contextlib.AbstractContextManager[None]] = []


def enter_using(bank: lk.AdapterBank) -> None:
    OPEN.append(bank.using("b"))
    OPEN[-1].__enter__()


def enter_rows(bank: lk.AdapterBank) -> None:
    OPEN.append(bank.rows(["b"] * len(IDS)))
    OPEN[-1].__enter__()


@pytest.fixture(autouse=True)
def _leave_blocks() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().__exit__(None, None, None)


CHANGES = (use, enter_using, enter_rows)


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_keeps_its_adapter_whatever_a_hook_in_it_does(change: Callable[..., None]) -> None:
    model, bank = bench()
    bank.use("a")
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: change(bank))
    found = tiny.logits(model, {"input_ids": IDS})
    hook.remove()
    assert torch.equal(tiny.logits(model, {"input_ids": IDS}), logits_with(bank, "b"))  # the next one follows
    assert is_of(found, bank, "a")


def test_a_forward_keeps_the_adapter_of_a_block_that_a_hook_in_it_leaves() -> None:
    model, bank = bench()
    bank.use("b")
    block = bank.using("a")
    block.__enter__()

    def leave(*_: object) -> None:
        block.__exit__(None, None, None)

    hook = model.model.layers[1].register_forward_pre_hook(leave)
    found = tiny.logits(model, {"input_ids": IDS})
    hook.remove()
    assert bank.active == "b"
    assert is_of(found, bank, "a")


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    model, bank = bench()
    bank.use("b")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    hook.remove()
    bank.use("a")
    norm = model.model.layers[0].mlp(torch.ones(1, 2, 32))
    with bank.using("a"):
        assert torch.equal(model.model.layers[0].mlp(torch.ones(1, 2, 32)), norm)
    assert is_of(tiny.logits(model, {"input_ids": IDS}), bank, "a")


@pytest.mark.parametrize("change", CHANGES)
def test_a_generation_keeps_its_adapter_whatever_it_calls(change: Callable[..., None]) -> None:
    model, bank = bench()
    with bank.using("a"):
        expected = model.generate(IDS, **OPTIONS)
    with bank.using("b"):
        assert not torch.equal(model.generate(IDS, **OPTIONS), expected)
    bank.use("a")
    assert torch.equal(model.generate(IDS, logits_processor=[Do(lambda: change(bank))], **OPTIONS), expected)


def test_a_block_around_a_call_inside_a_generation_serves_that_call() -> None:
    model, bank = bench()
    with bank.using("a"):
        expected = model.generate(IDS, **OPTIONS)
    seen: list[Tensor] = []

    @contextlib.contextmanager
    def base() -> Iterator[None]:
        with bank.using(None):
            yield

    def compare() -> None:
        with base():
            seen.append(tiny.logits(model, {"input_ids": IDS}))

    with bank.using("a"):
        assert torch.equal(model.generate(IDS, logits_processor=[Do(compare)], **OPTIONS), expected)
    assert len(seen) == OPTIONS["max_new_tokens"]
    assert all(is_of(each, bank, None) for each in seen)


def test_a_bank_is_not_detached_or_merged_inside_a_generation() -> None:
    model, bank = bench()
    refused: list[str] = []

    def change() -> None:
        for call in (bank.detach, lambda: bank.merge("b")):
            with pytest.raises(BankError, match="generation") as error:
                call()
            refused.append(str(error.value))

    model.generate(IDS, logits_processor=[Do(change)], **OPTIONS)
    assert len(refused) == 2 * OPTIONS["max_new_tokens"]
    bank.detach()
    assert "generate" not in model.__dict__


def four() -> Tensor:
    return tiny.batch(rows=4)["input_ids"]


CALLS: dict[str, Callable[[Any, Tensor], object]] = {
    "embeddings": lambda model, x: model(inputs_embeds=model.model.embed_tokens.weight.detach()[x]),
    "embeddings by position": lambda model, x: model(None, None, None, None, torch.ones(*x.shape, 32)),
    "a part of the model": lambda model, x: model.model(x),
    "forward without hooks": lambda model, x: model.forward(x),
    "a block": lambda model, x: model.model.layers[0].mlp(torch.ones(*x.shape, 32)),
    "prompts": lambda model, x: model.generate(x, **OPTIONS),
    "prompts by name": lambda model, x: model.generate(input_ids=x, num_beams=2, **OPTIONS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_batch_of_another_size_is_refused_by_whichever_way_it_comes(call: Callable[..., object]) -> None:
    model, bank = bench()
    with bank.rows(["a", "b"]), torch.no_grad():
        call(model, four()[:2])
        with pytest.raises(RoutingError, match="2 rows were routed"):
            call(model, four())


@pytest.mark.parametrize("name", ["pixel_values", "input_values", "input_features", "inputs", "encoder_outputs"])
def test_the_batch_is_seen_under_every_name_of_an_input(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, **inputs: Any) -> Tensor:
            value = inputs[name]
            found: Tensor = self.proj(value[0] if isinstance(value, tuple) else value)
            return found

    model, bank = bench(Model(), target_modules=["proj"])
    for count in (2, 4):
        value: Any = torch.ones(count, 3, 8)
        value = (value,) if name == "encoder_outputs" else value
        with bank.rows(["a", "b"]):
            if count == 2:
                model(**{name: value})
            else:
                with pytest.raises(RoutingError, match="a batch of 4"):
                    model(**{name: value})


_SMALL: dict[str, Any] = {"vocab_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
_TEXT = {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 1}
_DEBERTA = {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
_FSMT = {"langs": ["en", "de"], "src_vocab_size": 96, "tgt_vocab_size": 96, "d_model": 32, "encoder_layers": 1}
_FSMT |= {"decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
_FSMT |= {"decoder_ffn_dim": 48, "max_position_embeddings": 64, "tie_word_embeddings": False}
_XLNET = {"vocab_size": 96, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 2}

Case = tuple[str, dict[str, Any], list[str], str]
ORDERS: dict[str, Case] = {
    "Longformer": ("LongformerForMaskedLM", {**_TEXT, "attention_window": 4}, ["query"], "before the batch"),
    "XLNet": ("XLNetLMHeadModel", _XLNET, ["layer_1"], "before"),
    "FSMT": ("FSMTForConditionalGeneration", _FSMT, ["fc1"], "before the batch"),
    "DeBERTa's positions": ("DebertaForSequenceClassification", _DEBERTA, ["pos_proj"], "one input for all"),
    "DeBERTa's tokens": ("DebertaForSequenceClassification", _DEBERTA, ["in_proj"], ""),
    "T5's positions": ("T5ForConditionalGeneration", _T5, ["relative_attention_bias"], "rows"),
    "T5's tokens": ("T5ForConditionalGeneration", _T5, ["q", "wo", "shared"], ""),
    "Swin": ("SwinForImageClassification", _SWIN, ["q_proj", "v_proj"], ""),
    "choices": ("RobertaForMultipleChoice", _TEXT, ["query", "word_embeddings"], ""),
    "choices after the sequence": ("XLNetForMultipleChoice", _XLNET, ["layer_1", "word_embedding"], "before the batch"),
}


def inputs_of(name: str, rows: int, length: int) -> dict[str, Tensor]:
    ids = tiny.batch(rows=rows, length=length, seed=rows * length)["input_ids"]
    if name == "Swin":
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    if name.startswith("choices"):
        return {"input_ids": torch.stack([ids, ids.flip(1)], 1)}
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name.startswith(("T5", "FSMT")) else {})


@pytest.mark.parametrize(("rows", "length"), [(2, 7), (2, 8), (4, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("name", ORDERS)
def test_rows_are_right_or_refused_whatever_lies_first_in_a_layers_input(name: str, rows: int, length: int) -> None:
    kind, fields, targets, refusal = ORDERS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model, bank = bench(model_class(model_class.config_class(**fields)), target_modules=targets)
    inputs, names = inputs_of(name, rows, length), ["a", None, "b", "a"][:rows]
    alone = []
    for row, each in enumerate(names):
        with bank.using(each):
            alone.append(tiny.logits(model, {key: value[row : row + 1] for key, value in inputs.items()}))
    with bank.rows(names):
        if refusal:
            with pytest.raises(RoutingError, match=refusal):
                model(**inputs)
            return
        torch.testing.assert_close(tiny.logits(model, inputs), torch.cat(alone), rtol=1e-4, atol=1e-5)


class SeesImages(nn.Module):
    """Computes the images of all rows together, without those that only fill up a row, as vision-language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.text = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        images = pixel_values.flatten(0, 1)
        seen = self.patch(images[images.flatten(1).any(-1)].flatten(2)).mean()
        logits: Tensor = self.text(input_ids[..., None].float().expand(-1, -1, 8)) + seen
        return logits


@pytest.mark.parametrize(
    ("counts", "target", "refusal"),
    [
        ((2, 2), "patch", ""),
        ((1, 1), "patch", ""),
        ((1, 3), "patch", "different numbers of images"),
        ((2, 0), "patch", "different numbers of images"),
        ((2, 1, 3, 2), "patch", "different numbers of images"),
        ((1, 3), "text", ""),
    ],
)
def test_images_are_of_the_rows_that_have_them(counts: tuple[int, ...], target: str, refusal: str) -> None:
    model, bank = bench(SeesImages(), target_modules=[target])
    ids, pixels = tiny.batch(rows=len(counts), length=5)["input_ids"], torch.ones(len(counts), 3, 3, 4, 4)
    for row, count in enumerate(counts):
        pixels[row, count:] = 0
    names = ["a", "b", "b", "a"][: len(counts)]
    with bank.rows(names):
        if refusal:
            with pytest.raises(RoutingError, match=refusal):
                model(ids, pixels)
            return
        found = model(ids, pixels)
    for row, name in enumerate(names):
        with bank.using(name):
            if target == "text":
                torch.testing.assert_close(found[row], model(ids, pixels)[row])


def test_a_forward_with_as_many_tokens_as_rows_changes_no_random_state_and_no_cache() -> None:
    model, bank = bench()
    cache = transformers.DynamicCache(config=model.config)
    state = torch.get_rng_state()
    with bank.rows(["a", "b"]), torch.no_grad():
        model(four()[:2, :2], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers[0].modules())


def copies_of(model: nn.Module) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def test_a_copy_made_inside_rows_has_these_rows_and_no_others() -> None:
    model, bank = bench()
    with bank.rows(["a", "b"]):
        expected, copies = tiny.logits(model, {"input_ids": four()[:2]}), copies_of(model)
    bank.use("b")
    for each in copies:
        assert torch.equal(tiny.logits(each, {"input_ids": four()[:2]}), expected)
        each.generate(four()[:2], **OPTIONS)
        for call in (each, each.model, each.generate):
            with pytest.raises(RoutingError, match="2 rows were routed"):
                call(four())
        with pytest.raises(BankError, match="copy"):
            lk.attach(each)


def test_a_copy_of_a_model_with_an_empty_bank_takes_a_bank_of_its_own() -> None:
    model = tiny.llama()
    lk.attach(model)
    for each in copies_of(model):
        lk.attach(each, lk.LoraConfig(r=2, init_lora_weights=False)).detach()
        assert "generate" not in each.__dict__
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in each.modules())
        assert torch.equal(tiny.logits(each, {"input_ids": IDS}), tiny.logits(tiny.llama(), {"input_ids": IDS}))


def test_a_method_that_somebody_put_in_the_place_of_generate_is_called_and_stays() -> None:
    model = tiny.llama()
    seen: list[object] = []

    def generate(ids: Tensor) -> Tensor:
        seen.append(bank.active)
        return ids

    model.generate = generate
    bank = lk.attach(model, lk.LoraConfig(r=2), name="a")
    model.generate(IDS)
    assert seen == ["a"]
    bank.detach()
    assert model.generate is generate
