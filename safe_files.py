"""Files that a crash cannot tear, and folders that one process at a time writes to."""
import contextlib
import os
import pathlib
import shutil

from filelock import FileLock, Timeout


@contextlib.contextmanager
def whole_file(path, *, bytes_needed=None):
    """Gives a file to write bytes to, which appears at `path` once all of it is on the disk, or not at all.

    Raises:
        OSError: it could not be written: which file, why, and how much room there is.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # others may be writing the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns what the system says into a RuntimeError
        raise _not_written(path, error, bytes_needed) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_line(path, text):
    """Appends a line of text to a file.

    Raises:
        OSError: as whole_file.
    """
    try:
        with open(path, "a") as file:
            file.write(text + "\n")
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path, error, bytes_needed=None):
    reason = (str(error) or type(error).__name__).splitlines()[0]
    needed = "" if bytes_needed is None else f"{bytes_needed:,} bytes are needed, "
    return OSError(f"{path} could not be written: {needed}{free_bytes(path):,} bytes are free there ({reason})")


def remove_leftovers(folder, pattern="*"):
    """Removes what processes that were killed have left of files half written in a folder, which hold_folder must hold."""
    for leftover in pathlib.Path(folder).glob(f".{pattern}.tmp"):
        leftover.unlink()


@contextlib.contextmanager
def hold_folder(folder, *, busy):
    """Within this context no other process is within it for the same folder; when a process dies its hold ends.

    Args:
        busy: called if another process holds the folder; where it does not raise, that process is waited for.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy()
        lock.acquire()
    except (OSError, NotImplementedError):
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        lock.release()


def free_bytes(path):
    """Returns the room on the disk where a path is, or would be."""
    path = pathlib.Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


def _sync_folder(folder):
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
