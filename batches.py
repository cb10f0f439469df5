"""What the updates of a step work on: images of the set, and random numbers, which are drawn on the CPU as a function of
(seed, purpose, step).
"""
import torch

import distributed
from augmentation import NUM_AUGMENT_NUMBERS
from growth import averaged_to
from image_data import as_float_images, batch_indices, to_device
from randomness import random_generator


def critic_batch(gan, images, step, update, images_seen, *labels):
    """Returns this process's arguments of GAN.critic_update."""
    config, n = gan.config, gan.config.batch_size
    indices = batch_indices(len(images), images_seen, n, seed=config.seed)
    generator = random_generator(config.seed, "critic", step, update)
    drawn = (torch.randn(n, config.latent_dim, generator=generator), torch.rand(n, 1, 1, 1, generator=generator),
             torch.rand(n, NUM_AUGMENT_NUMBERS, generator=generator), *(y[indices] for y in labels))
    real = as_float_images(images, distributed.shard(indices), gan.device)
    return (averaged_to(real, gan.side), *(to_device(distributed.shard(tensor), gan.device) for tensor in drawn))


def generator_batch(gan, real, step, images_seen, *labels):
    """Returns this process's arguments of GAN.generator_update; `real` and `labels` are those of the critic's last batch."""
    config, n = gan.config, gan.config.batch_size
    generator = random_generator(config.seed, "generator", step)
    drawn = (torch.randn(n, config.latent_dim, generator=generator), torch.randn(n, config.latent_dim, generator=generator),
             torch.rand(n, NUM_AUGMENT_NUMBERS, generator=generator))
    return (real, *(to_device(distributed.shard(tensor), gan.device) for tensor in drawn),
            to_device(torch.tensor(gan.ema_weight(images_seen)), gan.device), *labels)


def first_batches(gan, images, *labels):
    """Returns a dict: "critic" and "generator", each to a list of the arguments of its update in two steps far apart."""
    n, steps = gan.config.batch_size, (0, 99)  # the average moves by nearly all, and by little
    critic = [critic_batch(gan, images, step, 0, step * n, *labels) for step in steps]
    generator = [generator_batch(gan, batch[0], step, (step + 1) * n, *batch[4:])
                 for step, batch in zip(steps, critic, strict=True)]
    return {"critic": critic, "generator": generator}
