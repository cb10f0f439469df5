"""Networks and runs that begin with small images."""
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal

import pytest
import torch
from helpers import (
    TINY,
    Child,
    assert_same,
    metrics,
    newest,
    read,
    tiny_arguments,
    tiny_gan,
    wait_until,
)
from PIL import Image, ImageChops
from torch import nn
from torch.nn import functional as F

import evaluate
import generate
import training
from batches import first_batches
from checkpointing import (
    CheckpointError,
    critic_arguments,
    list_checkpoints,
    load_generator,
    load_start,
    save_checkpoint,
)
from config import Config, from_command_line
from devices import DeviceError
from fast_paths import use_fast_layers, use_fast_updates, written_out_gradient
from growth import Growth, averaged_to
from image_files import DataError
from model_definitions import VAE, Discriminator, EvenConvTranspose2d
from randomness import random_generator
from resuming import RunFolderError, resolve_settings
from synthetic_video import synthetic_video
from wgan_gp import GAN

GROWING = {"image_size": 64, "grow_from": 32, "grow_every_images": 12}  # 32 px in the first three steps of a tiny run
SHAPES = [(64, 3), (128, 1), ((64, 112), 4), ((128, 64), 3)]


def moved(network):
    """The network in float64, with other weights everywhere but where a size that is still to come starts at zero."""
    generator = random_generator("moved")
    for module in network.double().modules():
        if not hasattr(module, "weight") or module.weight.count_nonzero():
            for parameter in module.parameters(recurse=False):
                parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return network


def enlarged(images):
    return F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("output_layer", ["cnn", "static", "none"])
@pytest.mark.parametrize(("size", "channels"), [*SHAPES, (512, 3), ((256, 320), 4)])
def test_the_networks_compute_the_same_at_the_next_size(size, channels, output_layer):
    torch.manual_seed(0)
    arguments = {"image_size": size, "channels": channels, "base_channels": 2, "grow_from": 32}
    vae = moved(VAE(latent_dim=8, num_frames=3, alpha_grid=4, output_layer=output_layer, **arguments))
    critic = moved(Discriminator(**arguments))
    z = torch.randn(2, 8, dtype=torch.float64)
    for large, small in itertools.pairwise(vae.image_sizes):
        images = torch.rand(2, channels, *large, dtype=torch.float64)
        before = []
        for sides in (small, large):
            vae.draw_at(min(sides))
            before.append(vae.decode_parts(z))
        logits = [torch.logit(decoded.before) for decoded in before]
        torch.testing.assert_close(logits[1], enlarged(logits[0]), atol=1e-12, rtol=0)
        for one, other in zip(vae.encode(images), vae.encode(averaged_to(images, min(small))), strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        torch.testing.assert_close(critic(images), 2 * critic(averaged_to(images, min(small))), atol=1e-12, rtol=0)
        far = (before[1].images - enlarged(before[0].images)).abs().mean().item()
        print(f"{small} to {large}, {channels} channels, {output_layer}: images change by {far:.5f}")


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_the_video_has_the_smallest_size_and_alpha_that_of_the_image(size, channels):
    vae = moved(VAE(image_size=size, channels=channels, base_channels=2, latent_dim=8, num_frames=3, grow_from=32))
    for sides in vae.image_sizes:
        vae.draw_at(min(sides))
        before, video, alpha, images = vae.decode_parts(torch.randn(2, 8, dtype=torch.float64))
        layer, small = vae.output_layer, averaged_to(before, 32)
        for actual, expected in ((video, synthetic_video(small, 3)),
                                 (alpha, F.interpolate(layer.cnn(video), sides, mode="bilinear")),
                                 (layer(before, video), images)):
            torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_the_slope_of_the_critic_stays_the_same_at_a_growth(size, channels):
    critic = moved(Discriminator(image_size=size, channels=channels, base_channels=4, grow_from=32))
    large, small = critic.image_sizes[:2]
    images = torch.rand(2, channels, *large, dtype=torch.float64, requires_grad=True)
    averaged = averaged_to(images, min(small)).detach().requires_grad_()
    slopes = [torch.autograd.grad(critic(given).sum(), given)[0].flatten(1).norm(dim=1) for given in (images, averaged)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_the_written_out_gradient_is_that_of_autograd_at_every_size(size, channels):
    critic = Discriminator(image_size=size, channels=channels, base_channels=4, grow_from=32).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for sides in critic.image_sizes:
        images = torch.rand(3, channels, *sides, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(critic(images).sum(), images)
        torch.testing.assert_close(written_out_gradient(critic, images.detach()), expected, atol=1e-12, rtol=0)


def test_the_faster_penalty_is_compared_at_every_size(monkeypatch):
    class OtherAtSmallSizes(Discriminator):
        def forward(self, images):
            return super().forward(images) * (2 if images.shape[-1] == 32 else 1)

    monkeypatch.setattr("wgan_gp.Discriminator", OtherAtSmallSizes)
    gan, said = tiny_gan(image_size=64, grow_from=32), []
    use_fast_layers(gan, report=said.append)
    assert gan.input_gradient is None
    assert "the penalty by double backward" in said[0]


@pytest.mark.parametrize(("output_layer", "channels", "width"), [("cnn", 3, 128), ("static", 1, 224), ("none", 4, 160)])
def test_two_updates_after_a_growth_every_weight_of_the_size_has_moved_and_no_other(output_layer, channels, width):
    gan = tiny_gan(image_size=(128, width), grow_from=32, output_layer=output_layer, channels=channels)
    use_fast_layers(gan, report=pytest.fail)
    images = torch.randint(256, (20, channels, 128, width), dtype=torch.uint8)
    for side in (32, 64, 128):
        gan.work_at(side)
        before = {name: {key: value.clone() for key, value in getattr(gan, name).named_parameters()}
                  for name in ("generator", "critic")}
        for step in range(2):
            training.training_step(gan, images, step, step * 4)
        for name, weights in before.items():
            still = {key for key, value in weights.items() if torch.equal(value, getattr(gan, name).get_parameter(key))}
            level = int(math.log2(128 // side))
            expected = {f"{key}.{kind}" for kind in ("weight", "bias") for key in sleeping_layers(name, level)}
            assert still == expected, (side, name)


def sleeping_layers(name, level):
    """The layers of a network for 128 px, from 32 px on, that take no part `level` halvings below it."""
    blocks = "encoder" if name == "generator" else "blocks"
    if not level:
        return []
    layers = [f"{blocks}.{3 * index}" for index in range(level + 1)] + [f"inputs.{index}" for index in range(level - 1)]
    if name == "generator":
        layers += ["decoder.11"] + [f"outputs.{index}" for index in range(level - 1)]
        layers += [f"decoder.{9 - 2 * index}" for index in range(level)]
    return layers


# A run


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])  # the size doubles before step 4
@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16", "critic_steps": 2, "grow_every_images": 20}])
def test_stopping_at_any_step_around_a_growth_and_running_again_gives_the_same_run(train_tiny, cut, settings):
    settings = {"log_every": 4, **GROWING, **settings}
    straight = train_tiny(steps=6, out="straight", **settings)
    train_tiny(steps=cut, out="cut", **settings)
    resumed = train_tiny(steps=6, out="cut", **settings)
    assert_same(newest(straight), newest(resumed))
    assert metrics(straight) == metrics(resumed)
    last = "samples/step_0000006.png"
    assert (straight / last).read_bytes() == (resumed / last).read_bytes()


@pytest.mark.parametrize("step", [3, 4])
def test_kill_9_at_a_growth_loses_no_more_than_the_steps_since_the_checkpoint(image_folder, train_tiny, step):
    straight = train_tiny(steps=6, out="straight", log_every=1, **GROWING)
    child = Child("--data", image_folder, *tiny_arguments(steps=10**6, log_every=1, checkpoint_every=step, **GROWING))
    wait_until(lambda: (list_checkpoints("runs/images/checkpoints") or [""])[-1])
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert_same(newest(straight), newest(train_tiny(steps=6, log_every=1, checkpoint_every=step, **GROWING)))


def test_a_run_goes_through_the_sizes_and_keeps_the_last_step_of_each(train_tiny, image_folder, capfd):
    run = train_tiny(steps=10, image_size=128, grow_every_images=8, log_every=1, evaluate_every=2)
    said = capfd.readouterr().out
    for part in ("plan    steps 1 to 2 at 32 px: about ", "\n        steps 3 to 6 at 64 px: about ",
                 "\n        steps 7 to 10 at 128 px: about ",
                 "step 2/10  px 32  ", "step 3/10  px 64  ", "step 10/10  px 128  "):
        assert part in said
    assert "warning" not in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["image_size"] for line in lines if "images" in line] == [32] * 2 + [64] * 4 + [128] * 4
    assert [line["step"] for line in lines if "sliced_wasserstein" in line] == [8, 10]  # distances at other sizes are others
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_0000006.pt", "step_0000010.pt"]
    widths = {}
    for kind in ("samples", "reconstructions", "alpha_maps"):
        for path in sorted((run / kind).iterdir()):
            with Image.open(path) as picture:
                widths.setdefault(path.stem, []).append(picture.width)
    assert widths == {f"step_{step:07d}": [8 * (side + 2) + 2, 8 * (side + 2) + 2, 6 * (side + 2) + 2]
                      for step, side in ((0, 32), (2, 32), (6, 64), (10, 128))}


def test_a_generator_draws_at_the_size_it_has_learned(train_tiny, image_folder):
    run = train_tiny(steps=5, image_size=128, grow_every_images=12, sample_every=1)
    for source in (run, generate.generate(run, generate.Options(export="small.pt"))[0]):
        assert load_generator(source).sample(1).shape == (1, 3, 64, 64)
        (path,) = generate.generate(source, generate.Options(num_images=1))
        assert read(path).shape == (3, 64, 64)
        assert evaluate.evaluate(load_generator(source), evaluate.Options(data=str(image_folder)))["image_size"] == 64
    grids, number = generate.time_lapse(run)
    assert [grid.shape for grid in grids] == [(3, 8 * 66 + 2, 8 * 66 + 2)] * 6
    assert number == 6


def test_the_average_soon_forgets_what_was_before_a_growth():
    gan = tiny_gan(image_size=64, grow_every_images=400, ema_ramp=0.1)
    assert gan.ema_weight(400) == 1 - 0.5 ** (4 / 40)  # the last step before
    assert gan.ema_weight(404) == 1 - 0.5 ** (4 / 2)
    assert gan.ema_weight(408) == 1 - 0.5 ** (4 / 4)
    assert gan.ema_weight(800) == 1 - 0.5 ** (4 / 80)
    assert gan.ema_weight(1200) == 1 - 0.5 ** (4 / 120)


def test_a_plan_names_each_size_that_a_run_gets_to():
    growth = Growth((32, 64, 128), every_images=50)
    assert [growth.side_at(images) for images in (0, 49, 50, 149, 150, 10**9)] == [32, 32, 64, 64, 128, 128]
    assert [growth.images_at_this_size(images) for images in (0, 49, 50, 149, 150, 400)] == [0, 49, 0, 99, 0, 250]
    assert growth.plan(16, 1_000) == [(32, 0, 4), (64, 4, 10), (128, 10, 1_000)]  # 48 images seen: step 4 is still small
    assert growth.plan(16, 4) == [(32, 0, 4)]
    assert growth.plan(16, 6) == [(32, 0, 4), (64, 4, 6)]
    assert growth.steps_for_all(16) == 22
    # Of another batch size from here on, and after the last step.
    assert growth.plan(8, 20, step=4, images_seen=64) == [(64, 4, 15), (128, 15, 20)]
    assert growth.plan(8, 20, step=15, images_seen=152) == [(128, 15, 20)]
    assert growth.plan(8, 4, step=4, images_seen=64) == []
    assert growth.steps_for_all(8, step=4, images_seen=64) == 40


def test_a_run_that_ends_too_early_says_so_at_the_start_and_at_the_end(train_tiny, capfd):
    train_tiny(steps=4, image_size=128, grow_every_images=12)
    warning = ("warning: the run ends with images of 64 px, --image-size is 128: --steps 21 would reach it and stay for as "
               "long as it should\n")
    assert capfd.readouterr().out.count(warning) == 2
    train_tiny(steps=10, image_size=128, grow_every_images=12)
    assert "warning" not in capfd.readouterr().out


def test_a_run_that_goes_on_with_other_batches_plans_by_the_images_it_has_seen(train_tiny, capfd):
    train_tiny(steps=10, image_size=128, grow_every_images=12)  # 40 images in batches of 4: 128 px since 36
    capfd.readouterr()
    train_tiny(steps=14, batch_size=2, image_size=128, grow_every_images=12)
    said = capfd.readouterr().out
    assert "plan" not in said
    assert "the run ends with images" not in said


def test_a_dry_run_prints_the_plan(train_tiny, image_folder, capfd):
    train_tiny(image_size="64x112", steps=8, dry_run=True, grow_every_images=12)
    said = capfd.readouterr().out
    assert re.search(r"plan    steps 1 to 3 at 32x56 px: about 00:\d\d, [\d.e-]+ s each\n"
                     r"        steps 4 to 8 at 64x112 px: ", said)
    assert "one step: " in said


def test_time_left_counts_the_sizes_to_come_at_their_own_speed(train_tiny, monkeypatch, capfd):
    monkeypatch.setattr("run_log.time_steps", lambda gan, sides, take_step: {32: 1.0, 64: 1_000.0})
    train_tiny(steps=4, log_every=1, **GROWING)
    speeds, left = zip(*re.findall(r"  ([\d.]+) images/s  ([\d:]+) left", capfd.readouterr().out), strict=True)
    minutes, seconds = map(int, left[0].split(":")[-2:])
    expected = (2 + 1_000) * 4 / float(speeds[0])
    assert 60 * minutes + seconds == pytest.approx(expected, rel=0.05, abs=1)
    assert left[-1] == "00:00"


def test_trying_a_step_of_each_size_changes_nothing(train_tiny, monkeypatch):
    tried = train_tiny(steps=5, out="tried", **GROWING)
    monkeypatch.setattr("run_log.time_steps", lambda gan, sides, take_step: dict.fromkeys(sides))
    assert_same(newest(tried), newest(train_tiny(steps=5, out="untried", **GROWING)))


def test_a_size_that_does_not_fit_into_memory_says_so_and_keeps_the_checkpoint_before(train_tiny, monkeypatch, capfd):
    take_step = training.training_step

    def step(gan, *arguments):
        if gan.side == 64:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return take_step(gan, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(training, "training_step", step)
        said = "^step 4: --batch-size 4 with images of 64 px .--image-size. does not fit into memory: .*can't allo.* smaller"
        with pytest.raises(DeviceError, match=said):
            train_tiny(steps=6, **GROWING)
    assert "steps 4 to 6 at 64 px: does not fit into memory" in capfd.readouterr().out
    assert_same(newest(train_tiny(steps=6, **GROWING)), newest(train_tiny(steps=6, out="straight", **GROWING)))


def test_updates_are_captured_and_compared_anew_at_a_growth(train_tiny, monkeypatch):
    captured = []

    def capture(update, arguments):
        captured.append((update.__name__, arguments[0].shape[-1]))
        return update

    def use(gan, images):
        use_fast_updates(gan, first_batches(gan, images), compiled=False, capture=capture, report=pytest.fail)

    expected = newest(train_tiny(steps=5, out="plain", **GROWING))
    monkeypatch.setattr(training, "use_faster_updates", use)
    assert_same(newest(train_tiny(steps=5, **GROWING)), expected)
    assert captured == [(f"{name}_update", side) for side in (32, 64) for name in ("critic", "generator")]


@pytest.mark.parametrize("settings", [{"grow_from": None}, {"grow_from": 64}])
def test_a_run_begun_without_growth_goes_on_without_it_and_without_a_word(train_tiny, settings, capfd):
    run = train_tiny(steps=2, image_size=64, **settings)
    assert {line["image_size"] for line in metrics(run)} == {64}
    capfd.readouterr()
    settings = {} if settings["grow_from"] is None else settings
    assert newest(train_tiny(steps=3, image_size=64, **settings))["step"] == 3
    said = capfd.readouterr().out
    assert "warning" not in said
    assert "plan" not in said


def test_a_checkpoint_from_before_taps_were_even_draws_and_trains_as_it_did(train_tiny, capfd):
    run = train_tiny(steps=1)
    assert newest(run)["model_arguments"]["even_taps"]
    state = newest(run)
    del state["model_arguments"]["even_taps"], state["format"]
    save_checkpoint(run / "checkpoints", state.pop("step"), state, keep=1)
    capfd.readouterr()
    for again in (run, train_tiny(steps=2), train_tiny(steps=1, initial_checkpoint=str(run), out="further")):
        kinds = {type(layer) for layer in load_generator(again).decoder}
        assert nn.ConvTranspose2d in kinds
        assert EvenConvTranspose2d not in kinds
        assert newest(again)["model_arguments"]["even_taps"] is False
    assert "even" not in capfd.readouterr().out


def test_a_resume_that_would_shrink_the_images_is_refused(train_tiny):
    train_tiny(steps=4, **GROWING)
    with pytest.raises(CheckpointError, match="--grow-every-images: this run has learned 64 px, and with 100 it would go"):
        train_tiny(steps=8, **GROWING | {"grow_every_images": 100})
    assert newest(train_tiny(steps=5, **GROWING | {"grow_every_images": 8}))["step"] == 5


@pytest.mark.parametrize(("arguments", "said"), [
    ({"image_size": 64, "grow_from": 128}, "--grow-from: must be at most 64, the shorter side of --image-size, got 128"),
    ({"grow_every_images": 0}, "--grow-every-images: must be at least 1, got 0"),
    ({"initial_checkpoint": "a", "resume": "b"}, "--initial-checkpoint: starts a new run, so it does not go with --resume"),
])
def test_settings_that_cannot_work_are_refused(arguments, said):
    assert Config(data="x", **arguments).faults() == [said]


# A run that begins with the networks of another


@pytest.mark.parametrize(("first", "size"), [
    ({"image_size": 32}, 64), ({"image_size": 32}, 128), ({"image_size": 64, "grow_every_images": 4}, 128),
    ({"image_size": "32x56", "channels": 4, "output_layer": "none"}, "64x112")])
def test_larger_networks_that_begin_with_smaller_ones_compute_the_same_and_grow(train_tiny, first, size, capfd):
    run = train_tiny(steps=3, base_channels=6, out="first", **first)
    begin = {"initial_checkpoint": "first", "out": "larger", "grow_every_images": 8, "base_channels": 32}  # 32: the default
    old = load_generator(run)
    capfd.readouterr()
    larger = train_tiny(steps=4, image_size=size, **begin)
    said = capfd.readouterr().out
    assert "begins  with " in said
    assert "the critic begins with nothing" not in said
    assert "--base-channels 6" in said
    assert newest(larger)["learned_side"] == 2 * min(old.image_shape[1:])
    samples = larger / "samples" / "step_0000000.png", run / "samples" / "step_0000003.png"
    with Image.open(samples[0]) as one, Image.open(samples[1]) as other:
        assert one.size == other.size
        assert max(high for _, high in ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema()) <= 1
    scores = [Discriminator(**critic_arguments(state["model_arguments"])) for state in (
        newest(run), newest(larger))]
    assert [critic.blocks[-3].out_channels for critic in scores] == [scores[0].blocks[-3].out_channels] * 2
    assert newest(train_tiny(steps=5, image_size=size, **begin))["step"] == 5


def test_the_critic_of_a_larger_network_scores_as_the_one_that_it_begins_with(train_tiny):
    run = train_tiny(steps=3, out="first")
    start = load_start(run, 128)
    settings = {name: value for name, value in start["model_arguments"].items() if name != "even_taps"}
    gan = GAN(dataclasses.replace(Config(data="x", **TINY), **settings), torch.device("cpu"), first_side=32)
    gan.begin_with(start)
    critic = Discriminator(**critic_arguments(newest(run)["model_arguments"]))
    critic.load_state_dict(newest(run)["critic"])
    images = torch.rand(2, 3, 128, 128)
    torch.testing.assert_close(gan.critic(images), 4 * critic(averaged_to(images, 32)))
    torch.testing.assert_close(gan.critic(averaged_to(images, 32)), critic(averaged_to(images, 32)))


def test_a_generator_alone_gets_a_fresh_critic_and_other_images(train_tiny, image_folder, capfd):
    run = train_tiny(steps=3, out="first")
    (file,) = generate.generate(run, generate.Options(export="small.pt"))
    shutil.copytree(image_folder, "others")
    Image.new("RGB", (40, 40), "red").save("others/circle/red.png")
    train_tiny(steps=1)
    capfd.readouterr()
    tuned = train_tiny(steps=2, data="others", initial_checkpoint=str(file))
    said = capfd.readouterr().out
    assert "begins  with" in said
    assert "small.pt, which has learned 32 px; it holds a generator alone, so the critic begins with nothing" in said
    assert tuned == pathlib.Path("runs/others")
    assert train_tiny(steps=2, initial_checkpoint=str(file)) == pathlib.Path("runs/images-2")
    assert "note: runs/images holds another run (--initial-checkpoint None, not " in capfd.readouterr().out
    file.unlink()
    assert newest(train_tiny(steps=3, data="others", initial_checkpoint=str(file)))["step"] == 3
    assert newest(train_tiny(steps=2))["step"] == 2


def test_the_demo_can_begin_with_a_run_at_the_defaults(train_tiny):
    train_tiny(steps=1, out="first")
    config = from_command_line(["--demo", "--initial-checkpoint", "first", "--image-size", "64"])
    config = resolve_settings(config, None, load_start("first", 64), torch.device("cpu"))
    assert (config.base_size, config.latent_dim) == (64, 8)


def test_images_in_memory_of_other_channels_than_the_checkpoint_are_refused(train_tiny):
    train_tiny(steps=1, channels=1, out="first")
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(DataError, match="^data: the images have 3 channels, first has 1$"):
        training.train(Config(**{**TINY, "data": "mine", "initial_checkpoint": "first"}), data=images)
    assert not os.path.exists("runs")


@pytest.mark.parametrize(("settings", "said"), [
    ({"image_size": 32}, "--image-size: .* has networks for 64 px, so it can be that or twice, .* that, got 32"),
    ({"image_size": "64x112"}, "--image-size: .* got 64x112"),
    ({"image_size": 64, "channels": 1}, "--channels: .* has 3, got 1"),
    ({"image_size": 64, "latent_dim": 9}, "--latent-dim: .* has 8, got 9"),
])
def test_what_cannot_begin_with_a_checkpoint_is_said(train_tiny, settings, said):
    train_tiny(steps=1, image_size=64, out="first")
    with pytest.raises(CheckpointError, match=said):
        train_tiny(initial_checkpoint="first", out="second", **settings)
    assert not os.path.exists("second")
    with pytest.raises(RunFolderError, match="--initial-checkpoint: first holds a run that began with none"):
        train_tiny(image_size=64, initial_checkpoint="first", out="first")
