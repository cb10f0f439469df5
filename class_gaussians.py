"""Draws images of one class from a generator that was trained without classes: by the latent vectors of that class's images.

The encoder gives each image a distribution of latent vectors, N(mu, sigma^2). Those of all images of a class together have
a mean and a covariance, and a Gaussian with these is drawn from. Notation as in model_definitions.py; K classes.
"""
import difflib
import unicodedata
from typing import NamedTuple

import torch
from tqdm import tqdm

from console import LISTED, listed
from image_data import as_float_images
from image_files import DataError

AT_A_TIME = 64  # images that are encoded together
HELD_BACK = 5  # one of so many images of a class is held back to learn whether the Gaussians know its class
UNSURE = 0.5  # share of the images of a class that are recognised, below which there is a warning


class ClassGaussian(NamedTuple):
    """The latent vectors of a class: mean + root @ noise, for standard normal noise.

    Those of a generator that has learned classes have the unit matrix as their root.
    """

    name: str
    row: int  # number of the class in the sorted list of all
    mean: torch.Tensor  # (Z,)
    root: torch.Tensor  # (Z, Z), of the covariance

    def draw(self, noise):
        """Returns latent vectors (N, Z) for standard normal noise (N, Z). Float64 is for the CPU: mps has none."""
        return (self.mean + noise.cpu().double() @ self.root.T).to(noise.dtype).to(noise.device)


def class_gaussians(vae, data, wanted, *, report):
    """Returns the ClassGaussian of each class asked for.

    Args:
        vae: as checkpointing.load_generator returns it.
        data: an image_data.ImageSet of a folder, prepared as the training images.
        wanted: names of classes, or ["all"]; see find_class.
        report: called with a line that says how far the Gaussians tell the classes apart, and with warnings.

    Raises:
        DataError: the folder has no classes, or not those asked for; the message names some that it has.
    """
    names = sorted(set(data.classes) - {""})
    if len(names) < 2:
        raise DataError(f"--class: {data.folder} has {'one class' if names else 'no class folders'}; images in folders "
                        "below it, one for each class, are needed")
    rows = _rows(wanted, names)
    labels = torch.tensor([names.index(name) if name else -1 for name in data.classes])
    kept = (labels >= 0).nonzero()[:, 0]
    mu, variance = _encoded(vae, data.images, kept)
    labels = labels[kept]
    _report_recognition(mu, variance, labels, names, report)
    means, roots = _fitted(mu, variance, labels, len(names))
    return [ClassGaussian(names[row], row, means[row], roots[row]) for row in rows]


def learned_classes(vae, wanted):
    """Returns the ClassGaussian of each class asked for, for a VAE that has learned classes; see class_gaussians."""
    rows, root = list(_rows(wanted, vae.class_names)), torch.eye(vae.latent_dim, dtype=torch.float64)
    means = vae.class_latents(torch.tensor(rows, device=vae.mu.weight.device)).detach().cpu().double()
    return [ClassGaussian(vae.class_names[row], row, mean, root) for row, mean in zip(rows, means, strict=True)]


def _rows(wanted, names):
    return range(len(names)) if wanted == ["all"] and "all" not in names else [find_class(name, names) for name in wanted]


def find_class(name, names):
    """Returns the number of a class by its name: exactly, else by another form of its Unicode letters, else by its case.

    Raises:
        DataError: no class, or more than one, has that name; the message lists the nearest.
    """
    def composed(text):
        return unicodedata.normalize("NFC", text)

    for form in (str, composed, lambda text: composed(text).casefold()):
        same = [row for row, other in enumerate(names) if form(other) == form(name)]
        if len(same) == 1:
            return same[0]
        if same:
            alike = len({composed(names[row]) for row in same}) < len(same)  # on the screen
            shown = map(ascii if alike else repr, (names[row] for row in same))
            raise DataError(f"--class: {name!r} may be {' or '.join(shown)}")
    near = difflib.get_close_matches(name, names, LISTED, 0.5)
    raise DataError(f"--class: there is no class {name!r}; there are "
                    f"{listed(map(repr, near + [other for other in names if other not in near]))}")


@torch.no_grad()
def _encoded(vae, images, indices):
    """Returns mu and sigma^2 (M, Z) of images, in float64 on the CPU."""
    device, parts = vae.mu.weight.device, []
    for part in tqdm(indices.split(AT_A_TIME), desc="encoding", leave=False, disable=None):
        mu, logvar = vae.encode(as_float_images(images, part, device))
        parts.append((mu.cpu().double(), logvar.cpu().double().exp()))
    return (torch.cat(rows) for rows in zip(*parts, strict=True))


def _fitted(mu, variance, labels, num_classes):
    """Returns means (K, Z) and roots (K, Z, Z).

    A covariance of few images has directions without width, so it is mixed with that of all images around their classes'
    means, in a share of Z / (Z + number of images).
    """
    latent_dim, spread = mu.shape[1], torch.zeros(mu.shape[1], mu.shape[1], dtype=mu.dtype)
    means, covariances, counts = [], [], []
    for label in range(num_classes):
        rows, noise = mu[labels == label], variance[labels == label]
        mean = rows.mean(dim=0) if len(rows) else mu.mean(dim=0)
        about = rows - mean
        covariance = about.T @ about + noise.sum(dim=0).diag()
        spread += covariance
        means.append(mean)
        covariances.append(covariance / max(1, len(rows)))
        counts.append(len(rows))
    share = [latent_dim / (latent_dim + count) for count in counts]
    mixed = torch.stack([(1 - part) * own + part * spread / len(mu) for part, own in zip(share, covariances, strict=True)])
    return torch.stack(means), torch.linalg.cholesky(mixed)


def _report_recognition(mu, variance, labels, names, report):
    """Says how often Gaussians of a part of the images find the class of the others."""
    place = torch.zeros_like(labels)  # of an image in its class
    for label in range(len(names)):
        place[labels == label] = torch.arange((labels == label).sum().item())
    held = place % HELD_BACK == HELD_BACK - 1
    if not held.any():
        report(f"note: with fewer than {HELD_BACK} images in each class it cannot be tried whether the Gaussians know them")
        return
    gaussians = zip(*_fitted(mu[~held], variance[~held], labels[~held], len(names)), strict=True)
    right = torch.stack([_log_densities(mu[held], *gaussian) for gaussian in gaussians]).argmax(dim=0) == labels[held]
    shares = {names[label]: right[labels[held] == label].double().mean().item()
              for label in labels[held].unique().tolist()}
    report(f"the Gaussians find the class of {right.double().mean().item():.0%} of {held.sum().item()} images held back; by "
           f"chance it would be {1 / len(names):.0%}")
    unsure = sorted((name for name, share in shares.items() if share < UNSURE), key=shares.get)
    if unsure:
        report(f"warning: they do not know {listed(f'{name} {shares[name]:.0%}' for name in unsure)}: images of these may "
               "show other classes")


def _log_densities(z, mean, root):
    """Returns the logarithms of the density at z (N, Z), up to a constant."""
    scaled = torch.linalg.solve_triangular(root, (z - mean).T, upper=False)
    return -scaled.square().sum(dim=0) / 2 - root.diagonal().log().sum()
