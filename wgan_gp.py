"""One update of the critic and one of the generator: the step of a WGAN-GP whose generator is a VAE.

Source: Gulrajani et al. 2017 (arXiv:1704.00028), algorithm 1.
"""
import copy
import functools

import torch

import distributed
from augmentation import augment
from checkpointing import check_tensors, critic_arguments
from growth import growth_of
from losses import combined_wasserstein_loss, generator_loss, kl_divergence, reconstruction_loss
from model_definitions import VAE, Discriminator
from randomness import random_generator

# Momentum in the critic's gradient unsettles the penalty (Gulrajani et al. 2017). GAN.gradients and the skipping of updates
# that are not finite rest on this 0: Adam's first moment is then the last gradient.
ADAM_BETA1 = 0.0
AFTER_GROWTH = 0.5  # the half-life of the average, at most, as a part of the images of the newest size
NETWORKS = ("generator", "averaged", "critic")
CLASSES = "classes.weight"  # in the state of a network


class GAN:
    """The networks, the average of the generator (EMA), the optimizers, and one update of each network.

    Updates take tensors and read nothing from CUDA: the CPU does not wait for it. Everything a run can set comes from one
    Config, which this class reads as it is.

    Attributes:
        generator, critic: a VAE and a Discriminator, on `device`.
        averaged: a VAE in evaluation mode without gradients, whose weights are a moving average of the generator's.
        sizes: (H, W) of each size that they can work at, by its shorter side, the smallest first.
        growth: a Growth, the sizes that the run goes through.
        input_gradient: see losses.gradient_penalty; None for autograd.
        model_arguments: the keyword arguments of `generator`.
    """

    def __init__(self, config, device, *, first_side=0, num_classes=0, even_taps=True):
        """first_side: as for growth.growth_of; num_classes, even_taps: as for VAE."""
        torch.manual_seed(random_generator(config.seed, "weights").initial_seed())
        self.config, self.device, self.input_gradient = config, device, None
        self.model_arguments = config.model_arguments() | {"even_taps": even_taps} | (
            {"num_classes": num_classes} if num_classes else {})
        self.generator = VAE(**self.model_arguments).to(device)
        self.critic = Discriminator(**critic_arguments(self.model_arguments)).to(device)
        # Convolutions are fastest in channels_last; on mps several have been wrong in it. The CNN is left out: its input is
        # made frame by frame.
        vae = self.generator
        for convolutions in (vae.encoder, vae.inputs, vae.decoder, vae.outputs, self.critic):
            if device.type != "mps":
                convolutions.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.critic_optimizer = make_adam(self.critic, config.critic_learning_rate, config.adam_beta2)
        self.generator_optimizer = make_adam(self.generator, config.generator_learning_rate, config.adam_beta2)
        self.sizes = {min(size): size for size in reversed(self.generator.image_sizes)}
        self.growth = growth_of(config, first_side)
        self.work_at(self.growth.sides[0])

    def work_at(self, side):
        """Sets the size of images, by their shorter side, that the generators draw and that updates are of."""
        for generator in (self.generator, self.averaged):
            generator.draw_at(side)

    @property
    def side(self):
        """The size that work_at has set."""
        return min(self.generator.image_shape[1:])

    def critic_update(self, *batch):
        """Updates the critic once; returns its metrics, detached. Arguments as in critic_losses."""
        metrics, norm = descend(self.critic_optimizer, *self.critic_losses(*batch))
        return metrics | {"critic_gradient_norm": norm}

    def critic_losses(self, real, z, mixing, augment_numbers, *labels):
        """Returns the loss that the critic minimises, and its metrics.

        Args:
            real: (N, C, H, W) in [0, 1].
            z: (N, Z) standard normal.
            mixing: (N, 1, 1, 1) uniform in [0, 1].
            augment_numbers: (N, NUM_AUGMENT_NUMBERS) uniform in [0, 1].
            labels: where there are classes, those of the real images (N,). The generated image at each place has the class
                of the real one: were shares to differ, the critic could gain without end by what it adds to a score for the
                class alone, which has no slope with respect to the image, so that the penalty does not see it.
        """
        metrics, critic, input_gradient = {}, self.critic, self.input_gradient
        if labels:
            def critic(images):  # real and generated ones together, or mixed
                return self.critic(images, labels[0].repeat(len(images) // len(real)))

            if input_gradient:
                input_gradient = functools.partial(input_gradient, labels=labels[0])
        with self._autocast():
            with torch.no_grad():
                fake = self.generator.decode(z, *labels)
            real, fake = self._augment(real, augment_numbers), self._augment(fake, augment_numbers)
            loss = combined_wasserstein_loss(critic, real, fake, weight=self.config.gradient_penalty_weight,
                                             mixing=mixing, input_gradient=input_gradient, metrics=metrics)
        return loss, metrics | {"critic_loss": loss}

    def generator_update(self, real, z, noise, augment_numbers, ema_weight, *labels):
        """Updates the VAE with its CNN and layer once, then their average; returns their metrics, detached.

        Args:
            real, z, noise, augment_numbers, labels: as in generator_losses.
            ema_weight: a scalar tensor in [0, 1], by how much the average moves towards the new weights.
        """
        self.critic.requires_grad_(False)
        try:
            losses = self.generator_losses(real, z, noise, augment_numbers, *labels)
            metrics, norm = descend(self.generator_optimizer, *losses)
        finally:
            self.critic.requires_grad_(True)
        with torch.no_grad():
            for average, new in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
                average.lerp_(new, ema_weight)
            if distributed.world_size() > 1:  # each process has updated running statistics from its own shard of the batch
                distributed.all_reduce_mean_(running_statistics(self.generator) + running_statistics(self.critic))
            for average, new in zip(self.averaged.buffers(), self.generator.buffers(), strict=True):
                average.copy_(new)
        return metrics | {"generator_gradient_norm": norm}

    def generator_losses(self, real, z, noise, augment_numbers, *labels):
        """Returns the loss that the VAE minimises, and its metrics.

        Args:
            real, z, augment_numbers, labels: as in critic_losses.
            noise: (N, Z) standard normal, for the latent vectors of the real images.
        """
        weights = self.config.reconstruction_weight, self.config.kl_weight
        prior = [self.generator.class_latents(y) for y in labels]  # its mean for each image, where it is not 0
        z = sum(prior, start=z)
        with self._autocast():
            if any(weights):
                mu, logvar = self.generator.encode(real)
                z = torch.cat([z, self.generator.reparameterize(mu, logvar, noise=noise)])
            decoded = self.generator.decode_parts(z)
            generated, reconstruction = decoded.images[:len(real)], decoded.images[len(real):]
            loss = generator_loss(self.critic(self._augment(generated, augment_numbers), *labels))
            metrics = {"generator_loss": loss}
            if any(weights):
                metrics["reconstruction"] = reconstruction_loss(reconstruction, real)
                metrics["kl_divergence"] = kl_divergence(mu - prior[0] if prior else mu, logvar)
                loss = loss + weights[0] * metrics["reconstruction"] + weights[1] * metrics["kl_divergence"]
        if decoded.alpha is not None:
            metrics["alpha"] = decoded.alpha.mean()
        if labels:  # how far apart the classes are, in standard deviations of the noise
            every = torch.arange(self.generator.classes.num_embeddings, device=z.device)
            centres = self.generator.class_latents(every).detach()
            metrics["class_distance"] = torch.linalg.vector_norm(centres - centres.mean(dim=0), dim=1).mean()
        return loss, metrics

    def set_learning_rates(self, images):
        """Sets the learning rates for a step that ends when the generator has been trained on `images` images.

        They rise linearly over config.warm_up_images and fall as 1 / images after config.decay_after_images. The schedule
        does not depend on --steps, so a run can be extended. Without the rise, the first steps of Adam can leave all ReLUs
        of a generator dead.
        """
        config = self.config
        factor = min(1, images / max(config.warm_up_images, 1), config.decay_after_images / images)
        for optimizer, rate in ((self.generator_optimizer, config.generator_learning_rate),
                                (self.critic_optimizer, config.critic_learning_rate)):
            optimizer.param_groups[0]["lr"].fill_(rate * factor)

    def ema_weight(self, images_seen):
        """Returns by how much the average moves towards the weights in a step after which so many images were seen.

        Its half-life in images is config.ema_half_life_images, at most config.ema_ramp times the images seen. After a growth
        it is at most half the images of this size, so that the start of what draws it is soon forgotten.
        """
        config = self.config
        in_step = config.batch_size * config.critic_steps
        half_life = min(config.ema_half_life_images, config.ema_ramp * images_seen)
        at_this_size = self.growth.images_at_this_size(images_seen - in_step) + in_step
        if at_this_size < images_seen:
            half_life = min(half_life, AFTER_GROWTH * at_this_size)
        return 1 - 0.5 ** (in_step / half_life)

    def gradients(self):
        """Returns the gradient of the last update of each network, a dict of vectors: Adam's first moment, as beta1 is 0."""
        return {name: torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
                for name, optimizer in (("generator", self.generator_optimizer), ("critic", self.critic_optimizer))}

    def state(self):
        """Returns what a checkpoint has to hold, as nested dicts of the tensors themselves, buffers included."""
        return ({name: getattr(self, name).state_dict() for name in NETWORKS}
                | {name: getattr(self, name).state_dict()["state"] for name in ("generator_optimizer", "critic_optimizer")})

    def tensors(self):
        """Returns all tensors that the updates change, to be read or overwritten in place."""
        return list(_leaves(self.state()))

    def load_state(self, state):
        """Copies a saved state, after checking that all of it fits. Learning rates and the like stay those of the config.

        Raises:
            CheckpointError: what is missing, of another shape or type, or not finite.
        """
        own = self.state()
        if "num_classes" in self.model_arguments:
            state = state | {name: _with_new_classes(state[name], own[name]) for name in own}
        for name, expected in own.items():
            check_tensors(state[name], expected, name)
        for tensor, saved in zip(_leaves(own), _leaves({name: state[name] for name in own}), strict=True):
            tensor.copy_(saved)

    def begin_with(self, state):
        """Copies the averaged generator, and the critic where there is one, of what checkpointing.load_start returns.

        Raises:
            CheckpointError: a shape or type that does not fit, or what is not finite.
        """
        for name, source in (("generator", "averaged"), ("averaged", "averaged"), ("critic", "critic")):
            own, saved = getattr(self, name).state_dict(), state[source]
            if CLASSES in saved:
                saved = _with_new_classes(saved, own)
            check_tensors(saved, {key: own.get(key) for key in saved}, source)
            for key, tensor in saved.items():
                own[key].copy_(tensor)

    def state_bytes(self):
        """Returns the bytes of weights and optimizer state, about the size of a checkpoint."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _augment(self, images, augment_numbers):
        return augment(images, augment_numbers) if self.config.augment else images


def _with_new_classes(saved, own):
    """Returns saved weights, or what an optimizer has saved, in which classes that it does not have begin with nothing."""
    key = CLASSES if CLASSES in own else max(own)  # the vectors of classes are the last parameter
    if not isinstance(saved, dict) or key not in own:
        return saved
    return saved | {key: _with_new_rows(saved.get(key), own[key])}


def _with_new_rows(saved, own):
    if isinstance(own, dict):
        return {name: _with_new_rows(saved.get(name) if isinstance(saved, dict) else None, own[name]) for name in own}
    if saved is None:
        return torch.zeros_like(own, device="cpu")
    if isinstance(saved, torch.Tensor) and saved.dim() and own.dim() and saved.shape[1:] == own.shape[1:]:
        return torch.cat([saved, saved.new_zeros(max(0, len(own) - len(saved)), *saved.shape[1:])])
    return saved  # to be refused


def _leaves(tensors):
    """The tensors in nested dicts, in the order of their names."""
    for _, value in sorted(tensors.items(), key=lambda item: str(item[0])):
        yield from _leaves(value) if isinstance(value, dict) else [value]


def running_statistics(network):
    """Returns the floating-point buffers that a checkpoint holds, such as those of batch norm and spectral norm."""
    saved = network.state_dict()
    return [buffer for name, buffer in network.named_buffers() if name in saved and buffer.is_floating_point()]


def make_adam(network, learning_rate, beta2):
    """Returns an Adam whose moments exist from the start, not from the first step on."""
    parameters = list(network.parameters())
    on_cuda = parameters[0].is_cuda
    # A tensor, so that a captured update reads it anew.
    rate = torch.tensor(learning_rate, dtype=torch.float32, device=parameters[0].device)
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(ADAM_BETA1, beta2), fused=True, capturable=on_cuda)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # gradients are zero, so nothing moves
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def descend(optimizer, loss, metrics):
    """Takes one optimizer step; returns the metrics and the norm of the gradient, detached, as means over all processes.

    Where the loss or the norm is not finite, no weight changes: on a GPU fused Adam skips its step, so that the CPU need not
    wait; elsewhere no step is taken, as fused Adam on mps ignores found_inf in some releases of torch.
    """
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    values = torch.stack([loss, *metrics.values()]).detach()
    distributed.all_reduce_mean_([*gradients, values])
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(norm + values[0])
    if finite.is_cuda:
        optimizer.found_inf = (~finite).float()
    if finite.is_cuda or finite:
        optimizer.step()
    return dict(zip(metrics, values[1:].unbind(), strict=True)), norm
