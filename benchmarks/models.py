"""The models that are measured: Llamas with random weights, and the same adapters in lora_kit and in PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

import lora_kit as lk

if TYPE_CHECKING:
    import peft

VOCABULARY: Final = 2048
QV: Final = ("q_proj", "v_proj")
ALL: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


def llama(*, width: int = 512, layers: int = 8, dtype: str = "fp32") -> Any:
    """A Llama with the proportions of the published ones and a small vocabulary; the same weights at every call."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=32 * -(-width * 8 // (3 * 32)),
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM(config)
    return made.to(DTYPES[dtype]).eval()


def token_ids(rows: int, length: int) -> Tensor:
    """(rows, length) int64, the same at every call."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def lora(r: int, targets: Sequence[str] = ALL, *, use_dora: bool = False) -> lk.LoraConfig:
    return lk.LoraConfig(r=r, lora_alpha=2 * r, target_modules=tuple(targets), use_dora=use_dora, task_type="CAUSAL_LM")


def adapters(
    model: Any, ranks: Sequence[int], *, targets: Sequence[str] = ALL, use_dora: bool = False
) -> list[lk.Adapter]:
    """One adapter per rank, each of other values and with a delta that is felt; the model is as it was afterwards."""
    made = []
    for seed, r in enumerate(ranks):
        bank = lk.attach(model, lora(r, targets, use_dora=use_dora), name="a")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for leaf in bank.parameters("a"):
                if leaf.ndim > 1:  # a DoRA's lengths stay those of the weight
                    leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.02)
        made.append(bank.snapshot("a"))
        bank.detach()
    return made


def in_peft(model: Any, values: Mapping[str, lk.Adapter], *, adapter_dtype: str = "fp32") -> peft.PeftModel:
    """The same adapters in PEFT; the first one is active. PEFT's default holds them in fp32 whatever the base is in."""
    import peft

    wrapped: Any = None
    for name, value in values.items():
        config = peft.LoraConfig(
            r=value.config.r,
            lora_alpha=int(value.config.lora_alpha),
            target_modules=list(value.config.target_modules),
            use_dora=value.config.use_dora,
            task_type=value.config.task_type,
        )
        upcast = adapter_dtype == "fp32"
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=upcast)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=upcast)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.set_peft_model_state_dict(wrapped, dict(value.tensors), adapter_name=name)
    return wrapped


def bank_of(model: Any, values: Mapping[str, lk.Adapter]) -> lk.AdapterBank:
    """A bank for inference that holds these adapters and has no more room than they need."""
    bank = lk.attach(model, slots=len(values), max_rank=max(value.config.r for value in values.values()))
    for name, value in values.items():
        bank.load(name, value)
    return bank
