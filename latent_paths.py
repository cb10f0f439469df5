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


def walk(z, num_frames, *, seed=0, index=0):
    """Returns latent vectors (T, Z) on a circle through z, which is the first; the last is one step before it.

    Args:
        z: (1, Z).
        num_frames: T.
        seed, index: choose the circle.
    """
    aside = latent_noise(seed, (2 * index, 2 * index + 1), z.shape[1], purpose="walk").to(z)
    angle = 2 * math.pi * torch.arange(num_frames, device=z.device)[:, None] / num_frames
    return z + WALK_RADIUS * ((1 - angle.cos()) * aside[0] + angle.sin() * aside[1])


def morph(z, other, num_frames):
    """Returns latent vectors (T, Z) from z (1, Z) to another halfway through and back, slowing down at both."""
    angle = 2 * math.pi * torch.arange(num_frames, device=z.device)[:, None] / num_frames
    return torch.lerp(z, other, (1 - angle.cos()) / 2)


@torch.no_grad()
def decode_each(vae, z):
    """Yields VAE.decode_parts of each row of z (N, Z), computed some rows at a time; N changes them by rounding alone."""
    height, width = vae.image_shape[-2:]
    for rows in z.split(max(1, PIXELS_AT_A_TIME // (height * width))):
        decoded = vae.decode_parts(rows)
        for index in range(len(rows)):
            yield Decoded(*(None if part is None else part[index:index + 1] for part in decoded))


def frames_of(vae, z):
    """Returns the images (T, C, H, W) of latent vectors (T, Z), on the CPU."""
    decoded = tqdm(decode_each(vae, z), total=len(z), unit="frame", leave=False, disable=None if len(z) > 1 else True)
    return torch.cat([parts.images.cpu() for parts in decoded])


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
