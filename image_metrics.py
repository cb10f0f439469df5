"""Metrics of generated images, as pure functions. Only inception_distances needs a pretrained network.

Notation as in model_definitions.py: two sets of images (M, C, H, W) and (N, C, H, W) in [0, 1].
"""
from urllib.error import URLError

import torch
from torch.nn import functional as F
from torch.utils.data import Subset

from pictures import on_white

SMALLEST_LEVEL = 16  # pixels a side of the coarsest level of the pyramid
PATCH = 7  # pixels a side
PATCHES_PER_IMAGE = 64
DIRECTIONS = 512
KID_SUBSET = 1_000  # images, as is usual, or as many as there are
CHUNK = 1_000  # images compared at a time
THUMBNAIL = 16  # pixels a side; whole images are compared at this size, without their texture


def sliced_wasserstein(real, fake, *, generator):
    """Returns the distance between the patches of two sets at each scale: a dict of pixels on the shorter side to distance x
    1000.

    Patches of 7 x 7 pixels are taken at random from a Laplacian pyramid, scaled by the mean and deviation that each channel
    has in the real set, and compared along random directions. The finest level judges texture; the coarsest, of 16 pixels,
    layout. The distance between two halves of one set is the noise floor at that number of images: compare distances only at
    equal numbers. There is no upper bound.

    Args:
        real, fake: as many images in one as in the other.
        generator: a CPU torch.Generator, for patches and directions.

    Source: Karras et al. 2018 (arXiv:1710.10196), section 5, but both sets are scaled by the statistics of the real one.
    Scaling each set by its own hides a difference in contrast or tint.
    """
    distances = {}
    for real_level, fake_level in zip(_laplacian_pyramid(real), _laplacian_pyramid(fake), strict=True):
        real_patches, fake_patches = (_patches(level, generator) for level in (real_level, fake_level))
        mean = real_patches.mean(dim=(0, 2), keepdim=True)
        deviation = real_patches.std(dim=(0, 2), keepdim=True).clamp(min=1 / 255)
        directions = F.normalize(torch.randn(real_patches[0].numel(), DIRECTIONS, generator=generator), dim=0)
        one, other = (((patches - mean) / deviation).flatten(1).matmul(directions).sort(dim=0).values
                      for patches in (real_patches, fake_patches))
        distances[min(real_level.shape[-2:])] = 1000 * (one - other).abs().mean().item()
    return distances


def _laplacian_pyramid(images):
    """The detail lost by each halving of the images, from the finest level on, then the smallest images themselves."""
    levels = []
    while min(images.shape[-2:]) > SMALLEST_LEVEL:
        smaller = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
        levels.append(images - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        images = smaller
    return [*levels, images]


def _patches(images, generator):
    """(N * PATCHES_PER_IMAGE, C, PATCH * PATCH)"""
    count = len(images) * PATCHES_PER_IMAGE
    rows, columns = (torch.randint(side - PATCH + 1, (count,), generator=generator) for side in images.shape[-2:])
    numbers = torch.arange(len(images)).repeat_interleave(PATCHES_PER_IMAGE)
    return images.unfold(2, PATCH, 1).unfold(3, PATCH, 1)[numbers, :, rows, columns].flatten(2)


def thumbnails(images):
    """Returns images reduced to THUMBNAIL pixels a side, as vectors (N, C * THUMBNAIL**2)."""
    return F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True).flatten(1)


def diversity(small):
    """Returns the mean distance between two different thumbnails (N, D) of a set, root mean square over D."""
    return (torch.pdist(small).mean() / small.shape[1] ** 0.5).item()


def nearest_distance(small, others, *, rank=1):
    """Returns the median over thumbnails (N, D) of the distance to the nearest of others (M, D), root mean square over D.

    Args:
        small: (N, D).
        others: (M, D).
        rank: 2 takes the second nearest, for images that are themselves among the others.
    """
    nearest = torch.full((len(small), rank), torch.inf)
    for part in others.split(CHUNK):  # so that no (N, M) matrix is made
        nearest = torch.cat([nearest, torch.cdist(small, part)], dim=1).topk(rank, dim=1, largest=False).values
    return (nearest.amax(dim=1).median() / small.shape[1] ** 0.5).item()


def reconstruction_error(vae, images):
    """Returns the mean absolute difference between images and what the VAE makes of their mean latent vectors, in [0, 1].

    Transparency is laid on white.
    """
    errors = [(on_white(vae.decode(vae.encode(image)[0])) - on_white(image)).abs().mean() for image in images.split(1)]
    return torch.stack(errors).mean().item()


def inception_distances(real, fake, device):
    """Returns FID and KID x 1000, in the features of the Inception network that papers use, fetched at the first call.

    FID falls with the number of images, KID does not: compare FID only at equal numbers of images (papers often use 50,000).
    Images are rounded to 8 bits; torch-fidelity enlarges them to 299 px.

    Args:
        real, fake: at least 2 images each.
        device: where to compute, CUDA or CPU.

    Raises:
        ModuleNotFoundError: torch-fidelity is not installed.
        OSError: the network cannot be fetched.

    Source: Heusel et al. 2017 (arXiv:1706.08500), Binkowski et al. 2018 (arXiv:1801.01401).
    """
    from torch_fidelity import calculate_metrics  # an optional package

    try:
        found = calculate_metrics(input1=_as_dataset(fake), input2=_as_dataset(real), fid=True, kid=True,
                                  kid_subset_size=min(KID_SUBSET, len(real), len(fake)), cuda=device.type == "cuda",
                                  cache=False, save_cpu_ram=True, verbose=False)  # save_cpu_ram: no worker processes
    except URLError as error:
        raise OSError(f"the Inception network cannot be fetched: {error.reason}") from None
    return {"frechet_inception_distance": found["frechet_inception_distance"],
            "kernel_inception_distance": 1000 * found["kernel_inception_distance_mean"]}


def _as_dataset(images):
    return Subset((255 * images).round().to(torch.uint8).expand(-1, 3, -1, -1), range(len(images)))
