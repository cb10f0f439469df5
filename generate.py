"""Pictures and clips from a trained generator: python generate.py runs/images --clip walk

Image i is a function of the seed, i and the generator; how many are asked for changes it by rounding alone. With the seed of
the run, the first 64 images are those of its sample grids.
"""
import argparse
import dataclasses
import math
import pathlib
import sys

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from checkpointing import CheckpointError, export_generator, load_generator
from config import DEVICES, Settings, add_options, missing_package, option, option_name, source_and_options
from console import print_error, program_output, say
from devices import DeviceError, keep_freed_memory, limit_threads, pick_device
from fast_paths import use_fast_output_layers
from image_files import DataError
from latent_paths import decode_each, encode_photo, frames_of, morph, walk
from pictures import CLIP_FORMATS, PictureError, alpha_picture, enlarge, grid, save_clip, save_picture
from randomness import latent_noise
from synthetic_video import synthetic_video

MANY = 256  # images, after which the faster layer has made up for the time that its preparation takes
KINDS = ("clip", "animate", "morph", "alpha_maps", "timelapse", "export")  # instead of single images


class GenerateError(ValueError):
    """What was asked for cannot be had; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What generate.py can be told."""

    num_images: int = option(16, "what", "images, or clips, or rows of alpha maps", metavar="N", minimum=1)
    grid: bool = option(False, "what", "all of them in one picture, or in one clip")
    clip: str | None = option(None, "what", "walk: around each image through the latent space and back to it; synthetic: "
                                            "the synthetic video of each image", choices=("walk", "synthetic"))
    animate: str | None = option(None, "what", "encode a photo of your own, and walk around it", metavar="PHOTO")
    morph: list | None = option(None, "what", "from one photo to another and back", metavar=("PHOTO", "PHOTO"))
    alpha_maps: bool = option(False, "what", "each image before the output layer, alpha as a heat map, the image after")
    timelapse: bool = option(False, "what", "the sample grids of a run as one clip, a frame for each")
    export: str | None = option(None, "what", "write a checkpoint of the generator alone, small enough to hand on",
                                metavar="FILE")

    seed: int = option(0, "how", "of the images and walks", metavar="S", minimum=0)
    frames: int = option(16, "how", "of a clip", metavar="T", minimum=2)
    fps: int = option(8, "how", "frames per second", metavar="FPS", minimum=1, maximum=50)
    size: int | None = option(None, "how", "enlarge images, or grids of a time lapse, to this width", metavar="PIXELS",
                              minimum=1, maximum=4096)
    enlarge: str = option("smooth", "how", "in what way", choices=("smooth", "nearest"))
    format: str = option("webp", "how", "of clips; mp4 needs the package av", choices=tuple(CLIP_FORMATS))
    out: str = option("generated", "how", "folder to write to", metavar="DIR")
    device: str = option("auto", "how", "where to compute", choices=DEVICES)

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        faults = super().faults() + missing_package(self.format == "mp4", "--format mp4", "av", "av")
        asked = [option_name(name) for name in KINDS if getattr(self, name) not in (None, False)]
        if len(asked) > 1:
            faults.append(f"{asked[0]}: one thing at a time, so it does not go with {', '.join(asked[1:])}")
        elif self.grid and asked and asked[0] not in ("--clip", "--alpha-maps"):
            faults.append(f"--grid: does not go with {asked[0]}")
        return faults


def time_lapse(run):
    """Returns the sample grids (T, C, H, W) of a run folder, in the order of steps, smaller ones enlarged to the largest.

    Raises:
        GenerateError: there are none.
        DataError: one cannot be read.
    """
    paths = sorted(pathlib.Path(run).glob("samples/step_*.png"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise GenerateError(f"{run}: no sample grids in it (samples/step_*.png); a run folder of training.py is needed")
    grids = [_read_grid(path) for path in tqdm(paths, unit="grid", disable=None)]
    sides = tuple(max(side) for side in zip(*(picture.shape[1:] for picture in grids), strict=True))
    return torch.cat([F.interpolate(picture[None], sides, mode="nearest-exact") for picture in grids])


def _read_grid(path):
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return pil_to_tensor(image) / 255
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        raise DataError(f"{path}: {error}") from None


def generate(source, options):
    """Writes what `options` ask for; returns the paths.

    Args:
        source: a checkpoint or a run folder.
        options: Options.

    Raises:
        CheckpointError, DataError, GenerateError, PictureError, DeviceError, OSError: why not, in a line.
    """
    options.check()
    if options.export is not None:
        return [export_generator(source, options.export, report=say)]
    if options.timelapse:
        return [_save(time_lapse(source), "timelapse", options)]
    vae = load_generator(source, report=say).to(pick_device(options.device))
    limit_threads()
    photos = options.animate is not None or options.morph
    if (1 if photos else options.num_images) * (options.frames if photos or options.clip == "walk" else 1) >= MANY:
        use_fast_output_layers(vae, report=say)
    if options.animate is not None:
        frames = frames_of(vae, walk(encode_photo(vae, options.animate), options.frames, seed=options.seed))
        return [_save(frames, f"{_stem(options.animate)}-animated", options)]
    if options.morph:
        one, other = (encode_photo(vae, photo) for photo in options.morph)
        names = "-to-".join(map(_stem, options.morph))
        return [_save(frames_of(vae, morph(one, other, options.frames)), names, options)]
    if options.alpha_maps:
        if vae.output_layer is None:
            raise GenerateError(f"--alpha-maps: {source} was trained with --output-layer none")
        return [_save_alpha_maps(vae, options)]

    numbers = tqdm(range(options.num_images), unit=options.clip or "image", disable=None)
    shown = zip(numbers, _clips(vae, options), strict=True)
    kind = f"-{options.clip}" if options.clip else ""
    if not options.grid:
        return [_save(frames, f"seed{options.seed}-{index:05d}{kind}", options) for index, frames in shown]
    frames = torch.stack([_enlarged(frames, options) for _, frames in shown], dim=1)
    rows = torch.stack([grid(frame, columns=math.ceil(math.sqrt(len(frame)))) for frame in frames])
    return [_save(rows, f"seed{options.seed}-grid{kind}", dataclasses.replace(options, size=None))]


def _stem(photo):
    return pathlib.Path(photo).stem[:40]  # a file name has room for 255 bytes


def _clips(vae, options):
    """Yields the frames (T, C, H, W) of each image, one frame where no clip is asked for."""
    z = latent_noise(options.seed, range(options.num_images), vae.latent_dim).to(vae.mu.weight.device)
    if options.clip == "walk":
        for index, start in enumerate(z.split(1)):
            yield frames_of(vae, walk(start, options.frames, seed=options.seed, index=index))
        return
    for decoded in decode_each(vae, z):
        image = decoded.images.cpu()
        yield synthetic_video(image, options.frames)[0] if options.clip == "synthetic" else image


def _save_alpha_maps(vae, options):
    z = latent_noise(options.seed, range(options.num_images), vae.latent_dim).to(vae.mu.weight.device)
    decoded = tqdm(decode_each(vae, z), total=len(z), unit="image", disable=None)
    parts = zip(*((part.before, part.alpha, part.images) for part in decoded), strict=True)
    before, alpha, after = (_enlarged(torch.cat(part).cpu(), options) for part in parts)
    path = pathlib.Path(options.out, f"seed{options.seed}-alpha.png")
    save_picture(alpha_picture(before, alpha, after, columns=2), path)
    return path


def _enlarged(images, options):
    return enlarge(images, options.size or images.shape[-1], smooth=options.enlarge == "smooth")


def _save(frames, name, options):
    """Writes frames (T, C, H, W) as a clip, a single one as a picture; returns the path."""
    frames = _enlarged(frames, options)
    path = pathlib.Path(options.out, f"{name}.{options.format if len(frames) > 1 else 'png'}")
    if len(frames) > 1:
        save_clip(frames, path, frames_per_second=options.fps)
    else:
        save_picture(frames[0], path)
    return path


def parser():
    """Returns the argparse parser of generate.py."""
    parser = argparse.ArgumentParser(
        prog="generate.py", usage="generate.py RUN_OR_CHECKPOINT [options]", allow_abbrev=False,
        description="Pictures and clips from a trained generator; without options, single images.")
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder of training.py, or a checkpoint")
    add_options(parser, Options)
    return parser


def main(arguments=None):
    source, options = source_and_options(parser(), Options, arguments)
    keep_freed_memory()
    with program_output():
        try:
            paths = generate(source, options)
        except (CheckpointError, DataError, GenerateError, PictureError, DeviceError, OSError) as error:
            print_error(str(error))
            return 2
        say(f"wrote {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
        return 0


if __name__ == "__main__":
    sys.exit(main())
