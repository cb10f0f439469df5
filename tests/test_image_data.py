import csv
import math
import os
import pathlib
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from helpers import draw_film, forking, save_picture, tiny_arguments
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import image_data
import training
from image_data import as_float_images, batch_indices, find_images, load_images, passed_over_text
from image_files import DataError, decode_image, read_picture

MESSY = next(pathlib.Path(__file__).resolve().parents[2].glob("*/data/messy"), None)


def names(folder):
    return [path.relative_to(folder.resolve()).as_posix() for path in find_images(folder)]


def test_flat_nested_and_class_folders_are_all_found_and_junk_is_not(tmp_path):
    pictures = ["a.png", "cats/b.JPG", "cats/deep/c d.jpeg", "dogs/ü.webp"]
    for name in (*pictures, ".cache/x.png", "__MACOSX/y.png", "cats/._b.JPG"):
        save_picture(tmp_path / "set" / name)
    (tmp_path / "set" / "empty").mkdir()
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    assert names(tmp_path / "set") == pictures


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("x"), lambda p: p.mkdir(),
                                  *(lambda p, name=name: save_picture(p / name / "a.png")
                                    for name in (".hidden", "__MACOSX", "@eaDir")),
                                  lambda p: save_picture(p / "a.png").rename(p / "._a.png")])
def test_a_folder_without_images_is_refused_with_the_tree_that_would_do(tmp_path, make):
    make(tmp_path / "set")
    with pytest.raises(DataError, match=r"Put images below it.*set/a\.jpg"):
        find_images(tmp_path / "set")


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path):
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    assert (decode_image(tmp_path / "wide.png", 32)[:, :, 1:-1].float().mean(dim=(1, 2)).round().tolist()) == [0, 0, 255]


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (9, 9), (0, 128)).save(tmp_path / "half.png")
    assert (decode_image(tmp_path / "clear.png", 32) == 255).all()
    assert (decode_image(tmp_path / "half.png", 32) == 127).all()
    for mode, color in (("P", 0), ("L", 0), ("RGB", (0, 0, 0))):
        Image.new(mode, (9, 9), color).save(tmp_path / f"{mode}.png", transparency=color)
        assert (decode_image(tmp_path / f"{mode}.png", 32) == 255).all()


@pytest.mark.parametrize(("mode", "top", "suffix"), [("I;16", 65535, "png"), ("F", 1.0, "tiff"), ("F", 65535.0, "tiff"),
                                                    ("I", 65535, "tiff")])
def test_a_ramp_of_more_than_8_bit_stays_a_ramp(tmp_path, mode, top, suffix):
    ramp = Image.new(mode, (64, 64))
    ramp.putdata([top * x / 63 if mode == "F" else int(top * x / 63) for _ in range(64) for x in range(64)])
    ramp.save(tmp_path / f"ramp.{suffix}")
    row = decode_image(tmp_path / f"ramp.{suffix}", 64)[0, 32].float()
    assert torch.allclose(row, torch.linspace(0, 255, 64), atol=2)


@pytest.mark.parametrize(("value", "peak", "expected"), [(0.5, 1.2, 128), (1.02, 1.02, 255), (128.0, 256.0, 128)])
def test_float_pictures_that_overshoot_white_are_not_darkened(tmp_path, value, peak, expected):
    image = Image.new("F", (32, 32), value)
    image.putpixel((0, 0), peak)
    image.save(tmp_path / "x.tiff")
    assert decode_image(tmp_path / "x.tiff", 32)[0, 16, 16].item() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = Image.new("RGB", (64, 64), "black")
    upright.paste("white", (0, 0, 64, 16))
    upright.paste("grey", (0, 16, 16, 64))
    stored = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_270}.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright.transpose(stored) if stored is not None else upright).save(tmp_path / f"x.{suffix}", exif=exif, quality=100)
    decoded = decode_image(tmp_path / f"x.{suffix}", 64)
    assert (decoded.float() - pil_to_tensor(upright)).abs().mean() < 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LAB"])
def test_every_mode_gives_three_channels(tmp_path, mode):
    Image.new("RGB", (20, 40), "white").convert(mode).save(tmp_path / "x.tiff")
    decoded = decode_image(tmp_path / "x.tiff", 32)
    assert decoded.shape == (3, 32, 32)
    assert decoded.dtype == torch.uint8
    assert decoded.min() > 250


def test_only_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for name in ("x.gif", "x.webp", "x.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert decode_image(tmp_path / name, 32)[:, 5, 5].tolist() == pytest.approx([255, 0, 0], abs=5)
    frames[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])  # as telephones write them
    assert decode_image(tmp_path / "x.jpg", 32)[:, 5, 5].tolist() == pytest.approx([255, 0, 0], abs=5)


def break_files(folder):
    whole = save_picture(folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.png").write_text("<html>not found</html>")
    (folder / "drawing.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("RGB", (8, 8)).save(folder / "paint.png", format="PCX")  # Pillow could read it; only common formats are
    (folder / "link.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")  # whoever opened it would wait for ever
    return ["cut.png", "drawing.png", "empty.jpg", "link.png", "page.png", "paint.png", "pipe.png"]


def test_broken_files_are_all_named_with_the_reason(tmp_path):
    broken = break_files(tmp_path / "set")
    with pytest.raises(DataError) as caught:
        load_images(tmp_path / "set", 32, cache_dir=tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 of 8 images in")
    assert lines[0].endswith("repair or remove them, or go on without them (--skip-bad):")
    assert [line.split(":")[0].strip() for line in lines[1:]] == broken
    assert "image file" in lines[1]
    assert [line.split(": ")[1] for line in lines[2:]] == [
        "a PostScript document, which is not read here", "cannot identify image file", "a broken link",
        "a web page, which is not read here", "cannot identify image file", "not a file"]


def test_broken_files_can_be_skipped_and_are_tried_again_where_they_are_not(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    broken = break_files(folder)
    Image.new("RGB", (40, 40), "white").save(folder / "a.png")
    data = load_images(folder, 32, cache_dir=tmp_path / "cache", skip_bad=True)
    assert sorted(data.skipped) == broken
    assert data.class_counts == {"": 2}
    assert data.images.shape == (2, 3, 32, 32)
    assert data.images.amax(dim=(1, 2, 3)).tolist() == [255, 0]  # a.png, whole.png
    with monkeypatch.context() as patched:
        patched.setattr(image_data, "read_picture", None)
        again = load_images(folder, 32, cache_dir=tmp_path / "cache", skip_bad=True)
    assert torch.equal(again.images, data.images)
    assert again.skipped == data.skipped
    monkeypatch.setattr(image_data, "read_picture", lambda _, *how, **too: read_picture(folder / "whole.png", *how, **too))
    assert len(load_images(folder, 32, cache_dir=tmp_path / "cache").images) == 9


def test_a_folder_of_broken_files_alone_is_refused_also_where_they_may_be_skipped(tmp_path):
    break_files(tmp_path / "set")
    (tmp_path / "set" / "whole.png").unlink()
    for _ in range(2):  # decoding, and from what is left of it
        with pytest.raises(DataError, match="7 of 7 images in .*; repair or remove them:"):
            load_images(tmp_path / "set", 32, cache_dir=tmp_path / "cache", skip_bad=True)


def test_a_folder_reached_in_two_ways_counts_once(tmp_path):
    save_picture(tmp_path / "set" / "cats" / "a.png")
    save_picture(tmp_path / "elsewhere" / "b.png")
    for name in ("round", "and round"):  # 2**40 ways
        (tmp_path / "set" / "cats" / name).symlink_to(tmp_path / "set")
    (tmp_path / "set" / "dogs").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "set") == ["cats/a.png", "dogs/b.png"]


def test_a_folder_that_cannot_be_entered_is_named_and_can_be_passed_over(image_folder, monkeypatch):
    walk = os.walk

    def closed(folder, onerror, **settings):
        onerror(PermissionError(13, "Permission denied", f"{folder}/cats"))
        return walk(folder, onerror=onerror, **settings)

    monkeypatch.setattr(os, "walk", closed)
    for load in (find_images, lambda folder: load_images(folder, 32, cache_dir="cache")):
        with pytest.raises(DataError, match="1 of 11 images in .*(--skip-bad).*\n  cats: .*: Permission denied"):
            load(image_folder)
    data = load_images(image_folder, 32, cache_dir="cache", skip_bad=True)
    assert (len(data.images), data.skipped) == (10, {"cats": "cannot be entered: Permission denied"})


@pytest.mark.parametrize("text", ["null", "[" * 100_000, "{", "5"])
def test_a_cache_whose_list_is_damaged_is_built_again(image_folder, tmp_path, text):
    first = load_images(image_folder, 32, cache_dir=tmp_path / "cache").images.clone()
    (sidecar,) = (tmp_path / "cache").glob("*.json")
    sidecar.write_text(text)
    assert torch.equal(load_images(image_folder, 32, cache_dir=tmp_path / "cache").images, first)


def test_names_that_are_not_utf_8_work_for_files_and_folders(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    save_picture(folder / os.fsdecode(b"\xe9.png"))
    assert len(load_images(folder, 32, cache_dir=folder / "cache").images) == 1


def test_a_cache_that_has_been_cut_is_built_again(image_folder, tmp_path):
    first = load_images(image_folder, 32, cache_dir=tmp_path / "cache").images.clone()
    (cache,) = (tmp_path / "cache").glob("*.uint8")
    os.truncate(cache, 5_000)
    assert torch.equal(load_images(image_folder, 32, cache_dir=tmp_path / "cache").images, first)


def test_other_files_in_the_folder_of_the_cache_are_left_alone(image_folder, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".mine.tmp").touch()
    load_images(image_folder, 32, cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache" / ".mine.tmp").exists()


def test_a_folder_with_the_longest_name_there_is_can_be_cached(tmp_path):
    save_picture(tmp_path / ("ü" * 127) / "a.png")
    assert len(load_images(tmp_path / ("ü" * 127), 32, cache_dir=tmp_path / "cache").images) == 1


def test_images_are_decoded_once_and_then_read_from_the_cache(image_folder, tmp_path, monkeypatch):
    first = load_images(image_folder, 32, cache_dir=tmp_path / "cache")
    assert first.images.shape == (10, 3, 32, 32)
    assert sum(first.class_counts.values()) == 10
    for image, path in zip(first.images, find_images(image_folder), strict=True):
        assert torch.equal(image, decode_image(path, 32))
    monkeypatch.setattr(image_data, "read_picture", None)
    assert torch.equal(load_images(image_folder, 32, cache_dir=tmp_path / "cache").images, first.images)


def test_a_changed_folder_or_size_is_decoded_again(image_folder, tmp_path):
    load_images(image_folder, 32, cache_dir=tmp_path / "cache")
    changed = find_images(image_folder)[3]
    Image.new("RGB", (50, 50), "white").save(changed)
    os.utime(changed, ns=(1, 1))
    assert (load_images(image_folder, 32, cache_dir=tmp_path / "cache").images[3] == 255).all()
    assert load_images(image_folder, 64, cache_dir=tmp_path / "cache").images.shape == (10, 3, 64, 64)
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 3


def test_runs_that_start_together_do_not_spoil_the_cache(image_folder, tmp_path):
    with ProcessPoolExecutor(3, mp_context=forking()) as pool:
        sums = list(pool.map(_load_sum, [(image_folder, tmp_path / "cache")] * 3))
    assert len(set(sums)) == 1
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 1


def _load_sum(arguments):
    return load_images(arguments[0], 32, cache_dir=arguments[1]).images.sum().item()


def test_a_cache_folder_that_cannot_be_made_is_named_by_its_option(image_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="--cache-dir: .*file"):
        load_images(image_folder, 32, cache_dir=tmp_path / "file" / "cache")


def test_what_is_not_begun_when_decoding_is_stopped_is_left_undone(tmp_path, monkeypatch):
    for index in range(40):
        save_picture(tmp_path / "set" / f"{index}.png")
    begun = []

    def read(path, *how, **too):
        begun.append(path)
        time.sleep(0.02 * bool(begun[1:]))
        return read_picture(path, *how, **too)

    class Stopped(image_data.tqdm):
        def update(self, *count):
            raise KeyboardInterrupt

    monkeypatch.setattr(image_data, "read_picture", read)
    monkeypatch.setattr(image_data, "tqdm", Stopped)
    with pytest.raises(KeyboardInterrupt):
        load_images(tmp_path / "set", 32, cache_dir=tmp_path)
    assert 0 < len(begun) < 20


def test_no_room_for_the_cache_is_said_before_it_is_needed(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "free_bytes", lambda path: 1000)
    with pytest.raises(DataError, match=r"needs 30,720 bytes in .*cache, 1,000 are free; --cache-dir"):
        load_images(image_folder, 32, cache_dir=tmp_path / "cache")


def grey_film(path, *, first=20, frames=60, step=3):
    """A film of 30 frames a second, each a little lighter than the one before."""
    return draw_film(path, (np.full((40, 48, 3), min(255, first + step * index), np.uint8) for index in range(frames)))


def test_frames_of_films_are_images_of_a_class_folder_or_of_a_class_of_their_own(tmp_path):
    folder = tmp_path / "set"
    save_picture(folder / "cats" / "a.png")
    grey_film(folder / "cats" / "film.mp4")
    grey_film(folder / "top.mov", frames=61)
    data = load_images(folder, 32, cache_dir="cache")
    assert data.classes == ("cats",) * 5 + ("top.mov",) * 5
    assert data.images[1:, 0, 16, 16].tolist() == pytest.approx([20, 65, 110, 155, 20, 65, 110, 155, 200], abs=2)
    assert (data.num_grey, data.skipped, data.remarks) == (10, {}, {})
    faster = load_images(folder, 32, cache_dir="cache", video_fps=5)
    assert len(faster.images) == 1 + 10 + 11
    assert faster.digest != data.digest


def test_a_film_alone_is_a_set_of_its_frames(tmp_path, monkeypatch, capfd):
    film = grey_film(tmp_path / "my film.mp4")
    data = load_images(film, 32, cache_dir="cache")
    assert (len(data.images), data.class_counts, data.folder) == (4, {"my film.mp4": 4}, film)
    with monkeypatch.context() as patched:
        patched.setattr(image_data, "open_film", None)
        assert torch.equal(load_images(film, 32, cache_dir="cache").images, data.images)
    assert training.main(["--data", str(film), *tiny_arguments(steps=1)]) == 0
    assert f"{film}: 4 images" in capfd.readouterr().out
    assert (tmp_path / "runs" / "my film" / "config.json").exists()


def test_films_that_cannot_be_read_are_named_like_pictures(tmp_path):
    folder = tmp_path / "set"
    grey_film(folder / "a.mp4")
    (folder / "b.mp4").touch()
    (folder / "c.avi").write_text("x")
    with pytest.raises(DataError) as error:
        load_images(folder, 32, cache_dir="cache")
    first, *others = str(error.value).splitlines()
    assert first.startswith("2 of 3 images in")
    assert [line.split(" (")[0] for line in others] == ["  b.mp4: empty", "  c.avi: no film of a kind that is read here"]
    assert len(load_images(folder, 32, cache_dir="cache", skip_bad=True).images) == 4


def test_what_is_odd_about_a_film_is_said_at_every_start(tmp_path, capfd):
    film = tmp_path / "set" / "a.mp4"
    draw_film(film, (np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8) for index in range(60)))
    content = bytearray(film.read_bytes())
    content[len(content) // 2:len(content) // 2 + 2_000] = bytes(2_000)
    film.write_bytes(content)
    for _ in range(2):
        assert training.main(["--data", str(film.parent), *tiny_arguments(steps=1), "--dry-run"]) == 0
        assert "note: a.mp4: " in (out := capfd.readouterr().out)
        assert "damaged frames are left out" in out


def test_without_pyav_films_are_passed_over_with_what_would_read_them(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "set"
    save_picture(folder / "a.png")
    grey_film(folder / "film.mp4")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "av", None)
        data = load_images(folder, 32, cache_dir="cache")
        assert (len(data.images), data.passed_over) == (1, {".mp4": 1})
        assert passed_over_text(data.passed_over) == "1 .mp4 (needs the package av: pip install av)"
        with pytest.raises(DataError, match=r"film\.mp4: needs the package av: pip install av$"):
            load_images(folder / "film.mp4", 32, cache_dir="cache")
    assert len(load_images(folder, 32, cache_dir="cache").images) == 5


def test_animations_are_pictures_until_images_per_second_are_asked_for(tmp_path):
    images = [Image.new("RGB", (40, 30), (60 * index, 0, 0)) for index in range(4)]
    (tmp_path / "set").mkdir()
    for name in ("a.gif", "b.webp", "c.png"):
        images[0].save(tmp_path / "set" / name, save_all=True, append_images=images[1:], duration=500)
    save_picture(tmp_path / "set" / "d.webp")
    assert len(load_images(tmp_path / "set", 32, cache_dir="cache").images) == 4
    data = load_images(tmp_path / "set", 32, cache_dir="cache", video_fps=2)
    assert data.class_counts == {"a.gif": 4, "b.webp": 4, "c.png": 4, "": 1}


def test_every_epoch_holds_every_image_once_and_batches_join_end_to_end():
    order = torch.cat([batch_indices(10, position, 4, seed=1) for position in range(0, 40, 4)])
    epochs = order.view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(batch_indices(10, 17, 6, seed=1), order[17:23])
    assert not torch.equal(batch_indices(10, 0, 10, seed=2), order[:10])


def test_a_batch_larger_than_the_folder_repeats_it():
    assert sorted(batch_indices(3, 0, 7, seed=0).tolist()[:6]) == [0, 0, 1, 1, 2, 2]


def test_an_epoch_is_ordered_once(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "randperm", lambda *a, real=torch.randperm, **k: calls.append(a) or real(*a, **k))
    for position in range(0, 1_000, 16):
        batch_indices(1_000, position, 16, seed=12345)
    assert len(calls) == 2  # the first epoch and the one that its last batch reaches into


def test_what_is_taken_has_0_and_255_as_0_and_1():
    images = torch.tensor([0, 51, 255, 7], dtype=torch.uint8)
    assert as_float_images(images, torch.tensor([2, 0, 1]), torch.device("cpu")).tolist() == pytest.approx([1, 0, 0.2])


@pytest.mark.skipif(MESSY is None, reason="needs a folder of awkward files beside the project")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_awkward_files_behave_as_their_manifest_says(tmp_path):
    found = set(find_images(MESSY))
    for row in csv.DictReader((MESSY / "MANIFEST.csv").read_text().splitlines()):
        path = (MESSY / row["path"]).resolve()
        if row["expected"] == "to be skipped" or (path not in found and "skipped" in row["expected"]):
            assert path not in found
            continue
        assert path in found
        if row["expected"].startswith("unreadable"):
            with pytest.raises(DataError):
                decode_image(path, 64)
        else:
            assert decode_image(path, 64).shape == (3, 64, 64)
        alone = tmp_path / "alone"
        alone.mkdir()
        (alone / path.name).symlink_to(path)
        if row["expected"].startswith("unreadable"):
            with pytest.raises(DataError, match="1 of 1 images"):
                load_images(alone, 64, cache_dir=tmp_path / "cache", skip_bad=True)
        else:
            assert torch.equal(load_images(alone, 64, cache_dir=tmp_path / "cache").images[0], decode_image(path, 64))
        shutil.rmtree(alone)
    data = load_images(MESSY, 64, cache_dir=tmp_path / "cache", skip_bad=True)
    assert {name.split("/")[0] for name in data.skipped} == {"broken"}
    assert len(data.skipped) == 7
    grey = decode_image(MESSY / "drawn" / "dog_16bit_grey.png", 64).float()
    assert grey.std() > 20
    assert not math.isclose(grey.mean(), 255, abs_tol=10)
