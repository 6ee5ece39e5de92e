"""`verify`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import AsJson, Store, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.names import DEFAULT_STORE


@app.command
def verify(adapter: str, /, *, key: Path, store: Store = DEFAULT_STORE, json: AsJson = False) -> None:
    """Check that an adapter is what the owner of a key has signed.

    Exit code 4 if it is not.

    Args:
        adapter: A folder, or a name in the store.
        key: The public key: a PEM file.
    """
    from lora_kit.adapter.signing import verify as run
    from lora_kit.adapter.store import find_adapter

    found = run(find_adapter(adapter, store=store), key=key)
    if json:
        print_json({"verified": True, "digest": found.digest})
        return
    print_table(("", ""), [("signed", "by the owner of this key, and as it was then"), ("digest", found.digest)])
