"""The losses: Wasserstein distance with gradient penalty for the critic, and the terms of the VAE.

Each function returns one scalar and says what it sums and what it averages. Training calls these functions and no copies of
them: a change here changes training. Notation as in model_definitions.py.
"""
import math

import torch


def critic_loss(real_scores, fake_scores):
    """Returns mean(fake) - mean(real), minimised by the critic; its negative estimates the Wasserstein distance.

    Args:
        real_scores, fake_scores: (N,) unbounded.
    """
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """Returns -mean(fake), minimised by the generator. The gradient penalty is no part of it."""
    return -fake_scores.mean()


def gradient_penalty(critic, real, fake, *, mixing=None, input_gradient=None):
    """Returns the mean over samples of (||gradient of the score||_2 - 1)^2, at points between real and fake images.

    There is one mixing weight per sample, and the norm is over all of its C, H and W. The gradient is taken in the precision
    of the critic, the norm in at least float32. Where the gradient is zero the penalty is 1 and its own gradient 0, not NaN:
    torch.linalg.vector_norm has a defined gradient there, the square root of a sum has not.

    Args:
        critic: maps (N, C, H, W) to scores (N,).
        real, fake: (N, C, H, W).
        mixing: (N, 1, 1, 1) in [0, 1], the share of the real image; drawn uniformly where not given.
        input_gradient: optionally, a faster function than autograd from images (N, C, H, W) to the gradient of each score
            with respect to its image, differentiable with respect to the critic's parameters. See fast_paths.py.

    Returns:
        A scalar, unweighted, differentiable with respect to the critic's parameters.

    Raises:
        ValueError: mixing weights of another shape, which would mix pixels instead of samples.

    Source: Gulrajani et al. 2017 (arXiv:1704.00028), algorithm 1, lines 4 to 7.
    """
    if mixing is None:
        mixing = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    if mixing.shape != (len(real), 1, 1, 1):
        raise ValueError(f"expected mixing weights of shape ({len(real)}, 1, 1, 1), got {tuple(mixing.shape)}")
    between = torch.lerp(fake.detach(), real.detach(), mixing.to(real.dtype))
    if input_gradient:
        gradient = input_gradient(between)
    else:
        between.requires_grad_()
        # One call gives the gradient of every sample, because no score depends on another sample.
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()


def combined_wasserstein_loss(critic, real, fake, *, weight=10.0, mixing=None, input_gradient=None, metrics=None):
    """Returns critic_loss + weight * gradient_penalty, which the critic minimises.

    Args:
        critic, real, fake, mixing, input_gradient: as in gradient_penalty.
        weight: of the gradient penalty.
        metrics: a dict to which the two terms are added for the log, as "wasserstein_distance" and "gradient_penalty".
    """
    real_scores, fake_scores = critic(torch.cat([real, fake.detach()])).split([len(real), len(fake)])
    difference = critic_loss(real_scores, fake_scores)
    penalty = gradient_penalty(critic, real, fake, mixing=mixing, input_gradient=input_gradient)
    if metrics is not None:
        metrics |= {"wasserstein_distance": -difference, "gradient_penalty": penalty}
    return difference + weight * penalty


def kl_divergence(mu, logvar):
    """Returns KL(N(mu, exp(logvar)) || N(0, I)) in nats per image: summed over Z, averaged over N.

    Args:
        mu, logvar: (N, Z).

    Source: Kingma and Welling 2014 (arXiv:1312.6114), appendix B.
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()


def reconstruction_loss(reconstruction, images):
    """Returns the absolute differences, summed over C, H and W, divided by sqrt(C * H * W), averaged over N.

    With this divisor the gradient with respect to one image has a norm of at most 1 / N at every image size, as that of
    generator_loss with a critic of slope 1 has. So a weight means the same at 32 and at 256 px.

    Args:
        reconstruction, images: (N, C, H, W) in [0, 1].
    """
    return (reconstruction - images).abs().flatten(1).sum(dim=1).mean() / math.sqrt(images[0].numel())
