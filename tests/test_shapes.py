"""Runs on rectangles, and on images of one, three and four channels, from the files to the pictures."""
import json
import pathlib

import pytest
import torch
from helpers import TINY, assert_same, frames_in, metrics, newest, read
from PIL import Image

import evaluate
import generate
import training
from checkpointing import load_checkpoint, load_generator
from config import Config
from fast_paths import use_fast_layers
from image_data import load_images

SHAPES = [{"image_size": (32, 48), "channels": 1}, {"image_size": (40, 32), "channels": 4, "resize_mode": "pad"},
          {"image_size": (32, 128), "channels": 3, "resize_mode": "stretch"}]


@pytest.fixture(params=SHAPES, ids=["grey", "transparent", "colours"])
def shape(request):
    return request.param


@pytest.mark.parametrize("settings", [{"augment": True}, {"output_layer": "static"}, {"output_layer": "none"}])
def test_a_run_resumes_exactly_and_is_found_by_the_same_command(train_tiny, shape, settings, capfd):
    settings = settings | shape | {"evaluate_every": 2}
    straight = train_tiny(steps=4, out="straight", sample_every=1, **settings)
    train_tiny(steps=2, **settings)
    resumed = train_tiny(steps=4, **settings)
    assert resumed == pathlib.Path("runs/images")
    assert_same(newest(straight), newest(resumed))
    assert "warning" not in capfd.readouterr().out
    assert metrics(straight) == metrics(resumed)
    with Image.open(straight / "samples" / "step_0000004.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB", 4: "RGBA"}[shape["channels"]]
    other = {"image_size": 32} if shape["channels"] == 1 else {"channels": 1}
    assert train_tiny(**settings | other | {"steps": 1}) == pathlib.Path("runs/images-2")


def test_the_faster_layers_are_used_without_a_word(shape):
    gan = training.GAN(Config(data="x", **TINY | shape), torch.device("cpu"))
    use_fast_layers(gan, report=pytest.fail)
    assert gan.input_gradient
    assert gan.generator.decode_parts(torch.randn(1, 8)).video is None


def test_everything_that_is_made_of_a_generator_has_its_shape(train_tiny, shape, image_folder, capfd):
    run = train_tiny(steps=2, sample_every=1, **shape)
    photo = str(next(image_folder.rglob("*.png")))
    height, width = shape["image_size"]
    kinds = ((["--num-images", "2"], "png"), (["--alpha-maps"], "png"), (["--timelapse"], "webp"),
             (["--clip", "walk", "--grid"], "webp"), (["--clip", "synthetic", "--format", "gif"], "gif"),
             (["--clip", "walk", "--format", "mp4"], "mp4"), (["--animate", photo], "webp"),
             (["--morph", photo, photo], "webp"))
    for arguments, ending in kinds:
        out = pathlib.Path("out", arguments[0][2:] + ending)
        assert generate.main([str(run), "--out", str(out), "--frames", "3", *arguments]) == 0
        path = next(out.glob(f"*.{ending}"))
        if "--grid" in arguments or arguments[0] in ("--timelapse", "--alpha-maps"):
            continue
        assert (frames_in(path)[0] if ending == "mp4" else read(path)).shape[1:] == (height, width)
    assert evaluate.main([str(run), "--data", str(image_folder), "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["image_size"] == [height, width]
    assert f"sliced_wasserstein_{min(height, width)}px" in found


def test_a_generator_prepares_photos_as_its_images_were(train_tiny, image_folder):
    run = train_tiny(steps=1, image_size=(32, 48), channels=4, resize_mode="pad")
    generate.main([str(run), "--export", "generator.pt"])
    for source in (run, "generator.pt"):
        assert load_generator(source).preparation == {"channels": 4, "resize_mode": "pad", "levels": {}}
    data = load_images(image_folder, (32, 48), cache_dir="cache", channels=4, resize_mode="pad")
    assert newest(run)["image_set"] == load_checkpoint("generator.pt")["image_set"] == data.digest
    assert data.images[:, 3, 0, 0].max() == 0  # the sides that were added
    changed = load_images(image_folder, (32, 48), cache_dir="cache", channels=4)
    assert changed.digest != data.digest


def test_an_image_set_in_memory_keeps_how_it_was_prepared(image_folder):
    data = load_images(image_folder, (32, 48), cache_dir="cache", channels=1, resize_mode="pad")
    run = training.train(Config(**{"data": "mine", "steps": 1, **TINY}), data=data)
    assert load_generator(run).preparation == {"channels": 1, "resize_mode": "pad", "levels": {}}


@pytest.mark.parametrize("size", [[40, 32], "40x32", None, "no size", 33])
def test_a_run_is_found_whose_settings_were_edited_by_hand(train_tiny, size):
    run = train_tiny(steps=1, image_size=(40, 32))
    config = json.loads((run / "config.json").read_text())
    del config["image_height"], config["image_width"]
    (run / "config.json").write_text(json.dumps(config | ({"image_size": size} if size else {})))
    assert train_tiny(steps=2, image_size=(40, 32)) == run
    assert newest(run)["step"] == 2


def test_files_hold_a_size_as_two_numbers(train_tiny):
    run = train_tiny(steps=1, image_size=(32, 48))
    config = json.loads((run / "config.json").read_text())
    saved = torch.load(next(run.glob("checkpoints/*.pt")), weights_only=True)
    for held in (config, saved["config"], saved["model_arguments"]):
        assert (held["image_height"], held["image_width"]) == (32, 48)
        assert "image_size" not in held


def test_other_images_of_the_same_number_are_reported(train_tiny, image_folder, capfd):
    train_tiny(steps=1)
    path = next(image_folder.rglob("*.png"))
    Image.new("RGB", (64, 64), "red").save(path)
    train_tiny(steps=2)
    assert "warning: the images are not those that the run had before" in capfd.readouterr().out


@pytest.mark.parametrize(("shape", "said"), [
    ((5, 1, 32, 40), None), ((5, 4, 48, 32), None), ((5, 3, 32, 32), "every image is grey"),
    ((5, 4, 32, 64), "no image has transparency")])
def test_images_in_memory_of_any_shape_are_trained_on_and_found_again(shape, said, capfd):
    images = torch.randint(256, shape, dtype=torch.uint8)
    if said:
        images[:, :3], images[:, 3:] = images[:, :1], 255
    for steps in (1, 2):
        config = Config(**{"data": "mine", "steps": steps, **TINY})
        assert training.train(config, data=images) == pathlib.Path("runs/mine")
    assert load_generator("runs/mine").image_shape == shape[1:]
    notes = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note")]
    assert len(notes) == (2 if said else 0)
    assert all(said in line for line in notes)


# What the version before wrote: tests/files holds a run of three steps, its end after five, and an exported generator.


FILES = pathlib.Path(__file__).with_name("files")
OLD = {"image_size": 32, "base_channels": 1, "latent_dim": 4, "num_frames": 2, "alpha_grid": 2, "batch_size": 4,
       "device": "cpu", "precision": "float32", "log_every": 2, "sample_every": 1_000, "checkpoint_every": 1_000, "steps": 5}


def old_images():
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    drawn = [torch.stack([x * i % 256, y * i % 256, (x + y + 20 * i) % 256]) for i in range(6)]
    return torch.stack(drawn).to(torch.uint8)


def copy_old_run(to, *, data=None):
    """Copies the run as it was after its third step; `data` replaces the name of its images."""
    (to / "checkpoints").mkdir(parents=True)
    config = json.loads((FILES / "run" / "config.json").read_text())
    state = torch.load(FILES / "run" / "checkpoints" / "step_0000003.pt", weights_only=True)
    for settings in (config, state["config"]):
        settings["data"] = data or settings["data"]
    (to / "config.json").write_text(json.dumps(config))
    torch.save(state, to / "checkpoints" / "step_0000003.pt")


def test_an_older_run_is_found_by_the_same_command_and_goes_on_as_it_would_have(capfd):
    copy_old_run(pathlib.Path("runs/mine"))
    assert training.train(Config(data="mine", **OLD), data=old_images()) == pathlib.Path("runs/mine")
    said = capfd.readouterr().out
    assert "steps 3 to 5" in said
    assert "warning" not in said
    found, expected = newest(pathlib.Path("runs/mine")), load_checkpoint(FILES / "run" / "checkpoints" / "step_0000005.pt")
    for network in ("generator", "averaged", "critic"):
        for name, value in expected[network].items():
            torch.testing.assert_close(found[network][name], value, rtol=1e-4, atol=1e-5)  # processors round differently


def test_an_older_run_of_a_folder_is_found_by_the_same_command(capfd):
    for index, image in enumerate(old_images()):
        pathlib.Path("pictures").mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"pictures/{index}.png")
    copy_old_run(pathlib.Path("runs/pictures"), data=str(pathlib.Path("pictures").resolve()))
    assert training.train(Config(data="pictures", **OLD)) == pathlib.Path("runs/pictures")
    assert newest(pathlib.Path("runs/pictures"))["step"] == 5
    assert "warning" not in capfd.readouterr().out
    found = newest(pathlib.Path("runs/pictures"))["averaged"]
    for name, value in load_checkpoint(FILES / "run" / "checkpoints" / "step_0000005.pt")["averaged"].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "warned"), [("uint16", False), ("float32", True)])
def test_an_older_run_keeps_the_scale_it_had_or_says_that_it_has_changed(capfd, dtype, warned):
    pathlib.Path("deep").mkdir()
    for index, image in enumerate(old_images()):
        Image.fromarray((4 * image[2]).numpy().astype(dtype)).save(f"deep/{index}.{'png' if dtype == 'uint16' else 'tiff'}")
    copy_old_run(pathlib.Path("runs/deep"), data=str(pathlib.Path("deep").resolve()))
    training.train(Config(data="deep", **OLD))
    assert ("warning: the images are not those" in capfd.readouterr().out) == warned
    if not warned:
        assert load_generator("runs/deep").preparation["levels"] == {"integer": (0, 65535)}


def test_an_older_exported_generator_draws(capfd):
    vae = load_generator(FILES / "generator.pt")
    assert vae.preparation == {"channels": 3, "resize_mode": "crop", "levels": {"integer": (0, 65535)}}
    assert generate.main([str(FILES / "generator.pt"), "--grid"]) == 0
