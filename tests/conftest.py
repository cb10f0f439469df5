"""Small drawn image folders, tiny runs and processes of their own, shared by the tests."""
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import random
import signal
import sys
import time

import pytest
import torch
from PIL import Image

import training
from config import Config
from demo_images import SHAPES, draw_shape

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {"image_size": 32, "base_channels": 4, "latent_dim": 8, "batch_size": 4, "device": "cpu", "precision": "float32",
        "log_every": 2, "sample_every": 1_000, "checkpoint_every": 1_000}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test works in a folder of its own, in one thread, as its networks are too small for two, and without curves."""
    monkeypatch.chdir(tmp_path)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def image_folder(tmp_path):
    """Ten drawn pictures in class folders."""
    folder = tmp_path / "images"
    for index in range(10):
        shape = SHAPES[index % 3]
        (folder / shape).mkdir(parents=True, exist_ok=True)
        draw_shape(shape, random.Random(index)).save(folder / shape / f"{index}.png")
    return folder


@pytest.fixture
def train_tiny(image_folder):
    """Trains a tiny network on `image_folder` and returns the run folder."""

    def train(**settings):
        return training.train(Config(**{"data": str(image_folder), **TINY, **settings}))

    return train


def save_picture(path, mode="RGB", size=(40, 30), color=None):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if color is not None else 0).save(path)
    return path


def tiny_arguments(**settings):
    """The command line of a tiny run."""
    return [str(part) for name, value in {**TINY, **settings}.items() for part in ("--" + name.replace("_", "-"), value)]


def wait_until(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def forking():
    """Processes forked from one that has imported everything already, which saves six seconds for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training"])
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(ROOT)
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


class Child:
    """A function, and then training.py with its arguments, in a process of its own.

    What it writes to stdout and stderr is in the files `out` and `err`.
    """

    def __init__(self, *arguments, first=None, environment=(), name="child"):
        self.out, self.err = (pathlib.Path(f"{name}.{kind}").resolve() for kind in ("out", "err"))
        self._process = forking().Process(target=_run_child, daemon=True, args=(
            os.getcwd(), dict(environment), self.out, self.err, first, list(map(str, arguments))))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout=60):
        """Returns the exit status, negative for a signal."""
        self._process.join(timeout)
        status = self._process.exitcode
        self._process.kill()
        assert status is not None, "still running"
        return status


def _run_child(folder, environment, out, err, first, arguments):
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever pytest was started by
    if first:
        first()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if arguments:
        sys.exit(training.main(arguments))
