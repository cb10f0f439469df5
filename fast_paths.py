"""Faster forms of what the networks and updates compute, each compared once with what it replaces before it is used.

Where results differ, or a faster form fails, training goes on with the plain one after one line of warning. So the networks
and losses can be changed without looking at this file.
"""
import copy
import functools
import gc
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import distributed
from losses import gradient_penalty
from model_definitions import CLASS_SCALE, CNNParamTanh, halved, resized
from randomness import random_generator
from synthetic_video import frame_matrices, synthetic_video

SAME = 1e-6  # largest relative difference between two forms of one computation in float64
SAME_UPDATE = {"float32": 1e-3, "bfloat16": 5e-2}  # the same for metrics and gradients; bfloat16 rounds to 0.4%
SAME_STATE = 0.1  # the same for what updates change, and for a second update, to which errors of the first add up
RATES = 2e-3, 1e-3  # at which updates are compared: large enough that what they change is not lost in rounding
LARGEST_COMPARED = 128  # pixels a side at which layers are compared; the matrices of larger images take long to make
BLOCK_PIXELS = 1024  # of each frame at a time, so that they stay in the cache
GRAPH_WARM_UPS = 3  # runs before a capture, so that libraries have chosen their algorithms and reserved their memory


def use_fast_layers(gan, *, report):
    """Sets gan.input_gradient, and calls use_fast_output_layers, where the faster forms give the same numbers.

    Args:
        gan: a wgan_gp.GAN.
        report: called with a line of text for each faster form that is not used.
    """
    if _is_same(lambda: _compare_penalties(gan.critic), "the penalty by double backward", report):
        gan.input_gradient = functools.partial(written_out_gradient, gan.critic)
    use_fast_output_layers(gan.generator, gan.averaged, report=report)


def use_fast_output_layers(*networks, report):
    """Replaces each CNNParamTanh on a CPU by a faster form, which makes no video, where it gives the same numbers.

    Args:
        networks: modules that differ in nothing but their weights.
        report: as in use_fast_layers.
    """
    layers = [[module for module in network.modules() if isinstance(module, CNNParamTanh)] for network in networks]
    for first, *others in zip(*layers, strict=True):
        if not first.cnn.conv.weight.is_cpu:
            continue
        if _is_same(lambda layer=first: _compare_layers(layer), "the layer that makes a whole video", report):
            for layer in (first, *others):
                layer.parts = functools.partial(parts_without_video, layer)


def _is_same(compare, plain, report):
    """Whether the pairs of tensors (actual, expected) that `compare` returns are equal up to rounding; reports if not."""
    fault = _fault(lambda: ((*pair, SAME) for pair in compare()))
    if fault:
        report(f"warning: {plain} is used, which is slower: {fault}")
    return not fault


def _fault(compare, *, catch=True):
    """What is wrong with what `compare` returns, None where nothing is: tensors (actual, expected, relative tolerance)."""
    try:
        found = [((torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item(), tolerance)
                 for actual, expected, tolerance in compare()]
    except Exception as error:  # no such layer, no compiler, no memory, an operation that cannot be captured
        if not catch:
            raise
        while error.__context__:  # the end of a failed capture raises again; the first error says more
            error = error.__context__
        return " ".join(str(error).split())[:200] or type(error).__name__
    wrong = [difference for difference, tolerance in found if not difference <= tolerance]  # NaN too
    return f"the results of the faster form differ by {max(wrong):.1%}" if wrong else None


def _compare_penalties(critic):
    """Yields the penalty by written_out_gradient and by autograd, and their gradients for the parameters, at each size."""
    critic = _moved_copy(critic)
    critic_of_labels, written_out = critic, functools.partial(written_out_gradient, critic)
    if getattr(critic, "classes", None) is not None:
        labels = torch.arange(2) % critic.classes.num_embeddings
        critic_of_labels, written_out = functools.partial(critic, y=labels), functools.partial(written_out, labels=labels)
    for sides in critic.image_sizes:
        shape = critic.image_shape[0], *sides
        real, fake, mixing = (torch.rand(size, dtype=torch.float64, generator=random_generator("fast paths", name))
                              for name, size in (("real", (2, *shape)), ("fake", (2, *shape)), ("mixing", (2, 1, 1, 1))))
        results = []
        for input_gradient in (written_out, None):
            penalty = gradient_penalty(critic_of_labels, real, fake, mixing=mixing, input_gradient=input_gradient)
            gradients = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True, allow_unused=True)
            results.append((penalty.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        yield from zip(*results, strict=True)


def _compare_layers(layer):
    """Returns alpha and images by parts_without_video and by the layer, and gradients for its input and its parameters."""
    layer = _moved_copy(layer).requires_grad_()
    channels, *sides = layer.image_shape
    shape = 2, channels, *(min(side, LARGEST_COMPARED) for side in sides)
    images = torch.rand(shape, dtype=torch.float64, generator=random_generator("fast paths", "layer")).requires_grad_()
    results = []
    for parts in (functools.partial(parts_without_video, layer), layer.parts):
        _, alpha, after = parts(images)
        gradients = torch.autograd.grad(alpha.square().sum() + after.square().sum(), [images, *layer.parameters()])
        results.append((alpha.detach(), after.detach(), *gradients))
    return zip(*results, strict=True)


def _moved_copy(module):
    """Returns a copy in float64 on the CPU with noise on its weights, so that parts that start at zero count too."""
    module = copy.deepcopy(module).to("cpu").to(torch.float64)  # not at once: mps has no float64, and wrote nothing
    add_noise(module)
    return module


@torch.no_grad()
def add_noise(module):
    """Adds noise to all parameters, the same each time, about as large as weights are at the start."""
    for index, parameter in enumerate(module.parameters()):
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=random_generator("fast paths", index))
        parameter += (noise / max(1, parameter[0].numel() if parameter.dim() else 1) ** 0.5).to(parameter)


def written_out_gradient(critic, images, labels=None):
    """Returns the gradient of each score of a Discriminator with respect to its image, (N, C, H, W).

    Args:
        critic: a Discriminator.
        images: (N, C, H, W).
        labels: (N,), where it has classes.

    The score is piecewise linear in the image, so its gradient is the last weights passed backwards through the transposed
    layers, through the max-pool and ReLU choices of the forward pass, and out at every size at which the critic sees the
    image. Written as a forward computation, it can be differentiated with respect to the weights by one ordinary backward
    pass, in half the time of a second backward through autograd.
    """
    images, path = 2 * images - 1, []
    plain = torch.autocast(images.device.type, enabled=False)  # autocast would unpool in float32
    level, scale = critic.image_sizes.index(tuple(images.shape[-2:])), critic.scale(images)
    convolutions = [layer for layer in critic.blocks if isinstance(layer, nn.Conv2d)]
    inputs = [convolutions[0], *critic.inputs][level:]  # for images of this size and for those averaged to smaller ones
    convolutions, features = [inputs[0], *convolutions[level + 1:]], images
    with torch.no_grad():
        for index, convolution in enumerate(convolutions):
            maps = _convolved(features, convolution)
            if 0 < index < len(inputs):
                images = halved(images)
                maps += _convolved(images, inputs[index])
            pooled, indices = F.max_pool2d(maps, 2, return_indices=True)
            features = pooled.relu()
            with plain:
                path.append(F.max_unpool2d((pooled > 0).to(pooled.dtype), indices, 2))
    gradient, of_images = critic.score.weight.to(features.dtype).view(1, *features.shape[1:]).expand_as(features), None
    if labels is not None:
        of_classes = CLASS_SCALE * critic.classes(labels) / features[0, 0].numel()
        gradient = gradient + of_classes.to(features.dtype)[:, :, None, None]
    for index, passed in reversed(list(enumerate(path))):
        with plain:
            gradient = F.interpolate(gradient, scale_factor=2) * passed
        if index < len(inputs):
            of_input = F.conv_transpose2d(gradient, inputs[index].weight, padding=1)
            of_images = of_input if of_images is None else of_input + F.interpolate(of_images, scale_factor=2) / 4
        if index:
            gradient = F.conv_transpose2d(gradient, convolutions[index].weight, padding=1)
    return 2 * scale * of_images


def _convolved(images, convolution):
    # Detached: autocast in torch 2.10 would keep the weights that it casts here, without gradient, for later.
    return F.conv2d(images, convolution.weight.detach(), convolution.bias.detach(), padding=1)


@torch.compiler.disable  # which would make the matrices anew in every step
def parts_without_video(layer, images):
    """Returns what CNNParamTanh.parts returns, with None for the video, of which only a few rows are made at a time."""
    conv, dtype = layer.cnn.conv, images.dtype
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
    averaged = layer.averaged(images)
    maps = VideoConvolution.apply(*(tensor.to(dtype) for tensor in (averaged, conv.weight, conv.bias)), layer.num_frames)
    alpha = resized(layer.cnn.predict(maps), *images.shape[-2:])
    return None, alpha, torch.tanh(alpha * images)


class VideoConvolution(torch.autograd.Function):
    """F.conv2d(synthetic_video(images, num_frames).flatten(1, 2), weight, bias, padding=1) for few filters, on a CPU.

    A pixel of a frame is a sum of four pixels of the image. Products with the sparse matrices of these sums replace those
    with the window matrices, and one matrix product gives all taps of all filters, which are then shifted and summed. The
    images of a batch are the last axis, so that sparse products read and write whole lines of memory.
    """

    @staticmethod
    def forward(ctx, images, weight, bias, num_frames):
        n, channels, height, width = images.shape
        matrices = _video_matrices(channels, height, width, num_frames, len(weight), images.dtype)
        taps, planes = _taps(weight, num_frames), _planes(images)
        ctx.save_for_backward(images, weight, bias, planes)
        ctx.num_frames = num_frames
        grey = matrices.inside @ (taps @ matrices.grey).view(9, -1)
        maps = (grey + bias).T[..., None].repeat(1, 1, n)
        for block in matrices.blocks:
            video = _sparse_product(block.frames, planes).view(-1, taps.shape[1], width * n)
            products = torch.bmm(taps.expand(len(video), *taps.shape), video)
            maps[:, block.outputs] += _sparse_product(block.shifts, products.view(-1, n)).view(len(weight), -1, n)
        return maps.view(-1, height, width, n).permute(3, 0, 1, 2).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        images, weight, bias, planes = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated once more: by the plain form
            maps = F.conv2d(synthetic_video(images, ctx.num_frames).flatten(1, 2), weight, bias, padding=1)
            return *torch.autograd.grad(maps, (images, weight, bias), gradient, create_graph=True), None
        n, channels, height, width = images.shape
        matrices = _video_matrices(channels, height, width, ctx.num_frames, len(weight), images.dtype)
        taps = _taps(weight, ctx.num_frames)
        gradient = _planes(gradient).view(len(weight), -1, n)
        of_grey = (gradient.sum(2) @ matrices.inside).T.reshape(-1, 1)
        exact = torch.promote_types(weight.dtype, torch.float32)  # of a sum over all blocks
        of_taps, of_planes = (of_grey * matrices.grey).to(exact), torch.zeros_like(planes)
        for block in matrices.blocks:
            video = _sparse_product(block.frames, planes).view(-1, taps.shape[1], width * n)
            of_products = _sparse_product(block.shifts_back, gradient[:, block.outputs].flatten(0, 1))
            of_products = of_products.view(-1, len(taps), width * n)
            of_taps += torch.bmm(of_products, video.transpose(1, 2)).sum(0, dtype=exact)
            of_video = torch.bmm(taps.T.expand(len(video), *taps.T.shape), of_products)
            read = _sparse_product(block.frames_back, of_video.view(-1, n))
            of_planes.view(channels, -1, n)[:, block.pixels] += read.view(channels, -1, n)
        of_weight = of_taps.view(3, 3, len(weight), channels, -1).permute(2, 4, 3, 0, 1).flatten(1, 2)
        of_images = torch.empty_like(images).copy_(of_planes.view(channels, height, width, n).permute(3, 0, 1, 2))
        return of_images, of_weight.to(weight.dtype), gradient.sum((1, 2)), None


def _planes(images):
    """(N, C, H, W) to (C H W, N)."""
    return torch.stack(images.unbind(), -1).flatten(0, 2)  # twice as fast as permuting


def _taps(weight, num_frames):
    """(F, T C, 3, 3) to (9 F, C T)."""
    return weight.unflatten(1, (num_frames, -1)).permute(3, 4, 0, 2, 1).reshape(9 * len(weight), -1)


class SparseMatrix(NamedTuple):
    """A matrix whose row i has values[k] in columns[k], for k from starts[i] to starts[i + 1]."""

    columns: torch.Tensor
    starts: torch.Tensor
    values: torch.Tensor


def _sparse_matrix(used, rows, columns, values, num_rows, dtype):
    """Returns a matrix with `values` at `rows` and `columns` where `used`, all broadcast to its shape."""
    rows, columns, values = (tensor.expand_as(used)[used] for tensor in (rows, columns, values))
    order, counts = rows.argsort(stable=True), rows.bincount(minlength=num_rows)
    return SparseMatrix(columns[order].int(), (counts.cumsum(0) - counts).int(), values[order].to(dtype))


def _sparse_product(matrix, dense):
    return F.embedding_bag(matrix.columns, dense, matrix.starts, mode="sum", per_sample_weights=matrix.values)


class VideoBlock(NamedTuple):
    """Matrices for R rows of all frames."""

    pixels: slice  # of the image, those that are read
    frames: SparseMatrix  # (C, H W) to (R, C T, W), without the grey
    frames_back: SparseMatrix  # (R, C T, W) to (C, pixels)
    outputs: slice  # pixels of the maps, those that taps of these rows are added to
    shifts: SparseMatrix  # (R, 9 F, W) to (F, outputs)
    shifts_back: SparseMatrix  # (F, outputs) to (R, 9 F, W)


class VideoMatrices(NamedTuple):
    """What VideoConvolution multiplies with: about 3 KB for each pixel of an image."""

    blocks: list
    inside: torch.Tensor  # (H W, 9), 1 where a tap of the pixel is inside the image
    grey: torch.Tensor  # (C T,), what is added to each frame


@functools.lru_cache(maxsize=2)  # a run computes at one size for long
def _video_matrices(channels, height, width, num_frames, filters, dtype):
    exact = torch.promote_types(dtype, torch.float32)
    *matrices, contrast, grey = frame_matrices(height, width, num_frames, channels, dtype=exact)
    (row_values, row_reads), (column_values, column_reads) = (matrix.topk(2) for matrix in matrices)  # (T, size, 2)
    row_values = contrast.T[:, :, None, None] * row_values  # (C, T, H, 2)
    block_rows, blocks = max(1, BLOCK_PIXELS // width), []
    for start in range(0, height, block_rows):
        end = min(start + block_rows, height)
        # Axes: row, channel, frame, column, and the two rows and two columns of the image that are read.
        values = row_values[:, :, start:end].permute(2, 0, 1, 3)[..., None, :, None] * column_values[:, :, None, :]
        read = row_reads[:, start:end].transpose(0, 1)[:, None, :, None, :, None] * width + column_reads[:, :, None, :]
        used = values != 0
        in_use = read[used[:, :1]]
        pixels = slice(in_use.min().item(), in_use.max().item() + 1)
        channel = torch.arange(channels).view(-1, 1, 1, 1, 1)
        written = _numbers(end - start, channels, num_frames, width, 1, 1)
        frames = _sparse_matrix(used, written, channel * height * width + read, values, written.numel(), dtype)
        num_read = pixels.stop - pixels.start
        read = channel * num_read + read - pixels.start
        frames_back = _sparse_matrix(used, read, written, values, channels * num_read, dtype)
        # Axes: row, row and column of the tap, filter, column.
        products = _numbers(end - start, 3, 3, filters, width)
        i = torch.arange(start + 1, end + 1).view(-1, 1, 1, 1, 1) - torch.arange(3).view(3, 1, 1, 1)
        j = torch.arange(1, width + 1) - torch.arange(3).view(3, 1, 1)
        used = ((i >= 0) & (i < height) & (j >= 0) & (j < width)).expand_as(products)
        outputs = slice(max(start - 1, 0) * width, min(end + 1, height) * width)
        num_outputs, ones = outputs.stop - outputs.start, torch.ones(1)
        added = torch.arange(filters).view(-1, 1) * num_outputs + i * width + j - outputs.start
        blocks.append(VideoBlock(pixels, frames, frames_back, outputs,
                                 _sparse_matrix(used, added, products, ones, filters * num_outputs, dtype),
                                 _sparse_matrix(used, products, added, ones, products.numel(), dtype)))
    inside = F.unfold(torch.ones(1, 1, height, width), 3, padding=1)[0].T
    return VideoMatrices(blocks, inside.to(dtype), grey.T.flatten().to(dtype))


def _numbers(*shape):
    return torch.arange(math.prod(shape)).view(shape)


class CapturedUpdate:
    """An update as one CUDA graph. With small batches most of the time goes into launching hundreds of kernels; a replay
    launches all of them at once.

    Args:
        update: takes tensors, reads nothing from the device, returns a dict of scalars. It is run to warm up.
        arguments: tensors like those it will be called with.
    """

    def __init__(self, update, arguments):
        self.arguments = [argument.clone() for argument in arguments]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARM_UPS):
                update(*self.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            metrics = update(*self.arguments)
            self.names, self.values = list(metrics), torch.stack(list(metrics.values()))

    def __call__(self, *arguments):
        for static, argument in zip(self.arguments, arguments, strict=True):
            static.copy_(argument, non_blocking=True)
        self.graph.replay()
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))


def use_fast_updates(gan, batches, *, compiled, capture, report):
    """Compiles the losses of a GAN and captures its updates; goes back to the plain ones if results differ or it fails.

    Each update is made twice, with other arguments and at another rate, as a captured one could have kept those of before.

    Args:
        gan: a wgan_gp.GAN; keeps the state it has.
        batches: "critic" and "generator", each to a list of two tuples, the arguments to try the update on.
        compiled: whether to use torch.compile.
        capture: CapturedUpdate, or None for no capture.
        report: called with a line of text if the plain updates are kept.
    """
    optimizers = {"critic": gan.critic_optimizer, "generator": gan.generator_optimizer}
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()]
    saved, saved_rates = [tensor.clone() for tensor in gan.tensors()], [rate.clone() for rate in rates]
    stream = torch.cuda.current_stream() if gan.device.type == "cuda" else None

    def use_plain():
        for name in batches:
            vars(gan).pop(f"{name}_losses", None)
            vars(gan).pop(f"{name}_update", None)

    def restore():
        for tensor, before in zip([*gan.tensors(), *rates], [*saved, *saved_rates], strict=True):
            tensor.copy_(before)

    def results():
        """Yields tensors that ought to be equal, and the tolerance of each."""
        torch.manual_seed(0)  # for layers that draw random numbers, such as Dropout
        for name, optimizer in optimizers.items():
            restore()
            for state in optimizer.state.values():  # else the first step of Adam is the sign of the gradient
                state["step"].fill_(10)
                state["exp_avg_sq"].fill_(1)
            before = _changed_by(gan, name)
            for arguments, rate, tolerance in zip(batches[name], RATES, (same_update, SAME_STATE), strict=True):
                optimizer.param_groups[0]["lr"].fill_(rate)
                yield torch.stack(list(getattr(gan, f"{name}_update")(*arguments).values())), tolerance
                yield gan.gradients()[name], tolerance
            for after, earlier in zip(_changed_by(gan, name), before, strict=True):
                yield after - earlier, SAME_STATE

    def compare():
        for name, (arguments, _) in batches.items():
            if compiled:
                setattr(gan, f"{name}_losses", torch.compile(getattr(gan, f"{name}_losses"), dynamic=False))
            if capture:
                setattr(gan, f"{name}_update", capture(getattr(gan, f"{name}_update"), arguments))
        return ((actual, expected, allowed) for (actual, _), (expected, allowed) in zip(results(), plain, strict=True))

    use_plain()  # not those for images of the size before
    same_update = SAME_UPDATE[gan.config.precision]
    plain = list(results())
    # One of several processes must not go on without its faster updates: the others have not failed, and would wait for it.
    fault = _fault(compare, catch=distributed.world_size() == 1)
    if fault:
        use_plain()
        _forget_capture(optimizers.values(), stream)
        report(f"warning: training goes on without {'--compile' if compiled else 'captured updates'}: {fault}")
    restore()


def _changed_by(gan, name):
    """Copies of what an update of a network changes, each kind as one vector: weights, running statistics, Adam's state."""
    networks = (gan.critic,) if name == "critic" else (gan.generator, gan.averaged)
    state = gan.state()[f"{name}_optimizer"]
    kinds = [[tensor for tensor in network.state_dict().values() if tensor.is_floating_point()] for network in networks]
    kinds += [[entry[kind] for entry in state.values()] for kind in ("step", "exp_avg_sq")]
    return [torch.cat([tensor.flatten() for tensor in kind]) for kind in kinds]


def _forget_capture(optimizers, stream):
    """Leaves the stream of a capture that has failed, which torch does not, and frees its memory."""
    for optimizer in optimizers:
        optimizer.zero_grad()
        vars(optimizer).pop("found_inf", None)
    if stream is not None:
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
