import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import draw_film

import latent_paths
from film_sound import sound_of
from latent_paths import encode_film
from video_files import save_clip
from video_frames import open_film

FLASH = 36  # number of the frame that is white, at 1.2 seconds of 30 frames a second


def flashing(size=(32, 32), num_frames=84):
    return [np.full((*size, 3), 255 if index == FLASH else 40, np.uint8) for index in range(num_frames)]


def copied(source, target, report):
    """Writes the frames of a film as they are, with its sound; returns how many there are."""
    with open_film(source) as film:
        frames = list(film.frames())
        pictures = [torch.from_numpy(np.array(frame.picture())).permute(2, 0, 1) / 255 for frame in frames]
        sound = functools.partial(sound_of, source, film.start, report=report)
        return save_clip(pictures, target, ends=[frame.end for frame in frames], sound=sound)


def heard_and_seen(path):
    """When the beep and the flash are, in seconds, the number of frames, and the codec of the sound, None where silent."""
    import av

    with av.open(str(path)) as container:
        brightness = [(frame.to_ndarray(format="gray").mean(), float(frame.pts * frame.time_base))
                      for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None, max(brightness)[1], len(brightness), None
        codec = container.streams.audio[0].codec.canonical_name
        resampler = av.AudioResampler(format="flt", layout="mono", rate=48_000)
        for frame in container.decode(audio=0):
            for part in resampler.resample(frame):
                loud = np.flatnonzero(np.abs(part.to_ndarray()[0]) > 0.2)
                if len(loud):
                    return float(part.time + loud[0] / 48_000), max(brightness)[1], len(brightness), codec
    return None, max(brightness)[1], len(brightness), codec


@pytest.mark.parametrize(("name", "codec", "written"), [
    ("a.mp4", "aac", "aac"), ("a.mkv", "libmp3lame", "mp3"), ("a.mp4", "libmp3lame", "mp3"), ("a.avi", "libmp3lame", "aac"),
    ("a.webm", "libopus", "aac"), ("a.mkv", "flac", "aac"), ("a.mov", "pcm_s16le", "aac"), ("a.avi", "pcm_s16le", "aac"),
    ("a.mov", "pcm_alaw", "aac"), ("a.mkv", "ac3", "aac")])
def test_sound_stays_with_the_picture(tmp_path, name, codec, written):
    source = draw_film(tmp_path / name, flashing(), codec="libvpx-vp9" if name == "a.webm" else "libx264", sound=codec)
    lines = []
    assert copied(source, tmp_path / "new.mp4", lines.append) == 84
    beep, flash, number, codec = heard_and_seen(tmp_path / "new.mp4")
    assert (number, codec) == (84, written)
    assert abs(beep - flash) < 0.04
    assert flash == pytest.approx(1.2, abs=0.04)
    assert len(lines) == (written == "aac" and name != "a.mp4")


@pytest.mark.parametrize(("late", "first"), [(0, 5_000), (500, 0)])
def test_sound_stays_with_the_picture_where_one_of_them_begins_later(tmp_path, late, first):
    # The beep is at 1.2 seconds of the file, the flash at frame 36 of those that begin at `late` or `first` milliseconds.
    times = [late + first + 1_000 * index // 30 for index in range(84)]
    source = draw_film(tmp_path / "a.mkv", flashing(), times=times, sound="aac")
    beep, flash, *_ = heard_and_seen(source)
    assert copied(source, tmp_path / "new.mp4", None) == 84
    new_beep, new_flash, number, _ = heard_and_seen(tmp_path / "new.mp4")
    assert number == 84
    assert new_beep - new_flash == pytest.approx(beep - flash, abs=0.04)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])  # the times of the second are rounded
def test_a_rate_that_is_no_whole_number_stays_what_it_is(tmp_path, name):
    import av

    source = draw_film(tmp_path / name, flashing(), rate=Fraction(30_000, 1_001), sound="aac")
    copied(source, tmp_path / "new.mp4", None)
    with av.open(str(tmp_path / "new.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30_000, 1_001)
        assert (stream.start_time, stream.frames) == (0, 84)


def test_uneven_times_stay_what_they_are(tmp_path):
    times = [*range(0, 1_000, 40), 3_000, 3_100]
    source = draw_film(tmp_path / "a.mp4", flashing(num_frames=len(times)), times=times)
    copied(source, tmp_path / "new.mp4", None)
    with open_film(tmp_path / "new.mp4") as film:
        assert [round(1_000 * frame.time) for frame in film.frames()] == times


def test_a_film_without_sound_is_silent_and_says_nothing(tmp_path):
    lines = []
    copied(draw_film(tmp_path / "a.mp4", flashing()), tmp_path / "new.mp4", lines.append)
    assert heard_and_seen(tmp_path / "new.mp4")[3] is None
    assert not lines


def test_sound_that_cannot_be_encoded_leaves_a_silent_film_and_a_line(tmp_path, monkeypatch):
    import av

    source = draw_film(tmp_path / "a.mkv", flashing(), sound="flac")
    with monkeypatch.context() as patched:
        patched.setattr(av, "AudioResampler", lambda **settings: (_ for _ in ()).throw(ValueError("no such layout")))
        lines = []
        assert copied(source, tmp_path / "new.mp4", lines.append) == 84
    assert lines[-1] == "note: the film is silent, because its sound cannot be read (no such layout)"
    assert heard_and_seen(tmp_path / "new.mp4")[2] == 84


def test_sound_that_is_longer_than_the_picture_is_kept(tmp_path):
    import av

    source = draw_film(tmp_path / "a.mp4", flashing(num_frames=45), sound="aac")
    copied(source, tmp_path / "new.mp4", None)
    with av.open(str(tmp_path / "new.mp4")) as container:
        stream = container.streams.audio[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(2.8, abs=0.05)


def test_latents_of_a_film_are_those_of_its_frames(tmp_path, monkeypatch):
    """With so many frames that there are several batches, of which the last is not full."""
    class Mean(torch.nn.Linear):
        image_shape, preparation = (3, 32, 32), {"channels": 3, "resize_mode": "crop", "levels": {}}
        mu = property(lambda self: self)

        def encode(self, images):
            return images.mean(dim=(1, 2, 3))[:, None], None

    monkeypatch.setattr(latent_paths, "PIXELS_AT_A_TIME", 10 * 32 * 32)
    latents = encode_film(Mean(1, 1), draw_film(tmp_path / "a.mp4", flashing()))
    assert latents.z.shape == (84, 1)
    expected = torch.full((84,), 40 / 255)
    expected[FLASH] = 1
    assert (latents.z[:, 0] - expected).abs().max() < 0.02
    assert latents.changes[0] == 0
    assert (latents.changes > 0.5).nonzero()[:, 0].tolist() == [FLASH, FLASH + 1]
    assert len(latents.ends) == 84
