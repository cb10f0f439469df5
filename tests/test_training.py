import copy
import dataclasses
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    assert_same,
    critic_arguments,
    generator_arguments,
    metrics,
    newest,
    save_picture,
    tiny_arguments,
    tiny_gan,
)
from PIL import Image, ImageChops
from torch.nn import functional as F

import resuming
import run_log
import training
import wgan_gp
from batches import generator_batch
from checkpointing import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from config import Config
from console import Interrupt
from fast_paths import use_fast_layers
from image_data import load_images
from losses import combined_wasserstein_loss
from resuming import RunFolderError
from run_log import TrainingError


@pytest.fixture(scope="module")
def images():
    coarse = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


# The updates


@pytest.mark.parametrize("settings", [{}, {"augment": True}, {"output_layer": "static"}, {"output_layer": "none"}])
def test_an_update_moves_its_own_network_and_no_other(images, settings):
    gan = tiny_gan(**settings)
    before = {name: value.clone() for name, value in gan.critic.state_dict().items()}
    generator = {name: value.clone() for name, value in gan.generator.state_dict().items()}
    gan.critic_update(*critic_arguments(images))
    assert all(not torch.equal(before[n], v) for n, v in gan.critic.state_dict().items())
    assert all(torch.equal(generator[n], v) for n, v in gan.generator.state_dict().items())
    before = {name: value.clone() for name, value in gan.critic.state_dict().items()}
    gan.generator_update(*generator_arguments(images))
    assert all(torch.equal(before[n], v) for n, v in gan.critic.state_dict().items())
    assert all(not torch.equal(generator[n], v) for n, v in gan.generator.state_dict().items())
    assert all(p.requires_grad and p.grad is not None for p in gan.critic.parameters())


def test_the_first_step_is_as_long_as_the_learning_rate(images):
    gan = tiny_gan(critic_learning_rate=0.01)
    before = gan.critic.score.weight.detach().clone()
    gan.critic_update(*critic_arguments(images))
    assert (gan.critic.score.weight - before).abs().median().item() == pytest.approx(0.01, rel=1e-3)


def test_the_rates_rise_over_the_first_steps_stay_and_fall(images):
    gan, moved = tiny_gan(critic_learning_rate=0.01), []
    for images_seen in (16, 1_600, 8_000, 128_000, 512_000):
        before = gan.critic.score.weight.detach().clone()
        for state in gan.critic_optimizer.state.values():
            state["step"].zero_()
            state["exp_avg_sq"].zero_()
        gan.set_learning_rates(images_seen)
        gan.critic_update(*critic_arguments(images))
        moved.append((gan.critic.score.weight - before).abs().median().item())
    assert moved == pytest.approx([0.01 / 500, 0.01 / 5, 0.01, 0.01, 0.01 / 4], rel=1e-2)


def test_the_average_moves_part_of_the_way(images):
    gan = tiny_gan()
    start = gan.averaged.mu.weight.clone()
    gan.generator_update(*generator_arguments(images))
    assert torch.allclose(gan.averaged.mu.weight, (start + gan.generator.mu.weight) / 2)
    assert not any(p.requires_grad for p in gan.averaged.parameters())


def test_the_average_forgets_half_in_a_tenth_of_the_images_but_not_more_slowly_than_asked(images):
    gan = tiny_gan(ema_half_life_images=1_000.0)
    for images_seen, half_life in ((2_000, 200), (50_000, 1_000)):
        weight = generator_batch(gan, images, 0, images_seen)[-1].item()
        assert (1 - weight) ** (half_life / gan.config.batch_size) == pytest.approx(0.5, rel=1e-2)


def test_the_critic_minimises_the_combined_wasserstein_loss(images):
    gan = tiny_gan(gradient_penalty_weight=7.0)
    real, z, mixing, transform = critic_arguments(images)
    fake = gan.generator.decode(z)
    expected = combined_wasserstein_loss(gan.critic, real, fake, weight=7.0, mixing=mixing)
    found = gan.critic_update(real, z, mixing, transform)["critic_loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_critic_learns_to_score_real_above_fake(images):
    gan = tiny_gan(critic_learning_rate=1e-3)
    distances = [gan.critic_update(*critic_arguments(images))["wasserstein_distance"].item() for _ in range(60)]
    assert sum(distances[-10:]) / 10 > distances[0] + 1


def test_the_generator_learns_to_reconstruct():
    images = torch.eye(4, 3)[:, :, None, None].expand(-1, -1, 32, 32)  # red, green, blue, black
    gan = tiny_gan(generator_learning_rate=2e-3, kl_weight=0.01)
    losses = [gan.generator_update(*generator_arguments(images))["reconstruction"].item() for _ in range(200)]
    assert losses[-1] < 0.7 * losses[0]


def test_without_vae_terms_training_is_purely_adversarial(images):
    gan = tiny_gan(reconstruction_weight=0.0, kl_weight=0.0)
    found = gan.generator_update(*generator_arguments(images))
    assert "reconstruction" not in found
    assert gan.generator.mu.weight.grad is None
    assert gan.generator.decoder[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_moves_no_weight_and_is_reported(images, bad):
    gan = tiny_gan()
    gan.critic_update(*critic_arguments(images))
    gan.generator_update(*generator_arguments(images))
    before = copy.deepcopy(gan.state())
    poisoned = images.clone()
    poisoned[0, 0, 5, 5] = bad
    found = gan.critic_update(*critic_arguments(poisoned)) | gan.generator_update(*generator_arguments(poisoned))
    after = gan.state()
    assert all(value.isfinite().all() for value in after.pop("averaged").values())
    del before["averaged"]  # it goes on towards the weights, which stay
    assert_same(before, after)
    assert not found["critic_loss"].isfinite()
    assert not found["reconstruction"].isfinite()


@pytest.mark.parametrize("network", ["critic", "generator"])
def test_a_gradient_alone_that_is_not_finite_moves_no_weight_and_is_reported(images, network):
    gan, arguments = tiny_gan(), {"critic": critic_arguments(images), "generator": generator_arguments(images)}
    next(getattr(gan, network).parameters()).register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(gan.state())
    found = getattr(gan, f"{network}_update")(*arguments[network])
    for name in (network, f"{network}_optimizer"):
        assert_same(before[name], gan.state()[name])
    assert found[f"{network}_loss"].isfinite()
    assert not found[f"{network}_gradient_norm"].isfinite()


@pytest.mark.parametrize("network", ["critic", "generator"])
def test_a_loss_alone_that_is_not_finite_moves_no_weight(images, network, monkeypatch):
    gan, arguments = tiny_gan(), {"critic": critic_arguments(images), "generator": generator_arguments(images)}
    losses = getattr(gan, f"{network}_losses")

    def infinite(*arguments):
        loss, metrics = losses(*arguments)
        return loss + float("inf"), metrics

    monkeypatch.setattr(gan, f"{network}_losses", infinite)
    before = copy.deepcopy(gan.state())
    found = getattr(gan, f"{network}_update")(*arguments[network])
    assert found[f"{network}_gradient_norm"].isfinite()
    for name in (network, f"{network}_optimizer"):
        assert_same(before[name], gan.state()[name])


def test_bfloat16_updates_are_near_those_in_float32(images):
    arguments = critic_arguments(images), generator_arguments(images)
    found = []
    for precision in ("float32", "bfloat16"):
        gan = tiny_gan(precision=precision, base_channels=16)
        found.append(gan.critic_update(*arguments[0]) | gan.generator_update(*arguments[1]))
    for name in ("critic_loss", "gradient_penalty", "generator_loss", "reconstruction", "kl_divergence"):
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=0.05, abs=0.02), name


class PlainBlocks(torch.nn.Module):
    """The blocks as they are commonly written: convolution, ReLU, pooling."""

    def __init__(self, blocks):
        super().__init__()
        self.convolutions = torch.nn.ModuleList(blocks[::3])

    def forward(self, images):
        for convolution in self.convolutions:
            images = F.max_pool2d(F.relu(convolution(images)), 2)
        return images


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_fast_updates_have_the_losses_and_gradients_of_the_plain_ones(precision, tolerance):
    gan = tiny_gan(precision=precision, base_channels=16)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    arguments = critic_arguments(images), generator_arguments(images)
    critic, vae = copy.deepcopy(gan.critic).double(), copy.deepcopy(gan.generator).double()
    use_fast_layers(gan, report=pytest.fail)
    assert gan.input_gradient
    critic.blocks, vae.encoder = PlainBlocks(critic.blocks), PlainBlocks(vae.encoder)
    found = gan.critic_update(*arguments[0])

    real, z, mixing, _ = (tensor.double() for tensor in arguments[0])
    fake = vae.decode(z).detach()
    between = (mixing * real + (1 - mixing) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    loss = critic(fake).mean() - critic(real).mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    loss.backward()
    assert found["critic_loss"].item() == pytest.approx(loss.item(), rel=tolerance)
    expected = torch.cat([parameter.grad.flatten() for parameter in critic.parameters()])
    assert (gan.gradients()["critic"] - expected).norm() < tolerance * expected.norm()

    critic = copy.deepcopy(gan.critic).double()
    critic.blocks = PlainBlocks(critic.blocks)
    gan.generator_update(*arguments[1])
    real, z, noise, _, _ = (tensor.double() for tensor in arguments[1])
    mu, logvar = vae.encode(real)
    reconstruction = vae.decode(mu + (logvar / 2).exp() * noise)
    kl = (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean() / 2
    rec = (reconstruction - real).abs().sum() / (4 * math.sqrt(3 * 32 * 32))
    (rec + 0.02 * kl - critic(vae.decode(z)).mean()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in vae.parameters()])
    assert (gan.gradients()["generator"] - expected).norm() < tolerance * expected.norm()


# A run


def test_a_run_leaves_the_folder_that_the_readme_describes(train_tiny):
    run = train_tiny(steps=4, sample_every=2)
    assert run == pathlib.Path("runs/images")
    assert {path.name for path in run.iterdir()} == {"config.json", "reals.png", "samples", "reconstructions", "alpha_maps",
                                                     "metrics.jsonl", "checkpoints", ".lock"}
    for folder in ("samples", "reconstructions", "alpha_maps"):
        assert sorted(os.listdir(run / folder)) == [f"step_000000{step}.png" for step in (0, 2, 4)]
    assert [line["step"] for line in metrics(run)] == [2, 4]
    assert json.loads((run / "config.json").read_text())["batch_size"] == 4
    assert os.listdir(run / "checkpoints") == ["step_0000004.pt"]
    with Image.open(run / "samples" / "step_0000004.png") as grid:
        assert grid.size == (8 * 34 + 2, 8 * 34 + 2)


@pytest.mark.parametrize(("layer", "has_alpha"), [("static", True), ("none", False)])
def test_a_run_with_another_output_layer_draws_what_the_layer_has(train_tiny, layer, has_alpha):
    run = train_tiny(steps=2, batch_size=16, output_layer=layer)
    assert (run / "samples" / "step_0000002.png").exists()
    assert (run / "alpha_maps" / "step_0000002.png").exists() == has_alpha
    assert ("alpha" in metrics(run)[-1]) == has_alpha


def test_curves_are_drawn_where_matplotlib_is_installed(train_tiny, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):  # hidden by conftest
        monkeypatch.delitem(sys.modules, name)
    run = train_tiny(steps=4)
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("L").histogram()) > 2


def test_the_best_generator_is_kept_and_a_resumed_run_knows_how_good_it_was(train_tiny):
    settings = {"evaluate_every": 2, "generator_learning_rate": 3.0, "critic_learning_rate": 3.0,
                "ema_half_life_images": 1.0, "warm_up_images": 2_000}
    straight = train_tiny(steps=10, out="straight", **settings)
    train_tiny(steps=5, out="cut", **settings)
    cut = train_tiny(steps=10, out="cut", **settings)
    assert metrics(straight) == metrics(cut)
    measured = {line["step"]: line["sliced_wasserstein"] for line in metrics(cut) if "sliced_wasserstein" in line}
    assert list(measured) == [2, 4, 6, 8, 10]
    best = min(measured, key=measured.get)
    assert best < 10  # or the test would not tell the best from the newest
    for run in (straight, cut):
        state = load_checkpoint(run / "checkpoints" / "best.pt")
        assert state["step"] == best
        assert_same(state["averaged"], load_checkpoint(straight / "checkpoints" / "best.pt")["averaged"])
    assert newest(cut)["step"] == 10


def test_measuring_has_no_side_effect(train_tiny):
    assert_same(newest(train_tiny(steps=4, out="often", evaluate_every=1)), newest(train_tiny(steps=4, out="never")))


def test_tensorboard_gets_the_numbers_of_the_log_and_the_pictures(train_tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tiny(steps=2, tensorboard=True)
    run = train_tiny(steps=4, tensorboard=True, sample_every=2)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(events.Tags()["scalars"]) == log[0].keys() - {"step", "images", "image_size", "elapsed_seconds"}
    for name in events.Tags()["scalars"]:
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in log]
    for name in ("samples", "reconstructions", "alpha_maps"):
        shown = events.Images(name)[-1]
        assert shown.step == 4
        with Image.open(io.BytesIO(shown.encoded_image_string)) as one, Image.open(run / name / "step_0000004.png") as other:
            assert ImageChops.difference(one, other).getextrema() == ((0, 1),) * 3 or one.tobytes() == other.tobytes()


def test_tensorboard_is_asked_for_in_one_line_where_it_is_missing(train_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard: needs the package tensorboard: pip"):
        train_tiny(steps=1, tensorboard=True)
    assert not os.path.exists("runs")


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])  # in mid-epoch, and around the end of an epoch of ten images
@pytest.mark.parametrize("settings", [{"critic_steps": 2}, {"precision": "bfloat16", "augment": True}])
def test_stopping_at_any_step_and_running_again_gives_the_same_run(train_tiny, cut, settings):
    straight = train_tiny(steps=6, out="straight", log_every=4, **settings)
    train_tiny(steps=cut, out="cut", log_every=4, **settings)
    resumed = train_tiny(steps=6, out="cut", log_every=4, **settings)
    assert_same(newest(straight), newest(resumed))
    assert metrics(straight) == metrics(resumed)
    last = "samples/step_0000006.png"
    assert (straight / last).read_bytes() == (resumed / last).read_bytes()


def test_a_resumed_run_takes_the_same_images_and_the_same_numbers_in_the_same_order(train_tiny, monkeypatch):
    taken, real = [], training.GAN.critic_update

    def update(self, *arguments):
        taken.append(list(copy.deepcopy(arguments)))
        return real(self, *arguments)

    monkeypatch.setattr(training.GAN, "critic_update", update)
    train_tiny(steps=6, out="straight", augment=True)
    straight = taken[:]
    taken.clear()
    for steps in (3, 6):
        train_tiny(steps=steps, out="cut", augment=True)
    assert len(taken) == 6
    assert_same(straight, taken)


def test_the_comparison_above_notices_a_lost_position(train_tiny):
    straight = train_tiny(steps=6, out="straight")
    cut = train_tiny(steps=3, out="cut")
    state = newest(cut)
    state["images_seen"] = 0
    save_checkpoint(cut / "checkpoints", state.pop("step"), state, keep=1)
    train_tiny(steps=6, out="cut")
    with pytest.raises(AssertionError):
        assert_same(newest(straight), newest(cut))


def test_sampling_has_no_side_effect(train_tiny):
    often = train_tiny(steps=4, out="often", sample_every=1)
    never = train_tiny(steps=4, out="never", sample_every=1_000)
    assert_same(newest(often), newest(never))


def test_a_finished_run_says_so_and_changes_nothing(train_tiny, capfd):
    run = train_tiny(steps=2)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    train_tiny(steps=2)
    assert "nothing is left to do" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_epochs_count_passes_over_the_images(train_tiny):
    assert newest(train_tiny(epochs=2.0, critic_steps=2))["step"] == 3  # 20 images in steps of 8


def test_a_changed_setting_is_reported_with_both_values(train_tiny, capfd):
    train_tiny(steps=1, out="run")
    train_tiny(steps=2, out="run", batch_size=2, seed=3, critic_learning_rate=1e-3, generator_learning_rate=2e-3)
    said = capfd.readouterr().out
    for name, old, new in (("batch-size", 4, 2), ("seed", 0, 3),
                           ("critic-learning-rate", Config.critic_learning_rate, 0.001),
                           ("generator-learning-rate", Config.generator_learning_rate, 0.002)):
        assert f"warning: --{name} was {old}, is {new} from here on" in said


def test_a_term_added_to_the_loss_between_two_lines_of_the_log_is_no_trouble(train_tiny):
    train_tiny(steps=3, log_every=4, reconstruction_weight=0.0, kl_weight=0.0)
    assert "reconstruction" in metrics(train_tiny(steps=4, log_every=4))[0]


def test_a_changed_number_of_images_is_reported_with_both_counts(train_tiny, image_folder, capfd):
    train_tiny(steps=1)
    Image.new("RGB", (32, 32)).save(image_folder / "circle" / "new.png")
    train_tiny(steps=2)
    assert "warning: the folder had 10 images, has 11 from here on" in capfd.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("latent_dim", 9), ("image_size", 64), ("base_channels", 5), ("num_frames", 3),
                                             ("output_layer", "none"), ("alpha_grid", 4)])
def test_another_model_is_refused_in_the_same_folder(train_tiny, name, value):
    train_tiny(steps=1, out="run")
    with pytest.raises(CheckpointError, match=f"--{name.replace('_', '-')}: this run has .*, got {value}; --out names"):
        train_tiny(steps=1, out="run", **{name: value})


def test_another_folder_of_images_is_refused_in_the_same_run_and_numbered_where_no_run_is_named(train_tiny, image_folder):
    shutil.copytree(image_folder, "elsewhere/images")
    save_picture("elsewhere/images/new.png")
    train_tiny(steps=2, out="run", keep_checkpoints=1)
    with pytest.raises(CheckpointError, match=f"--data: this run has {image_folder}, got .*elsewhere/images; --out names"):
        train_tiny(steps=4, out="run", data="elsewhere/images", keep_checkpoints=1)
    assert os.listdir("run/checkpoints") == ["step_0000002.pt"]
    assert newest(train_tiny(steps=4, out="moved", data="elsewhere/images", resume="run/checkpoints/step_0000002.pt"))
    assert train_tiny(steps=1) == pathlib.Path("runs/images")
    assert train_tiny(steps=1, data="elsewhere/images") == pathlib.Path("runs/images-2")


def test_another_model_is_numbered_where_no_run_is_named(train_tiny):
    assert train_tiny(steps=1) == pathlib.Path("runs/images")
    assert train_tiny(steps=1, latent_dim=9) == pathlib.Path("runs/images-2")
    assert train_tiny(steps=2) == pathlib.Path("runs/images")


def test_fresh_starts_beside_what_is_there_and_running_again_continues_the_newest(train_tiny):
    train_tiny(steps=2)
    assert train_tiny(steps=1, fresh=True) == pathlib.Path("runs/images-2")
    assert newest(train_tiny(steps=2))["step"] == 2
    assert newest(pathlib.Path("runs/images-2"))["step"] == 2


def test_a_run_can_start_from_the_checkpoint_of_another(train_tiny):
    first = train_tiny(steps=2)
    straight = train_tiny(steps=4, out="straight")
    branched = train_tiny(steps=4, out="branch", resume=str(list_checkpoints(first / "checkpoints")[0]))
    assert_same(newest(straight), newest(branched))


def test_a_folder_of_other_things_is_left_alone(train_tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunFolderError, match="--out: mine holds other things than a run"):
        train_tiny(steps=1, out="mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="--out: file is a file"):
        train_tiny(steps=1, out="file")
    assert os.listdir("mine") == ["letter.txt"]


def test_no_room_for_the_checkpoints_is_said_before_training(train_tiny, monkeypatch):
    monkeypatch.setattr(resuming, "free_bytes", lambda path: 1000)
    with pytest.raises(RunFolderError, match=r"--out: the checkpoints need [\d,]+ bytes in runs/images, [\d,]+ are free"):
        train_tiny(steps=1)
    assert not pathlib.Path("runs").exists()


def test_a_damaged_newest_checkpoint_is_passed_over(train_tiny, capfd):
    straight = train_tiny(steps=4, out="straight")
    run = train_tiny(steps=2, out="run", checkpoint_every=1)
    list_checkpoints(run / "checkpoints")[-1].write_bytes(b"torn")
    train_tiny(steps=4, out="run")
    assert "trying the one before" in capfd.readouterr().out
    assert_same(newest(straight), newest(run))
    assert metrics(straight) == metrics(run)


@pytest.mark.parametrize(("damage", "named"), [
    (lambda state: state.pop("critic"), "critic"),
    (lambda state: state.pop("images_seen"), "images_seen"),
    (lambda state: state["critic"].pop("score.weight"), "score.weight"),
    (lambda state: state["critic"].update(other=torch.zeros(3)), "other"),
    (lambda state: state["averaged"].update({"mu.bias": torch.zeros(3)}), "mu.bias"),
    (lambda state: state["critic_optimizer"][0].update(exp_avg=torch.zeros(3)), "critic_optimizer.0.exp_avg"),
    (lambda state: state["generator_optimizer"][1].pop("exp_avg_sq"), "generator_optimizer.1: 'exp_avg_sq' is missing"),
    (lambda state: state["critic"].update({"score.weight": torch.zeros(1, 512).double()}), "critic.score.weight is .*64"),
    (lambda state: state["generator"]["mu.bias"].fill_(float("nan")), "not finite"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(train_tiny, damage, named):
    run = train_tiny(steps=1)
    path = list_checkpoints(run / "checkpoints")[0]
    state = load_checkpoint(path)
    damage(state)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=named) as caught:
        train_tiny(steps=2, out="other", resume=str(path))
    assert "\n" not in str(caught.value)


def test_text_in_a_checkpoint_is_not_taken_as_a_setting(train_tiny):
    state = newest(train_tiny(steps=1))
    state["config"]["precision"] = "int4"
    torch.save(state, "x.pt")
    with pytest.raises(CheckpointError, match="no precision that is known: int4"):
        train_tiny(steps=2, out="other", resume="x.pt", precision="auto")


def test_resume_does_not_mix_two_runs(train_tiny):
    checkpoint = str(list_checkpoints(train_tiny(steps=1) / "checkpoints")[0])
    train_tiny(steps=2, out="branch", resume=checkpoint)
    assert newest(train_tiny(steps=3, out="branch", resume=checkpoint))["step"] == 3
    train_tiny(steps=1, out="another")
    with pytest.raises(RunFolderError, match="--resume: another already holds a run"):
        train_tiny(steps=3, out="another", resume=checkpoint)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(train_tiny, monkeypatch):
    run = train_tiny(steps=2)
    real = training.GAN.critic_update

    def poisoned(self, images, *rest):
        return real(self, images * float("nan"), *rest)

    monkeypatch.setattr(training.GAN, "critic_update", poisoned)
    with pytest.raises(TrainingError, match="step 3: wasserstein_distance is nan.*checkpoints"):
        train_tiny(steps=6, log_every=50, checkpoint_every=3)
    assert os.listdir(run / "checkpoints") == ["step_0000002.pt"]


def test_a_run_stops_at_the_log_after_what_is_not_finite_and_names_the_earliest_term(train_tiny, monkeypatch):
    real, done = {name: getattr(training.GAN, name) for name in ("critic_update", "generator_update")}, []

    def generator(self, *arguments):
        done.append(1)
        found = real["generator_update"](self, *arguments)
        return found | {"kl_divergence": found["kl_divergence"] * (math.inf if len(done) == 3 else 1)}

    def critic(self, images, *rest):
        return real["critic_update"](self, images * (math.nan if len(done) >= 3 else 1), *rest)

    monkeypatch.setattr(training.GAN, "generator_update", generator)
    monkeypatch.setattr(training.GAN, "critic_update", critic)
    with pytest.raises(TrainingError, match="step 3: kl_divergence is inf"):
        train_tiny(steps=50, log_every=2, checkpoint_every=50)
    assert len(done) == 4
    assert [line["step"] for line in metrics(pathlib.Path("runs/images"))] == [2]


def test_a_weight_that_is_not_finite_is_never_saved(train_tiny, monkeypatch):
    run, real = train_tiny(steps=2), training.GAN.generator_update

    def poisoned(self, *arguments):
        metrics = real(self, *arguments)
        self.averaged.mu.bias[0] = float("nan")
        return metrics

    monkeypatch.setattr(training.GAN, "generator_update", poisoned)
    with pytest.raises(TrainingError, match="step 3: a weight is not finite; this step was not saved"):
        train_tiny(steps=3)
    assert os.listdir(run / "checkpoints") == ["step_0000002.pt"]


def test_fewer_images_than_a_batch_and_a_single_image_work(train_tiny, image_folder, capfd):
    for path in sorted(image_folder.rglob("*.png"))[1:]:
        path.unlink()
    assert newest(train_tiny(steps=2))["step"] == 2
    assert "fewer images than --batch-size 4" in capfd.readouterr().out


def test_all_of_a_batch_is_drawn_from_the_seed_the_purpose_and_the_step(train_tiny):
    states = [newest(train_tiny(steps=2, out=f"run{seed}{again}", seed=seed)) for seed, again in ((0, 0), (0, 1), (1, 0))]
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["critic"]["score.weight"], states[2]["critic"]["score.weight"])


# The command line


def command(*arguments):
    return subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-W", "error::FutureWarning",
                           ROOT / "training.py", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_output_to_a_file_is_lines_and_the_log_is_json(image_folder):
    done = command("--data", image_folder, *tiny_arguments(steps=4))
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert re.search(r"step 4/4 .* images/s  00:00 left", done.stdout)
    assert "done: 4 steps; look at runs/images/samples/step_0000004.png" in done.stdout
    assert [line["step"] for line in metrics(pathlib.Path("runs/images"))] == [2, 4]


def test_dry_run_describes_trains_one_step_and_leaves_no_run(image_folder, capfd):
    assert training.main(["--data", str(image_folder), *tiny_arguments(), "--dry-run"]) == 0
    said = capfd.readouterr().out
    for expected in ("10 images in 3 classes", "generator 0.2 M parameters", "--batch-size               4",
                     "one step: wasserstein_distance", "bytes of weights"):
        assert expected in said
    assert not pathlib.Path("runs").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--data", "nowhere"], "nowhere is missing, a folder of images or a film is needed"),
    (["--data", "images", "--resume", "none.pt"], "none.pt: no such file"),
])
def test_a_refusal_is_one_line_and_status_2(image_folder, capfd, arguments, said):
    assert training.main(arguments) == 2
    out, err = capfd.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
    assert not pathlib.Path("runs").exists()


def test_a_signal_is_noted_once_deferred_and_raised_before():
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        interrupt.defer()
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM


def test_the_command_gives_signals_back(image_folder):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert training.main(["--data", str(image_folder), *tiny_arguments(steps=1)]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_demo_draws_its_images_once_and_trains_its_preset(monkeypatch):
    import demo_images

    monkeypatch.setattr(training, "draw_demo_images", lambda folder: demo_images.draw_demo_images(folder, 12))
    config = dataclasses.replace(Config(demo=True), **{**TINY, "steps": 2})
    assert training.train(config) == pathlib.Path("runs/demo")
    assert len(list(pathlib.Path("demo_images").rglob("*.png"))) == 12


# Doors


def test_editing_the_combined_loss_changes_training(images, monkeypatch):
    gan, plain = tiny_gan(), combined_wasserstein_loss
    before = gan.critic_losses(*critic_arguments(images))[0]
    monkeypatch.setattr(wgan_gp, "combined_wasserstein_loss", lambda *args, **options: 3 * plain(*args, **options))
    torch.manual_seed(0)
    arguments = critic_arguments(images)
    loss, found = gan.critic_losses(*arguments)
    assert loss.item() == pytest.approx(3 * plain(gan.critic, images, gan.generator.decode(arguments[1]),
                                                  mixing=arguments[2]).item(), rel=1e-4)
    assert found["critic_loss"] is loss
    assert before.item() != loss.item()


def small_images(count=12):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny_config(**settings):
    return Config(**{"data": "mine", **TINY, **settings})


def test_images_in_memory_are_trained_on_at_their_own_size_and_resumed(capfd):
    images = small_images()
    run = training.train(tiny_config(steps=4, image_size=128), data=images)
    assert run == pathlib.Path("runs/mine")
    assert newest(run)["model_arguments"]["image_size"] == 32
    assert not pathlib.Path("cache").exists()
    cut = [training.train(tiny_config(steps=steps, out="cut"), data=images.numpy()) for steps in (2, 4)][-1]
    assert_same(newest(run), newest(cut))
    assert metrics(run) == metrics(cut)
    changed = images.clone()
    changed[3, 0, 5, 5] ^= 1
    with pytest.raises(CheckpointError, match="--data: this run has mine .*, got mine .*; --out names another folder"):
        training.train(tiny_config(steps=6, out="cut"), data=changed)
    assert training.train(tiny_config(steps=1), data=changed) == pathlib.Path("runs/mine-2")


def test_an_image_set_is_trained_on(image_folder):
    data = load_images(image_folder, 32, cache_dir="cache")
    assert newest(training.train(tiny_config(steps=1), data=data))["num_images"] == 10


@pytest.mark.parametrize(("data", "said"), [
    (torch.zeros(4, 32, 32, 3, dtype=torch.uint8), r"got torch.uint8 \(4, 32, 32, 3\); images.permute"),
    (torch.zeros(4, 3, 32, 32), "expected uint8 images .*, got torch.float32"),
    (torch.zeros(4, 2, 32, 64, dtype=torch.uint8), r"C one of 1, 3, 4, got torch.uint8 \(4, 2, 32, 64\)"),
    (torch.zeros(4, 32, 64, dtype=torch.uint8), r"got torch.uint8 \(4, 32, 64\); images\[:, None\]"),
    (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "no images"),
    (torch.zeros(4, 3, 30, 30, dtype=torch.uint8), "--image-size: must be one of"),
])
def test_images_in_memory_that_cannot_be_trained_on_are_refused(data, said):
    with pytest.raises(ValueError, match=said):
        training.train(tiny_config(steps=1), data=data)
    assert not pathlib.Path("runs").exists()


def test_a_callback_is_told_every_step_and_its_metrics(train_tiny, image_folder):
    told = []
    training.train(tiny_config(data=str(image_folder), steps=3), after_step=lambda *arguments: told.append(arguments))
    assert [step for step, _ in told] == [1, 2, 3]
    assert told[0][1]["critic_loss"].isfinite()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_notebook_finishes_the_step_saves_and_gives_the_handlers_back(image_folder, capfd, number):
    handled = []
    before = {name: signal.signal(name, lambda *arguments: handled.append(arguments[0]))
              for name in (signal.SIGINT, signal.SIGTERM)}
    ours = {name: signal.getsignal(name) for name in before}
    try:
        run = training.train(tiny_config(data=str(image_folder), steps=100),
                             after_step=lambda step, _: signal.raise_signal(number) if step == 3 else None)
        assert {name: signal.getsignal(name) for name in ours} == ours
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert newest(run)["step"] == 3
    assert handled == ([] if number == signal.SIGINT else [number])  # Ctrl-C is done with; SIGTERM is for the process
    assert "stopped after step 3, saved" in capfd.readouterr().out


def test_a_run_in_another_thread_trains(image_folder):
    thread = threading.Thread(target=training.train, args=[tiny_config(data=str(image_folder), steps=2)])
    thread.start()
    thread.join(60)
    assert newest(pathlib.Path("runs/images"))["step"] == 2


def test_schedules_count_images_so_that_they_mean_the_same_at_every_batch_size():
    for batch_size in (4, 16, 64):
        gan = tiny_gan(batch_size=batch_size)
        for step in range(0, 40_000, 777):
            gan.set_learning_rates((step + 1) * batch_size)
            done = (step + 1) * batch_size / 16
            expected = torch.tensor(0.0016 * min(1, done / 500, 8_000 / done))
            assert torch.equal(gan.critic_optimizer.param_groups[0]["lr"], expected)


def test_schedules_and_beta_are_settings_that_are_used_and_reported(train_tiny, capfd):
    train_tiny(steps=1, out="run")
    run = train_tiny(steps=2, out="run", warm_up_images=100, decay_after_images=200, adam_beta2=0.99, ema_ramp=0.5)
    said = capfd.readouterr().out
    for name, old, new in (("warm-up-images", 8000, 100), ("decay-after-images", 128000, 200), ("adam-beta2", 0.9, 0.99),
                           ("ema-ramp", 0.1, 0.5)):
        assert f"warning: --{name} was {old}, is {new} from here on" in said
        assert json.loads((run / "config.json").read_text())[name.replace("-", "_")] == new
    assert tiny_gan(adam_beta2=0.99).critic_optimizer.param_groups[0]["betas"] == (0.0, 0.99)


def test_a_checkpoint_of_before_the_schedules_were_settings_counted_steps(train_tiny, capfd):
    state = newest(train_tiny(steps=1, out="run"))
    for name in ("warm_up_images", "decay_after_images", "adam_beta2", "ema_ramp"):
        del state["config"][name]
    save_checkpoint(pathlib.Path("run/checkpoints"), state.pop("step"), state, keep=1)
    train_tiny(steps=2, out="run")
    warnings = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: --warm-up-images was 2000, is 8000 from here on",
                        "warning: --decay-after-images was 32000, is 128000 from here on"]


def test_fewer_steps_than_a_line_of_the_log_leave_one_and_a_resumed_run_writes_it_anew(train_tiny):
    run = train_tiny(steps=3, log_every=50)
    assert [line["step"] for line in metrics(run)] == [3]
    assert metrics(train_tiny(steps=5, log_every=50)) == metrics(train_tiny(steps=5, log_every=50, out="straight"))


def test_curves_hold_the_last_line_also_where_the_last_step_draws_samples(train_tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_log, "draw_curves", lambda out: drawn.append(len(run_log.read_metrics(out))))
    run = train_tiny(steps=3, sample_every=3, log_every=2)
    assert drawn[-1] == len(metrics(run)) == 2


def test_no_curves_are_drawn_of_nothing(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, name)
    run_log.draw_curves(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_hole_in_the_numbering_does_not_lose_a_run(train_tiny):
    for _ in range(3):
        train_tiny(steps=1, fresh=True)
    shutil.rmtree("runs/images-2")
    assert train_tiny(steps=2) == pathlib.Path("runs/images-3")
    for number in (1, 128):  # of something else
        os.mkdir(f"runs/images-{number}")
    assert train_tiny(steps=1, fresh=True) == pathlib.Path("runs/images-4")


def test_a_run_stopped_before_its_first_step_does_not_say_that_it_was_saved(image_folder, capfd):
    interrupt = Interrupt()
    interrupt.received = signal.SIGINT
    run = training.train(tiny_config(data=str(image_folder), steps=5), interrupt=interrupt)
    said = capfd.readouterr().out
    assert "stopped before the first step, so there was nothing to save" in said
    assert "saved" not in said
    assert not (run / "checkpoints").exists()


def test_numpy_values_and_paths_are_settings(image_folder):
    config = tiny_config(data=image_folder, steps=np.int64(2), kl_weight=np.float32(0.5), out=pathlib.Path("run"))
    run = training.train(config)
    assert json.loads((run / "config.json").read_text())["steps"] == 2
