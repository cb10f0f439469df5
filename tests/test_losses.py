import functools
import math

import pytest
import torch
from torch import nn

from fast_paths import written_out_gradient
from losses import (
    combined_wasserstein_loss,
    critic_loss,
    generator_loss,
    gradient_penalty,
    kl_divergence,
    reconstruction_loss,
)
from model_definitions import Discriminator

SHAPE = (5, 3, 8, 8)


class Linear(nn.Module):
    """A critic with the same slope everywhere."""

    def __init__(self, slope, dtype=torch.float64):
        super().__init__()
        weight = torch.randn(math.prod(SHAPE[1:]), dtype=dtype)
        self.weight = nn.Parameter(slope * weight / weight.norm() if slope else torch.zeros_like(weight))

    def forward(self, images):
        return images.flatten(1) @ self.weight


class Smooth(nn.Module):
    """A critic with a slope that changes from place to place, and second derivatives everywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def forward(self, images):
        return self.net(images).squeeze(1)


def pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, *SHAPE, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("slope", "penalty"), [(1, 0), (3, 4), (0.5, 0.25)])
def test_penalty_of_a_linear_critic_is_the_squared_distance_of_its_slope_from_one(slope, penalty):
    assert gradient_penalty(Linear(slope), *pair()).item() == pytest.approx(penalty, abs=1e-12)


def test_penalty_and_its_gradient_are_finite_where_the_slope_is_zero():
    critic = Linear(0)
    penalty = gradient_penalty(critic, *pair())
    penalty.backward()
    assert penalty.item() == 1
    assert critic.weight.grad.isfinite().all()


def test_penalty_is_that_of_finite_differences():
    critic, (real, fake) = Smooth(), pair()
    mixing = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    between = (mixing * real + (1 - mixing) * fake).flatten(1)
    step = 1e-6
    with torch.no_grad():
        slopes = torch.stack([(critic(between + step * e) - critic(between - step * e)) / (2 * step)
                              for e in torch.eye(192, dtype=torch.float64)], dim=1)
    expected = ((slopes.square().sum(dim=1).sqrt() - 1) ** 2).mean()
    assert gradient_penalty(critic, real, fake, mixing=mixing).item() == pytest.approx(expected.item(), rel=1e-8)


def test_gradient_of_the_penalty_is_that_of_finite_differences():
    critic, (real, fake) = Smooth(), pair()
    mixing = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    weight = critic.net[1].weight
    gradient_penalty(critic, real, fake, mixing=mixing).backward()

    def moved(step):
        with torch.no_grad():
            weight[2, 7] += step
        value = gradient_penalty(critic, real, fake, mixing=mixing).item()
        with torch.no_grad():
            weight[2, 7] -= step
        return value

    assert weight.grad[2, 7].item() == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-5)


def test_penalty_of_a_sample_does_not_depend_on_the_others():
    critic, (real, fake) = Smooth(), pair()
    mixing = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    alone = [gradient_penalty(critic, real[i:i + 1], fake[i:i + 1], mixing=mixing[i:i + 1]) for i in range(5)]
    together = gradient_penalty(critic, real, fake, mixing=mixing)
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-12)


def test_penalty_is_taken_at_one_uniform_point_between_real_and_fake_for_each_sample():
    seen = []

    def critic(images):
        seen.append(images.detach())
        return images.flatten(1).sum(dim=1)

    real, fake = torch.ones(2000, 3, 2, 2), torch.zeros(2000, 3, 2, 2)
    torch.manual_seed(0)
    gradient_penalty(critic, real, fake)
    shares = seen[0].flatten(1)
    assert (shares == shares[:, :1]).all()
    quantiles = shares[:, 0].quantile(torch.linspace(0, 1, 11))
    assert torch.allclose(quantiles, torch.linspace(0, 1, 11), atol=0.04)
    gradient_penalty(critic, real, fake, mixing=torch.full((2000, 1, 1, 1), 0.75))
    assert (seen[1] == 0.75).all()


def test_mixing_weights_of_pixels_instead_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"expected mixing weights of shape \(5, 1, 1, 1\), got \(8,\)"):
        gradient_penalty(Smooth(), *pair(), mixing=torch.rand(8))


def test_penalty_norm_is_taken_in_float32_for_a_half_precision_critic():
    real, fake = pair(torch.bfloat16)
    assert gradient_penalty(Linear(1, torch.bfloat16), real, fake).dtype == torch.float32


def test_gradients_of_the_critics_loss_reach_every_weight_of_the_critic_and_not_the_generator():
    critic = Discriminator(image_size=32, base_channels=4)
    real = torch.rand(4, 3, 32, 32)
    generator = nn.Parameter(torch.rand(4, 3, 32, 32))
    combined_wasserstein_loss(critic, real, generator.sigmoid()).backward()
    assert generator.grad is None
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters())


def test_gradients_of_the_penalty_alone_reach_the_critics_weights():
    critic = Discriminator(image_size=32, base_channels=4)
    gradient_penalty(critic, torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in critic.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (3, (64, 64)), (1, (32, 56)), (4, (80, 64))])
def test_written_out_gradient_of_the_discriminator_gives_the_penalty_of_autograd(channels, size):
    torch.manual_seed(0)
    critic = Discriminator(image_size=size, channels=channels, base_channels=4).double()
    real, fake = torch.rand(2, 4, channels, *size, dtype=torch.float64).round(decimals=1)  # with ties in the pooling
    mixing = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    results = []
    for input_gradient in (functools.partial(written_out_gradient, critic), None):
        critic.zero_grad()
        penalty = gradient_penalty(critic, real, fake, mixing=mixing, input_gradient=input_gradient)
        penalty.backward()
        results.append((penalty.detach(), [p.grad.clone() for name, p in critic.named_parameters() if "weight" in name]))
    (ours, our_gradients), (autograd, autograd_gradients) = results
    assert torch.allclose(ours, autograd, rtol=1e-12)
    for one, other in zip(our_gradients, autograd_gradients, strict=True):
        assert one.abs().sum() > 0
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_penalty_under_autocast_is_near_that_in_float32_and_its_gradients_reach_the_weights():
    torch.manual_seed(0)
    critic = Discriminator(image_size=32, base_channels=16)
    real, fake, mixing = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32), torch.rand(8, 1, 1, 1)
    gradients = []
    for half in (False, True):
        critic.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            gradient_penalty(critic, real, fake, mixing=mixing,
                             input_gradient=functools.partial(written_out_gradient, critic)).backward()
        gradients.append(torch.cat([p.grad.flatten() for name, p in critic.named_parameters() if "weight" in name]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_combined_loss_is_the_critic_loss_plus_the_weighted_penalty():
    critic, (real, fake) = Smooth(), pair()
    mixing = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    expected = critic(fake).mean() - critic(real).mean() + 7 * gradient_penalty(critic, real, fake, mixing=mixing)
    assert combined_wasserstein_loss(critic, real, fake, weight=7, mixing=mixing).item() == pytest.approx(expected.item())


def test_critic_wants_real_above_fake_and_generator_wants_fake_high():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    assert critic_loss(real, fake).item() == -2.5
    assert generator_loss(fake).item() == 0.5


def test_kl_is_zero_for_the_standard_normal_and_follows_the_closed_form():
    zero = torch.zeros(3, 4)
    assert kl_divergence(zero, zero).item() == 0
    expected = 4 * 0.5 * (2**2 + math.e - 1 - 1)
    assert kl_divergence(zero + 2, zero + 1).item() == pytest.approx(expected)
    mu, logvar = torch.randn(2, 3, 4, dtype=torch.float64)
    normal, standard = torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=1).mean()
    assert kl_divergence(mu, logvar).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("size", [4, 64])
def test_reconstruction_gradient_of_an_image_has_norm_one_at_every_size(size):
    images = torch.rand(1, 3, size, size)
    reconstruction = torch.rand(1, 3, size, size, requires_grad=True)
    loss = reconstruction_loss(reconstruction, images)
    loss.backward()
    assert loss.item() == pytest.approx(((reconstruction - images).abs().sum() / (3 * size * size) ** 0.5).item())
    assert reconstruction.grad.norm().item() == pytest.approx(1, rel=1e-4)
