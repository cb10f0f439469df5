import functools

import pytest
import torch
from helpers import assert_same, critic_arguments, metrics, newest, tiny_gan
from torch import nn

import checkpointing
import model_definitions
import wgan_gp
from batches import first_batches
from checkpointing import load_generator
from fast_paths import CapturedUpdate, VideoConvolution, use_fast_layers, use_fast_updates
from model_definitions import CNN, VAE, CNNParamTanh, Discriminator
from synthetic_video import synthetic_video


class Repeated:
    """Stands in for CapturedUpdate: copies its arguments to the same tensors every time, then runs what it was given."""

    def __init__(self, update, arguments):
        self.update, self.arguments = update, [argument.clone() for argument in arguments]
        update(*arguments)

    def __call__(self, *arguments):
        for static, argument in zip(self.arguments, arguments, strict=True):
            static.copy_(argument)
        return self.update(*self.arguments)


class Forgetful(Repeated):
    """A capture that has missed that its arguments change."""

    def __call__(self, *arguments):
        return self.update(*(torch.zeros_like(argument) for argument in self.arguments))


class OfItsArguments(Repeated):
    """A capture that goes on with the arguments that it was made with."""

    def __call__(self, *arguments):
        return self.update(*self.arguments)


class Keeping(Repeated):
    """A capture that has missed some of the tensors that an update changes."""

    def __init__(self, missed, update, arguments):
        self.missed = missed(update.__self__)
        super().__init__(update, arguments)

    def __call__(self, *arguments):
        before = [tensor.clone() for tensor in self.missed]
        found = super().__call__(*arguments)
        for tensor, earlier in zip(self.missed, before, strict=True):
            tensor.copy_(earlier)
        return found


class AtItsAverage(Repeated):
    """A capture that moves the average by what it was made with."""

    def __call__(self, *arguments):
        return super().__call__(*arguments[:4], *self.arguments[4:5], *arguments[5:])


class AtItsRate(Repeated):
    """A capture that goes on with the rate that it was made with."""

    def __init__(self, update, arguments):
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers(update.__self__)]
        self.captured = [rate.clone() for rate in self.rates]
        super().__init__(update, arguments)

    def __call__(self, *arguments):
        for rate, captured in zip(self.rates, self.captured, strict=True):
            rate.copy_(captured)
        return super().__call__(*arguments)


def optimizers(gan):
    return gan.critic_optimizer, gan.generator_optimizer


def adams(kind):
    return lambda gan: [state[kind] for optimizer in optimizers(gan) for state in optimizer.state.values()]


class Failing(Repeated):
    """Fails in the middle of an update of the generator, and again on the way out, as a capture does."""

    def __call__(self, *arguments):
        if self.update.__name__ == "generator_update":
            try:
                self.update(arguments[0], None, *arguments[2:])
            except Exception:
                raise RuntimeError("previous error during capture")  # noqa: B904
        return super().__call__(*arguments)


@pytest.fixture
def gan():
    return tiny_gan(compile="on")


def batches(gan):
    images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return first_batches(gan, images)

def two_steps(gan):
    for step in range(2):
        for name, arguments in batches(gan).items():
            getattr(gan, f"{name}_update")(*arguments[step])
    return gan.state()


@pytest.mark.parametrize("capture", [Repeated, Forgetful, OfItsArguments, Failing])
def test_neither_an_accepted_nor_a_refused_acceleration_changes_the_state(gan, capture):
    expected = two_steps(tiny_gan())
    said = []
    use_fast_updates(gan, batches(gan), compiled=False, capture=capture, report=said.append)
    assert ("critic_update" in vars(gan)) == (capture is Repeated) == (not said)
    assert_same(two_steps(gan), expected)


@pytest.mark.parametrize("capture", [AtItsRate, AtItsAverage, *(functools.partial(Keeping, missed) for missed in (
    lambda gan: list(gan.averaged.parameters()), lambda gan: list(gan.generator.parameters()),
    lambda gan: list(gan.critic.parameters()), adams("exp_avg_sq"), adams("step")))])
def test_a_capture_that_misses_something_is_noticed(gan, capture):
    said = []
    use_fast_updates(gan, batches(gan), compiled=False, capture=capture, report=said.append)
    assert len(said) == 1


def test_a_capture_that_fails_leaves_its_stream_and_its_memory(gan, monkeypatch):
    tried, called = batches(gan), []
    gan.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    for name in ("set_stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *stream, name=name: called.append((name, *stream)))
    rates = [optimizer.param_groups[0]["lr"].clone() for optimizer in optimizers(gan)]
    for optimizer in optimizers(gan):
        optimizer.found_inf = torch.zeros(())  # as a GPU's updates leave it
    use_fast_updates(gan, tried, compiled=False, capture=Failing, report=lambda said: None)
    assert called == [("set_stream", "before"), ("synchronize",), ("empty_cache",)]
    for optimizer, rate in zip(optimizers(gan), rates, strict=True):
        assert "found_inf" not in vars(optimizer)
        assert all(parameter.grad is None for parameter in optimizer.param_groups[0]["params"])
        assert torch.equal(optimizer.param_groups[0]["lr"], rate)


def test_it_says_why_it_goes_on_without(gan):
    said = []
    for capture in (Forgetful, Failing):
        use_fast_updates(gan, batches(gan), compiled=False, capture=capture, report=said.append)
    assert said[0].startswith("warning: training goes on without captured updates: the results of the faster form differ ")
    assert said[1].startswith("warning: training goes on without captured updates: ")
    assert "NoneType" in said[1]  # the first error, not the last


def test_a_metric_that_is_not_finite_is_noticed(gan):
    class Poisoned(Repeated):
        def __call__(self, *arguments):
            found = super().__call__(*arguments)
            return found | ({"alpha": found["alpha"] * torch.nan} if "alpha" in found else {})

    said = []
    use_fast_updates(gan, batches(gan), compiled=False, capture=Poisoned, report=said.append)
    assert said == ["warning: training goes on without captured updates: the results of the faster form differ by nan%"]


@pytest.mark.parametrize("part", ["critic_losses", "generator_losses", "critic_update", "generator_update"])
def test_a_difference_of_a_part_in_a_hundred_is_noticed(gan, part):
    name, kind = part.split("_")
    plain = getattr(gan, part)

    def altered(*arguments):
        if kind == "update":  # the metrics alone
            return {name: 1.01 * value for name, value in plain(*arguments).items()}
        loss, found = plain(*arguments)  # the gradient alone
        return 1.01 * loss, found

    def capture(update, arguments):
        if update.__name__ != f"{name}_update":
            return update
        if kind == "losses":
            setattr(gan, part, altered)
            return update
        return altered

    said = []
    use_fast_updates(gan, batches(gan), compiled=False, capture=capture, report=said.append)
    assert len(said) == 1
    assert "differ by 1.0%" in said[0]


def test_compiled_losses_are_the_plain_ones(gan, monkeypatch):
    # Traced and differentiated as for the real compiler, without the minutes that it takes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    expected = two_steps(tiny_gan())
    said = []
    use_fast_layers(gan, report=said.append)  # without, autograd's double backward cannot be compiled
    use_fast_updates(gan, batches(gan), compiled=True, capture=None, report=said.append)
    assert not said
    assert "critic_losses" in vars(gan)
    for name, value in two_steps(gan)["generator"].items():
        torch.testing.assert_close(value, expected["generator"][name], rtol=1e-3, atol=1e-3)


def test_a_machine_without_a_compiler_trains_all_the_same(train_tiny, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    run = train_tiny(steps=2, compile="on")
    assert "warning: training goes on without --compile: " in capfd.readouterr().out
    assert_same(newest(run), newest(train_tiny(steps=2, out="plain")))


@pytest.mark.nightly
@pytest.mark.parametrize("settings", [{}, {"image_size": 64, "grow_every_images": 8}])
def test_a_compiled_run_is_the_plain_one_and_resumes_exactly(train_tiny, capfd, settings):
    compiled = {"compile": "on", **settings}
    straight, cut = train_tiny(steps=4, out="straight", **compiled), train_tiny(steps=2, out="cut", **compiled)
    assert_same(newest(straight), newest(train_tiny(steps=4, out="cut", **compiled)))
    assert metrics(straight) == metrics(cut)
    assert "goes on without" not in capfd.readouterr().out
    plain = newest(train_tiny(steps=4, out="plain", **settings))["averaged"]
    for name, value in newest(straight)["averaged"].items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", [{}, {"augment": True, "critic_steps": 2}, {"precision": "bfloat16"},
                                      {"image_size": 64, "grow_every_images": 12}])
def test_a_captured_run_is_the_plain_one_and_resumes(train_tiny, capfd, settings):
    settings = {"device": "cuda", **settings}
    straight, cut = train_tiny(steps=4, out="straight", **settings), train_tiny(steps=2, out="cut", **settings)
    resumed = train_tiny(steps=4, out="cut", **settings)
    plain = train_tiny(steps=4, out="plain", compile="off", **settings)
    assert "goes on without" not in capfd.readouterr().out
    assert cut == resumed
    for other in (resumed, plain):
        for name, value in newest(straight)["averaged"].items():
            torch.testing.assert_close(value, newest(other)["averaged"][name], rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_capture_takes_new_arguments_and_hands_out_values_of_its_own():
    total = torch.zeros((), device="cuda")

    def update(value):
        return {"double": 2 * value, "total": total.add_(value)}

    captured = CapturedUpdate(update, [torch.ones((), device="cuda")])
    total.zero_()
    first, second = captured(torch.tensor(3.0)), captured(torch.tensor(5.0))
    assert [first["double"].item(), second["double"].item(), total.item()] == [6, 10, 8]


# A critic that somebody has changed


class LeakyCritic(Discriminator):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        for index in range(2, len(self.blocks), 3):
            self.blocks[index] = nn.LeakyReLU()


class AveragingCritic(Discriminator):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.blocks[1] = nn.AvgPool2d(2)


class NormalizedCritic(Discriminator):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.blocks.insert(1, nn.GroupNorm(2, self.blocks[0].out_channels))


class OtherForwardCritic(Discriminator):
    def forward(self, images):
        return super().forward(images) + images.square().flatten(1).mean(dim=1)


class GatedCritic(Discriminator):
    """Computes the same as a Discriminator, with the same gradients, until its gate has been trained."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.gate = nn.Parameter(torch.zeros(2))

    def forward(self, images):
        return super().forward(images) + self.gate.prod() * images.flatten(1).sin().sum(dim=1)


class RegularizedCritic(Discriminator):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.blocks[0] = nn.utils.parametrizations.spectral_norm(self.blocks[0])
        self.blocks.append(nn.Dropout(0.2))


class PooledCritic(nn.Module):
    """Nothing of the Discriminator but its place."""

    def __init__(self, *, channels, base_channels, **arguments):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, base_channels, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(base_channels, 1))

    def forward(self, images):
        return self.net(images).squeeze(1)


@pytest.mark.parametrize("critic", [LeakyCritic, AveragingCritic, NormalizedCritic, OtherForwardCritic, GatedCritic,
                                    RegularizedCritic, PooledCritic])
def test_a_changed_critic_gets_the_penalty_of_what_it_computes_and_one_line_says_so(monkeypatch, critic):
    monkeypatch.setattr(wgan_gp, "Discriminator", critic)
    gan, said = tiny_gan(), []
    use_fast_layers(gan, report=said.append)
    (line,) = said
    assert line.startswith("warning: the penalty by double backward is used, which is slower: ")
    real, z, mixing, numbers = critic_arguments(torch.rand(4, 3, 32, 32))
    if critic is GatedCritic:
        nn.init.ones_(gan.critic.gate)
    between = torch.lerp(gan.generator.decode(z).detach(), real, mixing).requires_grad_()
    gan.critic.eval()  # so that Dropout and spectral norm compute the same twice
    (slope,) = torch.autograd.grad(gan.critic(between).sum(), between)
    expected = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    _, metrics = gan.critic_losses(real, z, mixing, numbers)
    assert metrics["gradient_penalty"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_critic_as_it_is_uses_the_fast_gradient_without_a_word():
    for settings in ({}, {"image_size": 64, "output_layer": "none"}):
        gan = tiny_gan(**settings)
        use_fast_layers(gan, report=pytest.fail)
        assert gan.input_gradient


# A layer that somebody has changed


def circular_convolution(monkeypatch, gan):
    for network in (gan.generator, gan.averaged):
        network.output_layer.cnn.conv.padding_mode = "circular"
        network.output_layer.cnn.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def other_video(monkeypatch, gan):
    monkeypatch.setattr(model_definitions, "synthetic_video", lambda *arguments: synthetic_video(*arguments).square())


def other_forward(monkeypatch, gan):
    monkeypatch.setattr(CNN, "forward", lambda cnn, video: cnn.predict(cnn.conv(video.flatten(1, 2)).square()))


def other_gradient(monkeypatch, gan):
    monkeypatch.setattr(CNN, "forward", lambda cnn, video: cnn.predict(cnn.conv(video.flatten(1, 2).detach())))


def other_output(monkeypatch, gan):
    plain = CNNParamTanh.parts
    monkeypatch.setattr(CNNParamTanh, "parts", lambda layer, images: (*plain(layer, images)[:2], images))


@pytest.mark.parametrize("change", [circular_convolution, other_video, other_forward, other_gradient, other_output])
def test_a_changed_layer_is_left_as_it_is_and_one_line_says_so(monkeypatch, change):
    gan, said = tiny_gan(), []
    change(monkeypatch, gan)
    use_fast_layers(gan, report=said.append)
    assert [line.split(",")[0] for line in said] == ["warning: the layer that makes a whole video is used"]
    assert not any("parts" in vars(network.output_layer) for network in (gan.generator, gan.averaged))


def test_the_layer_as_it_is_makes_no_video_in_training():
    gan = tiny_gan()
    use_fast_layers(gan, report=pytest.fail)
    assert all(network.decode_parts(torch.randn(2, 8)).video is None for network in (gan.generator, gan.averaged))


@pytest.mark.parametrize(("channels", "height", "width", "num_frames"),
                         [(3, 64, 64, 16), (1, 32, 57, 5), (4, 48, 16, 4), (3, 20, 1100, 2), (3, 16, 16, 1)])
def test_the_convolution_without_a_video_is_that_of_the_video(channels, height, width, num_frames):
    images = torch.rand(3, channels, height, width, dtype=torch.float64, requires_grad=True)
    conv = nn.Conv2d(channels * num_frames, 2, 3, padding=1).double()
    tensors = images, conv.weight, conv.bias
    found = []
    for maps in (VideoConvolution.apply(*tensors, num_frames), conv(synthetic_video(images, num_frames).flatten(1, 2))):
        first = torch.autograd.grad(maps.pow(3).sum(), tensors, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), tensors)
        found.append([maps, *first, *second])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    (alone,) = torch.autograd.grad(VideoConvolution.apply(*tensors, num_frames).pow(3).sum(), images)
    torch.testing.assert_close(alone, found[1][1], rtol=1e-10, atol=1e-10)


# Networks with buffers


class BufferedVAE(VAE):
    """With batch norm, spectral norm and Dropout."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.encoder[0] = nn.utils.parametrizations.spectral_norm(self.encoder[0])
        self.encoder.insert(1, nn.BatchNorm2d(self.encoder[0].out_channels))
        self.decoder.insert(1, nn.Dropout(0.1))
        self.decoder.insert(1, nn.BatchNorm1d(self.decoder[0].out_features))


@pytest.fixture
def buffered(monkeypatch):
    for module in (wgan_gp, checkpointing):
        monkeypatch.setattr(module, "VAE", BufferedVAE)


def test_networks_with_buffers_resume_exactly_and_pictures_leave_them_alone(train_tiny, buffered):
    straight = train_tiny(steps=4, out="straight", sample_every=1, evaluate_every=1)
    train_tiny(steps=2, out="cut")
    resumed = train_tiny(steps=4, out="cut")
    assert_same(newest(straight), newest(resumed))


def test_the_average_has_the_buffers_of_the_generator_and_is_evaluated_with_them(train_tiny, buffered):
    run = train_tiny(steps=3)
    state = newest(run)
    names = [name for name in state["generator"] if "running" in name or name.endswith(("_u", "_v", "num_batches_tracked"))]
    assert len(names) >= 8
    assert all(torch.equal(state["averaged"][name], state["generator"][name]) for name in names)
    vae, z = load_generator(run), torch.randn(4, 8)
    assert not any(module.training for module in vae.modules())
    assert torch.allclose(vae.decode(z)[:1], vae.decode(z[:1]), atol=1e-6)
