"""The settings of training (class Config), and what turns settings into checks and a command line. Standard library only."""
import argparse
import contextlib
import dataclasses
import importlib.util
import os
import typing

from image_sizes import CHANNELS, RESIZE_MODES, SHORTER_SIDES, height_and_width, plain_size

DEVICES = ("auto", "cpu", "cuda", "mps", *(f"cuda:{number}" for number in range(16)))
DEVICE = "auto|cpu|cuda|cuda:1|mps"
PATHS = ("DIR", "FILE", "DIR|FILM", "PATH", "PHOTO", ("PHOTO", "PHOTO"))  # metavars of what "~" is the home directory in
KINDS = {tuple: "a size", bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


def option(default, group, help, *, metavar=None, choices=None, minimum=None, above=None, maximum=None):
    """Returns a field of Settings: its default, the heading it stands under in --help, and the values it may have.

    A list of values has a tuple of as many metavars, or one metavar for any number of values.
    """
    metadata = {"group": group, "help": help, "metavar": metavar, "choices": choices, "minimum": minimum, "above": above,
                "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """What a program can be told. Subclasses are frozen dataclasses of options; `--base-channels` is `base_channels`."""

    def __post_init__(self):
        """Turns paths and NumPy scalars into plain values, which are what files hold, and "~" into the home directory."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            several = isinstance(value, list | tuple) and _kind(field) is list
            plain = [_plain(one, field) for one in value] if several else _plain(value, field)
            object.__setattr__(self, field.name, plain)

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        faults = []
        for field in dataclasses.fields(self):
            name, value, rule = option_name(field.name), getattr(self, field.name), field.metadata
            if value is None:
                continue
            kind = _kind(field)
            if kind is tuple:
                try:
                    height_and_width(value)
                except ValueError as error:
                    faults.append(f"{name}: {error}")
            elif not isinstance(value, (int, float) if kind is float else kind):
                faults.append(f"{name}: must be {KINDS[kind]}, got {value!r}")
            elif rule["choices"] and value not in rule["choices"]:
                shown = (rule["metavar"] or "|".join(map(str, rule["choices"]))).replace("|", ", ")
                faults.append(f"{name}: must be one of {shown}, got {value}")
            # Written so that NaN fails too.
            elif rule["minimum"] is not None and not rule["minimum"] <= value < float("inf"):
                faults.append(f"{name}: must be at least {rule['minimum']}, got {value}")
            elif rule["above"] is not None and not rule["above"] < value < float("inf"):
                faults.append(f"{name}: must be above {rule['above']}, got {value}")
            elif rule["maximum"] is not None and not value <= rule["maximum"]:
                faults.append(f"{name}: must be at most {rule['maximum']}, got {value}")
        return faults

    def check(self):
        """Raises one ValueError with all faults, a line each."""
        if faults := self.faults():
            raise ValueError("\n".join(faults))


def _plain(value, field):
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    return os.path.expanduser(value) if isinstance(value, str) and field.metadata["metavar"] in PATHS else value


def missing_package(asked, option, module, package):
    """Returns a list with the fault of an option that was asked for and needs a package that is not installed, or []."""
    if not asked or importlib.util.find_spec(module):
        return []
    return [f"{option}: needs the package {package}: pip install {package}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The settings of one run. `--base-channels` on the command line is `base_channels` here."""

    data: str | None = option(None, "data", "folder of images and films, flat or with a folder for each class; or a film",
                              metavar="DIR|FILM")
    demo: bool = option(False, "data", "draw a small folder of images and train on it, at settings that suit a laptop")
    image_size: tuple | int = option(128, "data", "side of square images, or height and width, such as 128x224: the "
                                                  "shorter is 32, 64, 128, 256 or 512, the longer a multiple of its quarter",
                                     metavar="PIXELS|HxW")
    channels: int = option(3, "data", "1: grey, 3: colours, 4: colours and transparency", choices=CHANNELS)
    resize_mode: str = option("crop", "data", "images of another shape: keep the centre, add white (with 4 channels: "
                                              "nothing), or change their proportions", choices=RESIZE_MODES)
    video_fps: float | None = option(None, "data", "images per second of films (default: 2); where it is given, animated "
                                                   "GIF, PNG and WebP are films too", metavar="N", above=0)
    cache_dir: str = option("cache", "data", "where decoded images are kept", metavar="DIR")
    check_data: bool = option(False, "data", "decode every image, report on the folder, then stop")
    skip_bad: bool = option(False, "data", "go on without the files that cannot be read")
    class_conditional: bool = option(False, "data", "learn the class folders as classes, to draw images of one by its name "
                                                    "(StyleGAN3's --cond)")
    augment: bool = option(False, "data", "show the critic mirrored, shifted, zoomed and toned images, real and "
                                          "generated alike; for sets of few images")

    out: str | None = option(None, "run", "run folder; not given: runs/<name of the data folder>, numbered where that "
                                          "holds another data folder or model", metavar="DIR")
    steps: int = option(20_000, "run", "length of the run: generator updates, each with its critic updates", metavar="N",
                         minimum=1)
    epochs: float | None = option(None, "run", "length of the run in passes over the images, in place of --steps",
                                  metavar="N", above=0)
    resume: str | None = option(None, "run", "start an empty run folder from this checkpoint", metavar="PATH")
    initial_checkpoint: str | None = option(None, "run", "begin with the networks of this checkpoint or exported generator, "
                                                         "at step 0: for other images or larger ones", metavar="PATH")
    fresh: bool = option(False, "run", "start anew in a numbered run folder rather than continue")
    dry_run: bool = option(False, "run", "show what would be trained, run one step, leave no run folder")
    seed: int = option(0, "run", "of the initial weights, the order of the images and all noise", metavar="N", minimum=0)
    device: str = option("auto", "run", "where to train; auto: CUDA, mps where it computes what the CPU does, or the CPU",
                         choices=DEVICES, metavar=DEVICE)
    precision: str = option("auto", "run", "of convolutions and matrix products; auto: bfloat16 where the device is fast "
                                           "at it", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "run", "auto: on CUDA, each update as one captured graph; on: torch.compile as well, "
                                         "which takes a minute or two to start", choices=("auto", "on", "off"))

    latent_dim: int = option(128, "model", "size of the latent vector", metavar="Z", minimum=1)
    base_channels: int = option(32, "model", "width of the largest maps of images of --base-size; deeper ones are up to 8 "
                                             "times wider", metavar="N", minimum=1)
    base_size: int | None = option(64, "model", "shorter side of the images whose largest maps have that width; larger "
                                                "images have narrower maps before these, smaller ones begin with wider ones",
                                   metavar="PIXELS", choices=SHORTER_SIDES)
    grow_from: int | None = option(32, "model", "begin with images of this shorter side, and double it up to --image-size; "
                                                "that of --image-size: no growth", metavar="PIXELS", choices=SHORTER_SIDES)
    output_layer: str = option("cnn", "model", "what follows the decoder: CNNParamTanh, one learned alpha for all "
                                               "images, or nothing", choices=("cnn", "static", "none"))
    num_frames: int = option(16, "model", "frames of the synthetic video", metavar="T", minimum=1)
    alpha_grid: int = option(16, "model", "side of the grid of alpha that the CNN predicts", metavar="G", minimum=1)

    grow_every_images: int = option(20_000, "training", "images of the first size; each next one has twice as many",
                                    metavar="IMAGES", minimum=1)
    batch_size: int = option(16, "training", "images per update", metavar="N", minimum=1)
    critic_steps: int = option(1, "training", "critic updates per generator update", metavar="N", minimum=1)
    critic_learning_rate: float = option(1.6e-3, "training", "Adam's learning rate for the critic, at its highest",
                                         metavar="RATE", above=0)
    generator_learning_rate: float = option(1.6e-3, "training", "the same for the VAE with its CNN and layer",
                                            metavar="RATE", above=0)
    warm_up_images: int = option(8_000, "training", "images over which both rates rise", metavar="IMAGES", minimum=0)
    decay_after_images: int = option(128_000, "training", "images after which both rates fall, as 1 / images; a step counts "
                                     "--batch-size images, however many critic updates it has", metavar="IMAGES", minimum=1)
    adam_beta2: float = option(0.9, "training", "Adam's second beta, of both networks; the first is 0", metavar="BETA",
                               minimum=0, maximum=0.9999)
    gradient_penalty_weight: float = option(10.0, "training", "of the gradient penalty in the critic's loss",
                                            metavar="WEIGHT", minimum=0)
    reconstruction_weight: float = option(1.0, "training", "of the reconstruction in the generator's loss",
                                          metavar="WEIGHT", minimum=0)
    kl_weight: float = option(0.02, "training", "of the KL divergence, per nat, in the generator's loss", metavar="WEIGHT",
                              minimum=0)
    ema_half_life_images: float = option(50_000.0, "training", "half-life of the averaged generator (EMA), in images",
                                         metavar="IMAGES", above=0)
    ema_ramp: float = option(0.1, "training", "the half-life is at most this part of the images seen", metavar="X", above=0)

    log_every: int = option(50, "output", "steps between lines of metrics.jsonl", metavar="STEPS", minimum=1)
    sample_every: int | None = option(None, "output", "steps between pictures of samples and curves; not given: as often as "
                                                      "a fortieth of the time allows", metavar="STEPS", minimum=1)
    checkpoint_every: int | None = option(None, "output", "steps between checkpoints; not given: as often as a fortieth of "
                                                          "the time allows, every 1 to 10 minutes", metavar="STEPS",
                                          minimum=1)
    keep_checkpoints: int = option(2, "output", "newest checkpoints kept", metavar="N", minimum=1)
    evaluate_every: int | None = option(None, "output", "steps between measurements of quality, at the full size of the "
                                                        "images; the best generator is kept as checkpoints/best.pt",
                                        metavar="STEPS", minimum=1)
    tensorboard: bool = option(False, "output", "write numbers and pictures for TensorBoard too, which has to be installed")

    def __post_init__(self):
        super().__post_init__()
        with contextlib.suppress(ValueError):  # for faults() to report
            object.__setattr__(self, "image_size", plain_size(self.image_size))

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        faults = missing_package(self.tensorboard, "--tensorboard", "tensorboard", "tensorboard")
        if bool(self.data) == bool(self.demo):
            faults.append("--data: name a folder of images, or use --demo; one of the two")
        if self.fresh and self.resume:
            faults.append("--fresh: starts from nothing, so it does not go with --resume")
        if self.initial_checkpoint and self.resume:
            faults.append("--initial-checkpoint: starts a new run, so it does not go with --resume")
        with contextlib.suppress(TypeError, ValueError):  # reported below
            shorter_side = min(height_and_width(self.image_size))
            if self.grow_from in SHORTER_SIDES and self.grow_from > shorter_side:
                faults.append(f"--grow-from: must be at most {shorter_side}, the shorter side of --image-size, "
                              f"got {self.grow_from}")
        return faults + super().faults()

    def model_arguments(self):
        """Returns the keyword arguments of VAE."""
        names = ("image_size", "channels", "latent_dim", "base_channels", "base_size", "grow_from", "num_frames",
                 "output_layer", "alpha_grid")
        return {name: getattr(self, name) for name in names}


# What --demo changes, where the command line does not say otherwise: one to three minutes on two CPU cores with bfloat16.
DEMO = {"image_size": 32, "base_size": 32, "steps": 2_200, "ema_half_life_images": 500.0}


def option_name(field_name):
    return "--" + field_name.rstrip("_").replace("_", "-")  # a field cannot be called `class`, but `class_`


def _kind(field):
    return next(kind for kind in KINDS if kind in (field.type, *typing.get_args(field.type)))


def _lenient(kind):
    """Converts, or returns the text unchanged for Config.faults to report."""
    def convert(text):
        try:
            return text if kind is tuple else kind(text)
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
            how = {"nargs": "+" if isinstance(metavar, str) else len(metavar), "metavar": metavar}
        groups[rule["group"]].add_argument(option_name(field.name), dest=field.name, default=field.default,
                                           help=rule["help"] + ("" if kind is bool else shown), **how)


def source_and_options(parser, settings, arguments=None):
    """Returns the argument "source" of a command line and the others as settings; prints all faults and exits with 2."""
    values = vars(parser.parse_args(arguments))
    source, options = values.pop("source"), settings(**values)
    if faults := options.faults():
        parser.exit(2, "\n".join(faults) + "\n")
    return source, options


def parser():
    """Returns the argparse parser of training.py."""
    parser = argparse.ArgumentParser(
        prog="training.py", usage="training.py (--data DIR|FILM | --demo) [options]", allow_abbrev=False,
        description="Train a VAE with a CNNParamTanh layer as the generator of a WGAN-GP, on a folder of images. "
                    "Running the same command again continues the run.")
    add_options(parser, Config)
    return parser


def from_command_line(arguments=None):
    """Returns the Config of a command line (sys.argv where not given). Prints all faults and exits with 2 if it has any."""
    command_line = parser()
    values = command_line.parse_args(arguments)
    if values.demo:
        command_line.set_defaults(**DEMO)
        values = command_line.parse_args(arguments)
    config = Config(**vars(values))
    if faults := config.faults():
        command_line.exit(2, "\n".join(faults) + "\n")
    return config
