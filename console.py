"""What the programs print, and what they do on Ctrl-C and other signals."""
import contextlib
import os
import signal
import sys
import threading

from tqdm import tqdm

import distributed

LISTED = 20  # entries shown of a list that may be long


def listed(entries, separator=", "):
    """Returns texts as one, the first of them where there are many."""
    entries = list(entries)
    return separator.join([*entries[:LISTED], *([f"and {len(entries) - LISTED} more"] if len(entries) > LISTED else [])])


def say(text):
    """Prints a line on rank 0. Errors from a closed terminal or pipe are ignored, so that the run goes on."""
    if distributed.rank() == 0:
        _print(tqdm.write, text)


def print_error(text):
    """Prints a line on stderr, ignoring errors as say does."""
    _print(lambda line: print(line, file=sys.stderr), text)


def _print(write, text):
    text = _printable(text)
    try:
        write(text)
    except UnicodeEncodeError:
        write(text.encode("ascii", "backslashreplace").decode())
    except (AttributeError, OSError, ValueError):  # closed, or less than a file
        pass


def _printable(text):
    """Escapes control characters, which file names and texts of checkpoints may hold."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


@contextlib.contextmanager
def program_output():
    """Makes stdout line-buffered, escapes what it cannot encode and ignores a closed pipe.

    SIGINT, SIGTERM and SIGHUP raise SystemExit, so that no file is left half written.
    """
    for name in ("stdout", "stderr"):  # where a shell has closed one, the next file opened would take its place
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    with contextlib.suppress(AttributeError, ValueError):  # that of a notebook is no file, another may be closed
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    with stop_signals(lambda number, frame: sys.exit(128 + number)):
        yield
    with contextlib.suppress(AttributeError, ValueError):
        try:
            print(end="", flush=True)
        except OSError:  # the reader has gone; Python would complain once more when it exits
            if sys.stdout.fileno() == 1:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def stop_signals(handler):
    """Calls handler(number, frame) on SIGINT, SIGTERM and SIGHUP, and restores the handlers that were there at the end.

    In another thread than the main one, where Python cannot set handlers, nothing is changed.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        numbers.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: not set from Python


class Interrupt(contextlib.ExitStack):
    """Turns Ctrl-C, SIGTERM and SIGHUP into a request to finish the step, save and stop, while its `with` block runs.

    Before `defer` and at a second Ctrl-C it raises KeyboardInterrupt.

    Attributes:
        received: the number of the signal, 0 if there was none.
        deferred: whether `defer` has been called.
    """

    def __init__(self):
        super().__init__()
        self.received = 0
        self.deferred = False

    def __enter__(self):
        self._on_terminal = os.isatty(2)
        self.enter_context(stop_signals(self._handle))
        return self

    def defer(self):
        """From here on a signal is only noted, for received_by_any; before, it raises KeyboardInterrupt at once."""
        self.deferred = True

    def received_by_any(self):
        """Whether any of the processes has received a signal; if so, all have."""
        number = distributed.all_reduce_max(self.received)
        if number:  # a signal that arrives during the call counts at the next one
            self.received = number
        return number > 0

    def _handle(self, number, frame):
        # Under torchrun the same Ctrl-C can arrive twice (terminal, then torchrun): a second one does not count there.
        second = self.received and number == signal.SIGINT and distributed.world_size() == 1
        if self._on_terminal and number == getattr(signal, "SIGHUP", None):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the terminal of the progress bar is gone
        self.received = number
        if second or not self.deferred:
            raise KeyboardInterrupt
