"""Trains variants of the recipe and appends a row for each to a table; what has its row is not run again.

    python benchmarks/experiments.py --data ./images --image-size 64 --steps 3000 --seeds 0 1 2 -- "" "--output-layer none"

A variant is a text of options of training.py, "" its defaults; all stand behind "--". The figures are those of evaluate.py.
Interrupted, the same command goes on with the run it was at.
"""
import argparse
import json
import pathlib
import shlex
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import training  # noqa: E402
from checkpointing import load_generator  # noqa: E402

COLUMNS = ("images", "size", "options", "seed", "steps", "images/s", "alpha", "SWD fine", "SWD middle", "SWD coarse",
           "diversity", "nearest", "reconstruction")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", metavar="OPTIONS")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--image-size", default="64")
    parser.add_argument("--steps", default="3000")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "experiments.md")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/experiments"))
    options = parser.parse_args()
    if not options.table.exists() or row(COLUMNS) not in options.table.read_text():
        append(options.table, "", row(COLUMNS), row("---" for _ in COLUMNS))
    for seed in options.seeds:
        for variant in options.variants:
            key = (pathlib.Path(options.data).name, options.image_size, variant, seed, options.steps)
            if row(key) not in options.table.read_text():  # as the beginning of a row
                add_row(options, variant, seed, key)


def add_row(options, variant, seed, key):
    run = options.runs / " ".join(key)
    status = training.main([
        "--data", options.data, "--image-size", options.image_size, "--steps", options.steps, "--seed", seed,
        "--out", str(run), *shlex.split(variant)])
    if status:
        sys.exit(status)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    vae = load_generator(run)
    vae.detail = 1.0  # what is compared are the weights, and older rows are from before it was chosen
    found = evaluate.evaluate(vae, evaluate.Options(data=options.data))
    distances = [value for name, value in found.items() if name.startswith("sliced_wasserstein") and "real" not in name]
    figures = (statistics.median(line["images_per_second"] for line in log), log[-1].get("alpha", ""), distances[0],
               distances[len(distances) // 2], distances[-1], found["diversity"], found["nearest_training_image"],
               found["reconstruction_error"])
    append(options.table, row(key) + row(f"{value:.3g}" if value else "" for value in figures)[1:])


def append(table, *lines):
    with table.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def row(cells):
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
