"""Makes a short, smooth video of one image: the input of the CNN, and a clip to look at.

Notation as in model_definitions.py: N batch, T frames, C channels (4: the last one is transparency), H and W pixels; images
in [0, 1].
"""
import torch

ZOOM = 0.08  # the last frame is enlarged by this fraction
FADE = 0.15  # the last frame has lost this fraction of its contrast


def interpolation_matrix(positions, size):
    """Returns the matrix that reads a line of `size` samples at fractional positions, by linear interpolation.

    Args:
        positions: (..., P) float, in samples from 0; positions beyond an end read the sample at that end.
        size: number of samples in the line.

    Returns:
        (..., P, size), rows non-negative and summing to 1. The gradient of a product with this matrix is deterministic on
        every device, which that of gathering by index is not.
    """
    samples = torch.arange(size, device=positions.device, dtype=positions.dtype)
    return (1 - (positions.clamp(0, size - 1)[..., None] - samples).abs()).relu()


def window_matrix(size, scale, shift):
    """Returns matrices (K, size, size), each reading a line of `size` samples through a zoomed and shifted window.

    Args:
        scale: (K,), distance between two samples read; below 1 enlarges, negative mirrors.
        shift: (K,), in samples.
    """
    centre = (size - 1) / 2
    offset = torch.arange(size, device=scale.device, dtype=scale.dtype) - centre
    return interpolation_matrix(centre + scale[:, None] * offset + shift[:, None], size)


def frame_matrices(height, width, num_frames, channels, *, device=None, dtype=torch.float32):
    """Returns rows (T, H, H), columns (T, W, W), contrast (T, C) and grey (T, C).

    Frame t of channel c of an image x is (contrast[t, c] * rows[t]) @ x[c] @ columns[t].T + grey[t, c]. No row of a matrix
    has more than two entries that are not zero. Frame 0 is the image: its matrices are identities. Transparency only moves.
    """
    time = torch.arange(num_frames, device=device, dtype=dtype) / max(num_frames - 1, 1)
    shrink = 1 / (1 + ZOOM * time)
    rows, columns = (window_matrix(size, shrink, drift * (size - 1) / 2 * (1 - shrink) * time)
                     for size, drift in ((height, -0.5), (width, 1.0)))
    fade = FADE * time[:, None] * (torch.arange(channels, device=device) < 3)
    # A grey strictly between 0 and 1 leaves room for rounding.
    return rows, columns, 1 - fade, fade * (0.5 + 0.45 * torch.sin(2 * torch.pi * time[:, None]))


def synthetic_video(images, num_frames=16):
    """Returns a video whose first frame is the image and whose others zoom in, drift and fade a little more each.

    Every frame is a fixed, smooth function of the one image: it is read at a zoom and a shift that grow with the frame
    index, and mixed with a grey level that rises from mid grey to white, sinks to black and returns; transparency is only
    moved. A network that takes the video gets the image at T gains and offsets, and only as much motion as zoom and shift
    make. Frames of float32 and float64 are weighted means of values in [0, 1] and stay there without clamping, which would
    stop the gradient.

    Args:
        images: (N, C, H, W) float in [0, 1].
        num_frames: T, at least 1.

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
    channels, height, width = images.shape[1:]
    exact = torch.promote_types(images.dtype, torch.float32)
    rows, columns, contrast, grey = frame_matrices(height, width, num_frames, channels, device=images.device, dtype=exact)
    columns = columns[1:].transpose(1, 2).to(images.dtype)
    parts = []
    for part, channel in zip(images.split(3, dim=1), range(0, channels, 3), strict=True):  # colours; transparency
        # Two matrix products in the order of axes that needs no copy between them.
        faded = (contrast[1:, channel, None, None] * rows[1:]).to(images.dtype)
        moved = faded.flatten(0, 1) @ part.permute(2, 0, 1, 3).flatten(1)
        moved = moved.view(num_frames - 1, height * images.shape[0] * part.shape[1], width) @ columns
        moved = moved.unflatten(1, (height, *part.shape[:2])).permute(2, 0, 3, 1, 4)
        parts.append(moved + grey[1:, channel, None, None, None].to(images.dtype))
    moved = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return torch.cat([images.unsqueeze(1), moved], dim=1)
