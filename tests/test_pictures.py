import pytest
import torch
from helpers import read
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from pictures import SCALE_HEIGHT, alpha_picture, as_rgb, enlarge, grid, on_white, save_picture


def test_a_picture_comes_back_rounded_and_not_wrapped_around(tmp_path):
    picture = torch.tensor([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 0.5, 1.0, 1.1]).expand(3, 4, 7)
    save_picture(picture, tmp_path / "a.png")
    assert (read(tmp_path / "a.png")[0, 0] * 255).round().tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_enlarging_repeats_pixels_or_smooths_them():
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(enlarge(image, 24, smooth=False), image.repeat_interleave(3, 2).repeat_interleave(3, 3))
    smooth = enlarge(image, 24, smooth=True)
    assert smooth.shape == (1, 3, 24, 24)
    assert image.min() <= smooth.min() < smooth.max() <= image.max()
    assert (smooth.diff(dim=3).abs().max() < 0.8 * image.diff(dim=3).abs().max())
    assert enlarge(torch.rand(2, 3, 4, 8), 16, smooth=True).shape == (2, 3, 8, 16)
    assert torch.equal(enlarge(image, 8, smooth=True), image)


def test_a_picture_can_be_made_as_small_as_a_pixel():
    assert enlarge(torch.rand(1, 3, 32, 128), 1, smooth=True).shape == (1, 3, 1, 1)
    assert enlarge(torch.rand(1, 3, 32, 128), 2, smooth=False).shape == (1, 3, 1, 2)


def test_a_grid_has_rows_of_so_many_columns():
    picture = grid(torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.2, 0.3)]), columns=2)
    assert picture.shape == (3, 14, 14)
    assert [picture[0, y, x].item() for y, x in ((3, 3), (3, 9), (9, 3))] == pytest.approx([0.1, 0.2, 0.3])
    assert picture[0, 0, 0] == 1


def test_alpha_maps_show_before_alpha_and_after_with_a_scale():
    before, after = torch.full((2, 3, 32, 32), 0.25), torch.full((2, 3, 32, 32), 0.75)
    alpha = torch.linspace(2, 4, 32).expand(2, 1, 32, 32)
    picture = alpha_picture(before, alpha, after, columns=1)
    assert picture.shape == (3, 2 * 34 + 2 + SCALE_HEIGHT, 3 * 34 + 2)
    assert (picture[:, 10, 10] == 0.25).all()
    assert (picture[:, 10, 80] == 0.75).all()
    brightness = picture[:, 10, 36:68].mean(dim=0)
    assert (brightness.diff() > 0).all()  # higher alpha is brighter
    assert (picture[:, -SCALE_HEIGHT + 4].mean(dim=0).diff() >= -1 / 255).all()  # and so is the bar
    numbers = picture[0, -SCALE_HEIGHT // 2 + 1:]
    assert (numbers[:, :30] < 0.5).any()
    assert (numbers[:, -30:] < 0.5).any()


def test_an_alpha_that_is_the_same_everywhere_is_one_colour():
    picture = alpha_picture(torch.zeros(1, 3, 32, 32), torch.full((1, 1, 32, 32), 3.0), torch.ones(1, 3, 32, 32), columns=1)
    assert picture.isfinite().all()
    assert picture[:, 2:34, 36:68].flatten(1).unique(dim=1).shape[1] == 1
    almost = torch.full((1, 1, 32, 32), 3.0)
    almost[..., :16] += 1e-5
    picture = alpha_picture(torch.zeros(1, 3, 32, 32), almost, torch.ones(1, 3, 32, 32), columns=1)
    assert (picture[:, 2:34, 36:52] - picture[:, 2:34, 52:68]).abs().max() < 0.01


def test_transparency_is_laid_on_white_and_grey_becomes_three_equal_channels():
    image = torch.tensor([0.2, 0.4, 0.6, 0.5]).view(1, 4, 1, 1)
    assert torch.allclose(as_rgb(image).flatten(), torch.tensor([0.6, 0.7, 0.8]))
    assert torch.equal(on_white(image[:, :3]), image[:, :3])
    assert as_rgb(image[:, :1]).flatten().tolist() == pytest.approx([0.2] * 3)
    assert as_rgb(image[0]).shape == (3, 1, 1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_and_grids_keep_their_channels(tmp_path, channels, mode):
    images = torch.rand(3, channels, 6, 8).mul(255).round() / 255
    save_picture(grid(images, columns=2), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == mode
        found = pil_to_tensor(picture) / 255
    assert torch.allclose(found[:, 2:8, 2:10], images[0], atol=1e-6)
