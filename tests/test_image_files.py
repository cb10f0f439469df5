"""Picture files of every kind: what stands beside their pixels, their depth, shape, channels and size."""
import errno
import functools
import pathlib
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import save_picture
from PIL import Image, PngImagePlugin

import image_files
from image_data import find_images, load_images
from image_files import DataError, PassingError, common_levels, decode_image, read_picture
from image_sizes import RESIZE_MODES

HALVES = Image.new("RGB", (64, 64), "red")
HALVES.paste("blue", (0, 32, 64, 64))  # red above, blue below


def colour(pixels, row, column):
    return pixels[:, row, column].tolist()


# What stands beside the pixels


def exif(*entries):
    """An EXIF block of entries (tag, type, count, data)."""
    head, tail = b"II*\0" + struct.pack("<IH", 8, len(entries)), b""
    for tag, kind, count, data in entries:
        start = 8 + 2 + 12 * len(entries) + 4 + len(tail)
        inline = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", start)
        head += struct.pack("<HHI", tag, kind, count) + inline
        tail += data if len(data) > 4 else b""
    return b"Exif\0\0" + head + bytes(4) + tail


TURNED = (0x112, 3, 1, struct.pack("<H", 6))
ODD_EXIF = {"resolution as text": exif(TURNED, (0x11A, 2, 7, b"72 dpi\0")),
            "no resolution": exif(TURNED, (0x11A, 5, 1, bytes(8))),
            "negative": exif(TURNED, (0x11A, 10, 1, struct.pack("<ii", -1, 0))),
            "width as text": exif(TURNED, (0x100, 2, 5, b"4032\0")), "unknown type": exif(TURNED, (0x132, 99, 4, b"what")),
            "data beyond the end": exif(TURNED, (0x9286, 7, 10**6, b"\0\1\2\3")),
            "orientation as bytes": exif((0x112, 1, 1, b"\6")), "orientation as text": exif((0x112, 2, 2, b"6\0")),
            "orientation as long": exif((0x112, 4, 1, struct.pack("<I", 6)))}
NO_EXIF = {"not EXIF": b"Exif\0\0what is this", "cut": exif(TURNED)[:12],
           "a loop": exif((0x8769, 4, 1, struct.pack("<I", 8))),
           "orientation 0": exif((0x112, 3, 1, b"\0\0")), "orientation 99": exif((0x112, 3, 1, b"\x63\0")),
           "orientation of none": exif((0x112, 3, 0, b""))}


@pytest.mark.filterwarnings("ignore")  # of Pillow
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("name", [*ODD_EXIF, *NO_EXIF])
def test_a_picture_with_an_odd_exif_block_is_read_and_turned_where_that_can_be_told(tmp_path, name, suffix):
    block = {**ODD_EXIF, **NO_EXIF}[name]
    HALVES.save(tmp_path / f"x.{suffix}", exif=block, quality=95)
    before = (tmp_path / f"x.{suffix}").read_bytes()
    pixels = decode_image(tmp_path / f"x.{suffix}", 32)
    red, blue = ((16, 28), (16, 4)) if name in ODD_EXIF else ((4, 16), (28, 16))
    assert colour(pixels, *red) == pytest.approx([255, 0, 0], abs=8)
    assert colour(pixels, *blue) == pytest.approx([0, 0, 255], abs=8)
    assert (tmp_path / f"x.{suffix}").read_bytes() == before


def chunk(kind, data, *, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


BOMB = zlib.compress(bytes(2**27))
BESIDE = {"a text bomb": chunk(b"zTXt", b"Comment\0\0" + BOMB), "a wrong sum": chunk(b"tEXt", b"a\0b", crc=1),
          "a broken profile": chunk(b"iCCP", b"x\0\0no zlib"), "a profile bomb": chunk(b"iCCP", b"x\0\0" + BOMB),
          "short": chunk(b"pHYs", b"1"), "private": chunk(b"prVt", b"what")}


@pytest.mark.parametrize("name", BESIDE)
def test_a_png_is_read_whatever_other_chunks_it_has(tmp_path, name):
    HALVES.save(tmp_path / "x.png", exif=exif(TURNED))
    data = (tmp_path / "x.png").read_bytes()
    for place in (33, data.index(b"IEND") - 4):  # after the header, and after the pixels
        (tmp_path / "y.png").write_bytes(data[:place] + BESIDE[name] + data[place:])
        assert torch.equal(decode_image(tmp_path / "y.png", 32), decode_image(tmp_path / "x.png", 32))


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO file")
def test_a_jpeg_is_read_whatever_other_segments_it_has(tmp_path):
    contents = (b"MPF\0what", b"Exif\0\0", b"Photoshop 3.0\x008BIM\4\4", b"ICC_PROFILE\0\1", b"http://ns.adobe.com/xap/1.0/\0<")
    HALVES.save(tmp_path / "x.jpg", quality=95)
    data = (tmp_path / "x.jpg").read_bytes()
    for marker in range(0xe0, 0xf0):
        for content in contents:
            if marker == 0xee:  # says how colours are coded
                continue
            segment = bytes([0xff, marker]) + struct.pack(">H", len(content) + 2) + content
            (tmp_path / "y.jpg").write_bytes(data[:20] + segment + data[20:])
            assert torch.equal(decode_image(tmp_path / "y.jpg", 32), decode_image(tmp_path / "x.jpg", 32))


def test_a_picture_whose_pixels_are_broken_stays_unreadable(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b")
    noise = Image.effect_noise((64, 64), 90)
    noise.save(tmp_path / "x.png", pnginfo=info)
    data = bytearray((tmp_path / "x.png").read_bytes())
    data[len(data) // 2] ^= 0xff
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(DataError):
        decode_image(tmp_path / "x.png", 32)


# Shape and channels


def test_crop_keeps_the_centre_pad_adds_and_stretch_changes_proportions(tmp_path):
    wide = Image.new("RGB", (192, 64), "red")
    wide.paste("blue", (64, 0, 128, 64))
    wide.save(tmp_path / "x.png")
    crop, pad, stretch = (decode_image(tmp_path / "x.png", (64, 96), resize_mode=mode) for mode in RESIZE_MODES)
    assert crop.shape == pad.shape == stretch.shape == (3, 64, 96)
    assert [colour(crop, 32, column) for column in (4, 48, 91)] == [[255, 0, 0], [0, 0, 255], [255, 0, 0]]
    assert colour(crop, 32, 20) == [0, 0, 255]
    assert (pad[:, :15] == 255).all()
    assert (pad[:, -15:] == 255).all()
    assert [colour(pad, 32, column) for column in (10, 48, 85)] == [[255, 0, 0], [0, 0, 255], [255, 0, 0]]
    assert [colour(stretch, row, column) for row in (1, 62) for column in (10, 48)] == 2 * [[255, 0, 0], [0, 0, 255]]
    assert colour(decode_image(tmp_path / "x.png", 32, channels=4, resize_mode="pad"), 0, 16) == [255, 255, 255, 0]
    Image.new("RGB", (3_000, 2), "blue").save(tmp_path / "line.png")
    assert decode_image(tmp_path / "line.png", 32, resize_mode="pad").amin() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_gives_every_number_of_channels(tmp_path, mode, channels):
    image = Image.new(mode, (40, 40), 1) if mode in ("1", "I;16", "F") else Image.new("RGB", (40, 40), "white").convert(mode)
    image.save(tmp_path / ("x.png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "x.tiff"))
    pixels = decode_image(next(tmp_path.glob("x.*")), (32, 48), channels=channels)
    assert pixels.shape == (channels, 32, 48)
    assert (pixels == 255).all()


def test_transparency_is_kept_with_four_channels_and_what_is_invisible_is_white(tmp_path):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    image.save(tmp_path / "x.png")
    pixels = decode_image(tmp_path / "x.png", 32, channels=4)
    assert colour(pixels, 16, 4) == [255, 0, 0, 255]
    assert colour(pixels, 16, 28) == [255, 255, 255, 0]
    edge = pixels[:, 16, 14:18].float()
    assert (edge[0] > 240).all()  # no dark fringe from the black of what is invisible
    assert colour(decode_image(tmp_path / "x.png", 32), 16, 28) == [255, 255, 255]
    assert colour(decode_image(tmp_path / "x.png", 32, channels=1), 16, 28) == [255]


def test_it_says_which_pictures_are_grey_and_which_transparent(tmp_path):
    save_picture(tmp_path / "grey.png", "L", color=90)
    Image.new("L", (64, 64), 90).convert("RGB").save(tmp_path / "grey.jpg")
    save_picture(tmp_path / "sepia.png", color=(112, 66, 20))
    save_picture(tmp_path / "opaque.png", "RGBA", color=(112, 66, 20, 255))
    save_picture(tmp_path / "glass.png", "RGBA", color=(112, 66, 20, 254))
    found = {path.name: read_picture(path, 32) for path in tmp_path.glob("*.*")}
    assert {name for name, picture in found.items() if picture.grey} == {"grey.png", "grey.jpg"}
    assert {name for name, picture in found.items() if picture.transparent} == {"glass.png"}


# Samples of more than 8 bits


def save_ramp(path, low, high, dtype):
    ramp = np.linspace(low, high, 64).astype(dtype)
    Image.fromarray(np.tile(ramp, (64, 1))).save(path)


@pytest.mark.parametrize(("name", "dtype", "low", "high"), [
    *(("x.png", np.uint16, 0, high) for high in (3, 1023, 2827, 4095, 65535)),
    *(("x.tiff", np.int32, *ends) for ends in ((-1024, 3071), (0, 10**6))),
    *(("x.tiff", np.float32, *ends) for ends in ((-1, 1), (0, 1), (-1000, 3000), (0, 255)))])
def test_samples_use_the_whole_range_whatever_theirs_is(tmp_path, name, dtype, low, high):
    save_ramp(tmp_path / name, low, high, dtype)
    row = decode_image(tmp_path / name, 64)[0, 32].float()
    expected = (torch.linspace(low, high, 64) // 1 - low) / (high - low) if high == 3 else torch.linspace(0, 1, 64)
    assert torch.allclose(row, 255 * expected, atol=3)


@pytest.mark.parametrize(("kind", "lowest", "highest", "levels"), [
    ("float", -0.03, 1.2, (0, 1)), ("float", -0.9, 1.02, (-1, 1)), ("float", 0, 0.5, (0, 0.5)), ("float", 0, 0, (0, 1)),
    ("float", -9, -9, (-9, -8)), ("integer", 0, 256, (0, 256)), ("integer", 0, 900, (0, 1023)),
    ("integer", 0, 1100, (0, 1100)), ("integer", -5, 255, (-5, 255)), ("integer", -9, -4, (-9, -4))])
def test_levels_are_common_ranges_where_samples_are_near_one(kind, lowest, highest, levels):
    assert common_levels(kind, lowest, highest) == levels


def png_of_16_bits(samples):
    """A PNG file of samples (H, W, C) uint16, which Pillow cannot write in colour."""
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(samples, *, big=False, packed=False, **tags):
    """A TIFF file of samples (H, W, C) or (H, W); other tags by their names in TIFF_TAGS."""
    order, channels = ">" if big else "<", samples.shape[2] if samples.ndim == 3 else 1
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if packed else data
    values = {256: samples.shape[1], 257: samples.shape[0], 258: None, 259: 8 if packed else 1,
              262: 2 if channels > 2 else 1, 273: None, 277: channels, 278: samples.shape[0], 279: len(data), 284: 1,
              339: {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]} | ({338: 2} if channels == 4 else {})
    values |= {image_files.TIFF_TAGS[name]: value for name, value in tags.items()}
    start = 8 + 2 + 12 * len(values) + 4
    values[273] = start + 2 * channels
    bits = struct.pack(f"{order}{channels}H", *[8 * samples.dtype.itemsize] * channels)
    entries = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) if tag != 258 else
                       struct.pack(f"{order}HHI", tag, 3, channels) + (
                           bits.ljust(4, b"\0") if channels < 3 else struct.pack(f"{order}I", start))
                       for tag, value in sorted(values.items(), key=lambda item: item[0]))
    return (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}IH", 8, len(values)) + entries + bytes(4) + bits + data


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize("samples", [(4095 * RAMP).astype(np.uint16), (2047 * RAMP - 1024).astype(np.int16),
                                     (4e9 * RAMP).astype(np.uint32), (2047 * RAMP - 1024).astype(np.int32),
                                     RAMP.astype(np.float32)], ids=lambda samples: str(samples.dtype))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("big", [False, True])
def test_grey_tiffs_are_read_rightly_or_refused_by_name(tmp_path, samples, packed, big):
    (tmp_path / "x.tiff").write_bytes(tiff(samples, packed=packed, big=big))
    if big and (packed and samples.dtype != np.uint16 or samples.dtype == np.uint32):
        with pytest.raises(DataError, match="a TIFF picture of .* not read here"):
            decode_image(tmp_path / "x.tiff", 64)
    else:
        row = decode_image(tmp_path / "x.tiff", 64)[0, 32].float()
        assert torch.allclose(row, torch.linspace(0, 255, 64), atol=2)


def test_other_odd_tiffs_are_read_rightly_or_refused_by_name(tmp_path):
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff((65535 * RAMP).astype(np.uint16), photometric=0))  # 0 is white
    assert torch.allclose(decode_image(path, 64)[0, 32].float(), torch.linspace(255, 0, 64), atol=2)
    planes = tiff(np.zeros((64, 64, 3), np.uint16), planar=2)
    for data, said in ((tiff((200 * RAMP - 100).astype(np.int8)), "signed samples of 8 bits"),
                       (tiff(RAMP.astype(np.float64)), "a kind"), (planes, "colours of 16 bits in separate planes")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"a TIFF picture of {said}.* not read here"):
            decode_image(path, 64)


@pytest.mark.parametrize("write", [png_of_16_bits, *(functools.partial(tiff, packed=packed, big=big)
                                                     for packed in (False, True) for big in (False, True))])
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("high", [4095, 65535])
def test_colours_of_16_bits_use_the_whole_range_too(tmp_path, write, channels, high):
    if channels == 2 and write is not png_of_16_bits:
        pytest.skip("no such files")
    ramp = np.linspace(0, high, 64).astype(np.uint16)
    samples = np.zeros((64, 64, channels), np.uint16)
    samples[..., 0] = ramp
    if channels > 2:
        samples[..., 1] = ramp[:, None]
    if channels % 2 == 0:
        samples[..., -1] = 65535
    (tmp_path / "x.png").write_bytes(write(samples))
    pixels = decode_image(tmp_path / "x.png", 64).float()
    assert torch.allclose(pixels[0, 32], torch.linspace(0, 255, 64), atol=1.5)
    assert torch.allclose(pixels[1, :, 32] if channels > 2 else pixels[1, 32], torch.linspace(0, 255, 64), atol=1.5)
    picture = read_picture(tmp_path / "x.png", 64, levels={"integer": (0, 65535)})
    assert (picture.kind, picture.highest) == ("integer", high)
    assert picture.pixels.max() == high // 256


def test_a_set_has_one_scale_and_a_run_keeps_its_own(tmp_path):
    (tmp_path / "set").mkdir()
    for index, high in enumerate((300, 1_200, 4_000)):
        save_ramp(tmp_path / "set" / f"{index}.png", 0, high, np.uint16)
    save_ramp(tmp_path / "set" / "f.tiff", 0, 1, np.float32)
    Image.new("RGB", (64, 64), (7, 8, 9)).save(tmp_path / "set" / "plain.png")
    for _ in range(2):  # decoded, and from the cache
        data = load_images(tmp_path / "set", 64, cache_dir="cache")
        brightest = data.images.amax(dim=(1, 2, 3)).tolist()  # 0.png, 1.png, 2.png, f.tiff, plain.png
        assert brightest == pytest.approx([255 * 300 / 4095, 255 * 1_200 / 4095, 255 * 4_000 / 4095, 255, 9], abs=1)
        assert data.levels == {"integer": [0, 4095], "float": [0, 1]}
    again = load_images(tmp_path / "set", 64, cache_dir="cache", levels={"integer": (0.0, 4095.0), "float": [0, 1]})
    assert torch.equal(again.images, data.images)
    assert len(list(pathlib.Path("cache").glob("*.uint8"))) == 1
    kept = load_images(tmp_path / "set", 64, cache_dir="cache", levels={"integer": (0.0, 65535.0)})
    assert kept.images[2].max() <= 16
    assert kept.images[3].max() == 255
    assert torch.equal(load_images(tmp_path / "set", 64, cache_dir="cache").images, data.images)


def test_transparency_of_16_bit_samples_is_that_of_their_key(tmp_path):
    for channels in (1, 3):
        samples = np.full((64, 64, channels), 40_000, np.uint16)
        samples[:, 32:] = 40_001  # the same upper byte
        data = png_of_16_bits(samples)
        key = chunk(b"tRNS", struct.pack(">H", 40_000) * channels)
        (tmp_path / "x.png").write_bytes(data[:33] + key + data[33:])
        pixels = decode_image(tmp_path / "x.png", 32, channels=4, levels={"integer": (0, 65535)})
        assert (pixels[3, :, :12] == 0).all()
        assert (pixels[3, :, 20:] == 255).all()
        assert pixels[0, 16, 24] == pytest.approx(40_000 / 257, abs=1)


def test_opacity_of_16_bits_has_a_range_of_its_own(tmp_path):
    samples = np.full((64, 64, 4), 4095, np.uint16)
    samples[:, 32:, :3] = 0
    (tmp_path / "x.png").write_bytes(png_of_16_bits(samples))
    pixels = decode_image(tmp_path / "x.png", 32, channels=4)
    assert colour(pixels, 16, 4) == [255, 255, 255, 255]
    assert colour(pixels, 16, 28) == [0, 0, 0, 255]


@pytest.mark.parametrize("number", [3, 8])
def test_large_scans_are_read_one_at_a_time_by_all_threads(tmp_path, monkeypatch, number):
    for index in range(number):
        save_picture(tmp_path / f"{index}.png", size=(400, 300))
    inside, most, load = [], [], Image.Image.reduce

    def watched(image, factor):
        inside.append(image)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(image)
        return load(image, factor)

    monkeypatch.setattr(image_files, "LARGE", 1_000)
    monkeypatch.setattr(image_files, "HUGE", 1_000)
    monkeypatch.setattr(Image.Image, "reduce", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: read_picture(path, 32), sorted(tmp_path.glob("*.png"))))
    assert (max(most), len(most)) == (1, number)


def test_samples_that_are_not_finite_become_the_lowest(tmp_path):
    samples = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    samples[0, 0], samples[63, 63] = np.nan, np.inf
    Image.fromarray(samples).save(tmp_path / "x.tiff")
    pixels = decode_image(tmp_path / "x.tiff", 64)[0]
    assert pixels[63, 63] == pixels[0, 0] == 0
    assert pixels[63, 50] > 245


# Large scans, HEIC, other files, passing faults


def test_a_scan_larger_than_pillow_allows_is_read_where_it_fits_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # Pillow refuses from 2,000 pixels on
    black = Image.new("RGB", (200, 100), "black")
    black.paste((255, 200, 0), (0, 0, 100, 100))
    black.info["transparency"] = (0, 0, 0)
    large = Image.new("RGB", (200, 100), "red")
    large.paste("blue", (0, 0, 200, 50))
    glass = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    for name, image in (("x.png", large), ("x.bmp", large), ("p.png", large.convert("P")), ("1.png", large.convert("1")),
                        ("x.jpg", large), ("g.png", glass), ("k.png", black),
                        ("i.png", Image.new("I;16", (200, 100), 60_000))):
        image.save(tmp_path / name)
        expected = read_picture(tmp_path / name, 16, channels=4)
        with monkeypatch.context() as lowered:
            lowered.setattr(image_files, "HUGE", 1_000)
            found = read_picture(tmp_path / name, 16, channels=4)
        assert (found.pixels.float() - expected.pixels.float()).abs().mean() < 4
        assert found[1:] == expected[1:]
        if name == "k.png":  # no black of what is invisible in what is not
            assert found.pixels[0][found.pixels[3] > 0].min() > 250
        assert Image.MAX_IMAGE_PIXELS == 1_000
    samples = np.tile(np.linspace(0, 4000, 200)[:, None].astype(np.uint16), (100, 1, 3))
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(samples))
    monkeypatch.setattr(image_files, "HUGE", 1_000)
    monkeypatch.setattr(image_files, "LARGE", 1_000)
    ramp = decode_image(tmp_path / "deep.png", (16, 32)).float()
    assert torch.allclose(ramp[0, 8], torch.linspace(0, 255 * 4000 / 4095, 32), atol=6)
    monkeypatch.setattr(image_files, "free_memory", lambda: 400_000)
    with pytest.raises(DataError, match="200 x 100 pixels need 480,000 bytes of memory, 400,000 are free"):
        decode_image(tmp_path / "x.png", 16)
    assert Image.MAX_IMAGE_PIXELS == 1_000


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    (tmp_path / "set").mkdir()
    HALVES.save(tmp_path / "set" / "a.HEIC", format="HEIF", quality=95)
    HALVES.save(tmp_path / "set" / "renamed.jpg", format="HEIF", quality=95)
    Image.OPEN.pop("HEIF")  # as in a new process
    data = load_images(tmp_path / "set", 32, cache_dir="cache")
    assert len(data.images) == 2
    for pixels in data.images:
        assert colour(pixels, 4, 16) == pytest.approx([255, 0, 0], abs=16)
    assert not data.passed_over


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_heic_is_named_with_what_reads_it_where_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "set").mkdir()
    for name in ("a.heic", "b.HEIF"):
        (tmp_path / "set" / name).write_bytes(HEIC)
    with pytest.raises(DataError, match="holds no images .* It holds 1 .heic .pip install pillow-heif reads it., 1 .heif"):
        find_images(tmp_path / "set")
    save_picture(tmp_path / "set" / "c.png")
    assert load_images(tmp_path / "set", 32, cache_dir="cache").passed_over == {".heic": 1, ".heif": 1}
    (tmp_path / "set" / "b.HEIF").rename(tmp_path / "set" / "b.jpg")
    with pytest.raises(DataError, match="b.jpg: a HEIC picture; pip install pillow-heif reads it"):
        load_images(tmp_path / "set", 32, cache_dir="cache")


@pytest.mark.parametrize(("data", "said"), [
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"), (b"\xff\x0a" + bytes(9), "a JPEG XL picture"),
    (b"%PDF-1.7", "a PDF document"),
    (b"\0\0\0\x20ftypisom", "a video"), (b"  <!DOCTYPE HTML><html>", "a web page"), (b"PK\3\4" + bytes(30), "a ZIP archive"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"), (b"8BPS\0\1", "a Photoshop document"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"), (b"what", "cannot identify image file")])
def test_a_file_that_is_no_picture_is_named_by_its_first_bytes(tmp_path, data, said):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(DataError, match=f"^{said}"):
        decode_image(tmp_path / "x.jpg", 32)


def test_what_is_passed_over_is_counted_by_kind(tmp_path):
    for name in ("a.png", "cats/b.jpe", ".hidden/c.png", "cats/@eaDir/d.png"):
        save_picture(tmp_path / "set" / name.replace(".jpe", ".jpg")).rename(tmp_path / "set" / name)
    for name in ("a.JXL", "b.jxl", "cats/notes", "cats/labels.csv", ".DS_Store", "._a.png"):
        (tmp_path / "set" / name).write_text("x")
    data = load_images(tmp_path / "set", 32, cache_dir="cache")
    assert data.passed_over == {".jxl": 2, ".csv": 1, "without an ending": 1, "hidden folder(s)": 2}
    assert data.classes == ("", "cats")
    assert data.class_counts == {"": 1, "cats": 1}


@pytest.mark.parametrize("data", [b"PK\3\4" + bytes(30), b"\x1f\x8b" + bytes(30), bytes(257) + b"ustar" + bytes(99),
                                  b"7z\xbc\xaf\x27\x1c"])
def test_an_archive_given_as_the_folder_is_to_be_unpacked(tmp_path, data):
    (tmp_path / "set.bin").write_bytes(data)
    with pytest.raises(DataError, match="set.bin is a .* archive: unpack it"):
        find_images(tmp_path / "set.bin")
    (tmp_path / "set").mkdir()
    (tmp_path / "set.bin").rename(tmp_path / "set" / "a.ZIP")
    with pytest.raises(DataError, match="It holds 1 .zip .unpack it."):
        find_images(tmp_path / "set")


def test_a_fault_that_may_pass_is_tried_again_and_others_are_kept(image_folder, monkeypatch):
    (image_folder / "broken.png").write_text("x")
    paths, opened = find_images(image_folder), []
    failing = {paths[3]: OSError(errno.EIO, "Input/output error"),
               paths[5]: PermissionError(errno.EACCES, "Permission denied")}
    real = Image.open

    def flaky(path, **settings):
        opened.append(path)
        if path in failing:
            raise failing[path]
        return real(path, **settings)

    monkeypatch.setattr(Image, "open", flaky)
    with pytest.raises(DataError, match="(?s)3 of 11 images .*: Input/output error\n.*: Permission denied"):
        load_images(image_folder, 32, cache_dir="cache")
    assert len(load_images(image_folder, 32, cache_dir="cache", skip_bad=True).images) == 8
    opened.clear()
    assert len(load_images(image_folder, 32, cache_dir="cache", skip_bad=True).images) == 8
    assert set(opened) == set(failing)  # tried, and nothing decoded again
    failing.pop(paths[3])
    data = load_images(image_folder, 32, cache_dir="cache", skip_bad=True)
    assert len(data.images) == 9
    assert set(data.skipped) == {"broken.png", str(paths[5].relative_to(image_folder.resolve()))}


def test_a_file_in_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    save_picture(tmp_path / "x.png")
    monkeypatch.setattr(pathlib.Path, "is_file", refuse)
    with pytest.raises(PassingError, match="^Permission denied"):
        decode_image(tmp_path / "x.png", 32)
