"""PeftModels with one adapter or two, and what their models are made of."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from tests.support import tiny


def peft_model(kind: str = "llama", **fields: Any) -> Any:
    """A PeftModel whose adapter does something."""
    torch.manual_seed(2)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    model = peft.get_peft_model(tiny.MODELS[kind](), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def two_adapters(**fields: Any) -> Any:
    """A PeftModel with another adapter of another rank beside the active one."""
    model = peft_model(**fields)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj", "up_proj"], init_lora_weights=False))
    return model


def looks(model: nn.Module) -> list[Any]:
    """What a model is made of: modules, parameters, what trains, what is in which mode."""
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    return modules + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
