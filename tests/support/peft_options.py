"""Every option of `peft.LoraConfig` and every task type: whether an adapter that PEFT makes with it loads here.

`python -m tests.support.peft_options` writes the table into docs/foreign.md; a test fails when it is stale.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG
from lora_kit.errors import LoraKitError
from tests.support import classifiers, families, tiny

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "foreign.md"
BEGIN: Final = "<!-- options of PEFT: made by `python -m tests.support.peft_options` -->"
END: Final = "<!-- end of the options of PEFT -->"
LOADS: Final = "loads"
TOLERANCE: Final = 1e-6
_TIED: Final = {"ensure_weight_tying": True}


@dataclass(frozen=True)
class Case:
    """An adapter that PEFT makes.

    Attributes:
        option: the field of `peft.LoraConfig` that this is about.
        fields: of the config, beside those that every case has.
        model: the kind of base.
        written: fields that are written into the saved config, where PEFT makes such adapters only with data, or with
            packages, that are not here. The tensors are those of plain LoRA weights.
        config: the class of the config.
    """

    option: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    model: str = "CAUSAL_LM"
    written: Mapping[str, Any] = field(default_factory=dict)
    config: str = "LoraConfig"

    @property
    def shown(self) -> str:
        """The option's value, with those of other options that belong to it."""
        values = {**self.fields, **self.written}
        names = ["", *(f"{name}: " for name in values if name != self.option)]
        ordered = [values.pop(self.option, None), *values.values()]
        return ", ".join(f"`{name}{json.dumps(value)}`" for name, value in zip(names, ordered, strict=True))


CASES: Final = [
    *(Case("task_type", {"task_type": str(task.value)}, str(task.value)) for task in peft.TaskType),
    Case("task_type", {"task_type": None}),
    Case("auto_mapping", {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}),
    Case("peft_type", {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
         config="IA3Config"),
    Case("peft_version", {"peft_version": "0.99.0"}),
    Case("base_model_name_or_path", {"base_model_name_or_path": "some/model"}),
    Case("revision", {"revision": "main"}),
    Case("inference_mode", {"inference_mode": True}),
    Case("r", {"r": 2}),
    Case("target_modules", {"target_modules": "all-linear"}),
    Case("target_modules", {"target_modules": r".*\.1\.mlp\.up_proj"}),
    Case("target_modules", {"target_modules": ["q_proj", "of_another_model"]}),
    Case("target_modules", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    Case("target_modules", {"target_modules": "dummy-target-modules", "modules_to_save": ["lm_head"]}),
    Case("exclude_modules", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    Case("lora_alpha", {"lora_alpha": 0.5}),
    Case("lora_dropout", {"lora_dropout": 0.25}),
    Case("fan_in_fan_out", {"fan_in_fan_out": True, "target_modules": ["c_attn"]}, "gpt2"),
    Case("bias", {"bias": "all"}, "SEQ_CLS"),
    Case("bias", {"bias": "lora_only"}, "SEQ_CLS"),
    Case("use_rslora", {"use_rslora": True}),
    Case("modules_to_save", {"modules_to_save": ["norm"]}),
    Case("modules_to_save", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    Case("modules_to_save", {"modules_to_save": ["of_another_model"]}),
    *(Case("init_lora_weights", {"init_lora_weights": init})
      for init in (True, False, "gaussian", "eva", "mica", "orthogonal", "olora", "pissa", "pissa_niter_4")),
    *(Case("init_lora_weights", written={"init_lora_weights": init}) for init in ("corda", "lora_ga", "loftq")),
    Case("layers_to_transform", {"layers_to_transform": [1]}),
    Case("layers_to_transform", {"layers_to_transform": [1, 7]}),
    Case("layers_pattern", {"layers_to_transform": [0], "layers_pattern": "layers"}),
    Case("rank_pattern", {"rank_pattern": {r"layers\.1\..*": 2}}),
    Case("alpha_pattern", {"alpha_pattern": {"v_proj": 3}}),
    Case("megatron_config", written={"megatron_config": {"hidden_size": 32}}),
    Case("megatron_core", {"megatron_core": "other.core"}),
    Case("trainable_token_indices", {"trainable_token_indices": [3, 5]}),
    Case("trainable_token_indices", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}}),
    Case("loftq_config", written={"loftq_config": {"loftq_bits": 4}}),
    Case("eva_config", written={"init_lora_weights": "eva", "eva_config": {"rho": 1.5}}),
    Case("corda_config", written={"corda_config": {"corda_method": "ipm"}}),
    Case("lora_ga_config", written={"lora_ga_config": {"direction": "ArB2r"}}),
    Case("use_dora", {"use_dora": True}),
    Case("velora_config", {"velora_config": {"num_groups": 4}}),
    Case("alora_invocation_tokens", {"alora_invocation_tokens": [5, 6]}),
    Case("use_qalora", written={"use_qalora": True}),
    Case("qalora_group_size", {"qalora_group_size": 8}),
    Case("monteclora_config", {"monteclora_config": {"num_samples": 4}}),
    Case("layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
    Case("runtime_config", {"runtime_config": {"ephemeral_gpu_offload": True}}),
    Case("lora_bias", {"lora_bias": True}, "SEQ_CLS"),
    Case("target_parameters", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    Case("use_bdlora", {"use_bdlora": {"target_modules_bd_a": ["q_proj", "v_proj"], "nblocks": 2}}),
    Case("arrow_config", written={"arrow_config": {"top_k": 2}}),
    Case("kasa_config", {"kasa_config": {}}),
    Case("ensure_weight_tying", {**_TIED, "target_modules": ["q_proj", "embed_tokens"]}, "tied"),
    Case("ensure_weight_tying", {**_TIED, "modules_to_save": ["embed_tokens"]}, "tied"),
    Case("ensure_weight_tying", {**_TIED, "trainable_token_indices": [3]}, "tied"),
]  # fmt: skip
"""At least one for every option."""


def find_outcome(case: Case) -> str:
    """Return `LOADS` where an adapter gives the same here as in PEFT, there and back; else the message of its refusal.

    Raises:
        AssertionError: it loads, and gives something else.
    """
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, folder = _train(case), Path(name)
        theirs.save_pretrained(str(folder / "theirs"))
        config = folder / "theirs" / CONFIG
        config.write_text(json.dumps({**json.loads(config.read_text()), **case.written}))
        model = _make_base(case.model)
        bank = lk.attach(model, slots=1, max_rank=64)
        try:
            adapter = bank.load("a", folder / "theirs")
        except LoraKitError as error:
            return error.message.replace(f"{config}: ", "")
        bank.use("a")
        _check_equal(case, model, theirs)
        bank.detach()
        adapter.save(folder / "ours")
        if not case.written:  # PEFT would want to have what it was not made with
            _check_equal(case, peft.PeftModel.from_pretrained(model, folder / "ours").eval(), theirs)
    return LOADS


def render_table(outcomes: Mapping[int, str]) -> str:
    """Return the table of the page, with what stands around it.

    Args:
        outcomes: by position in `CASES`.
    """
    rows = [f"| `{case.option}` | {case.shown} | {outcomes[index]} |" for index, case in enumerate(CASES)]
    return "\n".join([BEGIN, "| option of PEFT | value | here |", "|---|---|---|", *rows, END])


def _train(case: Case) -> Any:
    """Return a PeftModel whose adapter does something."""
    common = {"r": 4, "target_modules": _targets_of(case.model)} if case.config == "LoraConfig" else {}
    torch.manual_seed(2)
    fields = {"task_type": case.model if case.model in peft.TaskType.__members__ else "CAUSAL_LM", **common}
    fields |= case.fields
    if "runtime_config" in fields:  # of which PEFT makes no object itself
        fields["runtime_config"] = peft.LoraRuntimeConfig(**fields["runtime_config"])
    config = getattr(peft, case.config)(**fields)
    model = peft.get_peft_model(_make_base(case.model), config).eval()
    if "peft_version" in case.fields:  # which PEFT sets
        config.peft_version = case.fields["peft_version"]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _targets_of(model: str) -> list[str]:
    return ["q", "v"] if model == "SEQ_2_SEQ_LM" else ["q_proj", "v_proj", "query", "value"]


def _make_base(model: str) -> Any:
    if model in classifiers.HEADS:
        return classifiers.classifier("Bert", model)
    if model in ("QUESTION_ANS", "FEATURE_EXTRACTION"):
        kind = transformers.BertForQuestionAnswering if model == "QUESTION_ANS" else transformers.BertModel
        torch.manual_seed(0)
        return kind(transformers.BertConfig(**{**classifiers.FAMILIES["Bert"][0], "num_labels": 2})).eval()
    if model == "SEQ_2_SEQ_LM":
        return next(family for family in families.FAMILIES if family.name == "T5").make()
    return tiny.gpt2() if model == "gpt2" else tiny.llama(tie=model == "tied")


def _check_equal(case: Case, model: nn.Module, theirs: nn.Module) -> None:
    difference = (_run(case, model) - _run(case, theirs)).abs().max().item()
    assert difference <= TOLERANCE, f"{case.option} ({case.shown}) loads, and is off by {difference:g}"


def _run(case: Case, model: nn.Module) -> Tensor:
    """Return every tensor that a model gives, one after the other."""
    inputs = tiny.batch()
    if case.model == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        outputs = model(**inputs)
    return torch.cat([value.flatten() for value in outputs.values() if isinstance(value, Tensor)])


def split_page(text: str) -> tuple[str, str, str]:
    """Return what is before the table of the page, the table, and what is behind it."""
    head, _, rest = text.partition(BEGIN)
    table, _, tail = rest.partition(END)
    return head, f"{BEGIN}{table}{END}", tail


def _main() -> None:
    head, _, tail = split_page(PAGE.read_text())
    PAGE.write_text(head + render_table({index: find_outcome(case) for index, case in enumerate(CASES)}) + tail)


if __name__ == "__main__":
    _main()
