"""What clients call adapters: names of the store, names given at run time, aliases; each stands for one content.

An adapter's digest says what it is. A label is only a pointer, which flips in one step; requests that have begun keep
the content that they began with.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.folder import has_adapter_files
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, StorageError, UnknownAdapterError, format_list
from lora_kit.io.atomic_write import write_file
from lora_kit.io.read import read_json
from lora_kit.io.text import escape_text
from lora_kit.serving.adapter_tasks import can_offer, make_task_error, read_adapter_task
from lora_kit.serving.engine import RequestError
from lora_kit.serving.label_state import LabelState

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names that clients may give."""
DIGEST_LENGTH: Final = 12
"""Characters of a digest that are enough in `label@digest`."""
_READS: Final = 4
"""How often a folder is read that changes while it is read."""
_STATE_BYTES: Final = 2**22

Signature = tuple[tuple[str, int, int, int, int], ...]
"""Name, size, times and inode of the files of a folder: if it is the same, so are they."""


class AdapterLabels:
    """Finds the content that a label stands for. Any thread may use it.

    Args:
        store: folder with a folder for each adapter; each that is for the server's task is offered under its name.
        base_name: what the base is called; no label may be.
        task: of the server; None to offer the adapters of every task.
        state_file: keeps what was loaded, aliased and pinned at run time; None to forget it at the end.
        host_bytes: of adapters that are kept in host memory, at most.

    Raises:
        ConfigError: the state file is not one of ours.
    """

    def __init__(
        self,
        store: Path,
        *,
        base_name: str,
        task: str | None = None,
        state_file: Path | None = None,
        host_bytes: int = 2**30,
    ) -> None:
        self.store = store
        self.base_name = base_name
        self._task = task
        self._state_file = state_file
        self._host_bytes = host_bytes
        self._lock = threading.RLock()
        self._read = OrderedDict[Path, tuple[Signature, Adapter]]()  # the least recently used first
        self._state = self._read_state()

    # Looking up

    def names(self) -> tuple[str, ...]:
        """Return every label that is offered: those of the store, those given at run time, and aliases."""
        with self._lock:
            given = [label for label in (*self._state.loaded, *self._state.aliases) if self._can_offer(label)]
            return tuple(dict.fromkeys([*self.list_store(), *given]))

    @property
    def state(self) -> LabelState:
        """What was loaded, aliased and pinned."""
        with self._lock:
            return self._state

    def resolve(self, name: str) -> Adapter:
        """Return the content of a label, an alias, or `label@digest`; read it if that is new.

        Raises:
            UnknownAdapterError: there is none, or it has another digest now.
            RequestError: it is for another task than the server's.
            AdapterError, ConfigError, StorageError: its folder cannot be read.
        """
        label, _, digest = name.partition("@")
        adapter = self._load(self._find_folder(label))
        if digest and not (len(digest) >= DIGEST_LENGTH and adapter.digest.startswith(digest)):
            raise UnknownAdapterError(name, [f"{label}@{adapter.digest[:DIGEST_LENGTH]}"])
        return adapter

    def peek(self, label: str) -> Adapter | None:
        """Return the content of a label if it was read before and has not changed since."""
        try:
            folder = self._find_folder(label)
        except (UnknownAdapterError, RequestError):
            return None
        with self._lock:
            signature, adapter = self._read.get(folder, (None, None))
        return adapter if adapter is not None and signature == _sign_folder(folder) else None

    def target_of(self, label: str) -> str:
        """Return the name in the store that a label stands for.

        Raises:
            UnknownAdapterError: no such label.
            RequestError: it is for another task than the server's.
        """
        return self._find_folder(label).name

    def _find_folder(self, label: str) -> Path:
        name = self._name_of(label)
        folder = self.store / name
        if not NAME.fullmatch(name) or not _is_adapter(folder):
            raise UnknownAdapterError(label, self.names())
        self._check_task(label, folder)
        return folder

    def _name_of(self, label: str) -> str:
        """Return the name that a label stands for, which may be no name of an adapter, or a path."""
        with self._lock:
            label = self._state.aliases.get(label, label)
            return self._state.loaded.get(label, label)

    def _can_offer(self, label: str) -> bool:
        name = self._name_of(label)
        return not NAME.fullmatch(name) or can_offer(read_adapter_task(self.store / name), self._task)

    def _check_task(self, label: str, folder: Path) -> None:
        own = read_adapter_task(folder)
        if own is not None and self._task is not None and not can_offer(own, self._task):
            raise make_task_error(f"adapter {label!r}", own, self._task)

    def _load(self, folder: Path) -> Adapter:
        """Return the adapter of a folder: as it was read before, if no file of it has changed.

        A folder that is replaced meanwhile is read again.
        """
        for _ in range(_READS - 1):
            signature = _sign_folder(folder)
            try:
                return self._read_whole(folder, signature)
            except LoraKitError:
                if signature == _sign_folder(folder):
                    raise
        return self._read_whole(folder, _sign_folder(folder))

    def _read_whole(self, folder: Path, signature: Signature) -> Adapter:
        with self._lock:
            kept = self._read.get(folder)
            if kept is not None and kept[0] == signature:
                self._read.move_to_end(folder)
                return kept[1]
        adapter = Adapter.load(folder)
        if not signature or _sign_folder(folder) != signature:
            raise AdapterError(f"{escape_text(folder)} changed while it was read", hint="ask again")
        with self._lock:
            self._read[folder] = signature, adapter
            self._read.move_to_end(folder)
            self._trim()
        return adapter

    def _trim(self) -> None:
        size = sum(adapter.nbytes for _, adapter in self._read.values())
        while size > self._host_bytes and len(self._read) > 1:
            _, (_, adapter) = self._read.popitem(last=False)
            size -= adapter.nbytes

    def list_store(self) -> list[str]:
        """Return the names of the adapters in the store that are offered, as it is now."""
        return [name for name in self._list_all() if can_offer(read_adapter_task(self.store / name), self._task)]

    def list_not_offered(self) -> dict[str, str]:
        """Return the tasks of the adapters in the store that are for another task than the server's, by name."""
        tasks = {name: read_adapter_task(self.store / name) for name in self._list_all()}
        return {name: own for name, own in tasks.items() if own is not None and not can_offer(own, self._task)}

    def check_store(self, name: str) -> None:
        """Raise unless the store has an adapter of a name, and it is offered.

        Raises:
            UnknownAdapterError: the store has none of that name.
            RequestError: it is for another task than the server's.
        """
        if not NAME.fullmatch(name) or not _is_adapter(self.store / name):
            raise UnknownAdapterError(name, self.list_store())
        self._check_task(name, self.store / name)

    def _list_all(self) -> list[str]:
        return [folder.name for folder in list_adapter_folders(self.store)]

    # Changing

    def load(self, label: str, name: str) -> None:
        """Let a label stand for an adapter of the store from now on.

        Raises:
            ConfigError: the label is not one, or is the base's, an alias, or the name of another adapter of the store.
            UnknownAdapterError: the store has none of that name.
            RequestError: it is for another task than the server's.
            StorageError: the state file cannot be written; nothing has changed.
        """
        self._check_label(label)
        self.check_store(name)
        with self._lock:
            if label in self._state.aliases:
                raise ConfigError(f"{label!r} is an alias", hint="take the alias away first")
            if label != name and label in self._list_all():
                raise ConfigError(f"{label!r} is another adapter of the store", hint="choose another label")
            self._keep(LabelState({**self._state.loaded, label: name}, self._state.aliases, self._state.pinned))

    def unload(self, label: str) -> None:
        """Take a label away that was given at run time, or an alias.

        Raises:
            UnknownAdapterError: there is none; adapters of the store stay as long as their folders are there.
        """
        with self._lock:
            if label not in self._state.loaded and label not in self._state.aliases:
                raise UnknownAdapterError(label, [*self._state.loaded, *self._state.aliases])
            loaded = {key: name for key, name in self._state.loaded.items() if key != label}
            aliases = {key: to for key, to in self._state.aliases.items() if label not in (key, to)}
            self._keep(LabelState(loaded, aliases, self._state.pinned - {label}))

    def alias(self, alias: str, label: str) -> None:
        """Let an alias stand for a label from now on.

        Raises:
            ConfigError: it is not a name, or it is the base's or that of an adapter.
            UnknownAdapterError: there is no such label.
            RequestError: it is for another task than the server's.
        """
        self._check_label(alias)
        with self._lock:
            if alias in self._state.loaded or alias in self._list_all():
                raise ConfigError(f"{alias!r} is an adapter", hint="choose another alias")
            if label in self._state.aliases:
                raise UnknownAdapterError(label, [name for name in self.names() if name not in self._state.aliases])
            self._find_folder(label)
            self._keep(LabelState(self._state.loaded, {**self._state.aliases, alias: label}, self._state.pinned))

    def remove_alias(self, alias: str) -> None:
        """Take an alias away.

        Raises:
            UnknownAdapterError: there is none.
        """
        with self._lock:
            if alias not in self._state.aliases:
                raise UnknownAdapterError(alias, list(self._state.aliases))
            self.unload(alias)

    def pin(self, label: str, *, pinned: bool) -> None:
        """Note that a label stays in its slot, or may leave it."""
        with self._lock:
            change = self._state.pinned | {label} if pinned else self._state.pinned - {label}
            self._keep(LabelState(self._state.loaded, self._state.aliases, frozenset(change)))

    def _check_label(self, label: str) -> None:
        if not NAME.fullmatch(label) or label == self.base_name:
            reason = "is the base" if label == self.base_name else "is not a name"
            hint = "letters, digits, dots, dashes and underscores, 64 at most"
            raise ConfigError(f"{escape_text(label)[:80]!r} {reason}", hint=hint)

    # The state file

    def _keep(self, state: LabelState) -> None:
        """Write the state, then take it on: a failed write changes nothing."""
        if self._state_file is not None:
            text = json.dumps(state.to_json(), indent=1, sort_keys=True)
            write_file(self._state_file, f"{text}\n".encode())
        self._state = state

    def _read_state(self) -> LabelState:
        if self._state_file is None or not self._state_file.exists():
            return LabelState()
        source = escape_text(self._state_file)
        try:
            fields = read_json(self._state_file, limit=_STATE_BYTES)
        except StorageError:
            raise
        except LoraKitError as error:
            raise ConfigError(f"{source}: this is not the state of a server: {error.message}") from error
        return LabelState.from_json(fields, source=source)


def set_aliases(aliases: Mapping[str, str], labels: AdapterLabels) -> None:
    """Set the aliases that a server was started with; those of its state file stay.

    Raises:
        ConfigError, UnknownAdapterError, RequestError: as `AdapterLabels.alias`; none was set.
    """
    known = labels.names()
    for target in set(aliases.values()) & labels.list_not_offered().keys():
        labels.check_store(target)  # raises
    unknown = [target for target in aliases.values() if target not in known]
    if unknown:
        raise UnknownAdapterError(format_list(unknown), known)
    for alias, label in aliases.items():
        labels.alias(alias, label)


def list_adapter_folders(store: Path) -> list[Path]:
    """Return the folders of the adapters in a store, as it is now, whatever their tasks; sorted by name."""
    try:
        folders = sorted(store.iterdir())
    except OSError:  # there is none, or it is being replaced
        return []
    return [folder for folder in folders if NAME.fullmatch(folder.name) and _is_adapter(folder)]


def _is_adapter(folder: Path) -> bool:
    """Whether a folder of the store is an adapter; a link to somewhere else is not."""
    return folder.is_dir() and not folder.is_symlink() and has_adapter_files(folder)


def _sign_folder(folder: Path) -> Signature:
    """Return what tells whether the files of a folder are those of before; nothing where it is gone or changing."""
    try:
        stats = [(entry.name, entry.lstat()) for entry in sorted(folder.iterdir())]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats)
