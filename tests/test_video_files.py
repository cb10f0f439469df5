import signal
import subprocess
import sys
import weakref

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import ROOT, frames_in
from PIL import Image, ImageSequence

import video_files
from pictures import PictureError
from video_files import CLIP_FORMATS, pyav_fault, save_clip

COLOURS = ((200, 40, 40), (60, 160, 70), (224, 172, 140))  # a red, a green, a skin tone
WRITE_SLOWLY = """
import sys, torch, time, video_files
def frames():
    for index in range(300):
        print(index, flush=True)
        if index == int(sys.argv[1]):
            time.sleep(60)
        yield torch.full((3, 64, 64), index / 300)
video_files.save_clip(frames(), "film.mp4", frames_per_second=30, num_frames=300)
"""


def film_of(path):
    """Returns what another reader than the one that wrote it finds: how it describes the film, and frames (T, H, W, 3)."""
    reader = imageio_ffmpeg.read_frames(str(path))
    described = next(reader)
    width, height = described["size"]
    return described, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


@pytest.mark.parametrize("ending", CLIP_FORMATS)
def test_a_clip_has_its_frames_in_order_at_its_speed(tmp_path, ending):
    frames = torch.linspace(0.1, 0.9, 5).view(5, 1, 1, 1).expand(5, 3, 33, 36)  # a height that MP4 has to change
    path = tmp_path / f"clip.{ending}"
    save_clip(frames, path, frames_per_second=10)
    again = frames_in(path)
    assert len(again) == 5
    assert again.shape == (5, 3, 32 if ending == "mp4" else 33, 36)
    assert (again - frames[..., :again.shape[-2], :]).abs().max() < 0.03
    if ending == "mp4":
        import av

        with av.open(path) as container:
            assert container.streams.video[0].average_rate == 10
    else:
        with Image.open(path) as image:
            assert image.info["loop"] == 0
            image.seek(1)
            image.load()
            assert image.info["duration"] == 100


@pytest.mark.parametrize(("ending", "side"), [("webp", 16_384), ("gif", 65_536), ("mp4", 16_386), ("mp4", 1)])
def test_a_size_that_a_format_does_not_have_is_refused(tmp_path, ending, side):
    with pytest.raises(PictureError, match=f"frames of {side} x 2 pixels cannot be written, only sides of"):
        save_clip(torch.zeros(2, 3, 2, side), tmp_path / f"a.{ending}", frames_per_second=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ending", "rate"), [("gif", 8), ("gif", 30), ("webp", 24)])
def test_a_clip_runs_as_long_as_its_frames_at_a_rate_that_is_no_whole_number_of_ticks(tmp_path, ending, rate):
    frames = torch.linspace(0.1, 0.9, 24).view(24, 1, 1, 1).expand(24, 3, 8, 8)
    save_clip(frames, tmp_path / f"clip.{ending}", frames_per_second=rate)
    with Image.open(tmp_path / f"clip.{ending}") as image:
        durations = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            durations.append(frame.info["duration"])
    assert sum(durations) == pytest.approx(24_000 / rate, abs=10)


def test_clips_in_formats_without_transparency_are_laid_on_white(tmp_path):
    frames = torch.zeros(3, 4, 16, 32)
    frames[:, 3, :, 16:] = 1  # the left half is invisible but for a corner, the right half black
    frames[:, 3, 0, 0] = 0.5
    for name in ("x.gif", "x.mp4", "x.webp"):
        save_clip(frames, tmp_path / name, frames_per_second=8)
    for name in ("x.gif", "x.mp4"):
        shown = frames_in(tmp_path / name)
        assert shown[..., 2:14].mean() > 0.95
        assert shown[..., 18:30].mean() < 0.05
    with Image.open(tmp_path / "x.webp") as picture:
        assert picture.convert("RGBA").getextrema()[3] == (0, 255)


@pytest.mark.parametrize("number", [1, 2, 40, 41])
def test_a_film_is_one_that_every_player_knows(tmp_path, number):
    colours = torch.tensor(COLOURS).T.repeat_interleave(22, dim=1)[:, None].expand(3, 65, 66) / 255
    assert save_clip(iter([colours] * number), tmp_path / "film.mp4", frames_per_second=30, num_frames=number) == number
    described, frames = film_of(tmp_path / "film.mp4")
    assert (described["codec"], described["fps"], described["size"]) == ("h264", 30, (66, 64))
    assert "yuv420p(tv, bt709" in described["pix_fmt"]
    assert described["duration"] == pytest.approx(number / 30, abs=0.01)
    assert len(frames) == number
    for index, colour in enumerate(COLOURS):
        assert np.abs(frames[:, 32, 11 + 22 * index].astype(int) - colour).max() <= 3
    content = (tmp_path / "film.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser can play it while it loads
    assert b"moof" not in content
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_a_film_whose_process_is_killed_plays_up_to_about_the_last_second(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITE_SLOWLY, "150"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
                          stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == "150\n":
                process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                break
    assert [path.name for path in tmp_path.iterdir()] == ["film.part.mp4"]
    _, frames = film_of(tmp_path / "film.part.mp4")
    assert 150 - 2 * 30 <= len(frames) <= 150
    shown = frames.mean(axis=(1, 2, 3)) / 255 * 300
    assert np.abs(shown - np.arange(len(frames))).max() < 2


def test_an_mp4_needs_no_more_memory_the_longer_it_is(tmp_path):
    alive, most = weakref.WeakSet(), 0

    def frames():
        nonlocal most
        for index in range(100):
            frame = torch.full((3, 32, 32), index / 100)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    save_clip(frames(), tmp_path / "film.mp4", frames_per_second=30, num_frames=100)
    assert most <= 4


def test_frames_that_do_not_fit_into_memory_are_refused_where_the_format_needs_them_all(tmp_path, monkeypatch):
    frames = torch.zeros(40, 3, 32, 32)
    monkeypatch.setattr(video_files, "LARGEST_IN_MEMORY", 40 * 3 * 32 * 32)
    for ending in CLIP_FORMATS:
        save_clip(frames, tmp_path / f"a.{ending}", frames_per_second=8)
    monkeypatch.setattr(video_files, "LARGEST_IN_MEMORY", 40 * 3 * 32 * 32 - 1)
    for ending in ("webp", "gif"):
        with pytest.raises(PictureError, match="40 frames of 32 x 32 pixels are 0.0 GiB, .* --format mp4 does not"):
            save_clip(frames, tmp_path / f"b.{ending}", frames_per_second=8)
    save_clip(frames, tmp_path / "b.mp4", frames_per_second=8)


@pytest.mark.parametrize("ending", CLIP_FORMATS)
def test_no_frame_is_no_file_and_a_clip_may_end_early(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    assert save_clip(iter([]), path, frames_per_second=8, num_frames=5) == 0
    assert not list(tmp_path.iterdir())
    frames = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    assert save_clip(iter(frames[:3]), path, frames_per_second=8, num_frames=5) == 3
    assert (frames_in(path) - frames[:3]).abs().max() < 0.03


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of a file")
def test_a_full_disk_is_said_and_what_there_is_of_the_film_plays(tmp_path):
    code = """
import resource, signal, torch, video_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
video_files.save_clip((torch.rand(3, 64, 64) for _ in range(90)), "film.mp4", frames_per_second=8, num_frames=90)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)
    assert "OSError: film.mp4 could not be finished" in done.stderr
    assert "bytes are free there" in done.stderr
    assert "what was written can be played: film.part.mp4" in done.stderr
    assert len(film_of(tmp_path / "film.part.mp4")[1]) >= 8


def test_what_is_missing_for_mp4_is_known_before_the_first_frame(monkeypatch):
    import av

    assert pyav_fault() is None
    monkeypatch.setattr(video_files.importlib.metadata, "version", lambda name: "16.1.0")
    assert pyav_fault() == "needs the package av 17 or newer, found 16.1.0: pip install --upgrade av"
    monkeypatch.setattr(av, "Codec", lambda name, mode: (_ for _ in ()).throw(av.codec.codec.UnknownCodecError(name)))
    assert "cannot write H.264 (libx264)" in pyav_fault()
    monkeypatch.setitem(sys.modules, "av", None)
    assert pyav_fault() == "needs the package av: pip install av"
