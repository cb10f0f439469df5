import pathlib

import numpy as np
import pytest
from helpers import draw_film, save_picture, tiny_arguments

import training
from image_data import load_images


@pytest.fixture
def folder(tmp_path):
    """Two classes, with a small, a broken and a doubled file, and two that are no pictures."""
    for index in range(3):
        save_picture(tmp_path / "set" / "cats" / f"{index}.png", size=(50, 40), color=(80 * index, 0, 0))
    save_picture(tmp_path / "set" / "dogs" / "grey.png", "L", size=(33, 32), color=7)
    save_picture(tmp_path / "set" / "dogs" / "small.jpg", size=(20, 50), color=(90, 90, 90))
    save_picture(tmp_path / "set" / "dogs" / "again.png", size=(80, 64), color=(80, 0, 0))
    (tmp_path / "set" / "dogs" / "page.png").write_text("<html>")
    (tmp_path / "set" / "dogs" / "raw.DNG").write_text("x")
    (tmp_path / "set" / "notes").write_text("x")
    return tmp_path / "set"


def test_the_report_says_what_is_there_and_what_may_be_wrong(folder, capfd):
    assert training.main(["--data", str(folder), *tiny_arguments(), "--check-data"]) == 2
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        f"{folder}: 7 images, 1 of them cannot be read",
        "class: cats (3), dogs (3)",
        "width x height: 50 x 40 (3), 80 x 64 (1), 33 x 32 (1), 20 x 50 (1)",
        "mode: RGB (5), L (1)",
        "resize mode: crop cuts off 24% of an image on average, at most 60%; pad adds 42% of an image on average, at most "
        "150%; stretch changes proportions as much",
        "smaller than 32 px, enlarged: 1",
        "  dogs/small.jpg: 20 x 50",
        "the same picture as another: 1",
        "  dogs/again.png: as cats/1.png",
        "passed over: 1 .dng, 1 without an ending",
    ]
    assert err.splitlines()[0].startswith("1 of 7 images in")
    assert err.splitlines()[1] == "  dogs/page.png: a web page, which is not read here"
    assert not pathlib.Path("runs").exists()


def test_what_the_check_has_read_is_the_cache(folder, monkeypatch, capfd):
    assert training.main(["--data", str(folder), *tiny_arguments(), "--check-data", "--skip-bad"]) == 0
    said = capfd.readouterr().out
    assert "warning: 1 files cannot be read and are left out:\n  dogs/page.png: " in said
    monkeypatch.setattr("image_data.read_picture", None)
    assert len(load_images(folder, 32, cache_dir="cache", skip_bad=True).images) == 6
    assert training.main(["--data", str(folder), *tiny_arguments(steps=1), "--skip-bad"]) == 0
    assert "6 images in 2 classes" in capfd.readouterr().out


def test_long_lists_are_cut_with_their_length(tmp_path, capfd):
    for index in range(30):
        save_picture(tmp_path / "set" / f"{index:02}.png", size=(8 + index, 8), color=(index, 0, 0))
    assert training.main(["--data", str(tmp_path / "set"), *tiny_arguments(), "--check-data"]) == 0
    said = capfd.readouterr().out
    assert "8 x 8 (1)" in said
    assert "(1), and 10 more" in said
    assert "smaller than 32 px, enlarged: 30\n  00.png: 8 x 8\n" in said
    assert "  and 10 more\n" in said
    assert "class: no class (30)" in said


@pytest.mark.parametrize("channels", [3, 4])
def test_nothing_is_advised_about_a_folder_in_which_nothing_can_be_read(tmp_path, capfd, channels):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_text("x")
    assert training.main(["--data", str(tmp_path / "set"), *tiny_arguments(channels=channels), "--check-data"]) == 2
    assert "note" not in capfd.readouterr().out


@pytest.mark.parametrize(("mode", "expected"), [("crop", 1), ("pad", 0), ("stretch", 1)])
def test_an_image_is_enlarged_where_its_resize_mode_enlarges_it(tmp_path, capfd, mode, expected):
    save_picture(tmp_path / "set" / "long.png", size=(300, 20))
    training.main(["--data", str(tmp_path / "set"), *tiny_arguments(resize_mode=mode), "--check-data"])
    assert ("enlarged: 1" in capfd.readouterr().out) == bool(expected)


def test_frames_of_still_scenes_are_counted(tmp_path, capfd):
    still = [np.full((40, 48, 3), value, np.uint8) for value in [50] * 45 + [200] * 45]  # frames taken at 0, 0.5, 1, ... s
    draw_film(tmp_path / "set" / "a.mp4", still)
    draw_film(tmp_path / "set" / "b.mp4", (np.full((40, 48, 3), 2 * index, np.uint8) for index in range(90)))
    assert training.main(["--data", str(tmp_path / "set"), *tiny_arguments(), "--check-data"]) == 0
    out = capfd.readouterr().out
    assert "12 images, 0 of them cannot be read\nclass: a.mp4 (6), b.mp4 (6)\n" in out
    assert "frames of films nearly the same as the one before: a.mp4: 4 of 6\n" in out
    assert "the same picture as another: 4\n  a.mp4 at 0.50 s: as a.mp4 at 0.00 s\n" in out


def test_it_says_what_channels_and_what_size_would_suit(tmp_path, capfd):
    for index in range(4):
        save_picture(tmp_path / "set" / f"{index}.png", "LA", size=(64, 36), color=(60 * index, 128))
    notes = {3: ["note: every image is grey; --channels 1 trains faster, without colour casts",
                 "note: 4 of 4 images have transparency, laid on white; --channels 4 keeps it"], 4: [], 1: []}
    for channels, expected in notes.items():
        assert training.main(["--data", str(tmp_path / "set"), *tiny_arguments(channels=channels), "--check-data"]) == 0
        out = capfd.readouterr().out
        assert "crop cuts off 44% of an image on average, at most 44%; pad adds 78%" in out
        assert "note: --image-size 32x56 would cut off 2% on average" in out
        assert [line for line in out.splitlines() if "--channels" in line] == expected
