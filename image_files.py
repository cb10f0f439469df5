"""Reads one picture file, whatever its mode, depth and orientation, and whatever stands beside its pixels."""
import contextlib
import importlib.util
import io
import pathlib
import sys
import threading
import zlib
from typing import NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

from devices import free_memory
from image_sizes import CHANNELS, RESIZE_MODES, as_pair

HEIC_EXTENSIONS = (".heic", ".heif", ".hif")
EXTENSIONS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
              ".pbm", ".pnm", ".avif", *HEIC_EXTENSIONS)
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # the only ones parsed, whatever the extension
READS_HEIC = "pip install pillow-heif reads it"
# Of files that are not read: where in the file, which bytes, what it is.
SIGNATURES = (
    (4, b"ftypjxl ", "a JPEG XL picture"), (0, b"\xff\x0a", "a JPEG XL picture"), (4, b"JXL ", "a JPEG XL picture"),
    (4, b"jP  ", "a JPEG 2000 picture"), (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture"), (4, b"ftypavi", None),
    (4, b"ftypcrx", "a camera's raw file"), (4, b"ftyp", "a video"), (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"8BPS", "a Photoshop document"), (0, b"%PDF", "a PDF document"), (0, b"%!PS", "a PostScript document"),
    (0, b"gimp xcf", "a GIMP document"), (0, b"\x00\x00\x01\x00", "an icon"), (0, b"v/1\x01", "an OpenEXR picture"),
    (0, b"#?RADIANCE", "a Radiance picture"), (0, b"PK\x03\x04", "a ZIP archive"), (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"), (0, b"Rar!", "a RAR archive"), (257, b"ustar", "a tar archive"),
    (0, b"\xfd7zXZ", "an xz archive"), (0, b"BZh", "a bzip2 archive"), (0, b"version https://git-lfs", "a Git LFS pointer"),
    (0, b"<svg", "an SVG drawing"), (0, b"<!doctype html", "a web page"), (0, b"<html", "a web page"),
    (0, b"<?xml", "an XML document"))
TURNED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}  # EXIF orientation to what turns the picture upright
# How a file of 16 bits a channel is to be unpacked for its lower bytes: Pillow unpacks the upper bytes, of pixels in colour.
LOWER_BYTES = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBX", "RGBA")
               for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))}
LOWER_BYTES["LA;16B"] = "RGBA"  # upper and lower bytes of grey and opacity
INTEGER_LEVELS = (255, 1023, 4095, 16383, 65535)  # the highest samples of 8, 10, 12, 14 and 16 bits
GREY = 8  # of 255: the largest difference of channels in a grey picture, as JPEG rounds colours
LARGE = 2**25  # pixels; larger pictures are read one at a time, if they fit into memory
HUGE = 2**27  # pixels; larger pictures are averaged over small blocks before anything else
BYTES_PER_PIXEL, BYTES_PER_DEEP_PIXEL = 24, 48  # at most, while a large picture is read; deep: of more than 8 bits
ONE_LARGE_AT_A_TIME = threading.Lock()
TIFF_TAGS = {"bits": 258, "compression": 259, "photometric": 262, "planar": 284, "format": 339}


class DataError(ValueError):
    """The folder or file cannot be used as it is; the message says what would do."""


class PassingError(DataError):
    """The file could not be read this time: no permission, a fault of the disk or the network, not enough memory."""


class Picture(NamedTuple):
    """A decoded file."""

    pixels: torch.Tensor  # (C, H, W) uint8
    width: int  # of the file, when it is upright
    height: int
    mode: str  # Pillow's
    grey: bool  # all of its pixels, where C is 3 or 4
    transparent: bool  # any of its pixels
    kind: str | None  # of samples of more than 8 bits: "integer" or "float"
    lowest: float  # sample of more than 8 bits
    highest: float


def decode_image(path, image_size, *, channels=3, resize_mode="crop", levels=None):
    """Returns one picture file as uint8 (C, H, W).

    EXIF orientation is applied where it can be told, and only the first frame of an animation is read. Transparency is laid
    on white; with 4 channels it is kept, and what is invisible is white.

    Args:
        path: of the file.
        image_size: pixels, (H, W) or the side of a square.
        channels: C: 1 (grey), 3 (RGB) or 4 (RGBA).
        resize_mode: "crop" keeps the centre, "pad" adds white (nothing, where C is 4), "stretch" changes the proportions.
        levels: what is black and what is white in samples of more than 8 bits, {"integer" or "float": (black, white)}; as
            common_levels of the file itself where not given.

    Raises:
        DataError: the file is no picture, or a broken one; the message says why, in one line.
    """
    return read_picture(path, image_size, channels=channels, resize_mode=resize_mode, levels=levels).pixels


def read_picture(path, image_size, *, channels=3, resize_mode="crop", levels=None):
    """Returns the Picture of a file. Arguments and errors as for decode_image."""
    if channels not in CHANNELS or resize_mode not in RESIZE_MODES:
        raise ValueError(f"expected channels in {CHANNELS} and resize_mode in {RESIZE_MODES}, got {channels}, {resize_mode}")
    path, arguments = pathlib.Path(path), (as_pair(image_size), channels, resize_mode, levels or {})
    try:
        if not path.is_file():
            raise DataError("not a file" if path.exists() else "a broken link" if path.is_symlink() else "no such file")
        with NO_PIXEL_LIMIT:
            try:
                return _read(path, *arguments)
            except Exception as error:
                alone = None if isinstance(error, DataError) else _without_metadata(path)
                if alone:
                    with contextlib.suppress(Exception):  # of the two errors, the first one says more
                        return _read(alone, *arguments)
                raise
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise PassingError(getattr(error, "strerror", None) or "not enough memory") from None
        reason = str(error).replace(repr(str(path)), "").strip(" :") or type(error).__name__
        if isinstance(error, UnidentifiedImageError) and _first_bytes(path)[:4] in (b"II*\0", b"MM\0*"):
            reason = "a TIFF picture of a kind that is not read here"
        raise DataError(what_it_is(path) or " ".join(reason.split())) from None


class _NoPixelLimit:
    """Lifts Pillow's limit on the size of pictures while any thread is inside; _read has one of its own."""

    def __init__(self):
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.inside += 1

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                Image.MAX_IMAGE_PIXELS = self.limit


NO_PIXEL_LIMIT = _NoPixelLimit()


def reads_heic():
    """Whether HEIC pictures can be read here; the first call registers the package that does it with Pillow."""
    if "HEIF" not in Image.OPEN and importlib.util.find_spec("pillow_heif"):
        import pillow_heif  # an optional package

        pillow_heif.register_heif_opener()
    return "HEIF" in Image.OPEN


def what_it_is(path):
    """Returns what a file that is not read is by its first bytes, None where they say nothing."""
    head = _first_bytes(path)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"):
        return None if reads_heic() else f"a HEIC picture; {READS_HEIC}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = next((what for place, start, what in SIGNATURES
                  if head[place:].startswith(start) or start[:1] == b"<" and text.startswith(start)), None)
    return found and f"{found}, which is not read here"


def _first_bytes(path):
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(512)
    return b""


def _read(file, sides, channels, resize_mode, levels):
    formats = (*PILLOW_FORMATS, "HEIF") if reads_heic() else PILLOW_FORMATS
    with contextlib.ExitStack() as held:
        image = held.enter_context(Image.open(file, formats=formats))
        mode, (width, height) = image.mode, image.size
        image.draft("RGB", (2 * max(sides),) * 2)  # JPEG only: skip detail that resizing would drop
        num_pixels, tiles, factor = image.width * image.height, image.tile, 1
        deep = image.mode.startswith(("I", "F")) or tiles and _packing(tiles[0]) in LOWER_BYTES
        if num_pixels > LARGE:
            held.enter_context(ONE_LARGE_AT_A_TIME)
            needed, free = num_pixels * (BYTES_PER_DEEP_PIXEL if deep else BYTES_PER_PIXEL), free_memory()
            if free is not None and needed > free:
                raise PassingError(f"{width} x {height} pixels need {needed:,} bytes of memory, {free:,} are free; make it "
                                   "smaller")
        if num_pixels > HUGE:
            factor = max(1, min(image.size) // (2 * max(sides)))
        tags = _tiff_tags(image)
        image.load()  # before the orientation, whose errors do not count
        orientation = _orientation(image)
        kind, lowest, highest = None, 0.0, 0.0
        if deep:
            kind = "float" if image.mode == "F" else "integer"
            if image.mode.startswith(("I", "F")):
                image, lowest, highest = _to_8_bit(image, kind, levels.get(kind), factor, tags)
            else:
                image, lowest, highest = _to_8_bit_colours(image, _lower_bytes(file, formats), levels.get(kind), factor)
        elif factor > 1:
            image = _reduced(image, factor)
        if orientation > 4:
            width, height = height, width
        if orientation in TURNED:
            image = image.transpose(TURNED[orientation])
        pixels, transparent = prepared(image, sides, channels=channels, resize_mode=resize_mode)
    return Picture(pixels, width, height, mode, are_grey(pixels[None]).item(), transparent, kind, lowest, highest)


def prepared(image, image_size, *, channels, resize_mode):
    """Returns a PIL image of 8 bits as uint8 (C, H, W), and whether any of it is transparent.

    Args:
        image_size, channels, resize_mode: as for decode_image.
    """
    transparent = image.has_transparency_data
    if transparent:
        image = image.convert("RGBA")
        transparent = image.getextrema()[3][0] < 255
    pixels = pil_to_tensor(_resized(_with_channels(image, channels), *as_pair(image_size), resize_mode)).contiguous()
    if channels == 4:
        pixels[:3].masked_fill_(pixels[3:] == 0, 255)
    return pixels, transparent


def _tiff_tags(image):
    """Returns how the samples of a TIFF file are stored, {} for other files; refuses what Pillow would read wrongly."""
    if image.format != "TIFF":
        return {}
    first = {name: image.tag_v2.get(tag) for name, tag in TIFF_TAGS.items()}
    tags = {name: value[0] if isinstance(value, tuple) else value for name, value in first.items()}
    bits, signed = tags["bits"] or 1, tags["format"] in (2, 3)
    fault = None
    if bits > 8 and tags["planar"] == 2 and image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        fault = f"colours of {bits} bits in separate planes"
    elif image.tag_v2.prefix == b"MM" and tags["compression"] != 1 and bits > 8 and (signed or bits > 16):
        fault = f"compressed big-endian samples of {bits} bits"
    elif bits == 8 and signed:
        fault = "signed samples of 8 bits"
    if fault:
        raise DataError(f"a TIFF picture of {fault}, which is not read here")
    return tags


def are_grey(images):
    """Returns which of uint8 images (N, C, H, W) have no colours, as (N,) bool."""
    darkest, brightest = images[:, :3].aminmax(dim=1)
    return (brightest - darkest).amax(dim=(1, 2)) <= GREY


def _orientation(image):
    """EXIF orientation from 1 to 8; 1 where it cannot be told."""
    try:
        value = image.getexif().get(0x0112, 1)
        value = int(value[0] if isinstance(value, tuple | bytes) else value)
    except Exception:  # whatever stands there
        return 1
    return value if value in TURNED else 1


def _reduced(image, factor):
    """Averages blocks of pixels of a large picture, so that what follows needs less memory."""
    if image.has_transparency_data or image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)


def _to_8_bit(image, kind, levels, factor, tags):
    """Returns a picture of mode L or LA, and its lowest and highest sample. What is not finite becomes the lowest."""
    key = image.info.pop("transparency", None)  # of the samples as they are in the file
    samples = pil_to_tensor(image.convert("F"))[0]
    if tags.get("bits") == 32 and tags.get("format") in (None, 1):
        samples[samples < 0] += 2**32  # Pillow takes unsigned samples for signed ones
    visible = Image.fromarray((samples != key).to(torch.uint8).mul(255).numpy()) if key is not None else None
    finite = samples.isfinite()
    if not finite.any():
        raise DataError("none of its samples is a finite number")
    lowest, highest = (bound.item() for bound in samples[finite].aminmax())
    if not finite.all():
        samples = torch.where(finite, samples, lowest)
    image = _scaled(Image.fromarray(samples.numpy()), levels or common_levels(kind, lowest, highest), factor)
    if tags.get("photometric") == 0:
        image = ImageOps.invert(image)
    return image if visible is None else Image.merge("LA", (image, visible.reduce(factor))), lowest, highest


def _scaled(samples, levels, factor):
    """Returns a picture of mode F as one of mode L, reduced by a factor."""
    black, white = levels
    scale = 255 / (white - black)
    return samples.reduce(factor).point(lambda value: value * scale + -black * scale).convert("L")


def _packing(tile):
    """How the pixels of a part of a file are packed, in Pillow's words."""
    return tile.args if isinstance(tile.args, str) else tile.args[0] if tile.args else ""


def _lower_bytes(file, formats):
    """Returns the lower bytes of a picture in colour of 16 bits a channel, as pictures of mode L."""
    if hasattr(file, "seek"):
        file.seek(0)
    with Image.open(file, formats=formats) as image:
        packing = _packing(image.tile[0])
        image.tile = [tile._replace(args=LOWER_BYTES[packing] if isinstance(tile.args, str)
                                    else (LOWER_BYTES[packing], *tile.args[1:])) for tile in image.tile]
        bands = image.split()
    return [bands[index] for index in (1, 1, 1, 3)] if packing == "LA;16B" else bands


def _to_8_bit_colours(image, lower, levels, factor):
    """_to_8_bit for a picture in colour of 16 bits a channel, given its lower bytes; it holds the upper ones."""
    key, uppers = image.info.pop("transparency", None), image.split()
    bands = [Image.fromarray((256 * pil_to_tensor(upper)[0].float() + pil_to_tensor(low)[0]).numpy())
             for upper, low in zip(uppers, lower, strict=True)]
    lows, highs = zip(*(band.getextrema() for band in bands), strict=True)
    lowest, highest = min(lows[:3]), max(highs[:3])
    levels = 3 * [tuple(levels or common_levels("integer", lowest, highest))]
    levels += [(0, next(level for level in INTEGER_LEVELS if level >= high)) for high in highs[3:]]  # opacity has its own
    scaled = [upper.reduce(factor) if pair == (0, 65535) else _scaled(band, pair, factor)  # for which the upper bytes do
              for upper, band, pair in zip(uppers, bands, levels, strict=True)]
    if key is not None:
        same = torch.stack([pil_to_tensor(band)[0] == value for band, value in zip(bands, key, strict=True)])
        scaled.append(Image.fromarray((~same.all(dim=0)).to(torch.uint8).mul(255).numpy()).reduce(factor))
    return Image.merge("RGBA" if len(scaled) == 4 else "RGB", scaled), lowest, highest


def common_levels(kind, lowest, highest):
    """Returns what is black and what is white in samples of more than 8 bits that lie between two bounds.

    Files do not say how many bits are in use. White is the level of a common range, of 8 to 16 bits or of 1.0, where the
    highest sample is near it, else the highest sample. Black is 0, or where samples are negative the lowest one.
    Floating-point samples may go a little beyond a common range, as resizing makes them do.

    Args:
        kind: "integer" or "float".
        lowest, highest: samples.
    """
    ranges, beyond = ((1, 255, 65535), 1.25) if kind == "float" else (INTEGER_LEVELS, 1)
    white = next((level for level in ranges if highest / beyond <= level <= 1.25 * highest), highest)
    black = min(lowest, 0)
    if kind == "float" and -0.1 * white < black:
        black = 0
    elif kind == "float" and 0.8 * white <= -black <= 1.25 * white:
        black = -white
    return float(black), float(white if white > black else black + 1)


def _with_channels(image, channels):
    if channels == 4:
        return image if image.mode == "RGBA" else image.convert("RGB").convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" and channels == 1 else image.convert("RGB").convert("L" if channels == 1 else "RGB")


def _resized(image, height, width, resize_mode):
    if resize_mode == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if resize_mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    scale = min(width / image.width, height / image.height)
    inner = [max(1, round(side * scale)) for side in image.size]
    canvas = Image.new(image.mode, (width, height), (255, 255, 255, 0) if image.mode == "RGBA" else "white")
    canvas.paste(image.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def _without_metadata(path):
    """Returns a PNG or JPEG file without what does not concern its pixels, as a file; None where nothing could be left out.

    Pillow refuses a whole picture for a fault in its texts, profiles or thumbnails.
    """
    data = path.read_bytes()
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept, place = [data[:8]], 8
        while place + 12 <= len(data):
            end = place + 12 + int.from_bytes(data[place:place + 4], "big")
            chunk = data[place:end]
            if chunk[4:8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or chunk[4:8] == b"eXIf" and zlib.crc32(
                    chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
                kept.append(chunk)
            place = end
    elif data.startswith(b"\xff\xd8"):
        kept, place = [data[:2]], 2
        while data[place:place + 1] == b"\xff" and data[place + 1:place + 2] != b"\xda":  # to the start of the scan
            end = place + 2 + int.from_bytes(data[place + 2:place + 4], "big")
            marker = data[place + 1]
            # Adobe's APP14 tells how colours are coded.
            if not (0xe0 <= marker <= 0xef or marker == 0xfe) or data[place + 4:place + 9] == b"Adobe" and end - place >= 16:
                kept.append(data[place:end])
            place = end
        kept.append(data[place:])
    else:
        return None
    kept = b"".join(kept)
    return io.BytesIO(kept) if len(kept) < len(data) else None
