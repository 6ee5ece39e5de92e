"""Several samples in one row: computed as if each were alone, or refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.config.lora_config import LoraConfig
from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset
from lora_kit.data.encode import encode
from lora_kit.data.packing import PackedDataset, pack, reason_not_packable
from lora_kit.data.rows import read_rows
from lora_kit.errors import RecipeError
from lora_kit.evaluation.loss import probe_head
from lora_kit.models.loading import load_base
from lora_kit.training.job.identity import hash_samples
from lora_kit.training.loop.length_buckets import split_by_length
from lora_kit.training.train import train
from tests.support import heads, texts, tiny
from tests.support.interrupted import die_at, killed, long_recipe, results, unbroken
from tests.support.training import base_of, recipe_of

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "completion": "two"},
    {"prompt": "a longer prompt", "completion": "x"},
    {"prompt": "b", "completion": "a longer completion"},
    {"prompt": "cc", "completion": "dddd"},
    {"prompt": "e", "completion": "f g h"},
    {"prompt": "i", "completion": "j"},
    {"prompt": "kk", "completion": "l"},
]


def samples_of(path: Path, *, rows: list[dict[str, Any]] = ROWS, tokenizer: Any = None) -> EncodedDataset:
    return encode(read_rows(texts.write(path / "rows.jsonl", rows)), tokenizer or texts.tokenizer(), max_length=40)


def made(config: transformers.PreTrainedConfig, **settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, **settings).eval()


def sizes(**more: Any) -> dict[str, Any]:
    return {**heads._SIZES, **more}


MODELS: dict[str, Any] = {
    "llama": tiny.llama,
    "llama, eager": lambda: made(tiny.llama().config, attn_implementation="eager"),
    "gpt2": tiny.gpt2,
    "gemma2": heads.gemma2,
    "phi": heads.phi,
    "neox": heads.neox,
    "windows": lambda: made(transformers.MistralConfig(**sizes(sliding_window=3))),
    "experts": lambda: made(transformers.MixtralConfig(**sizes(num_local_experts=4))),
    "kit-base": lambda: load_base("kit-base", dtype="fp32").model,
}
LEAKING: dict[str, Any] = {
    "alibi": lambda: made(transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
    "states": lambda: made(
        transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=1)
    ),
    "both ways": lambda: made(
        transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
        )
    ),
}


class Masked(transformers.LlamaForCausalLM):
    """A Llama that is given a mask of ones after all."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **{**kwargs, "attention_mask": torch.ones_like(input_ids)})


class GoingOn(transformers.GPT2LMHeadModel):
    """A GPT-2 that keeps samples apart, and counts positions through the row."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        table = self.transformer.wpe
        if position_ids is None:
            return super().forward(input_ids=input_ids, **kwargs)
        counted = torch.arange(position_ids.shape[-1]).expand_as(position_ids)
        shift = table(counted) - table(position_ids)
        hook = table.register_forward_hook(lambda module, args, output: output + shift)
        try:
            return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        finally:
            hook.remove()


# Rows


def test_every_sample_stands_in_one_row_whole(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    packed = pack(samples, max_length=40, seed=0)
    assert sorted(place for row in packed.rows for place in row) == list(range(len(samples)))
    for row, places in zip(packed, packed.rows, strict=True):
        assert len(row["input_ids"]) <= 40
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["input_ids"])]
        assert len(starts) - 1 == len(places)
        for place, start, end in zip(places, starts, starts[1:], strict=False):
            assert row["input_ids"][start:end].tolist() == samples[place]["input_ids"].tolist()
            assert row["labels"][start:end].tolist() == samples[place]["labels"].tolist()
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            assert row["labels"][start] == IGNORE_INDEX  # nothing of the sample before it predicts its first token
    assert packed.num_labels == samples.num_labels


def test_rows_are_filled(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (400,), generator=generator).tolist()
    rows = [{"prompt": "a", "completion": "b" * (length - 1)} for length in lengths]
    samples = samples_of(tmp_path, rows=rows)
    packed = pack(samples, max_length=40, seed=0)
    assert packed.filled > 0.98
    assert len(packed) <= 1 + -(-samples.num_tokens // 40)  # one row more than the least there could be
    assert len(pack(samples, max_length=int(samples.lengths.max()), seed=0)) < len(samples)


def test_a_sample_goes_where_it_fills_best(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * (length - 3)} for length in (5, 7, 4)]
    packed = pack(samples_of(tmp_path, rows=rows), max_length=11, seed=0)
    assert packed.rows == ((1, 2), (0,))
    assert packed.filled == 16 / 22


def test_the_order_follows_from_the_seed(tmp_path: Path) -> None:
    samples = samples_of(tmp_path, rows=[{"prompt": str(n), "completion": "x"} for n in range(9)])
    first, again, other = (pack(samples, max_length=9, seed=seed).rows for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_padding_of_a_row_belongs_to_no_sample(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    packed = PackedDataset(samples, ((0, 1), (3,)), 40)
    batch = Collator(texts.PAD)(list(packed))
    (part,) = split_by_length(batch)
    assert "attention_mask" not in part
    end = len(packed[1]["input_ids"])
    assert part["position_ids"][1, end:].tolist() == [0] * (len(packed[0]["input_ids"]) - end)
    assert (part["labels"][1, end:] == IGNORE_INDEX).all()


def test_the_same_samples_in_other_rows_are_another_run(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    rows = PackedDataset(samples, ((0, 1), (2,)), 40), PackedDataset(samples, ((0,), (1, 2)), 40)
    assert len({hash_samples(found) for found in (samples, *rows)}) == 3
    assert hash_samples(rows[0]) == hash_samples(PackedDataset(samples, ((0, 1), (2,)), 40))


# Equal to unpacked


def loss_and_gradients(
    model: Any, samples: EncodedDataset | PackedDataset
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss over all samples in one batch, computed as training does, and the gradient of every tensor."""
    model.zero_grad()
    total = torch.zeros(())
    for part in split_by_length(Collator(texts.PAD)(list(samples))):
        labels = part.pop("labels")
        head = probe_head(model, part)
        with head.skip():
            loss = head.loss(model(**part, use_cache=False).logits, labels) / samples.num_labels
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_packed_is_unpacked(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    assert reason_not_packable(model) is None
    bank = attach(model, LoraConfig(r=2, init_lora_weights=False), name="a")
    samples = samples_of(tmp_path)
    packed = pack(samples, max_length=40, seed=0)
    assert len(packed) < len(samples)
    loss, gradients = loss_and_gradients(model, packed)
    expected, expected_gradients = loss_and_gradients(model, samples)
    # Rounding in fp32 differs from one CPU to another; what a leak does is a hundred times as large.
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert len(gradients) == len(list(bank.parameters("a"))) > 0
    largest = max(float(tensor.abs().max()) for tensor in expected_gradients.values())
    for name, tensor in expected_gradients.items():
        torch.testing.assert_close(gradients[name], tensor, rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("kind", LEAKING)
def test_a_model_that_does_not_keep_samples_apart_is_found_out(kind: str) -> None:
    model = LEAKING[kind]()
    modes = [module.training for module in model.train().modules()]
    assert reason_not_packable(model) == "its tokens see those of other samples in their row"
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_mask_or_positions_that_spoil_it_are_found_out() -> None:
    masked = Masked(tiny.llama().config).eval()
    assert "see those of other samples" in str(reason_not_packable(masked))
    assert "see those of other samples" in str(reason_not_packable(masked.bfloat16()))
    assert "computes other logits" in str(reason_not_packable(GoingOn(tiny.gpt2().config).eval()))


# Training


def test_training_on_rows_is_training_on_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    adapters = []
    for packing in (False, True):
        # All samples in every step, so that only the rows they stand in differ.
        section = {"max_steps": 4, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 8.0}
        recipe = recipe_of(tmp_path, rows=ROWS, train=section, out=str(tmp_path / str(packing)))
        recipe["data"] |= {"packing": packing, "max_length": 40}
        report = train(recipe, base=base_of())
        adapters.append(Adapter.load(report.out))
        assert report.tokens == 4 * samples_of(tmp_path).num_tokens
        assert report.recipe.data.packing is packing
    assert "7 samples in 2 rows of 40 tokens, 91.2% of them filled" in caplog.text
    for key, tensor in adapters[0].tensors.items():
        torch.testing.assert_close(adapters[1].tensors[key], tensor, rtol=0, atol=1e-6)
        assert tensor.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_accumulation_over_rows_equals_one_big_batch(tmp_path: Path, kind: str) -> None:
    adapters = []
    for size, accumulation in ((2, 1), (1, 2)):
        # Three rows in windows of two: the last window is short.
        section = {"max_steps": 4, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
                   "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 8.0}  # fmt: skip
        recipe = recipe_of(tmp_path, rows=ROWS, train=section, out=str(tmp_path / str(size)))
        recipe["data"] |= {"packing": True, "max_length": 27}
        base = base_of(kind)
        for module in base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        report = train(recipe, base=base)
        assert (report.steps, len(pack(samples_of(tmp_path), max_length=27, seed=0))) == (4, 3)
        adapters.append(Adapter.load(report.out))
    for key, tensor in adapters[0].tensors.items():
        torch.testing.assert_close(adapters[1].tensors[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, rows=ROWS, train={"per_device_train_batch_size": 1})
    recipe["data"] |= {"packing": True, "max_length": 40}
    expected = unbroken(recipe)
    killed(recipe, die_at(4))
    train(recipe, base=base_of())
    assert results(Path(recipe["out"])) == expected
    recipe["data"]["packing"] = False
    killed({**recipe, "out": str(tmp_path / "other")}, die_at(4))
    with pytest.raises(RecipeError, match=r"data\.packing was false, is true"):
        train({**recipe, "out": str(tmp_path / "other")}, base=base_of(), overrides={"data.packing": "true"})


def test_packing_that_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows=ROWS)
    recipe["data"]["packing"] = True
    base = base_of()
    leaking = type(base)(model=LEAKING["alibi"](), tokenizer=base.tokenizer, name="tiny", task="causal-lm")
    with pytest.raises(RecipeError, match=r"data\.packing: tiny cannot keep samples apart: its tokens see"):
        train(recipe, base=leaking)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=r"data\.packing is for task causal-lm"):
        train(recipe, overrides={"task": "classify"})
