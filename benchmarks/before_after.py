"""Compares settings with each other, and this checkout with another one.

    python benchmarks/before_after.py {layer,growth,busy,rendering} [--before CHECKOUT] [--sizes 32 64 128]

layer: what CNNParamTanh costs of a step, beside networks without it.
growth: what a step at the full size costs after growing from 32 px, beside networks that begin at that size.
busy: training alone, and beside one process that keeps a core busy.
rendering: many images of one generator, by generate.py: frames of a walk, which are not coded, and files of single images.

Each figure is taken in a process of its own. The processes of a size take turns, so that whatever slows one slows all.
"""
import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import rows

HERE = pathlib.Path(__file__).resolve().parents[1]
ROUNDS = 9
READING = 0.5  # at least so many seconds between two readings of the clock
BATCH = 16
SMALLEST = 32  # pixels, where a growth begins
RENDERED = {"frames": 1024, "files": 128}


class Row:
    """A process that imports the project from a checkout and does a number of pieces of work when told to."""

    def __init__(self, checkout, task, *, processes=1, **settings):
        self.processes = rows.start([sys.executable, __file__, task, "--row", json.dumps([str(checkout), settings])],
                                    processes=processes)
        self.seconds, self.pieces = {}, 1
        for _ in range(3):
            self._do()
        self.pieces = max(1, round(READING / self._do()))

    def _do(self):
        """Returns the seconds that a piece of work takes."""
        print(self.pieces, file=self.processes[0].stdin, flush=True)
        for line in self.processes[0].stdout:
            if line.startswith("seconds "):
                return float(line.split()[1]) / self.pieces
        raise SystemExit(f"a process ended: exit status {self.processes[0].wait()}")

    def measure(self, name):
        self.seconds.setdefault(name, []).append(self._do())

    def median(self, name):
        return statistics.median(self.seconds[name])

    def stop(self):
        rows.stop(self.processes)


def pieces_of_work():
    """Yields before every piece of work that this process is told to do."""
    while line := sys.stdin.readline():
        started = time.perf_counter()
        yield from range(int(line))
        print("seconds", time.perf_counter() - started, flush=True)


def train_steps(*, size, precision="auto", output_layer="cnn", grow_from=None):
    """Each piece of work is a step of training on noise, from the third on at the full size."""
    import dataclasses

    import torch

    import training
    from config import Config
    from devices import keep_freed_memory
    keep_freed_memory()
    pieces = pieces_of_work() if rows.is_first() else itertools.repeat(None)
    with tempfile.TemporaryDirectory() as out:
        growth = {"grow_from": grow_from, "grow_every_images": 1}
        known = {field.name for field in dataclasses.fields(Config)}  # of a checkout that may be an older one
        config = Config(data="noise", image_size=size, precision=precision, output_layer=output_layer, out=out,
                        batch_size=BATCH, steps=10**9, sample_every=10**9, checkpoint_every=10**9,
                        **{name: value for name, value in growth.items() if name in known})
        next(pieces)
        images = torch.randint(256, (1000, 3, size, size), dtype=torch.uint8)
        training.train(config, data=images, after_step=lambda step, metrics: next(pieces))


def render(*, size, kind):
    """Each piece of work is frames of one walk, or single images in files, by generate.py."""
    import torch

    import generate
    import training
    from config import Config
    with tempfile.TemporaryDirectory() as folder:
        run = training.train(Config(data="noise", image_size=size, steps=1, out=f"{folder}/run", sample_every=10**9),
                             data=torch.randint(256, (100, 3, size, size), dtype=torch.uint8))
        generate.save_clip = lambda *arguments, **settings: None  # coding takes its own time
        number = str(RENDERED[kind])
        what = ["--num-images", "1", "--clip", "walk", "--frames", number] if kind == "frames" else ["--num-images", number]
        for _ in pieces_of_work():
            assert generate.main([str(run), "--out", f"{folder}/out", *what]) == 0


def layer(checkouts, sizes):
    print(f"{'':24}{'size':>7}{'images/s':>10}{'none':>10}{'share of the layer':>20}")
    for size, precision in itertools.product(sizes, ("float32", "bfloat16")):
        found = {(name, output): Row(checkout, "layer", size=size, precision=precision, output_layer=output)
                 for name, checkout in checkouts.items() for output in ("cnn", "none")}
        take_turns(found.values(), "idle")
        for name in checkouts:
            seconds, without = (found[name, output].median("idle") for output in ("cnn", "none"))
            print(f"{name:8}{precision:16}{size:4} px{BATCH / seconds:10.1f}{BATCH / without:10.1f}"
                  f"{1 - without / seconds:20.1%}", flush=True)


def busy(checkouts, sizes):
    print(f"{'':24}{'size':>7}{'idle':>10}{'busy':>10}{'share of idle':>20}  (images/s)")
    for size in sizes:
        found = {(name, processes): Row(checkout, "busy", size=size, processes=processes)
                 for name, checkout in checkouts.items() for processes in (1, 2)}
        for _ in range(ROUNDS):
            take_turns(found.values(), "idle", rounds=1, stop=False)
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            take_turns(found.values(), "busy", rounds=1, stop=False)
            other.kill()
            other.wait()
        for (name, processes), row in found.items():
            row.stop()
            idle, beside = row.median("idle"), row.median("busy")
            print(f"{name:8}{processes} process{'es' if processes > 1 else '  '}     {size:4} px{BATCH / idle:10.1f}"
                  f"{BATCH / beside:10.1f}{idle / beside:20.1%}", flush=True)


def take_turns(found, name, *, rounds=ROUNDS, stop=True):
    for _ in range(rounds):
        for row in found:
            row.measure(name)
    if stop:
        for row in found:
            row.stop()


def rendering(checkouts, sizes):
    print(f"{'':24}{'size':>7}{'images/s':>10}{'ratio':>8}")
    for size, kind in itertools.product(sizes, ("frames", "files")):
        found = {name: Row(checkout, "rendering", size=size, kind=kind) for name, checkout in checkouts.items()}
        take_turns(found.values(), "idle")
        first = next(iter(found.values())).median("idle")
        for name, row in found.items():
            seconds = row.median("idle")
            print(f"{name:8}{kind:16}{size:4} px{RENDERED[kind] / seconds:10.1f}{first / seconds:8.2f}", flush=True)


def growth(checkouts, sizes):
    print(f"{'':24}{'size':>7}{'images/s':>10}{'grown':>10}{'ratio':>8}")
    for size, precision in itertools.product((size for size in sizes if size > SMALLEST), ("float32", "bfloat16")):
        found = {(name, grow_from): Row(checkout, "growth", size=size, precision=precision, grow_from=grow_from)
                 for name, checkout in checkouts.items() for grow_from in (None, SMALLEST)}
        take_turns(found.values(), "idle")
        for name in checkouts:
            seconds, grown = (found[name, grow_from].median("idle") for grow_from in (None, SMALLEST))
            print(f"{name:8}{precision:16}{size:4} px{BATCH / seconds:10.1f}{BATCH / grown:10.1f}{seconds / grown:8.3f}",
                  flush=True)


TASKS = {"layer": (layer, train_steps), "growth": (growth, train_steps), "busy": (busy, train_steps),
         "rendering": (rendering, render)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--before", metavar="CHECKOUT", help="of another commit")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    table, work = TASKS[given.task]
    if given.row:
        checkout, settings = given.row
        sys.path.insert(0, checkout)
        work(**settings)
    else:
        table(({"before": given.before} if given.before else {}) | {"now": HERE}, given.sizes)


if __name__ == "__main__":
    main()
