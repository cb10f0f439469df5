"""The settings of the programs, first of all of training: defaults, help, checks, command line. Standard library only."""
import argparse
import dataclasses
import typing

IMAGE_SIZES = (32, 64, 128, 256)
DEVICES = ("auto", "cpu", "cuda", "mps")
WARM_UP = 500  # steps in which the learning rates rise
FULL_RATE = 8_000  # the step after which they fall
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


def option(default, group, help, *, metavar=None, choices=None, least=None, above=None, most=None):
    """Returns a field of Settings: its default, the heading it stands under in --help, and the values it may have.

    A list of values has a tuple of as many metavars.
    """
    metadata = {"group": group, "help": help, "metavar": metavar, "choices": choices, "least": least, "above": above,
                "most": most}
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """What a program can be told. Subclasses are frozen dataclasses of options; `--base-channels` is `base_channels`."""

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        found = []
        for field in dataclasses.fields(self):
            name, value, rule = option_name(field.name), getattr(self, field.name), field.metadata
            if value is None:
                continue
            kind = _kind(field)
            if not isinstance(value, (int, float) if kind is float else kind):
                found.append(f"{name}: must be {KINDS[kind]}, got {value!r}")
            elif rule["choices"] and value not in rule["choices"]:
                found.append(f"{name}: must be one of {', '.join(map(str, rule['choices']))}, got {value}")
            # Written so that NaN fails too.
            elif rule["least"] is not None and not rule["least"] <= value < float("inf"):
                found.append(f"{name}: must be at least {rule['least']}, got {value}")
            elif rule["above"] is not None and not rule["above"] < value < float("inf"):
                found.append(f"{name}: must be above {rule['above']}, got {value}")
            elif rule["most"] is not None and not value <= rule["most"]:
                found.append(f"{name}: must be at most {rule['most']}, got {value}")
        return found

    def check(self):
        """Raises one ValueError with all faults, a line each."""
        if faults := self.faults():
            raise ValueError("\n".join(faults))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The settings of one run. `--base-channels` on the command line is `base_channels` here."""

    data: str | None = option(None, "data", "folder of images, flat or with a folder for each class", metavar="DIR")
    demo: bool = option(False, "data", "draw a small folder of images and train on it, at settings that suit a laptop")
    image_size: int = option(128, "data", "side of the square images", choices=IMAGE_SIZES)
    cache_dir: str = option("cache", "data", "where decoded images are kept", metavar="DIR")
    check_data: bool = option(False, "data", "decode every image, report on the folder, then stop")
    skip_bad: bool = option(False, "data", "go on without the files that cannot be read")
    augment: bool = option(False, "data", "show the critic mirrored, shifted, zoomed and toned images, real and "
                                          "generated alike; for sets of few images")

    out: str | None = option(None, "run", "run folder; not given: runs/<name of the data folder>, numbered where that "
                                          "holds another data folder or model", metavar="DIR")
    steps: int = option(20_000, "run", "length of the run: generator updates, each with its critic updates", metavar="N",
                         least=1)
    epochs: float | None = option(None, "run", "length of the run in passes over the images, in place of --steps",
                                  metavar="N", above=0)
    resume: str | None = option(None, "run", "start an empty run folder from this checkpoint", metavar="PATH")
    fresh: bool = option(False, "run", "start anew in a numbered run folder rather than continue")
    dry_run: bool = option(False, "run", "show what would be trained, run one step, save nothing")
    seed: int = option(0, "run", "of the initial weights, the order of the images and all noise", metavar="N", least=0)
    device: str = option("auto", "run", "where to train", choices=DEVICES)
    precision: str = option("auto", "run", "of convolutions and matrix products; auto: bfloat16 where the device is fast "
                                           "at it", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "run", "auto: on CUDA, each update as one captured graph; on: torch.compile as well, "
                                         "which takes a minute or two to start", choices=("auto", "on", "off"))

    latent_dim: int = option(128, "model", "size of the latent vector", metavar="Z", least=1)
    base_channels: int = option(32, "model", "width of the largest maps; deeper ones are up to 8 times wider",
                                metavar="N", least=1)
    output_layer: str = option("cnn", "model", "what follows the decoder: CNNParamTanh, one learned alpha for all "
                                               "images, or nothing", choices=("cnn", "static", "none"))
    num_frames: int = option(16, "model", "frames of the synthetic video", metavar="T", least=1)
    alpha_grid: int = option(16, "model", "side of the grid of alpha that the CNN predicts", metavar="G", least=1)

    batch_size: int = option(16, "training", "images per update", metavar="N", least=1)
    critic_steps: int = option(1, "training", "critic updates per generator update", metavar="N", least=1)
    critic_learning_rate: float = option(1.6e-3, "training", "Adam's step size for the critic at its highest: it rises "
                                         f"for {WARM_UP} steps, and falls as 1 / step from step {FULL_RATE:,} on",
                                         metavar="RATE", above=0)
    generator_learning_rate: float = option(1.6e-3, "training", "the same for the VAE, the CNN and the layer",
                                            metavar="RATE", above=0)
    gradient_penalty_weight: float = option(10.0, "training", "of the gradient penalty in the critic's loss",
                                            metavar="WEIGHT", least=0)
    reconstruction_weight: float = option(1.0, "training", "of the reconstruction in the generator's loss",
                                          metavar="WEIGHT", least=0)
    kl_weight: float = option(0.02, "training", "of the KL divergence, per nat, in the generator's loss", metavar="WEIGHT",
                              least=0)
    ema_half_life_images: float = option(50_000.0, "training", "images after which the averaged generator has forgotten "
                                         "half; at most a tenth of those seen", metavar="IMAGES", above=0)

    log_every: int = option(50, "output", "steps between lines of metrics.jsonl", metavar="STEPS", least=1)
    sample_every: int = option(500, "output", "steps between sample grids", metavar="STEPS", least=1)
    checkpoint_every: int = option(500, "output", "steps between checkpoints", metavar="STEPS", least=1)
    keep_checkpoints: int = option(2, "output", "newest checkpoints kept", metavar="N", least=1)
    evaluate_every: int | None = option(None, "output", "steps between measurements of quality; the best generator is kept "
                                                        "as checkpoints/best.pt", metavar="STEPS", least=1)
    tensorboard: bool = option(False, "output", "write numbers and pictures for TensorBoard too, which has to be installed")

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        found = []
        if bool(self.data) == self.demo:
            found.append("--data: name a folder of images, or use --demo; one of the two")
        if self.fresh and self.resume:
            found.append("--fresh: starts from nothing, so it does not go with --resume")
        found += super().faults()
        if not found and self.alpha_grid > self.image_size:
            found.append(f"--alpha-grid: must be at most --image-size ({self.image_size}), got {self.alpha_grid}")
        return found

    def model_arguments(self):
        """Returns the keyword arguments of VAE."""
        names = ("image_size", "latent_dim", "base_channels", "num_frames", "output_layer", "alpha_grid")
        return {name: getattr(self, name) for name in names}


# What --demo changes, where the command line does not say otherwise: a few minutes on two CPU cores.
DEMO = {"image_size": 32, "steps": 2_200, "ema_half_life_images": 500.0, "sample_every": 200, "checkpoint_every": 1_000}


def option_name(field_name):
    return "--" + field_name.replace("_", "-")


def _kind(field):
    return next(kind for kind in KINDS if kind in (field.type, *typing.get_args(field.type)))


def _lenient(kind):
    """A converter that hands on what it cannot read, so that Config.faults reports it with all the others."""
    def convert(text):
        try:
            return kind(text)
        except ValueError:
            return text
    return convert


def add_options(parser, settings):
    """Adds an option for every field of a subclass of Settings to an argparse parser."""
    groups = {}
    for field in dataclasses.fields(settings):
        rule = field.metadata
        if rule["group"] not in groups:
            groups[rule["group"]] = parser.add_argument_group(rule["group"])
        kind, metavar = _kind(field), rule["metavar"] or "|".join(map(str, rule["choices"] or ()))
        shown = "" if field.default is None else f" (default: {field.default:{'g' if kind is float else ''}})"
        how = {"action": "store_true"} if kind is bool else {"type": _lenient(kind), "metavar": metavar}
        if kind is list:
            how = {"nargs": len(metavar), "metavar": metavar}
        groups[rule["group"]].add_argument(option_name(field.name), default=field.default,
                                           help=rule["help"] + ("" if kind is bool else shown), **how)


def source_and_options(parser, settings, arguments=None):
    """Returns the argument "source" of a command line and the others as settings; prints all faults and exits with 2."""
    given = vars(parser.parse_args(arguments))
    source, options = given.pop("source"), settings(**given)
    if faults := options.faults():
        parser.exit(2, "\n".join(faults) + "\n")
    return source, options


def parser():
    """Returns the argparse parser of training.py."""
    made = argparse.ArgumentParser(
        prog="training.py", usage="training.py (--data DIR | --demo) [options]", allow_abbrev=False,
        description="Train a VAE with a CNNParamTanh layer as the generator of a WGAN-GP, on a folder of images. "
                    "Running the same command again continues the run.")
    add_options(made, Config)
    return made


def from_command_line(arguments=None):
    """Returns the Config of a command line (sys.argv where not given). Prints all faults and exits with 2 if it has any."""
    made = parser()
    given = made.parse_args(arguments)
    if given.demo:
        made.set_defaults(**DEMO)
        given = made.parse_args(arguments)
    config = Config(**vars(given))
    if faults := config.faults():
        made.exit(2, "\n".join(faults) + "\n")
    return config
