import math
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import MODEL, ROOT, STATE, TINY, Payload, draw_film, frames_in, read, save_picture
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

import generate
import latent_paths
import training
import video_files
from checkpointing import load_checkpoint, load_generator, save_checkpoint
from config import Config
from demo_images import draw_shape
from generate import Options, encode_photo, numbers, time_lapse, walk
from latent_paths import FilmLatents, encode_film, frames_of, loop, smoothed, steady_film, steady_loop
from model_definitions import VAE
from pictures import enlarge
from randomness import latent_noise
from synthetic_video import synthetic_video


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    vae = VAE(**MODEL).requires_grad_(False)
    vae.mu.weight *= 20  # so that its images differ, which those of a new one hardly do
    vae.decoder[0].weight *= 4
    return save_checkpoint(tmp_path / "saved", 1, STATE | {"averaged": vae.state_dict()}, keep=1)


@pytest.fixture
def photos():
    for index, name in enumerate(("a.png", "b.jpg")):
        draw_shape("heart", random.Random(index)).save(name)
    return "a.png", "b.jpg"


def assert_near(frames, expected):
    """Each frame is like its own counterpart, and more so than like any other; a clip may be lossy in detail."""
    assert frames.shape == expected.shape
    frames, expected = (F.avg_pool2d(images, 4).flatten(1) for images in (frames, expected))
    difference = (frames[:, None] - expected[None]).square().mean(dim=2).sqrt()
    assert difference.diagonal().max() < 0.03
    assert difference.argmin(dim=1).tolist() == list(range(len(frames)))


def written():
    return sorted(path.name for path in pathlib.Path("generated").iterdir())


def picture(name):
    return read(pathlib.Path("generated", name))


def clip(name):
    return frames_in(pathlib.Path("generated", name))


def test_an_image_depends_on_its_seed_and_number_alone(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(latent_paths, "PIXELS_AT_A_TIME", 4 * 32 * 32)
    monkeypatch.setattr(generate, "MANY", 9)
    assert generate.main([str(checkpoint), "--num-images", "5"]) == 0
    assert written() == [f"seed0-0000{index}.png" for index in range(5)]
    five = [picture(name) for name in written()]
    for number in (3, 9):
        assert generate.main([str(checkpoint), "--num-images", str(number), "--out", f"of {number}"]) == 0
        for index, image in enumerate(five[:number]):
            again = read(pathlib.Path(f"of {number}/seed0-0000{index}.png"))
            assert (again - image).abs().max() < 1.01 / 255
            assert all((again - other).abs().max() > 5 / 255 for other in five if other is not image)
    assert generate.main([str(checkpoint), "--num-images", "1", "--seed", "4"]) == 0
    assert all((picture("seed4-00000.png") - image).abs().max() > 5 / 255 for image in five)
    assert "warning" not in capfd.readouterr().out  # the faster layer has been used


def test_the_pictures_of_a_run_are_those_of_its_sample_grid(train_tiny):
    run = train_tiny(steps=30, seed=5, generator_learning_rate=0.1)  # so that the average is another than the newest
    assert generate.main([str(run), "--grid", "--num-images", "64", "--seed", "5"]) == 0
    assert (picture("seed5-grid.png") - read(run / "samples" / "step_0000030.png")).abs().max() < 1.01 / 255


def test_what_it_says_is_what_it_wrote(checkpoint, capfd):
    generate.main([str(checkpoint), "--num-images", "3"])
    assert capfd.readouterr().out == "wrote generated/seed0-00000.png and 2 more\n"


def test_a_walk_is_a_closed_smooth_path_through_its_start():
    z = latent_noise(1, [7], 128)
    path = walk(z, 16, seed=1, index=7)
    assert torch.allclose(path[0], z[0])
    steps = (path - path.roll(1, 0)).norm(dim=1)
    assert steps.max() < 1.5 * steps.min()  # the one from the last to the first among them
    farthest = (path - z).norm(dim=1)
    assert farthest.argmax() in (7, 8, 9)
    assert 0.5 < farthest.max() / z.norm() < 0.7
    assert not torch.allclose(walk(z, 16, seed=1, index=8)[5], path[5])
    assert walk(torch.zeros(1, 1), 4).shape == (4, 1)


def test_a_path_goes_through_its_keys_and_back_without_a_corner():
    keys = latent_noise(0, range(4), 128) * torch.tensor([1.0, 0.8, 1.2, 1.0])[:, None]
    path = loop(keys, torch.arange(400) / 400)
    assert torch.allclose(path[::100], keys, atol=1e-4)
    lengths = path.norm(dim=1)
    assert lengths[50] == pytest.approx((lengths[0] + lengths[100]).item() / 2, rel=1e-3)  # the mean vector: 0.7 of that
    steps = path.roll(-1, 0) - path
    turns = torch.cosine_similarity(steps, steps.roll(1, 0))
    assert turns.min() > 0.99  # at the keys and where it closes too


def test_two_keys_are_gone_through_there_and_back():
    a, b = latent_noise(0, [0], 8), latent_noise(0, [1], 8)
    path = loop(torch.cat([a, b]), torch.arange(16) / 16)
    assert torch.allclose(path[0], a[0])
    assert torch.allclose(path[8], b[0])
    assert torch.allclose(path[1:], path[1:].flip(0), atol=1e-6)


@pytest.mark.parametrize("num_keys", [1, 2, 3, 5])
def test_a_film_moves_at_a_steady_visible_speed(num_keys):
    vae = load_generator(ROOT / "pretrained" / "shapes.pt")
    keys = latent_noise(0, range(num_keys), vae.latent_dim)
    path = steady_loop(vae, keys, 48)
    assert torch.allclose(path[0], keys[0], atol=1e-3)
    steps = _steps(frames_of(vae, path))
    assert steps.max() < 1.6 * steps.median()  # from the last to the first too
    if num_keys != 2:
        assert steps.min() > 0.6 * steps.median()
        assert _steps(frames_of(vae, loop(keys, torch.arange(48) / 48))).max() > 1.3 * steps.max()


def _steps(frames):
    return (frames.roll(-1, 0) - frames).abs().mean(dim=(1, 2, 3))


def test_walks_begin_at_their_images(checkpoint):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--num-images", "2", "--clip", "walk", "--frames", "5"]) == 0
    assert written() == ["seed0-00000-walk.webp", "seed0-00001-walk.webp"]
    for index in range(2):
        frames = clip(f"seed0-0000{index}-walk.webp")
        z = latent_noise(0, [index], MODEL["latent_dim"])
        assert_near(frames, frames_of(vae, walk(z, 5, index=index)))
        assert_near(frames[:1], vae.decode(z))


def test_the_synthetic_video_of_an_image_as_a_clip(checkpoint):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--num-images", "1", "--clip", "synthetic", "--frames", "5"]) == 0
    expected = synthetic_video(vae.decode(latent_noise(0, [0], MODEL["latent_dim"])), 5)[0]
    assert_near(clip("seed0-00000-synthetic.webp"), expected)


def test_a_grid_of_clips_moves_all_of_them_at_once(checkpoint):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--num-images", "3", "--clip", "walk", "--grid", "--frames", "4", "--size", "64",
                          "--enlarge", "nearest"]) == 0
    frames = clip("seed0-grid-walk.webp")
    assert frames.shape == (4, 3, 2 * 66 + 2, 2 * 66 + 2)
    third = frames_of(vae, walk(latent_noise(0, [2], MODEL["latent_dim"]), 4, index=2))
    assert_near(frames[:, :, 68:132, 2:66], enlarge(third, 64, smooth=False))


def test_a_photo_is_encoded_and_walked_around(checkpoint, photos):
    vae = load_generator(checkpoint)
    mu = encode_photo(vae, photos[0])
    with Image.open(photos[0]) as photo:
        pixels = pil_to_tensor(photo.resize((32, 32), Image.Resampling.LANCZOS))
    assert torch.equal(mu, vae.encode(pixels[None] / 255)[0])
    assert generate.main([str(checkpoint), "--animate", photos[0], "--format", "gif", "--frames", "6"]) == 0
    frames = clip("a-animated.gif")
    assert len(frames) == 6
    assert_near(frames[:1], vae.decode(mu))


def test_two_photos_are_morphed(checkpoint, photos):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--morph", *photos]) == 0
    frames = clip("a-to-b.webp")
    for frame, photo in ((0, photos[0]), (8, photos[1])):
        assert_near(frames[frame:frame + 1], vae.decode(encode_photo(vae, photo)))


def test_a_film_goes_through_the_images_of_its_seed(checkpoint):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--video", "1.5", "--fps", "20", "--num-keyframes", "3"]) == 0
    assert written() == ["seed0-film.webp"]
    keys = latent_noise(0, range(3), MODEL["latent_dim"])
    frames = clip("seed0-film.webp")
    assert_near(frames, frames_of(vae, steady_loop(vae, keys, 30)))
    for image in vae.decode(keys):
        assert (frames - image).abs().mean(dim=(1, 2, 3)).min() < 0.03
    assert generate.main([str(checkpoint), "--video", "0.5", "--format", "gif", "--fps", "50"]) == 0
    assert len(clip("seed0-film.gif")) == 25


def test_films_side_by_side_go_through_images_of_their_own(checkpoint):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--video", "1", "--fps", "4", "--num-keyframes", "3", "--grid", "--num-images",
                          "2"]) == 0
    frames = clip("seed0-grid-film.webp")
    assert frames.shape == (4, 3, 36, 70)
    second = steady_loop(vae, latent_noise(0, [3, 4, 5], MODEL["latent_dim"]), 4)
    assert_near(frames[..., 2:34, 36:68], frames_of(vae, second))


def test_a_film_goes_through_photos_and_folders_of_them(checkpoint, photos, capfd):
    vae = load_generator(checkpoint)
    pathlib.Path("more").mkdir()
    draw_shape("star", random.Random(5)).save("more/c.png")
    assert generate.main([str(checkpoint), "--video", "3", "--fps", "10", "--keyframes", *photos, "more"]) == 0
    frames = clip("a-to-b-to-c.webp")
    assert len(frames) == 30
    for photo in (*photos, "more/c.png"):
        image = vae.decode(encode_photo(vae, photo))
        assert (frames - image).abs().mean(dim=(1, 2, 3)).min() < 0.03
    said = [line for line in capfd.readouterr().out.splitlines() if "times as long" in line]
    lengths = [encode_photo(vae, photo).norm() / MODEL["latent_dim"]**0.5 for photo in (*photos, "more/c.png")]
    assert len(said) == sum(length > generate.LONG for length in lengths)


def test_a_photo_that_is_far_from_what_training_draws_is_named(checkpoint, photos, monkeypatch, capfd):
    monkeypatch.setattr(generate, "encode_photo", lambda vae, photo: torch.full((1, vae.latent_dim), 2.0))
    assert generate.main([str(checkpoint), "--animate", photos[0], "--frames", "2"]) == 0
    assert "the latent vector of a.png is 2.0 times as long as those that training draws" in capfd.readouterr().out


def test_images_are_chosen_by_number_or_by_seed_and_can_be_tamer(checkpoint):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--images", "7, 3-4", "--temperature", "0.5"]) == 0
    assert written() == ["seed0-00003.png", "seed0-00004.png", "seed0-00007.png"]
    image = vae.decode(0.5 * latent_noise(0, [4], MODEL["latent_dim"]))[0]
    assert (picture("seed0-00004.png") - image).abs().max() < 1.01 / 255
    assert generate.main([str(checkpoint), "--seeds", "2,5-6", "--out", "seeds"]) == 0
    assert sorted(os.listdir("seeds")) == ["seed2-00000.png", "seed5-00000.png", "seed6-00000.png"]
    image = vae.decode(latent_noise(5, [0], MODEL["latent_dim"]))[0]
    assert (read(pathlib.Path("seeds/seed5-00000.png")) - image).abs().max() < 1.01 / 255


@pytest.mark.parametrize(("text", "expected"), [
    ("3", [3]), ("1,5-7", [1, 5, 6, 7]), ("0-2,1", [0, 1, 2]), (" 2 , 0 - 1 ", [2, 0, 1]), ("", []), ("1,", []), ("5-3", []),
    ("-1", []), ("0-99999999999", [])])
def test_numbers_are_read_from_lists_and_ranges(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize("ending", ["webp", "gif", "mp4"])
def test_a_film_that_is_stopped_keeps_its_frames(checkpoint, monkeypatch, capfd, ending):
    images_of = latent_paths.images_of

    def stopped_after_seven(vae, z, **settings):
        for index, image in enumerate(images_of(vae, z, **settings)):
            if index == 7:
                signal.raise_signal(signal.SIGTERM)
            yield image

    monkeypatch.setattr(generate, "images_of", stopped_after_seven)
    assert generate.main([str(checkpoint), "--video", "1", "--fps", "20", "--format", ending]) == 128 + signal.SIGTERM
    assert written() == [f"seed0-film.{ending}"]
    assert len(clip(f"seed0-film.{ending}")) == 7
    assert capfd.readouterr().out == f"stopped: generated/seed0-film.{ending} has the first 7 of 20 frames\n"


def test_latent_vectors_of_a_film_are_averaged_over_time_without_lag_and_not_across_cuts():
    z = torch.zeros(12, 2)
    z[3], z[8:] = 1, 10
    cuts = torch.arange(12) == 8
    again = smoothed(z, 3, cuts)
    assert torch.equal(again[8:], z[8:])
    assert again[:8, 0].tolist() == [0, 0, 0.25, 0.5, 0.25, 0, 0, 0]
    assert torch.equal(smoothed(z, 1, cuts), z)
    assert smoothed(torch.ones(3, 2), 17, torch.zeros(3, dtype=torch.bool)).tolist() == [[1, 1]] * 3
    line = torch.arange(20.0)[:, None]
    assert torch.equal(smoothed(line, 5, torch.zeros(20, dtype=torch.bool))[2:-2], line[2:-2])


@pytest.mark.parametrize(("noise", "averaged"), [(0.02, False), (1.5, True)])
def test_a_film_is_averaged_over_time_where_that_lowers_its_flicker(checkpoint, noise, averaged):
    vae = load_generator(checkpoint)
    keys = latent_noise(0, range(4), MODEL["latent_dim"])
    calm = steady_loop(vae, keys, 48)
    own = _steps(frames_of(vae, calm)).mean().item()
    z = calm + noise * latent_noise(1, range(48), MODEL["latent_dim"])
    changes = torch.full((48,), 1.1 * own)
    again, line = steady_film(vae, FilmLatents(z, changes, [], 0, []))
    assert (not torch.equal(again, z)) == averaged == ("averaged over" in line)
    before, after = (_steps(frames_of(vae, rows)).mean().item() for rows in (z, again))
    assert f"changes {before / (1.1 * own):.1f}" in line[:48] or len(line) > 48
    assert after < (0.6 * before if averaged else 1.1 * own)


def moving_square(path, *, frames=24, **settings):
    """A film of a square that moves to the right, with a cut to a light ground after half of it."""
    pictures = []
    for index in range(frames):
        picture = np.full((40, 48, 3), 40 if index < frames // 2 else 220, np.uint8)
        picture[10:20, index:index + 12] = 128
        pictures.append(picture)
    return draw_film(path, pictures, **settings)


def test_a_film_is_reconstructed_frame_by_frame_with_its_sound(checkpoint, tmp_path, capfd):
    film = moving_square(tmp_path / "film.mp4", sound="aac")
    assert generate.main([str(checkpoint), "--reconstruct", str(film)]) == 0
    assert written() == ["film-reconstruction.mp4"]
    out = capfd.readouterr().out
    assert f"{film}: from frame to frame it changes" in out
    assert out.endswith("wrote generated/film-reconstruction.mp4\n")
    import av

    with av.open("generated/film-reconstruction.mp4") as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert container.streams.video[0].average_rate == 30
    vae = load_generator(checkpoint)
    latents = encode_film(vae, film)
    frames = clip("film-reconstruction.mp4")
    expected = frames_of(vae, steady_film(vae, latents)[0])
    assert F.avg_pool2d(frames - expected, 4).abs().mean() < 0.01
    assert (frames[12] - frames[11]).abs().mean() > 5 * (frames[11] - frames[10]).abs().mean()  # the cut stays one


def test_a_run_on_a_film_alone_reconstructs_its_motion(tmp_path):
    def picture(index):
        ground, left = np.full((48, 48, 3), 30, np.uint8), round(18 + 14 * math.sin(2 * math.pi * index / 45))
        ground[16:32, left:left + 14] = 230
        return ground

    def place(frames):
        """How far to the right the light part of each frame is."""
        light = frames.mean(dim=1) - frames.mean(dim=1).amin(dim=(1, 2), keepdim=True)
        return (light * torch.linspace(0, 1, light.shape[-1])).sum(dim=(1, 2)) / light.sum(dim=(1, 2))

    film = draw_film(tmp_path / "film.mp4", map(picture, range(90)))
    run = training.train(Config(**TINY | {"data": str(film), "video_fps": 15, "steps": 200, "batch_size": 8,
                                          "warm_up_images": 800, "kl_weight": 0.001}))
    assert generate.main([str(run), "--reconstruct", str(film)]) == 0
    places = torch.stack([place(frames_in(film)), place(clip("film-reconstruction.mp4"))])
    assert torch.corrcoef(places)[0, 1] > 0.95


def test_photos_and_folders_of_them_and_of_films_are_reconstructed(checkpoint, photos, tmp_path):
    save_picture(tmp_path / "set" / "cats" / "a.png", color=(90, 20, 20))
    moving_square(tmp_path / "set" / "dogs" / "film.mov")
    assert generate.main([str(checkpoint), "--reconstruct", "a.png", "set", "--size", "64"]) == 0
    assert written() == ["a-reconstruction.png", "cats-a-reconstruction.png", "dogs-film-reconstruction.mp4"]
    vae = load_generator(checkpoint)
    expected = enlarge(vae.decode(encode_photo(vae, "a.png")).detach(), 64, smooth=True)[0]
    assert (picture("a-reconstruction.png") - expected).abs().max() < 1 / 255
    assert clip("dogs-film-reconstruction.mp4").shape == (24, 3, 64, 64)


def test_names_that_are_long_together_are_cut(checkpoint, tmp_path):
    photos = [str(save_picture(tmp_path / "set" / ("ж" * 100) / f"{letter * 40}.png")) for letter in "жщф"]
    assert generate.main([str(checkpoint), "--video", "0.1", "--keyframes", *photos]) == 0
    assert generate.main([str(checkpoint), "--reconstruct", "set"]) == 0
    assert written() == ["ж" * 40 + "-to-" + "щ" * 40 + "-to-" + "ф" * 6 + ".webp", "ж" * 90 + "-2-reconstruction.png",
                         "ж" * 90 + "-3-reconstruction.png", "ж" * 90 + "-reconstruction.png"]


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_a_film_is_reconstructed_in_other_formats_too(checkpoint, tmp_path, ending):
    film = moving_square(tmp_path / "film.mkv", times=[100 * index for index in range(24)], sound="aac")
    assert generate.main([str(checkpoint), "--reconstruct", str(film), "--format", ending]) == 0
    with Image.open(f"generated/film-reconstruction.{ending}") as image:
        image.load()
        assert image.info["duration"] == 100


def test_files_of_one_name_do_not_replace_each_other_and_broken_ones_are_left_out(checkpoint, tmp_path, capfd):
    for name in ("set/a.png", "set/a.jpg", "set/x/a.png", "other/a.png", "other/line\nbreak.png"):
        save_picture(tmp_path / name)
    (tmp_path / "set" / "b.mp4").write_text("broken")
    (tmp_path / "set" / "c.png").write_text("broken")
    assert generate.main([str(checkpoint), "--reconstruct", "set", "other"]) == 0
    assert written() == ["a-2-reconstruction.png", "a-3-reconstruction.png", "a-reconstruction.png",
                         "line_break-reconstruction.png", "x-a-reconstruction.png"]
    out = capfd.readouterr().out
    assert out.count("; it is left out\n") == 2
    assert out.endswith("and 4 more\n")
    assert generate.main([str(checkpoint), "--reconstruct", "set", "nosuch.png", "--out", "new"]) == 2
    assert generate.main([str(checkpoint), "--reconstruct", "set/b.mp4", "set/c.png", "--out", "new"]) == 2
    assert capfd.readouterr().err == "nosuch.png: no such file\n--reconstruct: none of the files can be read\n"
    assert not pathlib.Path("new").exists()


def test_what_a_format_cannot_have_is_said(checkpoint, tmp_path, capfd):
    film = moving_square(tmp_path / "film.mp4", sound="aac", rate=60)
    assert generate.main([str(checkpoint), "--reconstruct", str(film), "--format", "webp"]) == 0
    assert "its sound is left out, which only --format mp4 can have" in capfd.readouterr().out
    assert generate.main([str(checkpoint), "--reconstruct", str(film), "--format", "gif"]) == 2
    assert "60 frames per second, and players show more than 50 of a GIF wrongly" in capfd.readouterr().err
    photo = save_picture(tmp_path / "photo.png")
    assert generate.main([str(checkpoint), "--reconstruct", str(film), str(photo), "--format", "gif", "--out", "new"]) == 0
    assert "a GIF wrongly; --format mp4 can have them; it is left out\n" in capfd.readouterr().out
    assert os.listdir("new") == ["photo-reconstruction.png"]


def test_what_is_no_film_or_photo_is_said_before_anything_is_written(checkpoint, tmp_path, capfd):
    (tmp_path / "a.mp4").write_text("x")
    assert generate.main([str(checkpoint), "--reconstruct", "a.mp4"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("a.mp4: no film of a kind that is read here")
    assert not pathlib.Path("generated").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--video", "9000"], "generated/seed0-film.webp: 270000 frames of 32 x 32 pixels are 0.8 GiB"),
    (["--video", "4", "--size", "4096", "--grid", "--num-images", "25"], "only sides of 1 to 16383"),
    (["--video", "4", "--out", "a.png/films"], "a.png/films could not be written: "),
    (["--reconstruct", "a.png", "--out", "a.png"], "a.png could not be written: "),
    (["--video", "4", "--keyframes", "a.png", "film.MOV"], "film.MOV is a film, a photo is needed; --reconstruct"),
])
def test_what_cannot_be_written_is_said_before_images_are_made(checkpoint, monkeypatch, capfd, arguments, said):
    save_picture("a.png")
    monkeypatch.setattr(video_files, "LARGEST_IN_MEMORY", 800_000_000)
    monkeypatch.setattr(VAE, "decode_parts", None)
    assert generate.main([str(checkpoint), *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line


def test_alpha_maps_are_of_the_images_of_the_seed(checkpoint):
    vae = load_generator(checkpoint)
    assert generate.main([str(checkpoint), "--num-images", "2", "--alpha-maps"]) == 0
    drawn = picture("seed0-alpha.png")
    decoded = vae.decode_parts(latent_noise(0, range(2), MODEL["latent_dim"]))
    for index in range(2):
        left = 2 + 102 * index
        assert (drawn[:, 2:34, left:left + 32] - decoded.before[index]).abs().max() < 1 / 255
        assert (drawn[:, 2:34, left + 68:left + 100] - decoded.images[index]).abs().max() < 1 / 255


def test_a_time_lapse_shows_the_sample_grids_in_order(train_tiny):
    run = train_tiny(steps=3, sample_every=1, generator_learning_rate=3.0, ema_half_life_images=1.0)
    for before, after in (("0000003", "10000000"), ("0000002", "9999999")):
        (run / "samples" / f"step_{before}.png").rename(run / "samples" / f"step_{after}.png")
    assert generate.main([str(run), "--timelapse", "--fps", "5"]) == 0
    frames = clip("timelapse.webp")
    expected = [read(run / "samples" / f"step_{name}.png") for name in ("0000000", "0000001", "9999999", "10000000")]
    assert_near(frames, torch.stack(expected))
    grids, number = time_lapse(run)
    assert number == 4
    assert torch.equal(list(grids)[-1], expected[-1])


def test_mp4_is_written_where_av_is_installed_and_refused_where_not(checkpoint, monkeypatch, capfd):
    assert generate.main([str(checkpoint), "--num-images", "1", "--clip", "walk", "--format", "mp4"]) == 0
    assert clip("seed0-00000-walk.mp4").shape == (16, 3, 32, 32)
    monkeypatch.setitem(sys.modules, "av", None)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(checkpoint), "--num-images", "1", "--clip", "walk", "--format", "mp4"])
    assert stopped.value.code == 2
    assert capfd.readouterr().err == "--format mp4: needs the package av: pip install av\n"
    assert written() == ["seed0-00000-walk.mp4"]


def test_an_exported_generator_is_the_same_and_says_nothing_of_its_maker(train_tiny, capfd):
    run = train_tiny(steps=2)
    assert generate.main([str(run), "--export", "small.pt"]) == 0
    one, other = load_generator(run).state_dict(), load_generator("small.pt").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    whole = run / "checkpoints" / "step_0000002.pt"
    assert os.path.getsize("small.pt") < os.path.getsize(whole) / 3
    assert b"images" in whole.read_bytes()  # the name of the data folder
    assert str(pathlib.Path.cwd()).encode() not in pathlib.Path("small.pt").read_bytes()
    assert load_checkpoint("small.pt")["config"]["steps"] == 2
    assert generate.main([str(run), "--export", "small.pt"]) == 2
    assert "small.pt is there already" in capfd.readouterr().err
    with pytest.raises(ValueError, match="small.pt holds a generator alone"):
        train_tiny(steps=3, out="new", resume="small.pt")


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere"], "nowhere: no such file"),
    ([".", ], ".: no checkpoints below it"),
    (["a.png"], "a.png: not a checkpoint, or a damaged one"),
    (["old.pt"], "old.pt: not a checkpoint of this program, or of another version"),
    (["code.pt"], "code.pt: not a checkpoint, or a damaged one"),
    (["saved/step_0000001.pt", "--animate", "none.jpg"], "none.jpg: no such file"),
    (["saved/step_0000001.pt", "--animate", "old.pt"], "old.pt: a ZIP archive, which is not read here"),
    (["saved/step_0000001.pt", "--morph", "a.png", "none.jpg"], "none.jpg: no such file"),
    (["saved/step_0000001.pt", "--timelapse"], "no sample grids in it"),
    (["plain/step_0000001.pt", "--alpha-maps"], "was trained with --output-layer none"),
    (["saved/step_0000001.pt", "--out", "a.png"], "could not be written"),
    (["saved/step_0000001.pt", "--clip", "walk", "--morph", "a.png", "b.jpg"], "--clip: one thing at a time"),
    (["saved/step_0000001.pt", "--grid", "--animate", "a.png"], "--grid: does not go with --animate"),
    (["saved/step_0000001.pt", "--clip", "dance"], "--clip: must be one of walk, synthetic, got dance"),
    (["saved/step_0000001.pt", "--fps", "0"], "--fps: must be at least 1, got 0"),
    (["saved/step_0000001.pt", "--animate", ""], ": not a file"),
    (["saved/step_0000001.pt", "--clip", "walk", "--format", "mp4", "--size", "1"],
     "frames of 1 x 1 pixels cannot be written"),
    (["saved/step_0000001.pt", "--fps", "61"], "--fps: must be at most 60, got 61"),
    (["saved/step_0000001.pt", "--fps", "51", "--format", "gif"], "--fps: must be at most 50 for gif, got 51"),
    (["saved/step_0000001.pt", "--images", "one"], "--images: must be numbers and ranges such as 1,5-9, got 'one'"),
    (["saved/step_0000001.pt", "--images", "1", "--seeds", "1"], "--images: are of one seed"),
    (["saved/step_0000001.pt", "--keyframes", "a.png"], "--keyframes: needs --video SECONDS"),
    (["saved/step_0000001.pt", "--video", "1", "--keyframes", "none.jpg"], "none.jpg: no such file"),
    (["saved/step_0000001.pt", "--video", "1", "--keyframes", "a.png", "--grid"], "--keyframes: are all the images of one"),
    (["saved/step_0000001.pt", "--video", "1", "--num-keyframes", "31"], "--video: 30 frames cannot go through 31 images"),
    (["saved/step_0000001.pt", "--reconstruct", "a.png", "--fps", "12"], "--fps: does not go with --reconstruct"),
    (["saved/step_0000001.pt", "--video", "0"], "--video: must be above 0, got 0"),
    (["saved/step_0000001.pt", "--num-images", "few"], "--num-images: must be a whole number, got 'few'"),
    pytest.param(["saved/step_0000001.pt", "--device", "cuda"], "--device: cuda is not available here; there is cpu",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")),
])
def test_what_cannot_be_had_is_said_in_one_line(checkpoint, photos, capfd, arguments, said):
    torch.save({"format": 1, **STATE}, "old.pt")
    torch.save({"format": 2, "x": Payload()}, "code.pt")
    plain = MODEL | {"output_layer": "none"}
    save_checkpoint("plain", 1, STATE | {"model_arguments": plain, "averaged": VAE(**plain).state_dict()}, keep=1)
    before = sorted(os.listdir())
    try:
        status = generate.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    assert sorted(os.listdir()) == before


def test_a_broken_sample_grid_is_named(train_tiny, capfd):
    run = train_tiny(steps=2, sample_every=1)
    (run / "samples" / "step_0000001.png").write_bytes(b"torn")
    assert generate.main([str(run), "--timelapse"]) == 2
    assert "step_0000001.png: cannot identify image file" in capfd.readouterr().err


def test_it_runs_anywhere_from_the_file_alone(checkpoint, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run([sys.executable, "-W", "error", ROOT / "generate.py", checkpoint, "--num-images", "1"],
                          cwd=elsewhere, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote generated/seed0-00000.png\n", "")
    assert os.listdir(elsewhere / "generated") == ["seed0-00000.png"]


def test_options_can_be_given_from_a_notebook(checkpoint):
    paths = generate.generate(checkpoint, Options(num_images=2, size=64))
    assert [read(path).shape for path in paths] == [(3, 64, 64)] * 2
    with pytest.raises(ValueError, match="--frames: must be at least 2, got 1"):
        generate.generate(checkpoint, Options(frames=1))
