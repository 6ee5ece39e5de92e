"""Serve a store of adapters in OpenAI's API, and ask two of them: python examples/serve_and_ask.py"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

STORE = Path(__file__).parents[1] / "adapters"
PROMPT = "The boy ran over the hill to the little church.\n"


def ask(address: str, model: str, *, tokens: int = 24) -> str:
    """Return what an adapter, named as the model, writes after the prompt; any client of OpenAI's API does the same."""
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"].strip()


def main() -> None:
    """Start `lora-kit serve` on a free port, ask, and stop it."""
    command = ["-m", "lora_kit", "serve", "--base", "kit-base", "--store", str(STORE), "--port", "0"]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.:]+", line)))
            for model in ("pirate", "scene", "kit-base"):
                print(f"{model}: {ask(address, model)}")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
