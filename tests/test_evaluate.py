import itertools
import json
import pathlib
import random
import sys

import pytest
import torch
from helpers import MODEL, STATE, Payload, save_picture
from torch.utils.data import DataLoader

import evaluate
from checkpointing import load_generator, save_checkpoint
from demo_images import SHAPES, draw_shape
from evaluate import Options
from image_data import load_images
from image_files import decode_image
from image_metrics import alarms
from model_definitions import VAE


@pytest.fixture
def data():
    folder = pathlib.Path("data")
    folder.mkdir()
    for index in range(24):
        draw_shape(SHAPES[index % 6], random.Random(index)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "saved", 1, STATE | {"averaged": VAE(**MODEL).state_dict()}, keep=1)


class Playback(torch.nn.Module):
    """Stands for a VAE that generates the given images, in turn."""

    image_shape, latent_dim = (3, 32, 32), 8

    def __init__(self, images):
        super().__init__()
        self.images, self.position = images, 0
        self.mu = torch.nn.Linear(1, 1)

    def decode(self, z):
        self.position += len(z)
        return self.images[self.position - len(z):self.position]

    def encode(self, images):
        return torch.zeros(len(images), 8), None


def figures(images, data, **settings):
    return evaluate.evaluate(Playback(images), Options(data=str(data), num_images=24, **settings))


def test_one_image_repeated_is_a_collapse_and_the_training_set_itself_is_copying(data):
    training = load_images(data, 32, cache_dir="cache").images / 255
    new = torch.stack([decode_image(path, 32) for path in draw_new()]) / 255
    again = torch.zeros(24, 3, 32, 32)  # reconstructions come after the generated images
    honest, copied, collapsed = (figures(torch.cat([images, again]), data)
                                 for images in (new, training, new[:1].expand(24, -1, -1, -1)))
    assert alarms(honest) == []
    assert [line.split(":")[0] for line in alarms(copied)] == ["copying"]
    assert [line.split(":")[0] for line in alarms(collapsed)] == ["collapse"]
    assert copied["nearest_training_image"] < 0.1 * honest["nearest_training_image"]
    assert copied["sliced_wasserstein_16px"] < honest["sliced_wasserstein_16px"]


def draw_new():
    for index in range(24):
        path = pathlib.Path(f"new-{index}.png")
        draw_shape(SHAPES[index % 6], random.Random(f"new {index}")).save(path)
        yield path


def test_the_table_and_the_json_hold_the_same_figures(checkpoint, data, capfd):
    assert evaluate.main([str(checkpoint), "--data", str(data), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["num_images"] == 24
    assert set(found) == {"num_images", "image_size", "diversity", "diversity_real", "nearest_training_image",
                          "nearest_training_image_real", "reconstruction_error",
                          *(f"sliced_wasserstein_{side}px{end}" for side in (32, 16) for end in ("", "_real"))}
    assert evaluate.main([str(checkpoint), "--data", str(data)]) == 0
    table = capfd.readouterr().out
    assert f"{found['sliced_wasserstein_32px']:.3g}" in table
    assert found == evaluate.evaluate(load_generator(checkpoint), Options(data=str(data)))


def test_held_out_images_take_the_place_of_training_images(checkpoint, data):
    for index in range(6):
        save_picture(f"held/{index}.png", color=(10 * index, 250, 0))
    vae = load_generator(checkpoint)
    one, other = (evaluate.evaluate(vae, Options(data=str(data), held_out=held)) for held in (None, "held"))
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"nearest_training_image_real", "reconstruction_error"}


def test_inception_adds_its_figures_of_the_generated_images(data, monkeypatch):
    fake = torch.rand(24, 3, 32, 32)
    monkeypatch.setattr(evaluate.image_metrics, "inception_distances", lambda real, generated, device: {
        "frechet_inception_distance": (next(iter(DataLoader(generated, 24))) / 255 - fake).abs().max().item(),
        "images": len(real)})
    found = figures(torch.cat([fake, fake, fake]), data, inception=True)
    assert (found["frechet_inception_distance"] < 1 / 255, found["images"]) == (True, 24)


def test_inception_is_asked_for_in_one_line_where_it_is_missing(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="^--inception: needs the package torch-fidelity: pip install torch-fidelity$"):
        figures(torch.rand(48, 3, 32, 32), data, inception=True)


def test_a_perfect_generator_has_the_distances_of_real_images(data):
    images = load_images(data, 32, cache_dir="cache").images / 255
    metrics = figures(torch.cat([images, images]), data)
    sizes = [name for name in metrics if name.startswith("sliced_wasserstein") and not name.endswith("_real")]
    assert len(sizes) == 2
    for name in sizes:
        assert metrics[name] == pytest.approx(metrics[f"{name}_real"], rel=1e-4)


class ByClass(Playback):
    """Stands for a VAE that has learned classes and generates the given images of each, in turn."""

    class_counts = torch.tensor([12, 12, 5])

    def __init__(self, images):
        super().__init__(None)
        self.of_class, self.class_names = [itertools.cycle(part) for part in images.values()], list(images)

    def class_latents(self, y):
        return 100.0 * (y + 1)[:, None]

    def decode(self, z):
        if z[0, 0] == 0:  # a reconstruction
            return torch.zeros(len(z), 3, 32, 32)
        return torch.stack([next(self.of_class[label]) for label in ((z.mean(dim=1) + 50) / 100 - 1).long().tolist()])


def test_within_each_class_collapse_and_copies_are_seen_and_classes_go_by_their_names(data, monkeypatch, capfd):
    paths = sorted(data.glob("*.png"))
    for number, path in enumerate(paths):
        kind = "extra" if number == 0 else ("square", "circle")[number % 2]
        (data / kind).mkdir(exist_ok=True)
        path.rename(data / kind / path.name)
    new = torch.stack([decode_image(path, 32) for path in draw_new()]) / 255
    of_square = torch.stack([decode_image(path, 32) for path in sorted((data / "square").iterdir())]) / 255
    images, options = {"circle": new[:1], "gone": new, "square": of_square}, {"data": str(data), "num_images": 24}
    monkeypatch.setattr(evaluate, "CLASS_WITH_PATCHES", 12)
    found = evaluate.evaluate(ByClass(images), Options(**options))
    assert capfd.readouterr().err.splitlines()[-1] == "note: the generator has no class 'extra'"
    assert {name: within["num_images"] for name, within in found["classes"].items()} == {"circle": 12, "square": 11}
    assert [line[:line.index(" are ")] for line in alarms(found) if "class" in line] == [
        "collapse: generated images of class 'circle'", "copying: generated images of class 'square'"]
    rows = [line for line in evaluate.table(found).splitlines() if line.split()[0:1] in (["circle"], ["square"])]
    assert [row.split()[:2] for row in rows] == [["circle", "12"]]  # square has too few
    assert "sliced_wasserstein_32px" in found["classes"]["circle"]
    save_picture("held/circle/a.png", color=(10, 250, 0))
    held = evaluate.evaluate(ByClass(images), Options(**options, held_out="held"))["classes"]
    assert held["square"] == found["classes"]["square"]
    assert {name for name, value in held["circle"].items() if value != found["classes"]["circle"][name]} == {
        "nearest_training_image_real"}


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere", "--data", "data"], "nowhere: no such file"),
    (["code.pt", "--data", "data"], "code.pt: not a checkpoint, or a damaged one"),
    (["saved/step_0000001.pt", "--data", "none"], "none is missing, a folder of images or a film is needed"),
    (["saved/step_0000001.pt", "--data", "data", "--held-out", "none"], "none is missing"),
    (["saved/step_0000001.pt", "--data", "few"], "few: at least 4 images are needed, it has 3"),
    (["huge/step_0000001.pt", "--data", "data"], "the generated images are not finite"),
    (["saved/step_0000001.pt"], "--data: name the folder of images"),
    (["saved/step_0000001.pt", "--data", "data", "--num-images", "3"], "--num-images: must be at least 4, got 3"),
])
def test_what_cannot_be_evaluated_is_said_in_one_line(checkpoint, data, capfd, arguments, said):
    torch.save({"format": 2, "x": Payload()}, "code.pt")
    for index in range(3):
        save_picture(f"few/{index}.png")
    weights = {name: 1e30 * tensor for name, tensor in load_generator(checkpoint).state_dict().items()}
    save_checkpoint("huge", 1, STATE | {"averaged": weights}, keep=1)
    try:
        status = evaluate.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
