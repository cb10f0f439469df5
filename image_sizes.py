"""Sizes and channels that images can have, and how they get them. Standard library only: --help needs this too."""
import contextlib
import operator
import re

SHORTER_SIDES = (32, 64, 128, 256, 512)
SMALLEST_MAP = 4  # pixels, of the shorter side of the last encoder map and the first decoder map
LONGEST = 4  # times the shorter side
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
RESIZE_MODES = ("crop", "pad", "stretch")


def height_and_width(image_size):
    """Returns (height, width), in pixels, of a number (of a square), a pair (height, width) or a text such as "128x224".

    Raises:
        ValueError: the networks cannot have that size; which sizes they can have.
    """
    text = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", image_size) if isinstance(image_size, str) else None
    given = text.groups(default=text[1]) if text else image_size
    sides = as_pair(given)
    with contextlib.suppress(TypeError, ValueError):
        height, width = (int(side) if text else operator.index(side) for side in sides)
        shorter, longer = sorted((height, width))
        if shorter in SHORTER_SIDES and longer % (shorter // SMALLEST_MAP) == 0 and longer <= LONGEST * shorter:
            return height, width
    raise ValueError(f"must be one of {', '.join(map(str, SHORTER_SIDES))}, or HEIGHTxWIDTH such as 128x224: the shorter "
                     f"side one of these, the longer a multiple of its quarter, at most {LONGEST} times it; got "
                     f"{size_text(image_size)}")


def as_pair(image_size):
    """Returns a size of any value as a tuple: (H, W) as it is, the side of a square twice."""
    return tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)


def plain_size(image_size):
    """Returns height_and_width of what it takes, as one number where the two are equal."""
    height, width = height_and_width(image_size)
    return height if height == width else (height, width)


def size_text(image_size):
    """Returns a size as people write it: "128", "128x224"."""
    return "x".join(map(str, image_size)) if isinstance(image_size, (tuple, list)) else str(image_size)
