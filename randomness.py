"""Where every random number comes from: a function of a seed and a purpose, so that none has to be saved.

Drawn on the CPU, so that every device gets the same.
"""
import hashlib

import torch


def random_generator(*key):
    """Returns a CPU torch.Generator whose stream is a function of the key, for example (seed, purpose, step), alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def latent_noise(seed, indices, latent_dim, *, purpose="image"):
    """Returns z (N, Z) ~ N(0, I), one for each index; number i is a function of (seed, purpose, i) alone."""
    draws = [torch.randn(1, latent_dim, generator=random_generator(seed, purpose, index)) for index in indices]
    return torch.cat(draws)
