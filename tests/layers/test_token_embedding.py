"""New tokens: an adapter's own rows of an embedding, of a head that shares them, and nothing else of either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_kit as lk
from lora_kit.adapter.inspect import inspect
from lora_kit.adapter.store import list_adapters
from lora_kit.errors import (
    AdapterError,
    BankError,
    ConfigError,
    LoraKitError,
    MergeError,
    TargetError,
    VerificationError,
)
from lora_kit.merging.new_token_rows import TokenReplacement
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support import merging, texts, tiny
from tests.support.training import PAIRS, base_of, recipe_of

NEW = [90, 5, 93]
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 1e-5}
EMBEDDING = "model.embed_tokens"


def gemma(*, seed: int = 0) -> transformers.Gemma3ForCausalLM:
    """Its embedding multiplies what it looks up, and is the head's."""
    config = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=96, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.Gemma3ForCausalLM(config).eval()


def bart(*, seed: int = 0) -> transformers.BartForConditionalGeneration:
    """Four modules have one weight, and two of them multiply what they look up."""
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=96, max_position_embeddings=64, scale_embedding=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.BartForConditionalGeneration(config).eval()


def tied() -> transformers.LlamaForCausalLM:
    return tiny.llama(tie=True)


def batch() -> dict[str, torch.Tensor]:
    """Three rows, with new tokens in each."""
    inputs = tiny.batch()
    inputs["input_ids"][:, 2], inputs["input_ids"][:, 4], inputs["input_ids"][:, 5] = 90, 93, 5
    return inputs


def config(**fields: Any) -> lk.LoraConfig:
    return lk.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": NEW, **fields})


def shaken(parameters: list[nn.Parameter], seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapter_of(model: Any, *, seed: int = 5, **fields: Any) -> lk.Adapter:
    """An adapter that does something, made on a model that is as it was afterwards."""
    bank = lk.attach(model, config(**fields), name="a")
    shaken(bank.parameters("a"), seed)
    found = bank.snapshot("a")
    bank.detach()
    return found


CASES: list[tuple[Any, dict[str, Any]]] = [
    (tiny.llama, {}),
    (tiny.llama, {"trainable_token_indices": {"embed_tokens": [90, 5], "lm_head": [5, 93, 7]}}),
    (tiny.llama, {"target_modules": [], "modules_to_save": ["lm_head"]}),
    (tied, {}),
    (tied, {"target_modules": []}),
    (tied, {"trainable_token_indices": {"embed_tokens": [5, 90], "lm_head": [5, 90]}}),
    (gemma, {}),
    (bart, {}),
    (tiny.gpt2, {"target_modules": ["c_attn"]}),
    (tiny.bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
]
every_case = pytest.mark.parametrize(
    ("make", "fields"), CASES, ids=[f"{make.__name__}-{number}" for number, (make, _) in enumerate(CASES)]
)


@every_case
def test_rows_made_here_give_the_same_logits_in_peft(make: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    before = tiny.logits(model, batch())
    bank = lk.attach(model, config(**fields), name="a")
    assert torch.equal(tiny.logits(model, batch()), before)
    shaken(bank.parameters("a"))
    ours = tiny.logits(model, batch())
    assert not torch.allclose(ours, before, **CLOSE)
    bank.save("a", tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a")
    torch.testing.assert_close(ours, tiny.logits(theirs, batch()), **CLOSE)


@every_case
def test_rows_made_by_peft_give_the_same_logits_here(make: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    given = config(**fields).to_dict()
    told = {key: given.get(key) for key in ("r", "target_modules", "modules_to_save", "trainable_token_indices")}
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**told, fan_in_fan_out=make is tiny.gpt2))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    shaken(trained)
    theirs.eval().save_pretrained(tmp_path / "a")
    model = make()
    bank = lk.attach(model, theirs.peft_config["default"])
    assert bank.coverage("default").parameters == sum(parameter.numel() for parameter in trained)
    bank.detach()
    bank = lk.attach(model, slots=2)
    bank.load("a", tmp_path / "a")
    bank.use("a")
    torch.testing.assert_close(tiny.logits(model, batch()), tiny.logits(theirs, batch()), **CLOSE)
    again = bank.save("a", tmp_path / "again")
    assert again == lk.Adapter.load(tmp_path / "a") == lk.Adapter.load(tmp_path / "again")


@pytest.mark.parametrize("make", [tiny.llama, tied, gemma])
def test_training_changes_those_rows_and_nothing_else_and_follows_peft(make: Any, tmp_path: Path) -> None:
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bank = lk.attach(model, config(), name="a")
    assert [tuple(p.shape) for p in bank.parameters("a")][-1] == (3, 32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == bank.coverage("a").parameters
    bank.save("a", tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a", is_trainable=True)
    losses: list[list[float]] = []
    for each, parameters in (
        (model, bank.parameters("a")),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        losses.append([])
        for _ in range(10):
            inputs = batch()
            loss = each(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.05
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)
    rows = bank.snapshot("a").tokens()[EMBEDDING].rows
    assert (rows - before[f"{EMBEDDING}.weight"][NEW]).abs().amax(1).min() > 1e-3
    bank.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", [tiny.llama, tied, gemma, bart])
def test_each_row_of_a_batch_has_its_own_adapters_tokens(make: Any) -> None:
    model = make()
    adapters = {
        "one": adapter_of(model),
        "two": adapter_of(model, seed=6, trainable_token_indices=[5, 7, 90, 91, 2]),
        "pairs": adapter_of(model, seed=7, trainable_token_indices=None),
        "rows": adapter_of(model, seed=8, target_modules=[], trainable_token_indices=[90]),
    }
    base = tiny.logits(model, batch())
    bank, alone = lk.attach(model, dtype=torch.float32), {None: base}
    for name, adapter in adapters.items():
        bank.load(name, adapter)
        bank.use(name)
        alone[name] = tiny.logits(model, batch())
        bank.use(None)
        assert torch.equal(tiny.logits(model, batch()), base)
    for names in (["two", None, "one"], ["rows", "pairs", "two"], [None, "one", None]):
        for _ in range(2):  # the second time, what was prepared is used
            with bank.rows(names):
                mixed = tiny.logits(model, batch())
            expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
            torch.testing.assert_close(mixed, expected, **CLOSE)
    bank.use("one")
    assert torch.equal(tiny.logits(model, batch()), alone["one"])
    bank.use(None)
    bank.unload("two")
    bank.load("two", adapters["one"])  # into the slot of another, with fewer rows
    with bank.rows(["two", None, "one"]):
        mixed = tiny.logits(model, batch())
    torch.testing.assert_close(mixed[0], alone["one"][0], **CLOSE)
    bank.detach()
    assert torch.equal(tiny.logits(model, batch()), base)


def test_adapters_trained_together_have_the_gradients_they_have_alone() -> None:
    model = tied()
    bank = lk.attach(model, config(), name="a")
    bank.add("b", config(trainable_token_indices=[5, 7]))
    inputs, alone = batch(), {}
    for row, name in enumerate(["a", "b"]):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        with bank.using(name):
            model(**one, labels=one["input_ids"]).loss.backward()
        alone[name] = [p.grad.clone() for p in bank.parameters(name) if p.grad is not None]
        assert len(alone[name]) == len(bank.parameters(name))
        for parameter in bank.parameters(name):
            parameter.grad = None
    two = {key: value[:2] for key, value in inputs.items()}
    with bank.rows(["a", "b"]):
        logits = model(**two).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), two["input_ids"][:, 1:], reduction="none")
    loss.mean(1).sum().backward()
    for name in ("a", "b"):
        for parameter, wanted in zip(bank.parameters(name), alone[name], strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_a_bank_keeps_offers_snapshots_and_restores_rows(tmp_path: Path) -> None:
    model = tied()
    first, second = adapter_of(model), adapter_of(model, seed=6)
    first.save(tmp_path / "first")
    bank = lk.attach(model, slots=1)
    bank.offer("first", tmp_path / "first")
    bank.offer("second", second)
    logits = {}
    for name in ("first", "second", "first"):
        bank.use(None)
        bank.use(name)
        now = tiny.logits(model, batch())
        assert torch.equal(logits.setdefault(name, now), now)
    assert not torch.equal(logits["first"], logits["second"])
    assert bank.snapshot("first") == first
    bank.detach()
    bank = lk.attach(model, config(), name="a")
    with pytest.raises(BankError, match="covers the head"):
        bank.reference()  # trainers of preferences would use the head without the rows
    with pytest.raises(AdapterError, match="rows of other tokens"):
        bank.restore("a", adapter_of_other_tokens(first))
    bank.restore("a", first)
    assert torch.equal(tiny.logits(model, batch()), logits["first"])
    assert bank.snapshot("a") == first


def adapter_of_other_tokens(adapter: lk.Adapter) -> lk.Adapter:
    fields = {**adapter.config.to_dict(), "trainable_token_indices": [1, 2, 3]}
    other = lk.Adapter(lk.LoraConfig.from_dict(fields), adapter.tensors)
    assert other != adapter  # which tokens they are of gives rows their meaning
    return other


@pytest.mark.parametrize("make", [tiny.llama, tied, gemma, bart])
def test_a_merge_in_memory_puts_the_rows_in_their_places(make: Any) -> None:
    model = make()
    adapter, copy = adapter_of(model), make()
    bank = lk.attach(model, dtype=torch.float32)
    bank.load("a", adapter)
    bank.load("b", adapter_of(copy, seed=6))
    bank.use("b")
    other = tiny.logits(model, batch())
    bank.use("a")
    wanted = tiny.logits(model, batch())
    retained = bank.merge("a")
    torch.testing.assert_close(tiny.logits(model, batch()), wanted, **CLOSE)
    (path, held), *_ = adapter.tokens().items()
    table = model.get_submodule(path).weight
    assert torch.equal(table[NEW], held.rows)
    assert {one.path: one.retained for one in retained}[path] == 1
    bank.use("b")  # whose rows are its own, whatever the table has there now
    with bank.rows(["b", None, None]):
        mixed = tiny.logits(model, batch())
    bank.use("b")
    torch.testing.assert_close(mixed[0], tiny.logits(model, batch())[0], **CLOSE)
    assert not torch.allclose(other, wanted)
    bank.detach()
    assert torch.equal(model.get_input_embeddings().weight, table)


def test_rows_follow_the_dtype_of_the_base_and_a_copy_of_it_in_16_bits() -> None:
    model = tiny.llama(dtype=torch.bfloat16, tie=True)
    before = tiny.logits(model, batch())
    bank = lk.attach(model, config(), name="a")
    assert torch.equal(tiny.logits(model, batch()), before)
    assert {p.dtype for p in bank.parameters("a")} == {torch.float32}
    shaken(bank.parameters("a"))
    adapter, wanted = bank.snapshot("a"), tiny.logits(model, batch())
    bank.detach()
    bank = lk.attach(model, slots=2)
    bank.load("a", adapter)
    bank.use("a")
    torch.testing.assert_close(tiny.logits(model, batch()), wanted, rtol=0.02, atol=0.02)


def test_rows_at_the_end_of_a_resized_vocabulary_are_trained(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"96 rows, so token 97 is out of range.*resize_token_embeddings\(99\)"):
        lk.attach(tied(), config(trainable_token_indices=[97, 98]))
    adapters = []
    for seed in (1, 2):  # new rows are drawn at random, and differ from one resized base to another
        model = tied()
        torch.manual_seed(seed)
        model.resize_token_embeddings(99)
        bank = lk.attach(model, config(trainable_token_indices=[97, 98]), name="a")
        if not adapters:
            shaken(bank.parameters("a"))
            adapters.append(bank.snapshot("a"))
            wanted = tiny.logits(model, {"input_ids": torch.tensor([[97, 5, 98]])})
        bank.detach()
    with torch.no_grad():
        model.get_input_embeddings().weight[97:99] = 0.25
    bank = lk.attach(model, slots=1)
    bank.load("a", adapters[0])
    bank.use("a")
    found = tiny.logits(model, {"input_ids": torch.tensor([[97, 5, 98]])})
    torch.testing.assert_close(found[..., :96], wanted[..., :96], **CLOSE)
    with pytest.raises(AdapterError, match="resize_token_embeddings"):
        lk.attach(tied(), slots=1).load("a", adapters[0])


@pytest.mark.parametrize(
    "given",
    [[-1], ["5"], [True], [1.0], [5, 7, 5], 5, "5", [None], [[5]], list(range(70_000)), {"embed_tokens": 5}, {5: [1]}],
    ids=str,
)
def test_what_is_no_list_of_tokens_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices") as caught:
        config(trainable_token_indices=given)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("make", "fields", "told"),
    [
        (tiny.llama, {"trainable_token_indices": [96]}, "96 rows, so token 96"),
        (tiny.llama, {"trainable_token_indices": {"embed": [1]}}, "nothing in the model matches embed"),
        (tiny.llama, {"trainable_token_indices": {"norm": [1]}}, "norm: a LlamaRMSNorm is neither"),
        (tiny.llama, {"target_modules": ["embed_tokens"]}, "embed_tokens has LoRA weights as well"),
        (tiny.llama, {"modules_to_save": ["embed_tokens"]}, "embed_tokens is saved in full as well"),
        (tied, {"target_modules": ["lm_head"]}, "lm_head has LoRA weights as well"),
        (tied, {"modules_to_save": ["lm_head"]}, "lm_head is saved in full as well"),
        (tied, {"trainable_token_indices": {"lm_head": [1]}}, "one weight.*name only model.embed_tokens"),
        (tied, {"trainable_token_indices": {"embed_tokens": [2], "lm_head": [1]}}, "name only model.embed_tokens"),
        (bart, {"trainable_token_indices": {"encoder.embed_tokens": [1]}}, "name only model.shared"),
    ],
)
def test_tokens_that_do_not_fit_the_model_are_refused_and_change_nothing(
    make: Any, fields: dict[str, Any], told: str
) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=told):
        lk.attach(model, config(**fields))
    assert list(model.state_dict()) == keys


class Normed(nn.Embedding):
    """An embedding that does more than look up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


@pytest.mark.parametrize(
    ("embedding", "told"),
    [(Normed(96, 32), "a Normed does more than look rows up"), (nn.Embedding(96, 32, max_norm=1.0), "max_norm")],
)
def test_an_embedding_whose_rows_are_not_what_it_gives_is_refused(embedding: nn.Module, told: str) -> None:
    model: Any = tiny.llama()
    model.set_input_embeddings(embedding)
    with pytest.raises(TargetError, match=told):
        lk.attach(model, config())


def test_files_whose_rows_do_not_fit_are_refused_and_the_bank_is_as_it_was() -> None:
    model = tied()
    adapter = adapter_of(model)
    key = f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta"
    assert key in adapter.tensors
    fields = adapter.config.to_dict()

    def told(tensors: dict[str, torch.Tensor], **other: Any) -> str:
        bank = lk.attach(model, slots=1)
        try:
            with pytest.raises(LoraKitError) as caught:
                bank.load("a", lk.Adapter(lk.LoraConfig.from_dict({**fields, **other}), tensors))
            assert not bank.names
        finally:
            bank.detach()
        return str(caught.value)

    own = dict(adapter.tensors)
    without = {name: tensor for name, tensor in own.items() if name != key}
    assert "the file holds no token embeddings" in told(without)
    assert "rows (2, 32) for 3 tokens" in told({**own, key: own[key][:2]})
    assert "rows (32,) for 3 tokens" in told({**own, key: own[key][0]})
    assert "embeddings of 16 features, but the table has 32" in told({**own, key: own[key][:, :16]})
    assert "trainable_token_indices says nothing" in told(own, trainable_token_indices=None)
    assert "a list for one embedding" in told({**own, key.replace("model.embed_tokens", "lm_head"): own[key]})
    elsewhere = {**without, key.replace("embed_tokens", "other"): own[key]}
    assert "no token embeddings for model.embed_tokens" in told(elsewhere)
    assert "NaN" in told({**own, key: own[key] * float("nan")})
    assert "floating" in told({**own, key: own[key].long()})
    assert told(own, trainable_token_indices=[90, 5, 96]).count("resize_token_embeddings(97)") == 1


def test_pairs_and_rows_of_one_embedding_live_in_one_bank_and_what_is_saved_whole_does_not() -> None:
    model = tied()
    base = tiny.logits(model, batch())
    rows = adapter_of(model)
    pairs = adapter_of(model, seed=6, target_modules=["embed_tokens"], trainable_token_indices=None)
    whole = adapter_of(model, target_modules=[], modules_to_save=["embed_tokens"], trainable_token_indices=None)
    alone = {}
    for name, adapter in (("rows", rows), ("pairs", pairs)):
        bank = lk.attach(model, slots=1)
        bank.load(name, adapter)
        bank.use(name)
        alone[name] = tiny.logits(model, batch())
        bank.detach()
    for order in (("rows", "pairs"), ("pairs", "rows")):
        bank = lk.attach(model, slots=3)
        for name in order:
            bank.load(name, rows if name == "rows" else pairs)
        with bank.rows(["rows", "pairs", None]):
            mixed = tiny.logits(model, batch())
        torch.testing.assert_close(mixed[0], alone["rows"][0], **CLOSE)
        torch.testing.assert_close(mixed[1], alone["pairs"][1], **CLOSE)
        torch.testing.assert_close(mixed[2], base[2], **CLOSE)
        with pytest.raises(TargetError, match="replaces the module as a whole"):
            bank.load("whole", whole)
        bank.detach()
        assert torch.equal(tiny.logits(model, batch()), base)


def test_what_would_lose_the_rows_refuses_them_by_name(tmp_path: Path) -> None:
    model = tied()
    adapter = adapter_of(model)
    adapter.save(tmp_path / "a")
    for lose in (
        lambda: lk.resize(adapter, rank=2),
        lambda: lk.combine([(adapter, 0.5), (adapter, 0.5)], method="cat"),
        lambda: lk.export(adapter, "vllm", tmp_path / "out"),
        lambda: lk.adopt(peft.PeftModel.from_pretrained(tied(), tmp_path / "a")),
    ):
        with pytest.raises(LoraKitError, match="trainable_token_indices"):
            lose()
    assert not (tmp_path / "out").exists()
    lk.export(adapter, "peft", tmp_path / "peft")
    assert torch.equal(lk.Adapter.load(tmp_path / "peft").tokens()[EMBEDDING].rows, adapter.tokens()[EMBEDDING].rows)


def merged_into(folder: Path, out: Path, adapter: Any, **how: Any) -> tuple[Any, lk.MergeReport]:
    report = lk.merge(folder, adapter, out, **how)
    return transformers.AutoModelForCausalLM.from_pretrained(out).eval(), report


@pytest.mark.parametrize("make", [tiny.llama, tied, gemma])
def test_a_merge_of_files_writes_the_rows_and_keeps_what_is_tied(make: Any, tmp_path: Path) -> None:
    model = make()
    merging.base_folder(tmp_path / "base", model)
    fields = {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": [7]}} if make is tiny.llama else {}
    adapter = adapter_of(model, **fields)
    bank = lk.attach(model, slots=1)
    bank.load("a", adapter)
    bank.use("a")
    wanted = tiny.logits(model, batch())
    merged, report = merged_into(tmp_path / "base", tmp_path / "merged", adapter, verify="logits")
    torch.testing.assert_close(tiny.logits(merged, batch()), wanted, **CLOSE)
    rows = merged.get_input_embeddings().weight
    assert torch.equal(rows[NEW], adapter.tokens()[EMBEDDING].rows)
    others = [index for index in range(96) if index not in NEW]
    assert torch.equal(rows[others], make().get_input_embeddings().weight[others])
    assert not report.untied
    assert (merged.lm_head.weight is rows) == (make is not tiny.llama)
    assert report.counts["with new rows"] == (2 if make is tiny.llama else 1)
    assert {EMBEDDING, "model.layers.0.self_attn.q_proj"} <= {one.path for one in report.tensors}


def test_a_merge_of_files_in_another_dtype_rounds_the_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.merging.writing.fold_blocks._BLOCK_ELEMENTS", 16 * 32)  # several blocks
    model = tied()
    model.save_pretrained(tmp_path / "base")
    adapter = adapter_of(model)
    merged, report = merged_into(tmp_path / "base", tmp_path / "merged", adapter, dtype="bf16")
    rows = merged.get_input_embeddings().weight
    assert torch.equal(rows[NEW], adapter.tokens()[EMBEDDING].rows.bfloat16())
    others = [index for index in range(96) if index not in NEW]
    assert torch.equal(rows[others], tied().get_input_embeddings().weight[others].bfloat16())
    assert 0.9 < next(one.retained for one in report.tensors if one.path == EMBEDDING) < 1


def test_merges_of_several_adapters_put_rows_side_by_side_and_never_over_each_other(tmp_path: Path) -> None:
    model = tied()
    model.save_pretrained(tmp_path / "base")
    one, two = adapter_of(model), adapter_of(model, seed=6, trainable_token_indices=[7])
    merged, _ = merged_into(tmp_path / "base", tmp_path / "both", [(one, 1.0), (two, 1.0)])
    table = merged.get_input_embeddings().weight
    assert torch.equal(table[NEW], one.tokens()[EMBEDDING].rows)
    assert torch.equal(table[[7]], two.tokens()[EMBEDDING].rows)
    assert merged.lm_head.weight is table
    pairs = adapter_of(model, target_modules=["embed_tokens"], trainable_token_indices=None)
    for adapters, told in (
        ([(one, 1.0), (adapter_of(model, seed=7), 1.0)], "replace row 5 of"),
        ([(one, 0.5)], "cannot be weighted"),
        ([(one, 1.0), (pairs, 1.0)], "replaces what another changes"),
    ):
        with pytest.raises(MergeError, match=told):
            lk.merge(tmp_path / "base", adapters, tmp_path / "no")
        assert not (tmp_path / "no").exists()


def test_a_merge_that_wrote_other_rows_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tied()
    model.save_pretrained(tmp_path / "base")
    write_into = TokenReplacement.write_into

    def late(self: TokenReplacement, reserve: Any) -> Any:
        self._indices = self._indices + 1
        return write_into(self, reserve)

    monkeypatch.setattr(TokenReplacement, "write_into", late)
    with pytest.raises(VerificationError, match="other rows than it should have"):
        lk.merge(tmp_path / "base", adapter_of(model), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_inspect_and_the_model_card_say_which_rows_there_are(tmp_path: Path) -> None:
    model = tied()
    adapter_of(model).save(tmp_path / "a")
    found = inspect(tmp_path / "a")
    assert found.tokens == {EMBEDDING: tuple(NEW)}
    assert found.to_json()["tokens"] == {EMBEDDING: NEW}
    assert list_adapters(tmp_path)[0].targets == ("q_proj", "trainable_token_indices")
    assert found.parameters == 2 * 4 * 64 + 3 * 32
    assert "| token embeddings | 90, 5, 93 |" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(
    "given", [[1, 2], "[1, 2]", "1,2", {"embed_tokens": [1, 2]}, "{embed_tokens: [1, 2]}"], ids=str
)
def test_a_recipe_names_tokens(given: Any) -> None:
    recipe = load_recipe(
        {"base": "kit-base", "data": "x.jsonl", "out": "out"}, overrides={"lora.trainable_token_indices": given}
    )
    found = recipe.lora.trainable_token_indices
    assert (dict(found) if isinstance(found, Mapping) else found) in ((1, 2), {"embed_tokens": (1, 2)})
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("lora", [{"target_modules": []}, {"r": 2}], ids=["alone", "with pairs"])
def test_a_recipe_trains_rows_and_its_adapter_is_the_better_for_them(lora: dict[str, Any], tmp_path: Path) -> None:
    used = sorted(
        {token for row in texts.tokenizer()([pair["prompt"] for pair in PAIRS])["input_ids"] for token in row}
    )
    recipe = recipe_of(tmp_path, steps=4, lora={**lora, "trainable_token_indices": used[:6]})
    report = train(recipe, base=base_of("llama", tie=True))
    adapter = lk.Adapter.load(report.out)
    own = tied().get_input_embeddings().weight
    assert adapter.tokens()[EMBEDDING].indices == tuple(used[:6])
    assert not torch.equal(adapter.tokens()[EMBEDDING].rows, own[used[:6]])
    assert report.after is not None
    assert report.before is not None
    assert report.after.loss < report.before.loss
    again = train({**recipe, "out": str(tmp_path / "again")}, base=base_of("llama", tie=True))
    assert lk.Adapter.load(again.out) == adapter


@pytest.mark.slow
def test_a_swap_of_rows_recompiles_nothing() -> None:
    model = tied()
    bank = lk.attach(model, dtype=torch.float32, slots=4)
    for number, name in enumerate(("a", "b", "c")):
        bank.load(name, adapter_of_other(number))
    alone: dict[str | None, torch.Tensor] = {}
    for name in ("a", "b", "c", None):
        bank.use(name)
        alone[name] = tiny.logits(model, batch())
    compiled = torch.compile(model, backend="eager")
    tiny.logits(compiled, batch())
    with bank.rows(["a", None, "b"]):
        tiny.logits(compiled, batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("b", "c", None, "a"):
            bank.use(name)
            torch.testing.assert_close(tiny.logits(compiled, batch()), alone[name], **CLOSE)
        with bank.rows(["c", "b", None]):
            mixed = tiny.logits(compiled, batch())
    expected = torch.stack([alone[name][row] for row, name in enumerate(("c", "b", None))])
    torch.testing.assert_close(mixed, expected, **CLOSE)


def adapter_of_other(seed: int) -> lk.Adapter:
    return adapter_of(tied(), seed=seed, trainable_token_indices=NEW[: seed + 1])
