"""Devices by name: what fits on them, and how quick they are at most, by the data sheets of their vendors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from lora_kit.errors import ConfigError, suggest_nearest
from lora_kit.io.text import format_value


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        name: of the kind.
        bytes: of its memory, in gigabytes of 10^9. Most have a few percent more, which the driver takes.
        flops: dense products in 16 bits per second; None where it is not known.
        bandwidth: bytes per second that its memory gives; None where it is not known.
    """

    name: str
    bytes: int
    flops: float | None = None
    bandwidth: float | None = None


DEVICES: Final = {
    name.lower(): Device(name, int(gigabytes * 1e9), teraflops * 1e12, bandwidth * 1e12)
    for name, gigabytes, teraflops, bandwidth in (
        ("B200", 180, 2250, 8.0),
        ("H200", 141, 989, 4.8),
        ("H100", 80, 989, 3.35),
        ("A100", 80, 312, 2.04),
        ("A100-80", 80, 312, 2.04),
        ("A100-40", 40, 312, 1.56),
        ("MI300X", 192, 1307, 5.3),
        ("L40S", 48, 362, 0.864),
        ("A6000", 48, 155, 0.768),
        ("A10", 24, 125, 0.6),
        ("L4", 24, 121, 0.3),
        ("5090", 32, 209, 1.79),
        ("4090", 24, 165, 1.01),
        ("3090", 24, 71, 0.936),
        ("T4", 16, 65, 0.32),
    )
}
_SPEC: Final = re.compile(r"(?:(\d{1,5})\s*[x×*]\s*)?([\w.-]+)", re.IGNORECASE)
_MEMORY: Final = re.compile(r"(\d+(?:\.\d+)?)GB", re.IGNORECASE)


def parse_devices(text: str) -> tuple[int, Device]:
    """Return how many devices of which kind a text names: `8xH200`, `RTX-4090`, `2x24GB`.

    Raises:
        ConfigError: it names no device that is known.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None or not int(match[1] or 1):
        raise ConfigError(f"{format_value(text)} names no devices", hint="such as H200, 8xH200 or 2x24GB")
    memory = _MEMORY.fullmatch(match[2])
    name = match[2].lower().removeprefix("rtx").strip("-_").removesuffix("gb")
    device = Device(match[2], int(float(memory[1]) * 1e9)) if memory else DEVICES.get(name)
    if device is None or not device.bytes:
        hint = suggest_nearest(name, list(DEVICES)) or f"known: {', '.join(DEVICES)}; or a size, such as 24GB"
        raise ConfigError(f"the device {format_value(match[2])} is not known", hint=hint)
    return int(match[1] or 1), device
