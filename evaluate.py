"""Metrics of a generator: python evaluate.py runs/images --data ./images"""
import argparse
import dataclasses
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import image_metrics
from checkpointing import CheckpointError, load_generator, preparation_of
from config import DEVICE, DEVICES, Settings, add_options, missing_package, option, source_and_options
from console import listed, print_error, program_output, say
from devices import DeviceError, lack_of_memory_said, limit_threads, pick_device, usual_settings
from image_data import DataError, as_float_images, load_images
from image_sizes import plain_size
from pictures import on_white
from randomness import drawn_labels, latent_noise, random_generator

BATCH = 16
MOST_PATCHES = 2**16  # of a half at each scale: with more than 1,024 images in it, each gives fewer
CLASS_WITH_PATCHES = 200  # images of a class, from which its patches are compared and it stands in the table
FEWEST_GENERATED = 16  # images of a class, however few real ones it has
MINIMUM_IMAGES = 4  # two halves of two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What evaluate.py can be told."""

    data: str | None = option(None, "what", "folder of the images it was trained on", metavar="DIR")
    held_out: str | None = option(None, "what", "folder of images of the same kind that it was not trained on",
                                  metavar="DIR")
    num_images: int = option(1_000, "what", "images of each kind compared, or as many as there are", metavar="N",
                             minimum=MINIMUM_IMAGES)
    inception: bool = option(False, "what", "FID and KID too, by torch-fidelity, which has to be installed and fetches a "
                                            "network of 95 MB once")
    video_fps: float | None = option(None, "how", "as for training.py", metavar="N", above=0)
    seed: int = option(0, "how", "of the generated images", metavar="S", minimum=0)
    json: bool = option(False, "how", "print one line of JSON instead of a table")
    skip_bad: bool = option(False, "how", "go on without the files that cannot be read")
    cache_dir: str = option("cache", "how", "where decoded images are kept", metavar="DIR")
    device: str = option("auto", "how", "where to compute; auto: CUDA or the CPU", choices=DEVICES, metavar=DEVICE)

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        faults = [] if self.data else ["--data: name the folder of images that it was trained on"]
        return faults + missing_package(self.inception, "--inception", "torch_fidelity", "torch-fidelity") + super().faults()


@usual_settings()
@torch.no_grad()
def evaluate(vae, options):
    """Returns the metrics of a VAE as a dict of plain values; those whose names end in "_real" are of real images alone.

    Distances between sets depend on their size. So generated and real images are compared with the same half of the real
    images, by as many: the other half of the real ones, and as many generated ones. Transparency is laid on white. Images
    are in memory some at a time.

    For a VAE that has learned classes, "classes" has such a dict for each class of which the folder has images.

    Args:
        vae: on the device to compute on.
        options: Options.

    Raises:
        ValueError: a setting that cannot work.
        DataError: the images cannot be read, or are too few.
        CheckpointError: what is generated is not finite.
        OSError: --inception, and the network cannot be fetched.
    """
    options.check()
    training = _load(options.data, vae, options)
    if len(training.images) < MINIMUM_IMAGES:
        raise DataError(f"{options.data}: at least {MINIMUM_IMAGES} images are needed, it has {len(training.images)}")
    held_out = _load(options.held_out, vae, options) if options.held_out else None
    chosen = _evenly_spaced(range(len(training.images)), options.num_images)
    real, fake = _real(training, chosen), _generated(vae, len(chosen), options)
    known = _thumbnails(_real(training, range(len(training.images))), "training images")
    metrics = {"num_images": real.count, "image_size": plain_size(tuple(vae.image_shape[1:]))}
    metrics |= _compared(real, fake, known, _new(held_out, options), options.seed, patches=True)
    if options.inception:
        metrics |= image_metrics.inception_distances(_Pictures(real), _Pictures(fake), vae.mu.weight.device)
    images, new = (training.images, chosen) if held_out is None else (
        held_out.images, _evenly_spaced(range(len(held_out.images)), options.num_images))
    total = 0.0  # a list of small tensors would keep the memory between them from being used again
    for part in tqdm(torch.tensor(new).split(BATCH), desc="reconstructing", leave=False, disable=None):
        part_images = as_float_images(images, part, vae.mu.weight.device)
        total += image_metrics.reconstruction_errors(vae, part_images).sum().item()
    metrics["reconstruction_error"] = total / len(new)
    if names := getattr(vae, "class_names", ()):
        metrics["classes"] = _classes(vae, names, training, held_out, known, options)
    return metrics


class _Images(NamedTuple):
    """A set of images that are made when they are needed."""

    count: int
    of: Callable  # from some of range(count), a tensor, to images (n, 1 or 3, H, W) in [0, 1] on the CPU


def _real(data, chosen):
    rows = torch.tensor(chosen)
    return _Images(len(rows), lambda some: on_white(as_float_images(data.images, rows[some], torch.device("cpu"))))


def _generated(vae, count, options, *, label=None):
    """Images 0 to count - 1 of the seed, of one class, or of all of them as often as they are among training images."""
    z = latent_noise(options.seed, range(count), vae.latent_dim).to(vae.mu.weight.device)
    if len(counts := getattr(vae, "class_counts", ())):
        y = drawn_labels(options.seed, range(count), counts) if label is None else torch.full((count,), label)
        z = z + vae.class_latents(y.to(z.device))

    def images_of(some):
        images = on_white(vae.decode(z[some.to(z.device)]).cpu())
        if not images.isfinite().all():
            raise CheckpointError("the generated images are not finite")
        return images
    return _Images(count, images_of)


def _new(held_out, options, name=None):
    """The held-out images, of one class or all of them; None where there are none."""
    rows = [] if held_out is None else [row for row, of in enumerate(held_out.classes) if name in (None, of)]
    return _real(held_out, _evenly_spaced(rows, options.num_images)) if rows else None


def _evenly_spaced(rows, count):
    """Returns `count` of a sequence, or all where there are fewer, as a list."""
    return [rows[place] for place in torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().tolist()]


def _compared(real, fake, known, new, seed, *, patches):
    """Returns the metrics of two _Images.

    Args:
        known: thumbnails of all training images.
        new: _Images that it was not trained on, or None.
        patches: whether patches are compared too.
    """
    metrics, pairs = {}, min(real.count, fake.count) // 2 if patches else 0
    (small_real, one, other), (small_fake, _, generated) = (
        _described(images, pairs, random_generator(seed, "patches"), name)
        for images, name in ((real, "real images"), (fake, "generated images")))
    for name, compared in (("", generated), ("_real", other)):
        distances = image_metrics.sliced_wasserstein(one, compared, generator=random_generator(seed, "directions"))
        metrics |= {f"sliced_wasserstein_{side}px{name}": distance for side, distance in distances.items()}
    nearest = {"": (small_fake, 1), "_real": (small_real, 2) if new is None else (_thumbnails(new, "new images"), 1)}
    for name, small in (("", small_fake), ("_real", small_real)):
        if len(small_real) > 1:
            metrics[f"diversity{name}"] = image_metrics.diversity(small)
    return metrics | {f"nearest_training_image{name}": image_metrics.nearest_distance(small, known, rank=rank)
                      for name, (small, rank) in nearest.items()}


def _described(images, pairs, generator, label):
    """Returns the thumbnails of _Images, and patches of so many even and so many odd ones, the first."""
    small, even, odd = {}, {}, {}
    per_image = max(1, min(image_metrics.PATCHES_PER_IMAGE, MOST_PATCHES // max(1, pairs)))
    for some in tqdm(torch.arange(images.count).split(BATCH), desc=label, leave=False, disable=None):
        part, start = images.of(some), some[0].item()
        _fill(small, None, images.count, start, image_metrics.thumbnails(part))
        for found, first in ((even, 0), (odd, 1)):  # BATCH is even
            chosen = part[first::2][:max(0, pairs - start // 2)]
            if len(chosen):
                for side, patches in image_metrics.patches(chosen, generator=generator, per_image=per_image).items():
                    _fill(found, side, pairs * per_image, start // 2 * per_image, patches)
    return small[None], even, odd


def _fill(found, key, length, start, rows):
    """Puts rows in their place in a tensor of full length. A list of parts, joined at the end, would need twice as much."""
    if key not in found:
        found[key] = torch.empty(length, *rows.shape[1:])
    found[key][start:start + len(rows)] = rows


def _thumbnails(images, label):
    return _described(images, 0, None, label)[0]


def _classes(vae, names, training, held_out, known, options):
    """Returns the metrics within each class, by its name."""
    rows, found = defaultdict(list), {}
    for row, name in enumerate(training.classes):
        rows[name].append(row)
    for label, name in enumerate(names):
        if name in rows:
            real = _real(training, _evenly_spaced(rows[name], options.num_images))
            fake = _generated(vae, max(real.count, FEWEST_GENERATED), options, label=label)
            found[name] = {"num_images": real.count} | _compared(
                real, fake, known, _new(held_out, options, name), options.seed, patches=real.count >= CLASS_WITH_PATCHES)
    if unknown := sorted(rows.keys() - set(names)):
        print_error(f"note: the generator has no class {listed(map(repr, unknown))}")
    return found


class _Pictures(Dataset):
    """_Images as uint8 (3, H, W), for torch-fidelity."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return self.images.count

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Returns a list of several, which a DataLoader asks for together."""
        parts = [self.images.of(part) for part in torch.tensor(indices).split(BATCH)]
        return list((255 * torch.cat(parts)).round().to(torch.uint8).expand(-1, 3, -1, -1))


def _load(folder, vae, options):
    """Returns the ImageSet of a folder, prepared as the images that the VAE was trained on."""
    return load_images(folder, vae.image_shape[1:], cache_dir=options.cache_dir, skip_bad=options.skip_bad,
                       video_fps=options.video_fps, **preparation_of(vae))


def table(metrics):
    """Returns the metrics as text, those of generated beside those of real images."""
    lines = [f"{'':32}{'generated':>12}{'real':>12}"]
    for name, value in metrics.items():
        if isinstance(value, float) and not name.endswith("_real"):
            real = metrics.get(f"{name}_real")
            lines.append(f"{name:32}{value:12.3g}" + ("" if real is None else f"{real:12.3g}"))
    classes = {name: within for name, within in metrics.get("classes", {}).items()
               if within["num_images"] >= CLASS_WITH_PATCHES}
    if classes:
        width = max(map(len, ("class", *classes)))
        columns = ("sliced_wasserstein", "diversity", "nearest_training_image")
        lines += ["", f"{'class':{width}}{'images':>8}" + "".join(f"{name:>24}{'real':>8}" for name in columns)]
    for name, within in classes.items():
        lines.append(f"{name:{width}}{within['num_images']:8}" + "".join(
            f"{_mean(within, column, real=False):24.3g}{_mean(within, column, real=True):8.3g}" for column in columns))
    return "\n".join([*lines, *image_metrics.alarms(metrics)])


def _mean(metrics, start, *, real):
    return statistics.mean(value for name, value in metrics.items()
                           if name.startswith(start) and name.endswith("_real") == real)


def parser():
    """Returns the argparse parser of evaluate.py."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", usage="evaluate.py RUN_OR_CHECKPOINT --data DIR [options]", allow_abbrev=False,
        description="How near generated images are to real ones, at each scale; how different from each other; whether they "
                    "are copies. The column of real images compares one half of them with the other.")
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder of training.py, or a checkpoint")
    add_options(parser, Options)
    return parser


def main(arguments=None):
    source, options = source_and_options(parser(), Options, arguments)
    with program_output():
        try:
            limit_threads()
            with lack_of_memory_said(lambda: f"--num-images {options.num_images}", "Fewer, or --device cpu, need less"):
                vae = load_generator(source, report=print_error).to(pick_device(options.device))
                metrics = evaluate(vae, options)
        except (CheckpointError, DataError, DeviceError, OSError) as error:
            print_error(str(error))
            return 2
        say(json.dumps(metrics) if options.json else table(metrics))
        return 0


if __name__ == "__main__":
    sys.exit(main())
