"""Whether a device computes what the CPU does: the first steps of a run on both."""
import dataclasses
from typing import NamedTuple

import torch

import devices
import distributed
from fast_paths import add_noise, use_fast_layers
from growth import growth_of
from image_sizes import height_and_width
from randomness import random_generator
from wgan_gp import GAN, NETWORKS

STEPS, BATCH, LARGEST_SIDE = 3, 4, 128
# Another order of sums alone changes metrics by up to 1e-3, and the changes of the weights by up to 0.04, because the first
# steps of Adam go by the sign of a gradient. An operation that computes something else changes both by about 1.
SAME_METRICS, SAME_WEIGHTS = 1e-2, 0.2


class Difference(NamedTuple):
    """By how much the first steps on a device differ from those on the CPU, relative to those: the largest difference."""

    metrics: float  # of each metric, over the steps
    weights: float  # of what changes in each network

    def is_rounding(self):
        return self.metrics <= SAME_METRICS and self.weights <= SAME_WEIGHTS  # NaN is not


def difference(config, device, take_step, *, prepare=None):
    """Takes a few steps at each size of a run up to 128 px on the CPU and on a device, in float32; returns the Difference.

    The networks have noise on their weights, some of which are 0 at the start, so that what they multiply counts too.

    Args:
        config: a Config; batches are smaller and without classes.
        device: a torch.device.
        take_step: training.training_step.
        prepare: called with the GAN on the device and uint8 images (M, C, H, W), to make its updates faster.

    Raises:
        RuntimeError: the device cannot do what a step needs.
    """
    config = dataclasses.replace(config, batch_size=BATCH, critic_steps=1, precision="float32")
    images = torch.randint(256, (2 * BATCH, config.channels, *height_and_width(config.image_size)), dtype=torch.uint8,
                           generator=random_generator(config.seed, "device check"))
    found = []
    sides = growth_of(config).sides
    for side in [side for side in sides if side <= LARGEST_SIDE] or sides[:1]:
        expected = _first_steps(config, torch.device("cpu"), side, images, take_step)
        actual = _first_steps(config, device, side, images, take_step, prepare)
        found.append([torch.stack([(ours[name] - theirs[name]).norm() / theirs[name].norm() for name in theirs]).max()
                      for ours, theirs in zip(actual, expected, strict=True)])
    return Difference(*torch.tensor(found).amax(dim=0).tolist())  # NaN where one of them is


def _first_steps(config, device, side, images, take_step, prepare=None):
    """Returns two dicts of vectors on the CPU: each metric, over the steps, and what changes in each network."""
    gan = GAN(config, device)
    gan.work_at(side)
    for name in NETWORKS:
        add_noise(getattr(gan, name))
    if prepare:
        prepare(gan, images)
    before = _weights(gan)
    steps = [take_step(gan, images, step, step * BATCH) for step in range(STEPS)]
    metrics = {name: torch.stack([metrics[name] for metrics in steps]).cpu() for name in steps[0]}
    return metrics, {name: after - before[name] for name, after in _weights(gan).items()}


def _weights(gan):
    return {name: torch.cat([weight.detach().flatten().cpu() for weight in getattr(gan, name).parameters()])
            for name in NETWORKS}


def pick_training_device(config, take_step, *, report):
    """Returns devices.pick_device of a Config; for one process "auto" is mps where that computes what the CPU does.

    Args:
        take_step: as for difference.
        report: called with lines of text where there is mps.
    """
    device = devices.pick_device(config.device, local_rank=distributed.local_rank())
    if (config.device != "auto" or device.type != "cpu" or not torch.backends.mps.is_available()
            or distributed.is_one_of_several()):
        return device
    report("comparing mps with the CPU; --device mps or cpu does without")
    try:
        found = difference(config, torch.device("mps"), take_step, prepare=lambda gan, images: use_fast_layers(
            gan, report=lambda line: None))  # as training will
    except Exception as error:  # whatever an operation that mps does not have raises
        fault = (str(error) or type(error).__name__).splitlines()[0]
    else:
        if found.is_rounding():
            return torch.device("mps")
        fault = (f"the first steps on it differ from those on the CPU, by {found.metrics:.1e} in metrics and "
                 f"{found.weights:.1e} in weights")
    report(f"note: mps is not used: {fault}")
    return device
