"""At which size a run trains: it begins with small images and doubles them after so many images."""
import bisect
import time
from typing import NamedTuple

from devices import is_out_of_memory
from image_sizes import SHORTER_SIDES, height_and_width
from model_definitions import halved

QUICK = 2.0  # seconds: a first step, which prepares much, counts only where it takes longer


class Growth(NamedTuple):
    """The sizes that a run goes through. Which one a step has follows from the images seen before it, and from nothing else.

    A size is named by its shorter side in pixels. Each has twice the images of the one before; the last stays.
    """

    sides: tuple  # from the first to the last
    every_images: int  # of the first size

    @property
    def starts(self):
        """The images seen before each size."""
        return [self.every_images * (2**index - 1) for index in range(len(self.sides))]

    def side_at(self, images_seen):
        """Returns the size of a step before which so many images were seen."""
        return self.sides[self._number(images_seen)]

    def images_at_this_size(self, images_seen):
        """Returns how many of the images seen were of the size of side_at."""
        return images_seen - self.starts[self._number(images_seen)]

    def plan(self, images_per_step, total_steps, *, step=0, images_seen=0):
        """Returns (side, first step, last step) of each size that a run of so many steps gets to from here on.

        Args:
            images_per_step: from here on; before, it may have been another.
            step, images_seen: done so far.
        """
        now = self._number(images_seen)
        starts = [step, *(step + _steps_for(start - images_seen, images_per_step) for start in self.starts[now + 1:])]
        ends = [*starts[1:], total_steps]
        return [(side, start, min(end, total_steps)) for side, start, end in zip(self.sides[now:], starts, ends, strict=True)
                if start < total_steps]

    def steps_for_all(self, images_per_step, *, step=0, images_seen=0):
        """Returns the steps of a run whose last size, too, has twice the images of the one before. Arguments as in plan."""
        return step + _steps_for(self.every_images * (2**len(self.sides) - 1) - images_seen, images_per_step)

    def _number(self, images_seen):
        return bisect.bisect(self.starts, images_seen) - 1


def _steps_for(images, images_per_step):
    return -(-images // images_per_step)


def growth_of(config, first_side=0):
    """Returns the Growth of a run with these settings whose images have at first that shorter side, or the smallest one."""
    last = min(height_and_width(config.image_size))
    first = max(config.grow_from or last, min(first_side, last))
    return Growth(tuple(side for side in SHORTER_SIDES if first <= side <= last), config.grow_every_images)


def averaged_to(images, shorter_side):
    """Returns images (N, C, H, W) whose shorter side is halved by averaging until it is that one."""
    while min(images.shape[2:]) > shorter_side:
        images = halved(images)
    return images


def time_steps(gan, sides, take_step):
    """Returns the seconds of a step at each of the sizes, None where memory is too small for it. The GAN keeps its state.

    Args:
        gan: a wgan_gp.GAN.
        sides: by their shorter sides.
        take_step: takes a step and returns its metrics.
    """
    saved, side_before, seconds = [tensor.clone() for tensor in gan.tensors()], gan.side, {}
    for side in sides:
        gan.work_at(side)
        try:
            for _ in range(2):
                start = time.perf_counter()
                next(iter(take_step().values())).item()  # waits for the device
                seconds[side] = time.perf_counter() - start
                if seconds[side] > QUICK:
                    break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            seconds[side] = None
    gan.work_at(side_before)
    for tensor, before in zip(gan.tensors(), saved, strict=True):
        tensor.copy_(before)
    return seconds
