import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import config
from image_sizes import SHORTER_SIDES
from losses import generator_loss, kl_divergence, reconstruction_loss
from model_definitions import (
    CNN,
    LOGVAR_RANGE,
    OUTPUT_LAYERS,
    VAE,
    CNNParamTanh,
    Discriminator,
    SmoothEnlargement,
    StaticParamTanh,
    alpha_map,
    finest_octave,
)
from synthetic_video import synthetic_video


def test_config_and_networks_know_the_same_choices():
    rules = {field.name: field.metadata for field in config.dataclasses.fields(config.Config)}
    assert rules["output_layer"]["choices"] == OUTPUT_LAYERS


@pytest.mark.parametrize("size", SHORTER_SIDES)
def test_shapes_at_every_size(size):
    vae = VAE(image_size=size, base_channels=4, latent_dim=6)
    critic = Discriminator(image_size=size, base_channels=4)
    images = torch.rand(2, 3, size, size)
    reconstruction, mu, logvar = vae(images)
    assert reconstruction.shape == images.shape
    assert mu.shape == logvar.shape == (2, 6)
    parts = vae.decode_parts(torch.randn(2, 6))
    assert parts.before.shape == parts.images.shape == images.shape
    assert parts.video.shape == (2, 16, 3, size, size)
    assert parts.alpha.shape == (2, 1, size, size)
    assert critic(images).shape == (2,)
    assert vae.sample(3).shape == (3, 3, size, size)


def test_the_finest_octave_is_what_halving_the_size_loses():
    rows = torch.arange(64.0)[:, None] / 64
    coarse = rows.expand(64, 32)  # linear, so averaging to half the size and enlarging again keeps it, but at the edges
    fine = torch.tensor([1.0, -1.0]).repeat(16).expand(64, 32)
    lost = finest_octave(torch.stack([coarse, fine])[None])[0]
    assert torch.allclose(lost[0, 1:-1], torch.zeros(62, 32), atol=1e-6)
    assert torch.allclose(lost[1], fine, atol=1e-6)


@pytest.mark.parametrize("grow_from", [None, 32])
def test_a_generator_draws_the_detail_that_it_is_told(grow_from):
    vae = VAE(image_size=64, base_channels=4, latent_dim=6, output_layer="none", grow_from=grow_from).requires_grad_(False)
    z = torch.randn(4, 6)
    logits = torch.logit(vae.decode(z))
    vae.detail = 0.25
    changed = torch.logit(vae.decode(z))
    assert torch.allclose(changed, logits - 0.75 * finest_octave(logits), atol=1e-3)
    assert not torch.allclose(changed, logits, atol=1e-3)


@pytest.mark.parametrize(("size", "channels"), [((64, 112), 1), ((112, 64), 4), ((32, 128), 3), ((40, 32), 4)])
@pytest.mark.parametrize("output_layer", OUTPUT_LAYERS)
def test_shapes_of_rectangles_and_of_one_to_four_channels(size, channels, output_layer):
    vae = VAE(image_size=size, channels=channels, base_channels=2, latent_dim=6, output_layer=output_layer)
    critic = Discriminator(image_size=size, channels=channels, base_channels=2)
    images = torch.rand(2, channels, *size)
    reconstruction, mu, _ = vae(images)
    assert reconstruction.shape == images.shape
    assert critic(images).shape == (2,)
    assert min(vae.decoder[2](torch.rand(2, vae.decoder[0].out_features)).shape[2:]) == 4
    parts = vae.decode_parts(mu)
    if output_layer == "cnn":
        assert parts.video.shape == (2, 16, channels, *size)
    if output_layer != "none":
        assert parts.alpha.shape == (2, 1, *size)
    assert str(vae.encoder) == str(critic.blocks)


@pytest.mark.parametrize("layer", [CNNParamTanh, StaticParamTanh])
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (64, 96)), (3, (96, 96)), (4, (17, 40)), (3, (16, 200))])
def test_an_output_layer_takes_images_of_any_size(layer, channels, size):
    images = torch.rand(2, channels, *size, requires_grad=True)
    after = layer(image_size=64, channels=channels)(images)
    assert after.shape == images.shape
    after.sum().backward()
    assert images.grad.isfinite().all()


def test_pooling_is_that_of_max_pool_where_16_divides_the_sides():
    maps, cnn = torch.randn(2, 2, 64, 112), CNN()
    assert torch.equal(cnn.pool(maps), nn.functional.max_pool2d(maps, (4, 7)))
    assert torch.equal(cnn.pool(maps), nn.functional.adaptive_max_pool2d(maps, 16))
    assert cnn.pool(maps[..., 1:, 1:]).shape == (2, 2, 16, 16)
    assert cnn.pool(maps[..., 1:, 1:]).amax() == maps[..., 1:, 1:].amax()


@pytest.mark.parametrize(("cells", "size"), [(64, 32), (48, 32), (100, 33)])
def test_a_grid_of_alpha_finer_than_the_image_is_averaged(cells, size):
    grid = torch.randn(2, cells, cells, dtype=torch.float64)
    alpha, cell = alpha_map(grid, size, size), nn.functional.softplus(grid + math.log(math.expm1(3)))
    assert alpha.mean().item() == pytest.approx(cell.mean().item(), rel=1e-12)  # no cell is passed over
    if cells == 2 * size:
        assert torch.allclose(alpha, nn.functional.avg_pool2d(cell[:, None], 2))


@pytest.mark.parametrize("network", [CNNParamTanh(), StaticParamTanh(), VAE(image_size=32, base_channels=2, latent_dim=3)])
def test_images_of_another_kind_are_refused_by_what_was_given(network):
    network = network.encode if isinstance(network, VAE) else network
    for images, said in ((torch.rand(2, 1, 32, 32), r"expected images of shape \(N, 3, .*, got \(2, 1, 32, 32\)"),
                         (torch.rand(3, 32, 32), r"expected images of shape \(N, 3, .*, got \(3, 32, 32\)"),
                         (torch.rand(2, 3, 8, 32), r"expected images of shape \(N, 3, .*, got \(2, 3, 8, 32\)"),
                         (torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), "got torch.uint8; .*images / 255"),
                         (2 * torch.rand(2, 3, 32, 32) - 1, r"expected images in \[0, 1\], got values from -"),
                         (255 * torch.rand(2, 3, 32, 32), r"expected images in \[0, 1\], got values from .* to 25")):
        with pytest.raises(ValueError, match=said) as caught:
            network(images)
        assert "video" not in str(caught.value)
    network(torch.rand(2, 3, 32, 32) + 1e-6)


def test_default_batch_is_that_of_the_description():
    images = torch.rand(16, 3, 128, 128)
    video = synthetic_video(images)
    assert video.flatten(1, 2).shape == (16, 48, 128, 128)
    layer = CNNParamTanh()
    assert layer.cnn.conv.weight.shape == (2, 48, 3, 3)
    assert layer(images).shape == images.shape


def test_discriminator_is_symmetric_with_the_encoder():
    vae, critic = VAE(image_size=64, base_channels=8), Discriminator(image_size=64, base_channels=8)
    assert str(vae.encoder) == str(critic.blocks)
    ins = [m.in_channels for m in vae.encoder if isinstance(m, nn.Conv2d)]
    outs = [m.out_channels for m in vae.decoder if isinstance(m, nn.ConvTranspose2d)]
    assert outs == ins[::-1]


@pytest.mark.parametrize("output_layer", OUTPUT_LAYERS)
@pytest.mark.parametrize("seed", range(8))
def test_gradient_of_the_generator_loss_reaches_every_weight_of_the_generator(output_layer, seed):
    torch.manual_seed(seed)
    vae = VAE(image_size=32, base_channels=4, latent_dim=8, output_layer=output_layer)
    critic = Discriminator(image_size=32, base_channels=4).requires_grad_(False)
    generator_loss(critic(vae.decode(torch.randn(4, 8)))).backward()
    reached = {name for name, p in vae.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    wanted = {name for name, _ in vae.named_parameters() if not name.startswith(("encoder", "mu", "logvar"))}
    assert reached == wanted
    assert all(p.grad is None for p in critic.parameters())


def test_gradient_of_the_vae_terms_reaches_every_weight_of_the_encoder():
    vae = VAE(image_size=32, base_channels=4, latent_dim=8)
    images = torch.rand(4, 3, 32, 32)
    reconstruction, mu, logvar = vae(images)
    (reconstruction_loss(reconstruction, images) + kl_divergence(mu, logvar)).backward()
    assert all(p.grad.abs().sum() > 0 for p in vae.parameters())


@pytest.mark.parametrize("output_layer", OUTPUT_LAYERS)
def test_first_images_are_mid_grey_on_average_whatever_the_output_layer(output_layer):
    means = []
    for seed in range(8):
        torch.manual_seed(seed)
        vae = VAE(image_size=32, base_channels=8, output_layer=output_layer)
        means.append(vae.sample(16).mean())
    assert 0.4 < torch.stack(means).mean() < 0.6


def test_alpha_starts_at_three():
    _, alpha, _ = CNNParamTanh(image_size=32).parts(torch.rand(4, 3, 32, 32))
    assert torch.allclose(alpha, torch.tensor(3.0), atol=0.05)


def test_layer_is_tanh_of_alpha_times_image():
    layer, images = CNNParamTanh(image_size=32), torch.rand(2, 3, 32, 32)
    video, alpha, out = layer.parts(images)
    assert torch.equal(video, synthetic_video(images))
    assert torch.equal(alpha, layer.cnn(video))
    assert torch.equal(out, torch.tanh(alpha * images))
    assert torch.equal(layer(images), out)
    assert torch.equal(layer(images, video.flip(1)), torch.tanh(layer.cnn(video.flip(1)) * images))


def test_layer_goes_after_any_decoder_in_one_line():
    model = nn.Sequential(nn.Linear(4, 3 * 64 * 64), nn.Unflatten(1, (3, 64, 64)), nn.Sigmoid(), CNNParamTanh(image_size=64))
    out = model(torch.randn(2, 4))
    assert out.shape == (2, 3, 64, 64)
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (32, 40)), (4, (48, 32))])
def test_gradcheck_of_the_layer(channels, size):
    torch.manual_seed(0)
    layer = CNNParamTanh(image_size=size, channels=channels, num_frames=2, alpha_grid=2).double()
    row = torch.rand(1, channels, 1, 2, dtype=torch.float64, requires_grad=True)
    frame = torch.rand(1, channels, *size, dtype=torch.float64)

    def through(row):
        images = torch.cat([torch.cat([row, frame[..., :1, 2:]], dim=3), frame[..., 1:, :]], dim=2)
        return layer(images)[..., ::5, ::5]

    assert torch.autograd.gradcheck(through, row, atol=1e-6)


def test_cnn_takes_stacked_and_separate_frames_and_gives_positive_alpha():
    cnn, video = CNN(image_size=32, num_frames=4, alpha_grid=5), torch.rand(2, 4, 3, 32, 32)
    assert torch.equal(cnn(video), cnn(video.flatten(1, 2)))
    assert cnn(video * 100 - 50).min() > 0


def test_no_seed_kills_both_filters():
    images = torch.rand(2, 3, 32, 32)
    for seed in range(20):
        torch.manual_seed(seed)
        cnn = CNN(image_size=32)
        features = cnn.pool(cnn.conv(synthetic_video(images).flatten(1, 2))).relu()
        assert features.sum() > 0


def test_grid_as_wide_as_the_image_gives_every_pixel_its_own_alpha():
    grid = torch.randn(2, 32, 32)
    assert torch.equal(alpha_map(grid, 32, 32)[:, 0], nn.functional.softplus(grid + math.log(math.expm1(3))))


def test_logvar_is_bounded_and_mu_is_not():
    vae = VAE(image_size=32, base_channels=4, latent_dim=4)
    nn.init.constant_(vae.logvar.bias, 1e4)
    nn.init.constant_(vae.mu.bias, 1e4)
    mu, logvar = vae.encode(torch.rand(2, 3, 32, 32))
    assert (logvar == LOGVAR_RANGE[1]).all()
    assert mu.min() > 9e3


def test_reparameterize_has_the_mean_and_spread_it_is_given():
    vae = VAE(image_size=32, base_channels=4, latent_dim=2)
    mu, logvar = torch.full((20_000, 2), 3.0), torch.full((20_000, 2), math.log(4.0))
    z = vae.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(0))
    assert z.mean().item() == pytest.approx(3, abs=0.05)
    assert z.std().item() == pytest.approx(2, abs=0.05)
    assert torch.equal(vae.reparameterize(mu, logvar, noise=torch.zeros_like(mu)), mu)


def test_sample_repeats_with_its_generator_and_keeps_no_gradient():
    vae = VAE(image_size=32, base_channels=4, latent_dim=4)
    first, second = (vae.sample(2, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_probability_is_the_sigmoid_of_an_unbounded_score():
    critic, images = Discriminator(image_size=32, base_channels=4), torch.rand(3, 3, 32, 32)
    assert torch.equal(critic.probability(images), critic(images).sigmoid())
    nn.init.constant_(critic.score.weight, 50.0)
    assert critic(images).abs().max() > 1


def test_output_is_float32_under_autocast_and_near_that_without():
    torch.manual_seed(0)
    vae, z = VAE(image_size=32, base_channels=16, latent_dim=8), torch.randn(4, 8)
    with torch.no_grad():
        exact = vae.decode(z)
        with torch.autocast("cpu", torch.bfloat16):
            half = vae.decode(z)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.03
    assert (half - exact).abs().mean() < 0.004


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_work_in_another_precision(dtype):
    vae, images = VAE(image_size=32, base_channels=4, latent_dim=4).to(dtype), torch.rand(2, 3, 32, 32, dtype=dtype)
    assert vae.sample(2).isfinite().all()
    assert vae(images)[0].shape == images.shape
    assert CNNParamTanh(image_size=32).to(dtype)(images).isfinite().all()
    assert Discriminator(image_size=32, base_channels=4).to(dtype)(images).dtype == torch.promote_types(dtype, torch.float32)


def test_impossible_arguments_are_refused_with_what_would_do():
    with pytest.raises(ValueError, match="image_size must be one of 32, 64, 128, 256, 512, or .*; got 100"):
        VAE(image_size=100)
    with pytest.raises(ValueError, match="image_size must be one of"):
        Discriminator(image_size=16)
    with pytest.raises(ValueError, match="output_layer must be one of cnn, static, none, got 'tanh'"):
        VAE(output_layer="tanh")
    with pytest.raises(ValueError, match="alpha_grid must be at least 1, got 0"):
        CNNParamTanh(alpha_grid=0)
    for size in (8, (64, 8), "64", (3, 64, 64), 32.0):
        with pytest.raises(ValueError, match="image_size must be at least 16, or .H, W. of such, got"):
            CNNParamTanh(image_size=size)
    for channels in (2, True, 3.0):
        for network in (VAE, Discriminator, CNN, CNNParamTanh, StaticParamTanh):
            with pytest.raises(ValueError, match=f"channels must be one of 1, 3, 4, got {channels}"):
                network(channels=channels)
    with pytest.raises(ValueError, match="num_frames must be from 1 to .*, got 0"):
        VAE(num_frames=0)
    with pytest.raises(ValueError, match="base_channels must be at least 1"):
        Discriminator(base_channels=0)


def test_wrong_shapes_are_refused_with_the_shape_and_what_was_expected():
    critic = Discriminator(image_size=32, base_channels=4)
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 3, 32, 32\), got \(3, 32, 32\)"):
        critic(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        critic(torch.rand(1, 3, 64, 64))
    vae = VAE(image_size=32, base_channels=4, latent_dim=4)
    with pytest.raises(ValueError, match=r"expected z of shape \(N, 4\), got \(2, 5\)"):
        vae.decode(torch.rand(2, 5))
    with pytest.raises(ValueError, match=r"a video \(N, 16, 3, H, W\) or \(N, 48, H, W\) .* got \(1, 8, 3, 32, 32\)"):
        CNN(image_size=32)(torch.rand(1, 8, 3, 32, 32))


@pytest.mark.parametrize("image_size", [32, 256])
def test_the_first_images_are_smooth_and_signals_keep_their_scale(image_size):
    torch.manual_seed(0)
    vae = VAE(image_size=image_size, base_channels=8, output_layer="none").requires_grad_(False)
    signal = torch.randn(16, 128)
    for layer in vae.decoder[:-1]:
        signal = layer(signal)
        if isinstance(layer, nn.ConvTranspose2d):
            assert 0.4 < signal.square().mean().sqrt() < 2.5
    images = vae.decoder[-1](signal)
    assert images.diff(dim=3).std() < 0.4 * images.std()


def test_reprs_show_settings_and_shapes():
    vae = repr(VAE(image_size=64, latent_dim=9, base_channels=2, alpha_grid=8))
    for expected in ("images (N, 3, 64, 64), z (N, 9)", "(N, 3, 64, 64) -> (N, 3, 64, 64), num_frames=16",
                     "(N, 48, 64, 64) -> (N, 1, 64, 64)"):
        assert expected in vae
    assert "(N, 3, 32, 32) -> (N,)" in repr(Discriminator(image_size=32, base_channels=2))


# Export, with a free batch size


EXPORTED = {"decode": lambda: Decoder(VAE(image_size=32, base_channels=2, latent_dim=4, num_frames=3)),
            "static": lambda: Decoder(VAE(image_size=(32, 48), channels=1, base_channels=2, latent_dim=4,
                                          output_layer="static")),
            "detail": lambda: Decoder(softened(VAE(image_size=32, base_channels=2, latent_dim=4, num_frames=3))),
            "layer": lambda: CNNParamTanh(num_frames=3, channels=4)}


def softened(vae):
    vae.detail = 0.5
    return vae


class Decoder(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        return self.vae.decode(z)


def inputs(module, count):
    return torch.rand((count, 4) if isinstance(module, Decoder) else (count, 4, 32, 48))  # ONNX has no adaptive pooling


def free_batch():
    return ({0: torch.export.Dim("batch", min=1, max=64)},)


def traced(module, path):
    return torch.jit.trace(module, inputs(module, 2), check_trace=False)


def exported(module, path):
    return torch.export.export(module, (inputs(module, 2),), dynamic_shapes=free_batch()).module()


def run_by_onnx(module, path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(module, (inputs(module, 2),), path, dynamo=True, dynamic_shapes=free_batch(), verbose=False)
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tracing warns that H and W are fixed
@pytest.mark.parametrize("export", [traced, exported, run_by_onnx])
@pytest.mark.parametrize("name", EXPORTED)
def test_exports_take_batches_of_any_size(tmp_path, export, name):
    module = EXPORTED[name]().requires_grad_(False).eval()
    found = export(module, str(tmp_path / "model.onnx"))
    for count in (1, 2, 5):
        x = inputs(module, count)
        torch.testing.assert_close(found(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of torch.ao
def test_a_generator_with_quantized_linear_layers_draws():
    vae = VAE(image_size=32, base_channels=2, latent_dim=4).requires_grad_(False).eval()
    quantized = torch.ao.quantization.quantize_dynamic(vae, {nn.Linear})
    noise = torch.randn(3, 4)
    assert (quantized.decode(noise) - vae.decode(noise)).abs().max() < 0.05
    assert quantized.sample(2).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("network", [CNNParamTanh(num_frames=2), StaticParamTanh()])
def test_an_output_layer_can_be_transformed_by_torch_func(network):
    images = torch.rand(3, 3, 20, 32)
    assert torch.allclose(torch.func.vmap(lambda image: network(image[None])[0])(images), network(images), atol=1e-6)

    def loss(parameters, image):
        return torch.func.functional_call(network, parameters, (image[None],)).sum()

    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    network(images).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


def test_even_transposed_convolutions_make_even_maps_of_even_ones_and_start_as_plain_ones():
    even, plain = (VAE(image_size=32, base_channels=2, even_taps=even_taps).decoder[3] for even_taps in (True, False))
    plain.load_state_dict(even.state_dict())
    features = torch.randn(2, even.in_channels, 4, 6)
    torch.testing.assert_close(even(features), plain(features))
    nn.init.normal_(even.weight)
    inner = even(torch.ones_like(features))[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # nothing but the four sums is changed
        plain.weight.copy_(even.weight)
        sums = even.weight.unflatten(3, (2, 2)).unflatten(2, (2, 2)).sum(dim=(2, 4))
        rest = (sums.mean(dim=(2, 3), keepdim=True) - sums).repeat(1, 1, 2, 2) / 4
        plain.weight.add_(rest)
    torch.testing.assert_close(even(features), plain(features), rtol=1e-4, atol=1e-4)


def test_smooth_enlargement_is_a_convolution_of_doubled_pixels():
    layer = SmoothEnlargement(5, 3).double()
    features = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    doubled = F.interpolate(features, scale_factor=2, mode="nearest")
    expected = F.conv2d(doubled, layer.weight.flip(2, 3).transpose(0, 1), layer.bias, padding=1)
    torch.testing.assert_close(layer(features), expected, atol=1e-12, rtol=0)
