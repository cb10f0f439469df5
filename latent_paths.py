"""Paths through the latent space of a VAE, photos and films as what they go through, and the images along a path.

Notation as in model_definitions.py.
"""
import math
import os
import pathlib
from fractions import Fraction
from typing import NamedTuple

import torch
from tqdm import tqdm

from checkpointing import preparation_of
from image_files import DataError, decode_image, prepared
from model_definitions import Decoded
from randomness import latent_noise
from video_frames import open_film

PIXELS_AT_A_TIME = 2**18  # 16 images of 128 px: enough work for all cores, in less than 1 GiB
WALK_RADIUS = 0.3  # of the circle of a walk, in standard deviations of the latent space
MEASURED_PER_KEY, MEASURED = 32, 96  # images that are made of a path, and at least, to learn how fast they change along it
WINDOWS = (1, 3, 5, 9, 17)  # numbers of frames over which the latent vectors of a film may be averaged
CUT, CUT_OF_MEDIAN = 0.1, 4  # mean change of pixels to the next frame, and times the median one, from which it is a cut
PAIRS = 64  # of neighbouring frames in which flicker is measured


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


def _images_at_a_time(vae):
    height, width = vae.image_shape[-2:]
    return max(1, PIXELS_AT_A_TIME // (height * width))


@torch.no_grad()
def decode_each(vae, z):
    """Yields VAE.decode_parts of each row of z (N, Z), computed some rows at a time; N changes them by rounding alone."""
    for rows in z.split(_images_at_a_time(vae)):
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
        return decode_image(pathlib.Path(os.path.expanduser(path)), image_size, **preparation)[None] / 255
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


@torch.no_grad()
def encode_photo(vae, path):
    """Returns the mean latent vector (1, Z) of a picture file, prepared as the training images. Raises as read_photo."""
    return vae.encode(read_photo(path, vae.image_shape[1:], **preparation_of(vae)).to(vae.mu.weight.device))[0]


class FilmLatents(NamedTuple):
    """A film as a VAE encodes it."""

    z: torch.Tensor  # (T, Z) the mean of each frame
    changes: torch.Tensor  # (T,) mean absolute difference of a frame, prepared as the training images, to the one before; 0
    ends: list  # of the frames, in seconds from the first one's start (Fraction)
    start: Fraction  # of the first frame, in the time of the file
    remarks: list  # see video_frames.Video
    has_sound: bool = False


@torch.no_grad()
def encode_film(vae, path):
    """Returns the FilmLatents of all frames of a film. One frame is in memory at a time, or a few.

    Raises:
        DataError: it cannot be read.
    """
    preparation = preparation_of(vae)
    how = {"channels": preparation["channels"], "resize_mode": preparation["resize_mode"]}
    at_a_time, device = _images_at_a_time(vae), vae.mu.weight.device
    z, changes, ends, waiting, last = [], [], [], [], None
    try:
        with open_film(path) as film:
            for frame in tqdm(film.frames(), desc="reading", unit="frame", leave=False, disable=None):
                image = prepared(frame.picture(), vae.image_shape[1:], **how)[0] / 255
                changes.append(0.0 if last is None else (image - last).abs().mean().item())
                ends.append(frame.end)
                waiting.append(image)
                last = image
                if len(waiting) == at_a_time:
                    z.append(vae.encode(torch.stack(waiting).to(device))[0])
                    waiting.clear()
            if waiting:
                z.append(vae.encode(torch.stack(waiting).to(device))[0])
            return FilmLatents(torch.cat(z), torch.tensor(changes), ends, film.start, film.remarks, film.has_sound)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def smoothed(z, window, cuts):
    """Returns latent vectors (T, Z) averaged over neighbouring frames, with the weights of binomial coefficients.

    The window is symmetric, so motion does not lag; at both ends, and at cuts, the last vector is repeated.

    Args:
        z: (T, Z).
        window: an odd number of frames.
        cuts: (T,) bool, whether a frame is the first one after a cut.
    """
    weights, half = [math.comb(window - 1, k) / 2**(window - 1) for k in range(window)], window // 2
    first = torch.arange(len(z), device=z.device).where(cuts, 0).cummax(0).values  # of the frame's scene
    last = len(z) - 1 - torch.arange(len(z), device=z.device).where(cuts.roll(-1).flip(0), 0).cummax(0).values.flip(0)
    places = torch.arange(len(z), device=z.device)
    return sum(weight * z[(places + k - half).clamp(first, last)] for k, weight in enumerate(weights))


@torch.no_grad()
def steady_film(vae, latents):
    """Returns latent vectors (T, Z) for the frames of a film that flicker no more than the film, and a line about it.

    Flicker is the mean change from frame to frame, in places of the film, over that of the film itself. Of WINDOWS the first
    is taken with which it is at most 1, else the one with which it is least.
    """
    changes = latents.changes.to(latents.z)
    cuts = changes > max(CUT, CUT_OF_MEDIAN * changes.median().item())
    inside = (~cuts)[1:].nonzero()[:, 0]  # frames whose next frame belongs to the same scene
    inside = inside[torch.linspace(0, len(inside) - 1, min(PAIRS, len(inside))).long()]
    own = changes[inside + 1].mean().item() if len(inside) else 0
    if not own:
        return latents.z, "nothing moves in it" if len(latents.z) > 1 else ""
    found = {}
    for window in WINDOWS:
        z = smoothed(latents.z, window, cuts)
        pairs = frames_of(vae, z[torch.stack([inside, inside + 1], dim=1).flatten()]).unflatten(0, (-1, 2))
        found[window] = (pairs[:, 1] - pairs[:, 0]).abs().mean().item() / own
        if found[window] <= 1:
            break
    best = min(found, key=found.get)
    text = f"from frame to frame it changes {found[1]:.2f} times as much as the film"
    averaged = f", and {found[best]:.2f} times averaged over {best} frames" if best > 1 else ""
    return smoothed(latents.z, best, cuts), text + averaged
