"""The model card of an adapter that PEFT made: what it is, how it did, and that PEFT loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_kit.io.text import escape_text
from lora_kit.models.tasks import CAUSAL_LM


def write_peft_loading_code(base: str, folder: str, *, task: str, labels: int) -> str:
    """Python that loads a base and an adapter of PEFT's on it.

    Args:
        labels: how many there are, where the task has some.
    """
    task = "" if task == CAUSAL_LM else f", task={task!r}"
    task += f", num_labels={labels}" if labels else ""
    return (
        f"import lora_kit as lk\nfrom peft import PeftModel\n\nbase = lk.load_base({base!r}{task})\n"
        f"model = PeftModel.from_pretrained(base.model, {folder!r})"
    )


def render_peft_card(
    name: str, fields: Mapping[str, Any], record: Mapping[str, Any], *, elements: int, digest: str, of_ours: bool
) -> bytes:
    """The model card.

    Args:
        fields: of the config.
        record: of the training.
        elements: values it holds.
        of_ours: whether it is a LoRA that a bank loads as well.
    """
    base, kind = fields["base_model_name_or_path"], fields["peft_type"]
    given = {key: value for key, value in record["recipe"]["peft"].items() if key != "peft_type"}
    rows = [("base", base), ("peft_type", kind), *((key, json.dumps(value)) for key, value in given.items())]
    rows += [("elements", f"{elements:,}"), ("digest", digest)]
    rows += [
        (key, f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in record["metrics"].items()
    ]
    table = "\n".join(f"| {_escape_cell(key)} | {_escape_cell(value)} |" for key, value in rows)
    how = write_peft_loading_code(
        base, f"path/to/{name}", task=record["recipe"]["task"], labels=len(record.get("labels", ()))
    )
    also = (
        "A bank of lora_kit loads it as well."
        if of_ours
        else "lora_kit's own bank does not load it, and cannot merge it."
    )
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags:
- {kind.lower()}
---
# {escape_text(name)}

A {kind} adapter that PEFT made, trained with lora_kit (`method: peft`).

| | |
|---|---|
{table}

```python
{how}
```
It is in PEFT's own format. {also}
""".encode()


def _escape_cell(value: object) -> str:
    return escape_text(value).replace("|", "\\|")
