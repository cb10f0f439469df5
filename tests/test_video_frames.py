import json
import pathlib
import shutil
from fractions import Fraction

import numpy as np
import pytest
from helpers import draw_film, save_picture
from PIL import Image, ImageDraw

import video_frames
from image_files import DataError
from video_frames import is_film, open_film, sampled

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200)}
AWKWARD = next(pathlib.Path(__file__).resolve().parents[2].glob("*/field/videos/expected.json"), None)
CORNERS = ("yellow", "cyan", "magenta", "white")  # top left, top right, bottom left, bottom right


def drawing(colour="red", size=(96, 64)):
    """A picture (H, W, 3) of one colour with another one in each corner."""
    image = Image.new("RGB", size, COLOURS.get(colour, colour))
    draw = ImageDraw.Draw(image)
    for corner, name in enumerate(CORNERS):
        left, top = (corner % 2) * (size[0] - 16), corner // 2 * (size[1] - 16)
        draw.rectangle((left, top, left + 15, top + 15), fill=name)
    return np.asarray(image)


def three_colours(*, numbers=(24, 30, 30)):
    return [drawing(colour) for colour, number in zip(COLOURS, numbers, strict=True) for _ in range(number)]


def taken(path, frames_per_second=2):
    """The pictures that are taken of a film, (H, W, 3 or 4) each, and its remarks."""
    with open_film(path) as film:
        pictures = [np.asarray(frame.picture()) for frame in sampled(film.frames(), frames_per_second)]
    return pictures, film.remarks


def name_of(picture):
    """The colour of the middle of a picture, within 8 of 255."""
    middle = np.median(picture[20:-20, 20:-20, :3].reshape(-1, 3), axis=0)
    return next((name for name, colour in COLOURS.items() if np.abs(middle - colour).max() <= 8), tuple(middle))


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("ä 影.MOV", "libx264"), ("a.mkv", "libx265"),
                                             ("a.webm", "libvpx-vp9"), ("a.avi", "libx264"), ("a.m4v", "libx264")])
def test_frames_are_sampled_by_time(tmp_path, name, codec):
    pictures, remarks = taken(draw_film(tmp_path / name, three_colours(), codec=codec))
    assert [name_of(picture) for picture in pictures] == ["red", "red", "green", "green", "blue", "blue"]
    assert not remarks


def test_uneven_frames_count_by_how_long_they_are_shown(tmp_path):
    times = [*range(0, 1_800, 40), 1_800, 2_000, 5_000, 5_100]
    film = draw_film(tmp_path / "a.mp4", three_colours(numbers=(45, 2, 2)), times=times)
    pictures, _ = taken(film)
    # at 0, 0.5, 1 and 1.5 s red, at 2 s green, which stands until 5 s and is one image, at 5 s blue
    assert [name_of(picture) for picture in pictures] == ["red"] * 4 + ["green", "blue"]
    with open_film(film) as opened:
        frames = list(opened.frames())
    assert [frame.time for frame in frames] == [Fraction(time, 1_000) for time in times]
    assert [frame.end for frame in frames][:-1] == [frame.time for frame in frames][1:]
    assert frames[-1].end > frames[-1].time


def test_the_frame_that_is_shown_at_a_time_may_have_begun_long_before(tmp_path):
    film = draw_film(tmp_path / "a.mp4", three_colours(numbers=(1, 1, 2)), times=[0, 100, 5_100, 5_200])
    assert [name_of(picture) for picture in taken(film)[0]] == ["red", "green"]


def test_times_count_from_the_first_frame(tmp_path):
    film = draw_film(tmp_path / "a.mkv", three_colours(), times=[5_000 + 33 * index for index in range(84)])
    pictures, _ = taken(film)
    assert [name_of(picture) for picture in pictures] == ["red", "red", "green", "green", "blue", "blue"]
    with open_film(film) as opened:
        next(opened.frames())
        assert opened.start == 5


class Frames:
    """A stand-in for the frames of PyAV, with times."""

    def __init__(self, pts):
        self.pts, self.duration, self.time_base, self.color_trc = pts, 0, Fraction(1, 10), 1


@pytest.mark.parametrize(("times", "expected"), [
    ([None, None, None], [0, 1, 2]), ([1, 3, 4, 2, 6], [0, 2, 3, 3, 4]), ([7, 8, None, 10], [0, 1, 2, 3]),
    ([-3, -2, -1], [0, 1, 2])])
def test_times_that_are_missing_or_go_back_are_counted(tmp_path, monkeypatch, times, expected):
    film = draw_film(tmp_path / "a.mp4", three_colours(), rate=10)
    with open_film(film) as opened:
        monkeypatch.setattr(opened, "_whole_frames", lambda: None)
        monkeypatch.setattr(video_frames, "_deinterlaced", lambda *given: map(Frames, times))
        assert [frame.time for frame in opened.frames()] == [Fraction(time, 10) for time in expected]


@pytest.mark.parametrize(("turn", "order"), [
    ((0, False, False), (0, 1, 2, 3)), ((-90, False, False), (2, 0, 3, 1)), ((180, False, False), (3, 2, 1, 0)),
    ((90, False, False), (1, 3, 0, 2)), ((0, True, False), (1, 0, 3, 2)), ((0, False, True), (2, 3, 0, 1)),
    ((-90, True, False), (0, 2, 1, 3)), ((90, True, False), (3, 1, 2, 0))])
def test_a_film_is_turned_and_mirrored_as_it_says(tmp_path, turn, order):
    degrees, hflip, vflip = turn
    film = draw_film(tmp_path / "a.mp4", [drawing()] * 3,
                     prepare=lambda stream: stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip))
    (picture,), _ = taken(film)
    assert picture.shape[:2] == ((64, 96) if degrees in (0, 180) else (96, 64))
    shown = [picture[y, x] for y in (8, -8) for x in (8, -8)]
    # Corner i of what is shown is corner order[i] of what is stored.
    for corner, stored in enumerate(order):
        expected = np.asarray(Image.new("RGB", (1, 1), CORNERS[stored]))[0, 0]
        assert np.abs(shown[corner].astype(int) - expected).max() < 40, (corner, CORNERS[stored])


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(4, 3), (128, 64)), (Fraction(1, 2), (96, 128))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, size):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    (picture,), _ = taken(draw_film(tmp_path / "a.mp4", [drawing()] * 3, prepare=prepare))
    assert picture.shape[1::-1] == size


@pytest.mark.parametrize(("tags", "settings"), [
    ((1, 1), {}), ((1, 2), {}), ((5, 1), {}), ((5, 2), {}), (None, {}), ((1, 1), {"pix_fmt": "yuv420p10le"}),
    ((1, 1), {"pix_fmt": "yuv444p"}), ((1, 2), {"codec": "mjpeg", "pix_fmt": "yuvj420p", "name": "a.avi", "tags": None}),
    (None, {"codec": "ffv1", "pix_fmt": "bgr0", "name": "a.mkv"})])
def test_colours_are_those_of_the_matrix_the_range_and_the_depth_of_the_file(tmp_path, tags, settings):
    settings = {"tags": tags} | settings
    pictures, _ = taken(draw_film(tmp_path / settings.pop("name", "a.mp4"), three_colours(), **settings))
    assert [name_of(picture) for picture in pictures] == ["red", "red", "green", "green", "blue", "blue"]


def test_hdr_is_read_with_a_remark(tmp_path):
    def prepare(stream):
        stream.codec_context.color_trc, stream.codec_context.color_primaries = 18, 9

    film = draw_film(tmp_path / "a.mp4", [drawing()] * 3, pix_fmt="yuv420p10le", codec="libx265", tags=(9, 1),
                     prepare=prepare)
    (picture,), remarks = taken(film)
    assert name_of(picture) == "red"
    assert remarks == ["HDR, read as if it were not, so its colours are pale"]


def test_interlaced_frames_have_no_combs(tmp_path):
    fields = []
    for index in range(40):  # a square that moves 4 pixels from field to field
        image = Image.new("RGB", (128, 64), "black")
        ImageDraw.Draw(image).rectangle((4 * index % 80, 10, 4 * index % 80 + 30, 50), fill="white")
        fields.append(np.array(image))
    pictures = []
    for even, odd in zip(fields[::2], fields[1::2], strict=True):
        picture = even.copy()
        picture[1::2] = odd[1::2]
        pictures.append(picture)
    film = draw_film(tmp_path / "a.mp4", pictures, rate=30, options={"flags": "+ildct+ilme", "x264-params": "tff=1"})
    shown, _ = taken(film, 30)
    assert len(shown) == len(pictures)

    def combs(those):
        return np.mean([np.abs(np.diff(picture[12:48, :, 0].astype(int), axis=0)).mean() for picture in those])

    assert combs(shown[2:-2]) < combs(pictures[2:-2]) / 4


def test_transparency_of_a_film_is_kept_in_its_pictures(tmp_path):
    picture = np.zeros((64, 96, 4), np.uint8)
    picture[16:48, 24:72] = (*COLOURS["red"], 255)
    (shown, *_), _ = taken(draw_film(tmp_path / "a.webm", [picture] * 12, codec="libvpx-vp9", pix_fmt="yuva420p"))
    assert shown.shape[2] == 4
    assert shown[4, 4, 3] < 20
    assert shown[32, 48, 3] > 235
    assert name_of(shown) == "red"


def test_frames_of_another_size_on_the_way_have_their_own(tmp_path):
    parts = [draw_film(tmp_path / f"{size[0]}.mkv", [drawing(size=size)] * 15, codec="mjpeg", pix_fmt="yuvj420p", tags=None)
             for size in ((96, 64), (64, 128))]
    import av

    with av.open(str(tmp_path / "both.mkv"), "w") as container:
        stream, number = None, 0
        for part in parts:
            with av.open(str(part)) as source:
                stream = stream or container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.pts = packet.dts = 33 * number
                        packet.stream, number = stream, number + 1
                        container.mux(packet)
    pictures, _ = taken(tmp_path / "both.mkv")
    assert [picture.shape[1::-1] for picture in pictures] == [(96, 64), (64, 128)]


def noisy(index):
    rng = np.random.default_rng(index)
    return np.clip(drawing() + rng.normal(0, 30, (64, 96, 1)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("a.mp4", "libx264", {"bf": "0"}), ("a.mkv", "libx264", {"bf": "0"}), ("a.mp4", "mpeg4", {}), ("a.mkv", "mpeg4", {}),
    ("a.mp4", "libx265", {"x265-params": "keyint=12:bframes=0:log-level=none"}), ("a.mp4", "libvpx-vp9", {}),
    ("a.mkv", "libx265", {"x265-params": "keyint=12:bframes=0:log-level=none"}), ("a.mkv", "libvpx-vp9", {})])
def test_damaged_frames_and_those_that_build_on_them_are_left_out(tmp_path, name, codec, options):
    film = draw_film(tmp_path / name, map(noisy, range(84)), codec=codec, options={"g": "12"} | options)
    whole, remarks = taken(film, 30)
    assert (len(whole), remarks) == (84, [])
    content = bytearray(film.read_bytes())
    place, length = len(content) // 2, len(content) // 20
    content[place:place + length] = np.random.default_rng(0).bytes(length)
    film.write_bytes(content)
    pictures, (remark,) = taken(film, 30)
    assert remark.endswith("damaged frames are left out")
    assert 50 <= len(pictures) < 84
    with open_film(film) as opened:
        kept = [round(30 * frame.time) for frame in opened.frames()]
    for index, picture in zip(kept, pictures, strict=True):
        assert np.array_equal(picture, whole[index])


def test_a_film_that_was_cut_gives_what_it_has_and_says_so(tmp_path):
    film = draw_film(tmp_path / "a.mp4", map(noisy, range(84)), options={"g": "12"})
    import av

    with av.open(str(film)) as source, av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    content = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(content[:len(content) // 2])
    pictures, remarks = taken(tmp_path / "b.mp4")
    assert 2 <= len(pictures) <= 4
    assert any("damaged frames are left out" in remark or remark.startswith("it ends after 1.") for remark in remarks)
    film.write_bytes(film.read_bytes()[:len(content) // 2])
    with pytest.raises(DataError, match=r"^a broken film, or one that was cut off .* \(moov atom not found\)$"):
        taken(film)


def song_with_cover(path):
    import av

    song = draw_film(path.with_suffix(".song.mp4"), [drawing()] * 3, sound="aac")
    with av.open(str(song)) as source, av.open(str(path), "w") as container:
        sound = container.add_stream_from_template(source.streams.audio[0])
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(drawing(), format="rgb24")))
        container.mux(cover.encode())
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = sound
                container.mux(packet)


def sound_alone(path):
    import av

    song = draw_film(path.with_suffix(".song.mp4"), [drawing()] * 3, sound="aac")
    with av.open(str(song)) as source, av.open(str(path), "w") as container:
        sound = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = sound
                container.mux(packet)


def list_of_other_files(path):
    draw_film(path.with_name("other.mp4"), [drawing()] * 3)
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


@pytest.mark.parametrize(("make", "said"), [
    (sound_alone, "no film in it, only sound or text"),
    (song_with_cover, "no film in it, only a cover picture"),
    (lambda path: path.touch(), "empty"),
    (lambda path: path.write_text("hello"), "no film of a kind that is read here"),
    (lambda path: path.write_text("<html>"), "a web page, which is not read here"),
    (lambda path: save_picture(path.with_suffix(".jpg")).rename(path), "a picture (JPEG) with the name of a film"),
    (lambda path: path.mkdir(), "not a file"),
    (lambda path: None, "no such file"),
    (list_of_other_files, "no film of a kind that is read here"),
    (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"), "no film of a kind that is read here"),
])
def test_what_is_no_film_is_named(tmp_path, capfd, make, said):
    make(tmp_path / "a.mp4")
    with pytest.raises(DataError) as error:
        taken(tmp_path / "a.mp4")
    assert str(error.value).split(" (")[0] == said.split(" (")[0]
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(AWKWARD is None, reason="needs a folder of awkward films beside the project")
@pytest.mark.parametrize("row", json.loads(AWKWARD.read_text()) if AWKWARD else [], ids=lambda row: row["file"])
def test_awkward_films_give_what_their_list_says(row):
    least, most = row["images"] if isinstance(row["images"], list) else (row["images"],) * 2
    try:
        pictures, _ = taken(AWKWARD.parent / row["file"])
    except DataError:
        assert least == 0
        return
    assert least <= len(pictures) <= most
    pictures = [np.asarray(Image.alpha_composite(Image.new("RGBA", picture.shape[1::-1], "white"),
                                                 Image.fromarray(picture).convert("RGBA")))[..., :3] for picture in pictures]
    assert all(list(picture.shape[1::-1]) == row["size"] for picture in pictures)
    known = COLOURS | {"white": (255, 255, 255)}
    for picture, colour in zip(pictures, row["colours"] or [], strict=bool(row["colours"])):
        found = np.median(picture.reshape(-1, 3), axis=0)
        assert np.abs(found - known[colour]).max() <= row.get("exact", 8)
    corner = np.asarray(Image.new("RGB", (1, 1), row["top_left"]))[0, 0]
    assert np.abs(pictures[0][6, 6].astype(int) - corner).max() <= 60


def test_a_film_can_be_left_before_its_end(tmp_path):
    film = draw_film(tmp_path / "a.mp4", map(noisy, range(84)))
    for _ in range(20):
        with open_film(film) as opened:
            next(opened.frames()).picture()
    assert opened._decoder.thread_type.name in ("NONE", "SLICE")


def test_frames_of_an_animation_stand_as_long_as_they_say(tmp_path):
    images = [Image.new("RGB", (40, 30), colour) for colour in COLOURS.values()]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[500, 1_000, 1_500])
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=[500, 1_000, 1_500], lossless=True)
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], duration=[500, 1_000, 1_500])
    for name in ("a.gif", "a.webp", "a.png"):
        assert is_film(tmp_path / name)
        pictures = [np.pad(picture, ((20, 20), (20, 20), (0, 0)), "edge") for picture in taken(tmp_path / name)[0]]
        assert [name_of(picture) for picture in pictures] == list(COLOURS), name


def test_no_delay_is_a_tenth_of_a_second(tmp_path):
    images = [Image.new("RGB", (40, 30), (20 * index, 0, 0)) for index in range(10)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=0)
    pictures, _ = taken(tmp_path / "a.gif")
    assert [picture[0, 0, 0] // 20 for picture in pictures] == [0, 5]


def test_a_still_picture_and_another_file_are_no_films(tmp_path):
    assert not is_film(save_picture(tmp_path / "a.webp"))
    assert not is_film(save_picture(tmp_path / "a.gif", "L"))
    (tmp_path / "b.gif").write_text("x")
    assert not is_film(tmp_path / "b.gif")
    assert not is_film(shutil.copy(tmp_path / "a.webp", tmp_path / "a.txt") and tmp_path / "a.txt")
