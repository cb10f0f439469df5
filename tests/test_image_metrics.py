import random
from urllib.error import URLError

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Subset
from torchvision.transforms.v2.functional import gaussian_blur, pil_to_tensor

from demo_images import SHAPES, draw_shape
from image_metrics import (
    CORRELATION_OF_ALL_DETAIL,
    detail_worth_drawing,
    diversity,
    inception_distances,
    nearest_distance,
    patches,
    reconstruction_errors,
    sliced_wasserstein,
    thumbnails,
)
from model_definitions import VAE


@pytest.fixture(scope="module")
def drawn():
    """Two halves of one set, (60, C, 64, 64) each."""
    images = [pil_to_tensor(draw_shape(SHAPES[i % 6], random.Random(i))) for i in range(120)]
    return (torch.stack(images) / 255).split(60)


def swd(real, fake):
    one, other = (patches(images, generator=torch.Generator().manual_seed(seed)) for seed, images in enumerate((real, fake)))
    return sliced_wasserstein(one, other, generator=torch.Generator().manual_seed(2))


def test_the_distance_of_a_set_to_itself_is_small_and_every_fault_raises_it_where_it_belongs(drawn):
    real, other = drawn
    halves = swd(real, other)
    assert list(halves) == [64, 32, 16]
    blurred = swd(real, gaussian_blur(other, [5, 5], [1.0, 1.0]))
    noisy = swd(real, other + 0.1 * torch.randn(other.shape, generator=torch.Generator().manual_seed(1)))
    dark = swd(real, 0.6 * other)
    assert blurred[64] > 3 * halves[64]
    assert blurred[64] / halves[64] > 2 * blurred[16] / halves[16]  # texture is lost, layout is not
    assert noisy[64] > 5 * halves[64]
    assert noisy[64] / halves[64] > 2 * noisy[16] / halves[16]
    assert dark[16] > 3 * halves[16]
    assert swd(real, other[:1].expand_as(other))[16] > 2 * halves[16]


def test_the_pyramid_keeps_the_mean_colour_at_its_coarsest_level_only():
    real = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same, shifted = swd(real, real), swd(real, real + 0.5)
    assert shifted[32] == pytest.approx(same[32], rel=1e-3)
    assert shifted[16] > 5 * same[16]


def test_channels_that_are_the_same_everywhere_give_finite_distances():
    assert all(0 <= distance < 1e6 for distance in swd(torch.ones(8, 3, 32, 32), torch.zeros(8, 3, 32, 32)).values())


def test_one_image_repeated_has_no_diversity(drawn):
    small = thumbnails(drawn[0])
    assert diversity(small[:1].expand(10, -1)) == 0
    assert diversity(small) > 0.1
    assert diversity(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5 / 2**0.5)


def test_the_diversity_of_many_images_is_that_of_some_of_all_parts():
    many = torch.cat([torch.zeros(6_000, 3), torch.rand(6_000, 3, generator=torch.Generator().manual_seed(0))])
    assert diversity(many) == pytest.approx(torch.pdist(many).mean().item() / 3**0.5, rel=0.02)


def test_copies_are_at_no_distance_from_the_training_images_and_new_ones_are(drawn):
    known, new = map(thumbnails, drawn)
    assert nearest_distance(known[:20], known) < 1e-3
    assert nearest_distance(new, known) > 0.02
    assert nearest_distance(known, known, rank=2) == pytest.approx(nearest_distance(new, known), rel=0.3)


def test_a_thumbnail_is_the_mean_of_what_it_covers():
    images = torch.rand(2, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    expected = F.interpolate(images, (16, 16), mode="area")
    assert (thumbnails(images).view(2, 3, 16, 16) - expected).abs().mean() < 0.05


def test_reconstruction_errors_are_those_of_mean_latent_vectors():
    vae = VAE(image_size=32, latent_dim=4, base_channels=2).requires_grad_(False)
    images = torch.rand(3, 3, 32, 32)
    for error, image in zip(reconstruction_errors(vae, images), images.split(1), strict=True):
        assert error.item() == pytest.approx((vae.decode(vae.encode(image)[0]) - image).abs().mean().item(), rel=1e-4)


@pytest.fixture
def inception(monkeypatch):
    """torch-fidelity with an untrained network in place of the one that it would fetch."""
    from torch_fidelity import feature_extractor_inceptionv3 as network

    def start(self, state):
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(network, "load_state_dict_from_url", lambda *_, **__: None)
    monkeypatch.setattr(network.FeatureExtractorInceptionV3, "load_state_dict", start)
    return network


def test_inception_distances_are_zero_for_the_same_images_and_rise_with_a_fault(drawn, inception):
    real, other = (half[:10] for half in drawn)
    real, *fakes = (Subset((255 * images).round().to(torch.uint8), range(10)) for images in (real, real, other, 0.6 * other))
    same, halves, dark = (inception_distances(real, fake, torch.device("cpu")) for fake in fakes)
    for name in ("frechet_inception_distance", "kernel_inception_distance"):
        assert abs(same[name]) < 0.1 * dark[name]
        assert halves[name] < 0.5 * dark[name]


def test_an_inception_network_that_cannot_be_fetched_is_said(drawn, inception, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="the Inception network cannot be fetched: no network"):
        inception_distances(drawn[0], drawn[1], torch.device("cpu"))


@pytest.mark.parametrize("channels", [1, 3])
def test_detail_is_drawn_as_far_as_it_is_where_it_belongs(channels):
    generator = torch.Generator().manual_seed(0)
    real, noise = (0.2 + 0.6 * torch.rand(8, channels, 32, 32, generator=generator) for _ in range(2))
    assert detail_worth_drawing(real, real) == 1
    assert detail_worth_drawing(real, 1 - real) == 0
    assert detail_worth_drawing(real, torch.full_like(real, 0.5)) == 0
    assert detail_worth_drawing(real, torch.full_like(real, torch.nan)) == 0
    assert detail_worth_drawing(real, noise) < 0.2
    correlation = CORRELATION_OF_ALL_DETAIL / 2
    mixed = correlation * real + (1 - correlation**2) ** 0.5 * noise
    worth = detail_worth_drawing(real, mixed)
    assert worth == pytest.approx(0.5, abs=0.15)
    assert detail_worth_drawing(real, 0.5 + 0.1 * mixed) == pytest.approx(worth, abs=1e-4)  # its strength does not count


def test_detail_of_transparency_counts_in_white_images_and_that_of_invisible_colours_does_not():
    colours, opacity = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    white = torch.cat([torch.ones_like(colours), opacity[:, :1]], dim=1)
    assert detail_worth_drawing(white, white) == 1
    seen = torch.cat([colours, (torch.arange(32.0) < 16).expand(4, 1, 32, 32).float()], dim=1)
    hidden = torch.where(seen[:, 3:] > 0, seen, torch.cat([opacity, seen[:, 3:]], dim=1))
    assert detail_worth_drawing(seen, hidden) == detail_worth_drawing(seen, seen) == 1
    assert detail_worth_drawing(seen, torch.cat([opacity, seen[:, 3:]], dim=1)) < 1
    seen[:, 3, :, 1:] = hidden[:, 3, :, 1:] = 0
    hidden[:, :3, :, 1:] = 1 - seen[:, :3, :, 1:]
    assert detail_worth_drawing(seen, hidden) == 1
