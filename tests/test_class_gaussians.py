import os
import pathlib

import pytest
import torch
from helpers import MODEL, STATE, read, save_picture

import generate
from checkpointing import load_generator, save_checkpoint
from class_gaussians import class_gaussians, find_class
from image_data import ImageSet
from image_files import DataError
from model_definitions import VAE
from randomness import latent_noise


class Channels(torch.nn.Module):
    """An encoder whose mu is the mean of each channel, and whose sigma is a tenth of that."""

    def __init__(self):
        super().__init__()
        self.mu = torch.nn.Linear(3, 3)

    def encode(self, images):
        mu = images.mean(dim=(2, 3))
        return mu, 2 * (mu / 10).log()


def coloured(counts, *, seed=0):
    """An ImageSet with a class for each of red, green and blue, of so many images."""
    generator, images, classes = torch.Generator().manual_seed(seed), [], []
    for channel, (name, count) in enumerate(counts.items()):
        for _ in range(count):
            image = torch.randint(20, 60, (3, 1, 1), generator=generator).expand(3, 8, 8).clone()
            image[channel] += 150
            images.append(image)
            classes.append(name)
    return ImageSet(torch.stack(images).byte(), pathlib.Path("set"), {}, {}, classes=tuple(classes))


def test_what_is_drawn_has_the_mean_and_the_spread_of_its_class():
    data = coloured({"red": 2_000, "green": 2_000, "blue": 2_000})
    lines = []
    for gaussian in class_gaussians(Channels(), data, ["blue", "red"], report=lines.append):
        rows = torch.tensor([name == gaussian.name for name in data.classes])
        mu = data.images[rows].double().mean(dim=(2, 3)) / 255
        covariance = torch.cov(mu.T) + (mu / 10).square().mean(dim=0).diag()
        z = gaussian.draw(torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1)))
        assert z.dtype == torch.float32
        assert torch.allclose(z.double().mean(dim=0), mu.mean(dim=0), atol=1e-3)
        assert torch.allclose(torch.cov(z.double().T), covariance, rtol=0.05, atol=2e-5)
    assert lines == ["the Gaussians find the class of 100% of 1200 images held back; by chance it would be 33%"]


def test_a_class_of_one_image_has_the_spread_of_all():
    data = coloured({"red": 500, "green": 500, "blue": 1})
    blue, _, red = class_gaussians(Channels(), data, ["all"], report=lambda line: None)  # sorted by name
    assert torch.allclose(blue.mean, data.images[-1].double().mean(dim=(1, 2)) / 255)
    z = blue.draw(torch.randn(1_000, 3)).double()
    assert z.isfinite().all()
    assert 0.3 < torch.cov(z.T).trace() / (red.root @ red.root.T).trace() < 3


def test_classes_that_the_encoder_does_not_tell_apart_are_named():
    data = coloured({"red": 100, "green": 100, "blue": 100})
    mixed = data._replace(classes=tuple("red" if name == "red" else ("green", "blue")[index % 2]
                                        for index, name in enumerate(data.classes)))
    lines = []
    class_gaussians(Channels(), mixed, ["red"], report=lines.append)
    assert len(lines) == 2
    assert lines[1].startswith("warning: they do not know ")
    assert "red" not in lines[1]
    few = coloured({"red": 2, "green": 2})
    class_gaussians(Channels(), few, ["red"], report=lines.append)
    assert lines[2].startswith("note: with fewer than 5 images in each class it cannot be tried")


@pytest.mark.parametrize(("asked", "found"), [
    ("shoes", "shoes"), ("Shoes", "Shoes"), ("shoes ", "shoes "), ("HATS", "hats"), ("Cafe\u0301", "Caf\u00e9"),
    ("CAFÉ", "Café"), ("ШАПКА", "шапка"), ("007", "007"), ("7", "7")])
def test_a_class_is_found_by_its_name(asked, found):
    names = sorted(["shoes", "Shoes", "shoes ", "hats", "Caf\u00e9", "шапка", "7", "007"])
    assert names[find_class(asked, names)] == found


@pytest.mark.parametrize(("asked", "said"), [
    ("CAFÉ", r"--class: 'CAFÉ' may be 'Caf\xe9' or 'Cafe\u0301'"),
    ("SHOES", "--class: 'SHOES' may be 'Shoes' or 'shoes'"),
    ("shirt", "--class: there is no class 'shirt'; there are 'skirt'"),
    ("0", "--class: there is no class '0'; there are '7'")])
def test_a_name_that_does_not_fit_one_class_is_refused_with_the_nearest(asked, said):
    with pytest.raises(DataError) as error:
        find_class(asked, ["7", "Caf\u00e9", "Cafe\u0301", "Shoes", "shoes", "skirt"])
    assert str(error.value).startswith(said)


def test_long_lists_of_classes_are_cut():
    with pytest.raises(DataError, match="'000', .*, '019', and 980 more$"):
        find_class("x", [f"{number:03d}" for number in range(1_000)])


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    vae = VAE(**MODEL).requires_grad_(False)
    vae.mu.weight *= 20
    vae.decoder[0].weight *= 4
    for index in range(12):
        for name, colour in (("dark", (20 + index, 10, 10)), ("light", (200, 220 + index, 230))):
            save_picture(tmp_path / "set" / name / f"{index}.png", color=colour)
    return save_checkpoint(tmp_path / "saved", 1, STATE | {"averaged": vae.state_dict()}, keep=1)


def drawn():
    return sorted(os.listdir("generated"))


def test_images_of_a_class_and_of_several(trained, capfd):
    assert generate.main([str(trained), "--class", "light", "--data", "set", "--num-images", "2"]) == 0
    assert drawn() == ["class001-seed0-00000.png", "class001-seed0-00001.png"]
    assert "images held back; by chance it would be 50%" in capfd.readouterr().out
    assert generate.main([str(trained), "--class", "dark", "light", "--data", "set", "--num-images", "3"]) == 0
    rows = read(pathlib.Path("generated/classes-seed0-grid.png"))
    assert rows.shape == (3, 2 * 34 + 2, 3 * 34 + 2)
    # Row 1, column 1 is noise 1 of the class "light".
    assert (rows[:, 36:68, 36:68] - read(pathlib.Path("generated/class001-seed0-00001.png"))).abs().max() < 0.01
    vae = load_generator(trained)
    assert not torch.allclose(rows[:, 36:68, 36:68], vae.decode(latent_noise(0, [1], MODEL["latent_dim"]))[0], atol=0.05)


def test_films_and_clips_of_classes(trained):
    assert generate.main([str(trained), "--class", "all", "--data", "set", "--video", "1", "--fps", "8"]) == 0
    assert generate.main([str(trained), "--class", "dark", "--data", "set", "--clip", "walk", "--num-images", "1"]) == 0
    assert generate.main([str(trained), "--class", "dark", "--data", "set", "--alpha-maps", "--num-images", "1"]) == 0
    assert drawn() == ["class000-seed0-00000-walk.webp", "class000-seed0-alpha.png", "classes-seed0-film.webp"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--class", "light"], "has learned no classes (training.py --class-conditional), so it needs --data DIR"),
    (["--data", "set"], "--data: is for --class NAME"),
    (["--class", "light", "--data", "set/light"], "set/light has no class folders"),
    (["--class", "light", "--data", "one"], "one has one class"),
    (["--class", "lite", "--data", "set"], "--class: there is no class 'lite'; there are 'light'"),
    (["--class", "light", "--data", "set", "--animate", "a.png"], "--class: does not go with --animate"),
    (["--class", "light", "--data", "set", "--video", "1", "--keyframes", "a.png"], "--class: does not go with --keyframes"),
    (["--class", "light", "--data", "nowhere"], "nowhere is missing, a folder of images or a film is needed"),
])
def test_what_cannot_be_had_is_said_in_one_line(trained, capfd, arguments, said):
    save_picture("one/cats/a.png")
    try:
        status = generate.main([str(trained), *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    assert not pathlib.Path("generated").exists()
