"""Checkpoints: files of tensors and plain values, written atomically, and loaded without running code from them.

A checkpoint may come from someone you do not trust: every entry is checked before use, and no text in it becomes a path or
code.
"""
import contextlib
import errno
import math
import os
import pathlib
import re
import zipfile

import torch

from devices import is_out_of_memory, usual_settings
from image_sizes import RESIZE_MODES, height_and_width, plain_size, size_text
from model_definitions import LAYERS_PER_HALVING, VAE, Discriminator
from safe_files import atomic_write, say_once

FORMAT = 2  # raised when older files can no longer be read
LARGEST_OUTLINE = 2**18  # bytes of names and shapes, ten times what ours need: deep nesting can crash the unpickler
SCHEMA = {"format": int, "step": int, "images_seen": int, "elapsed_seconds": float, "num_images": int, "threads": int,
          "config": dict, "model_arguments": dict, "pending_metrics": dict, "generator": dict, "averaged": dict,
          "critic": dict, "generator_optimizer": dict, "critic_optimizer": dict, "preparation": dict, "image_set": str,
          "first_side": int, "learned_side": int,  # shorter sides of images: where the run began, what it has learned
          "detail": float,  # of the averaged VAE
          "class_names": torch.Tensor, "class_counts": torch.Tensor}  # see class_names; images of each class, (K,) int64
# What older checkpoints do not say, and runs without classes; a side of 0 is that of the model.
ABSENT = {"threads": 0, "preparation": {}, "image_set": "", "first_side": 0, "learned_side": 0, "detail": 1.0,
          "class_names": torch.empty(0, dtype=torch.uint8), "class_counts": torch.empty(0, dtype=torch.int64)}
SAMPLES = ("integer", "float")  # kinds of more than 8 bits
CRITIC_ARGUMENTS = ("image_size", "channels", "base_channels", "base_size", "grow_from", "num_classes")  # of those of a VAE
TRAINING_ONLY = ("generator", "critic", "generator_optimizer", "critic_optimizer", "pending_metrics")


class CheckpointError(ValueError):
    """The file is no checkpoint that can be used here; the message says why, in one line."""


def save_checkpoint(folder, step, state, *, keep):
    """Writes folder/step_0000000.pt and removes all but the newest `keep` checkpoints; returns the path.

    Older checkpoints are removed only after the new file is complete under its name. So a power cut or a full disk leaves a
    complete checkpoint, if there was one.

    Args:
        step: number of the step, for the name and the order.
        state: a dict with the keys of SCHEMA but the first two.
        keep: at least 1.

    Raises:
        OSError: it could not be written; how many bytes are needed and free.
    """
    folder = pathlib.Path(folder)
    path = folder / f"step_{step:07d}.pt"
    with atomic_write(path, bytes_needed=_num_bytes(state)) as file:
        _save({"format": FORMAT, "step": step, **state}, file)
    up_to_this = [other for other in list_checkpoints(folder) if _order(other) <= _order(path)]
    for old in up_to_this[:-keep]:  # later files are ignored: they are damaged ones that the resume skipped
        try:
            old.unlink()
        except OSError as error:  # another program reads it
            say_once(f"note: {old} cannot be removed: {error.strerror}")
    return path


def _save(state, file):
    """Saves a state in the form of files, with the checksums that load_checkpoint compares, which a program can turn off."""
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(_file_form(state), file)
    finally:
        torch.serialization.set_crc32_options(checksums)


def _num_bytes(state):
    """The bytes of all tensors in nested dicts."""
    if isinstance(state, dict):
        return sum(map(_num_bytes, state.values()))
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def list_checkpoints(folder):
    """Returns the paths of the checkpoints in a folder, oldest first, without other files that are kept there."""
    return sorted((path for path in pathlib.Path(folder).glob("step_*.pt")
                   if re.fullmatch(r"step_\d{7,}\.pt", path.name) and path.is_file()), key=_order)


def _order(path):
    return int(path.stem.removeprefix("step_"))


def load_checkpoint(path):
    """Returns the state saved in a file, on the CPU. Its tensors are still to be checked, by check_tensors.

    Raises:
        CheckpointError: missing, damaged, incomplete, of another version, or holding anything but tensors and plain values.
        OSError, MemoryError: it cannot be read now, and may be whole.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        _check_archive(path)
        state = _plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever the readers meet in a damaged or hostile file
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(f"{path} cannot be read now: {error.strerror}") from None
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from None
    if type(state) is not dict or type(state.get("format")) is not int or state["format"] != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program, or of another version")
    state = {**ABSENT, **state}
    if fault := _fault(state):
        raise CheckpointError(f"{path}: not a checkpoint of this program: {fault}")
    return state | {name: settings_of_file(state[name]) for name in ("config", "model_arguments")}


def settings_for_file(settings):
    """Returns a dict of settings as files hold it: an image_size as two plain numbers."""
    settings = dict(settings)
    with contextlib.suppress(KeyError, ValueError):
        settings["image_height"], settings["image_width"] = height_and_width(settings["image_size"])
        del settings["image_size"]
    return settings


def settings_of_file(settings):
    """Returns a dict of settings as it was before settings_for_file; older files hold image_size itself, and not all of
    what makes a model."""
    settings = dict(settings)
    if {"image_height", "image_width"} & settings.keys():
        settings["image_size"] = settings.pop("image_height", None), settings.pop("image_width", None)
    if "image_size" in settings:
        settings = {"channels": 3, "base_size": None, "grow_from": None, "even_taps": False, **settings}
        with contextlib.suppress(ValueError):  # an impossible size is refused by who uses it
            settings["image_size"] = plain_size(settings["image_size"])
    return settings


def class_names_for_file(names):
    """Returns names of classes as uint8 (M,): a file of a thousand long texts would be refused as too complicated."""
    return torch.tensor(list("\0".join(names).encode(errors="surrogateescape")), dtype=torch.uint8)


def class_names(state):
    """Returns the names of the classes of a state, in the order of their numbers; [] where it has none."""
    text = state["class_names"].numpy().tobytes().decode(errors="surrogateescape")
    return text.split("\0") if text else []


def learned_side(state):
    """Returns the shorter side of the images that the networks of a state have learned to draw."""
    return state["learned_side"] or min(height_and_width(state["model_arguments"]["image_size"]))


def _file_form(state):
    return state | {name: settings_for_file(state[name]) for name in ("config", "model_arguments") if name in state}


def preparation_for_file(resize_mode, levels):
    """Returns how images were prepared, as plain values; see image_files.decode_image."""
    ends = {f"{kind}_{end}": value for kind, pair in levels.items()
            for end, value in zip(("black", "white"), pair, strict=True)}
    return {"resize_mode": resize_mode, **ends}


def preparation_of_file(preparation):
    """Returns the resize_mode and levels of preparation_for_file.

    Older checkpoints do not say: they cropped and took 65535 as white, but scaled floating-point samples file by file.
    """
    if not preparation:
        return {"resize_mode": "crop", "levels": {"integer": (0.0, 65535.0)}}
    levels = {kind: (preparation[f"{kind}_black"], preparation[f"{kind}_white"])
              for kind in SAMPLES if f"{kind}_black" in preparation}
    return {"resize_mode": preparation["resize_mode"], "levels": levels}


def _check_archive(path):
    """Raises unless a zip archive is whole and no larger unpacked than packed; torch.load itself compares no checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("compressed")
        # torch finds the entry in capital letters too.
        if any(entry.filename.lower().endswith("data.pkl") and entry.file_size > LARGEST_OUTLINE for entry in entries):
            raise ValueError("complicated")
        if archive.testzip():
            raise ValueError("damaged")


def _plain(value, depth=4):
    """Rebuilds dicts from the built-in types themselves: a subclass could override items() or shape."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor.detach(value)
    if isinstance(value, dict) and depth:
        items = dict.items(value)
        if not all(type(key) in (str, int) for key, _ in items):
            raise TypeError("keys")
        return {key: _plain(item, depth - 1) for key, item in items}
    if type(value) not in (int, float, bool, str, type(None)):
        raise TypeError("values")
    return value


def _fault(state):
    """Returns what is wrong with the form of a state, None where nothing is."""
    for name in [*SCHEMA, *state]:
        if name not in SCHEMA:
            return f"{name!r:.80} is not part of one"
        if type(state.get(name)) is not SCHEMA[name]:
            return f"{name} is missing or no {SCHEMA[name].__name__}"
        if SCHEMA[name] in (int, float) and not 0 <= state[name] < 2**63:
            return f"{name} is out of range"
    if state["detail"] > 1:
        return "detail is out of range"
    for name in ("config", "model_arguments"):
        if any(type(key) is not str or isinstance(value, dict | torch.Tensor) for key, value in state[name].items()):
            return f"{name} holds other things than plain values"
    try:
        for name in ("class_names", "class_counts"):
            check_tensors(state[name], torch.empty(state[name].numel(), dtype=ABSENT[name].dtype, device="meta"), name)
    except CheckpointError as error:
        return str(error)
    names, counts = class_names(state), state["class_counts"]
    if not len(set(names)) == len(names) == len(counts) == state["model_arguments"].get("num_classes", 0):
        return "class_names, class_counts and num_classes do not fit"
    if names and not (counts.min() >= 0 and 0 < counts.double().sum() < 2**53):
        return "class_counts are no numbers of images"
    try:
        preparation = preparation_of_file(state["preparation"])
        fits = preparation["resize_mode"] in RESIZE_MODES and all(
            type(black) is type(white) is float and -math.inf < black < white < math.inf
            for black, white in preparation["levels"].values())
        fits &= not state["preparation"] or state["preparation"].keys() == preparation_for_file(**preparation).keys()
    except (KeyError, TypeError):
        fits = False
    if not fits:
        return "preparation is not how images are prepared"
    pending = state["pending_metrics"]
    length = max((len(value) for value in pending.values() if isinstance(value, torch.Tensor) and value.dim()), default=0)
    if length > state["step"]:
        return f"pending_metrics is of {length} steps, of {state['step']} that were taken"
    try:
        check_tensors(pending, dict.fromkeys(pending, torch.empty(length, device="meta")), "pending_metrics")
    except CheckpointError as error:
        return str(error)
    return None


def check_tensors(saved, expected, name):
    """Checks that nested dicts of tensors have the names, shapes and types expected, and only finite numbers.

    Args:
        saved: as loaded.
        expected: the same, of tensors that may be on the meta device.
        name: what to call it in a message.

    Raises:
        CheckpointError: what does not fit.
    """
    if isinstance(expected, dict):
        if not isinstance(saved, dict):
            raise CheckpointError(f"{name} is no dict")
        for key in [*expected, *saved]:
            if key not in saved or key not in expected:
                raise CheckpointError(f"{name}: {key!r:.80} is {'missing' if key in expected else 'not part of it'}")
            check_tensors(saved[key], expected[key], f"{name}.{key}")
        return
    if not isinstance(saved, torch.Tensor) or saved.layout != torch.strided or saved.device.type != "cpu":
        raise CheckpointError(f"{name} is no plain tensor")
    if (saved.dtype, saved.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(f"{name} is {saved.dtype} of shape {tuple(saved.shape)}, "
                              f"expected {expected.dtype} of shape {tuple(expected.shape)}")
    if saved.untyped_storage().nbytes() < saved.nbytes:  # an expanded tensor: one stored number viewed as many
        raise CheckpointError(f"{name} is not stored in full")
    if not saved.isfinite().all():
        raise CheckpointError(f"{name} holds numbers that are not finite")


def load_newest(folder, *, report=print):
    """Returns the state of the newest checkpoint in a folder that can be read, None where there is none.

    Damaged ones are skipped, each with a line to `report`.

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


@usual_settings()
def load_generator(path, *, report=print):
    """Returns the averaged VAE of a checkpoint, or of the newest one of a run folder.

    It is on the CPU, in evaluation mode and without gradients, and draws images of the size that it has learned, with the
    detail that was chosen for it; to train it further, set its attribute `detail` to 1.0. Its attribute `preparation` holds
    the arguments with which image_files.decode_image prepares a picture as its training images were, see
    preparation_of_file; `class_names` and `class_counts` are those it was trained on, empty without classes.
    Loading is safe on a file from someone you do not trust.

    Args:
        path: a checkpoint or a run folder; "~" is the home directory.
        report: called with a line for every damaged checkpoint that is skipped.

    Raises:
        CheckpointError: no such file, no checkpoint in the folder, or one that does not hold what it should.
    """
    state = _load_with_generator(path, report)
    vae = VAE(**state["model_arguments"])
    vae.load_state_dict(state["averaged"])
    vae.draw_at(learned_side(state))
    vae.detail = state["detail"]
    vae.preparation = {"channels": vae.image_shape[0], **preparation_of_file(state["preparation"])}
    vae.class_names, vae.class_counts = class_names(state), state["class_counts"]
    return vae.requires_grad_(False).eval()


def preparation_of(vae):
    """Returns the arguments of image_files.decode_image for a VAE: as load_generator says, else its channels alone."""
    return getattr(vae, "preparation", {"channels": vae.image_shape[0]})


def export_generator(source, path, *, report=print):
    """Writes the averaged VAE of a checkpoint, or of the newest one of a run folder, as save_generator; returns its path.

    Args:
        source, report: as path and report of load_generator.
        path: a new file.

    Raises:
        CheckpointError: as load_generator.
        OSError: there is such a file already, or it could not be written.
    """
    state, path = _load_with_generator(source, report), pathlib.Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already")
    save_generator(path, state)
    return path


def save_generator(path, state):
    """Writes a checkpoint that holds the averaged VAE alone, for load_generator, and no names of folders but of classes.

    Args:
        state: a dict with the keys of SCHEMA but the first.
    """
    plain = {name: value for name, value in state["config"].items() if not isinstance(value, str)}
    state = state | {name: {} for name in TRAINING_ONLY} | {"config": plain}
    with atomic_write(path, bytes_needed=_num_bytes(state)) as file:
        _save({"format": FORMAT, **state}, file)


def load_start(path, image_size, *, report=print):
    """Returns the state of a checkpoint or exported generator for networks of images of that size, or of larger ones.

    Weights have the names that they have in the larger networks, and "first_side" is the size that the file has learned.
    "critic" is {} where there is a generator alone.

    Args:
        path, report: as for load_generator.
        image_size: of the networks that begin with it.

    Raises:
        CheckpointError: as load_generator; the size is neither that of its networks nor twice, four, ... times it.
    """
    state = _load_with_generator(path, report)
    model, state["first_side"] = state["model_arguments"], learned_side(state)
    one, other = height_and_width(model["image_size"]), height_and_width(image_size)
    levels = (min(other) // min(one)).bit_length() - 1
    if levels < 0 or other != tuple(side << levels for side in one):
        raise CheckpointError(f"--image-size: {path} has networks for {size_text(plain_size(one))} px, so it can be that or "
                              f"twice, four times, ... that, got {size_text(plain_size(other))}")
    if state["critic"]:
        with torch.device("meta"):
            expected = Discriminator(**critic_arguments(model)).state_dict()
        check_tensors(state["critic"], expected, f"{path}: critic")
    state["model_arguments"] = {**model, "image_size": plain_size(other), "base_size": model["base_size"] or min(one),
                                "grow_from": model["grow_from"] or min(one)}
    return state | {name: _names_in_larger(state[name], levels) for name in ("averaged", "critic")}


def critic_arguments(model_arguments):
    """Returns the keyword arguments of a Discriminator for those of its VAE."""
    return {name: model_arguments[name] for name in CRITIC_ARGUMENTS if name in model_arguments}


def _names_in_larger(weights, levels):
    """Returns weights of a VAE or Discriminator under the names they have in one for images 2**levels times as large."""
    numbers = [int(name.split(".")[1]) for name in weights if name.startswith("decoder.")]
    draws = f"decoder.{max(numbers, default=0)}"
    renamed = {}
    for name, tensor in weights.items():
        layer, kind = name.rsplit(".", 1)
        network, _, number = layer.partition(".")
        if levels and layer in ("encoder.0", "blocks.0", draws):  # those that take and draw the largest images
            layer = f"{'outputs' if layer == draws else 'inputs'}.{levels - 1}"
        elif network in ("inputs", "outputs"):
            layer = f"{network}.{int(number) + levels}"
        elif network in ("encoder", "blocks"):
            layer = f"{network}.{int(number) + LAYERS_PER_HALVING * levels}"
        renamed[f"{layer}.{kind}"] = tensor
    return renamed


def _load_with_generator(path, report):
    """load_checkpoint of a file, or of the newest one of a run folder, with "averaged" checked against "model_arguments"."""
    path = pathlib.Path(os.path.expanduser(path))
    state = load_newest(path / "checkpoints", report=report) if path.is_dir() else load_checkpoint(path)
    if state is None:
        raise CheckpointError(f"{path}: no checkpoints below it")
    try:
        with torch.device("meta"):
            vae = VAE(**state["model_arguments"])
        vae.draw_at(learned_side(state))
    except Exception as error:  # whatever such arguments lead to
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: model_arguments: {ascii(str(error))[1:-1][:200]}") from None
    try:
        check_tensors(state["averaged"], vae.state_dict(), "averaged")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return state
