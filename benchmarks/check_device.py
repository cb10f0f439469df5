"""Whether training on a device computes what the CPU does, and how fast: prints one table, to be pasted into a report.

    python benchmarks/check_device.py [--device auto|cpu|cuda|cuda:1|mps] [--sizes 64 128] [--batches 16 64]

Differences are those of device_check.difference, in float32. Times are medians of steps with the settings of training.py, of
images of the last size. The last two rows are of a run with its defaults, which ends after --seconds.
"""
import argparse
import contextlib
import functools
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import training
from batches import first_batches
from config import DEVICE, Config
from device_check import difference
from devices import DeviceError, keep_freed_memory, limit_threads, pick_device, pick_precision, usual_settings
from fast_paths import CapturedUpdate, use_fast_layers, use_fast_updates
from randomness import random_generator
from run_log import RunLog
from wgan_gp import GAN

UPDATES = ("plain", "captured", "compiled")
NUM_IMAGES = 256
GPU_STEPS = 10  # between two readings of the clock


class RunEndedError(Exception):
    """Ends a run."""


def drawn_images(size):
    return torch.randint(256, (NUM_IMAGES, 3, size, size), dtype=torch.uint8, generator=random_generator("images", size))


def make_faster(gan, images, *, updates):
    """Makes a GAN's updates as training.py would; raises RuntimeError where it would go on without."""
    said = []
    torch.compiler.reset()  # of one process it compiles only so many networks
    use_fast_layers(gan, report=said.append)
    if updates != "plain":
        capture = CapturedUpdate if gan.device.type == "cuda" else None
        use_fast_updates(gan, first_batches(gan, images), compiled=updates == "compiled", capture=capture,
                         report=said.append)
    if said:
        raise RuntimeError(said[0])


def differences(device, size, updates):
    config = Config(data="drawn", image_size=size)
    found = difference(config, device, training.training_step, prepare=functools.partial(make_faster, updates=updates))
    return f"{found.metrics:.0e}, {found.weights:.0e}{'' if found.is_rounding() else ': WRONG'}"


def after_nan(device, size, updates):
    """Whether all weights but the one that was made NaN stay what they were in a step."""
    gan, images = GAN(Config(data="drawn", image_size=size, precision="float32"), device), drawn_images(size)
    make_faster(gan, images, updates=updates)
    *weights, last = [*gan.generator.parameters(), *gan.critic.parameters()]
    with torch.no_grad():
        last.fill_(torch.nan)
        before = [weight.clone() for weight in weights]
    training.training_step(gan, images, 0, 0)
    return "weights kept" if all(map(torch.equal, before, weights)) else "weights changed: WRONG"


def step_time(device, size, batch, grow_from, seconds, updates):
    config = Config(data="drawn", image_size=size, batch_size=batch, grow_from=grow_from, precision=pick_precision(device))
    gan, images = GAN(config, device), drawn_images(size).to(device)
    gan.work_at(size)
    make_faster(gan, images, updates=updates)
    times, together = [], 1 if device.type == "cpu" else GPU_STEPS
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(together):
            metrics = training.training_step(gan, images, len(times), len(times) * batch)
        next(iter(metrics.values())).item()  # waits for the device
        times.append((time.perf_counter() - started) / together)
    median = statistics.median(times[1:])
    return f"{1e3 * median:.3g} ms, {batch / median:.3g} images/s"


def outputs(device, size, seconds, folder):
    """Trains for so many seconds; returns what pictures, with the curves, and checkpoints have taken of them."""
    calls = []  # name, start and end

    def timed(name):
        method = getattr(RunLog, name)

        def call(log):
            if device.type == "cuda":
                torch.cuda.synchronize()  # the steps still to be computed are not its own
            started = time.perf_counter()
            method(log)
            calls.append((name, started, time.perf_counter()))
        return mock.patch.object(RunLog, name, call)

    def after_step(step, metrics):
        if time.perf_counter() - calls[0][1] > seconds:  # the first pictures are drawn before the first step
            raise RunEndedError

    config = Config(data="drawn", image_size=size, device=str(device), out=f"{folder}/run", steps=10**9, keep_checkpoints=1)
    with timed("draw_samples"), timed("save_step"), contextlib.suppress(RunEndedError):
        training.train(config, data=drawn_images(size), after_step=after_step)
    elapsed = time.perf_counter() - calls[0][1]
    for name in ("draw_samples", "save_step"):
        took = [end - start for called, start, end in calls if called == name]
        yield f"{len(took)} in {elapsed:.0f} s, {statistics.mean(took or [0]):.2g} s each: {sum(took) / elapsed:.1%}"


def row(name, *cells):
    print("|", " | ".join([name, *cells]), "|", flush=True)


def cells(function, updates, *arguments):
    """Yields what a function returns for each kind of updates, or why it does not."""
    for kind in updates:
        print(f"{function.__name__} {arguments[1:]} {kind} ...", file=sys.stderr)
        try:
            yield function(*arguments, kind)
        except Exception as error:  # of the compiler, of the device, of memory
            yield reason(error)


def reason(error):
    """Returns an error's text as a cell."""
    text = str(error).removeprefix("warning: training goes on ").replace("|", "/")
    return " ".join(text.split())[:200] or type(error).__name__


@usual_settings()
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", metavar=DEVICE)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], metavar="PIXELS")
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64], metavar="N")
    parser.add_argument("--updates", nargs="+", default=UPDATES, choices=UPDATES, help="compiling takes a minute "
                        "or two for each cell and size")
    parser.add_argument("--seconds", type=float, default=300, help="of the run; a time of a step takes a thirtieth of them")
    given = parser.parse_args(arguments)
    try:
        device = pick_device(given.device)
    except DeviceError as error:
        parser.error(str(error))
    name = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # as training.py
        name = torch.cuda.get_device_name()
    updates = [kind for kind in given.updates if kind != "captured" or device.type == "cuda"]
    print(f"{device}: {name}; torch {torch.__version__}; steps in {pick_precision(device)}\n")
    row("", *updates)
    row(*["---"] * (1 + len(updates)))
    for size in given.sizes:
        row(f"{size} px: metrics, weights differ from the CPU's by", *cells(differences, updates, device, size))
    row("NaN in a step", *cells(after_nan, updates, device, min(given.sizes)))
    for size in given.sizes:
        for batch in given.batches:
            for grow_from in (None, min(32, size)):
                row(f"{size} px, batch {batch}{', growth' if grow_from else ''}: a step",
                    *cells(step_time, updates, device, size, batch, grow_from, given.seconds / 30))
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            found = list(outputs(device, max(given.sizes), given.seconds, folder))
    except Exception as error:
        found = [reason(error)] * 2
    for what, text in zip(("pictures and curves", "checkpoints"), found, strict=True):
        row(f"{what} of a run of {max(given.sizes)} px", text, *[""] * (len(updates) - 1))


if __name__ == "__main__":
    limit_threads()
    keep_freed_memory()
    main()
