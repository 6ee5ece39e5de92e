"""`verify`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import AsJson, Store, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.errors import AdapterError
from lora_kit.names import DEFAULT_STORE


@app.command
def verify(adapter: str, /, *, key: Path | None = None, store: Store = DEFAULT_STORE, json: AsJson = False) -> None:
    """Verify every file of an adapter: by the digests in its record and, with a key, by the signature of its owner.

    Exit code 4 if a file was changed, or the adapter is not what was signed.

    Example: lora-kit verify pirate

    Args:
        adapter: A folder, a name in the store, or a hub id.
        key: The public key: a PEM file. Without one, only the record in the folder vouches for the files.
    """
    from lora_kit.adapter.adapter import Adapter
    from lora_kit.adapter.adapter_record import check_files
    from lora_kit.adapter.signing import verify as verify_signature
    from lora_kit.adapter.store import find_adapter

    folder = find_adapter(adapter, store=store)
    loaded = Adapter.load(folder) if key is None else verify_signature(folder, key=key)
    if not loaded.record:
        raise AdapterError(f"{folder} has no lora_kit.json, so nothing says what its files were", hint="save it again")
    files = check_files(folder, dict(loaded.record))
    if json:
        print_json({"verified": True, "digest": loaded.digest})
        return
    signed = [("signed", "by the owner of this key, and unchanged since")] if key else []
    print_table(("", ""), [*signed, ("files", f"{files} as they were saved"), ("digest", loaded.digest)])
