"""Adapters that are known by name and read when they are needed, and those kept in host memory meanwhile."""

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
    """Adapters by digest, the least recently used first; threads may share it.

    Attributes:
        limit: bytes of tensors that are kept at most. An adapter larger than that is not kept.
        bytes: that are kept now.
        hits, misses: how often what was asked for was there, and was not.
        evictions: adapters given up for others.
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or limit < 0:
            raise ConfigError(f"a cache holds a whole number of bytes from 0; {limit!r} was given")
        self.limit = limit
        self.bytes = self.hits = self.misses = self.evictions = 0
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: str) -> Adapter | None:
        """The adapter of this identity, the most recently used one now; None where it is not kept."""
        with self._lock:
            found = self._kept.get(digest)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(digest)
            return found

    def put(self, adapter: Adapter) -> None:
        """Keep an adapter as the most recently used one."""
        digest, size = adapter.digest, adapter.nbytes
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
            elif size <= self.limit:
                while self.bytes + size > self.limit:
                    _, given_up = self._kept.popitem(last=False)
                    self.bytes -= given_up.nbytes
                    self.evictions += 1
                self._kept[digest] = adapter
                self.bytes += size

    def clear(self) -> None:
        """Give up everything."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0


class LazyAdapter:
    """An adapter of which only the config was read so far.

    Args:
        source: a folder, a name in the store or an id of the hub, as in `Adapter.load`; or an Adapter, which is held
            for as long as it is offered.
        allow: as in `Adapter.load`.

    Attributes:
        config: what the adapter is.

    Raises:
        AdapterError, ConfigError: there is no adapter folder, or its config or its record is wrong.
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
            found = AdapterFolder.open(self._source, allow=allow)
            self.config, self._digest = found.config, found.digest

    def value(self, cache: AdapterCache) -> Adapter:
        """The adapter: from the cache, or read from its folder.

        Raises:
            AdapterError, ConfigError: it cannot be read, or is another one than was offered.
        """
        if isinstance(self._source, Adapter):
            return self._source
        kept = cache.get(self._digest) if self._has_been_read and self._digest else None
        return kept or self._read(self._source)

    def put_in_cache(self, adapter: Adapter, cache: AdapterCache) -> None:
        """Keep its value for the next time, where it would have to be read. One under other names is another value."""
        if isinstance(self._source, Path) and adapter.digest == self._digest:
            cache.put(adapter)

    def _read(self, folder: Path) -> Adapter:
        adapter = Adapter.load(folder, allow=self.allow)
        if self._digest not in (None, adapter.digest) and "changed-files" not in self.allow:
            raise AdapterError(
                f"{escape_text(folder)} was changed since it was offered: its digest is {adapter.digest[:12]} now",
                hint="unload the name and offer it again",
            )
        self._digest, self._has_been_read = adapter.digest, True
        return adapter
