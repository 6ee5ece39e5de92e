"""`sign`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import AsJson, Replace, Store, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.names import DEFAULT_STORE


@app.command
def sign(
    adapter: str, /, *, key: Path, replace: Replace = False, store: Store = DEFAULT_STORE, json: AsJson = False
) -> None:
    """Sign an adapter's folder with a private key.

    Example: lora-kit sign mine --key private.pem

    Args:
        adapter: A folder, a name in the store, or a hub id.
        key: Private elliptic curve key: a PEM file without a password.
    """
    from lora_kit.adapter.signing import sign as run
    from lora_kit.adapter.store import find_adapter

    signature = run(find_adapter(adapter, store=store), key=key, replace=replace)
    if json:
        print_json({"signature": str(signature)})
        return
    print_table(("", ""), [("signature", str(signature))])
