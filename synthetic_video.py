"""One image to a short, smooth stack of frames: what the CNN looks at, and a clip that a person can watch.

Notation as in model_definitions.py: N batch, T frames, C channels, H and W pixels; images in [0, 1].
"""
import torch

ZOOM = 0.08  # the last frame shows the image enlarged by this fraction
FADE = 0.15  # the last frame has lost this fraction of its contrast
NOISE = 0.05  # and holds this fraction of the noise, where noise is given


def interpolation_matrix(positions, size):
    """Weights that read a line of `size` samples at fractional positions, by linear interpolation.

    Args:
        positions: (..., P) float, in samples, 0 being the first; positions beyond an end read that end.
        size: number of samples in the line.

    Returns:
        (..., P, size), rows non-negative and summing to 1. Multiplying by this matrix, unlike gathering by index, has a
        gradient that is the same on every run of every device.
    """
    samples = torch.arange(size, device=positions.device, dtype=positions.dtype)
    return (1 - (positions.clamp(0, size - 1)[..., None] - samples).abs()).relu()


def synthetic_video(images, num_frames=16, *, noise=None):
    """Returns a video that starts at the image and leaves it slowly: a push-in with a drift, fading a little.

    Every frame is a fixed, smooth function of the one image: it is read at a zoom and a shift that grow with the frame
    index, and mixed with a grey level that rises from mid grey to white, sinks to black and returns. A network that
    looks at the video therefore sees the image at T gains and offsets, and motion only as far as zoom and shift go.
    Frames of float32 and float64 stay in [0, 1] because each is a weighted mean of values in [0, 1]: nothing is clamped,
    so no gradient stops.

    Args:
        images: (N, C, H, W) float in [0, 1].
        num_frames: T, at least 1.
        noise: optional values in [0, 1], broadcastable to (N, T, C, H, W), mixed in with a weight growing from 0.

    Returns:
        (N, T, C, H, W), dtype and device of `images`, in [0, 1]; frame 0 is the image, bit for bit. Differentiable, to
        any order.

    Raises:
        ValueError: not a batch of images, or fewer than one frame.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"expected float images (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if num_frames < 1:
        raise ValueError(f"expected at least one frame, got {num_frames}")
    height, width = images.shape[-2:]
    exact = torch.promote_types(images.dtype, torch.float32)
    time = torch.arange(1, num_frames, device=images.device, dtype=exact) / max(num_frames - 1, 1)
    fade = FADE * time[:, None, None]
    rows = (1 - fade) * _camera(time, height, drift=-0.5)
    columns = _camera(time, width, drift=1.0)
    # Two matrix products in the order of axes that needs no copy between them.
    moved = rows.flatten(0, 1).to(images.dtype) @ images.permute(2, 0, 1, 3).flatten(1)
    moved = moved.view(len(time), images.numel() // width, width) @ columns.transpose(1, 2).to(images.dtype)
    moved = moved.unflatten(1, (height, *images.shape[:2])).permute(2, 0, 3, 1, 4)
    # A grey strictly between 0 and 1 leaves room for rounding.
    grey = fade * (0.5 + 0.45 * torch.sin(2 * torch.pi * time[:, None, None]))
    moved = moved + grey.unsqueeze(1).to(images.dtype)
    if noise is not None:
        noise = noise.expand(len(images), num_frames, *images.shape[1:])[:, 1:]
        moved = moved + (NOISE * time).to(images.dtype).view(-1, 1, 1, 1) * (noise - moved)
    return torch.cat([images.unsqueeze(1), moved.to(images.dtype)], dim=1)


def _camera(time, size, *, drift):
    """(len(time), size, size) matrices that zoom in over time, the window drifting as far as the zoom leaves room."""
    centre = (size - 1) / 2
    offset = torch.arange(size, device=time.device, dtype=time.dtype) - centre
    shrink = (1 / (1 + ZOOM * time))[:, None]
    return interpolation_matrix(centre + offset * shrink + drift * centre * (1 - shrink) * time[:, None], size)
