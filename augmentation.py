"""Differentiable augmentation of real and generated images alike, which delays overfitting to a small set of images.

Source: Zhao et al. 2020 (arXiv:2006.10738). Notation as in model_definitions.py.
"""
import torch

from synthetic_video import window_matrix

NUM_AUGMENT_NUMBERS = 6  # per image
SHIFT = 0.125  # of the image size, each way
ZOOM = 0.125  # each way
BRIGHTNESS = 0.25  # of full scale, each way
CONTRAST = 0.25  # of the contrast, each way


def augment(images, augment_numbers):
    """Returns images mirrored, shifted, zoomed and changed in brightness and contrast, each by its own random numbers.

    Args:
        images: (N, C, H, W).
        augment_numbers: (N, NUM_AUGMENT_NUMBERS) uniform in [0, 1]; the same numbers give the same transform.

    Returns:
        (N, C, H, W), differentiable; brightness and contrast may leave [0, 1]. Transparency is only moved.
    """
    mirror, down, right, zoom, brightness, contrast = (2 * augment_numbers - 1).to(images.dtype).unbind(1)
    height, width = images.shape[-2:]
    rows = window_matrix(height, 1 + ZOOM * zoom, height * (SHIFT * down))
    columns = window_matrix(width, torch.where(mirror < 0, -1.0, 1.0) * (1 + ZOOM * zoom), width * (SHIFT * right))
    moved = torch.einsum("nhi,ncij,nwj->nchw", rows, images, columns)
    colours, transparency = moved[:, :3], moved[:, 3:]
    mean = colours.mean(dim=(1, 2, 3), keepdim=True)
    contrast = (1 + CONTRAST * contrast).view(-1, 1, 1, 1)
    toned = mean + contrast * (colours - mean) + BRIGHTNESS * brightness.view(-1, 1, 1, 1)
    return torch.cat([toned, transparency], dim=1) if transparency.shape[1] else toned
