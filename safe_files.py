"""Atomic writes and folder locks."""
import contextlib
import errno
import functools
import os
import pathlib
import shutil
import sys
import tempfile
import time

from filelock import FileLock, Timeout

PATIENCE = 1 if os.name == "nt" else 0  # seconds
UNKNOWN_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems answer to calls that they do not have


@contextlib.contextmanager
def atomic_write(path, *, bytes_needed=None):
    """Opens a temporary file to write bytes to. On success it is fsynced and renamed to `path`; on an error it is removed.

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
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in UNKNOWN_CALL:
                    raise
                _not_synchronised(temporary, error)
        _replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        raise _not_written(path, error, bytes_needed) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replace(temporary, path):
    """Renames a file. Where another program holds one of the two, as viewers and virus scanners do on Windows, it waits."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def check_writable(folder):
    """Tries to write to a folder or, where it is missing, to the one that it would be made in.

    Raises:
        OSError: as atomic_write.
    """
    folder = pathlib.Path(folder).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise _not_written(folder, error) from error


def append_line(path, text):
    """Appends a line of text to a file. Where the system cannot append, the file is written anew with the line.

    Raises:
        OSError: as atomic_write.
    """
    path, line = pathlib.Path(path), (text + "\n").encode()
    length = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(line)
    except OSError as error:
        try:
            before = path.read_bytes()[:length] if length else b""
            with atomic_write(path) as file:
                file.write(before + line)
        except OSError:
            raise _not_written(path, error) from error


def _not_written(path, error, bytes_needed=None):
    reason = (str(error) or type(error).__name__).splitlines()[0]
    needed = "" if bytes_needed is None else f"{bytes_needed:,} bytes are needed, "
    return OSError(f"{path} could not be written: {needed}{free_bytes(path):,} bytes are free there ({reason})")


def remove_temporary_files(folder, pattern="*"):
    """Removes the temporary files of killed processes from a folder, which must be locked by lock_folder."""
    for path in pathlib.Path(folder).glob(f".{pattern}.tmp"):
        with contextlib.suppress(OSError):  # another program holds it open: the next time
            path.unlink()


@contextlib.contextmanager
def lock_folder(folder, *, busy):
    """Locks the folder, by the file lock_of(folder). The system releases the lock of a process that dies.

    Args:
        busy: called if another process has the lock; unless it raises, that process is waited for.
    """
    lock = FileLock(lock_of(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy()
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        say_once(f"note: {lock_of(folder)} cannot be locked ({error}), so two processes could write there at the same time")
    try:
        yield
    finally:
        lock.release()


def lock_of(folder):
    """Returns the path of the file by which a folder is locked."""
    return pathlib.Path(folder) / ".lock"


def free_bytes(path):
    """Returns the bytes free on the disk where a path is, or would be; 0 also where the system does not tell."""
    path = pathlib.Path(path).absolute()
    try:
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
    except OSError:
        return 0


def too_few(free, needed):
    """Whether fewer bytes are free than needed. Some network file systems tell 0, whatever is free: nobody knows."""
    return 0 < free < needed


def _sync_folder(folder):
    if os.name == "posix":
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError as error:
            _not_synchronised(folder, error)
            return
        try:
            os.fsync(descriptor)
        except OSError as error:  # SMB, and Windows' disks in WSL
            _not_synchronised(folder, error)
        finally:
            os.close(descriptor)


def _not_synchronised(path, error):
    place = path.parent if path.is_file() else path
    say_once(f"note: {place} cannot be synchronised ({error}): a power failure may take the newest files")


@functools.cache
def say_once(text):
    with contextlib.suppress(AttributeError, OSError):  # there is no stderr
        print(text, file=sys.stderr, flush=True)
