"""Random numbers as functions of a seed and a purpose, so that no generator state has to be saved.

They are drawn on the CPU, so that every device gets the same.
"""
import hashlib

import torch


def random_generator(*key):
    """Returns a CPU torch.Generator whose stream is a function of the key alone, for example (seed, purpose, step).

    torch's CPU generator uses the low 32 bits of its seed, so two keys in about four thousand million have the same stream.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def latent_noise(seed, indices, latent_dim, *, purpose="image"):
    """Returns z (N, Z) ~ N(0, I), one for each index; number i is a function of (seed, purpose, i) alone.

    Different numbers can give the same vector, see random_generator: of the first 200,000 of seed 0 three pairs do.
    """
    draws = [torch.randn(1, latent_dim, generator=random_generator(seed, purpose, index)) for index in indices]
    return torch.cat(draws)


def drawn_labels(seed, indices, counts):
    """Returns labels (N,) int64, one for each index, as often as `counts` (K,) says; a function of (seed, i) alone."""
    ends = counts.double().cumsum(0) / counts.sum()
    places = [torch.rand(1, dtype=torch.float64, generator=random_generator(seed, "label", index)) for index in indices]
    return torch.searchsorted(ends, torch.cat(places), right=True).clamp(max=len(counts) - 1)
