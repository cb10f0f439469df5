"""Differentiable augmentation, the same for real and generated images, so that small sets last longer.

Source: Zhao et al. 2020 (arXiv:2006.10738). Notation as in model_definitions.py.
"""
import torch

from synthetic_video import interpolation_matrix

RANDOM_NUMBERS = 6  # per image
SHIFT = 0.125  # of the image size, each way
ZOOM = 0.125  # each way
BRIGHTNESS = 0.25  # of full scale, each way
CONTRAST = 0.25  # of the contrast, each way


def augment(images, random_numbers):
    """Returns images mirrored, shifted, zoomed, brightened and changed in contrast, each by its own random numbers.

    Args:
        images: (N, C, H, W).
        random_numbers: (N, RANDOM_NUMBERS) in [0, 1]; the same numbers give the same transform.

    Returns:
        (N, C, H, W), differentiable; brightness and contrast may leave [0, 1].
    """
    mirror, down, right, zoom, brightness, contrast = (2 * random_numbers - 1).to(images.dtype).unbind(1)
    height, width = images.shape[-2:]
    rows = _window(height, 1 + ZOOM * zoom, SHIFT * down)
    columns = _window(width, torch.where(mirror < 0, -1.0, 1.0) * (1 + ZOOM * zoom), SHIFT * right)
    moved = torch.einsum("nhi,ncij,nwj->nchw", rows, images, columns)
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    contrast = (1 + CONTRAST * contrast).view(-1, 1, 1, 1)
    return mean + contrast * (moved - mean) + BRIGHTNESS * brightness.view(-1, 1, 1, 1)


def _window(size, scale, shift):
    """(N, size, size) matrices that read a line at positions scaled about its centre and shifted by a part of it."""
    offset = torch.arange(size, device=scale.device, dtype=scale.dtype) - (size - 1) / 2
    return interpolation_matrix((size - 1) / 2 + scale[:, None] * offset + size * shift[:, None], size)
