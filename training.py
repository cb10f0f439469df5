"""Trains the VAE with its CNNParamTanh layer as the generator of a WGAN-GP: python training.py --data ./images

A step is some critic updates and one generator update. All randomness is drawn on the CPU as a function of (seed, purpose,
step), and the order of the images is a function of (seed, epoch): a checkpoint holds no random state, and running the same
command again continues the same run.
"""
import copy
import ctypes
import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time

import torch
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import config as configuration
from augmentation import RANDOM_NUMBERS, augment
from checkpointing import CheckpointError, load_checkpoint, load_newest, save_checkpoint
from demo_images import draw_demo_images
from image_data import DataError, batch_indices, load_images, random_generator, to_float
from losses import critic_loss, generator_loss, gradient_penalty, kl_divergence, reconstruction_loss
from model_definitions import VAE, Discriminator

DEMO_FOLDER = pathlib.Path("demo_images")
ADAM_BETAS = (0.0, 0.9)  # Gulrajani et al. 2017: momentum in the critic's gradient unsettles the penalty
EMA_RAMP = 0.05  # the half-life of the average is at most this part of the images seen
NUM_SAMPLES = 64
NUM_RECONSTRUCTIONS = 16
MAY_CHANGE = {"out", "steps", "epochs", "resume", "fresh", "dry_run", "device", "cache_dir", "log_every", "sample_every",
              "checkpoint_every", "keep_checkpoints"}


class RunError(ValueError):
    """The run cannot start, or cannot go on; the message says why and what would do."""


class Trainer:
    """The networks, their optimizers, and one update of each. The updates take tensors and read nothing from the device."""

    def __init__(self, config, device):
        torch.manual_seed(config.seed)
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
        """Moves the critic once; returns its metrics, detached.

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
            distance = -critic_loss(*self.critic(torch.cat([real, fake])).float().chunk(2))
            penalty = gradient_penalty(self.critic, real, fake, mixing=mixing)
            loss = self.config.gradient_penalty_weight * penalty - distance
        gradient_norm = _optimize(self.critic_optimizer, loss)
        return _detached(critic_loss=loss, wasserstein_distance=distance, gradient_penalty=penalty,
                         critic_gradient_norm=gradient_norm)

    def generator_update(self, real, z, noise, transform, ema_weight):
        """Moves the VAE, its CNN and its layer once, then their average; returns their metrics, detached.

        Args:
            real, z, transform: as in critic_update.
            noise: (N, Z) standard normal, for the latent vectors of the real images.
            ema_weight: how far the averaged weights move towards the new ones, in [0, 1].
        """
        weights = self.config.reconstruction_weight, self.config.kl_weight
        self.critic.requires_grad_(False)
        with self._autocast():
            if any(weights):
                mu, logvar = self.generator.encode(real)
                z = torch.cat([z, self.generator.reparameterize(mu, logvar, noise=noise)])
            decoded = self.generator.decode_parts(z)
            generated, reconstruction = decoded.images[:len(real)], decoded.images[len(real):]
            loss = generator_loss(self.critic(self._augment(generated, transform)).float())
            metrics = {"generator_loss": loss}
            if any(weights):
                metrics["reconstruction"] = reconstruction_loss(reconstruction, real)
                metrics["kl_divergence"] = kl_divergence(mu, logvar)
                loss = loss + weights[0] * metrics["reconstruction"] + weights[1] * metrics["kl_divergence"]
        if decoded.alpha is not None:
            metrics["alpha"] = decoded.alpha.mean()
        metrics["generator_gradient_norm"] = _optimize(self.generator_optimizer, loss)
        self.critic.requires_grad_(True)
        with torch.no_grad():
            for average, new in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
                average.lerp_(new, ema_weight)
        return _detached(**metrics)

    def state(self):
        return {name: getattr(self, name).state_dict() for name in self._parts()}

    def load_state(self, state):
        try:
            for name in self._parts():
                getattr(self, name).load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit these networks: {' '.join(str(error).split())}") from None

    def num_parameters(self):
        return [sum(p.numel() for p in network.parameters()) for network in (self.generator, self.critic)]

    def _parts(self):
        return ("generator", "averaged", "critic", "generator_optimizer", "critic_optimizer")

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _augment(self, images, transform):
        return augment(images, transform) if self.config.augment else images


def _adam(network, learning_rate):
    return torch.optim.Adam(network.parameters(), lr=learning_rate, betas=ADAM_BETAS, fused=True)


def _optimize(optimizer, loss):
    """One step down the loss; returns the norm of the gradient. Where either is not finite, no weight moves."""
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    optimizer.found_inf = (~torch.isfinite(norm + loss.detach())).float()  # fused Adam skips its step, on the device
    optimizer.step()
    return norm


def _detached(**metrics):
    return {name: value.detach() for name, value in metrics.items()}


def train(config, *, interrupt=None):
    """Trains as `config` says and returns the run folder.

    Args:
        config: a Config.
        interrupt: an Interrupt, asked after every step whether to save and leave.

    Raises:
        ValueError, RunError, DataError, CheckpointError: what is wrong and what would do, before anything is written, or,
            for a loss that is not finite, after the newest checkpoint.
    """
    config.check()
    interrupt = interrupt or Interrupt()
    if config.demo:
        config = dataclasses.replace(config, data=str(draw_demo_images(DEMO_FOLDER)))
    _keep_freed_memory()
    device = _pick_device(config.device)
    out, state = _open_run(config)
    config = _settle(config, state, device)
    data = load_images(config.data, config.image_size, cache_dir=config.cache_dir)
    trainer = Trainer(config, device)
    step = _restore(trainer, state, data)
    total_steps = _total_steps(config, len(data.images))
    _describe(config, trainer, data, out, step, total_steps)
    if config.dry_run:
        metrics = _train_step(trainer, data.images, 0, 0)
        tqdm.write("one step: " + ", ".join(f"{name} {value.item():.4g}" for name, value in metrics.items()))
        return out
    if step >= total_steps:
        tqdm.write(f"{out} has its {step} steps: nothing is left to do; a larger --steps goes on from here")
        return out
    run = _Run(config, trainer, data, out, state)
    images_per_step = config.batch_size * config.critic_steps
    with interrupt.deferred(), tqdm(total=total_steps * images_per_step, initial=step * images_per_step, unit=" images",
                                    unit_scale=True, smoothing=0.05, disable=None) as progress:
        if step == 0:
            run.draw_samples(0)
        while step < total_steps and not interrupt.received:
            run.record(_train_step(trainer, data.images, step, run.images_seen), images_per_step)
            step += 1
            progress.update(images_per_step)
            last = step == total_steps
            if step % config.log_every == 0:
                run.log(step, progress)
            if step % config.sample_every == 0 or last:
                run.draw_samples(step)
            if step % config.checkpoint_every == 0 or last or interrupt.received:
                run.save(step)
    if interrupt.received:
        tqdm.write(f"stopped after step {step}, saved; the same command goes on from there")
    else:
        tqdm.write(f"done: {step} steps; look at {out / 'samples' / f'step_{step:07d}.png'}")
    return out


def _train_step(trainer, images, step, images_seen):
    """One generator update with its critic updates; returns their metrics, on the device."""
    config = trainer.config
    n, z = config.batch_size, config.latent_dim
    for update in range(config.critic_steps):
        indices = batch_indices(len(images), images_seen + update * n, n, seed=config.seed)
        real = to_float(images[indices], trainer.device)
        random = random_generator(config.seed, "critic", step, update)
        metrics = trainer.critic_update(real, *_to(trainer.device, torch.randn(n, z, generator=random),
                                                   torch.rand(n, 1, 1, 1, generator=random),
                                                   torch.rand(n, RANDOM_NUMBERS, generator=random)))
    random = random_generator(config.seed, "generator", step)
    images_per_step = n * config.critic_steps
    half_life = min(config.ema_half_life_images, EMA_RAMP * (images_seen + images_per_step))
    return metrics | trainer.generator_update(real, *_to(trainer.device, torch.randn(n, z, generator=random),
                                                         torch.randn(n, z, generator=random),
                                                         torch.rand(n, RANDOM_NUMBERS, generator=random)),
                                              ema_weight=1 - 0.5 ** (images_per_step / half_life))


def _to(device, *tensors):
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


class _Run:
    """The run folder of a run in progress: its log, pictures and checkpoints."""

    def __init__(self, config, trainer, data, out, state):
        self.config, self.trainer, self.data, self.out = config, trainer, data, out
        state = state or {}
        self.images_seen = state.get("images_seen", 0)
        self.elapsed_seconds = state.get("elapsed_seconds", 0.0)
        self.pending = state.get("pending_metrics", [])  # one dict a step since the last log, read only then
        self.resumed = self.logged = time.perf_counter()
        self.timed_steps = 0
        out.mkdir(parents=True, exist_ok=True)
        _check_room(trainer, config, out)
        _write_text(out / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        _truncate_metrics(out / "metrics.jsonl", state.get("step", 0))
        self.noise = torch.randn(NUM_SAMPLES, config.latent_dim, generator=random_generator(config.seed, "samples"))
        self.reals = to_float(data.images[batch_indices(len(data.images), 0, NUM_SAMPLES, seed=config.seed)], "cpu")
        _save_grid(self.reals, out / "reals.png", columns=8)

    def record(self, metrics, num_images):
        self.pending.append(metrics)
        self.images_seen += num_images
        self.timed_steps += 1

    def log(self, step, progress):
        """Appends a line to metrics.jsonl: the means since the line before."""
        metrics = self._read_metrics(step)
        self.pending = []
        now = time.perf_counter()
        speed = self.timed_steps * self.config.batch_size * self.config.critic_steps / (now - self.logged)
        self.logged, self.timed_steps = now, 0
        line = {"step": step, "images": self.images_seen, **metrics, "images_per_second": round(speed, 2),
                "elapsed_seconds": round(self.elapsed_seconds + now - self.resumed, 2)}
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {"W": metrics["wasserstein_distance"], "GP": metrics["gradient_penalty"],
                 "rec": metrics.get("reconstruction", 0.0)}
        if progress.disable:
            tqdm.write(f"step {step}  " + "  ".join(f"{k} {v:.3g}" for k, v in shown.items()) + f"  {speed:.1f} images/s")
        else:
            progress.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)

    def _read_metrics(self, step):
        """The means since the last log, read from the device; stops the run if any step of them was not finite."""
        means = {}
        for name in self.pending[0] if self.pending else ():
            values = torch.stack([metrics[name].float().cpu() for metrics in self.pending])
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                at = step - len(values) + int(bad[0]) + 1
                raise RunError(f"step {at}: {name} is {values[bad[0]].item()}; that update was not made. "
                               f"The newest checkpoint in {self.out / 'checkpoints'} is from before it; lower "
                               "--critic-learning-rate and --generator-learning-rate, or look at the images")
            means[name] = values.mean().item()
        return means

    @torch.no_grad()
    def draw_samples(self, step):
        """Writes what the averaged generator makes of the fixed noise, and of some real images."""
        started = time.perf_counter()
        vae, device, size = self.trainer.averaged, self.trainer.device, self.config.batch_size
        name = f"step_{step:07d}.png"
        decoded = [vae.decode_parts(z.to(device)) for z in self.noise.split(size)]
        _save_grid(torch.cat([part.images.cpu() for part in decoded]), self.out / "samples" / name, columns=8)
        real = self.reals[:NUM_RECONSTRUCTIONS]
        again = torch.cat([vae.decode(vae.encode(part.to(device))[0]).cpu() for part in real.split(size)])
        half = NUM_RECONSTRUCTIONS // 2
        rows = torch.cat([real[:half], again[:half], real[half:], again[half:]])
        _save_grid(rows, self.out / "reconstructions" / name, columns=half)
        if decoded[0].alpha is not None:
            first = decoded[0]
            alpha = first.alpha.expand(len(first.images), -1, -1, -1)
            low, high = alpha.aminmax()
            grey = ((alpha - low) / (high - low).clamp(min=1e-6)).expand_as(first.images)
            rows = torch.cat([part[:half].cpu() for part in (first.before, grey, first.images)])
            _save_grid(rows, self.out / "alpha_maps" / name, columns=min(half, len(first.images)))
        self.logged += time.perf_counter() - started  # drawing does not count as training

    def save(self, step):
        self._read_metrics(step)
        state = self.trainer.state()
        if not all(tensor.isfinite().all() for tensor in _tensors(state)):
            raise RunError(f"step {step}: a weight is not finite; nothing was saved")
        save_checkpoint(self.out / "checkpoints", step, {
            "images_seen": self.images_seen, "elapsed_seconds": self.elapsed_seconds + time.perf_counter() - self.resumed,
            "num_images": len(self.data.images), "config": dataclasses.asdict(self.config),
            "model_arguments": self.config.model_arguments(), "pending_metrics": self.pending, **state,
        }, keep=self.config.keep_checkpoints)


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a request to finish the step, save and leave; a second one leaves at once."""

    def __init__(self):
        self.received = None
        self._deferred = False

    def install(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def deferred(self):
        """Within this context a signal is only noted; outside it ends what is being prepared."""
        return self

    def __enter__(self):
        self._deferred = True

    def __exit__(self, *_):
        self._deferred = False

    def _handle(self, number, frame):
        if self.received:
            os._exit(128 + number)
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


def _pick_device(name):
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    elif not available[name]:
        raise RunError(f"--device: {name} is not available here; there is {', '.join(k for k in available if available[k])}")
    return torch.device(name)


def _open_run(config):
    """Returns the run folder and the state to go on from, None at the start of a run."""
    base = pathlib.Path(config.out) if config.out else configuration.default_out(config)
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    used = [folder for folder in candidates[:next(i for i, c in enumerate(candidates) if not c.exists())]]
    if config.fresh:
        out = candidates[len(used)]
    elif config.out:
        out = base
    else:
        out = next((folder for folder in reversed(used) if _belongs(folder, config)), candidates[len(used)])
    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {out} is a file, a folder is needed")
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise RunError(f"--out: {out} holds other things; name an empty or a new folder")
    state = load_newest(out / "checkpoints", report=tqdm.write)
    if state is None and config.resume:
        state = load_checkpoint(config.resume)
    return out, state


def _belongs(folder, config):
    """Whether a run folder holds the same data folder and model."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        same_data = pathlib.Path(saved["data"]).expanduser().resolve() == pathlib.Path(config.data).expanduser().resolve()
        return same_data and all(saved[name] == value for name, value in config.model_arguments().items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _settle(config, state, device):
    """Returns the config with its precision chosen, once for a run; refuses another model, reports other changes."""
    if state:
        saved = state["config"]
        faults = [f"{configuration.option_name(name)}: this run has {saved[name]}, got {value}; --fresh starts another run"
                  for name, value in config.model_arguments().items() if saved[name] != value]
        if faults:
            raise RunError("\n".join(faults))
        if config.precision == "auto":
            config = dataclasses.replace(config, precision=saved["precision"])
        for name, value in dataclasses.asdict(config).items():
            if name not in MAY_CHANGE and saved.get(name) != value:
                tqdm.write(f"warning: {configuration.option_name(name)} was {saved.get(name)}, is {value} from here on")
    elif config.precision == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                else device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        config = dataclasses.replace(config, precision="bfloat16" if fast else "float32")
    return config


def _restore(trainer, state, data):
    """Puts a saved state into the trainer and returns its step, 0 where there is none."""
    if state is None:
        return 0
    if state["num_images"] != len(data.images):
        tqdm.write(f"warning: {data.folder} had {state['num_images']} images, has {len(data.images)} from here on")
    trainer.load_state(state)
    return state["step"]


def _total_steps(config, num_images):
    if config.epochs is None:
        return config.steps
    return math.ceil(config.epochs * num_images / (config.batch_size * config.critic_steps))


def _describe(config, trainer, data, out, step, total_steps):
    generator, critic = trainer.num_parameters()
    classes = [name for name in data.class_counts if name]
    lines = [f"data    {data.folder}: {len(data.images)} images"
             + (f" in {len(classes)} classes" if classes else "") + f", {config.image_size} px",
             f"models  generator {generator / 1e6:.1f} M parameters, critic {critic / 1e6:.1f} M, {config.precision} on "
             f"{trainer.device}",
             f"run     {out}, steps {step} to {total_steps} of {config.batch_size} x {config.critic_steps} images"]
    if len(data.images) < config.batch_size:
        lines.append(f"warning: fewer images than --batch-size {config.batch_size}: a batch holds some of them repeatedly")
    if config.dry_run:
        lines += [f"{configuration.option_name(name):28} {value}" for name, value in dataclasses.asdict(config).items()]
        lines.append(f"memory  {_state_bytes(trainer):,} bytes of weights and optimizer state, the same on the disk for "
                     "each checkpoint")
    tqdm.write("\n".join(lines))


def _state_bytes(trainer):
    generator, critic = trainer.num_parameters()
    return 4 * (4 * generator + 3 * critic)  # weights and two moments of each, and the averaged generator


def _check_room(trainer, config, out):
    needed, free = _state_bytes(trainer) * (config.keep_checkpoints + 1), shutil.disk_usage(out).free
    if needed > free:
        raise RunError(f"--out: {config.keep_checkpoints} checkpoints and one being written need {needed:,} bytes in {out}, "
                       f"{free:,} are free")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _write_text(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _truncate_metrics(path, step):
    """Drops the lines after `step`, which the run is about to write again, and a line that a crash left torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    _write_text(path, "".join(kept))


def _save_grid(images, path, *, columns):
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    save_image(make_grid(images, nrow=columns, padding=2, pad_value=1.0), temporary, format="png")
    os.replace(temporary, path)


def main(arguments=None):
    config = configuration.from_command_line(arguments)
    interrupt = Interrupt()
    interrupt.install()
    try:
        train(config, interrupt=interrupt)
    except (RunError, DataError, CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped while preparing; nothing was left half done", file=sys.stderr)
    return 128 + interrupt.received if interrupt.received else 0


if __name__ == "__main__":
    sys.exit(main())
