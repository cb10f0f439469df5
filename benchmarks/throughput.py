"""How fast training is, beside the loop that people commonly write, and beside what the device could do at best.

    python benchmarks/throughput.py [--data DIR] [--image-size 128|128x224] [--batch-size 16]

Every row of the first table is a process of its own. It takes its steps in turn with the plain loop, so that a machine that
is busy for a while slows both, and the ratio stays.
"""
import argparse
import copy
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import rows
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import training
from checkpointing import critic_arguments
from config import Config
from demo_images import draw_demo_images
from devices import keep_freed_memory, pick_precision
from fast_paths import parts_without_video, written_out_gradient
from image_data import as_float_images, batch_indices, load_images, to_device_if_it_fits
from image_sizes import height_and_width, size_text
from losses import critic_loss, generator_loss, gradient_penalty, kl_divergence, reconstruction_loss
from model_definitions import VAE, Discriminator
from wgan_gp import GAN

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STEPS = 50 if CUDA else 1  # between two readings of the clock; a GPU works on while the next steps are prepared
ROUNDS = 9
WORKERS = 2  # of the plain loop's DataLoader
MEASURES = {  # each row has all of those above it
    "plain": "plain loop",
    "cache": "+ images decoded once",
    "joined": "+ real and fake in one pass, nothing read",
    "pooling": "+ pooling before ReLU",
    "layer": "+ the layer without a whole video",
    "channels_last": "+ channels_last",
    "bfloat16": "+ bfloat16",
    "penalty": "+ the penalty without double backward",
    "fused": "+ fused Adam",
    "memory": "+ freed memory kept",
}
SHIPPED = {
    "off": "as shipped, --compile off",
    "auto": "as shipped",
    "float32": "as shipped, --precision float32",
    "on": "as shipped, --compile on",
    "processes": "as shipped, 2 processes",
}


def plain_loop(config, measures):
    """Yields after every step of the same networks and algorithm, with the given ones of MEASURES."""
    torch.manual_seed(0)
    generator = VAE(**config.model_arguments()).to(DEVICE)
    critic = Discriminator(**critic_arguments(config.model_arguments())).to(DEVICE)
    if "pooling" not in measures:
        order = [start + layer for start in range(0, len(critic.blocks), 3) for layer in (0, 2, 1)]
        generator.encoder, critic.blocks = (nn.Sequential(*(blocks[index] for index in order))
                                            for blocks in (generator.encoder, critic.blocks))
    if "layer" in measures and not CUDA:
        generator.output_layer.parts = functools.partial(parts_without_video, generator.output_layer)
    if "channels_last" in measures:
        for convolutions in (generator.encoder, generator.decoder, critic):
            convolutions.to(memory_format=torch.channels_last)
    if "memory" in measures:
        keep_freed_memory()
    averaged = copy.deepcopy(generator).requires_grad_(False)
    critic_optimizer, generator_optimizer = (torch.optim.Adam(network.parameters(), lr=4e-4, betas=(0.0, 0.9),
                                                              fused="fused" in measures or None)
                                             for network in (critic, generator))
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled="bfloat16" in measures)
    input_gradient = functools.partial(written_out_gradient, critic) if "penalty" in measures else None
    batches = _cached_batches(config) if "cache" in measures else _loaded_batches(config)
    n = config.batch_size
    for real in batches:
        with autocast:
            with torch.no_grad():
                fake = generator.decode(torch.randn(n, config.latent_dim, device=DEVICE))
            scores = critic(torch.cat([real, fake])).chunk(2) if "joined" in measures else (critic(real), critic(fake))
            penalty = gradient_penalty(critic, real, fake, input_gradient=input_gradient)
            loss = critic_loss(*scores) + config.gradient_penalty_weight * penalty
        _descend(critic_optimizer, loss, read="joined" not in measures)
        critic.requires_grad_("joined" not in measures)  # commonly left on, so that gradients nobody uses are computed
        with autocast:
            z = torch.randn(n, config.latent_dim, device=DEVICE)
            mu, logvar = generator.encode(real)
            if "joined" in measures:
                generated, reconstruction = generator.decode(torch.cat([z, generator.reparameterize(mu, logvar)])).chunk(2)
            else:
                generated, reconstruction = generator.decode(z), generator.decode(generator.reparameterize(mu, logvar))
            loss = (generator_loss(critic(generated)) + reconstruction_loss(reconstruction, real)
                    + config.kl_weight * kl_divergence(mu, logvar))
        _descend(generator_optimizer, loss, read="joined" not in measures)
        critic.requires_grad_(True)
        with torch.no_grad():
            for average, new in zip(averaged.parameters(), generator.parameters(), strict=True):
                average.lerp_(new, 0.01)
        yield


def _descend(optimizer, loss, *, read):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if read:
        loss.item()


def _loaded_batches(config):
    sides = height_and_width(config.image_size)
    transform = transforms.Compose([transforms.Resize(max(sides)), transforms.CenterCrop(sides), transforms.ToTensor()])
    loader = DataLoader(ImageFolder(config.data, transform), config.batch_size, shuffle=True, num_workers=WORKERS,
                        drop_last=True, persistent_workers=True)
    while True:
        for images, _ in loader:
            yield images.to(DEVICE)


def _cached_batches(config):
    images = load_images(config.data, config.image_size, cache_dir=config.cache_dir).images
    for position in itertools.count(0, config.batch_size):
        yield as_float_images(images, batch_indices(len(images), position, config.batch_size, seed=0), DEVICE)


def clock():
    """Each next() is the start of a step. After STEPS of them, reports the seconds that they took, and waits to go on."""
    while sys.stdin.readline():
        _synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            yield None
        _synchronize()
        print(json.dumps([time.perf_counter() - started, _peak_memory()]), flush=True)


def _peak_memory():
    if CUDA:
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def floor(config, ticks):
    """Takes the time of the step's convolutions alone, each forward and backward, and prints what the step would need.

    The work of a step, in passes through the networks: F is a forward pass, a gradient for the weights or for the input
    costs as much again. Critic update: fakes, F; real and fake, 3 F each but for the gradient of the images; the penalty,
    F to find the path, F for the gradient written out, 2 F for its own gradient. Generator update: encoder, 3 F but for the
    images; decoder and CNN, 3 F for noise and for reconstructions; critic, 2 F.
    """
    n = config.batch_size
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[pick_precision(DEVICE)]
    vae = VAE(**config.model_arguments()).to(DEVICE)
    critic = Discriminator(**critic_arguments(config.model_arguments())).to(DEVICE)
    work = {"critic": [], "encoder": [], "decoder": []}
    calls, hooks = [], []

    def count(name):
        def hook(layer, inputs, output):
            taps = layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else layer.weight[:, 0].numel() / 4
            work[name].append(2 * taps * output[0].numel())
            if not isinstance(layer, nn.Linear):
                calls.append((layer, inputs[0].shape, output.shape, work[name][-1]))
        return hook

    networks = {"critic": [critic], "encoder": [vae.encoder, vae.mu, vae.logvar], "decoder": [vae.decoder]}
    for name, modules in networks.items():
        for layer in (layer for module in modules for layer in module.modules()):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                hooks.append(layer.register_forward_hook(count(name)))
    images = torch.rand(2 * n, *vae.image_shape, device=DEVICE)
    with torch.no_grad():
        critic(images)
        vae(images)
    for hook in hooks:
        hook.remove()
    cnn = 2 * vae.output_layer.cnn.conv.weight.numel() * images[0, 0].numel()
    f = {name: sum(layers) for name, layers in work.items()}
    critic_update = f["decoder"] + cnn + 2 * (3 * f["critic"] - work["critic"][0]) + 4 * f["critic"]
    generator_update = 3 * f["encoder"] - work["encoder"][0] + 2 * 3 * (f["decoder"] + cnn) + 2 * f["critic"]
    step = n * (critic_update + generator_update)

    for _ in ticks:
        timed = []
        for layer, given, made, per_image in calls:
            layer = layer.to(kind).to(memory_format=torch.channels_last)
            x = torch.rand(given, device=DEVICE, dtype=kind).to(memory_format=torch.channels_last)
            gradient = torch.rand(made, device=DEVICE, dtype=kind).to(memory_format=torch.channels_last)
            x.requires_grad_(given[1] > 3)
            seconds = []
            for _ in range(3):
                x.grad = layer.weight.grad = layer.bias.grad = None
                _synchronize()
                started = time.perf_counter()
                layer(x).backward(gradient)
                _synchronize()
                seconds.append(time.perf_counter() - started)
            timed.append(((3 if x.requires_grad else 2) * per_image * given[0], statistics.median(seconds)))
        rate = sum(flops for flops, _ in timed) / sum(seconds for _, seconds in timed)
        print(json.dumps([step / rate, step, max(flops / seconds for flops, seconds in timed)]), flush=True)


def _synchronize():
    if CUDA:
        torch.cuda.synchronize()


class Row:
    """A process that takes steps when told to."""

    def __init__(self, name, options):
        self.started = time.perf_counter()
        processes = 2 if name == "processes" else 1
        self.processes = rows.start([sys.executable, __file__, *options, "--row", name], processes=processes,
                                    threads=max(1, torch.get_num_threads() // processes))
        self.times = []

    def step(self):
        print(file=self.processes[0].stdin, flush=True)
        for line in self.processes[0].stdout:
            if line.startswith("["):
                self.last = json.loads(line)
                self.times.append(self.last[0])
                return
        raise SystemExit(f"a row ended: exit status {self.processes[0].wait()}")

    def stop(self):
        rows.stop(self.processes)


def compare(names, options, images_per_step):
    """Prints the first table: every row against the plain loop, in turn with it."""
    print(f"{'':46}{'images/s':>9}{'ratio':>7}{'memory':>9}{'first step':>12}")
    plain = Row("plain", options)
    plain.step()
    found = {}
    for name in names:
        row = Row(name, options)
        row.step()
        first = time.perf_counter() - row.started
        for _ in range(2):
            plain.step(), row.step()
        plain.times, row.times = [], []
        for _ in range(ROUNDS):
            plain.step(), row.step()
        seconds, beside = statistics.median(row.times), statistics.median(plain.times)
        found[name] = beside / seconds, seconds, row.last
        if name != "floor":
            label = {**MEASURES, **SHIPPED}[name]
            print(f"{label:46}{images_per_step * STEPS / seconds:9.1f}{beside / seconds:7.2f}{row.last[1] / 2**30:6.1f} GiB"
                  f"{first:10.1f} s", flush=True)
        row.stop()
    plain.stop()
    return found


def scale(setting):
    """One line of the second table: steps on simulated images."""
    size, batch, number = setting[0], *map(int, setting[1:])
    shape = (number, 3, *height_and_width(size))
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(math.prod(shape))
        images = torch.from_file(file.name, size=math.prod(shape), dtype=torch.uint8).view(shape)
        keep_freed_memory()
        config = Config(data="simulated", image_size=size, grow_from=None, batch_size=batch,
                        precision=pick_precision(DEVICE))
        gan = GAN(config, DEVICE)
        images = to_device_if_it_fits(images, DEVICE)
        training.use_fast_layers(gan, report=print)
        training.use_faster_updates(gan, images)
        times = []
        for step in range(3 + ROUNDS):  # a file just written, or read once, is in memory; one full of holes is not
            as_float_images(images, batch_indices(number, step * batch, batch, seed=0), DEVICE)
        for step in range(3 + ROUNDS):
            started = time.perf_counter()
            for _ in range(STEPS):
                training.training_step(gan, images, step, step * batch)
            _synchronize()
            times.append((time.perf_counter() - started) / STEPS)
        memory = torch.cuda.max_memory_allocated() - images.is_cuda * images.nbytes if CUDA else _anonymous_memory()
        seconds = statistics.median(times[3:])
        print(f"{size:>7} px{batch:9}{number:12,}{1e3 * seconds:9.0f} ms{batch / seconds:10.1f}{memory / 2**30:7.2f} GiB",
              flush=True)


def _anonymous_memory():
    """Bytes held by this process itself, without the pages of files that it has mapped, where the system tells."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _peak_memory()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def input_pipelines(config):
    """Prints images per second of both ways to the batches, in their second epoch."""
    epoch = len(load_images(config.data, config.image_size, cache_dir=config.cache_dir).images) // config.batch_size
    speeds = []
    for name, make in ((f"DataLoader, ImageFolder, {WORKERS} workers", _loaded_batches), ("decoded once", _cached_batches)):
        if speeds:
            keep_freed_memory()  # as training.py does
        batches = make(config)
        for _ in range(epoch):
            next(batches)
        _synchronize()
        started = time.perf_counter()
        for _ in range(epoch):
            next(batches)
        _synchronize()
        speeds.append(epoch * config.batch_size / (time.perf_counter() - started))
        print(f"{name:46}{speeds[-1]:9.0f}{speeds[-1] / speeds[0]:7.1f}", flush=True)


def run_row(name, config):
    if name == "floor":
        floor(config, iter(sys.stdin.readline, ""))
    elif name in MEASURES:
        names = list(MEASURES)
        ticks, steps = clock(), plain_loop(config, names[:names.index(name) + 1])
        for _ in ticks:
            next(steps)
    else:
        mode = name if name in ("off", "on") else "auto"
        config = dataclasses.replace(config, compile=mode, precision="float32" if name == "float32" else "auto")
        keep_freed_memory()
        ticks = clock() if rows.is_first() else itertools.repeat(None)
        next(ticks)  # the start of the first step
        training.train(config, after_step=lambda step, metrics: next(ticks))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an ImageFolder; not given: small drawings")
    parser.add_argument("--image-size", default="128", metavar="PIXELS|HxW")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.backends.cudnn.benchmark = CUDA  # in all rows, as training.py does
    size, batch = given.image_size, given.batch_size
    if given.row and given.row.startswith("scale"):
        scale(given.row.split(",")[1:])
    elif given.row:
        run_row(given.row, _config(given.data, size, batch, given.work, given.row))
    else:
        with tempfile.TemporaryDirectory() as work:
            data = given.data or str(draw_demo_images(pathlib.Path(work) / "images", 600))
            run_all(_config(data, size, batch, work, "none"),
                    ["--data", data, "--image-size", size, "--batch-size", str(batch), "--work", work])


def _config(data, size, batch, work, row):
    return Config(data=data, image_size=size, batch_size=batch, cache_dir=f"{work}/cache", out=f"{work}/run-{row}",
                  grow_from=None, steps=10**9, sample_every=10**9, checkpoint_every=10**9)


def run_all(config, options):
    size, batch = config.image_size, config.batch_size
    started = time.perf_counter()
    number = len(load_images(config.data, size, cache_dir=config.cache_dir).images)
    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    print(f"{number} images decoded in {time.perf_counter() - started:.1f} s; {device}, torch {torch.__version__}, "
          f"{size_text(size)} px, batch {batch}\n")
    input_pipelines(config)
    print()
    left_out = {"processes": CUDA and torch.cuda.device_count() < 2, "off": not CUDA,
                "float32": pick_precision(DEVICE) == "float32"}
    found = compare([name for name in [*MEASURES, *SHIPPED, "floor"] if not left_out.get(name)], options, batch)
    ratio, seconds, (_, work, fastest) = found["floor"]
    rate, above = work / seconds, ratio / found["auto"][0]
    print(f"""
floor: {work / 1e9:.0f} GFLOP in convolutions and matrix products a step, at the {rate / 1e9:.0f} GFLOP/s that its
convolutions reach alone. As shipped takes {above:.2f} times that, and {above * fastest / rate:.2f} times what it would be
at the {fastest / 1e9:.0f} GFLOP/s of the fastest of them.
""")
    print(f"{'size':>10}{'batch':>9}{'images':>12}{'per step':>12}{'images/s':>10}{'memory':>11}")
    sizes = [(size, 16, 1_000) for size in ("32", "64", "64x112", "128", "256", "512")]
    batches = [("64", batch, 1_000) for batch in (64, 256)]
    sets = [("32", 16, number) for number in (10_000, 100_000, 1_000_000)]
    for setting in [*sizes, *batches, *sets]:
        subprocess.run([sys.executable, __file__, "--row", ",".join(map(str, ("scale", *setting)))], check=True)


if __name__ == "__main__":
    main()
