"""Paths through the latent space of a VAE, photos as its start, and the images along a path.

Notation as in model_definitions.py.
"""
import math
import pathlib

import torch
from tqdm import tqdm

from checkpointing import preparation_of
from image_files import DataError, decode_image
from model_definitions import Decoded
from randomness import latent_noise

PIXELS_AT_A_TIME = 2**18  # 16 images of 128 px: enough work for all cores, in less than 1 GiB
WALK_RADIUS = 0.3  # of the circle of a walk, in standard deviations of the latent space
MEASURED_PER_KEY, MEASURED = 32, 96  # images that are made of a path, and at least, to learn how fast they change along it


def loop(keys, places, *, seed=0, index=0):
    """Returns latent vectors (M, Z) at places (M,) of a closed path through some vectors, the keys.

    One key: a circle through it. Two: to the other and back. More: a spline with continuous second derivatives. Vectors
    between two keys are scaled so that their length goes evenly from that of one to that of the other. Without that the path
    would pass far inside: in 128 dimensions the mean of two independent vectors has 0.7 of their length, where images are
    grey.

    Args:
        keys: (K, Z).
        places: in [0, 1); key k is at k / K.
        seed, index: choose the circle.
    """
    if len(keys) == 1:
        aside = latent_noise(seed, (2 * index, 2 * index + 1), keys.shape[1], purpose="walk").to(keys)
        angle = 2 * math.pi * places[:, None]
        return keys + WALK_RADIUS * ((1 - angle.cos()) * aside[0] + angle.sin() * aside[1])
    if len(keys) == 2:
        t = 1 - (1 - 2 * places[:, None]).abs()
        start, end = keys[:1], keys[1:]
        z = torch.lerp(start, end, t)
    else:
        after, before = keys.roll(-1, dims=0), keys.roll(1, dims=0)
        unit = torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
        slopes = torch.linalg.solve(4 * unit + unit.roll(1, dims=0) + unit.roll(-1, dims=0), 3 * (after - before))
        number = (places * len(keys)).long() % len(keys)
        t = (places * len(keys)).frac()[:, None]
        start, end, first, last = (rows[number] for rows in (keys, after, slopes, slopes.roll(-1, dims=0)))
        z = (1 + 2 * t) * (1 - t)**2 * start + t * (1 - t)**2 * first + t**2 * (3 - 2 * t) * end + t**2 * (t - 1) * last
    start, end, length = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (start, end, z))
    return z * torch.lerp(start, end, t**2 * (3 - 2 * t)) / length.clamp(min=1e-6)


def walk(z, num_frames, *, seed=0, index=0):
    """Returns latent vectors (T, Z) on a circle through z (1, Z), which is the first; the last is one step before it."""
    return loop(z, torch.arange(num_frames, device=z.device) / num_frames, seed=seed, index=index)


@torch.no_grad()
def steady_loop(vae, keys, num_frames, *, seed=0, index=0):
    """Returns latent vectors (T, Z) along `loop` whose images change by equal amounts from one to the next.

    The images at some places of the path are made, and the mean absolute difference of neighbours is taken as the length of
    what lies between them. With two keys it slows down at both, because the path turns there.

    Args:
        vae: draws the images.
        num_frames: T.
        keys, seed, index: as in loop. The first frame is at key 0.
    """
    count = max(MEASURED_PER_KEY * len(keys), MEASURED)
    places = torch.arange(count, device=keys.device) / count
    lengths, last = [], None
    for image in images_of(vae, loop(keys, torch.cat([places, places[:1]]), seed=seed, index=index), label="measuring"):
        if last is not None:
            lengths.append((image - last).abs().mean().item())
        last = image
    lengths = torch.tensor([0.0, *lengths], dtype=torch.float64) + 1e-9
    ends = lengths.cumsum(0) / lengths.sum()
    times = torch.arange(num_frames, dtype=torch.float64) / num_frames
    if len(keys) == 2:
        there = (1 - (2 * math.pi * times).cos()) / 4
        times = torch.where(times <= 0.5, there, 1 - there)
    after = torch.searchsorted(ends, times, right=True).clamp(1, count)
    part = (times - ends[after - 1]) / (ends[after] - ends[after - 1])
    return loop(keys, ((after - 1 + part.clamp(0, 1)) / count).to(keys), seed=seed, index=index)


@torch.no_grad()
def decode_each(vae, z):
    """Yields VAE.decode_parts of each row of z (N, Z), computed some rows at a time; N changes them by rounding alone."""
    height, width = vae.image_shape[-2:]
    for rows in z.split(max(1, PIXELS_AT_A_TIME // (height * width))):
        decoded = vae.decode_parts(rows)
        for index in range(len(rows)):
            yield Decoded(*(None if part is None else part[index:index + 1] for part in decoded))


def images_of(vae, z, *, label=None, leave=False):
    """Yields the image (C, H, W) of each row of z (N, Z), on the CPU, with a progress bar where there are several."""
    bar = tqdm(decode_each(vae, z), desc=label, total=len(z), unit="frame", leave=leave,
               disable=None if len(z) > 1 else True)
    return (parts.images[0].cpu() for parts in bar)


def frames_of(vae, z):
    """Returns the images (T, C, H, W) of latent vectors (T, Z), on the CPU."""
    return torch.stack(list(images_of(vae, z)))


def read_photo(path, image_size, **preparation):
    """Returns a picture file as (1, C, H, W) in [0, 1], by default in RGB and cropped.

    Args:
        path: of the file; "~" is the home directory.
        image_size, preparation: as for image_files.decode_image; vae.preparation is how a loaded VAE was trained.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return decode_image(pathlib.Path(path).expanduser(), image_size, **preparation)[None] / 255
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


@torch.no_grad()
def encode_photo(vae, path):
    """Returns the mean latent vector (1, Z) of a picture file, prepared as the training images. Raises as read_photo."""
    return vae.encode(read_photo(path, vae.image_shape[1:], **preparation_of(vae)).to(vae.mu.weight.device))[0]
