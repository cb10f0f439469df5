"""A folder of images to checked, cached, ordered batches.

Every image is decoded once, into a memory-mapped file of uint8 pixels; training only ever indexes that.
uint8 exists only here and where pictures are written.
"""
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "MPO")  # whatever the extension claims
CACHE_VERSION = 1
CHUNK = 512  # images decoded between two writes to the cache


class DataError(ValueError):
    """The folder cannot be trained on as it is; the message says what would do."""


class ImageSet(NamedTuple):
    """The images of a folder, decoded."""

    images: torch.Tensor  # (M, C, H, W) uint8, memory-mapped: read it, do not write to it
    folder: pathlib.Path
    class_counts: dict  # name of the first folder below `folder` ("" for the folder itself) to number of images


class _Files(ImageFolder):
    """ImageFolder that also takes a flat folder, as the one class "", and passes over what file managers leave behind."""

    def __init__(self, root):
        self.hidden_below = len(pathlib.Path(root).parts)
        super().__init__(root, is_valid_file=self._is_image)

    def find_classes(self, directory):
        return [""], {"": 0}

    def _is_image(self, path):
        parts = pathlib.Path(path).parts[self.hidden_below:]
        junk = any(p.startswith((".", "__MACOSX", "@eaDir")) for p in parts[:-1]) or parts[-1].startswith("._")
        return not junk and path.lower().endswith(EXTENSIONS)


def find_images(folder):
    """Returns the paths of all images below a folder, sorted: ImageFolder's class folders, or a flat folder.

    Raises:
        DataError: no such folder, or no images in it.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    layout = f"Put images below it, in one folder ({folder}/a.jpg) or in one folder for each class ({folder}/cats/a.jpg)."
    if not folder.is_dir():
        raise DataError(f"{folder} is {'a file' if folder.exists() else 'missing'}, a folder of images is needed. {layout}")
    try:
        return sorted(pathlib.Path(path) for path, _ in _Files(folder).samples)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)}). {layout}") from None


def decode_image(path, size):
    """Returns one picture file as uint8 (C, size, size): the shorter side resized to `size`, the centre kept.

    EXIF orientation is applied, transparency laid on white, 16-bit and float samples scaled to 8 bit, and only the first
    frame of an animation is read.

    Raises:
        DataError: the file is no picture, or a broken one; the message says why, in one line.
    """
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            image.draft("RGB", (2 * size, 2 * size))  # JPEG only: skip detail that resizing would drop
            image = _to_rgb(ImageOps.exif_transpose(image))
            return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)).contiguous()
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        reason = str(error).replace(str(path), "").replace("''", "the file").strip() or type(error).__name__
        raise DataError(reason) from None


def _to_rgb(image):
    if image.mode.startswith(("I", "F")):
        # Files do not say what white is: the smallest usual scale that holds the brightest sample, with some headroom.
        brightest = 65535 if image.mode.startswith("I;16") else image.getextrema()[1]
        scales = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        full = next((scale for scale in scales if brightest <= 1.25 * scale), brightest)
        image = image.convert("F").point(lambda value: value * (255 / full)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_images(folder, size, *, cache_dir):
    """Returns the ImageSet of a folder, from the cache, which is built first where there is none.

    The cache is keyed by the names, sizes and times of the files and by the image size: a changed folder is read again.
    It appears under its name only when it is whole, so runs that start together at worst build it twice.

    Args:
        folder: as for find_images.
        size: pixels.
        cache_dir: where the cache is kept; made where it is missing.

    Raises:
        DataError: as find_images; unreadable images, all of them by name; no room for the cache.
    """
    paths = find_images(folder)
    folder = pathlib.Path(folder).expanduser().resolve()
    shape = (len(paths), 3, size, size)
    cache = pathlib.Path(cache_dir) / f"{folder.name}-{size}px-{_fingerprint(folder, paths, size)}.uint8"
    if not cache.exists():
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--cache-dir: {error}") from None
        _write_cache(cache, folder, paths, size)
    num_bytes = torch.Size(shape).numel()
    images = torch.from_file(str(cache), size=num_bytes, dtype=torch.uint8).view(shape)
    counts = {}
    for path in paths:
        name = (*path.relative_to(folder).parts[:-1], "")[0]
        counts[name] = counts.get(name, 0) + 1
    return ImageSet(images, folder, counts)


def _fingerprint(folder, paths, size):
    facts = [(str(path.relative_to(folder)), *_size_and_time(path)) for path in paths]
    text = json.dumps([CACHE_VERSION, size, str(folder), facts])
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _size_and_time(path):
    try:
        facts = path.stat()
    except OSError:  # a dangling link, say; reading it will tell
        return ()
    return facts.st_size, facts.st_mtime_ns


def _write_cache(cache, folder, paths, size):
    needed, free = len(paths) * 3 * size * size, shutil.disk_usage(cache.parent).free
    if needed > free:
        raise DataError(f"the cache of {len(paths)} images at {size} px needs {needed:,} bytes in {cache.parent}, "
                        f"{free:,} are free; --cache-dir names another place")
    bad = {}

    def decode(path):
        try:
            return decode_image(path, size)
        except DataError as error:
            bad[path] = str(error)

    descriptor, temporary = tempfile.mkstemp(dir=cache.parent, prefix=f"{cache.name}.", suffix=".tmp")
    try:
        with (open(descriptor, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings(),
              tqdm(total=len(paths), desc="decoding", unit="image", disable=None) as progress):
            warnings.simplefilter("ignore")  # Pillow's remarks on single files; what cannot be read is raised below
            for start in range(0, len(paths), CHUNK):
                for image in pool.map(decode, paths[start:start + CHUNK]):
                    if image is not None:
                        file.write(image.numpy().data)
                    progress.update()
            file.flush()
            os.fsync(file.fileno())
        if bad:
            lines = [f"  {path.relative_to(folder)}: {bad[path]}" for path in sorted(bad)]
            raise DataError(f"{len(bad)} of {len(paths)} images in {folder} cannot be read; mend or remove them:\n"
                            + "\n".join(lines))
        os.replace(temporary, cache)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def batch_indices(num_images, position, batch_size, *, seed):
    """Returns the images (batch_size,) int64 at a position of the endless order: one permutation per epoch, end to end.

    Args:
        num_images: M.
        position: how many images came before, from 0.
        seed: the order is a function of (seed, epoch), so it can be entered anywhere.
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


def random_generator(*key):
    """Returns a CPU torch.Generator whose stream is a function of the key, for example (seed, purpose, step), alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def take(images, indices, device):
    """Returns the chosen ones of uint8 images as float32 in [0, 1] on a device."""
    return to_device(images.index_select(0, to_device(indices, images.device)), device).float().div_(255)


def to_device(tensor, device):
    """Returns the tensor on a device; to a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_device_where_it_fits(images, device):
    """Returns uint8 images on the GPU where they take at most half of its free memory, else as they are."""
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        return images.to(device)
    return images
