"""What the programs have in common: where they print, and where they run."""
import contextlib
import os
import signal
import sys

import torch
from tqdm import tqdm


class DeviceError(ValueError):
    """There is no such device here; the message says which there are."""


def pick_device(name):
    """Returns the torch.device of a name in config.DEVICES; auto: the fastest kind there is.

    Raises:
        DeviceError: not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    elif not available[name]:
        there = ", ".join(kind for kind in available if available[kind])
        raise DeviceError(f"--device: {name} is not available here; there is {there}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def say(text):
    """Prints a line. Whether anybody reads it is no matter of life and death: a run goes on after its terminal has gone."""
    with contextlib.suppress(OSError):
        tqdm.write(_printable(text))


def complain(text):
    with contextlib.suppress(OSError):
        print(_printable(text), file=sys.stderr)


def _printable(text):
    """Names of files and texts of checkpoints may hold what a terminal would obey, or could not show."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


@contextlib.contextmanager
def output():
    """Within this context the output of a program can be followed, can hold any name, and can lose its reader.

    Signals end what is within like an error, so that no file is left half written.
    """
    for name in ("stdout", "stderr"):  # where a shell has closed one, the next file opened would take its place
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        print(end="", flush=True)
    except OSError:  # nobody reads it any more; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
