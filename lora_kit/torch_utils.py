"""What torch is asked for in one place: dtypes by name, modes for a block, random states, time and peak memory."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from lora_kit.errors import ConfigError, LoraKitError, OutOfMemoryError, format_list, suggest_nearest
from lora_kit.io.read import available_memory


def use_autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a dtype, or nothing."""
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


@contextlib.contextmanager
def use_eval_mode(model: Any) -> Iterator[None]:
    """Evaluation mode within, every module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


FLOAT_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; of an empty tensor and of integers, True."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes take one pass at the speed of memory, four times that of `isfinite().all()`; NaN shows in both.
    extremes = torch.stack(torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor))
    return bool(extremes.isfinite().all())


def preserve_random_states(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Restore torch's random states, the device's too, at the end of the block."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def parse_float_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return one of `FLOAT_DTYPES`, given by name or as it is.

    Raises:
        ConfigError: the dtype is unknown.
    """
    if isinstance(dtype, torch.dtype) and dtype in FLOAT_DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        hint = suggest_nearest(str(dtype), FLOAT_DTYPES) or format_list(list(FLOAT_DTYPES))
        raise ConfigError(f"dtype {dtype!r} is not known", hint=hint)
    return FLOAT_DTYPES[dtype]


_ALLOCATOR_MESSAGES: Final = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""Messages of the CPU's allocator, which raises a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that torch could not allocate memory, on a device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _ALLOCATOR_MESSAGES)
    )


@contextlib.contextmanager
def translate_out_of_memory(message: str, *, hint: str) -> Iterator[None]:
    """Raise an OutOfMemoryError of this message where memory runs out in the block.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except LoraKitError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(message, hint=hint) from error


def check_memory(needed: int, device: torch.device, *, purpose: str, hint: str) -> None:
    """Raise OutOfMemoryError where a device has less memory to give than is needed; nothing is allocated.

    Args:
        needed: bytes.
        device: a CPU or a CUDA device; of others nothing is known.
        purpose: what needs them, for the message.
    """
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if device.type in ("cpu", "cuda") and available is not None and needed > available:
        what = f"{purpose} needs {needed:,} bytes of memory on {device.type}; {available:,} are available"
        raise OutOfMemoryError(what, hint=hint)


class Clock:
    """Wall time and peak memory of a piece of work, from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._started = device, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def seconds(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._started

    @property
    def peak_bytes(self) -> int:
        """The most memory in use: of the CUDA device since the start, or of the whole process since it began."""
        return read_peak_bytes(self._device)


def read_peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of a CUDA device since its count was set back, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    # Linux counts in kilobytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def capture_random_states() -> dict[str, Any]:
    """The states of the global generators of torch, its CUDA devices, numpy and Python, as plain values and tensors."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put all generators into states that `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
