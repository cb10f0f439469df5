"""Tiny runs, processes of their own and comparisons, shared by the tests."""
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import signal
import sys
import time
from fractions import Fraction

import numpy as np
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
MODEL = {"image_size": 32, "latent_dim": 8, "base_channels": 2, "num_frames": 3, "output_layer": "cnn", "alpha_grid": 4,
         "even_taps": True}
STATE = {"images_seen": 0, "elapsed_seconds": 0.0, "num_images": 1, "config": {"seed": 0}, "model_arguments": MODEL,
         "pending_metrics": {"loss": torch.tensor([1.5])}, "generator": {"a": torch.arange(6.0)},
         "averaged": VAE(**MODEL).state_dict(), "critic": {}, "generator_optimizer": {}, "critic_optimizer": {}}


def save_picture(path, mode="RGB", size=(40, 30), color=None):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if color is not None else 0).save(path)
    return path


def draw_film(path, pictures, *, rate=30, times=None, codec="libx264", pix_fmt="yuv420p", sound=None, tags=(1, 1),
              options=None, prepare=lambda stream: None):
    """Writes a film.

    Args:
        pictures: of its frames, uint8 (H, W, 3) or (H, W, 4).
        rate: frames per second.
        times: of the frames, in milliseconds, in place of the rate.
        sound: a codec, for 2.8 seconds of silence with a beep at 1.2.
        tags: numbers of the colour matrix and of the range, 1 limited and 2 full; None says nothing of them.
        options: of the encoder.
        prepare: called with the stream before it is used.
    """
    import av

    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        pictures = iter(pictures)
        first = next(pictures)
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], pix_fmt
        if times:
            stream.codec_context.time_base = Fraction(1, 1_000)
        if tags:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
        prepare(stream)
        heard = container.add_stream(sound, rate=48_000, layout="mono") if sound else None
        for index, picture in enumerate(itertools.chain([first], pictures)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[2] == 3 else "rgba")
            colours = {"dst_colorspace": tags[0], "dst_color_range": tags[1]} if tags and pix_fmt[:3] == "yuv" else {}
            frame = frame.reformat(format=pix_fmt, **colours)
            frame.pts = times[index] if times else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if heard:
            seconds = np.arange(int(2.8 * 48_000)) / 48_000
            tone = np.sin(2 * np.pi * 880 * seconds) * ((seconds >= 1.2) & (seconds < 1.3)) * 0.8
            resampler = av.AudioResampler(format=heard.format, layout="mono", rate=48_000,
                                          frame_size=heard.frame_size or 1_024)
            frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
            for part in (*resampler.resample(frame), *resampler.resample(None)):
                container.mux(heard.encode(part))
            container.mux(heard.encode())
    return pathlib.Path(path)


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
