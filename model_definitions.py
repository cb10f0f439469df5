"""The networks: the VAE (generator), the Discriminator (critic), the CNN that predicts alpha, and the CNNParamTanh layer.

Notation, here and in every other file:
    N batch, T frames, C channels, H height and W width in pixels, Z latent size, G side of the grid of alpha.
C is 1 (grey), 3 (RGB) or 4 (RGBA: colours not multiplied by alpha). Images are float (N, C, H, W) in [0, 1]; videos are
float (N, T, C, H, W) in [0, 1].

An image_size is (H, W), or the side of a square. The shorter side of VAE and Discriminator is 32, 64, 128, 256 or 512
pixels; the longer one is a multiple of a quarter of it, up to four times as long. CNN and output layers compute at the size
of their input, any from 16 pixels a side on.

With grow_from, VAE and Discriminator can work at smaller sizes too, from that one on, each twice the one before. Whatever
the size, the maps of 4 px and those around them are the same. Encoder and critic take an image at the block for its size,
and the blocks after that see it too, averaged to their size. The decoder's image is the sum of what it draws at every size,
the smaller ones enlarged. What a larger size adds starts at zero, so that training can go on from one size to the next. The
CNN's video always has the smallest size, and alpha is enlarged: a video of 64 px or more would cost more than the decoder.

With num_classes K, the decoder adds a learned vector of its class to z, and the critic adds to the score the product of a
learned vector with the means of the last maps (a projection, as Miyato and Koyama 2018, arXiv:1802.05637, without the norm).
These vectors are CLASS_SCALE times weights that start at zero, where the networks are those without classes. The encoder
does not see the class. Labels y are int64 (N,), from 0 to K - 1.

This file is plain PyTorch and can be changed freely: faster forms of these computations are in fast_paths.py and are used
only where they give the same numbers. There is no batch normalization, because the gradient penalty treats each sample on
its own.
"""
import functools
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from image_sizes import CHANNELS, SHORTER_SIDES, SMALLEST_MAP, as_pair, height_and_width
from synthetic_video import interpolation_matrix, synthetic_video

OUTPUT_LAYERS = ("cnn", "static", "none")  # the same as in config.py, which notebooks need not import; a test compares them
LAYERS_PER_HALVING = 3  # of the encoder and the critic: Conv2d, MaxPool2d, ReLU
WIDEST = 8  # no layer has more than this many times base_channels
INITIAL_ALPHA = 3.0  # tanh(3) = 0.995, so the first images can already be nearly white
CNN_FILTERS = 2
CNN_MAP = 16  # height and width of the map that the CNN's Linear layer takes
LARGEST_VIDEO = 2**28  # T * W * W: numbers in the matrices that make a video, 1 GiB
CLASS_SCALE = 4.0  # of the vectors of classes: Adam moves all weights alike, and these need to go further
ROUNDING = 1e-3  # by which images may leave [0, 1]
LOGVAR_RANGE = (-10.0, 6.0)  # standard deviations from 0.007 (almost no noise) to 20 (almost only noise)


class Decoded(NamedTuple):
    """What VAE.decode_parts returns; `video` and `alpha` are None where the output layer has none."""

    before: torch.Tensor  # (N, C, H, W) in (0, 1), the decoder's output
    video: torch.Tensor | None  # (N, T, C, h, w), the CNN's input; None in training on a CPU too, see fast_paths.py
    alpha: torch.Tensor | None  # (N, 1, H, W), positive
    images: torch.Tensor  # (N, C, H, W) in [0, 1], the output


def alpha_map(grid, height, width):
    """Returns a positive alpha for every pixel (N, 1, H, W) from a grid of unbounded numbers (N, G, G).

    Computes softplus(grid + offset) and enlarges it by linear interpolation; along a side of fewer than G pixels, each pixel
    gets the mean of what lies in it. A grid of zeros gives INITIAL_ALPHA.
    """
    with torch.autocast(grid.device.type, enabled=False):
        alpha = F.softplus(_at_least_float32(grid) + math.log(math.expm1(INITIAL_ALPHA)))
        return resized(alpha, height, width).unsqueeze(1)


def resized(images, height, width):
    """Returns images (..., H, W) of another size: enlarged by linear interpolation, reduced by averaging, each side so."""
    if images.shape[-2:] == (height, width):
        return images
    with torch.autocast(images.device.type, enabled=False):
        rows, columns = (_resizing_matrix(size, cells, like=images)
                         for size, cells in zip((height, width), images.shape[-2:], strict=True))
        return rows @ images @ columns.T


def _resizing_matrix(size, cells, *, like):
    """The matrix (size, cells) that resized multiplies a line with."""
    pixels = torch.arange(size, device=like.device, dtype=like.dtype)
    if cells <= size:
        return interpolation_matrix((pixels + 0.5) * cells / size - 0.5, cells)  # pixel centres, counted in cells
    starts = pixels[:, None] * cells / size
    cell = torch.arange(cells, device=like.device, dtype=like.dtype)
    overlap = torch.minimum(starts + cells / size, cell + 1) - torch.maximum(starts, cell)
    return overlap.clamp(min=0) * size / cells


class CNN(nn.Module):
    """Predicts a matrix of alpha from a synthetic video: Conv2d with 2 filters, ReLU, MaxPool2d to 16 x 16, Linear.

    Where 16 does not divide H and W, the pooling is adaptive, and its gradient not deterministic on CUDA.

    Args:
        image_size: H and W that it is made for. It takes others from 16 on, too.
        channels: C.
        num_frames: T; the convolution sees T * C channels, 48 by default.
        alpha_grid: G; the Linear layer predicts G x G values, which alpha_map turns into H x W.

    Shape: (N, T * C, H, W) or (N, T, C, H, W) to (N, 1, H, W), positive.

    Raises:
        ValueError: a video of another shape.
    """

    def __init__(self, *, image_size=128, channels=3, num_frames=16, alpha_grid=16):
        super().__init__()
        self.video_shape = (num_frames, *_layer_shape(image_size, channels, alpha_grid))
        if not 1 <= num_frames <= LARGEST_VIDEO // max(self.video_shape[2:]) ** 2:
            raise ValueError(f"num_frames must be from 1 to {LARGEST_VIDEO} / (longer side)^2, got {num_frames}")
        self.alpha_grid = alpha_grid
        self.conv = nn.Conv2d(num_frames * channels, CNN_FILTERS, 3, padding=1)
        self.linear = nn.Linear(CNN_FILTERS * CNN_MAP**2, alpha_grid**2)
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
        num_frames, channels, height, width = self.video_shape
        return f"{_shape((num_frames * channels, height, width))} -> {_shape((1, height, width))}"

    def forward(self, video):
        features = video.flatten(1, 2) if video.dim() == 5 else video
        num_frames, channels = self.video_shape[:2]
        wanted = features.dim() == 4 and features.shape[1] == num_frames * channels and (
            video.dim() == 4 or video.shape[1] == num_frames)
        if not torch.jit.is_tracing() and (not wanted or min(features.shape[2:]) < CNN_MAP):
            raise ValueError(f"expected a video (N, {num_frames}, {channels}, H, W) or (N, {num_frames * channels}, H, W) "
                             f"with H and W at least {CNN_MAP}, got {tuple(video.shape)}")
        return self.predict(self.conv(features))

    def pool(self, maps):
        """Returns maps (N, F, H, W) reduced to (N, F, 16, 16), each value the largest of its part of the map."""
        height, width = maps.shape[-2:]
        if height % CNN_MAP or width % CNN_MAP:
            return F.adaptive_max_pool2d(maps, CNN_MAP)
        return F.max_pool2d(maps, (height // CNN_MAP, width // CNN_MAP))

    def predict(self, maps):
        """Returns alpha (N, 1, H, W) for what the convolution has made of a video, (N, filters, H, W)."""
        # Outputs are divided by the square root of their fan-in. Adam moves all weights by the same amount and the channels
        # of the video are nearly equal, so without this one step would change alpha a lot.
        features = self.pool(maps).relu().flatten(1)  # pooling before ReLU: same result, less work
        features = features / math.sqrt(9 * self.conv.in_channels)
        grid = self.linear(features) / math.sqrt(self.linear.in_features)
        return alpha_map(grid.unflatten(1, (self.alpha_grid, self.alpha_grid)), *maps.shape[-2:])


class CNNParamTanh(nn.Module):
    """Returns tanh(alpha * images), with alpha predicted by a CNN from a synthetic video of the images.

    It goes after any decoder whose output is in [0, 1]: nn.Sequential(decoder, CNNParamTanh()).

    Args:
        image_size, channels, num_frames, alpha_grid: as in CNN.
        video_size: H and W of the video; larger images are averaged to it. By default it is the size of the images.

    Shape: images (N, C, H, W), optionally video (N, T, C, h, w), to (N, C, H, W) in [0, 1].

    Raises:
        ValueError: images of another shape or type, or, on a CPU, outside [0, 1].
    """

    def __init__(self, *, image_size=128, channels=3, num_frames=16, alpha_grid=16, video_size=None):
        super().__init__()
        self.num_frames, self.video_size = num_frames, as_pair(video_size) if video_size else None
        self.image_shape = _layer_shape(image_size, channels, alpha_grid)
        self.cnn = CNN(image_size=video_size or image_size, channels=channels, num_frames=num_frames, alpha_grid=alpha_grid)

    def extra_repr(self):
        shape = _shape(self.image_shape)
        return f"{shape} -> {shape}, num_frames={self.num_frames}"

    def averaged(self, images):
        """Returns the images (N, C, h, w) that the video is made of."""
        return resized(images, *map(min, self.video_size, images.shape[-2:])) if self.video_size else images

    def parts(self, images):
        """Returns (video, alpha, images after the layer)."""
        # Cast once before the T frames are made, not T times after: the convolution rounds to this type anyway.
        device, dtype = images.device.type, self.cnn.conv.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        video = synthetic_video(self.averaged(images).to(dtype), self.num_frames)
        alpha = resized(self.cnn(video), *images.shape[-2:])
        return video, alpha, torch.tanh(alpha * images)

    def forward(self, images, video=None):
        _check_images(images, self.image_shape[0])
        _check_range(images)
        if video is None:
            return self.parts(images)[-1]
        return torch.tanh(resized(self.cnn(video), *images.shape[-2:]) * images)


class StaticParamTanh(nn.Module):
    """Returns tanh(alpha * images), with one learned G x G grid of alpha for all images: the baseline for CNNParamTanh.

    Args:
        image_size, channels, alpha_grid: as in CNN.

    Shape: (N, C, H, W) to (N, C, H, W) in [0, 1].

    Raises:
        ValueError: as CNNParamTanh.
    """

    def __init__(self, *, image_size=128, channels=3, alpha_grid=16):
        super().__init__()
        self.image_shape = _layer_shape(image_size, channels, alpha_grid)
        self.grid = nn.Parameter(torch.zeros(1, alpha_grid, alpha_grid))

    def extra_repr(self):
        shape = _shape(self.image_shape)
        return f"{shape} -> {shape}"

    def parts(self, images):
        """Returns (None, alpha, images after the layer)."""
        alpha = alpha_map(self.grid, *images.shape[-2:]).expand(images.shape[0], -1, -1, -1)
        return None, alpha, torch.tanh(alpha * images)

    def forward(self, images):
        _check_images(images, self.image_shape[0])
        _check_range(images)
        return self.parts(images)[-1]


class EvenConvTranspose2d(nn.ConvTranspose2d):
    """Maps (N, F, H, W) to (N, C, 2H, 2W), with 4 x 4 weights and stride 2, and even maps to even ones.

    Every pixel gets 4 of the 16 weights: which, depends on whether its row and its column are odd. Where these four sums
    differ, a chequerboard lies over the image, and training leaves one. So before use they are all set to their mean.
    """

    def __init__(self, wide, narrow):
        super().__init__(wide, narrow, 4, stride=2, padding=1)

    def forward(self, features):
        taps = self.weight.unflatten(3, (2, 2)).unflatten(2, (2, 2))  # (F, C, 2, odd row, 2, odd column)
        means = taps.mean(dim=(2, 4), keepdim=True)
        weights = (taps - means + means.mean(dim=(3, 5), keepdim=True)).flatten(4).flatten(2, 3)
        return F.conv_transpose2d(features, weights, self.bias, stride=2, padding=1)


class SmoothEnlargement(nn.ConvTranspose2d):
    """Maps (N, F, H, W) to images (N, C, 2H, 2W): each pixel doubled, and then a 3 x 3 convolution, as one operation.

    Each of 9 weights is four of the 16 of a ConvTranspose2d of 4 x 4, so that the sums of EvenConvTranspose2d are equal.
    """

    def __init__(self, width, channels):
        super().__init__(width, channels, 3, stride=2, padding=1)

    def forward(self, features):
        weights = 4 * F.avg_pool2d(F.pad(self.weight, (1, 1, 1, 1)), 2, stride=1)
        return F.conv_transpose2d(features, weights, self.bias, stride=2, padding=1)


class VAE(nn.Module):
    """The generator: a variational autoencoder whose decoder ends in a CNNParamTanh layer.

    Args:
        image_size: a number or (H, W), see above.
        channels: C.
        latent_dim: Z.
        base_channels: width of the largest maps; widths double with every halving of the map, up to 8 times this.
        base_size: shorter side of the images whose largest maps are meant, by default that of image_size. Larger images than
            these have further maps of half the width for every doubling, smaller ones are without the largest maps.
        num_frames: T, the length of the synthetic video.
        output_layer: "cnn" (CNNParamTanh), "static" (StaticParamTanh) or "none".
        alpha_grid: G.
        grow_from: shorter side of the smallest size that it can work at; by default that of image_size.
        num_classes: K, 0 for none.
        even_taps: whether the decoder's layers are EvenConvTranspose2d, not ConvTranspose2d, as in older checkpoints.

    Attributes:
        image_sizes: (H, W) of each size that it can work at, the largest first.
        image_shape: (C, H, W) of the images that it draws now: at first the largest; draw_at changes it.
        detail: from 0 to 1, by which the finest octave of the decoder's image is multiplied before the sigmoid. At first 1,
            which training needs; see image_metrics.detail_worth_drawing.
        classes: an Embedding with the vector (Z,) of each class; None without classes.

    Shape: forward takes images (N, C, H, W) in [0, 1] and returns (reconstruction (N, C, H, W), mu (N, Z), logvar (N, Z)).

    Raises:
        ValueError: what cannot be, and what can; from encode, images of another shape or type, or, on a CPU, outside [0, 1].
    """

    def __init__(self, *, image_size=128, channels=3, latent_dim=128, base_channels=32, num_frames=16, output_layer="cnn",
                 alpha_grid=16, base_size=None, grow_from=None, num_classes=0, even_taps=True):
        super().__init__()
        if output_layer not in OUTPUT_LAYERS:
            raise ValueError(f"output_layer must be one of {', '.join(OUTPUT_LAYERS)}, got {output_layer!r}")
        self.image_sizes, widths, smallest = _network_shapes(image_size, channels, base_channels, base_size, grow_from)
        self.image_shape = channels, *self.image_sizes[0]
        self.detail = 1.0
        self.latent_dim = latent_dim
        self.encoder = _downsampling_blocks(channels, widths)
        self.inputs = nn.ModuleList(_from_image(channels, width) for width in widths[1:len(self.image_sizes)])
        features = math.prod(smallest)
        self.mu = nn.Linear(features, latent_dim)
        self.logvar = nn.Linear(features, latent_dim)
        layers = [nn.Linear(latent_dim, features), nn.ReLU(), nn.Unflatten(1, smallest)]
        doubling = EvenConvTranspose2d if even_taps else functools.partial(
            nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        for wide, narrow in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True):
            layers += [doubling(wide, narrow), nn.ReLU()]
        *later, first = widths[:len(self.image_sizes)]  # of the maps that an image of each size is drawn from
        outputs = [SmoothEnlargement(width, channels) for width in later]
        outputs.append(doubling(first, channels))
        self.decoder = nn.Sequential(*layers, outputs[0])
        self.outputs = nn.ModuleList(outputs[1:])
        layer = {"image_size": self.image_shape[1:], "channels": channels, "alpha_grid": alpha_grid}
        if output_layer == "cnn":
            self.output_layer = CNNParamTanh(num_frames=num_frames, video_size=self.image_sizes[-1], **layer)
        elif output_layer == "static":
            self.output_layer = StaticParamTanh(**layer)
        else:
            self.output_layer = None
        self.reset_parameters()
        self.classes = _class_vectors(num_classes, latent_dim)  # last, so that an optimizer's numbers of the others stay

    def reset_parameters(self):
        _initialise_downsampling(self.encoder, self.inputs)
        *later, first = self.decoder[-1], *self.outputs  # by the size that they draw
        _initialise([*self.decoder[:-1], first])
        # The first images are mid grey with every output layer, so that layers are compared from the same start.
        grey = 0.5 if self.output_layer is None else math.atanh(0.5) / INITIAL_ALPHA
        nn.init.constant_(first.bias, math.log(grey / (1 - grey)))
        for layer in later:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def extra_repr(self):
        return f"images {_shape(self.image_shape)}, z (N, {self.latent_dim})"

    def draw_at(self, shorter_side):
        """Sets the size of the images that it draws, by their shorter side: one of image_sizes."""
        self.image_shape = self.image_shape[0], *self.image_sizes[_level(self.image_sizes, shorter_side, "shorter_side")]

    def encode(self, images):
        """Returns (mu, logvar), each (N, Z), for images (N, C, H, W) in [0, 1], of any of image_sizes."""
        _check_images(images, self.image_shape[0], self.image_sizes)
        _check_range(images)
        features = downsample(self.encoder, self.inputs, 2 * images - 1, self.image_sizes).flatten(1)
        mu, logvar = _at_least_float32(self.mu(features)), _at_least_float32(self.logvar(features))
        return mu, logvar.clamp(*LOGVAR_RANGE)

    def reparameterize(self, mu, logvar, *, noise=None, generator=None):
        """Returns z (N, Z) ~ N(mu, exp(logvar)), in evaluation mode too; use mu itself for the mean.

        `noise` (N, Z), standard normal, is drawn from `generator` where it is not given.
        """
        if noise is None:
            noise = _randn(mu.shape, like=mu, generator=generator)
        return mu + torch.exp(0.5 * logvar) * noise

    def class_latents(self, y):
        """Returns the vectors (N, Z) of classes y (N,), float32, that decode adds to z."""
        return _at_least_float32(_vectors_of(self.classes, y))

    def decode_parts(self, z, y=None):
        """Returns Decoded (the image before the output layer, the synthetic video, alpha, the image) for z (N, Z), and y."""
        if y is not None:
            z = z + self.class_latents(y)
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"expected z of shape {_shape((self.latent_dim,))}, got {tuple(z.shape)}")
        logits = self._logits(z.to(self.decoder[-1].weight.dtype))
        if self.detail != 1:
            logits = logits - (1 - self.detail) * finest_octave(logits)
        # In half precision the sigmoid would have fewer levels near white than an 8-bit picture.
        before = torch.sigmoid(logits)
        if self.output_layer is None:
            return Decoded(before, None, None, before)
        return Decoded(before, *self.output_layer.parts(before))

    def _logits(self, z):
        """Returns the decoder's image (N, C, H, W) before the sigmoid, at the size of image_shape."""
        if not self.outputs:
            return _at_least_float32(self.decoder(z))
        draw = dict(zip(self.image_sizes, [self.decoder[-1], *self.outputs], strict=True))
        features, logits = z, None
        for layer in self.decoder:
            if isinstance(layer, nn.ConvTranspose2d):  # which doubles the size
                sides = 2 * features.shape[-2], 2 * features.shape[-1]
                if sides in draw:
                    drawn = _at_least_float32(draw[sides](features))
                    logits = drawn if logits is None else resized(logits, *sides) + drawn
                if sides == self.image_shape[1:]:
                    break
            features = layer(features)
        return logits

    def decode(self, z, y=None):
        """Returns images (N, C, H, W) in [0, 1] for z (N, Z) and, where it has classes, labels y (N,).

        Without y, z is taken as it is: encodings of images are such z, noise is one to which a class is to be added.
        """
        return self.decode_parts(z, y).images

    def forward(self, images):
        mu, logvar = self.encode(images)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    @torch.no_grad()
    def sample(self, num, *, generator=None):
        """Returns `num` images (num, C, H, W) in [0, 1], decoded from noise z ~ N(0, I), without gradients.

        The noise is drawn on the device of `generator`, so that a CPU generator gives the same pictures everywhere.
        """
        return self.decode(_randn((num, self.latent_dim), like=self.decoder[-1].weight, generator=generator))


class Discriminator(nn.Module):
    """The critic of the WGAN-GP: the same blocks as the encoder of the VAE, then a Linear layer to one unbounded score.

    Only differences between scores are used, so the Linear layer needs no bias.

    Args:
        image_size, channels, base_channels, base_size, grow_from, num_classes: as in VAE.

    Attributes:
        image_sizes: as in VAE.
        image_shape: (C, H, W) of the largest images.
        classes: an Embedding with a vector for each class; None without classes.

    Shape: images (N, C, H, W) in [0, 1], of any of image_sizes, and with classes labels y (N,), to scores (N,), higher for
    what looks real.

    Raises:
        ValueError: as VAE; augmented images may leave [0, 1].
    """

    def __init__(self, *, image_size=128, channels=3, base_channels=32, base_size=None, grow_from=None, num_classes=0):
        super().__init__()
        self.image_sizes, widths, smallest = _network_shapes(image_size, channels, base_channels, base_size, grow_from)
        self.image_shape = channels, *self.image_sizes[0]
        self.blocks = _downsampling_blocks(channels, widths)
        self.inputs = nn.ModuleList(_from_image(channels, width) for width in widths[1:len(self.image_sizes)])
        self.score = nn.Linear(math.prod(smallest), 1, bias=False)
        _initialise_downsampling(self.blocks, self.inputs)
        self.classes = _class_vectors(num_classes, smallest[0])

    def extra_repr(self):
        return f"{_shape(self.image_shape)} -> (N,)"

    def forward(self, images, y=None):
        _check_images(images, self.image_shape[0], self.image_sizes)
        features = downsample(self.blocks, self.inputs, 2 * images - 1, self.image_sizes)
        scores = _at_least_float32(self.score(features.flatten(1)).squeeze(1))
        if y is not None:
            scores = scores + (_vectors_of(self.classes, y) * features.mean(dim=(2, 3))).sum(dim=1)
        return self.scale(images) * scores

    def scale(self, images):
        """Returns by what scores of images of this size are multiplied: their size as a multiple of the smallest one.

        An enlarged image has half the slope with respect to its pixels that the image itself has, and the gradient penalty
        wants 1 at every size.
        """
        return images.shape[-1] // self.image_sizes[-1][-1]

    def probability(self, images):
        """Returns the sigmoid of the score, (N,) in [0, 1]. It ranks images; it is not a calibrated probability."""
        return torch.sigmoid(self(images))


def downsample(blocks, inputs, images, image_sizes):
    """Returns the smallest maps that the blocks make of images (N, C, H, W) in [-1, 1] of one of image_sizes.

    Args:
        blocks: layers with one Conv2d for each halving; the first takes images of the largest size.
        inputs: a Conv2d for images of each smaller size, whose output is added to that of the block's own one.
    """
    if not inputs:
        return blocks(images)
    level = image_sizes.index(tuple(images.shape[-2:]))
    first = [index for index, layer in enumerate(blocks) if isinstance(layer, nn.Conv2d)][level]
    features = (inputs[level - 1] if level else blocks[first])(images)
    for layer in blocks[first + 1:]:
        features = layer(features)
        if isinstance(layer, nn.Conv2d) and level < len(inputs):
            images = halved(images)
            features.add_(inputs[level](images))
            level += 1
    return features


def _class_vectors(num_classes, width):
    """Returns an Embedding of zeros, which draws no random numbers, or None."""
    return nn.Embedding.from_pretrained(torch.zeros(num_classes, width), freeze=False) if num_classes else None


def _vectors_of(classes, y):
    """Returns the vectors of labels y (N,). Raises ValueError where there are no classes, or labels on a CPU are none."""
    if classes is None:
        raise ValueError("labels are given, and the network has no classes: --class-conditional trains one that has")
    if y.is_cpu and not torch.compiler.is_compiling() and len(y) and not 0 <= y.min() <= y.max() < classes.num_embeddings:
        raise ValueError(f"expected labels from 0 to {classes.num_embeddings - 1}, got {y.tolist()}")
    return CLASS_SCALE * classes(y)


def halved(images):
    """Returns images (..., H, W) averaged to half their size: F.avg_pool2d(images, 2), in a quarter of its time on a CPU."""
    rows = images[..., ::2, :] + images[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def finest_octave(images):
    """Returns what images (..., H, W), H and W even, lose where they are averaged to half their size and enlarged again."""
    return images - resized(halved(images), *images.shape[-2:])


def _network_shapes(image_size, channels, base_channels, base_size, grow_from):
    """Returns the sizes of images, the largest first, the widths (see base_channels) and the shape of the smallest maps."""
    try:
        height, width = height_and_width(image_size)
    except ValueError as error:
        raise ValueError(f"image_size {error}") from None
    _check_channels(channels)
    if base_channels < 1:
        raise ValueError(f"base_channels must be at least 1, got {base_channels}")
    scale = min(height, width) // SMALLEST_MAP
    if base_size is not None and base_size not in SHORTER_SIDES:
        raise ValueError(f"base_size must be one of {', '.join(map(str, SHORTER_SIDES))}, got {base_size}")
    largest = (base_size or min(height, width)) // SMALLEST_MAP  # of the maps that have base_channels, in smallest maps
    sides = [scale // 2**i for i in range(scale.bit_length() - 1)]
    widths = [max(1, min(base_channels * largest // side, base_channels * WIDEST)) for side in sides]
    sizes = [(height // 2**i, width // 2**i) for i in range(len(sides)) if min(height, width) // 2**i in SHORTER_SIDES]
    sizes = sizes[:_level(sizes, grow_from, "grow_from") + 1 if grow_from is not None else 1]
    return sizes, widths, (widths[-1], height // scale, width // scale)


def _level(sizes, shorter_side, name):
    """Returns which of the sizes has that shorter side; `name` is what a message calls it."""
    sides = [min(size) for size in sizes]
    if shorter_side not in sides:
        raise ValueError(f"{name} must be one of {', '.join(map(str, sides))}, got {shorter_side}")
    return sides.index(shorter_side)


def _layer_shape(image_size, channels, alpha_grid):
    """Returns (C, H, W)."""
    sides = as_pair(image_size)
    if len(sides) != 2 or not all(hasattr(side, "__index__") and side >= CNN_MAP for side in sides):
        raise ValueError(f"image_size must be at least {CNN_MAP}, or (H, W) of such, got {image_size!r}")
    _check_channels(channels)
    if alpha_grid < 1:
        raise ValueError(f"alpha_grid must be at least 1, got {alpha_grid}")
    return channels, *sides


def _check_channels(channels):
    if channels not in CHANNELS or isinstance(channels, bool | float):
        raise ValueError(f"channels must be one of {', '.join(map(str, CHANNELS))}, got {channels}")


def _downsampling_blocks(channels, widths):
    """Conv2d, MaxPool2d, ReLU for every width. Pooling and ReLU commute; after pooling ReLU has a quarter of the work."""
    layers = []
    for narrow, wide in zip([channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*layers)


def _from_image(channels, width):
    return nn.Conv2d(channels, width, 3, padding=1)


def _initialise_downsampling(blocks, inputs):
    """Where an image is also seen averaged, what comes from its larger sizes starts at zero."""
    _initialise(blocks)
    _initialise(inputs)
    for layer in [layer for layer in blocks if isinstance(layer, nn.Conv2d)][1:len(inputs) + 1]:
        nn.init.zeros_(layer.weight)


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


def _check_images(images, channels, sizes=()):
    """Raises ValueError unless images are float (N, C, H, W) of one of the sizes; of any from 16 pixels on without sizes."""
    if torch.jit.is_tracing():  # which would warn of every comparison
        return
    sides = tuple(images.shape[2:])
    if images.dim() != 4 or images.shape[1] != channels or (sides not in sizes if sizes else min(sides) < CNN_MAP):
        wanted = " or ".join(_shape((channels, *size)) for size in sizes)
        wanted = wanted or f"(N, {channels}, H, W) with H and W at least {CNN_MAP}"
        raise ValueError(f"expected images of shape {wanted}, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"expected float images in [0, 1], got {images.dtype}; (images / 255) makes them of 8-bit ones")


def _check_range(images):
    """Raises ValueError where images on a CPU leave [0, 1]; elsewhere looking would make the CPU wait for the device."""
    if images.is_cpu and images.numel() and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        try:
            low, high = (bound.item() for bound in images.detach().aminmax())
        except RuntimeError:  # inside a transform of torch.func, such as vmap, there are no numbers to look at
            return
        if -math.inf < low < -ROUNDING or 1 + ROUNDING < high < math.inf:  # training reports infinity and NaN, with its step
            raise ValueError(f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}")


def _shape(shape):
    """Returns the shape as text, with the batch before it: (N, 3, 64, 64)."""
    return f"(N, {', '.join(map(str, shape))})"
