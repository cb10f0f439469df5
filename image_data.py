"""Reads a folder of images and films and gives batches of images in a fixed order.

Every image, and every frame that is taken of a film, is decoded once, into a memory-mapped file of uint8 pixels that
training indexes: no DataLoader, no workers, and the order can be entered at any position. uint8 is used only here, where
pictures are written and for torch-fidelity.
"""
import contextlib
import functools
import glob
import hashlib
import json
import mmap
import os
import pathlib
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from console import listed, say
from devices import num_cpus
from image_files import (
    EXTENSIONS,
    HEIC_EXTENSIONS,
    READS_HEIC,
    DataError,
    PassingError,
    Picture,
    are_grey,
    common_levels,
    prepared,
    read_picture,
    reads_heic,
    what_it_is,
)
from image_sizes import CHANNELS, as_pair, plain_size, size_text
from randomness import random_generator
from safe_files import atomic_write, check_writable, free_bytes, lock_folder, lock_of, remove_temporary_files, too_few
from video_files import pyav_fault
from video_frames import VIDEO_EXTENSIONS, is_film, open_film, sampled

CACHE_VERSION = 3
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}  # names of folders that are no classes
HIDDEN = (".", "__MACOSX", "@eaDir")  # beginnings of the names of folders that are not entered
CHUNK = 512  # files decoded together
VIDEO_FPS = 2  # images per second of a film, where nothing else is asked for
STILL = 4  # of 255: the largest change of any 64th of a frame that is nearly the same as the one before


class ImageSet(NamedTuple):
    """Decoded images, and what decoding them has shown."""

    images: torch.Tensor  # (M, C, H, W) uint8; those of a folder are memory-mapped, and writing to them ends the process
    folder: pathlib.Path | str  # or a film; a name, where there is no folder
    class_counts: dict  # name of the first folder below `folder` ("" for the folder itself) to number of images
    skipped: dict  # name of a file or folder that cannot be read, below `folder`, to the reason
    passed_over: dict = {}  # kind of what is no image that can be read, or is in a hidden folder, to their number
    classes: tuple = ()  # the class folder of each image; () where there is no folder
    digest: str = ""  # differs for other images
    resize_mode: str = "crop"  # see image_files.decode_image
    levels: dict = {}  # see image_files.decode_image; {} where no image has more than 8 bits
    num_grey: int = 0  # images without colours, where C is 3 or 4
    num_transparent: int = 0  # images with transparent parts
    remarks: dict = {}  # name of a film to what a person should know about it
    in_two_classes: dict = {}  # name of an image to that of the same one in another class


class FileFacts(NamedTuple):
    """What decoding a picture or a frame has shown; of a file that cannot be read only `name`, `fault` and `passing`."""

    name: str  # below the folder; of a frame with its time
    fault: str | None = None
    passing: bool = False  # whether another try may read it
    width: int = 0
    height: int = 0
    mode: str = ""  # Pillow's
    digest: str = ""  # of the decoded pixels
    grey: bool = False
    transparent: bool = False
    kind: str | None = None  # see image_files.Picture
    lowest: float = 0.0
    highest: float = 0.0
    film: str = ""  # of a frame: the name of its file, below the folder
    still: bool = False  # whether a frame is nearly the same as the one taken before it
    remark: str = ""  # about the film, with its last frame


class Found(NamedTuple):
    """What is in a folder."""

    source: pathlib.Path  # resolved: the folder, or a film alone
    folder: pathlib.Path  # that names are below
    paths: list  # of the images and films, sorted
    passed_over: dict  # see ImageSet
    closed: dict  # name of a folder that cannot be entered to the reason


def find_images(folder):
    """Returns the paths of all images below a folder, sorted: class folders as for ImageFolder, or a flat folder.

    Raises:
        DataError: no such folder, no images in it, or a folder in it that cannot be entered.
    """
    return find_files(folder, films=False)


def find_files(folder, *, films=True):
    """Returns the paths of find_images and, where PyAV is installed, those of films. Raises as find_images."""
    found = _find(folder, films=films)
    check_readable(found, {}, skip_bad=False)
    return found.paths


def _find(folder, *, films=True):
    folder = pathlib.Path(os.path.expanduser(folder)).resolve()
    layout = f"Put images below it, in one folder ({folder}/a.jpg) or in one folder for each class ({folder}/cats/a.jpg)."
    if films and folder.is_file() and folder.suffix.lower() in VIDEO_EXTENSIONS:
        if fault := pyav_fault():
            raise DataError(f"{folder}: {fault}")
        return Found(folder, folder.parent, [folder], Counter(), {})
    if not folder.is_dir():
        if folder.exists() and "archive" in (what_it_is(folder) or ""):
            raise DataError(f"{folder} is {what_it_is(folder).split(',')[0]}: unpack it, and give the folder that comes out")
        raise DataError(f"{folder} is {'a file' if folder.exists() else 'missing'}, a folder of images or a film is needed. "
                        f"{layout}")
    extensions = EXTENSIONS if reads_heic() else tuple(set(EXTENSIONS) - set(HEIC_EXTENSIONS))
    found = Found(folder, folder, [], Counter(), {})
    for parent, names in _walk(found):
        for name in names:
            if name.startswith("._"):
                continue
            if name.lower().endswith(extensions) or films and name.lower().endswith(VIDEO_EXTENSIONS):
                found.paths.append(pathlib.Path(parent, name))
            elif not name.startswith("."):
                found.passed_over[pathlib.PurePath(name).suffix.lower() or "without an ending"] += 1
    found_films = [path for path in found.paths if path.suffix.lower() in VIDEO_EXTENSIONS]
    if found_films and pyav_fault():
        found.paths[:] = [path for path in found.paths if path.suffix.lower() not in VIDEO_EXTENSIONS]
        found.passed_over.update(path.suffix.lower() for path in found_films)
    if not found.paths and not found.closed:
        held = f" It holds {passed_over_text(found.passed_over)}." if found.passed_over else ""
        raise DataError(f"{folder} holds no images ({', '.join(sorted(extensions))}).{held} {layout}")
    found.paths.sort()
    return found


def _walk(found):
    """Walks like ImageFolder, without hidden and thumbnail folders, and into each folder once (links can form a cycle).

    Yields the path and the names of the files of each folder.
    """
    def closed(error):
        found.closed[_name(error.filename, found.folder)] = f"cannot be entered: {error.strerror}"

    entered = set()
    for parent, folders, files in os.walk(found.folder, followlinks=True, onerror=closed):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        hidden = [name for name in folders if name.startswith(HIDDEN)]
        found.passed_over.update(["hidden folder(s)"] * len(hidden))
        folders[:] = sorted(set(folders) - set(hidden))
        yield parent, files


def passed_over_text(passed_over):
    """Returns ImageSet.passed_over as text, and what would read the pictures among it."""
    advice = dict.fromkeys(HEIC_EXTENSIONS, f" ({READS_HEIC})") | dict.fromkeys(ARCHIVES, " (unpack it)")
    if not passed_over.keys().isdisjoint(VIDEO_EXTENSIONS) and (fault := pyav_fault()):
        advice |= dict.fromkeys(VIDEO_EXTENSIONS, f" ({fault})")
    kinds = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}{advice.get(kind, '')}" for kind, count in kinds)


def load_images(folder, image_size, *, cache_dir, skip_bad=False, channels=3, resize_mode="crop", levels=None,
                video_fps=None):
    """Returns the ImageSet of a folder or a film, from the cache, which is built first where there is none.

    The cache is keyed by the names, sizes and times of the files and by how they are prepared: a changed folder is decoded
    again. It is written atomically. Of runs that start together one builds it, and the others wait.

    Args:
        folder: as for find_images.
        image_size, channels, resize_mode: as for image_files.decode_image.
        cache_dir: where the cache is kept; made where it is missing.
        skip_bad: go on without the files and folders that cannot be read.
        levels: as for image_files.decode_image, but where not given common to the whole set.
        video_fps: images per second of films; where it is given, animated GIF, PNG and WebP are films too.

    Raises:
        DataError: as find_images; unreadable images, all of them by name; the cache cannot be written.
    """
    cache = _Cache(folder, image_size, cache_dir, channels, resize_mode, levels, video_fps)
    facts = cache.usable_facts(skip_bad)
    if facts is None:
        with cache.held():
            facts = cache.usable_facts(skip_bad)  # another process may have built it meanwhile
            if facts is None:
                cache.build()
                facts = cache.facts()
    found, bad = cache.found, facts["bad"] | cache.found.closed
    check_readable(found, facts["bad"], skip_bad=skip_bad)
    with open(cache.path, "rb") as file:
        try:
            # Read-only: a private copy would count against the memory in full.
            pixels = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:  # some file systems cannot
            pixels = bytearray(file.read())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it must not be written to
        images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *cache.shape)
    return ImageSet(images, found.source, Counter(facts["classes"]), bad, found.passed_over, tuple(facts["classes"]),
                    facts["digest"], resize_mode, facts["levels"], facts["num_grey"], facts["num_transparent"],
                    facts.get("remarks", {}), facts.get("in_two_classes", {}))


def decode_folder(folder, image_size, *, cache_dir, channels=3, resize_mode="crop", video_fps=None):
    """Decodes every image of a folder into the cache, where there can be one.

    Returns what it has Found and the FileFacts of each image.

    Arguments and errors as for load_images, but for those about images that cannot be read.
    """
    with contextlib.ExitStack() as held:
        try:
            check_writable(cache_dir)
        except OSError as error:
            say(f"note: --cache-dir: {error}; nothing is kept")
            cache_dir = held.enter_context(tempfile.TemporaryDirectory())
        cache = _Cache(folder, image_size, cache_dir, channels, resize_mode, None, video_fps)
        held.enter_context(cache.held())
        return cache.found, cache.build()


def check_readable(found, bad, *, skip_bad):
    """Raises DataError with all names and reasons of what cannot be read; with skip_bad, only if no image is left.

    Args:
        found: Found.
        bad: name of each file that cannot be read to the reason.
    """
    num_left, bad = len(found.paths) - len(bad), bad | found.closed
    if bad and not (skip_bad and num_left):
        choice = "repair or remove them" + (", or go on without them (--skip-bad)" if num_left else "")
        raise DataError("\n".join([f"{len(bad)} of {num_left + len(bad)} images in {found.source} cannot be read; {choice}:",
                                   *(f"  {name}: {reason}" for name, reason in bad.items())]))


def _name(path, folder):
    """The name of what is below a folder, on one line."""
    return os.path.relpath(path, folder).replace("\n", "\\n")


class DecodingThreads(ThreadPoolExecutor):
    """Threads that leave undone what they have not begun when a `with` block ends by an error or a signal."""

    def __exit__(self, *error):
        self.shutdown(cancel_futures=True)  # that of the base class does all of it first, which can take minutes


class _Cache:
    """The decoded images of a folder: a file of pixels, and beside it one of facts about them.

    Attributes:
        found: what is in the folder.
        path: of the pixels, (M, C, H, W) uint8.
        shape: (C, H, W).
    """

    def __init__(self, folder, image_size, cache_dir, channels, resize_mode, levels, video_fps):
        self.found = _find(folder)
        self.shape, self.levels, self.video_fps = (channels, *as_pair(image_size)), levels or {}, video_fps
        self.how = {"channels": channels, "resize_mode": resize_mode}
        key = json.dumps([CACHE_VERSION, self.shape, resize_mode, reads_heic(), str(self.found.source),
                          [(str(path.relative_to(self.found.folder)), *_size_and_time(path)) for path in self.found.paths],
                          *([] if video_fps is None else [video_fps])])
        key = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        size = size_text(plain_size(self.shape[1:]))
        self.path = pathlib.Path(cache_dir) / f"{self.found.source.name[:40]}-{size}px-{key}.uint8"

    def facts(self):
        """Returns what is known about the images; None where there is no cache."""
        try:
            facts = json.loads(self.path.with_suffix(".json").read_text())
            whole = self.path.stat().st_size == len(facts["classes"]) * _num_bytes(self.shape) and "levels" in facts
        except (KeyError, OSError, RecursionError, TypeError, ValueError):
            return None
        return facts if whole else None

    def usable_facts(self, skip_bad):
        """Returns facts(), but None where other levels are wanted, or a file that cannot be read is to be tried again.

        Unless skipped, all of those are tried again; where they are skipped, only those whose fault may have passed.
        """
        facts = self.facts()
        if not facts or facts["bad"] and not skip_bad or self._levels(facts["common_levels"]) != facts["levels"]:
            return None
        passing = set(facts["passing"])
        paths = [path for path in self.found.paths if _name(path, self.found.folder) in passing] if passing else []
        read = (next(self._frames(path)) if self._is_film(path) else self._read(path, self.levels) for path in paths)
        return None if any(not facts.fault for facts, _ in read) else facts

    @contextlib.contextmanager
    def held(self):
        """Locks the folder of the caches."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            waiting = (f"waiting: another process is decoding images into {folder}; if there is none on any machine, remove "
                       f"{lock_of(folder)}")
            with lock_folder(folder, busy=lambda: tqdm.write(waiting)):
                remove_temporary_files(folder, "*px-*")
                yield
        except OSError as error:
            raise DataError(f"--cache-dir: {error}") from None

    def build(self):
        """Decodes all files; returns the FileFacts of each picture and frame."""
        paths, size = self.found.paths, _num_bytes(self.shape)
        needed, free = len(paths) * size, free_bytes(self.path.parent)
        if too_few(free, needed):
            raise DataError(f"the cache of {len(paths)} images at {size_text(self.shape[1:])} px needs {needed:,} bytes in "
                            f"{self.path.parent}, {free:,} are free; --cache-dir names another place")
        files, paths_of_files = [], []
        with (atomic_write(self.path, bytes_needed=needed) as file, DecodingThreads(num_cpus()) as pool,
              warnings.catch_warnings(), tqdm(total=len(paths), desc="decoding", unit="file", disable=None) as progress):
            warnings.simplefilter("ignore")  # Pillow warns about single files; what cannot be read is named in FileFacts
            read = functools.partial(self._read, levels=self.levels)
            for start in range(0, len(paths), CHUNK):
                films = [self._is_film(path) for path in paths[start:start + CHUNK]]
                chunk = list(zip(paths[start:start + CHUNK], films, strict=True))
                pictures = pool.map(read, [path for path, film in chunk if not film])
                for path, film in chunk:
                    for facts, pixels in self._frames(path, progress) if film else [next(pictures)]:
                        files.append(facts)
                        paths_of_files.append(path)
                        file.write(pixels)
                    progress.update()
            common, place = common_levels_of(files), 0
            levels = self._levels(common)
            for index, (path, facts) in enumerate(zip(paths_of_files, files, strict=True)):
                own = common_levels(facts.kind, facts.lowest, facts.highest)
                if facts.kind and facts.kind not in self.levels and list(own) != levels[facts.kind]:
                    files[index], pixels = self._read(path, levels)
                    file.seek(place)
                    file.write(pixels)
                place += 0 if facts.fault else size
        self._write_facts(files, common, levels)
        if old := self._others():
            size = sum(path.stat().st_size for path in old)
            say(f"note: {self.path.parent} keeps other states or sizes of {self.found.source} too, {size / 1e6:,.1f} MB, "
                f"which may be removed: {listed(path.name for path in old)}")
        return files

    def _others(self):
        """The paths of caches of the same folder in another state, or at another size."""
        others = []
        for path in sorted(self.path.parent.glob(f"{glob.escape(self.found.source.name[:40])}-*px-*.json")):
            with contextlib.suppress(OSError, RecursionError, TypeError, ValueError):
                same = json.loads(path.read_text()).get("source") == str(self.found.source)
                if same and path != self.path.with_suffix(".json") and path.with_suffix(".uint8").exists():
                    others.append(path.with_suffix(".uint8"))
        return others

    def _levels(self, common):
        """Returns the levels of the kinds of samples that the set has: those asked for, else the common ones."""
        return {kind: list(self.levels.get(kind, levels)) for kind, levels in common.items()}

    def _is_film(self, path):
        return path.suffix.lower() in VIDEO_EXTENSIONS if self.video_fps is None else is_film(path)

    def _read(self, path, levels):
        """Returns the FileFacts and the bytes of the pixels of a picture."""
        name = _name(path, self.found.folder)
        try:
            return _described(name, read_picture(path, self.shape[1:], levels=levels, **self.how))
        except DataError as error:
            return FileFacts(name, str(error), isinstance(error, PassingError)), b""

    def _frames(self, path, progress=None):
        """Yields the FileFacts and the bytes of the pixels of each frame that is taken of a film."""
        name, waiting, last = _name(path, self.found.folder), None, None
        try:
            with open_film(path) as film:
                for frame in sampled(film.frames(), self.video_fps or VIDEO_FPS):
                    if waiting:
                        yield waiting
                    image = frame.picture()
                    pixels, transparent = prepared(image, self.shape[1:], **self.how)
                    grey, now = are_grey(pixels[None]).item(), F.adaptive_avg_pool2d(pixels.float(), 8)
                    still, last = last is not None and (now - last).abs().max().item() <= STILL, now
                    picture = Picture(pixels, *image.size, image.mode, grey, transparent, None, 0.0, 0.0)
                    facts, content = _described(f"{name} at {float(frame.time):.2f} s", picture)
                    waiting = facts._replace(film=name, still=still), content
                    if progress is not None:
                        place = f"{name[-30:]} {float(frame.time):.0f} of {film.duration:.0f} s"
                        progress.set_postfix_str(place, refresh=False)
                        progress.update(0)
                yield waiting[0]._replace(remark="; ".join(film.remarks)), waiting[1]
        except DataError as error:
            yield FileFacts(name, str(error), isinstance(error, PassingError)), b""

    def _write_facts(self, files, common, levels):
        good = [facts for facts in files if not facts.fault]
        classes, first = [class_of(facts) for facts in good], {}
        for own, of in zip(good, classes, strict=True):
            first.setdefault(own.digest, (own.name, of))
        digest = hashlib.blake2b(repr([self.shape, [facts.digest for facts in good]]).encode(), digest_size=16).hexdigest()
        facts = {"bad": {facts.name: facts.fault for facts in files if facts.fault},
                 "passing": [facts.name for facts in files if facts.passing], "classes": classes, "digest": digest,
                 "common_levels": common, "levels": levels, "num_grey": sum(facts.grey for facts in good),
                 "num_transparent": sum(facts.transparent for facts in good),
                 "source": str(self.found.source), "remarks": {facts.film: facts.remark for facts in good if facts.remark},
                 "in_two_classes": {own.name: first[own.digest][0] for own, of in zip(good, classes, strict=True)
                                    if of != first[own.digest][1]}}
        with atomic_write(self.path.with_suffix(".json")) as file:
            file.write(json.dumps(facts).encode())


def class_of(facts):
    """Returns the class of an image: its first folder, at the top "", or the name of its film."""
    return (*pathlib.PurePath(facts.film or facts.name).parts[:-1], facts.film)[0]


def _described(name, picture):
    """Returns the FileFacts and the bytes of the pixels of a Picture."""
    pixels, width, height, mode, *others = picture
    pixels = pixels.numpy().tobytes()
    digest = hashlib.blake2b(pixels, digest_size=16).hexdigest()
    return FileFacts(name, None, False, width, height, mode, digest, *others), pixels


def _num_bytes(shape):
    channels, height, width = shape
    return channels * height * width


def common_levels_of(files):
    """Returns the levels (see image_files.decode_image) that are common to all files."""
    levels = {}
    for kind in {facts.kind for facts in files if facts.kind}:
        those = [facts for facts in files if facts.kind == kind]
        levels[kind] = common_levels(kind, min(facts.lowest for facts in those), max(facts.highest for facts in those))
    return levels


def _size_and_time(path):
    with contextlib.suppress(OSError):  # a broken link, say, which decoding will name
        return path.stat().st_size, path.stat().st_mtime_ns
    return ()


def class_labels(data):
    """Returns the names of the classes of an ImageSet, sorted, and the number of each image's class, (M,) int64.

    Raises:
        DataError: there is no folder for each class, but images beside folders, one folder, or parts of a data set.
    """
    names = sorted(set(data.classes))
    what = None
    if "" in names and len(names) > 1:
        what = f"{data.classes.count('')} images beside its class folders"
    elif len(names) < 2:
        what = "one class" if names and names[0] else "no class folders"
    elif {name.lower() for name in names} <= PARTS:
        what = f"parts of a data set, {', '.join(names)}: {pathlib.Path(data.folder) / names[-1]} may be what is meant"
    if what:
        raise DataError(f"--class-conditional: needs a folder for each class, {data.folder} has {what}")
    numbers = {name: number for number, name in enumerate(names)}
    return names, torch.tensor([numbers[name] for name in data.classes])


def folders_without_images(folder, classes):
    """Returns the names of folders directly below `folder` that hold no images, or only those of another, as links do.

    Args:
        classes: ImageSet.classes.
    """
    if not os.path.isdir(folder):
        return []
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(HIDDEN)}
    return sorted(names - set(classes))


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
        data: an ImageSet, or uint8 images (M, C, H, W), as a tensor or a NumPy array; C is 1, 3 or 4.
        name: what to call them.

    Raises:
        DataError: images of another type or shape.
    """
    try:
        images = torch.as_tensor(data.images if isinstance(data, ImageSet) else data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"data: expected uint8 images (M, C, H, W): {str(error).splitlines()[0]}") from None
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in CHANNELS:
        advice = ""
        if images.dim() == 4 and images.shape[3] in CHANNELS:
            advice = "; images.permute(0, 3, 1, 2) moves the channels"
        elif images.dim() == 3:
            advice = "; images[:, None] adds the channel of grey ones"
        raise DataError(f"data: expected uint8 images (M, C, H, W), C one of {', '.join(map(str, CHANNELS))}, got "
                        f"{images.dtype} {tuple(images.shape)}{advice}")
    if not len(images):
        raise DataError("data: there are no images in it")
    digest, num_grey, num_transparent = hashlib.blake2b(repr(tuple(images.shape)).encode(), digest_size=8), 0, 0
    for part in images.split(CHUNK):
        digest.update(part.cpu().contiguous().numpy())
        num_grey += are_grey(part).sum().item()
        num_transparent += (part[:, 3:] < 255).flatten(1).any(dim=1).sum().item()
    digest = digest.hexdigest()
    if not isinstance(data, ImageSet):
        data = ImageSet(images, name, {"": len(images)}, {}, num_grey=num_grey, num_transparent=num_transparent)
    return data._replace(images=images, digest=digest), f"{name} ({digest})"


def to_device_if_it_fits(images, device):
    """Returns uint8 images on the GPU where they take at most half of its free memory, else as they are."""
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        return images.to(device)
    return images
