"""What README.md tells people to type does what it says."""
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import TINY, draw_film, save_picture
from torch import nn

import config
import evaluate
import generate
import training

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TEXTS = README + "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("speed", "robustness", "experiments"))
TINY_OPTIONS = [part for name, value in TINY.items() for part in ("--" + name.replace("_", "-"), str(value))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS, flags=re.DOTALL)


def test_every_command_is_of_a_kind_that_is_run_here():
    for block in blocks("bash"):
        for line in block.splitlines():
            assert re.match(r"\.venv/bin/python (training|generate|evaluate)\.py |"
                            r"\.venv/bin/python benchmarks/(throughput|experiments|before_after|check_device)\.py |"
                            r"\.venv/bin/torchrun |python3 -m venv \.venv && \.venv/bin/pip install -r ", line), line


def test_training_commands_work(image_folder, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):  # hidden by conftest
        monkeypatch.delitem(sys.modules, name)
    commands = [shlex.split(line)[2:] for block in blocks("bash") for line in block.splitlines()
                if line.startswith(".venv/bin/python training.py")]
    assert commands
    for arguments in commands:
        assert training.main([*arguments, *TINY_OPTIONS, "--steps", "2"]) == 0
    tree = re.search(r"```\nruns/images/\n(.*?)```", README, flags=re.DOTALL)[1]
    assert {path.name for path in pathlib.Path("runs/images").glob("[!.]*")} == set(re.findall(r"(?m)^  ([\w.]+)", tree))


def test_generating_commands_work(train_tiny):
    train_tiny(steps=2)
    os.symlink(ROOT / "pretrained", "pretrained")
    for name in ("photo.jpg", "a.jpg", "b.jpg", "images/shoes/a.jpg", "images/hats/a.jpg"):
        save_picture(name)
    draw_film("film.mp4", (np.full((40, 48, 3), 5 * index, np.uint8) for index in range(12)), sound="aac")
    commands = [shlex.split(line, comments=True)[2:] for block in blocks("bash") for line in block.splitlines()
                if line.startswith(".venv/bin/python generate.py")]
    assert {"--video", "--clip", "--animate", "--morph", "--reconstruct", "--class", "--alpha-maps",
            "--timelapse", "--export"} <= set(sum(commands, []))
    for arguments in commands:
        few = [] if "--grid" in arguments or "--video" in arguments else ["--num-images", "2"]
        assert generate.main([*arguments, *few]) == 0
    assert len(os.listdir("generated")) == 1 + 1 + 2 + 7 + 5 + 1 + 1 + 4 + 2


def test_the_evaluating_command_works(train_tiny, capfd):
    train_tiny(steps=2)
    ((_, _, *arguments),) = (shlex.split(line) for block in blocks("bash") for line in block.splitlines()
                             if line.startswith(".venv/bin/python evaluate.py"))
    assert evaluate.main(arguments) == 0
    assert "sliced_wasserstein_32px" in capfd.readouterr().out


def test_the_command_for_several_processes_works(image_folder):
    (command,) = (shlex.split(line) for block in blocks("bash") for line in block.splitlines() if "torchrun" in line)
    assert command[0] == ".venv/bin/torchrun"
    command[command.index("training.py")] = ROOT / "training.py"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command[1:], *TINY_OPTIONS, "--steps", "2"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 2 steps") == 1
    assert os.listdir("runs/images/checkpoints") == ["step_0000002.pt"]


@pytest.mark.nightly
def test_the_benchmark_prints_its_tables(image_folder):
    (command,) = (shlex.split(line) for block in blocks("bash") for line in block.splitlines() if "throughput" in line)
    done = subprocess.run([sys.executable, ROOT / command[1], "--data", image_folder, "--image-size", "32",
                           "--batch-size", "4"], capture_output=True, text=True, check=True)
    for expected in ("plain loop", "as shipped", "as shipped, --compile on", "GFLOP in convolutions", "1,000,000"):
        assert expected in done.stdout


@pytest.mark.nightly
def test_experiments_append_a_row_for_each_run_once(image_folder):
    (command,) = (shlex.split(line) for block in blocks("bash") for line in block.splitlines() if "experiments" in line)
    end = command.index("--")
    variants = [f"--base-channels 2 --log-every 1 {options}" for options in command[end + 1:]]
    pathlib.Path("table.md").write_text("# Mine\n")
    for seeds in (["0"], ["0", "1"]):
        subprocess.run([sys.executable, ROOT / command[1], *command[2:end], "--data", image_folder, "--image-size", "32",
                        "--steps", "2", "--table", "table.md", "--seeds", *seeds, "--", *variants],
                       check=True, capture_output=True)
    lines = pathlib.Path("table.md").read_text().splitlines()
    assert len(lines) == 2 + 2 + 2 * len(variants)
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert len(set(lines)) == len(lines)


def test_notebook_lines_work():
    os.symlink(ROOT / "pretrained", "pretrained")
    alone, step, tensor = blocks("python")
    decoder = nn.Sequential(nn.Linear(5, 3 * 64 * 64), nn.Sigmoid(), nn.Unflatten(1, (3, 64, 64)))
    namespace = runpy.run_path(_written(alone), init_globals={"torch": torch, "decoder": decoder})
    assert namespace["after"].shape == namespace["images"].shape == (8, 3, 64, 64)
    assert namespace["mu"].shape == (8, 32)
    assert namespace["model"](torch.rand(2, 5)).shape == (2, 3, 64, 64)
    namespace = runpy.run_path(_written(step), init_globals={"real": torch.rand(4, 3, 64, 64)})
    assert all(p.grad is not None and p.grad.isfinite().all() for p in namespace["vae"].parameters())
    images = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    short = tensor.replace("steps=2_000", "steps=2, base_channels=4, batch_size=4")
    assert short != tensor
    run = runpy.run_path(_written(short), init_globals={"images": images})["run"]
    assert len(list(run.glob("checkpoints/*.pt"))) == 1


def _written(code):
    pathlib.Path("cell.py").write_text(code)
    return "cell.py"


def test_files_and_options_that_it_names_exist():
    for name in re.findall(r"`?((?:tests/|benchmarks/)?\w+\.py)`|(docs/\w+\.\w+)", TEXTS):
        assert (ROOT / "".join(name)).exists(), name
    others = {"--nproc-per-node", "--max-restarts", "--seeds", "--before", "--index-url"}  # of torchrun, benchmarks and pip
    options = set(re.findall(r"(--[a-z][a-z-]+)", TEXTS)) - others
    helps = "".join(program.parser().format_help() for program in (config, generate, evaluate))
    known = set(re.findall(r"(--[a-z][a-z-]+)", helps))
    assert options <= known


@pytest.mark.nightly
def test_the_oldest_packages_that_are_allowed_do(tmp_path):
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    lines = "\n".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt"))
    oldest = re.findall(r"(?m)^[a-z-]+>=.*$", lines)
    python = tmp_path / "oldest" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *(line.replace(">=", "==") for line in oldest)], check=True)
    done = subprocess.run([python, "-m", "pytest"], cwd=tmp_path / "clone", check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.nightly
def test_both_set_up_commands_work_in_a_fresh_clone(tmp_path):
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    demo, tests = (block for block in blocks("bash") if "-m venv" in block)
    done = subprocess.run(["bash", "-ec", demo.strip() + " --steps 20"], cwd=tmp_path / "clone", check=True,
                          capture_output=True, text=True)
    assert "done: 20 steps" in done.stdout
    done = subprocess.run(["bash", "-ec", tests], cwd=tmp_path / "clone", check=True, capture_output=True, text=True)
    assert re.search(r"\d+ passed", done.stdout)
