"""Fixtures: small drawn image folders and tiny runs."""
import random
import sys

import pytest
import torch
from helpers import ROOT, TINY

import training
from config import Config
from demo_images import SHAPES, draw_shape


def pytest_configure(config):
    """Warnings of the project's own modules are errors; those of other packages are shown."""
    for path in ROOT.glob("*.py"):
        config.addinivalue_line("filterwarnings", f"error:::{path.stem}")


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
