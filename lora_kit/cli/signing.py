"""`sign` and `verify`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import ADAPTERS, AsJson, Replace, Store, app
from lora_kit.cli.screen import print_json, print_table


@app.command
def sign(
    adapter: str, /, *, key: Path, replace: Replace = False, store: Store = ADAPTERS, json: AsJson = False
) -> None:
    """Sign an adapter's folder with a private key.

    Args:
        adapter: A folder, or a name in the store.
        key: Private elliptic curve key: a PEM file without a password.
    """
    from lora_kit.inspect import find_adapter
    from lora_kit.signing import sign as run

    signature = run(find_adapter(adapter, store=store), key=key, replace=replace)
    if json:
        print_json({"signature": str(signature)})
        return
    print_table(("", ""), [("signature", str(signature))])


@app.command
def verify(adapter: str, /, *, key: Path, store: Store = ADAPTERS, json: AsJson = False) -> None:
    """Check that an adapter is what the owner of a key has signed.

    Exit code 4 if it is not.

    Args:
        adapter: A folder, or a name in the store.
        key: The public key: a PEM file.
    """
    from lora_kit.inspect import find_adapter
    from lora_kit.signing import verify as run

    found = run(find_adapter(adapter, store=store), key=key)
    if json:
        print_json({"verified": True, "digest": found.digest})
        return
    print_table(("", ""), [("signed", "by the owner of this key, and as it was then"), ("digest", found.digest)])
