"""Which device and precision to compute with, and how its memory is kept."""
import ctypes
import os
import sys

import torch


class DeviceError(ValueError):
    """There is no such device here; the message says which there are."""


def pick_device(name):
    """Returns the torch.device of a name in config.DEVICES; "auto" takes the fastest kind available.

    Raises:
        DeviceError: not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    elif not available[name]:
        names = ", ".join(kind for kind in available if available[kind])
        raise DeviceError(f"--device: {name} is not available here; there is {names}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def pick_precision(device):
    """Returns "bfloat16" where the device computes fast in it, else "float32"."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # public from torch 2.14 on
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def keep_freed_memory():
    """Makes glibc keep freed memory for reuse; otherwise every step pays page faults for memory it has just freed."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:
            return
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
