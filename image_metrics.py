"""Metrics of generated images, as pure functions. Only inception_distances needs a pretrained network.

Notation as in model_definitions.py: two sets of images (M, C, H, W) and (N, C, H, W) in [0, 1].
"""
import math
from urllib.error import URLError

import torch
from torch.nn import functional as F

from model_definitions import finest_octave
from pictures import on_white

SMALLEST_LEVEL = 16  # pixels a side of the coarsest level of the pyramid
PATCH = 7  # pixels a side
PATCHES_PER_IMAGE = 64
DIRECTIONS, DIRECTIONS_AT_A_TIME = 512, 64
KID_SUBSET = 1_000  # images, as is usual, or as many as there are
CHUNK = 1_000  # images compared at a time
MOST_PAIRED = 4_000  # images of which each is compared with each
ALARM = 0.5  # of what real images have: less diversity is a collapse, less distance to training images is copying
CORRELATION_OF_ALL_DETAIL = 0.3  # of the finest octave of reconstructions with that of images; see detail_worth_drawing
THUMBNAIL = 16  # pixels a side; whole images are compared at this size, without their texture


def patches(images, *, generator, per_image=PATCHES_PER_IMAGE):
    """Returns patches of 7 x 7 pixels taken at random from each level of a Laplacian pyramid of the images.

    The finest level judges texture; the coarsest, of 16 pixels, layout.

    Args:
        images: (N, C, H, W) in [0, 1].
        generator: a CPU torch.Generator, for their places.
        per_image: how many of each image.

    Returns:
        A dict of pixels on the shorter side to (N * per_image, C, 49), from the finest level on.
    """
    numbers = torch.arange(len(images)).repeat_interleave(per_image)
    found = {}
    for level in _laplacian_pyramid(images):
        rows, columns = (torch.randint(side - PATCH + 1, numbers.shape, generator=generator) for side in level.shape[-2:])
        found[min(level.shape[-2:])] = level.unfold(2, PATCH, 1).unfold(3, PATCH, 1)[numbers, :, rows, columns].flatten(2)
    return found


def _laplacian_pyramid(images):
    """The detail lost by each halving of the images, from the finest level on, then the smallest images themselves."""
    levels = []
    while min(images.shape[-2:]) > SMALLEST_LEVEL:
        smaller = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
        levels.append(images - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        images = smaller
    return [*levels, images]


def sliced_wasserstein(real, fake, *, generator):
    """Returns the distance between the patches of two sets at each scale: a dict of pixels on the shorter side to distance x
    1000.

    Patches are scaled by the mean and deviation that each channel has in the real set, and compared along random directions.
    The distance between two halves of one set is the noise floor at that number of images: compare distances only at equal
    numbers. There is no upper bound.

    Args:
        real, fake: what `patches` returns, as many patches in one as in the other.
        generator: a CPU torch.Generator, for the directions.

    Source: Karras et al. 2018 (arXiv:1710.10196), section 5, but both sets are scaled by the statistics of the real one.
    Scaling each set by its own hides a difference in contrast or tint.
    """
    distances = {}
    for side, real_patches in real.items():
        mean = real_patches.mean(dim=(0, 2), keepdim=True)
        deviation = real_patches.std(dim=(0, 2), keepdim=True).clamp(min=1 / 255)
        one, other = (((part - mean) / deviation).flatten(1) for part in (real_patches, fake[side]))
        directions = F.normalize(torch.randn(one.shape[1], DIRECTIONS, generator=generator), dim=0)
        parts = [((one @ some).sort(dim=0).values - (other @ some).sort(dim=0).values).abs().mean()
                 for some in directions.split(DIRECTIONS_AT_A_TIME, dim=1)]
        distances[side] = 1000 * torch.stack(parts).mean().item()
    return distances


def thumbnails(images):
    """Returns images reduced to THUMBNAIL pixels a side, as vectors (N, C * THUMBNAIL**2)."""
    return F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True).flatten(1)


def diversity(small):
    """Returns the mean distance between two different thumbnails (N, D) of a set, root mean square over D.

    Of more than 4,000 thumbnails, as many evenly spaced ones are taken.
    """
    small = small[::-(-len(small) // MOST_PAIRED)]
    return (torch.pdist(small).mean() / small.shape[1] ** 0.5).item()


def nearest_distance(small, others, *, rank=1):
    """Returns the median over thumbnails (N, D) of the distance to the nearest of others (M, D), root mean square over D.

    Args:
        small: (N, D).
        others: (M, D).
        rank: 2 takes the second nearest, for images that are themselves among the others.
    """
    nearest = [_nearest(part, others, rank) for part in small.split(CHUNK)]
    return (torch.cat(nearest).median() / small.shape[1] ** 0.5).item()


def _nearest(small, others, rank):
    """The distance of each of a few thumbnails to the nearest of others, (N,), without the whole (N, M) matrix."""
    nearest = torch.full((len(small), rank), torch.inf)
    for part in others.split(CHUNK):
        nearest = torch.cat([nearest, torch.cdist(small, part)], dim=1).topk(rank, dim=1, largest=False).values
    return nearest.amax(dim=1)


def alarms(metrics):
    """Returns a line for each of the metrics of evaluate.evaluate, or some of them, that shows a failure."""
    lines = []
    for name, within in [(None, metrics), *metrics.get("classes", {}).items()]:
        what = "generated images" if name is None else f"generated images of class {name!r}"
        help = "" if name is None else "; beginning with a run without classes, --initial-checkpoint, may help"
        if within.get("diversity", 1) < ALARM * within.get("diversity_real", 0):
            lines.append(f"collapse: {what} are less than half as different from each other as real ones are{help}")
        if within["nearest_training_image"] < ALARM * within["nearest_training_image_real"] < math.inf:
            lines.append(f"copying: {what} are less than half as far from training images as new real ones are")
    return lines


def reconstruction_errors(vae, images):
    """Returns the mean absolute difference of each image to what the VAE makes of its mean latent vector, (N,) in [0, 1].

    Transparency is laid on white.
    """
    return (on_white(vae.decode(vae.encode(images)[0])) - on_white(images)).abs().mean(dim=(1, 2, 3))


def detail_worth_drawing(real, again):
    """Returns VAE.detail, from 0 to 1: how right the finest octave of reconstructions is.

    It is the correlation of the finest octaves of images and reconstructions, divided by CORRELATION_OF_ALL_DETAIL. A
    generator learns early how strong detail is, and late where it belongs. In the wrong places it looks like a fabric over
    the image, and worse than none. Figures: docs/experiments.md.

    Args:
        real, again: images and their reconstructions (N, C, H, W) in [0, 1]. What is invisible in them does not count.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # one by one, because in float64 all of them can take gigabytes
    for pair in zip(real, again, strict=True):
        one, other = (finest_octave(_visible(image)).flatten().double() for image in pair)
        sums += torch.stack([one @ other, one @ one, other @ other])
    correlation = (sums[0] / (sums[1] * sums[2]).sqrt().clamp(min=1e-12)).item()
    return min(1.0, max(0.0, correlation / CORRELATION_OF_ALL_DETAIL))  # in this order NaN gives 0


def _visible(image):
    """An image (C, H, W), with transparency its colours times opacity, and opacity: laid on white, white would be lost."""
    return torch.cat([image[:3] * image[3:], image[3:]]) if len(image) == 4 else image


def inception_distances(real, fake, device):
    """Returns FID and KID x 1000, in the features of the Inception network that papers use, fetched at the first call.

    FID falls with the number of images, KID does not: compare FID only at equal numbers of images (papers often use 50,000).
    torch-fidelity enlarges them to 299 px.

    Args:
        real, fake: data sets of at least 2 uint8 images (3, H, W) each.
        device: where to compute, CUDA or CPU.

    Raises:
        ModuleNotFoundError: torch-fidelity is not installed.
        OSError: the network cannot be fetched.

    Source: Heusel et al. 2017 (arXiv:1706.08500), Binkowski et al. 2018 (arXiv:1801.01401).
    """
    from torch_fidelity import calculate_metrics  # an optional package

    try:
        found = calculate_metrics(input1=fake, input2=real, fid=True, kid=True,
                                  kid_subset_size=min(KID_SUBSET, len(real), len(fake)), cuda=device.type == "cuda",
                                  cache=False, save_cpu_ram=True, verbose=False)  # save_cpu_ram: no worker processes
    except URLError as error:
        raise OSError(f"the Inception network cannot be fetched: {error.reason}") from None
    return {"frechet_inception_distance": found["frechet_inception_distance"],
            "kernel_inception_distance": 1000 * found["kernel_inception_distance_mean"]}

