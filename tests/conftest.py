"""Small drawn image folders and tiny runs, shared by the tests."""
import pathlib
import random

import pytest
import torch
from PIL import Image

import training
from config import Config
from demo_images import SHAPES, draw_shape

TINY = {"image_size": 32, "base_channels": 4, "latent_dim": 8, "batch_size": 4, "device": "cpu", "precision": "float32",
        "log_every": 2, "sample_every": 1_000, "checkpoint_every": 1_000}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and in one thread: its networks are too small for two."""
    monkeypatch.chdir(tmp_path)
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
