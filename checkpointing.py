"""Checkpoints: files of tensors and plain values, written whole or not at all, read without running anything in them."""
import os
import pathlib
import shutil

import torch

FORMAT = 1  # raised when a file of before can no longer be read
PLAIN = {"step": int, "images_seen": int, "elapsed_seconds": float, "num_images": int, "config": dict,
         "model_arguments": dict, "pending_metrics": list}  # what a checkpoint holds beside weights and optimizer states


class CheckpointError(ValueError):
    """The file is no checkpoint that can be used here; the message says why, in one line."""


def save_checkpoint(folder, step, state, *, keep):
    """Writes folder/step_0000000.pt and removes all but the newest `keep` checkpoints; returns the path.

    The file gets its name only when all of it is on the disk, and older ones go only after that: at any moment, a power
    cut or a full disk leaves a whole checkpoint behind, if there was one.

    Args:
        step: number of the step, for the name and the order.
        state: a dict of tensors and plain values.
        keep: at least 1.

    Raises:
        OSError: it could not be written; how much room there is.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:07d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns what the system says into a RuntimeError
        free = shutil.disk_usage(folder).free
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{path} could not be written, {free:,} bytes are free there; older checkpoints are whole "
                      f"({reason})") from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    up_to_this = [other for other in list_checkpoints(folder) if _order(other) <= _order(path)]
    for old in up_to_this[:-keep]:  # a later one was passed over as damaged, and must not push this one out
        old.unlink()
    return path


def list_checkpoints(folder):
    """Returns the checkpoints in a folder, oldest first."""
    return sorted(pathlib.Path(folder).glob("step_*.pt"), key=_order)


def _order(path):
    return len(path.name), path.name


def remove_leftovers(folder):
    """Removes what interrupted saves have left in a folder."""
    for leftover in pathlib.Path(folder).glob("step_*.tmp"):
        leftover.unlink()


def load_checkpoint(path):
    """Returns the state saved in a file, on the CPU.

    Raises:
        CheckpointError: missing, damaged, incomplete, of another format, or holding anything but tensors and plain values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # whatever the reader meets in a damaged or hostile file
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program, or of another version")
    for name, kind in PLAIN.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path}: not a checkpoint of this program: {name} is missing or no {kind.__name__}")
    return state


def load_newest(folder, *, report=print):
    """Returns the state of the newest checkpoint in a folder that can be read, None where there is none.

    Damaged ones are passed over, each with a line to `report`.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            report(f"{error}; trying the one before")
    if paths:
        raise CheckpointError(f"{folder}: none of the checkpoints can be read; --fresh starts anew beside it")
    return None
