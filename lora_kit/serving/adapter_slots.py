"""Adapters in a server's slots, by content: a name in the bank is a digest, and labels point at it from outside."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.routes import Lease
from lora_kit.errors import AdapterError, BankError, LoraKitError
from lora_kit.serving.engine import Engine


class NoFreeSlotError(LoraKitError, RuntimeError):
    """All slots are leased or pinned; a request for another adapter has to wait."""

    def __init__(self) -> None:
        super().__init__(
            "every slot is in use or pinned", hint="try again later, unpin an adapter, or serve more slots"
        )


@dataclass
class SlotUse:
    """How an adapter uses its slot.

    Attributes:
        leases: requests that use it.
        hits: requests that used it since it came into the slot.
        pinned: whether it stays.
    """

    leases: int = 0
    hits: int = 0
    pinned: bool = False


class AdapterSlots:
    """The adapters in a bank's slots. The thread that owns the bank uses it, and nobody else.

    Args:
        bank: of which every slot is for this.
        slots: how many it has.
        engine: that computes with them.
    """

    def __init__(self, bank: AdapterBank, engine: Engine, *, slots: int) -> None:
        self._bank, self._engine = bank, engine
        self._slots = slots
        self._uses = OrderedDict[str, SlotUse]()  # the least recently used first

    def __contains__(self, digest: object) -> bool:
        return digest in self._uses

    def describe(self) -> dict[str, SlotUse]:
        """Return the use of every slot by digest, the least recently used first."""
        return {digest: SlotUse(use.leases, use.hits, use.pinned) for digest, use in self._uses.items()}

    def lease(self, adapter: Adapter) -> Lease:
        """Put an adapter into a slot unless it is in one, and keep it there until `release`.

        Raises:
            NoFreeSlotError: all slots are leased or pinned.
            AdapterError: it does not match the base; the slots are as they were, but for one that was idle.
        """
        use = self._give_slot(adapter)
        lease = self._bank.lease(adapter.digest)
        use.leases += 1
        use.hits += 1
        self._uses.move_to_end(adapter.digest)
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back; the adapter stays in its slot until the slot is needed."""
        lease.release()
        self._uses[lease.digest].leases -= 1

    def pin(self, adapter: Adapter) -> None:
        """Keep an adapter in a slot.

        Raises:
            NoFreeSlotError, AdapterError: as `lease`.
        """
        self._give_slot(adapter).pinned = True

    def unpin_others(self, digests: Collection[str]) -> None:
        """Let adapters leave their slots when others need them, but for these."""
        for digest, use in self._uses.items():
            use.pinned = use.pinned and digest in digests

    def probe(self, adapter: Adapter, run: Callable[[Lease], float]) -> float:
        """Run a forward with an adapter before it answers anybody; return its largest change of a logit.

        Args:
            run: computes that change.

        Raises:
            BankError: it is not finite.
            NoFreeSlotError, AdapterError: as `lease`.
        """
        lease = self.lease(adapter)
        try:
            effect = run(lease)
        finally:
            self.release(lease)
        if not math.isfinite(effect):
            self._evict(adapter.digest)
            raise BankError("the outputs with this adapter are not finite", hint="look at its training or its dtype")
        return effect

    def _give_slot(self, adapter: Adapter) -> SlotUse:
        """Return the use of an adapter's slot; the least recently used idle adapter leaves where there is none."""
        if adapter.digest not in self._uses:
            if len(self._uses) >= self._slots:
                idle = [digest for digest, use in self._uses.items() if self._is_idle(digest, use)]
                if not idle:
                    raise NoFreeSlotError
                self._evict(idle[0])
            self._bank.load(adapter.digest, adapter)
            reason = self._bank.reason_no_runs(adapter.digest) if self._engine.needs_runs else None
            if reason is not None:
                self._bank.unload(adapter.digest)
                raise AdapterError(
                    f"it cannot be served beside others: {reason}", hint="merge it, and serve the result"
                )
            self._uses[adapter.digest] = SlotUse()
        return self._uses[adapter.digest]

    def _is_idle(self, digest: str, use: SlotUse) -> bool:
        return not use.leases and not use.pinned and digest not in self._engine.busy_contents

    def _evict(self, digest: str) -> None:
        if not self._uses[digest].leases:
            self._bank.unload(digest)
            del self._uses[digest]
