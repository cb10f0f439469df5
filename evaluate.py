"""How good a generator is, in figures: python evaluate.py runs/images --data ./images"""
import argparse
import dataclasses
import importlib.util
import json
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback

import torch
from tqdm import tqdm

import program
from checkpointing import CheckpointError, load_generator
from config import DEVICES, Settings, add_options, option, source_and_options
from image_data import DataError, load_images, pick
from quality import diversity, inception_distances, nearest_distance, reconstruction_error, sliced_wasserstein, thumbnails
from randomness import latent_noise, random_generator

BATCH = 16
LEAST_IMAGES = 4  # two halves of two
ALARM = 0.5  # of what real images have: less diversity is a collapse, less distance to training images is copying


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What evaluate.py can be told."""

    data: str | None = option(None, "what", "folder of the images it was trained on", metavar="DIR")
    held_out: str | None = option(None, "what", "folder of images of the same kind that it was not trained on",
                                  metavar="DIR")
    num_images: int = option(1_000, "what", "images of each kind compared, or as many as there are", metavar="N",
                             least=LEAST_IMAGES)
    inception: bool = option(False, "what", "FID and KID too, by torch-fidelity, which has to be installed and fetches a "
                                            "network of 95 MB once")
    seed: int = option(0, "how", "of the generated images", metavar="S", least=0)
    json: bool = option(False, "how", "print one line of JSON instead of a table")
    skip_bad: bool = option(False, "how", "go on without the files that cannot be read")
    cache_dir: str = option("cache", "how", "where decoded images are kept", metavar="DIR")
    device: str = option("auto", "how", "where to compute", choices=DEVICES)

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        found = [] if self.data else ["--data: name the folder of images that it was trained on"]
        if self.inception and not importlib.util.find_spec("torch_fidelity"):
            found.append("--inception: needs the package torch-fidelity: pip install torch-fidelity")
        return found + super().faults()


@torch.no_grad()
def evaluate(vae, options):
    """Returns the figures of a VAE as a dict of plain values; those whose names end in "_real" are of real images alone.

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
    if len(training) < LEAST_IMAGES:
        raise DataError(f"{options.data}: at least {LEAST_IMAGES} images are needed, it has {len(training)}")
    real = pick(training, options.num_images)
    device = vae.mu.weight.device
    z = latent_noise(options.seed, range(len(real)), vae.latent_dim).to(device)
    fake = torch.cat([vae.decode(part).cpu() for part in tqdm(z.split(BATCH), desc="generating", disable=None)])
    if not fake.isfinite().all():
        raise CheckpointError("the generated images are not finite")
    half = len(real) // 2
    found = {"num_images": len(real), "image_size": real.shape[-1]}
    for name, one, other in (("", real, fake), ("_real", real[:2 * half:2], real[1::2])):
        distances = sliced_wasserstein(one, other, generator=random_generator(options.seed, "patches"))
        found |= {f"sliced_wasserstein_{side}px{name}": distance for side, distance in distances.items()}
    known = torch.cat([thumbnails(pick(part, len(part))) for part in training.split(1_000)])
    unseen = pick(_load(options.held_out, vae, options), options.num_images) if options.held_out else None
    small_real, small_fake = thumbnails(real), thumbnails(fake)
    found |= {
        "diversity": diversity(small_fake),
        "diversity_real": diversity(small_real),
        "nearest_training_image": nearest_distance(small_fake, known),
        "nearest_training_image_real": (nearest_distance(small_real, known, rank=2) if unseen is None
                                        else nearest_distance(thumbnails(unseen), known)),
        "reconstruction_error": reconstruction_error(vae, (real if unseen is None else unseen).to(device)),
    }
    return found | inception_distances(real, fake, device) if options.inception else found


def _load(folder, vae, options):
    return load_images(folder, vae.image_shape[-1], cache_dir=options.cache_dir, skip_bad=options.skip_bad).images


def alarms(found):
    """Returns a line for each figure that speaks of a failure."""
    lines = []
    if found["diversity"] < ALARM * found["diversity_real"]:
        lines.append("collapse: generated images are less than half as different from each other as real ones are")
    if found["nearest_training_image"] < ALARM * found["nearest_training_image_real"]:
        lines.append("copying: generated images are less than half as far from training images as new real ones are")
    return lines


def table(found):
    """Returns the figures as text, those of generated beside those of real images."""
    lines = [f"{'':32}{'generated':>12}{'real':>12}"]
    for name, value in found.items():
        if isinstance(value, float) and not name.endswith("_real"):
            real = found.get(f"{name}_real")
            lines.append(f"{name:32}{value:12.3g}" + ("" if real is None else f"{real:12.3g}"))
    return "\n".join([*lines, *alarms(found)])


def parser():
    """Returns the argparse parser of evaluate.py."""
    made = argparse.ArgumentParser(
        prog="evaluate.py", usage="evaluate.py RUN_OR_CHECKPOINT --data DIR [options]", allow_abbrev=False,
        description="How near generated images are to real ones, at each scale; how different from each other; whether they "
                    "are copies. The column of real images is what two halves of them have against each other.")
    made.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder of training.py, or a checkpoint")
    add_options(made, Options)
    return made


def main(arguments=None):
    source, options = source_and_options(parser(), Options, arguments)
    with program.output():
        try:
            vae = load_generator(source, report=program.complain).to(program.pick_device(options.device))
            found = evaluate(vae, options)
        except (CheckpointError, DataError, program.DeviceError, OSError) as error:
            program.complain(str(error))
            return 2
        program.say(json.dumps(found) if options.json else table(found))
        return 0


if __name__ == "__main__":
    sys.exit(main())
