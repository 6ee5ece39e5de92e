"""How many requests the holder of a key may send in a while, by the library `limits`."""

from __future__ import annotations

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from lora_kit.errors import ConfigError


class RateLimit:
    """Counts requests by the name of a key.

    Args:
        rate: such as `60/minute` or `5/second; 1000/day`; None for no limit.

    Raises:
        ConfigError: it is not a rate.
    """

    def __init__(self, rate: str | None) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        try:
            self._items = [parse(part.strip()) for part in rate.split(";")] if rate else []
        except ValueError:
            raise ConfigError(f"rate {rate!r} was given", hint="such as 60/minute") from None

    def take(self, name: str) -> bool:
        """Count a request; return whether it is within the limit."""
        return all(self._limiter.hit(item, name) for item in self._items)
