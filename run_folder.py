"""The run folder: which one a run uses, and how things are written into it.

config.json, reals.png, samples/, reconstructions/, alpha_maps/ (a PNG for each step drawn), metrics.jsonl (a line for each
log and each measurement), curves.png and checkpoints/. Nothing in it is deleted but superseded checkpoints, and log lines
that a resumed run writes again.
"""
import contextlib
import itertools
import json
import pathlib

from checkpointing import CheckpointError, list_checkpoints, load_newest
from safe_files import append_line, free_bytes, hold_folder, remove_leftovers, whole_file

RUN_KEYS = {"data", "seed", "image_size", "critic_steps"}  # no other program's config.json has all of them
CURVES_PER_ROW = 3


class RunFolderError(ValueError):
    """The folder cannot be used for this run; the message says what would do."""


def choose_run_folder(base, identity, *, exactly, fresh):
    """Returns the folder for a run: `base`, or base-2, base-3 and so on.

    Args:
        base: the first choice.
        identity: the entries of config.json that make a run the same run.
        exactly: use `base` whatever run it holds, rather than number.
        fresh: take the first free number rather than a folder that holds a run.

    Raises:
        RunFolderError: the folder is a file, or holds other things than a run.
    """
    base = pathlib.Path(base)
    folder, used = base, []
    while folder.exists():
        used.append(folder)
        folder = base.parent / f"{base.name or 'run'}-{len(used) + 1}"
    if exactly and not fresh:
        folder = base
    elif not fresh:
        folder = next((old for old in reversed(used) if identity.items() <= _saved_config(old).items()), folder)
    if folder.exists():
        if not folder.is_dir():
            raise RunFolderError(f"--out: {folder} is a file, a folder is needed")
        if any(folder.iterdir()) and not _saved_config(folder):
            raise RunFolderError(f"--out: {folder} holds other things than a run; name a new or an empty folder")
    return folder


def _saved_config(folder):
    """Returns the config of the run in a folder, from a checkpoint where config.json is lost; {} where there is no run."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        return saved if saved.keys() >= RUN_KEYS else {}
    except (AttributeError, OSError, RecursionError, ValueError):
        with contextlib.suppress(CheckpointError):
            state = load_newest(folder / "checkpoints", report=lambda line: None)
            return state["config"] if state else {}
        return {}


@contextlib.contextmanager
def open_run_folder(folder, config, *, step, checkpoints, bytes_needed):
    """Within this context the folder is this run's alone: config.json is written, the log ends where the run goes on.

    Args:
        folder: as chosen by choose_run_folder.
        config: what config.json is to hold.
        step: where the run goes on.
        checkpoints: those that were there when this was found out, in order.
        bytes_needed: by the checkpoints of the run.

    Raises:
        RunFolderError: fewer bytes are free than will be needed; it cannot be written to; another process trains there, or
            has trained there since.
    """
    bytes_needed -= sum(path.stat().st_size for path in folder.glob("checkpoints/*"))
    if bytes_needed > free_bytes(folder):
        raise RunFolderError(
            f"--out: the checkpoints need {bytes_needed:,} bytes in {folder}, {free_bytes(folder):,} are free")
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold_folder(folder, busy=lambda: _refuse(folder)))
            if list_checkpoints(folder / "checkpoints") != checkpoints:
                _refuse(folder)
            for place in (folder, *folder.glob("*/")):
                remove_leftovers(place)
            _write(folder / "config.json", json.dumps(config, indent=2) + "\n")
            log = folder / "metrics.jsonl"
            if log.exists():
                _write(log, "".join(_lines_up_to(step, log.read_text(errors="replace"))))
        except OSError as error:
            raise RunFolderError(f"--out: {error}") from None
        yield


def _refuse(folder):
    raise RunFolderError(f"--out: another process is training in {folder}; wait for it, or start beside it with --fresh")


def _lines_up_to(step, text):
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] > step:
                return
        except (KeyError, RecursionError, TypeError, ValueError):  # torn by a crash
            continue
        yield line + "\n"


def append_metrics(folder, metrics):
    """Appends a dict of plain values to metrics.jsonl, as one line."""
    append_line(folder / "metrics.jsonl", json.dumps(metrics))


def read_metrics(folder):
    """Returns the lines of metrics.jsonl, as dicts."""
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def draw_curves(folder):
    """Draws the numbers of metrics.jsonl over the steps as curves.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_metrics(folder)
    names = [name for name in dict.fromkeys(itertools.chain(*lines)) if name not in ("step", "images", "elapsed_seconds")]
    figure = Figure(figsize=(12, 10), layout="constrained")
    for place, name in enumerate(names, start=1):
        panel = figure.add_subplot(-(-len(names) // CURVES_PER_ROW), CURVES_PER_ROW, place, title=name)
        panel.plot(*zip(*((line["step"], line[name]) for line in lines if name in line), strict=True), marker=".")
    with whole_file(folder / "curves.png") as file:
        figure.savefig(file)


def _write(path, text):
    with whole_file(path) as file:
        file.write(text.encode())
