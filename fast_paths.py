"""Faster forms of what the networks and updates compute, each compared once with what it replaces before it is used.

Where results differ, or a faster form fails, training goes on with the plain one after one line of warning. So the networks
and losses can be changed without looking at this file.
"""
import copy
import functools
import itertools

import torch
from torch import nn
from torch.nn import functional as F

import distributed
from losses import gradient_penalty
from model_definitions import CNN
from randomness import random_generator

SAME = 1e-6  # largest relative difference between two forms of one computation in float64
SAME_UPDATE = {"float32": 1e-3, "bfloat16": 5e-2}  # the same for whole updates; bfloat16 rounds to 0.4%
GRAPH_WARM_UPS = 3  # runs before a capture, so that libraries have chosen their algorithms and reserved their memory


def use_fast_layers(gan, *, report):
    """Sets gan.input_gradient and replaces the convolution of each CNN by faster forms, where they give the same numbers.

    Args:
        gan: a wgan_gp.GAN.
        report: called with a line of text for each faster form that is not used.
    """
    shape = gan.generator.image_shape
    if _is_same(lambda: _compare_penalties(gan.critic, shape), "the penalty by double backward", report):
        gan.input_gradient = functools.partial(written_out_gradient, gan.critic)
    layers, averaged = ([module for module in network.modules() if isinstance(module, CNN)]
                        for network in (gan.generator, gan.averaged))
    for cnn, average in zip(layers, averaged, strict=True):
        if _is_same(lambda cnn=cnn: _compare_convolutions(cnn.conv), "the CNN's own convolution", report):
            for conv in (cnn.conv, average.conv):
                conv.forward = functools.partial(convolve_as_matrix_product, conv)


def _is_same(compare, plain, report):
    """Whether the pairs of tensors (actual, expected) that `compare` returns are equal up to rounding; reports if not."""
    fault = _fault(compare, SAME)
    if fault:
        report(f"warning: training goes on with {plain}, which is slower: {fault}")
    return not fault


def _fault(compare, tolerance, *, catch=True):
    """What is wrong with the pairs of tensors (actual, expected) that `compare` returns, None where nothing is."""
    try:
        difference = torch.stack([torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)
                                  for actual, expected in compare()]).max().item()
    except Exception as error:  # no such layer, no compiler, no memory, an operation that cannot be captured
        if not catch:
            raise
        while error.__context__:  # the end of a failed capture raises again; the first error says more
            error = error.__context__
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None if difference <= tolerance else f"the results of the faster form differ by {difference:.1%}"  # fails for NaN


def _compare_penalties(critic, shape):
    """Returns the penalty with written_out_gradient and with autograd, and their gradients for the critic's parameters."""
    critic = _moved_copy(critic)
    real, fake, mixing = (torch.rand(size, dtype=torch.float64, generator=random_generator("fast paths", name))
                          for name, size in (("real", (2, *shape)), ("fake", (2, *shape)), ("mixing", (2, 1, 1, 1))))
    results = []
    for input_gradient in (functools.partial(written_out_gradient, critic), None):
        penalty = gradient_penalty(critic, real, fake, mixing=mixing, input_gradient=input_gradient)
        gradients = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True, allow_unused=True)
        results.append((penalty.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    return zip(*results, strict=True)


def _compare_convolutions(conv):
    conv = _moved_copy(conv)
    features = torch.rand(2, conv.in_channels, 32, 32, dtype=torch.float64, generator=random_generator("fast paths", "cnn"))
    return [(convolve_as_matrix_product(conv, features), conv(features))]


def _moved_copy(module):
    """Returns a copy in float64 on the CPU with other weights, so that parts that start at zero count too."""
    module = copy.deepcopy(module).to("cpu", torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=random_generator("fast paths", index))
            parameter += noise / max(1, parameter[0].numel() if parameter.dim() else 1) ** 0.5
    return module


def written_out_gradient(critic, images):
    """Returns the gradient of each score of a Discriminator with respect to its image, (N, C, H, W).

    The score is piecewise linear in the image, so its gradient is the last weights passed backwards through the transposed
    layers, through the max-pool and ReLU choices of the forward pass. Written as a forward computation, it can be
    differentiated with respect to the weights by one ordinary backward pass, in half the time of a second backward through
    autograd.
    """
    features, path = 2 * images - 1, []
    plain = torch.autocast(images.device.type, enabled=False)  # autocast would unpool in float32
    convolutions = [layer for layer in critic.blocks if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for convolution in convolutions:
            # Detached: autocast in torch 2.10 would keep the weights that it casts here, without gradient, for below.
            maps = F.conv2d(features, convolution.weight.detach(), convolution.bias.detach(), padding=1)
            pooled, indices = F.max_pool2d(maps, 2, return_indices=True)
            features = pooled.relu()
            with plain:
                path.append(F.max_unpool2d((pooled > 0).to(pooled.dtype), indices, 2))
    gradient = critic.score.weight.to(features.dtype).view(1, *features.shape[1:]).expand_as(features)
    for convolution, passed in zip(reversed(convolutions), reversed(path), strict=True):
        with plain:
            gradient = F.interpolate(gradient, scale_factor=2) * passed
        gradient = F.conv_transpose2d(gradient, convolution.weight, padding=1)
    return 2 * gradient


def convolve_as_matrix_product(conv, features):
    """Returns conv(features) for a 3 x 3 Conv2d of few filters, (N, C, H, W) to (N, filters, H, W).

    One matrix product gives the 9 taps of all filters, which are then shifted and summed. Convolution routines are made for
    more filters: with two, on a CPU, this takes a third of their time.
    """
    taps = conv.weight.permute(2, 3, 0, 1).flatten(0, 2)
    maps = torch.bmm(taps.expand(len(features), *taps.shape), features.flatten(2))
    taps = maps.view(len(features), 9, conv.out_channels, *features.shape[2:])
    taps = taps.to(torch.promote_types(maps.dtype, torch.float32)).unbind(1)
    shifts = itertools.product((1, 0, -1), repeat=2)
    total = sum(F.pad(tap, (right, -right, down, -down)) for tap, (down, right) in zip(taps, shifts, strict=True))
    return (total + conv.bias.view(-1, 1, 1)).to(maps.dtype)


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

    Args:
        gan: a wgan_gp.GAN; keeps the state it has.
        batches: "critic" and "generator", to the arguments to try each update on.
        compiled: whether to use torch.compile.
        capture: CapturedUpdate, or None for no capture.
        report: called with a line of text if the plain updates are kept.
    """
    saved = [tensor.clone() for tensor in gan.tensors()]

    def restore():
        for tensor, before in zip(gan.tensors(), saved, strict=True):
            tensor.copy_(before)

    def results():
        restore()
        torch.manual_seed(0)  # for layers that draw random numbers, such as Dropout
        metrics = [getattr(gan, f"{name}_update")(*arguments) for name, arguments in batches.items()]
        return [torch.stack(list(values.values())) for values in metrics] + list(gan.gradients().values())

    def compare():
        for name, arguments in batches.items():
            if compiled:
                setattr(gan, f"{name}_losses", torch.compile(getattr(gan, f"{name}_losses")))
            if capture:
                setattr(gan, f"{name}_update", capture(getattr(gan, f"{name}_update"), arguments))
        return zip(results(), plain, strict=True)

    plain = results()
    # One of several processes must not go on without its faster updates: the others have not failed, and would wait for it.
    fault = _fault(compare, SAME_UPDATE[gan.config.precision], catch=distributed.world_size() == 1)
    restore()
    if fault:
        for name in batches:
            vars(gan).pop(f"{name}_losses", None)
            vars(gan).pop(f"{name}_update", None)
        report(f"warning: training goes on without --compile: {fault}")
