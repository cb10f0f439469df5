import random

import pytest

from demo_images import SHAPES, SIZE, draw_demo_images, draw_shape
from image_data import find_images


def test_pictures_are_an_ordinary_image_folder_drawn_once(tmp_path):
    folder = draw_demo_images(tmp_path / "demo", 12)
    paths = find_images(folder)
    assert len(paths) == 12
    assert {path.parent.name for path in paths} == set(SHAPES)
    before = [path.stat().st_mtime_ns for path in paths]
    draw_demo_images(tmp_path / "demo", 12)
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_the_same_seed_draws_the_same_picture_and_others_differ():
    for shape in SHAPES:
        first, again, other = (draw_shape(shape, random.Random(seed)) for seed in (1, 1, 2))
        assert first.size == (SIZE, SIZE)
        assert first.tobytes() == again.tobytes() != other.tobytes()
        assert len(first.getcolors(SIZE * SIZE)) > 2


def test_a_folder_of_other_files_is_not_taken_for_the_demo(tmp_path):
    folder = draw_demo_images(tmp_path / "demo", 12)
    assert draw_demo_images(folder, 12) == folder
    (folder / ".DS_Store").touch()
    assert draw_demo_images(folder, 12) == folder
    (folder / "mine.png").touch()
    with pytest.raises(FileExistsError, match="holds other files than the demo draws"):
        draw_demo_images(folder, 12)
