"""Looking at adapters: what a store holds, what one adapter is made of, norms without dense products."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kit as lk
from lora_kit.adapter.inspect import inspect
from lora_kit.adapter.peft_keys import lora_weight_keys
from lora_kit.adapter.plain_adapter import read_plain_adapter
from lora_kit.adapter.store import find_adapter, list_adapters, sum_file_sizes
from lora_kit.algebra.low_rank import compute_singular_values
from lora_kit.errors import AdapterError, ConfigError, UnknownAdapterError
from lora_kit.models.infer_base import infer_base
from tests.support import tiny


def saved(folder: Path, *, base: str | None = "kit-base", rank: int = 3, **fields: object) -> Path:
    """An adapter of the tiny Llama that does something."""
    config = lk.LoraConfig.from_dict(
        {"r": rank, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **fields}
        | {"base_model_name_or_path": base}
    )
    bank = lk.attach(tiny.llama(), config, name=folder.name)
    bank.save(folder.name, folder, record={"metrics": {"perplexity": 4.5}, "seed": 7})
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    saved(tmp_path / "store" / "sql")
    saved(tmp_path / "store" / "summary", rank=2)
    return tmp_path / "store"


def test_inspect_tells_layers_ranks_and_identity(store: Path) -> None:
    found = inspect("sql", store=store)
    adapter = lk.Adapter.load(store / "sql")
    assert [layer.path for layer in found.layers] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert {(layer.rank, layer.scaling, layer.kind) for layer in found.layers} == {(3, 2.0, "linear")}
    assert found.layers[0].shape == (32, 48)
    assert found.digest == adapter.digest
    assert found.parameters == adapter.num_parameters
    assert found.bytes == sum(file.stat().st_size for file in (store / "sql").iterdir())
    assert found.record["seed"] == 7
    assert found.base is not None


def test_norms_are_those_of_the_dense_deltas(store: Path) -> None:
    adapter = lk.Adapter.load(store / "sql")
    for layer in inspect(store / "sql").layers:
        pair = adapter.pairs()[layer.path]
        dense = layer.scaling * (pair.b.double() @ pair.a.double())
        assert layer.norm == pytest.approx(float(dense.norm()), rel=1e-9)
    total = math.sqrt(sum(layer.norm**2 for layer in inspect(store / "sql").layers))
    assert inspect(store / "sql").norm == pytest.approx(total)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 12)),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_singular_values_are_those_of_the_product(sizes: tuple[int, int, int], seed: int, magnitude: float) -> None:
    out, rank, into = sizes
    generator = torch.Generator().manual_seed(seed)
    b = magnitude * torch.randn(out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    found, dense = compute_singular_values(b, a), torch.linalg.svdvals(b @ a)
    assert len(found) == min(sizes)
    torch.testing.assert_close(found, dense[: len(found)], rtol=1e-9, atol=float(1e-12 * dense[0]))


def test_factors_that_cancel_have_no_norm_and_no_rank() -> None:
    b = torch.tensor([[1.0, -1.0]])
    a = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert float(compute_singular_values(b, a).norm()) < 1e-15


def test_a_layer_says_over_how_many_ranks_its_delta_is_spread(tmp_path: Path) -> None:
    adapter = lk.Adapter.load(saved(tmp_path / "sql", target_modules=["q_proj"], lora_alpha=3))
    wanted = {0: (8.0, 0.0, 0.0), 1: (4.0, 4.0, 4.0)}
    tensors = {}
    for layer, values in wanted.items():
        key_a, key_b = lora_weight_keys(f"model.layers.{layer}.self_attn.q_proj", "linear")
        q = torch.linalg.qr(torch.randn(32, 3)).Q
        tensors[key_a], tensors[key_b] = q.T.contiguous(), q * torch.tensor(values)
    lk.Adapter(adapter.config, tensors).save(tmp_path / "made")
    one, all_three = inspect(tmp_path / "made").layers
    assert one.values == pytest.approx((8, 0, 0), abs=1e-5)
    assert (one.effective_rank, all_three.effective_rank) == (pytest.approx(1, abs=1e-4), pytest.approx(3))
    assert [one.ranks_for(0.99), all_three.ranks_for(0.99), all_three.ranks_for(0.6)] == [1, 3, 2]
    assert all_three.norm == pytest.approx(48**0.5)


def test_a_delta_of_zero_has_no_effective_rank(tmp_path: Path) -> None:
    bank = lk.attach(tiny.llama(), lk.LoraConfig(r=2, target_modules=["q_proj"]), name="new")
    bank.save("new", tmp_path / "new")
    assert [(layer.effective_rank, layer.ranks_for(0.9)) for layer in inspect(tmp_path / "new").layers] == [(0, 1)] * 2


def test_the_inspection_is_json(store: Path) -> None:
    found = json.loads(json.dumps(inspect("sql", store=store).to_json()))
    assert found["config"]["r"] == 3
    assert found["layers"][0]["shape"] == [32, 48]
    assert json.loads(json.dumps([summary.to_json() for summary in list_adapters(store)]))[0]["name"] == "sql"


def test_a_store_lists_its_adapters_by_name(store: Path) -> None:
    (store / "notes").mkdir()
    (store / "README.md").write_text("not an adapter", encoding="utf-8")
    found = list_adapters(store)
    assert [summary.name for summary in found] == ["sql", "summary"]
    assert [summary.rank for summary in found] == [3, 2]
    assert found[0].targets == ("q_proj", "down_proj")
    assert found[0].base == "kit-base"
    assert found[0].metrics == {"perplexity": 4.5}
    assert not found[0].problem


def test_broken_adapters_are_listed_with_the_reason(store: Path) -> None:
    weights = store / "sql" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (store / "summary" / "adapter_config.json").unlink()
    (store / "torn").mkdir()
    (store / "torn" / "adapter_config.json").write_text('{"r": ', encoding="utf-8")
    by_name = {summary.name: summary for summary in list_adapters(store)}
    assert set(by_name) == {"sql", "summary", "torn"}
    assert "truncated" in by_name["sql"].problem
    assert by_name["sql"].rank == 3
    assert "adapter_config.json" in by_name["summary"].problem
    assert "JSON" in by_name["torn"].problem or "adapter_model" in by_name["torn"].problem
    assert not any(summary.digest for summary in by_name.values())


def test_a_store_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not a folder"):
        list_adapters(tmp_path / "nowhere")


def test_an_adapter_is_found_by_folder_or_name(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_adapter("sql", store=store) == store / "sql"
    assert find_adapter(store / "sql", store="elsewhere") == store / "sql"
    monkeypatch.chdir(store)
    assert find_adapter("sql", store="elsewhere") == Path("sql")


def test_an_unknown_adapter_is_an_error_that_names_the_nearest(store: Path) -> None:
    with pytest.raises(UnknownAdapterError, match="did you mean 'summary'"):
        find_adapter("sumary", store=store)
    with pytest.raises(UnknownAdapterError, match="sql, summary"):
        find_adapter("zzzzzz", store=store)
    for outside in ("", "../store/none", "sql/none"):
        with pytest.raises(UnknownAdapterError):
            find_adapter(outside, store=store)


def test_only_kit_base_is_taken_from_an_adapter(store: Path) -> None:
    assert infer_base([], store=store) == "kit-base"
    assert infer_base(["sql", "summary"], store=store) == "kit-base"
    saved(store / "foreign", base="https://example.org/\x1b[31mmodel")
    with pytest.raises(ConfigError, match="no base was given"):
        infer_base(["sql", "foreign"], store=store)


def test_size_on_disk_does_not_follow_links(store: Path, tmp_path: Path) -> None:
    before = sum_file_sizes(store / "sql")
    large = tmp_path / "large"
    large.write_bytes(bytes(10_000))
    (store / "sql" / "link").symlink_to(large)
    assert sum_file_sizes(store / "sql") == before


def test_adapters_of_saved_modules_alone_are_inspected(tmp_path: Path) -> None:
    config = lk.LoraConfig(target_modules=(), modules_to_save=("classifier",))
    bank = lk.attach(tiny.bert(), config, name="mood")
    bank.save("mood", tmp_path / "mood")
    found = inspect(tmp_path / "mood")
    assert found.layers == ()
    assert found.norm == 0.0
    assert sorted(found.saved) == ["classifier.bias", "classifier.weight"]
    assert list_adapters(tmp_path)[0].targets == ("classifier",)


# Without torch


PLAIN = {
    "linear": {},
    "rank-stabilized": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", PLAIN.values(), ids=PLAIN)
def test_numpy_alone_finds_what_the_whole_reader_finds(
    tmp_path: Path, fields: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lk.Adapter.load(saved(tmp_path / "made", **fields))
    tensors = {key: tensor.to(dtype) for key, tensor in made.tensors.items()}
    lk.Adapter(made.config, tensors, record={"seed": 7}).save(tmp_path / "cast")
    assert read_plain_adapter(tmp_path / "cast") is not None
    plain = inspect(tmp_path / "cast")
    monkeypatch.setattr("lora_kit.adapter.inspect.read_plain_adapter", lambda folder: None)
    assert plain == inspect(tmp_path / "cast")


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"trainable_token_indices": [1, 2]}], ids=str)
def test_more_than_plain_weights_is_left_to_the_whole_reader(tmp_path: Path, fields: dict[str, object]) -> None:
    folder = saved(tmp_path / "more", **fields)
    assert read_plain_adapter(folder) is None
    assert inspect(folder).digest == lk.Adapter.load(folder).digest


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "lora_kit.json"])
def test_a_changed_file_is_left_to_the_whole_reader_which_rejects_it(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "changed")
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(bytes(data))
    assert read_plain_adapter(folder) is None
    with pytest.raises((AdapterError, ConfigError)):
        inspect(folder)


def test_inspect_imports_neither_torch_nor_transformers(store: Path) -> None:
    code = "import sys; from lora_kit.cli.main import main; code = main(['inspect', sys.argv[1]])\n"
    code += "sys.exit(code or bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, str(store / "sql")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.self_attn.q_proj" in done.stdout
