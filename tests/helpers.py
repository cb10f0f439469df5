"""Tiny runs, processes of their own and comparisons, shared by the tests."""
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import signal
import sys
import time

import torch
from PIL import Image, ImageSequence
from torchvision.transforms.v2.functional import pil_to_tensor

import training
from augmentation import NUM_AUGMENT_NUMBERS
from checkpointing import load_newest
from config import Config
from model_definitions import VAE

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {"image_size": 32, "base_channels": 4, "latent_dim": 8, "batch_size": 4, "device": "cpu", "precision": "float32",
        "log_every": 2, "sample_every": 1_000, "checkpoint_every": 1_000}
TIMES = ("images_per_second", "elapsed_seconds")
MODEL = {"image_size": 32, "latent_dim": 8, "base_channels": 2, "num_frames": 3, "output_layer": "cnn", "alpha_grid": 4}
STATE = {"images_seen": 0, "elapsed_seconds": 0.0, "num_images": 1, "config": {"seed": 0}, "model_arguments": MODEL,
         "pending_metrics": {"loss": torch.tensor([1.5])}, "generator": {"a": torch.arange(6.0)},
         "averaged": VAE(**MODEL).state_dict(), "critic": {}, "generator_optimizer": {}, "critic_optimizer": {}}


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


def newest(run):
    return load_newest(run / "checkpoints")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same(one, other, path=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            if name not in ("config", "elapsed_seconds"):
                assert_same(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other)
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


def tiny_gan(**settings):
    return training.GAN(Config(**{"data": "x", **TINY, **settings}), torch.device("cpu"))


def critic_arguments(images):
    return images, torch.randn(4, 8), torch.rand(4, 1, 1, 1), torch.rand(4, NUM_AUGMENT_NUMBERS)


def generator_arguments(images):
    return images, torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, NUM_AUGMENT_NUMBERS), torch.tensor(0.5)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("run-by-loading",)


def read(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")) / 255


def frames_in(path):
    if path.suffix == ".mp4":
        import av

        with av.open(path) as container:
            return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                                for frame in container.decode(video=0)]) / 255
    with Image.open(path) as image:
        return torch.stack([pil_to_tensor(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]) / 255
