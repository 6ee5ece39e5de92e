"""The adapters that come with the package, for `kit-base`: one for each task of the demo.

They are the repository's `adapters/`, of which a wheel carries a copy beside this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lora_kit.errors import StorageError
from lora_kit.io.atomic_write import check_output, write_folder
from lora_kit.names import SHIPPED_ADAPTERS

_IN_WHEEL: Final = Path(__file__).with_name("adapters")
_IN_REPOSITORY: Final = Path(__file__).parents[2] / "adapters"


def write_shipped_adapters(store: Path, *, replace: bool = False) -> tuple[Path, ...]:
    """Write the adapters into a store, a folder each, and return the folders.

    Raises:
        StorageError: one is there already and is not to be replaced, or cannot be written; or the package is not whole.
    """
    source = next((folder for folder in (_IN_WHEEL, _IN_REPOSITORY) if (folder / SHIPPED_ADAPTERS[0]).is_dir()), None)
    if source is None:
        raise StorageError("this installation has no adapters", hint="install the wheel, or clone the repository")
    targets = tuple(store / name for name in SHIPPED_ADAPTERS)
    for target in targets:
        check_output(target, replace=replace, owned=_is_adapter)
    for target in targets:
        files = {file.name: file.read_bytes() for file in sorted((source / target.name).iterdir())}
        write_folder(target, files, replace=replace, owned=_is_adapter)
    return targets


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
