"""Draws a small ImageFolder of coloured shapes, for a first run without images of one's own."""
import colorsys
import math
import pathlib
import random
import shutil
import tempfile

from PIL import Image, ImageDraw
from tqdm import tqdm

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZE = 64  # pixels
SCALE = 4  # drawn this many times larger, then reduced, for smooth edges


def draw_demo_images(folder, num_images=3_000, *, seed=0):
    """Draws num_images PNG files in class folders below `folder`, unless they are there already; returns the folder.

    The folder appears under its name only when it is complete. The same seed draws the same pictures.

    Raises:
        FileExistsError: the folder holds other files than these.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        names = {f"{SHAPES[index % len(SHAPES)]}/{index:05d}.png" for index in range(num_images)}
        if names != {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if not path.is_dir()}:
            raise FileExistsError(f"{folder} holds other files than the demo draws: move it, or train on it with --data")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp"))
    try:
        for shape in SHAPES:
            (partial / shape).mkdir()
        for index in tqdm(range(num_images), desc="drawing", unit="image", disable=None):
            shape = SHAPES[index % len(SHAPES)]
            draw_shape(shape, random.Random(f"{seed} {index}")).save(partial / shape / f"{index:05d}.png")
        partial.chmod(0o755)  # mkdtemp's is for the owner alone
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was drawing the same and has finished first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def draw_shape(shape, rng):
    """Returns one picture: a shape of some colour, size, place and angle, on a pale background of another colour."""
    side = SIZE * SCALE
    hue = rng.random()
    image = Image.new("RGB", (side, side), _colour(rng, hue, 0.15, 0.9))
    ink = _colour(rng, hue + rng.uniform(0.25, 0.75), 0.8, 0.85)
    centre = [side * rng.uniform(0.45, 0.55) for _ in range(2)]
    _draw(ImageDraw.Draw(image), shape, centre, side * rng.uniform(0.3, 0.4), rng.uniform(-0.15, 0.15), ink)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _colour(rng, hue, saturation, value):
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation * rng.uniform(0.8, 1.2), value * rng.uniform(0.9, 1.1))
    return tuple(int(255 * channel) for channel in (red, green, blue))


def _draw(draw, shape, centre, radius, angle, ink):
    def at(distance, turn):
        """A point at `distance` radii from the centre, `turn` radians clockwise from straight up."""
        turn, distance = turn + angle, distance * radius
        return centre[0] + distance * math.sin(turn), centre[1] - distance * math.cos(turn)

    def polygon(points):
        draw.polygon([at(math.hypot(x, y), math.atan2(x, y)) for x, y in points], fill=ink)

    if shape == "circle":
        draw.ellipse((centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius), fill=ink)
    elif shape == "square":
        draw.polygon([at(1.15, math.pi * (i + 0.5) / 2) for i in range(4)], fill=ink)
    elif shape == "triangle":
        draw.polygon([at(1.15, math.tau * i / 3) for i in range(3)], fill=ink)
    elif shape == "star":
        draw.polygon([at(1.15 if i % 2 == 0 else 0.5, math.pi * i / 5) for i in range(10)], fill=ink)
    elif shape == "heart":
        turns = [math.tau * i / 60 for i in range(60)]
        polygon([(math.sin(t) ** 3, (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15)
                 for t in turns])
    else:
        polygon([(x, y) for x, y in ((.35, 1), (.35, .35), (1, .35), (1, -.35), (.35, -.35), (.35, -1), (-.35, -1),
                                     (-.35, -.35), (-1, -.35), (-1, .35), (-.35, .35), (-.35, 1))])
