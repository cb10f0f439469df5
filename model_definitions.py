"""The networks: the VAE (generator), the Discriminator (critic), the CNN that predicts alpha, and the CNNParamTanh layer.

Notation, here and in every other file:
    N batch, T frames, C channels (3), H = W image size in pixels, Z latent size, G side of the grid of alpha.
Images are float (N, C, H, W) in [0, 1]; videos are float (N, T, C, H, W) in [0, 1].

This file is plain PyTorch and can be changed freely: faster forms of these computations are in fast_paths.py and are used
only where they give the same numbers. There is no batch normalization, because the gradient penalty treats each sample on
its own.
"""
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from synthetic_video import interpolation_matrix, synthetic_video

CHANNELS = 3
IMAGE_SIZES = (32, 64, 128, 256)  # the same as in config.py, which notebooks need not import; a test compares them
OUTPUT_LAYERS = ("cnn", "static", "none")  # as above
SMALLEST_MAP = 4  # height and width of the last encoder map and the first decoder map
WIDEST = 8  # no layer has more than this many times base_channels
INITIAL_ALPHA = 3.0  # tanh(3) = 0.995, so the first images can already be nearly white
CNN_FILTERS = 2
CNN_MAP = 16  # height and width of the map that the CNN's Linear layer takes
LOGVAR_RANGE = (-10.0, 6.0)  # standard deviations from 0.007 (almost no noise) to 20 (almost only noise)


class Decoded(NamedTuple):
    """What VAE.decode_parts returns; `video` and `alpha` are None where the output layer has none."""

    before: torch.Tensor  # (N, C, H, W) in (0, 1), the decoder's output
    video: torch.Tensor | None  # (N, T, C, H, W), the CNN's input; None in training on a CPU too, see fast_paths.py
    alpha: torch.Tensor | None  # (N, 1, H, W), positive
    images: torch.Tensor  # (N, C, H, W) in [0, 1], the output


class AlphaMap(nn.Module):
    """Turns a coarse grid of unbounded numbers into a positive alpha for every pixel.

    Computes softplus(grid + offset) and enlarges it by linear interpolation. A grid of zeros gives INITIAL_ALPHA.

    Shape: (N, G, G) to (N, 1, H, W).
    """

    def __init__(self, *, image_size, alpha_grid):
        super().__init__()
        _check_image_size(image_size)
        if not 1 <= alpha_grid <= image_size:
            raise ValueError(f"alpha_grid must be from 1 to image_size ({image_size}), got {alpha_grid}")
        self.offset = math.log(math.expm1(INITIAL_ALPHA))
        cells = (torch.arange(image_size) + 0.5) * alpha_grid / image_size - 0.5  # pixel centres, counted in cells
        self.register_buffer("enlarge", interpolation_matrix(cells, alpha_grid), persistent=False)

    def extra_repr(self):
        size, grid = self.enlarge.shape
        return f"(N, {grid}, {grid}) -> (N, 1, {size}, {size})"

    def forward(self, grid):
        with torch.autocast(grid.device.type, enabled=False):
            alpha = F.softplus(_at_least_float32(grid) + self.offset)
            enlarge = self.enlarge.to(alpha.dtype)
            return (enlarge @ alpha @ enlarge.T).unsqueeze(1)


class CNN(nn.Module):
    """Predicts a matrix of alpha from a synthetic video: Conv2d with 2 filters, ReLU, MaxPool2d to 16 x 16, Linear.

    Args:
        image_size: H = W, one of 32, 64, 128, 256.
        num_frames: T; the convolution sees T * C channels, 48 by default.
        alpha_grid: G; the Linear layer predicts G x G values, which are enlarged to H x W. G = H: one for every pixel.

    Shape: (N, T * C, H, W) or (N, T, C, H, W) to (N, 1, H, W), positive.
    """

    def __init__(self, *, image_size=128, num_frames=16, alpha_grid=16):
        super().__init__()
        _check_image_size(image_size)
        self.input_shape = (num_frames * CHANNELS, image_size, image_size)
        self.alpha_grid = alpha_grid
        self.conv = nn.Conv2d(num_frames * CHANNELS, CNN_FILTERS, 3, padding=1)
        self.pool = nn.MaxPool2d(image_size // CNN_MAP)
        self.linear = nn.Linear(CNN_FILTERS * CNN_MAP**2, alpha_grid**2)
        self.alpha_map = AlphaMap(image_size=image_size, alpha_grid=alpha_grid)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        # Two independent random filters can both be dead (ReLU 0 everywhere). Of w and -w, one is positive.
        with torch.no_grad():
            self.conv.weight[1] = -self.conv.weight[0]
        # Near zero, so that alpha starts at INITIAL_ALPHA. Not exactly zero: the convolution would get no gradient.
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def extra_repr(self):
        size = self.input_shape[-1]
        return f"{_shape(self.input_shape)} -> (N, 1, {size}, {size})"

    def forward(self, video):
        features = video.flatten(1, 2) if video.dim() == 5 else video
        _check_shape("video", features, self.input_shape)
        return self.predict(self.conv(features))

    def predict(self, maps):
        """Returns alpha (N, 1, H, W) for what the convolution has made of a video, (N, filters, H, W)."""
        # Outputs are divided by the square root of their fan-in. Adam moves all weights by the same amount and the channels
        # of the video are nearly equal, so without this one step would change alpha a lot.
        features = self.pool(maps).relu().flatten(1)  # pooling before ReLU: same result, less work
        features = features / math.sqrt(9 * self.conv.in_channels)
        grid = self.linear(features) / math.sqrt(self.linear.in_features)
        return self.alpha_map(grid.unflatten(1, (self.alpha_grid, self.alpha_grid)))


class CNNParamTanh(nn.Module):
    """Returns tanh(alpha * images), with alpha predicted by a CNN from a synthetic video of the images.

    It goes after any decoder whose output is in [0, 1]: nn.Sequential(decoder, CNNParamTanh(image_size=64)).

    Shape: images (N, C, H, W), optionally video (N, T, C, H, W), to (N, C, H, W) in [0, 1].
    """

    def __init__(self, *, image_size=128, num_frames=16, alpha_grid=16):
        super().__init__()
        self.num_frames = num_frames
        self.cnn = CNN(image_size=image_size, num_frames=num_frames, alpha_grid=alpha_grid)

    def extra_repr(self):
        shape = _shape((CHANNELS, *self.cnn.input_shape[1:]))
        return f"{shape} -> {shape}, num_frames={self.num_frames}"

    def parts(self, images):
        """Returns (video, alpha, images after the layer)."""
        # Cast once before the T frames are made, not T times after: the convolution rounds to this type anyway.
        device, dtype = images.device.type, self.cnn.conv.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        video = synthetic_video(images.to(dtype), self.num_frames)
        alpha = self.cnn(video)
        return video, alpha, torch.tanh(alpha * images)

    def forward(self, images, video=None):
        return self.parts(images)[-1] if video is None else torch.tanh(self.cnn(video) * images)


class StaticParamTanh(nn.Module):
    """Returns tanh(alpha * images), with one learned G x G grid of alpha for all images: the baseline for CNNParamTanh.

    Shape: (N, C, H, W) to (N, C, H, W) in [0, 1].
    """

    def __init__(self, *, image_size=128, alpha_grid=16):
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(1, alpha_grid, alpha_grid))
        self.alpha_map = AlphaMap(image_size=image_size, alpha_grid=alpha_grid)

    def parts(self, images):
        """Returns (None, alpha, images after the layer)."""
        alpha = self.alpha_map(self.grid).expand(len(images), -1, -1, -1)
        return None, alpha, torch.tanh(alpha * images)

    def forward(self, images):
        return self.parts(images)[-1]


class VAE(nn.Module):
    """The generator: a variational autoencoder whose decoder ends in a CNNParamTanh layer.

    Args:
        image_size: H = W, one of 32, 64, 128, 256.
        latent_dim: Z.
        base_channels: width of the largest maps; widths double with every halving of the map, up to 8 times this.
        num_frames: T, the length of the synthetic video.
        output_layer: "cnn" (CNNParamTanh), "static" (StaticParamTanh) or "none".
        alpha_grid: G.

    Shape: forward takes images (N, C, H, W) in [0, 1] and returns (reconstruction (N, C, H, W), mu (N, Z), logvar (N, Z)).
    """

    def __init__(self, *, image_size=128, latent_dim=128, base_channels=32, num_frames=16, output_layer="cnn",
                 alpha_grid=16):
        super().__init__()
        if output_layer not in OUTPUT_LAYERS:
            raise ValueError(f"output_layer must be one of {', '.join(OUTPUT_LAYERS)}, got {output_layer!r}")
        widths = _widths(image_size, base_channels)
        self.image_shape = (CHANNELS, image_size, image_size)
        self.latent_dim = latent_dim
        self.encoder = _downsampling_blocks(widths)
        features = widths[-1] * SMALLEST_MAP**2
        self.mu = nn.Linear(features, latent_dim)
        self.logvar = nn.Linear(features, latent_dim)
        layers = [nn.Linear(latent_dim, features), nn.ReLU(), nn.Unflatten(1, (widths[-1], SMALLEST_MAP, SMALLEST_MAP))]
        for wide, narrow in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True):
            layers += [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.ConvTranspose2d(widths[0], CHANNELS, 4, stride=2, padding=1))
        if output_layer == "cnn":
            self.output_layer = CNNParamTanh(image_size=image_size, num_frames=num_frames, alpha_grid=alpha_grid)
        elif output_layer == "static":
            self.output_layer = StaticParamTanh(image_size=image_size, alpha_grid=alpha_grid)
        else:
            self.output_layer = None
        self.reset_parameters()

    def reset_parameters(self):
        _initialise(self.encoder)
        _initialise(self.decoder)
        # The first images are mid grey with every output layer, so that layers are compared from the same start.
        grey = 0.5 if self.output_layer is None else math.atanh(0.5) / INITIAL_ALPHA
        nn.init.constant_(self.decoder[-1].bias, math.log(grey / (1 - grey)))

    def extra_repr(self):
        return f"images {_shape(self.image_shape)}, z (N, {self.latent_dim})"

    def encode(self, images):
        """Returns (mu, logvar), each (N, Z), for images (N, C, H, W) in [0, 1]."""
        _check_shape("images", images, self.image_shape)
        features = self.encoder(2 * images - 1).flatten(1)
        mu, logvar = _at_least_float32(self.mu(features)), _at_least_float32(self.logvar(features))
        return mu, logvar.clamp(*LOGVAR_RANGE)

    def reparameterize(self, mu, logvar, *, noise=None, generator=None):
        """Returns z (N, Z) ~ N(mu, exp(logvar)), in evaluation mode too; use mu itself for the mean.

        `noise` (N, Z), standard normal, is drawn from `generator` where it is not given.
        """
        if noise is None:
            noise = _randn(mu.shape, like=mu, generator=generator)
        return mu + torch.exp(0.5 * logvar) * noise

    def decode_parts(self, z):
        """Returns Decoded (the image before the output layer, the synthetic video, alpha, the image) for z (N, Z)."""
        _check_shape("z", z, (self.latent_dim,))
        # In half precision the sigmoid would have fewer levels near white than an 8-bit picture.
        before = torch.sigmoid(_at_least_float32(self.decoder(z.to(self.mu.weight.dtype))))
        if self.output_layer is None:
            return Decoded(before, None, None, before)
        return Decoded(before, *self.output_layer.parts(before))

    def decode(self, z):
        """Returns images (N, C, H, W) in [0, 1] for z (N, Z)."""
        return self.decode_parts(z).images

    def forward(self, images):
        mu, logvar = self.encode(images)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    @torch.no_grad()
    def sample(self, num, *, generator=None):
        """Returns `num` images (num, C, H, W) in [0, 1], decoded from noise z ~ N(0, I), without gradients.

        The noise is drawn on the device of `generator`, so that a CPU generator gives the same pictures everywhere.
        """
        return self.decode(_randn((num, self.latent_dim), like=self.mu.weight, generator=generator))


class Discriminator(nn.Module):
    """The critic of the WGAN-GP: the same blocks as the encoder of the VAE, then a Linear layer to one unbounded score.

    Only differences between scores are used, so the Linear layer needs no bias.

    Args:
        image_size: H = W, one of 32, 64, 128, 256.
        base_channels: as in VAE.

    Shape: images (N, C, H, W) in [0, 1] to scores (N,), higher for what looks real.
    """

    def __init__(self, *, image_size=128, base_channels=32):
        super().__init__()
        widths = _widths(image_size, base_channels)
        self.image_shape = (CHANNELS, image_size, image_size)
        self.blocks = _downsampling_blocks(widths)
        self.score = nn.Linear(widths[-1] * SMALLEST_MAP**2, 1, bias=False)
        _initialise(self.blocks)

    def extra_repr(self):
        return f"{_shape(self.image_shape)} -> (N,)"

    def forward(self, images):
        _check_shape("images", images, self.image_shape)
        return _at_least_float32(self.score(self.blocks(2 * images - 1).flatten(1)).squeeze(1))

    def probability(self, images):
        """Returns the sigmoid of the score, (N,) in [0, 1]. It ranks images; it is not a calibrated probability."""
        return torch.sigmoid(self(images))


def _widths(image_size, base_channels):
    """Channels of the maps, from the largest map to the smallest; each is half as high and wide as the one before."""
    _check_image_size(image_size)
    if base_channels < 1:
        raise ValueError(f"base_channels must be at least 1, got {base_channels}")
    num_blocks = (image_size // SMALLEST_MAP).bit_length() - 1
    return [base_channels * min(2**i, WIDEST) for i in range(num_blocks)]


def _downsampling_blocks(widths):
    """Conv2d, MaxPool2d, ReLU for every width. Pooling and ReLU commute; after pooling ReLU has a quarter of the work."""
    layers = []
    for narrow, wide in zip([CHANNELS, *widths], widths, strict=False):
        layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*layers)


def _initialise(layers):
    """Initialises as He et al. 2015 (arXiv:1502.01852), so that activations and gradients keep their scale without norms.

    The usual factor of 2 is left out before max pooling, which already raises the activations. A transposed convolution
    starts as linear interpolation followed by a random mixture of channels: with 16 independent random taps the first images
    have a chequerboard pattern, which takes long to unlearn.
    """
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(1 / (layer.in_channels * 9)))
        elif isinstance(layer, nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_channels))
            line = torch.tensor([0.25, 0.75, 0.75, 0.25])
            with torch.no_grad():
                layer.weight.copy_(layer.weight[:, :, :1, :1] * line[:, None] * line)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
        else:
            continue
        nn.init.zeros_(layer.bias)


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _randn(shape, *, like, generator):
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _check_image_size(image_size):
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be one of {', '.join(map(str, IMAGE_SIZES))}, got {image_size}")


def _check_shape(name, tensor, shape):
    if tensor.dim() != len(shape) + 1 or tuple(tensor.shape[1:]) != tuple(shape):
        raise ValueError(f"expected {name} of shape {_shape(shape)}, got {tuple(tensor.shape)}")


def _shape(shape):
    """Returns the shape as text, with the batch before it: (N, 3, 64, 64)."""
    return f"(N, {', '.join(map(str, shape))})"
