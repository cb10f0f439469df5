"""Reads a folder of images and gives batches of them in a fixed order.

Every image is decoded once, into a memory-mapped file of uint8 pixels that training indexes: no DataLoader, no workers, and
the order can be entered at any position. uint8 is used only here, where pictures are written and for torch-fidelity.
"""
import contextlib
import functools
import hashlib
import json
import mmap
import os
import pathlib
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from devices import num_cpus
from randomness import random_generator
from safe_files import atomic_write, free_bytes, lock_folder, remove_temporary_files

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # the only ones parsed, whatever the extension
CACHE_VERSION = 2
CHUNK = 512  # images decoded between two writes to the cache


class DataError(ValueError):
    """The folder cannot be trained on as it is; the message says what would do."""


class ImageSet(NamedTuple):
    """Decoded images."""

    images: torch.Tensor  # (M, C, H, W) uint8; those of a folder are memory-mapped: read it, do not write to it
    folder: pathlib.Path | str  # a name, where there is no folder
    class_counts: dict  # name of the first folder below `folder` ("" for the folder itself) to number of images
    skipped: dict  # name of a file that cannot be read, below `folder`, to the reason


class FileFacts(NamedTuple):
    """What decoding a file has shown; of a file that cannot be read only `name` and `fault`."""

    name: str  # below the folder
    fault: str | None = None
    width: int = 0
    height: int = 0
    mode: str = ""  # Pillow's
    digest: bytes = b""  # of the decoded pixels


def find_images(folder):
    """Returns the paths of all images below a folder, sorted: class folders as for ImageFolder, or a flat folder.

    Raises:
        DataError: no such folder, or no images in it.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    layout = f"Put images below it, in one folder ({folder}/a.jpg) or in one folder for each class ({folder}/cats/a.jpg)."
    if not folder.is_dir():
        raise DataError(f"{folder} is {'a file' if folder.exists() else 'missing'}, a folder of images is needed. {layout}")
    found = sorted(_walk(folder))
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)}). {layout}")
    return found


def _walk(folder):
    """Walks like ImageFolder, without hidden and thumbnail folders, and into each folder once (links can form a cycle)."""
    def fail(error):
        raise DataError(f"{error.filename}: {error.strerror}")

    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX", "@eaDir")))
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("._"):
                yield pathlib.Path(parent, name)


def decode_image(path, size):
    """Returns one picture file as uint8 (C, size, size): the shorter side resized to `size`, the centre kept.

    EXIF orientation is applied, transparency laid on white, 16-bit and float samples scaled to 8 bit, and only the first
    frame of an animation is read.

    Raises:
        DataError: the file is no picture, or a broken one; the message says why, in one line.
    """
    return decode_with_facts(path, size)[0]


def decode_with_facts(path, size):
    """Returns decode_image, and the width, height and mode of the file."""
    if not path.is_file():
        raise DataError("not a file" if path.exists() else "a broken link" if path.is_symlink() else "no such file")
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            facts = image.width, image.height, image.mode
            image.draft("RGB", (2 * size, 2 * size))  # JPEG only: skip detail that resizing would drop
            image = _to_rgb(ImageOps.exif_transpose(image))
            return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)).contiguous(), *facts
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        reason = str(error).replace(repr(str(path)), "").strip(" :") or type(error).__name__
        raise DataError(reason) from None


def _to_rgb(image):
    if image.mode.startswith(("I", "F")):
        # The file does not say which value is white. Take the smallest of 1 (float only), 255 and 65535 that is at least 0.8
        # times the brightest sample.
        brightest = 65535 if image.mode.startswith("I;16") else image.getextrema()[1]
        scales = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        full = next((scale for scale in scales if brightest <= 1.25 * scale), brightest)
        image = image.convert("F").point(lambda value: value * (255 / full)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_images(folder, size, *, cache_dir, skip_bad=False):
    """Returns the ImageSet of a folder, from the cache, which is built first where there is none.

    The cache is keyed by the names, sizes and times of the files and by the image size: a changed folder is decoded again.
    It is written atomically. Of runs that start together one builds it, and the others wait.

    Args:
        folder: as for find_images.
        size: pixels.
        cache_dir: where the cache is kept; made where it is missing.
        skip_bad: go on without the files that cannot be read.

    Raises:
        DataError: as find_images; unreadable images, all of them by name; the cache cannot be written.
    """
    folder, paths, cache = _find_cache(folder, size, cache_dir)
    bad = _skipped(cache, len(paths), size, skip_bad)
    if bad is None:
        with _cache_held(cache):
            bad = _skipped(cache, len(paths), size, skip_bad)  # another process may have built it meanwhile
            if bad is None:
                bad = {facts.name: facts.fault for facts in _build_cache(cache, folder, paths, size) if facts.fault}
    check_readable(folder, bad, len(paths), skip_bad=skip_bad)
    paths = [path for path in paths if _name(path, folder) not in bad]
    with open(cache, "rb") as file:
        pixels = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(len(paths), 3, size, size)
    counts = Counter((*path.relative_to(folder).parts[:-1], "")[0] for path in paths)
    return ImageSet(images, folder, counts, bad)


def decode_folder(folder, size, *, cache_dir):
    """Decodes every image of a folder into the cache and returns the FileFacts of each. Arguments as for load_images."""
    folder, paths, cache = _find_cache(folder, size, cache_dir)
    with _cache_held(cache):
        return _build_cache(cache, folder, paths, size)


def check_readable(folder, bad, num_files, *, skip_bad):
    """Raises DataError with all names and reasons in `bad`, if there are any; with skip_bad, only if no image is left."""
    if bad and (not skip_bad or len(bad) == num_files):
        choice = "repair or remove them" + ("" if len(bad) == num_files else ", or go on without them (--skip-bad)")
        raise DataError("\n".join([f"{len(bad)} of {num_files} images in {folder} cannot be read; {choice}:",
                                   *(f"  {name}: {reason}" for name, reason in bad.items())]))


def _find_cache(folder, size, cache_dir):
    paths = find_images(folder)
    folder = pathlib.Path(folder).expanduser().resolve()
    name = f"{folder.name[:40]}-{size}px-{_fingerprint(folder, paths, size)}.uint8"
    return folder, paths, pathlib.Path(cache_dir) / name


def _name(path, folder):
    """The name of a file below a folder, on one line."""
    return str(path.relative_to(folder)).replace("\n", "\\n")


def _skipped(cache, num_files, size, skip_bad):
    """Returns the files that were left out of a cache, with the reasons; None where there is no cache to use."""
    try:
        bad = json.loads(cache.with_suffix(".json").read_text())
        whole = isinstance(bad, dict) and cache.stat().st_size == (num_files - len(bad)) * 3 * size * size
    except (OSError, RecursionError, ValueError):
        return None
    return bad if whole and (skip_bad or not bad) else None  # unless skipped, they are tried again


def _fingerprint(folder, paths, size):
    facts = [(str(path.relative_to(folder)), *_size_and_time(path)) for path in paths]
    text = json.dumps([CACHE_VERSION, size, str(folder), facts])
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _size_and_time(path):
    with contextlib.suppress(OSError):  # a broken link, say, which decoding will name
        return path.stat().st_size, path.stat().st_mtime_ns
    return ()


@contextlib.contextmanager
def _cache_held(cache):
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting: another process is decoding images into {cache.parent}"
        with lock_folder(cache.parent, busy=lambda: tqdm.write(waiting)):
            remove_temporary_files(cache.parent, "*px-*")
            yield
    except OSError as error:
        raise DataError(f"--cache-dir: {error}") from None


def _build_cache(cache, folder, paths, size):
    """Decodes all files into the cache; returns the FileFacts of each."""
    needed = len(paths) * 3 * size * size
    if needed > free_bytes(cache.parent):
        raise DataError(f"the cache of {len(paths)} images at {size} px needs {needed:,} bytes in {cache.parent}, "
                        f"{free_bytes(cache.parent):,} are free; --cache-dir names another place")

    def read(path):
        name = _name(path, folder)
        try:
            pixels, *facts = decode_with_facts(path, size)
        except DataError as error:
            return FileFacts(name, str(error)), b""
        pixels = pixels.numpy().tobytes()
        return FileFacts(name, None, *facts, hashlib.blake2b(pixels, digest_size=16).digest()), pixels

    files = []
    with (atomic_write(cache, bytes_needed=needed) as file, ThreadPoolExecutor(num_cpus()) as pool,
          warnings.catch_warnings(), tqdm(total=len(paths), desc="decoding", unit="image", disable=None) as progress):
        warnings.simplefilter("ignore")  # Pillow warns about single files; those that cannot be read are named in FileFacts
        for start in range(0, len(paths), CHUNK):
            for facts, pixels in pool.map(read, paths[start:start + CHUNK]):
                files.append(facts)
                file.write(pixels)
                progress.update()
    with atomic_write(cache.with_suffix(".json")) as file:
        file.write(json.dumps({facts.name: facts.fault for facts in files if facts.fault}).encode())
    return files


def batch_indices(num_images, position, batch_size, *, seed):
    """Returns the indices (batch_size,) int64 of the next images: one permutation per epoch, joined end to end.

    Args:
        num_images: M.
        position: the number of images before, from 0.
        seed: the order is a function of (seed, epoch), so any position can be entered directly.
    """
    parts = []
    while batch_size > 0:
        epoch, start = divmod(position, num_images)
        parts.append(_epoch_order(num_images, seed, epoch)[start:start + batch_size])
        position += len(parts[-1])
        batch_size -= len(parts[-1])
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def _epoch_order(num_images, seed, epoch):
    return torch.randperm(num_images, generator=random_generator(seed, "order", epoch))


def as_float_images(images, indices, device):
    """Returns images[indices] of uint8 images as float32 in [0, 1] on a device."""
    return to_device(images.index_select(0, to_device(indices, images.device)), device).float().div_(255)


def evenly_spaced(images, count):
    """Returns `count` evenly spaced ones of uint8 images, or all where there are fewer, as float32 in [0, 1] on the CPU."""
    return as_float_images(images, torch.linspace(0, len(images) - 1, min(count, len(images))).long(), torch.device("cpu"))


def to_device(tensor, device):
    """Returns the tensor on a device. It is copied to a GPU from pinned memory, so that the CPU does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def as_image_set(data, name):
    """Returns an ImageSet of images that are there already, and a text that differs for other images.

    Args:
        data: an ImageSet, or uint8 images (M, C, H, W) with C = 3 and H = W, as a tensor or a NumPy array.
        name: what to call them.

    Raises:
        DataError: images of another type or shape.
    """
    images = torch.as_tensor(data.images if isinstance(data, ImageSet) else data)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        advice = "; images.permute(0, 3, 1, 2) moves the channels" if images.dim() == 4 and images.shape[3] == 3 else ""
        raise DataError(f"data: expected uint8 images (M, 3, H, W), H = W, got {images.dtype} {tuple(images.shape)}{advice}")
    if not len(images):
        raise DataError("data: there are no images in it")
    digest = hashlib.blake2b(repr(tuple(images.shape)).encode(), digest_size=8)
    for part in images.split(CHUNK):
        digest.update(part.cpu().contiguous().numpy())
    data = data._replace(images=images) if isinstance(data, ImageSet) else ImageSet(images, name, {"": len(images)}, {})
    return data, f"{name} ({digest.hexdigest()})"


def to_device_if_it_fits(images, device):
    """Returns uint8 images on the GPU where they take at most half of its free memory, else as they are."""
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        return images.to(device)
    return images
