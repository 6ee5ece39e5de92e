"""The model card of an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import format_list
from lora_kit.io.text import escape_text


def render_model_card(name: str, config: LoraConfig, metrics: Any, *, parameters: int, digest: str) -> bytes:
    """The model card: what the adapter is, how it did, how to load it."""
    base = config.base_model_name_or_path or "unknown"
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    rows = [
        ("base", base),
        ("rank, alpha", f"{config.r}, {config.lora_alpha:g}" if config.target_modules else "no low-rank pairs"),
        ("target modules", targets or "none"),
        ("modules saved whole", ", ".join(config.modules_to_save) or "none"),
        *([("rows of tokens", describe_tokens(config))] if config.trainable_token_indices else []),
        ("parameters", f"{parameters:,}"),
        ("digest", digest),
    ]
    rows += [
        (key, f"{value:.6g}" if isinstance(value, float) else str(value))
        for key, value in (metrics if isinstance(metrics, Mapping) else {}).items()
    ]
    table = "\n".join(f"| {_escape_cell(key)} | {_escape_cell(value)} |" for key, value in rows)
    label, path = json.dumps(name), json.dumps(f"path/to/{name}")
    base_line = f"base_model: {json.dumps(base)}\n" if base != "unknown" else ""
    return f"""---
library_name: peft
{base_line}tags:
- lora
---
# {escape_text(name)}

A LoRA adapter trained with lora_kit.

| | |
|---|---|
{table}

```python
import lora_kit as lk

bank = lk.attach(model, slots=1)
bank.load({label}, {path})
bank.use({label})
```
It is in PEFT's format: `peft.PeftModel.from_pretrained(model, {path})` loads it as well.
""".encode()


def describe_tokens(config: LoraConfig) -> str:
    """The tokens of which an adapter has rows, in words; empty where it has none."""
    given = config.trainable_token_indices or ()
    by_name = given if isinstance(given, Mapping) else {"": given} if given else {}
    said = [(name, format_list([str(index) for index in indices])) for name, indices in by_name.items()]
    return "; ".join(f"{name}: {told}" if name else told for name, told in said)


def _escape_cell(value: object) -> str:
    return escape_text(value).replace("|", "\\|")
