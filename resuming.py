"""Where a run goes on: which run folder, from which checkpoint, with which settings.

The run folder holds config.json, reals.png, samples/, reconstructions/ and alpha_maps/ (a PNG for each step drawn),
metrics.jsonl (a line for each log and each measurement), curves.png and checkpoints/. A run deletes only old checkpoints. On
resume it cuts metrics.jsonl at the checkpoint.
"""
import contextlib
import dataclasses
import json
import os
import pathlib
import re

import distributed
from checkpointing import (
    CheckpointError,
    class_names,
    learned_side,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    load_start,
    preparation_of_file,
    settings_for_file,
    settings_of_file,
)
from config import DEMO, option_name
from console import listed, say
from devices import pick_precision
from growth import growth_of
from image_data import class_labels, load_images
from image_sizes import plain_size, size_text
from safe_files import atomic_write, free_bytes, lock_folder, lock_of, remove_temporary_files, too_few

RUN_KEYS = {"data", "seed", "image_size", "critic_steps"}  # no other program's config.json has all of them
MAY_CHANGE = {"out", "steps", "epochs", "resume", "fresh", "dry_run", "check_data", "skip_bad", "device", "compile",
              "cache_dir", "log_every", "sample_every", "evaluate_every", "checkpoint_every", "keep_checkpoints",
              "tensorboard", "class_conditional"}  # without a warning
MAY_BE_ABSENT = ("base_size", "grow_from")  # from runs that were begun without one, or before there was any


class RunFolderError(ValueError):
    """The folder cannot be used for this run; the message says what would do."""


def find_run(config, *, name, folder):
    """Returns the run folder, the checkpoints in it, the state to go on from, and what load_start returns for a new run.

    There is no state at the start of a run, and nothing to start with where config.initial_checkpoint names nothing: None.
    A run whose images now have another path, on another machine for example, is known by the images themselves.

    Args:
        config: a Config whose data is a resolved path, or names a set of images.
        name: of the run folder below runs/, where config.out does not name one; None for that of the folder or film.
        folder: the folder of images, in which the run folder must not be, or a film; None where there is none.

    Raises:
        RunFolderError, CheckpointError: what cannot be used, and what would do.
    """
    identity = {"data": config.data, "initial_checkpoint": config.initial_checkpoint}
    identity |= {"image_size": config.image_size} if config.initial_checkpoint else config.model_arguments()
    identity["class_conditional"] = config.class_conditional
    fresh = config.fresh and not distributed.num_restarts()
    name = name or (folder.stem if folder.is_file() else folder.name)

    def has_these_images(state):
        if not folder or not state["image_set"]:
            return False
        channels = state["model_arguments"]["channels"]  # a run from --initial-checkpoint has those of the file
        images = images_of_run(dataclasses.replace(config, channels=channels), state, moved=True)
        return images.digest == state["image_set"]

    def is_run_of_these_images(path):
        with contextlib.suppress(CheckpointError):
            state = load_newest(path / "checkpoints", report=lambda line: None)
            return bool(state) and has_these_images(state)
        return False

    out = choose_run_folder(config.out or f"runs/{name}", identity, exactly=bool(config.out), fresh=fresh,
                            moved=is_run_of_these_images)
    if folder and pathlib.Path(os.path.realpath(out)).is_relative_to(folder):
        raise RunFolderError(f"--out: {out} is inside --data {folder}, and its pictures would be trained on")
    checkpoints = list_checkpoints(out / "checkpoints")
    state = load_newest(out / "checkpoints", report=say)
    if state and not config.resume and state["config"].get("data") != config.data and has_these_images(state):
        say(f"note: the images of {out} were at {state['config'].get('data')}; {config.data} has the same, so it goes on")
        state["config"]["data"] = config.data
    if config.resume:
        if state is None:
            state = load_checkpoint(config.resume)
            if not state["critic"]:
                raise CheckpointError(f"--resume: {config.resume} holds a generator alone, which cannot be trained further; "
                                      "the checkpoints of a run folder can")
        elif not _same_file(state["config"].get("resume"), config.resume):
            raise RunFolderError(f"--resume: {out} already holds a run; name a new folder with --out")
    elif state and not _same_file(state["config"].get("initial_checkpoint"), config.initial_checkpoint):
        raise RunFolderError(f"--initial-checkpoint: {out} holds a run that began with "
                             f"{state['config'].get('initial_checkpoint') or 'none'}; name a new folder with --out")
    start = None
    if config.initial_checkpoint and not state:
        start = load_start(config.initial_checkpoint, config.image_size, report=say)
    return out, checkpoints, state, start


def choose_run_folder(base, identity, *, exactly, fresh, moved=lambda path: False):
    """Returns the folder for a run: `base`, or base-2, base-3 and so on.

    Args:
        base: the first choice.
        identity: the entries of config.json that make a run the same run.
        exactly: use `base` itself, never base-2, base-3, ...
        fresh: take a new number above those of the same run, not a folder that holds it.
        moved: whether a run folder that differs in `data` alone is of the same images all the same.

    Raises:
        RunFolderError: the folder is a file, or holds other things than a run.
    """
    base = pathlib.Path(base)
    name = base.name or "run"
    numbered = {int(path.name.removeprefix(f"{name}-")): path for path in base.parent.glob("*")
                if re.fullmatch(rf"{re.escape(name)}-[1-9]\d{{0,8}}", path.name)}
    saved = {number: _saved_config(path) for number, path in {**numbered, 1: base}.items()}
    same = {number: numbered.get(number, base) for number, settings in saved.items()
            if settings and not _differences(identity, settings)}
    if not same and not fresh and not exactly:
        same = {number: numbered.get(number, base) for number, settings in saved.items()
                if settings and _differences(identity, settings).keys() == {"data"} and moved(numbered.get(number, base))}
    if exactly and not fresh:
        folder = base
    elif same and not fresh:
        folder = same[max(same)]
    else:
        number = max(same, default=0) + 1
        while (folder := base if number == 1 else base.parent / f"{name}-{number}").exists():
            number += 1
        if not same and saved.get(1):
            differences = "; ".join(f"{option_name(name)} {size_text(saved[1].get(name))}, not {size_text(value)}"
                                    for name, value in _differences(identity, saved[1]).items())
            say(f"note: {base} holds another run ({differences}), so this one gets {folder}; with these settings "
                f"that one goes on{_and_how(base, saved[1], identity)}")
    if folder.exists():
        if not folder.is_dir():
            raise RunFolderError(f"--out: {folder} is a file, a folder is needed")
        if any(folder.iterdir()) and not _saved_config(folder):
            raise RunFolderError(f"--out: {folder} holds other things than a run; name a new or an empty folder")
    return folder


def _and_how(folder, saved, identity):
    """What goes on with a run whose images are not there any more."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    if saved.get("data") == identity["data"] or os.path.exists(str(saved.get("data"))) or not checkpoints:
        return ""
    return f", and with other images by --resume {checkpoints[-1]} --out NEW"


def _differences(identity, saved):
    """Returns the entries of `identity` that a saved config does not have. A run keeps what it was begun without."""
    return {name: value for name, value in identity.items()
            if saved.get(name) != value and not (name in MAY_BE_ABSENT and saved.get(name) is None)
            and not (name == "initial_checkpoint" and _same_file(saved.get(name), value))}


def _same_file(one, other):
    """Whether two paths, or two times None, name the same file."""
    return one == other or bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def _saved_config(folder):
    """Returns the config of the run in a folder, from a checkpoint where config.json is lost; {} where there is no run."""
    try:
        saved = settings_of_file(json.loads((folder / "config.json").read_text()))
        plain_size(saved["image_size"])
        return {"class_conditional": False} | saved if saved.keys() >= RUN_KEYS else {}
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        with contextlib.suppress(CheckpointError):
            state = load_newest(folder / "checkpoints", report=lambda line: None)
            return {"class_conditional": False} | state["config"] if state else {}
        return {}


def resolve_settings(config, state, start, device):
    """Returns the config with the model and precision of the run; refuses other data, and reports other changes.

    Args:
        config: a Config.
        state: the checkpoint to go on from, None at the start of a run.
        start: as find_run returns it.
        device: a torch.device, which decides about "auto" at the start of a run.

    Raises:
        CheckpointError: what cannot change within a run.
    """
    if config.initial_checkpoint:
        config = _with_model_of(config, (state or start)["model_arguments"])
    if start:
        say(f"begins  with {config.initial_checkpoint}, which has learned {start['first_side']} px"
            + ("" if start["critic"] else "; it holds a generator alone, so the critic begins with nothing"))
    if not state:
        precision = pick_precision(device) if config.precision == "auto" else config.precision
        return dataclasses.replace(config, precision=precision)
    saved, model = state["config"], state["model_arguments"]
    config = dataclasses.replace(config, **{name: None for name in MAY_BE_ABSENT if model.get(name) is None})
    faults = [f"{option_name(name)}: this run has {size_text(model.get(name))}, got {size_text(value)}; --out names another "
              "folder"
              for name, value in config.model_arguments().items() if model.get(name) != value]
    if saved.get("data") != config.data and not config.resume:
        faults.append(f"--data: this run has {saved.get('data')}, got {config.data}; --out names another folder, where "
                      "--resume goes on from a checkpoint of this one")
    if faults:
        raise CheckpointError("\n".join(faults))
    now = growth_of(config, state["first_side"]).side_at(state["images_seen"])
    if now < learned_side(state):
        raise CheckpointError(f"--grow-every-images: this run has learned {learned_side(state)} px, and with "
                              f"{config.grow_every_images} it would go back to {now}")
    if config.precision == "auto":
        if saved.get("precision") not in ("float32", "bfloat16"):
            raise CheckpointError(f"the checkpoint has no precision that is known: {saved.get('precision')}")
        config = dataclasses.replace(config, precision=saved["precision"])
        if saved["precision"] == "bfloat16" and pick_precision(device) == "float32":
            config = dataclasses.replace(config, precision="float32")
            say("note: this run was in bfloat16, which is slow here, so it goes on in float32; --precision overrules that")
    # Older checkpoints do not name these: the same defaults, but the schedule counted 500 and 8,000 steps.
    before = {"warm_up_images": 500 * config.batch_size, "decay_after_images": 8_000 * config.batch_size, "ema_ramp": 0.1,
              "grow_every_images": config.grow_every_images, "adam_beta2": 0.9, "resize_mode": "crop",
              "class_conditional": False} | saved
    for name, value in dataclasses.asdict(config).items():
        if name not in MAY_CHANGE and before.get(name) != value:
            say(f"warning: {option_name(name)} was {before.get(name)}, is {value} from here on")
    return config


def classes_of_run(config, data, state, start):
    """Returns the names of the classes of a run, in the order of their numbers; [] without --class-conditional.

    Classes that a checkpoint knows keep their numbers, also where the images have none of them; new ones come after these.

    Args:
        config: a Config.
        data: the ImageSet.
        state, start: as find_run returns them.

    Raises:
        DataError: as class_labels.
        CheckpointError: the run was begun with other classes, or without any.
    """
    known = class_names(state or start) if state or start else []
    if not config.class_conditional:
        if known:
            source = config.resume or config.initial_checkpoint or "the run"
            raise CheckpointError(f"--class-conditional: {source} has classes, so it is needed")
        return []
    names, _ = class_labels(data)
    new, gone = sorted(set(names) - set(known)), sorted(set(known) - set(names))
    if state and new and not config.resume:
        missing = f", and the images have none of {listed(map(repr, gone))}" if gone else ""
        raise CheckpointError(f"--data: this run has no class {listed(map(repr, new))}{missing}; --resume CHECKPOINT --out "
                              "NEW goes on with the new ones beside those that it knows")
    if known and (new or gone):
        say(f"note: new classes: {listed(map(repr, new)) or 'none'}; without images: {listed(map(repr, gone)) or 'none'}")
    return [*known, *new]


def _with_model_of(config, model):
    """Returns the config with the model_arguments of the checkpoint that the run has begun with, which it says."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)} | (DEMO if config.demo else {})
    changes = {name: value for name, value in model.items()
               if name not in ("image_size", "num_classes", "even_taps") and getattr(config, name) != value}
    faults = [f"{option_name(name)}: {config.initial_checkpoint} has {value}, got {getattr(config, name)}"
              for name, value in changes.items() if getattr(config, name) != defaults[name]]
    if faults:
        raise CheckpointError("\n".join(faults))
    if changes:
        say(f"model   as in {config.initial_checkpoint}: "
            + " ".join(f"{option_name(name)} {value}" for name, value in changes.items()))
    return dataclasses.replace(config, **changes)


def images_of_run(config, state, *, moved=False):
    """Returns the ImageSet of config.data. Where a run goes on with its images, more than 8 bits are scaled as before.

    Args:
        config: a Config.
        state: the checkpoint to go on from, None at the start of a run.
        moved: whether the images may be those of the run although their path is another.

    Raises:
        DataError: as load_images.
    """
    same = state and (moved or state["config"].get("data") == config.data)
    levels = preparation_of_file(state["preparation"])["levels"] if same else {}
    return load_images(config.data, config.image_size, cache_dir=config.cache_dir, skip_bad=config.skip_bad, levels=levels,
                       channels=config.channels, resize_mode=config.resize_mode, video_fps=config.video_fps)


@contextlib.contextmanager
def open_run_folder(folder, config, *, step, last_logged, checkpoints, bytes_needed):
    """Locks the folder, writes config.json, and cuts metrics.jsonl where the run goes on.

    Args:
        folder: as chosen by choose_run_folder.
        config: what config.json is to hold, as a dict.
        step: where the run goes on.
        last_logged: the last step up to which the means of the log are final; a line after it is written anew.
        checkpoints: those seen when `step` was read; if they have changed since, another process has trained here.
        bytes_needed: by the checkpoints of the run.

    Raises:
        RunFolderError: fewer bytes are free than will be needed; it cannot be written to; another process trains there, or
            has trained there since.
    """
    bytes_needed -= sum(path.stat().st_size for path in folder.glob("checkpoints/*"))
    if too_few(free := free_bytes(folder), bytes_needed):
        raise RunFolderError(f"--out: the checkpoints need {bytes_needed:,} bytes in {folder}, {free:,} are free")
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_folder(folder, busy=lambda: _refuse(folder)))
            if list_checkpoints(folder / "checkpoints") != checkpoints:
                _refuse(folder)
            for place in (folder, *folder.glob("*/")):
                remove_temporary_files(place)
            try:
                _write(folder / "config.json", json.dumps(settings_for_file(config), indent=2) + "\n")
            except OSError as error:
                if not step:
                    raise
                say(f"warning: {error}; what the checkpoints hold counts")  # held open by another program, perhaps
            log = folder / "metrics.jsonl"
            if log.exists():
                _write(log, "".join(_lines_up_to(step, last_logged, log.read_text(errors="replace"))))
        except OSError as error:
            raise RunFolderError(f"--out: {error}") from None
        yield


def _refuse(folder):
    raise RunFolderError(f"--out: another process is training in {folder}; wait for it, or start beside it with --fresh. If "
                         f"there is none on any machine, remove {lock_of(folder)}")


def _lines_up_to(step, last_logged, text):
    for line in text.splitlines():
        try:
            values = json.loads(line)
            last = last_logged if "images" in values else step  # lines of measurements have no means
            if values["step"] <= last:
                yield line + "\n"
        except (KeyError, RecursionError, TypeError, ValueError):  # an incomplete line, after a crash
            continue


def _write(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())
