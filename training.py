"""Trains the VAE with its CNNParamTanh layer as the generator of a WGAN-GP: python training.py --data ./images

A step is some critic updates and one generator update. All randomness is drawn on the CPU as a function of (seed, purpose,
step), and the order of the images is a function of (seed, epoch): a checkpoint holds no random state, and running the same
command again continues the same run.
"""
import contextlib
import copy
import ctypes
import dataclasses
import importlib.util
import math
import os
import pathlib
import signal
import statistics
import sys
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is anything to save, Ctrl-C just ends it

import torch
from tqdm import tqdm

import config as configuration
import parallel
import program
from acceleration import CapturedUpdate, accelerate
from augmentation import RANDOM_NUMBERS, augment
from checkpointing import (
    CheckpointError,
    check_tensors,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    save_generator,
)
from data_report import report
from demo_images import draw_demo_images
from image_data import (
    DataError,
    batch_indices,
    check_readable,
    decode_folder,
    load_images,
    pick,
    take,
    to_device,
    to_device_where_it_fits,
)
from losses import critic_loss, generator_loss, gradient_penalty, kl_divergence, reconstruction_loss
from model_definitions import VAE, Discriminator
from pictures import alpha_picture, grid, save_picture
from quality import sliced_wasserstein
from randomness import latent_noise, random_generator
from run_folder import RunFolderError, append_metrics, choose_run_folder, draw_curves, open_run_folder, read_metrics

DEMO_FOLDER = pathlib.Path("demo_images")
ADAM_BETAS = (0.0, 0.9)  # Gulrajani et al. 2017: momentum in the critic's gradient unsettles the penalty
EMA_RAMP = 0.1  # the half-life of the average is at most this part of the images seen
NETWORKS = ("generator", "averaged", "critic")
OPTIMIZERS = ("generator_optimizer", "critic_optimizer")
NUM_SAMPLES = 64
NUM_MEASURED = 500
COLUMNS = 8  # of the grids
MAY_CHANGE = {"out", "steps", "epochs", "resume", "fresh", "dry_run", "check_data", "skip_bad", "device", "compile",
              "cache_dir", "log_every", "sample_every", "evaluate_every", "checkpoint_every", "keep_checkpoints",
              "tensorboard"}


class TrainingError(ValueError):
    """The run cannot start, or cannot go on; the message says why and what would do."""


class Trainer:
    """The networks, their optimizers, and one update of each. The updates take tensors and read nothing from the device."""

    def __init__(self, config, device):
        torch.manual_seed(random_generator(config.seed, "weights").initial_seed())
        self.config, self.device = config, device
        self.generator = VAE(**config.model_arguments()).to(device)
        self.critic = Discriminator(image_size=config.image_size, base_channels=config.base_channels).to(device)
        # channels_last is what convolutions are fast in; the CNN's input is made frame by frame and stays as it is.
        for convolutions in (self.generator.encoder, self.generator.decoder, self.critic):
            convolutions.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.critic_optimizer = _adam(self.critic, config.critic_learning_rate)
        self.generator_optimizer = _adam(self.generator, config.generator_learning_rate)

    def critic_update(self, real, z, mixing, transform):
        """Moves the critic once; returns its metrics, detached. Arguments as in critic_losses."""
        metrics, norm = _optimize(self.critic_optimizer, *self.critic_losses(real, z, mixing, transform))
        return metrics | {"critic_gradient_norm": norm}

    def critic_losses(self, real, z, mixing, transform):
        """Returns what the critic minimises, and its metrics.

        Args:
            real: (N, C, H, W) in [0, 1].
            z: (N, Z) standard normal.
            mixing: (N, 1, 1, 1) uniform.
            transform: (N, RANDOM_NUMBERS) uniform, for augmentation.
        """
        with self._autocast():
            with torch.no_grad():
                fake = self.generator.decode(z)
            real, fake = self._augment(real, transform), self._augment(fake, transform)
            distance = -critic_loss(*self.critic(torch.cat([real, fake])).chunk(2))
            penalty = gradient_penalty(self.critic, real, fake, mixing=mixing)
            loss = self.config.gradient_penalty_weight * penalty - distance
        return loss, {"wasserstein_distance": distance, "gradient_penalty": penalty, "critic_loss": loss}

    def generator_update(self, real, z, noise, transform, ema_weight):
        """Moves the VAE, its CNN and its layer once, then their average; returns their metrics, detached.

        Args:
            real, z, noise, transform: as in generator_losses.
            ema_weight: a scalar tensor, how far the averaged weights move towards the new ones, in [0, 1].
        """
        self.critic.requires_grad_(False)
        try:
            metrics, norm = _optimize(self.generator_optimizer, *self.generator_losses(real, z, noise, transform))
        finally:
            self.critic.requires_grad_(True)
        with torch.no_grad():
            for average, new in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
                average.lerp_(new, ema_weight)
        return metrics | {"generator_gradient_norm": norm}

    def generator_losses(self, real, z, noise, transform):
        """Returns what the VAE minimises, and its metrics.

        Args:
            real, z, transform: as in critic_losses.
            noise: (N, Z) standard normal, for the latent vectors of the real images.
        """
        weights = self.config.reconstruction_weight, self.config.kl_weight
        with self._autocast():
            if any(weights):
                mu, logvar = self.generator.encode(real)
                z = torch.cat([z, self.generator.reparameterize(mu, logvar, noise=noise)])
            decoded = self.generator.decode_parts(z)
            generated, reconstruction = decoded.images[:len(real)], decoded.images[len(real):]
            loss = generator_loss(self.critic(self._augment(generated, transform)))
            metrics = {"generator_loss": loss}
            if any(weights):
                metrics["reconstruction"] = reconstruction_loss(reconstruction, real)
                metrics["kl_divergence"] = kl_divergence(mu, logvar)
                loss = loss + weights[0] * metrics["reconstruction"] + weights[1] * metrics["kl_divergence"]
        if decoded.alpha is not None:
            metrics["alpha"] = decoded.alpha.mean()
        return loss, metrics

    def set_rates(self, step):
        """Sets the rates for a step, counted from 0: rising for WARM_UP steps, from FULL_RATE on falling as 1 / step.

        At the full rate, the first steps of Adam can push a generator so far that its ReLUs are all dead. How a rate falls
        does not depend on the length of the run, so that a longer one goes on as if it had been asked for from the start.
        """
        done = step + 1
        part = min(1, done / configuration.WARM_UP, configuration.FULL_RATE / done)
        rates = self.config.generator_learning_rate, self.config.critic_learning_rate
        for optimizer, rate in zip(self._optimizers(), rates, strict=True):
            optimizer.param_groups[0]["lr"].fill_(rate * part)

    def tensors(self):
        """Returns all that the updates change, to be read or overwritten in place."""
        networks = self.generator, self.critic, self.averaged
        states = [state for optimizer in self._optimizers() for state in optimizer.state.values()]
        return ([parameter.detach() for network in networks for parameter in network.parameters()]
                + [value for state in states for value in state.values()])

    def gradients(self):
        """Returns the gradient of the last update of each network, as a vector: Adam's first moment, as its beta is 0."""
        return [torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
                for optimizer in self._optimizers()]

    def _optimizers(self):
        return self.generator_optimizer, self.critic_optimizer

    def state(self):
        """Returns what a checkpoint has to hold, as nested dicts of the tensors themselves."""
        return ({name: getattr(self, name).state_dict() for name in NETWORKS}
                | {name: getattr(self, name).state_dict()["state"] for name in OPTIMIZERS})

    def load_state(self, state):
        """Takes over a saved state, after checking that all of it fits; rates and the like stay those of the config.

        Raises:
            CheckpointError: what is missing, of another shape or type, or not finite.
        """
        own = self.state()
        for name, expected in own.items():
            check_tensors(state[name], expected, name)
        with torch.no_grad():
            _copy(state, own)

    def num_parameters(self):
        return [sum(p.numel() for p in network.parameters()) for network in (self.generator, self.critic)]

    def state_bytes(self):
        generator, critic = self.num_parameters()
        return 4 * (4 * generator + 3 * critic)  # float32: the weights, two moments of each, the averaged generator

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _augment(self, images, transform):
        return augment(images, transform) if self.config.augment else images


def _copy(source, target):
    """Copies nested dicts of tensors into others, in place."""
    for name, tensor in target.items():
        if isinstance(tensor, dict):
            _copy(source[name], tensor)
        else:
            tensor.copy_(source[name])


def _adam(network, learning_rate):
    """Returns an Adam whose moments exist from the start, not from the first step on."""
    parameters = list(network.parameters())
    on_cuda = parameters[0].is_cuda
    rate = torch.tensor(learning_rate, device=parameters[0].device)  # a tensor, so that a captured update reads it anew
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=ADAM_BETAS, fused=True, capturable=on_cuda)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # along no gradient, so nothing moves
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def _optimize(optimizer, loss, metrics):
    """One step down the loss; returns the metrics and the norm of the gradient, detached, as means over all processes.

    Where the loss or the norm is not finite, no weight moves.
    """
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    values = torch.stack([loss, *metrics.values()]).detach()
    parallel.average_([*gradients, values])
    norm = torch.nn.utils.get_total_norm(gradients)
    optimizer.found_inf = (~torch.isfinite(norm + values[0])).float()  # fused Adam skips its step, on the device
    optimizer.step()
    return dict(zip(metrics, values[1:].unbind(), strict=True)), norm


def train(config, *, interrupt=None):
    """Trains as `config` says and returns the run folder, or None where only the data was to be checked.

    Args:
        config: a Config.
        interrupt: an Interrupt, asked after every step whether to save and leave.

    Raises:
        ValueError: a setting that cannot work.
        DataError, CheckpointError, RunFolderError: what is wrong and what would do; nothing was written.
        TrainingError: a loss or a gradient is not finite, from which step on.
    """
    config.check()
    if config.check_data:
        return _check_data(config)
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise TrainingError("--tensorboard: needs the package tensorboard: pip install tensorboard")
    interrupt = interrupt or Interrupt()
    device = program.pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes never change, so the search for the fastest algorithm pays
    parallel.start(device)
    if config.batch_size % parallel.world_size():
        raise TrainingError(f"--batch-size: must be a multiple of {parallel.world_size()}, the number of processes, "
                            f"got {config.batch_size}")
    with parallel.lead_first():
        config = dataclasses.replace(config, data=str(_data_folder(config)))
        out, checkpoints, state = _find_run(config)
        config = _settle(config, state, device)
        data = load_images(config.data, config.image_size, cache_dir=config.cache_dir, skip_bad=config.skip_bad)
        try:
            trainer = Trainer(config, device)
        except RuntimeError as error:  # what torch raises for want of memory
            raise TrainingError(f"networks of this size cannot be made here: {str(error).splitlines()[0]}") from None
        if state:
            trainer.load_state(state)
    parallel.broadcast_(trainer.tensors())
    run = _Run(config, trainer, data, out, checkpoints, state)
    run.describe()
    if run.step >= run.total_steps and not config.dry_run:
        _say(f"{out} has all of its {run.step} steps: nothing is left to do. A larger --steps goes on from here")
        return out
    images = to_device_where_it_fits(data.images, device)
    _accelerate(trainer, images)
    if config.dry_run:
        metrics = _train_step(trainer, images, run.step, run.images_seen)
        _say("one step: " + ", ".join(f"{name} {value.item():.4g}" for name, value in metrics.items()))
        return out
    with run.opened():
        interrupt.defer()
        if run.step == 0 and run.leads:
            run.draw_samples()
        while run.step < run.total_steps and not interrupt.received_by_any():
            run.record(_train_step(trainer, images, run.step, run.images_seen))
            run.write_what_is_due()
        run.write_what_is_due(ending=True)
    if run.step < run.total_steps:
        again = "the same command without --fresh" if config.fresh else "the same command"
        _say(f"stopped after step {run.step}, saved; {again} goes on from there")
    else:
        _say(f"done: {run.step} steps; look at {out / 'samples' / f'step_{run.step:07d}.png'}")
    return out


def _train_step(trainer, images, step, images_seen):
    """One generator update with its critic updates; returns their metrics, on the device."""
    config = trainer.config
    trainer.set_rates(step)
    critic_metrics = []
    for update in range(config.critic_steps):
        batch = _critic_batch(trainer, images, step, update, images_seen)
        critic_metrics.append(trainer.critic_update(*batch))
        images_seen += config.batch_size
    metrics = trainer.generator_update(*_generator_batch(trainer, batch[0], step, images_seen))
    means = {name: torch.stack([one[name] for one in critic_metrics]).mean() for name in critic_metrics[0]}
    return means | metrics


def _critic_batch(trainer, images, step, update, images_seen):
    """This process's arguments of Trainer.critic_update."""
    config, n = trainer.config, trainer.config.batch_size
    indices = batch_indices(len(images), images_seen, n, seed=config.seed)
    draw = random_generator(config.seed, "critic", step, update)
    drawn = (torch.randn(n, config.latent_dim, generator=draw), torch.rand(n, 1, 1, 1, generator=draw),
             torch.rand(n, RANDOM_NUMBERS, generator=draw))
    return (take(images, parallel.own_part(indices), trainer.device),
            *(to_device(parallel.own_part(tensor), trainer.device) for tensor in drawn))


def _generator_batch(trainer, real, step, images_seen):
    """This process's arguments of Trainer.generator_update; `real` are the images of the critic's last one."""
    config, n = trainer.config, trainer.config.batch_size
    draw = random_generator(config.seed, "generator", step)
    drawn = (torch.randn(n, config.latent_dim, generator=draw), torch.randn(n, config.latent_dim, generator=draw),
             torch.rand(n, RANDOM_NUMBERS, generator=draw))
    half_life = min(config.ema_half_life_images, EMA_RAMP * images_seen)
    ema_weight = torch.tensor(1 - 0.5 ** (n * config.critic_steps / half_life))
    return (real, *(to_device(parallel.own_part(tensor), trainer.device) for tensor in drawn),
            to_device(ema_weight, trainer.device))


def _accelerate(trainer, images):
    """Runs the updates as --compile says, where that gives the same results."""
    compiled = trainer.config.compile == "on"
    # Collective operations have not been tried in a capture.
    captured = trainer.config.compile != "off" and trainer.device.type == "cuda" and parallel.world_size() == 1
    if compiled or captured:
        critic_batch = _critic_batch(trainer, images, 0, 0, 0)
        generator_batch = _generator_batch(trainer, critic_batch[0], 0, trainer.config.batch_size)
        batches = {"critic": critic_batch, "generator": generator_batch}
        accelerate(trainer, batches, compiled=compiled, capture=CapturedUpdate if captured else None, report=_say)


def _data_folder(config):
    folder = draw_demo_images(DEMO_FOLDER) if config.demo else pathlib.Path(config.data).expanduser()
    return folder.resolve()


def _check_data(config):
    folder = _data_folder(config)
    found = decode_folder(folder, config.image_size, cache_dir=config.cache_dir)
    _say(report(folder, config.image_size, found))
    bad = {facts.name: facts.fault for facts in found if facts.fault}
    check_readable(folder, bad, len(found), skip_bad=config.skip_bad)
    _say_skipped(bad)


def _say_skipped(bad):
    if bad:
        _say("\n".join([f"warning: {len(bad)} files cannot be read and are left out:",
                        *(f"  {name}: {reason}" for name, reason in bad.items())]))


def _say(text):
    if parallel.rank() == 0:
        program.say(text)


class _Run:
    """A run in progress: where it stands, and what it leaves in its folder."""

    def __init__(self, config, trainer, data, out, checkpoints, state):
        self.config, self.trainer, self.data, self.out, self.checkpoints = config, trainer, data, out, checkpoints
        self.leads = parallel.rank() == 0
        self.step = self.images_seen = 0
        self.elapsed_seconds = 0.0
        self.pending = []  # the metrics of each step since the last log, read only then
        self.board = None  # TensorBoard's writer, where --tensorboard asks for one
        self.num_images_before = len(data.images)
        if state:
            self.step, self.images_seen, self.elapsed_seconds = (
                state[name] for name in ("step", "images_seen", "elapsed_seconds"))
            self.num_images_before = state["num_images"]
            pending = state["pending_metrics"]
            self.pending = [dict(zip(pending, values, strict=True)) for values in zip(*pending.values(), strict=True)]
        self.images_per_step = config.batch_size * config.critic_steps
        self.total_steps = (config.steps if config.epochs is None
                            else math.ceil(config.epochs * len(data.images) / self.images_per_step))

    def describe(self):
        config, data = self.config, self.data
        generator, critic = self.trainer.num_parameters()
        classes = f" in {len(data.class_counts)} classes" if len(data.class_counts) > 1 else ""
        _say(f"data    {data.folder}: {len(data.images)} images{classes}, {config.image_size} px\n"
             f"models  generator {generator / 1e6:.1f} M parameters, critic {critic / 1e6:.1f} M; "
             f"{config.precision} on {self.trainer.device}\n"
             f"run     {self.out}, steps {self.step} to {self.total_steps} of {self.images_per_step} images")
        _say_skipped(data.skipped)
        if len(data.images) != self.num_images_before:
            _say(f"warning: the folder had {self.num_images_before} images, has {len(data.images)} from here on")
        if len(data.images) < config.batch_size:
            _say(f"warning: fewer images than --batch-size {config.batch_size}: batches hold some of them repeatedly")
        if config.dry_run:
            for name, value in dataclasses.asdict(config).items():
                _say(f"{configuration.option_name(name):26} {value}")
            _say(f"memory  {self.trainer.state_bytes():,} bytes of weights and optimizer state; "
                 "a checkpoint takes as much on the disk")

    @contextlib.contextmanager
    def opened(self):
        """Within this context the run folder is held and ready, and the clock runs."""
        with contextlib.ExitStack() as held:
            with parallel.lead_first():
                if self.leads:
                    held.enter_context(open_run_folder(
                        self.out, dataclasses.asdict(self.config), step=self.step, checkpoints=self.checkpoints,
                        bytes_needed=self.trainer.state_bytes() * (self.config.keep_checkpoints + 1)))
            seed = self.config.seed
            self.noise = latent_noise(seed, range(NUM_SAMPLES), self.config.latent_dim)
            first = batch_indices(len(self.data.images), 0, NUM_SAMPLES, seed=seed)
            self.reals = take(self.data.images, first, torch.device("cpu"))
            if self.leads:
                save_picture(grid(self.reals, columns=COLUMNS), self.out / "reals.png")
                if self.config.tensorboard:
                    self.board = held.enter_context(_board(self.out / "tensorboard", self.step))
            self.progress = tqdm(total=self.total_steps * self.images_per_step, unit=" images", unit_scale=True,
                                 initial=self.step * self.images_per_step, smoothing=0.05,
                                 disable=None if self.leads else True)
            self.start = self.last_log = time.perf_counter()
            self.steps_since_last_log = 0
            with self.progress:
                yield

    def record(self, metrics):
        """Counts one step."""
        self.step += 1
        self.steps_since_last_log += 1
        self.images_seen += self.images_per_step
        if self.pending and self.pending[-1].keys() != metrics.keys():
            self.pending = []  # resumed with other terms in the loss
        self.pending.append(metrics)
        self.progress.update(self.images_per_step)

    def write_what_is_due(self, *, ending=False):
        """Logs, saves and draws after a step where it is time to; at the end, saves and draws where it was not.

        All processes look for what is not finite, which is the same in all of them, and so stop together; rank 0 writes.
        """
        config = self.config
        if self.step % config.log_every == 0 and not ending:
            self.log()
        if config.evaluate_every and self.step % config.evaluate_every == 0 and not ending and self.leads:
            self.measure()
        if (self.step % config.checkpoint_every == 0) != ending:
            self.save()
        if (self.step % config.sample_every == 0) != ending and self.leads:
            self.draw_samples()

    def log(self):
        """Appends a line to metrics.jsonl: the means since the line before."""
        metrics = self._mean_metrics()
        now = time.perf_counter()
        speed = self.steps_since_last_log * self.images_per_step / (now - self.last_log)
        self.pending, self.last_log, self.steps_since_last_log = [], now, 0
        if not self.leads:
            return
        metrics["images_per_second"] = round(speed, 2)
        append_metrics(self.out, {"step": self.step, "images": self.images_seen, **metrics,
                                  "elapsed_seconds": round(self._elapsed(), 2)})
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, self.step)
        shown = {"W": metrics["wasserstein_distance"], "GP": metrics["gradient_penalty"]}
        if "reconstruction" in metrics:
            shown["rec"] = metrics["reconstruction"]
        if self.progress.disable:  # not a terminal: lines instead of a bar
            left = (self.total_steps - self.step) * self.images_per_step / speed
            _say(f"step {self.step}/{self.total_steps}  " + "  ".join(f"{k} {v:.3g}" for k, v in shown.items())
                 + f"  {speed:.1f} images/s  {tqdm.format_interval(left)} left")
        self.progress.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)

    def _mean_metrics(self):
        """The means over the steps since the last log, read from the device; raises if one of them was not finite."""
        if not self.pending:
            return {}
        values = torch.stack([self._pending_values(name) for name in self.pending[0]], dim=1)  # a row for each step
        for row, column in (~values.isfinite()).nonzero().tolist()[:1]:  # the first of the earliest step
            raise TrainingError(
                f"step {self.step - len(values) + row + 1}: {list(self.pending[0])[column]} is {values[row, column]}. That "
                f"update was not made, and the newest checkpoint in {self.out / 'checkpoints'} is from before it. Lower "
                "--critic-learning-rate and --generator-learning-rate")
        return dict(zip(self.pending[0], values.mean(dim=0).tolist(), strict=True))

    def _pending_values(self, name):
        return torch.stack([metrics[name].float().cpu() for metrics in self.pending])

    def _elapsed(self):
        return self.elapsed_seconds + time.perf_counter() - self.start

    @torch.no_grad()
    def draw_samples(self):
        """Draws what the averaged generator makes of fixed noise and of some real images, its alpha, and the log."""
        started = time.perf_counter()
        vae, device, batch = self.trainer.averaged, self.trainer.device, self.config.batch_size
        decoded = [vae.decode_parts(z.to(device)) for z in self.noise.split(batch)]
        self._draw("samples", grid(torch.cat([part.images.cpu() for part in decoded]), columns=COLUMNS))
        real = self.reals[:2 * COLUMNS]
        again = torch.cat([vae.decode(vae.encode(part.to(device))[0]).cpu() for part in real.split(batch)])
        rows = torch.cat([real[:COLUMNS], again[:COLUMNS], real[COLUMNS:], again[COLUMNS:]])
        self._draw("reconstructions", grid(rows, columns=COLUMNS))
        if decoded[0].alpha is not None:
            before, alpha, after = (torch.cat([getattr(part, name).cpu() for part in decoded])[:COLUMNS]
                                    for name in ("before", "alpha", "images"))
            self._draw("alpha_maps", alpha_picture(before, alpha, after, columns=2))
        draw_curves(self.out)
        self.last_log += time.perf_counter() - started  # drawing is not counted in images per second

    def _draw(self, kind, picture):
        save_picture(picture, self.out / kind / f"step_{self.step:07d}.png")
        if self.board:
            self.board.add_image(kind, picture, self.step)

    @torch.no_grad()
    def measure(self):
        """Logs the sliced Wasserstein distance between generated and real images; keeps the best generator as best.pt."""
        started = time.perf_counter()
        seed, vae, before = self.config.seed, self.trainer.averaged, read_metrics(self.out)
        real = pick(self.data.images, NUM_MEASURED)
        noise = latent_noise(seed, range(len(real)), self.config.latent_dim).split(self.config.batch_size)
        fake = torch.cat([vae.decode(z.to(self.trainer.device)).cpu() for z in noise])
        distances = sliced_wasserstein(real, fake, generator=random_generator(seed, "patches"))
        distance = statistics.mean(distances.values())
        append_metrics(self.out, {"step": self.step, "sliced_wasserstein": distance})
        if self.board:
            self.board.add_scalar("sliced_wasserstein", distance, self.step)
        if distance < min((line.get("sliced_wasserstein", math.inf) for line in before), default=math.inf):
            state = {"step": self.step} | self._facts() | self.trainer.state()
            save_generator(self.out / "checkpoints" / "best.pt", state)
        self.last_log += time.perf_counter() - started  # measuring is not counted in images per second

    def save(self):
        """Writes a checkpoint, unless something in it is not finite."""
        self._mean_metrics()
        state = self.trainer.state()
        if not _all_finite(state):
            raise TrainingError(f"step {self.step}: a weight is not finite; this step was not saved")
        if not self.leads:
            return
        save_checkpoint(self.out / "checkpoints", self.step, self._facts() | state, keep=self.config.keep_checkpoints)

    def _facts(self):
        """What a checkpoint holds beside the state of the networks."""
        return {"images_seen": self.images_seen, "elapsed_seconds": self._elapsed(), "num_images": len(self.data.images),
                "config": dataclasses.asdict(self.config), "model_arguments": self.config.model_arguments(),
                "pending_metrics": {name: self._pending_values(name) for name in (self.pending[-1] if self.pending else ())}}


def _board(folder, step):
    """TensorBoard's writer; what an earlier process has written beyond a step is passed over."""
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(folder, purge_step=step + 1)


class Interrupt:
    """Turns Ctrl-C, SIGTERM and the loss of the terminal into a request to finish the step, save and leave.

    A second Ctrl-C leaves at once. Handles the signals only inside its own `with`.
    """

    def __init__(self):
        self.received = 0  # the number of the signal
        self._deferred = False

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._on_terminal = os.isatty(2)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self):
        """From here on a signal is only noted; up to here it ends what is being prepared."""
        self._deferred = True

    def received_by_any(self):
        """Whether any of the processes has received a signal; if so, all have."""
        number = parallel.largest(self.received)
        if number:  # one of our own may have come in the meantime, and is for the next step then
            self.received = number
        return number > 0

    def _handle(self, number, frame):
        # torchrun passes on what a process may have had already, and so does a shell that is closed.
        if self.received and number == signal.SIGINT and parallel.world_size() == 1:
            os._exit(128 + number)
        if self._on_terminal and number == getattr(signal, "SIGHUP", None):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the progress bar has nowhere to go
        self.received = number
        if not self._deferred:
            raise KeyboardInterrupt


def _keep_freed_memory():
    """Asks glibc to reuse freed memory: handing it back costs a page fault for every page of every activation."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:
            return
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD


def _find_run(config):
    """Returns the run folder, the checkpoints in it, and the state to go on from, None at the start of a run."""
    identity = {"data": config.data, **config.model_arguments()}
    name = "demo" if config.demo else pathlib.Path(config.data).name
    fresh = config.fresh and not parallel.restarted()
    out = choose_run_folder(config.out or f"runs/{name}", identity, exactly=bool(config.out), fresh=fresh)
    if pathlib.Path(os.path.realpath(out)).is_relative_to(config.data):
        raise RunFolderError(f"--out: {out} is inside --data {config.data}, and its pictures would be trained on")
    checkpoints = list_checkpoints(out / "checkpoints")
    state = load_newest(out / "checkpoints", report=_say)
    if config.resume:
        if state is None:
            state = load_checkpoint(config.resume)
            if not state["critic"]:
                raise CheckpointError(f"--resume: {config.resume} holds a generator alone, which cannot be trained further")
        elif state["config"].get("resume") != config.resume:
            raise RunFolderError(f"--resume: {out} already holds a run; name a new folder with --out")
    return out, checkpoints, state


def _settle(config, state, device):
    """Returns the config with its precision chosen, once for a run; refuses another model, reports other changes."""
    if state:
        saved, model = state["config"], state["model_arguments"]
        faults = [f"{configuration.option_name(name)}: this run has {model.get(name)}, got {value}; --out names another "
                  "folder" for name, value in config.model_arguments().items() if model.get(name) != value]
        if saved.get("data") != config.data and not config.resume:
            faults.append(f"--data: this run has {saved.get('data')}, got {config.data}; --out names another folder, where "
                          "--resume goes on from a checkpoint of this one")
        if faults:
            raise CheckpointError("\n".join(faults))
        if config.precision == "auto":
            if saved.get("precision") not in ("float32", "bfloat16"):
                raise CheckpointError(f"the checkpoint has no precision that is known: {saved.get('precision')}")
            config = dataclasses.replace(config, precision=saved["precision"])
        for name, value in dataclasses.asdict(config).items():
            if name not in MAY_CHANGE and saved.get(name) != value:
                _say(f"warning: {configuration.option_name(name)} was {saved.get(name)}, is {value} from here on")
    elif config.precision == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                else device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        config = dataclasses.replace(config, precision="bfloat16" if fast else "float32")
    return config


def _all_finite(value):
    """Whether every tensor in nested dicts and lists is finite."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict | list):
        return all(map(_all_finite, value.values() if isinstance(value, dict) else value))
    return True


def main(arguments=None):
    config = configuration.from_command_line(arguments)
    _keep_freed_memory()
    status = 0
    with program.output(), Interrupt() as interrupt:
        try:
            train(config, interrupt=interrupt)
            parallel.stop()
        except parallel.LeaderError:
            status = 2
        except (TrainingError, RunFolderError, DataError, CheckpointError, program.DeviceError, OSError) as error:
            status = 2
            met_by_all = isinstance(error, TrainingError | program.DeviceError)
            if parallel.rank() == 0 or not met_by_all:
                program.complain(str(error))
        except KeyboardInterrupt:
            if parallel.rank() == 0:
                program.complain("stopped while preparing; nothing was left half done")
    return status or (128 + interrupt.received if interrupt.received else 0)


if __name__ == "__main__":
    sys.exit(main())
