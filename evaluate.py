"""Metrics of a generator: python evaluate.py runs/images --data ./images"""
import argparse
import dataclasses
import json
import sys

import torch
from tqdm import tqdm

import image_metrics
from checkpointing import CheckpointError, load_generator, preparation_of
from config import DEVICES, Settings, add_options, missing_package, option, source_and_options
from console import print_error, program_output, say
from devices import DeviceError, limit_threads, pick_device
from image_data import DataError, evenly_spaced, load_images
from image_sizes import plain_size
from pictures import on_white
from randomness import drawn_labels, latent_noise, random_generator

BATCH = 16
MINIMUM_IMAGES = 4  # two halves of two
ALARM = 0.5  # of what real images have: less diversity is a collapse, less distance to training images is copying


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
    device: str = option("auto", "how", "where to compute", choices=DEVICES)

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        faults = [] if self.data else ["--data: name the folder of images that it was trained on"]
        return faults + missing_package(self.inception, "--inception", "torch_fidelity", "torch-fidelity") + super().faults()


@torch.no_grad()
def evaluate(vae, options):
    """Returns the metrics of a VAE as a dict of plain values; those whose names end in "_real" are of real images alone.

    Distances between sets depend on their size. So generated and real images are compared with the same half of the real
    images, by as many: the other half of the real ones, and as many generated ones. Transparency is laid on white.

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
    if len(training) < MINIMUM_IMAGES:
        raise DataError(f"{options.data}: at least {MINIMUM_IMAGES} images are needed, it has {len(training)}")
    reals = evenly_spaced(training, options.num_images)
    real = on_white(reals)
    device = vae.mu.weight.device
    z = latent_noise(options.seed, range(len(real)), vae.latent_dim).to(device)
    if len(counts := getattr(vae, "class_counts", ())):
        z = z + vae.class_latents(drawn_labels(options.seed, range(len(real)), counts).to(device))
    fake = torch.cat([on_white(vae.decode(part).cpu()) for part in tqdm(z.split(BATCH), desc="generating", disable=None)])
    if not fake.isfinite().all():
        raise CheckpointError("the generated images are not finite")
    half = len(real) // 2
    metrics = {"num_images": len(real), "image_size": plain_size(tuple(real.shape[-2:]))}
    for name, other in (("", fake), ("_real", real)):
        distances = image_metrics.sliced_wasserstein(real[:2 * half:2], other[1:2 * half:2],
                                                     generator=random_generator(options.seed, "patches"))
        metrics |= {f"sliced_wasserstein_{side}px{name}": distance for side, distance in distances.items()}
    known = torch.cat([image_metrics.thumbnails(on_white(evenly_spaced(part, len(part)))) for part in training.split(1_000)])
    unseen = evenly_spaced(_load(options.held_out, vae, options), options.num_images) if options.held_out else None
    new = reals if unseen is None else unseen
    small_real, small_fake = image_metrics.thumbnails(real), image_metrics.thumbnails(fake)
    metrics |= {
        "diversity": image_metrics.diversity(small_fake),
        "diversity_real": image_metrics.diversity(small_real),
        "nearest_training_image": image_metrics.nearest_distance(small_fake, known),
        "nearest_training_image_real": (image_metrics.nearest_distance(small_real, known, rank=2) if unseen is None
                                        else image_metrics.nearest_distance(image_metrics.thumbnails(on_white(new)), known)),
        "reconstruction_error": image_metrics.reconstruction_error(vae, new.to(device)),
    }
    return metrics | image_metrics.inception_distances(real, fake, device) if options.inception else metrics


def _load(folder, vae, options):
    """Returns the images of a folder, prepared as those that the VAE was trained on."""
    return load_images(folder, vae.image_shape[1:], cache_dir=options.cache_dir, skip_bad=options.skip_bad,
                       video_fps=options.video_fps, **preparation_of(vae)).images


def alarms(metrics):
    """Returns a line for each metric that shows a failure."""
    lines = []
    if metrics["diversity"] < ALARM * metrics["diversity_real"]:
        lines.append("collapse: generated images are less than half as different from each other as real ones are")
    if metrics["nearest_training_image"] < ALARM * metrics["nearest_training_image_real"]:
        lines.append("copying: generated images are less than half as far from training images as new real ones are")
    return lines


def table(metrics):
    """Returns the metrics as text, those of generated beside those of real images."""
    lines = [f"{'':32}{'generated':>12}{'real':>12}"]
    for name, value in metrics.items():
        if isinstance(value, float) and not name.endswith("_real"):
            real = metrics.get(f"{name}_real")
            lines.append(f"{name:32}{value:12.3g}" + ("" if real is None else f"{real:12.3g}"))
    return "\n".join([*lines, *alarms(metrics)])


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
            vae = load_generator(source, report=print_error).to(pick_device(options.device))
            metrics = evaluate(vae, options)
        except (CheckpointError, DataError, DeviceError, OSError) as error:
            print_error(str(error))
            return 2
        say(json.dumps(metrics) if options.json else table(metrics))
        return 0


if __name__ == "__main__":
    sys.exit(main())
