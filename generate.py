"""Pictures, clips and films from a trained generator: python generate.py runs/images --video 10

Image i is a function of the seed, i and the generator; how many are asked for changes it by rounding alone. With the seed of
the run, the first 64 images are those of its sample grids; with up to 8 learned classes, --class all --num-images 8 gives
them.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import signal
import sys

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from checkpointing import CheckpointError, export_generator, load_generator, preparation_of
from class_gaussians import class_gaussians, learned_classes
from config import DEVICE, DEVICES, Settings, add_options, option, option_name, source_and_options
from console import Interrupt, print_error, program_output, say
from data_report import say_what_is_left_out
from devices import DeviceError, keep_freed_memory, lack_of_memory_said, limit_threads, pick_device, usual_settings
from fast_paths import use_fast_output_layers
from film_sound import sound_of
from image_data import find_files, find_images, load_images
from image_files import DataError
from latent_paths import decode_each, encode_film, encode_photo, frames_of, images_of, steady_film, steady_loop, walk
from pictures import PictureError, alpha_picture, enlarge, grid, save_picture
from randomness import drawn_labels, latent_noise
from safe_files import check_writable
from synthetic_video import synthetic_video
from video_files import CLIP_FORMATS, FASTEST_GIF, check_clip, even_ends, pyav_fault, save_clip
from video_frames import VIDEO_EXTENSIONS

MANY = 256  # images, after which the faster layer has made up for the time that its preparation takes
KINDS = ("video", "clip", "animate", "morph", "reconstruct", "alpha_maps", "timelapse", "export")  # instead of single images
FROM_NOISE = ("--video", "--clip", "--alpha-maps")  # those of them that can be of many images
SECONDS_PER_KEYFRAME = 2
FILM_RATE, CLIP_RATE = 30, 8  # frames per second
MOST_NUMBERS = 1_000_000  # of images named by --images or --seeds
MOST_BYTES = 180  # of a name that is made of others
LONG = 1.5  # times the length of noise: latent vectors from here on are far outside of what training has seen


class GenerateError(ValueError):
    """What was asked for cannot be had; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What generate.py can be told."""

    num_images: int = option(16, "what", "images, clips or alpha maps", metavar="N", minimum=1)
    images: str | None = option(None, "what", "just these images of the seed, in place of the first ones",
                                metavar="57,100-120")
    seeds: str | None = option(None, "what", "image 0 of each of these seeds, in place of several of one", metavar="1,5-9")
    class_: list | None = option(None, "what", "images of these classes, a row for each where there are several; all: of "
                                               "every class", metavar="NAME")
    data: str | None = option(None, "what", "folder of its images, whose class folders --class names; for a generator that "
                                            "has learned no classes", metavar="DIR")
    grid: bool = option(False, "what", "all of them in one picture, clip or film")
    video: float | None = option(None, "what", "a film that ends where it began, through several images or --keyframes",
                                 metavar="SECONDS", above=0)
    num_keyframes: int | None = option(None, "what", "images that a film goes through (default: one every "
                                       f"{SECONDS_PER_KEYFRAME} seconds)", metavar="N", minimum=1)
    keyframes: list | None = option(None, "what", "photos of your own, or folders of them, for a film to go through",
                                    metavar="PHOTO")
    clip: str | None = option(None, "what", "walk: around each image through the latent space and back to it; synthetic: "
                                            "the synthetic video of each image", choices=("walk", "synthetic"))
    animate: str | None = option(None, "what", "a short film around a photo of your own", metavar="PHOTO")
    morph: list | None = option(None, "what", "a short film from one photo to another and back", metavar=("PHOTO", "PHOTO"))
    reconstruct: list | None = option(None, "what", "films, photos or folders of them as the generator knows them, with the "
                                      "sound of the films", metavar="FILE")
    alpha_maps: bool = option(False, "what", "each image before the output layer, alpha as a heat map, the image after")
    timelapse: bool = option(False, "what", "the sample grids of a run as one clip, a frame for each")
    export: str | None = option(None, "what", "write a checkpoint of the generator alone, small enough to hand on",
                                metavar="FILE")

    seed: int = option(0, "how", "of the images and walks", metavar="S", minimum=0)
    temperature: float = option(1.0, "how", "what the noise is multiplied with: below 1, images are more alike and often "
                                            "better; above, bolder", metavar="X", minimum=0)
    frames: int = option(16, "how", "of a clip", metavar="T", minimum=2)
    fps: int | None = option(None, "how", f"frames per second, {FASTEST_GIF} at most for gif (default: {FILM_RATE} with "
                                          f"--video, else {CLIP_RATE})", metavar="FPS", minimum=1, maximum=60)
    size: int | None = option(None, "how", "enlarge images, or grids of a time lapse, to this width", metavar="PIXELS",
                              minimum=1, maximum=4096)
    enlarge: str = option("smooth", "how", "in what way", choices=("smooth", "nearest"))
    format: str | None = option(None, "how", "of clips; mp4 needs the package av (default: mp4 for films of --reconstruct, "
                                             "else webp)", choices=tuple(CLIP_FORMATS))
    out: str = option("generated", "how", "folder to write to", metavar="DIR")
    cache_dir: str = option("cache", "how", "where decoded images of --data are kept", metavar="DIR")
    device: str = option("auto", "how", "where to compute; auto: CUDA or the CPU", choices=DEVICES, metavar=DEVICE)

    def faults(self):
        """Returns one line for every setting that cannot work, each starting with the option's name."""
        faults = super().faults()
        if self.format == "mp4" and (fault := pyav_fault()):
            faults.append(f"--format mp4: {fault}")
        if self.format == "gif" and isinstance(self.fps, int) and self.fps > FASTEST_GIF:
            faults.append(f"--fps: must be at most {FASTEST_GIF} for gif, got {self.fps}")
        for name in ("images", "seeds"):
            if isinstance(text := getattr(self, name), str) and not numbers(text):
                faults.append(f"{option_name(name)}: must be numbers and ranges such as 1,5-9, got {text!r}")
        if self.images is not None and self.seeds is not None:
            faults.append("--images: are of one seed, so they do not go with --seeds")
        if self.data and not self.class_:
            faults.append("--data: is for --class NAME")
        for name in ("num_keyframes", "keyframes"):
            if getattr(self, name) is not None and self.video is None:
                faults.append(f"{option_name(name)}: needs --video SECONDS")
        if self.keyframes is not None and (self.grid or self.num_keyframes or self.images or self.seeds):
            faults.append("--keyframes: are all the images of one film, so they do not go with --grid, --num-keyframes, "
                          "--images and --seeds")
        if self.reconstruct and self.fps:
            faults.append("--fps: does not go with --reconstruct, which keeps the times of a film")
        asked = [option_name(name) for name in KINDS if getattr(self, name) not in (None, False)]
        if len(asked) > 1:
            faults.append(f"{asked[0]}: one thing at a time, so it does not go with {', '.join(asked[1:])}")
        elif self.class_ and (self.keyframes or asked and asked[0] not in FROM_NOISE):
            faults.append(f"--class: does not go with {'--keyframes' if self.keyframes else asked[0]}")
        elif self.grid and asked and asked[0] not in FROM_NOISE:
            faults.append(f"--grid: does not go with {asked[0]}")
        return faults


def numbers(text):
    """Returns the numbers that a text such as "1,5-9" names, or [] where it is no such text."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,12})(?:\s*-\s*(\d{1,12}))?\s*", part)
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(MOST_NUMBERS - len(found)):
            return []
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


def time_lapse(run):
    """Returns the sample grids of a run folder as an iterator over (C, H, W), in the order of steps, and their number.

    Smaller ones are enlarged to the largest.

    Raises:
        GenerateError: there are none.
        DataError: one cannot be read.
    """
    paths = sorted(pathlib.Path(run).glob("samples/step_*.png"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise GenerateError(f"{run}: no sample grids in it (samples/step_*.png); a run folder of training.py is needed")
    width, height = (max(sides) for sides in zip(*map(_grid_size, paths), strict=True))
    grids = map(_read_grid, tqdm(paths, unit="grid", disable=None))
    return (F.interpolate(picture[None], (height, width), mode="nearest-exact")[0] for picture in grids), len(paths)


def _grid_size(path):
    with _sample_grid(path) as image:
        return image.size


def _read_grid(path):
    with _sample_grid(path) as image:
        return pil_to_tensor(image) / 255


@contextlib.contextmanager
def _sample_grid(path):
    try:
        with Image.open(path, formats=["PNG"]) as image:
            yield image
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        raise DataError(f"{path}: {error}") from None


@usual_settings()
def generate(source, options):
    """Writes what `options` ask for; returns the paths.

    Ctrl-C, SIGTERM and SIGHUP end a clip or film early: what there is of it is written, and KeyboardInterrupt is raised.

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
        frames, length = time_lapse(source)
        return [_save((_enlarged(frame[None], options)[0] for frame in frames), length, "timelapse", options)]
    vae = load_generator(source, report=say).to(pick_device(options.device))
    limit_threads()
    if options.video is not None or options.animate is not None or options.morph:
        return [_film(vae, options)]
    if options.reconstruct:
        paths = list(_reconstructed(vae, options))
        if not paths:
            raise GenerateError("--reconstruct: none of the files can be read")
        return paths
    wanted, z = _noise(vae, options, default=options.num_images)
    names, columns = [f"seed{seed}-{index:05d}" for seed, index in wanted], math.ceil(math.sqrt(len(z)))
    if classes := _classes(vae, options):
        names = [f"class{one.row:03d}-{name}" for one in classes for name in names]
        columns = len(z) if len(classes) > 1 else columns
        wanted, z = len(classes) * wanted, torch.cat([one.draw(z) for one in classes])
    if len(z) * (options.frames if options.clip == "walk" else 1) >= MANY:
        use_fast_output_layers(vae, report=say)
    if options.alpha_maps:
        if vae.output_layer is None:
            raise GenerateError(f"--alpha-maps: {source} was trained with --output-layer none")
        return [_save_alpha_maps(vae, z, _seeds(options, classes), options)]
    shown = tqdm(_clips(vae, wanted, z, options), total=len(z), unit=options.clip or "image", disable=None)
    kind = f"-{options.clip}" if options.clip else ""
    length = options.frames if options.clip else 1
    if options.grid or len(classes) > 1:
        frames = torch.stack([_enlarged(frames, options) for frames in shown], dim=1)
        frames = (grid(images, columns=columns) for images in frames)
        return [_save(frames, length, f"{_seeds(options, classes)}-grid{kind}", options)]
    return [_save(_enlarged(frames, options), length, f"{name}{kind}", options)
            for name, frames in zip(names, shown, strict=True)]


def _noise(vae, options, *, default):
    """Returns the (seed, index) of each image asked for, by default of so many, and their latent vectors (N, Z)."""
    if options.seeds is not None:
        wanted = [(seed, 0) for seed in numbers(options.seeds)]
    else:
        wanted = [(options.seed, index) for index in (numbers(options.images) if options.images else range(default))]
    z = torch.cat([latent_noise(seed, [index], vae.latent_dim) for seed, index in wanted])
    z = options.temperature * z.to(vae.mu.weight.device)
    if vae.classes is not None and not options.class_:
        labels = torch.cat([drawn_labels(seed, [index], vae.class_counts) for seed, index in wanted])
        z = z + vae.class_latents(labels.to(z.device))
    return wanted, z


def _classes(vae, options):
    """Returns the ClassGaussian of each class asked for."""
    if not options.class_:
        return []
    if vae.classes is not None and not options.data:
        return learned_classes(vae, options.class_)
    if not options.data:
        raise GenerateError("--class: this generator has learned no classes (training.py --class-conditional), so it needs "
                            "--data DIR, with a folder for each class")
    if vae.classes is not None:
        say("note: images are drawn from Gaussians of the encoded images of --data; without it, from the classes learned")
    data = load_images(options.data, vae.image_shape[1:], cache_dir=options.cache_dir, skip_bad=True, **preparation_of(vae))
    say_what_is_left_out(data.skipped, data.passed_over)
    return class_gaussians(vae, data, options.class_, report=say)

def _seeds(options, classes=()):
    """How a file with images of several numbers is called. Names of classes need not be names that a file can have."""
    seeds = f"seed{options.seed}" if options.seeds is None else f"seeds{options.seeds.replace(' ', '')[:40]}"
    return f"classes-{seeds}" if len(classes) > 1 else f"class{classes[0].row:03d}-{seeds}" if classes else seeds


def _clips(vae, wanted, z, options):
    """Yields the frames of each image (T, C, H, W), one frame where no clip is asked for."""
    if options.clip == "walk":
        for (seed, index), start in zip(wanted, z.split(1), strict=True):
            yield frames_of(vae, walk(start, options.frames, seed=seed, index=index))
        return
    for decoded in decode_each(vae, z):
        image = decoded.images.cpu()
        yield synthetic_video(image, options.frames)[0] if options.clip == "synthetic" else image


def _film(vae, options):
    """Writes a film through photos or through images of the seed; returns its path."""
    photos = options.keyframes or options.morph or ([] if options.animate is None else [options.animate])
    columns = 1
    if photos:
        if options.keyframes:
            photos = [path for photo in photos for path in (find_images(photo) if os.path.isdir(photo) else [photo])]
        z, name = _encoded(vae, photos), _file_name(["-to-".join(pathlib.Path(photo).stem[:40] for photo in photos[:3])])
        name += "" if len(photos) > 1 else "-animated"
    else:
        classes = _classes(vae, options)
        count = options.num_keyframes or max(1, len(classes), round(options.video / SECONDS_PER_KEYFRAME))
        _, z = _noise(vae, options, default=count * options.num_images if options.grid else count)
        if classes:
            z = torch.cat([classes[number % len(classes)].draw(row) for number, row in enumerate(z.split(1))])
        columns = -(-len(z) // count) if options.grid else 1
        name = f"{_seeds(options, classes)}{'-grid' if options.grid else ''}-film"
    length = options.frames if options.video is None else max(1, round(options.video * _rate(options)))
    if len(z) > columns * length:
        raise GenerateError(f"--video: {length} frames cannot go through {-(-len(z) // columns)} images; a longer film can")
    if columns * length >= MANY:
        use_fast_output_layers(vae, report=say)

    def frame(row):
        row = _enlarged(row, options)
        return grid(row, columns=math.ceil(math.sqrt(columns))) if options.grid else row[0]

    # Before the images of the path are made, which takes a while.
    check_clip(_path(name, options), frame(torch.zeros(columns, *vae.image_shape)).shape, even_ends(length, _rate(options)))
    paths = [steady_loop(vae, keys, length, seed=options.seed, index=index)
             for index, keys in enumerate(z.tensor_split(columns))]
    images = images_of(vae, torch.stack(paths, dim=1).flatten(0, 1), leave=True)
    frames = (frame(torch.stack(list(itertools.islice(images, columns)))) for _ in range(length))
    return _save(frames, length, name, options)


def _reconstructed(vae, options):
    """Writes films and photos as the VAE reconstructs them; yields the path of each.

    Of several files those that cannot be read are named and left out. Files of one name get numbers.
    """
    files, names = [], set()
    for source in (pathlib.Path(os.path.expanduser(source)) for source in options.reconstruct):
        if not source.exists():
            raise DataError(f"{source}: no such file")
        folder, found = (source.resolve(), find_files(source)) if source.is_dir() else (source.parent, [source])
        files += [(file, _file_name([*file.relative_to(folder).parts[:-1], file.stem])) for file in found]
    check_writable(options.out)
    for file, name in files:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        name = next(new for new in itertools.chain([name], numbered) if new not in names)
        names.add(name)
        try:
            if file.suffix.lower() in VIDEO_EXTENSIONS:
                yield _reconstructed_film(vae, file, f"{name}-reconstruction", options)
            else:
                image = next(images_of(vae, encode_photo(vae, file)))
                yield _save(iter(_enlarged(image[None], options)), 1, f"{name}-reconstruction", options)
        except (DataError, PictureError) as error:
            if len(files) == 1:
                raise
            say(f"warning: {error}; it is left out")


def _reconstructed_film(vae, file, name, options):
    latents = encode_film(vae, file)
    if len(latents.z) >= MANY:
        use_fast_output_layers(vae, report=say)
    z, flicker = steady_film(vae, latents)
    silent = latents.has_sound and _ending(options, film=True) != "mp4"
    for line in (*latents.remarks, flicker, "its sound is left out, which only --format mp4 can have" if silent else ""):
        if line:
            say(f"{file}: {line}")
    frames = (_enlarged(image[None], options)[0] for image in images_of(vae, z, leave=True))
    sound = functools.partial(sound_of, file, latents.start, report=say)
    return _save(frames, len(z), name, options, ends=latents.ends, sound=sound)


def _encoded(vae, photos):
    """Returns the latent vectors (K, Z) of photos; says which are far longer than those of noise."""
    for photo in photos:
        if pathlib.Path(photo).suffix.lower() in VIDEO_EXTENSIONS:
            raise GenerateError(f"{photo} is a film, a photo is needed; --reconstruct takes films")
    z = torch.cat([encode_photo(vae, photo) for photo in photos])
    for photo, length in zip(photos, (torch.linalg.vector_norm(z, dim=1) / math.sqrt(vae.latent_dim)).tolist(), strict=True):
        if length > LONG:
            say(f"note: the latent vector of {photo} is {length:.1f} times as long as those that training draws, so images "
                "near it may look broken")
    return z


def _file_name(parts):
    """Returns names as one that is printable and leaves room for endings: a file name has room for 255 bytes."""
    name = "".join(char if char.isprintable() else "_" for char in "-".join(parts))
    return name.encode()[:MOST_BYTES].decode(errors="ignore")


def _save_alpha_maps(vae, z, name, options):
    decoded = tqdm(decode_each(vae, z), total=len(z), unit="image", disable=None)
    parts = zip(*((part.before, part.alpha, part.images) for part in decoded), strict=True)
    before, alpha, after = (_enlarged(torch.cat(part).cpu(), options) for part in parts)
    path = pathlib.Path(options.out, f"{name}-alpha.png")
    save_picture(alpha_picture(before, alpha, after, columns=2), path)
    return path


def _enlarged(images, options):
    return enlarge(images, options.size or images.shape[-1], smooth=options.enlarge == "smooth")


def _ending(options, *, film):
    return options.format or ("mp4" if film else "webp")


def _path(name, options, *, film=False):
    """Of a clip, by default an MP4 where it is a film that was read."""
    return pathlib.Path(options.out, f"{name}.{_ending(options, film=film)}")


def _rate(options):
    return options.fps or (CLIP_RATE if options.video is None else FILM_RATE)


def _save(frames, length, name, options, *, ends=None, sound=None):
    """Writes `length` frames (C, H, W), as they come, as a clip, a single one as a picture; returns the path.

    Args:
        ends, sound: as for video_files.save_clip, for films of --reconstruct.
    """
    is_clip = length > 1 or options.video is not None or ends
    path = _path(name, options, film=bool(ends)) if is_clip else pathlib.Path(options.out, f"{name}.png")
    if not is_clip:
        save_picture(next(iter(frames)), path)
        return path
    with Interrupt() as signals:
        signals.defer()
        frames = itertools.takewhile(lambda _: not signals.received, frames)
        written = save_clip(frames, path, frames_per_second=_rate(options), num_frames=length, ends=ends, sound=sound)
    if signals.received:
        say(f"stopped: {path} has the first {written} of {length} frames" if written else "stopped before the first frame")
        raise KeyboardInterrupt(signals.received)
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
            with lack_of_memory_said(lambda: "what was asked for", "A smaller --size, fewer images, --device cpu need less"):
                paths = generate(source, options)
        except (CheckpointError, DataError, GenerateError, PictureError, DeviceError, OSError) as error:
            print_error(str(error))
            return 2
        except KeyboardInterrupt as stopped:
            return 128 + (*stopped.args, signal.SIGINT)[0]
        say(f"wrote {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
        return 0


if __name__ == "__main__":
    sys.exit(main())
