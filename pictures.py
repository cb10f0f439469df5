"""Arranges images as grids and heat maps, and writes them as PNG.

Notation as in model_definitions.py. A picture is (C, H, W), float in [0, 1].
"""
import torch
from PIL import ImageDraw, ImageFont
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from safe_files import atomic_write
from synthetic_video import interpolation_matrix

HEAT = ((0.1, 0.1, 0.3), (0.3, 0.2, 0.7), (0.8, 0.3, 0.5), (1.0, 0.7, 0.3), (1.0, 1.0, 0.8))  # ever brighter
MINIMUM_SPAN = 0.01  # of alpha from the first to the last colour, so that rounding errors are not shown as a pattern
SCALE_HEIGHT = 24  # pixels, of the colour bar below the heat maps with its numbers


class PictureError(ValueError):
    """The picture cannot be written like that; the message says what would do."""


def grid(images, *, columns):
    """Returns images (N, C, H, W) as one picture (C, ...), in rows of `columns`, with white between them."""
    return make_grid(images, nrow=columns, padding=2, pad_value=1.0)[:images.shape[1]]  # it makes RGB of grey ones


def on_white(images):
    """Returns images (..., C, H, W) with transparency, C = 4, laid on white: (..., 3, H, W); others as they are."""
    if images.shape[-3] != 4:
        return images
    colours, opacity = images.split([3, 1], dim=-3)
    return 1 - opacity + opacity * colours


def as_rgb(images):
    """Returns images (..., C, H, W) as (..., 3, H, W): on_white, and grey ones in three equal channels."""
    return on_white(images).expand(*images.shape[:-3], 3, *images.shape[-2:])


def enlarge(images, size, *, smooth):
    """Returns images (N, C, H, W) with their width changed to `size`: bicubic if smooth, else each pixel repeated."""
    if size == images.shape[-1]:
        return images
    to = (max(1, round(images.shape[-2] * size / images.shape[-1])), size)
    if smooth:
        return F.interpolate(images, to, mode="bicubic", antialias=True).clamp(*images.aminmax())
    return F.interpolate(images, to, mode="nearest-exact")


def alpha_picture(before, alpha, after, *, columns):
    """Returns a picture of the output layer's input, alpha as a heat map and output, side by side, with a colour bar below.

    Args:
        before, after: (N, C, H, W) in [0, 1].
        alpha: (N, 1, H, W).
        columns: how many of the N stand side by side.
    """
    before, after = as_rgb(before), as_rgb(after)
    low, high = (bound.item() for bound in alpha.aminmax())
    heat = _heat((alpha - low) / max(high - low, MINIMUM_SPAN)).expand_as(before)
    strips = grid(torch.stack([before, heat, after], dim=1).flatten(0, 1), columns=3 * columns)
    return torch.cat([strips, _scale(low, high, width=strips.shape[-1])], dim=1)


def _heat(values):
    """(N, 1, H, W) in [0, 1] to colours (N, 3, H, W)."""
    colours = torch.tensor(HEAT, dtype=values.dtype)
    return (interpolation_matrix(values.squeeze(1) * (len(HEAT) - 1), len(HEAT)) @ colours).permute(0, 3, 1, 2)


def _scale(low, high, *, width):
    """A bar (3, SCALE_HEIGHT, width) of the heat map's colours, with the values of alpha at its ends."""
    image = to_pil_image(_heat(torch.linspace(0, 1, width).expand(1, 1, SCALE_HEIGHT, width))[0])
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.rectangle((0, SCALE_HEIGHT // 2, width, SCALE_HEIGHT), fill="white")
    draw.text((2, SCALE_HEIGHT), f"{low:.2f}", "black", font, anchor="ld")
    draw.text((width - 2, SCALE_HEIGHT), f"{high:.2f}", "black", font, anchor="rd")
    return pil_to_tensor(image) / 255


def save_picture(picture, path):
    """Writes a picture as PNG."""
    with atomic_write(path) as file:
        to_pil(picture).save(file, format="PNG")


def to_pil(picture):
    """Returns a picture as an image of Pillow, rounded to 8 bits."""
    return to_pil_image((picture * 255).round().clamp(0, 255).to(torch.uint8))
