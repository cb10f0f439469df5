"""What a run leaves behind: its log, pictures, measurements and checkpoints."""
import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import threading
import time

import torch
from tqdm import tqdm

import distributed
from checkpointing import class_names_for_file, preparation_for_file, save_checkpoint, save_generator
from config import option_name
from console import say
from data_report import say_classes, say_what_is_left_out, say_what_would_suit
from devices import is_out_of_memory, lack_of_memory_said
from growth import averaged_to, time_steps
from image_data import as_float_images, batch_indices, evenly_spaced
from image_metrics import alarms, detail_worth_drawing, diversity, nearest_distance, patches, sliced_wasserstein, thumbnails
from image_sizes import plain_size, size_text
from pictures import alpha_picture, grid, on_white, save_picture
from randomness import drawn_labels, latent_noise, random_generator
from resuming import open_run_folder
from safe_files import append_line, atomic_write, free_bytes

NUM_SAMPLES = 64
NUM_MEASURED = 500
COLUMNS = 8  # of the grids
CURVES_PER_ROW = 3
GROWING_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"  # its own time left knows one speed
NO_CURVES = ("step", "images", "image_size", "elapsed_seconds", "alarm")
STANDS_STILL, TIMES_AS_LONG, LOOKED_EVERY = 300, 10, 10  # seconds without a step; as steps take; seconds
JUDGED_AFTER = 32_000  # images: earlier, images of a good run can look alike
MOST_KNOWN = 4_000  # training images that samples are compared with
SHARE = 0.025  # of the time, at most, for pictures, and as much for checkpoints
FIRST_OUTPUT, BETWEEN_CHECKPOINTS = 60, (60, 600)  # seconds; more often would wear disks out: 15 MB/s have been seen


class TrainingError(ValueError):
    """The run cannot start, or cannot go on; the message says why and what would do."""


class Pace:
    """When something is done that takes time: every so many steps or, where `every` is None, as often as SHARE allows.

    How long it takes is known from the last time; the first time is after FIRST_OUTPUT seconds.

    Args:
        every: a number of steps, or None.
        between: the shortest and the longest time to wait, in seconds, where `every` is None.

    Attributes:
        step: where it was done last, None before.
    """

    def __init__(self, every, *, between=(0, math.inf)):
        self.every, self.between, self.step, self.wait = every, between, None, FIRST_OUTPUT
        self.start()

    def start(self):
        """Begins to wait anew."""
        self.ended = time.perf_counter()

    def is_due(self, step):
        """Whether it is to be done after this step."""
        return time.perf_counter() - self.ended >= self.wait if self.every is None else step % self.every == 0

    @contextlib.contextmanager
    def timed(self, step):
        """Runs a block that does it."""
        started = time.perf_counter()
        yield
        self.start()
        shortest, longest = self.between
        self.step, self.wait = step, min(max((self.ended - started) * (1 / SHARE - 1), shortest), longest)


class RunLog:
    """Where a run stands, and what it writes into its folder. All processes have one; rank 0 writes.

    Every process looks for values that are not finite. They are the same in all of them, so all stop together.

    Args:
        config: a Config.
        gan: a GAN.
        data: an ImageSet.
        out: the run folder.
        checkpoints: those in it.
        state: the checkpoint to go on from, None at the start of a run.
        class_names: as resuming.classes_of_run.

    Attributes:
        step, images_seen: done so far.
        total_steps: where the run ends.
        saving, drawing: when checkpoints are written and pictures drawn, each a Pace.
        labels: with classes, a list of one tensor, the number of each image's class (M,); else an empty list.
    """

    def __init__(self, config, gan, data, out, checkpoints, state, *, class_names=()):
        self.config, self.gan, self.data, self.out, self.checkpoints = config, gan, data, out, checkpoints
        self.is_rank_zero = distributed.rank() == 0
        self.threads = torch.get_num_threads() if gan.device.type == "cpu" else 0  # of the CPU that computes
        self.step, self.images_seen, self.elapsed_seconds, self.num_images_before, self.threads_before, self.set_before = (
            state[name] for name in ("step", "images_seen", "elapsed_seconds", "num_images", "threads", "image_set")
        ) if state else (0, 0, 0.0, len(data.images), 0, "")
        self.pending = []  # the metrics of each step since the last line of the log, read from the device only then
        self.detail_step = None  # for which the detail has been chosen
        if state:
            gan.averaged.detail = state["detail"] if config.reconstruction_weight else 1.0
            pending = {name: values.to(gan.device) for name, values in state["pending_metrics"].items()}
            self.pending = [dict(zip(pending, values, strict=True)) for values in zip(*pending.values(), strict=True)]
        self.images_per_step = config.batch_size * config.critic_steps
        self.total_steps = (config.steps if config.epochs is None
                            else math.ceil(config.epochs * len(data.images) / self.images_per_step))
        self.saving = Pace(config.checkpoint_every, between=BETWEEN_CHECKPOINTS)
        self.drawing = Pace(config.sample_every)
        self.steps_since_last_line = 0
        self.step_seconds = {}  # of each size to come
        self.class_names, self.labels, self.sample_labels = class_names, [], []
        self.noise = latent_noise(config.seed, range(NUM_SAMPLES), config.latent_dim)
        if class_names:
            rows = {name: row for row, name in enumerate(class_names)}
            self.labels = [torch.tensor([rows[name] for name in data.classes])]
            self.class_counts = self.labels[0].bincount(minlength=len(class_names))
            shown = sorted(self.class_counts.argsort(descending=True, stable=True)[:NUM_SAMPLES // COLUMNS].tolist())
            self.sample_labels = [torch.tensor(shown).repeat_interleave(COLUMNS)]
            self.noise = self.noise[:COLUMNS].repeat(len(shown), 1)
        first = batch_indices(len(data.images), 0, NUM_SAMPLES, seed=config.seed)
        self.reals = as_float_images(data.images, first, torch.device("cpu"))
        self.tensorboard = None
        self.unwritten, self.warned = [], set()  # lines of metrics.jsonl; names of what has failed
        self.alarms, self.lock, self.known = set(), threading.Lock(), None  # kinds that are on; of the log; thumbnails
        self.tells_free = False  # whether the disk has ever told how much is free
        self.last_step = time.perf_counter(), 0.0  # when it ended, and how long it took
        self.progress = tqdm(disable=True)
        self.start = self.last_line = time.perf_counter()

    def describe(self):
        """Prints what is trained on what, and what has changed since the checkpoint."""
        config, data = self.config, self.data
        networks = self.gan.generator, self.gan.critic
        generator, critic = (sum(p.numel() for p in network.parameters()) for network in networks)
        classes = f" in {len(data.class_counts)} classes" if len(data.class_counts) > 1 else ""
        say(f"data    {data.folder}: {len(data.images)} images{classes}, "
            f"{size_text(config.image_size)} px{ {1: ', grey', 3: '', 4: ', with transparency'}[config.channels]}\n"
            f"models  generator {generator / 1e6:.1f} M parameters, critic {critic / 1e6:.1f} M; "
            f"{config.precision} on {self.gan.device}\n"
            f"run     {self.out}, steps {self.step} to {self.total_steps} of {self.images_per_step} images")
        say_what_is_left_out(data.skipped, data.passed_over, data.remarks)
        say_what_would_suit(data, config.channels)
        if self.class_names:
            say_classes(data)
        elif len(set(data.classes)) > 1 and not self.step:
            say("note: class folders are not learned as classes; --class-conditional does that")
        if len(data.images) != self.num_images_before:
            say(f"warning: the folder had {self.num_images_before} images, has {len(data.images)} from here on")
        elif self.set_before not in ("", data.digest) or self.step and not self.set_before and "float" in data.levels:
            say("warning: the images are not those that the run had before, or prepared in another way")
        if self.threads_before and self.threads and self.threads != self.threads_before:
            say(f"warning: the run had {self.threads_before} threads, has {self.threads} from here on (OMP_NUM_THREADS sets "
                "them): sums are rounded differently, so it is no longer equal to the bit to one that was never stopped")
        if len(data.images) < config.batch_size:
            say(f"warning: fewer images than --batch-size {config.batch_size}: batches hold some of them repeatedly")
        if config.dry_run:
            for name, value in dataclasses.asdict(config).items():
                say(f"{option_name(name):26} {size_text(value)}")
            say(f"memory  {self.gan.state_bytes():,} bytes of weights and optimizer state; "
                "a checkpoint takes as much on the disk")

    def plan(self, take_step):
        """Times a step at each size to come, where there are several, and prints when the run gets to each.

        Args:
            take_step: takes the next step and returns its metrics.
        """
        plan = self._sizes_to_come()
        if len(plan) > 1 or self.config.dry_run:
            self.step_seconds = time_steps(self.gan, [side for side, *_ in plan], take_step)
            for number, (side, start, end) in enumerate(plan):
                seconds = self.step_seconds[side]
                lasts = ("does not fit into memory; a smaller --batch-size may" if seconds is None
                         else f"about {tqdm.format_interval(seconds * (end - start))}, {seconds:.2g} s each")
                say(f"{'' if number else 'plan':7} steps {start + 1} to {end} at {_text(self.gan.sizes[side])} px: {lasts}")
        self._say_if_too_short()

    def _say_if_too_short(self):
        growth = self.gan.growth
        reached = [self.gan.side, *(side for side, *_ in self._sizes_to_come())][-1]
        if reached < growth.sides[-1]:
            steps = growth.steps_for_all(self.images_per_step, step=self.step, images_seen=self.images_seen)
            say(f"warning: the run ends with images of {_text(self.gan.sizes[reached])} px, --image-size is "
                f"{size_text(self.config.image_size)}: --steps {steps} would reach it and stay for as long as it should")

    def _sizes_to_come(self):
        return self.gan.growth.plan(self.images_per_step, self.total_steps, step=self.step, images_seen=self.images_seen)

    @contextlib.contextmanager
    def opened(self):
        """Locks and prepares the run folder, and starts the clock and the progress bar."""
        with contextlib.ExitStack() as held:
            with distributed.rank_zero_first():
                if self.is_rank_zero:
                    held.enter_context(open_run_folder(
                        self.out, dataclasses.asdict(self.config), step=self.step,
                        last_logged=self.step - len(self.pending), checkpoints=self.checkpoints,
                        bytes_needed=self.gan.state_bytes() * (self.config.keep_checkpoints + 1)))
            if self.is_rank_zero:
                with self._optional("reals.png"):
                    save_picture(grid(self.reals, columns=COLUMNS), self.out / "reals.png")
                if self.config.tensorboard:
                    held.callback(self._close_tensorboard)
                    with self._optional("TensorBoard"):
                        from torch.utils.tensorboard import SummaryWriter  # an optional package

                        # What an earlier process wrote after this step is hidden.
                        self.tensorboard = SummaryWriter(self.out / "tensorboard", purge_step=self.step + 1)
            self.progress = held.enter_context(tqdm(
                total=self.images_seen + (self.total_steps - self.step) * self.images_per_step, unit=" images",
                unit_scale=True, smoothing=0.05, initial=self.images_seen, disable=None if self.is_rank_zero else True,
                bar_format=GROWING_BAR if len(self.gan.growth.sides) > 1 else None))
            self.start = self.last_line = time.perf_counter()
            self.last_step = self.start, 0.0
            self.saving.start()
            self.drawing.start()
            if self.is_rank_zero:
                held.enter_context(self._watched())
            yield

    @contextlib.contextmanager
    def _watched(self):
        """Raises an alarm, from a thread of its own, where no step has ended for minutes."""
        over = threading.Event()

        def watch():
            while not over.wait(LOOKED_EVERY):
                ended, took = self.last_step
                waited = time.perf_counter() - ended
                self._alarm("still", waited > max(STANDS_STILL, TIMES_AS_LONG * took) and
                            f"no step for {waited:.0f} s since step {self.step}: the run stands still")

        thread = threading.Thread(target=watch, daemon=True)
        with self._optional("watching whether steps end"):
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.ident:  # started
                thread.join(LOOKED_EVERY)  # a thread that wakes up while Python ends can abort the process

    def record(self, metrics):
        """Counts one step.

        Args:
            metrics: a dict of scalar tensors, on the device.
        """
        now = time.perf_counter()
        self.last_step = now, now - self.last_step[0]
        self.step += 1
        self.steps_since_last_line += 1
        self.images_seen += self.images_per_step
        if self.pending and self.pending[-1].keys() != metrics.keys():
            self.pending = []  # resumed with other terms in the loss
        self.pending.append(metrics)
        self.progress.update(self.images_per_step)

    def is_due(self, every):
        """Whether something that is done every so many steps is to be done now; never where `every` is None."""
        return every is not None and self.step % every == 0

    def is_time_to_save(self):
        """Whether a checkpoint is due. All processes check their values then, so rank 0, whose clock counts, tells them."""
        due = self.saving.is_due(self.step)
        return due if self.saving.every else bool(distributed.all_reduce_max(int(due and self.is_rank_zero)))

    def write_metrics(self):
        """Appends a line to metrics.jsonl: the means since the line before."""
        self._write_line()
        self.pending, self.last_line, self.steps_since_last_line = [], time.perf_counter(), 0

    def _write_line(self):
        metrics = self._mean_metrics()
        if not self.is_rank_zero:
            return
        speed = self.steps_since_last_line * self.images_per_step / (time.perf_counter() - self.last_line)
        metrics["images_per_second"] = round(speed, 2)
        size = plain_size(self.gan.sizes[self.gan.side])
        self._append({"step": self.step, "images": self.images_seen, "image_size": size, **metrics,
                      "elapsed_seconds": round(self._elapsed(), 2)})
        self._add_to_tensorboard(metrics)
        needed, free = self.gan.state_bytes(), free_bytes(self.out)
        self.tells_free |= free > 0
        self._alarm("disk", free < needed and self.tells_free and
                    f"the next checkpoint needs {needed:,} bytes in {self.out}, {free:,} are free")
        shown = {short: f"{metrics[name]:.3g}" for short, name in (
            ("W", "wasserstein_distance"), ("GP", "gradient_penalty"), ("rec", "reconstruction")) if name in metrics}
        if self.gan.averaged.detail < 1:
            shown["detail"] = f"{self.gan.averaged.detail:.2g}"
        left = tqdm.format_interval(self._seconds_left(speed)) if speed else "?"
        shown = {"px": _text(self.gan.sizes[self.gan.side])} | shown if len(self.gan.sizes) > 1 else shown
        if self.progress.disable:  # not a terminal: lines instead of a bar
            say(f"step {self.step}/{self.total_steps}  " + "  ".join(f"{name} {value}" for name, value in shown.items())
                + f"  {speed:.1f} images/s  {left} left")
        self.progress.set_postfix(shown | ({"left": left} if len(self.gan.growth.sides) > 1 else {}), refresh=False)

    def _seconds_left(self, speed):
        """By images per second now, and by how much slower steps of the sizes to come were when they were tried."""
        seconds = self.step_seconds.get(self.gan.side) or 1
        remaining = sum((end - start) * (self.step_seconds.get(side) or seconds) / seconds
                        for side, start, end in self._sizes_to_come())
        return remaining * self.images_per_step / speed

    def _mean_metrics(self):
        """The means over the steps since the last line, read from the device; raises if one of them was not finite."""
        if not self.pending:
            return {}
        names, values = list(self.pending[0]), self._pending_values().cpu()  # a row for each step
        bad = (~values.isfinite()).nonzero().tolist()
        if bad:
            row, column = bad[0]  # the first term of the earliest step
            raise TrainingError(
                f"step {self.step - len(values) + row + 1}: {names[column]} is {values[row, column]}. That update was not "
                f"made, and the newest checkpoint in {self.out / 'checkpoints'} is from before it. Lower "
                "--critic-learning-rate and --generator-learning-rate")
        return dict(zip(names, values.mean(dim=0).tolist(), strict=True))

    def _pending_values(self):
        return torch.stack([torch.stack([value.float() for value in metrics.values()]) for metrics in self.pending])

    def _elapsed(self):
        return self.elapsed_seconds + time.perf_counter() - self.start

    def draw_samples(self):
        """Draws images of fixed noise, reconstructions and alpha, by the averaged generator, and the curves of the log."""
        if not self.is_rank_zero:
            return
        started = time.perf_counter()
        with self.drawing.timed(self.step):
            with self._optional("samples"):
                self._draw_samples()
            with self._optional("curves.png"):
                draw_curves(self.out)
        self.last_line += time.perf_counter() - started  # drawing is not counted in images per second

    @torch.no_grad()
    def choose_detail(self):
        """Sets the detail that the averaged generator draws at this step, by its weights and the images of reals.png."""
        if not self.is_rank_zero or not self.config.reconstruction_weight:  # without it reconstructions say nothing
            return
        if self.detail_step == self.step:
            return
        vae, self.detail_step = self.gan.averaged, self.step
        detail, vae.detail = vae.detail, 1.0
        with self._optional("the detail of pictures and checkpoints"):
            real = averaged_to(self.reals, self.gan.side)
            detail = detail_worth_drawing(real, self._reconstructed(real))
        vae.detail = detail

    def _reconstructed(self, real):
        """Returns what the averaged generator makes of images (N, C, H, W), on the CPU."""
        vae = self.gan.averaged
        return torch.cat([vae.decode(vae.encode(part.to(self.gan.device))[0]).cpu()
                          for part in real.split(self.config.batch_size)])

    @torch.no_grad()
    def _draw_samples(self):
        vae, device, batch = self.gan.averaged, self.gan.device, self.config.batch_size
        self.choose_detail()
        decoded = [vae.decode_parts(*(part.to(device) for part in parts)) for parts in zip(
            self.noise.split(batch), *(y.split(batch) for y in self.sample_labels), strict=True)]
        images = torch.cat([part.images.cpu() for part in decoded])
        self._draw("samples", grid(images, columns=COLUMNS))
        if self.images_seen >= JUDGED_AFTER:
            self._judge(thumbnails(on_white(images)))
        real = averaged_to(self.reals[:2 * COLUMNS], self.gan.side)
        again = self._reconstructed(real)
        rows = torch.cat([real[:COLUMNS], again[:COLUMNS], real[COLUMNS:], again[COLUMNS:]])
        self._draw("reconstructions", grid(rows, columns=COLUMNS))
        if decoded[0].alpha is not None:
            before, alpha, after = (torch.cat([getattr(part, name).cpu() for part in decoded])[:COLUMNS]
                                    for name in ("before", "alpha", "images"))
            self._draw("alpha_maps", alpha_picture(before, alpha, after, columns=2))

    def _judge(self, small):
        """Raises an alarm where samples, as thumbnails, are too much like each other, or like training images."""
        if self.known is None:
            known = self.data.images[::-(-len(self.data.images) // MOST_KNOWN)]
            parts = (evenly_spaced(part, len(part)) for part in known.split(NUM_MEASURED))
            self.known = torch.cat([thumbnails(on_white(part)) for part in parts])
        small_real = thumbnails(on_white(self.reals))
        found = alarms({"diversity": diversity(small), "diversity_real": diversity(small_real),
                        "nearest_training_image": nearest_distance(small, self.known),
                        "nearest_training_image_real": nearest_distance(small_real, self.known, rank=2)})
        for kind in ("collapse", "copying"):
            self._alarm(kind, next((line for line in found if line.startswith(kind)), None))

    def _draw(self, kind, picture):
        save_picture(picture, self.out / kind / f"step_{self.step:07d}.png")
        with self._optional("TensorBoard"):
            if self.tensorboard:
                self.tensorboard.add_image(kind, picture, self.step)

    def measure(self):
        """Logs the sliced Wasserstein distance between generated and real images; keeps the best generator as best.pt.

        Distances at different sizes cannot be compared, so nothing is done before images have their full size.
        """
        if not self.is_rank_zero or self.gan.side != self.gan.growth.sides[-1]:
            return
        started = time.perf_counter()
        with self._optional("measurement"):
            self._measure()
        self.last_line += time.perf_counter() - started  # measuring is not counted in images per second

    @torch.no_grad()
    def _measure(self):
        seed, vae, before = self.config.seed, self.gan.averaged, read_metrics(self.out)
        real = on_white(evenly_spaced(self.data.images, NUM_MEASURED))
        z = latent_noise(seed, range(len(real)), self.config.latent_dim).to(self.gan.device)
        if self.class_names:
            z = z + vae.class_latents(drawn_labels(seed, range(len(real)), self.class_counts).to(z.device))
        detail, vae.detail = vae.detail, 1.0  # what is judged are the weights
        try:
            fake = torch.cat([on_white(vae.decode(part).cpu()) for part in z.split(self.config.batch_size)])
        finally:
            vae.detail = detail
        places = random_generator(seed, "patches")
        distances = sliced_wasserstein(*(patches(images, generator=places) for images in (real, fake)), generator=places)
        metrics = {"sliced_wasserstein": statistics.mean(distances.values())}
        self._append({"step": self.step} | metrics)
        self._add_to_tensorboard(metrics)
        best = min((line.get("sliced_wasserstein", math.inf) for line in before), default=math.inf)
        if metrics["sliced_wasserstein"] < best:
            self.choose_detail()
            state = {"step": self.step} | self._facts() | self.gan.state()
            save_generator(self.out / "checkpoints" / "best.pt", state)

    def _add_to_tensorboard(self, metrics):
        with self._optional("TensorBoard"):
            for name, value in metrics.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name, value, self.step)

    def _close_tensorboard(self):
        with self._optional("TensorBoard"):
            if self.tensorboard:
                self.tensorboard.close()

    def _append(self, metrics):
        """Appends a line to metrics.jsonl, and those before it that could not be written."""
        with self.lock, self._optional("metrics.jsonl"):
            self.unwritten.append(json.dumps(metrics))
            append_line(self.out / "metrics.jsonl", "\n".join(self.unwritten))
            self.unwritten = []

    def _alarm(self, kind, text):
        """Prints and logs a text, once until there is none of that kind."""
        if text and kind not in self.alarms:
            say(f"warning: {text}")
            self._append({"step": self.step, "alarm": text})
        (self.alarms.add if text else self.alarms.discard)(kind)

    @contextlib.contextmanager
    def _optional(self, name):
        """Runs what training can do without. An error is a warning, the first time; what could not be done is left out."""
        try:
            yield
        except Exception as error:
            if name not in self.warned:
                self.warned.add(name)
                advice = "; a smaller --batch-size needs less" if is_out_of_memory(error) else ""
                say(f"warning: {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}{advice}; "
                    "training goes on without it")

    def save_step(self):
        """Chooses the detail and writes a checkpoint, which is counted as one thing that takes time."""
        with self.saving.timed(self.step):
            self.choose_detail()  # reads the device for every batch of reals.png
            self.save()

    def save(self):
        """Writes a checkpoint, unless something in it is not finite."""
        self._mean_metrics()
        if not torch.stack([tensor.isfinite().all() for tensor in self.gan.tensors()]).all():  # one read of the device
            raise TrainingError(f"step {self.step}: a weight is not finite; this step was not saved")
        if self.is_rank_zero:
            save_checkpoint(self.out / "checkpoints", self.step, self._facts() | self.gan.state(),
                            keep=self.config.keep_checkpoints)

    def _facts(self):
        """What a checkpoint holds beside the state of the networks."""
        pending = {}
        if self.pending:
            columns = self._pending_values().cpu().unbind(1)
            pending = {name: column.clone() for name, column in zip(self.pending[0], columns, strict=True)}
        classes = {}
        if self.class_names:
            classes = {"class_names": class_names_for_file(self.class_names), "class_counts": self.class_counts}
        return classes | {
                "images_seen": self.images_seen, "elapsed_seconds": self._elapsed(), "num_images": len(self.data.images),
                "threads": self.threads, "config": dataclasses.asdict(self.config),
                "model_arguments": self.gan.model_arguments, "pending_metrics": pending,
                "preparation": preparation_for_file(self.data.resize_mode, self.data.levels),
                "image_set": self.data.digest, "first_side": self.gan.growth.sides[0], "learned_side": self.gan.side,
                "detail": self.gan.averaged.detail}

    def keep_step(self):
        """Saves and draws this step, where that is not done yet."""
        if self.saving.step != self.step:
            self.save_step()
        if self.drawing.step != self.step:
            self.draw_samples()

    def lack_of_memory_said(self):
        """Turns the error of a step for which memory is too small into a DeviceError."""
        return lack_of_memory_said(
            lambda: f"step {self.step + 1}: --batch-size {self.config.batch_size} with images of "
            f"{_text(self.gan.sizes[self.gan.side])} px (--image-size)",
            f"The newest checkpoint in {self.out / 'checkpoints'} is from before; a smaller --batch-size can go on from it")

    def finish(self):
        """Logs, saves and draws the last step, where that is not done yet, and prints how the run has ended."""
        if self.step > 0:
            if self.pending:
                self._write_line()  # and keeps what is pending: the line is written anew when the run goes on
            drawn = self.drawing.step == self.step
            self.keep_step()
            if drawn and self.is_rank_zero:
                with self._optional("curves.png"):
                    draw_curves(self.out)  # with the line just written
        again = "the same command without --fresh" if self.config.fresh else "the same command"
        if self.step == self.total_steps:
            say(f"done: {self.step} steps; look at {self.out / 'samples' / f'step_{self.step:07d}.png'}")
            self._say_if_too_short()
        elif self.step > 0:
            say(f"stopped after step {self.step}, saved; {again} goes on from there")
        else:
            say("stopped before the first step, so there was nothing to save")


def _text(size):
    return size_text(plain_size(size))


def read_metrics(folder):
    """Returns the lines of metrics.jsonl, as dicts."""
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def draw_curves(folder):
    """Draws the numbers of metrics.jsonl over the steps as curves.png, where matplotlib is installed and there are any."""
    lines = read_metrics(folder)
    names = [name for name in dict.fromkeys(itertools.chain(*lines)) if name not in NO_CURVES]
    if not names:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(12, 10), layout="constrained")
    for place, name in enumerate(names, start=1):
        panel = figure.add_subplot(-(-len(names) // CURVES_PER_ROW), CURVES_PER_ROW, place, title=name)
        panel.plot(*zip(*((line["step"], line[name]) for line in lines if name in line), strict=True), marker=".")
    with atomic_write(folder / "curves.png") as file:
        figure.savefig(file)
