"""Adapters whose weights are read when they are needed, and a cache of them in host memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import resolve_folder
from lora_kit.adapter.folder import AdapterFolder, check_allowances
from lora_kit.errors import AdapterError, ConfigError
from lora_kit.io.text import escape_text


class AdapterCache:
    """Adapters by digest, the least recently used first. Threads may share it.

    Attributes:
        limit: bytes of tensors that it holds at most. An adapter larger than that is not cached.
        bytes: that it holds now.
        hits: how often an adapter that was asked for was here.
        misses: how often it was not.
        evictions: adapters that were removed for others.
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or limit < 0:
            raise ConfigError(f"a cache holds a whole number of bytes from 0; {limit!r} was given")
        self.limit = limit
        self.bytes = self.hits = self.misses = self.evictions = 0
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, digest: str) -> Adapter | None:
        """Return the adapter with this digest and mark it as the most recently used; None where it is not here."""
        with self._lock:
            adapter = self._adapters.get(digest)
            if adapter is None:
                self.misses += 1
                return None
            self.hits += 1
            self._adapters.move_to_end(digest)
            return adapter

    def put(self, adapter: Adapter) -> None:
        """Add an adapter as the most recently used one."""
        digest, size = adapter.digest, adapter.nbytes
        with self._lock:
            if digest in self._adapters:
                self._adapters.move_to_end(digest)
            elif size <= self.limit:
                while self.bytes + size > self.limit:
                    _, evicted = self._adapters.popitem(last=False)
                    self.bytes -= evicted.nbytes
                    self.evictions += 1
                self._adapters[digest] = adapter
                self.bytes += size

    def clear(self) -> None:
        """Remove all adapters."""
        with self._lock:
            self._adapters.clear()
            self.bytes = 0


class LazyAdapter:
    """An adapter of which only the config was read so far.

    Args:
        source: a folder, a name in the store or a hub id, as in `Adapter.load`; or an Adapter, which stays in memory.
        allow: as in `Adapter.load`.

    Attributes:
        config: of the adapter.
        allow: as given.

    Raises:
        AdapterError, ConfigError: there is no adapter folder, or its config or its record is invalid.
    """

    def __init__(self, source: str | Path | Adapter, *, allow: Collection[str] = ()) -> None:
        check_allowances(allow)
        self.allow = frozenset(allow)
        self._digest: str | None = None
        self._has_been_read = False  # until then the digest is what the folder claims
        if isinstance(source, Adapter):
            self._source: Adapter | Path = source
            self.config = source.config
        else:
            self._source = resolve_folder(source).absolute()
            folder = AdapterFolder.open(self._source, allow=allow)
            self.config, self._digest = folder.config, folder.digest

    def read(self, cache: AdapterCache) -> Adapter:
        """Return the adapter: from the cache, or from its folder.

        Raises:
            AdapterError, ConfigError: it cannot be read, or its folder was changed since.
        """
        if isinstance(self._source, Adapter):
            return self._source
        cached = cache.get(self._digest) if self._has_been_read and self._digest else None
        return cached or self._read_folder(self._source)

    def put_in_cache(self, adapter: Adapter, cache: AdapterCache) -> None:
        """Put its value into a cache, where it would be read from a folder the next time.

        An adapter that was converted to the model's names is another value than the folder's, and is not cached.
        """
        if isinstance(self._source, Path) and adapter.digest == self._digest:
            cache.put(adapter)

    def _read_folder(self, folder: Path) -> Adapter:
        adapter = Adapter.load(folder, allow=self.allow)
        if self._digest not in (None, adapter.digest) and "changed-files" not in self.allow:
            raise AdapterError(
                f"{escape_text(folder)} was changed since it was offered: its digest is {adapter.digest[:12]} now",
                hint="unload the name and offer it again",
            )
        self._digest, self._has_been_read = adapter.digest, True
        return adapter
