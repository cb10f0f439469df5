"""Trains the VAE with its CNNParamTanh layer as the generator of a WGAN-GP: python training.py --data ./images

A step is some critic updates and one generator update. All randomness is drawn on the CPU as a function of (seed, purpose,
step), and the order of the images is a function of (seed, epoch). So a checkpoint holds no random state, and running the
same command again continues the same run.
"""
import dataclasses
import pathlib
import signal
import sys

import torch

import devices
import distributed
from batches import critic_batch, first_batches, generator_batch
from checkpointing import CheckpointError
from config import from_command_line
from console import Interrupt, print_error, program_output, say
from data_report import check_data
from demo_images import draw_demo_images
from device_check import pick_training_device
from fast_paths import CapturedUpdate, use_fast_layers, use_fast_updates
from image_data import DataError, as_image_set, to_device_if_it_fits
from image_sizes import size_text
from randomness import random_generator
from resuming import RunFolderError, classes_of_run, find_run, images_of_run, resolve_settings
from run_log import RunLog, TrainingError
from wgan_gp import GAN


@devices.usual_settings()
def train(config, *, data=None, interrupt=None, after_step=None):
    """Trains as `config` says and returns the run folder, or None where only the data was to be checked.

    Ctrl-C, SIGTERM and SIGHUP finish the step, save and stop; a second Ctrl-C raises KeyboardInterrupt at once. The handlers
    that were there before are restored. torch's global generator is seeded. Where cgroups or an affinity leave this process
    fewer CPUs than torch has threads, torch's number of threads is lowered to them.

    Args:
        config: a Config.
        data: images to train on in place of a folder: an ImageSet, or uint8 (M, C, H, W). Their size and channels are then
            the run's, and config.data only names the run.
        interrupt: an Interrupt, to learn afterwards which signal was received.
        after_step: called as after_step(step, metrics) after every step; metrics are scalar tensors on the device.

    Raises:
        ValueError: a setting that cannot work.
        DataError, CheckpointError, RunFolderError: what is wrong and what would do; nothing was written.
        TrainingError: a loss or a gradient is not finite, from which step on.
    """
    config.check()
    with interrupt or Interrupt() as signals:
        if config.check_data:
            return check_data(_data_folder(config), config)
        devices.limit_threads()
        threads = devices.start_threads()
        config, gan, log = _prepare(config, data)
        log.describe()
        if log.step >= log.total_steps and not config.dry_run:
            say(f"{log.out} has all of its {log.step} steps: nothing is left to do. A larger --steps goes on from here")
            return log.out
        images, labels = to_device_if_it_fits(log.data.images, gan.device), log.labels
        use_fast_layers(gan, report=say)
        log.plan(lambda: training_step(gan, images, log.step, log.images_seen, *labels))
        if config.dry_run:
            metrics = training_step(gan, images, log.step, log.images_seen, *labels)
            say("one step: " + ", ".join(f"{name} {value.item():.4g}" for name, value in metrics.items()))
            return log.out
        use_faster_updates(gan, images, *labels)
        with log.opened(), devices.one_core_each(threads if gan.device.type == "cpu" else []):
            signals.defer()
            if log.step == 0:
                log.draw_samples()
            while log.step < log.total_steps and not signals.received_by_any():
                with log.lack_of_memory_said():
                    if (side := gan.growth.side_at(log.images_seen)) != gan.side:
                        log.keep_step()  # the last one of the size before
                        gan.work_at(side)
                        use_faster_updates(gan, images, *labels)
                    metrics = training_step(gan, images, log.step, log.images_seen, *labels)
                log.record(metrics)
                if log.is_due(config.log_every):
                    log.write_metrics()
                if log.is_due(config.evaluate_every):
                    log.measure()
                if log.is_time_to_save():
                    log.save_step()
                if log.drawing.is_due(log.step):
                    log.draw_samples()
                if after_step:
                    after_step(log.step, metrics)
            log.finish()
    if not interrupt and signals.received not in (0, signal.SIGINT):
        signal.raise_signal(signals.received)  # saved; now the process ends as its sender wants
    return log.out


def training_step(gan, images, step, images_seen, *labels):
    """Updates the critic config.critic_steps times, then the generator once; returns their metrics, on the device.

    Args:
        gan: a GAN.
        images, labels: uint8 (M, C, H, W) and, where there are classes, the numbers of theirs (M,).
        step, images_seen: done so far.
    """
    config = gan.config
    # For layers that draw random numbers themselves, such as Dropout: a resumed run draws the same.
    torch.manual_seed(random_generator(config.seed, "layers", step, distributed.rank()).initial_seed())
    gan.set_learning_rates(images_seen / config.critic_steps + config.batch_size)
    critic_metrics = []
    for update in range(config.critic_steps):  # (1) the critic, each time on a new batch
        batch = critic_batch(gan, images, step, update, images_seen, *labels)
        critic_metrics.append(gan.critic_update(*batch))
        images_seen += config.batch_size
    metrics = gan.generator_update(*generator_batch(gan, batch[0], step, images_seen, *batch[4:]))  # (2) the generator
    return {name: torch.stack([values[name] for values in critic_metrics]).mean() for name in critic_metrics[0]} | metrics


def _prepare(config, data):
    """Finds device, data and run; returns the config as the run uses it, the GAN as it was saved, and the RunLog."""
    device = pick_training_device(config, training_step, report=say)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes never change, so searching the fastest algorithm once pays
    distributed.start(device)
    if config.batch_size % distributed.world_size():
        raise TrainingError(f"--batch-size: must be a multiple of {distributed.world_size()}, the number of processes, "
                            f"got {config.batch_size}")
    with distributed.rank_zero_first():
        if data is None:
            folder = _data_folder(config)
            name, config = "demo" if config.demo else None, dataclasses.replace(config, data=str(folder))
        else:
            if not config.data:
                raise DataError("data: images are given, so Config(data=...) has to name the run")
            folder, name = None, pathlib.Path(config.data).name
            data, identity = as_image_set(data, config.data)
            channels, *sides = data.images.shape[1:]
            config = dataclasses.replace(config, data=identity, image_size=tuple(sides), channels=channels)
            config.check()
        out, checkpoints, state, start = find_run(config, name=name, folder=folder)
        config = resolve_settings(config, state, start, device)
        if data is None:
            data = images_of_run(config, state)
        elif data.images.shape[1] != config.channels:
            raise DataError(f"data: the images have {data.images.shape[1]} channels, {config.initial_checkpoint} has "
                            f"{config.channels}")
        names, first_side = classes_of_run(config, data, state, start), (state or start or {}).get("first_side", 0)
        try:
            gan = GAN(config, device, first_side=first_side, num_classes=len(names), even_taps=bool(
                (state or start)["model_arguments"]["even_taps"] if state or start else True))
        except RuntimeError as error:  # torch raises it when memory cannot be had
            raise TrainingError(f"networks of this size cannot be made here: {str(error).splitlines()[0]}") from None
        if state:
            gan.load_state(state)
        elif start:
            gan.begin_with(start)
        gan.work_at(gan.growth.side_at(state["images_seen"] if state else 0))
    distributed.broadcast_(gan.tensors())
    return config, gan, RunLog(config, gan, data, out, checkpoints, state, class_names=names)


def _data_folder(config):
    return pathlib.Path(draw_demo_images("demo_images") if config.demo else config.data).resolve()


def use_faster_updates(gan, images, *labels):
    """Uses faster updates at the present size as --compile says, where they give the same results."""
    compiled = gan.config.compile == "on"
    # Collective operations have not been tried in a capture.
    captured = gan.config.compile != "off" and gan.device.type == "cuda" and distributed.world_size() == 1
    if compiled or captured:
        use_fast_updates(gan, first_batches(gan, images, *labels), compiled=compiled,
                         capture=CapturedUpdate if captured else None, report=say)


def main(arguments=None):
    """Runs the command line; returns the exit status."""
    config = from_command_line(arguments)
    devices.keep_freed_memory()
    interrupt, status = Interrupt(), 0
    with program_output():
        try:
            with devices.lack_of_memory_said(lambda: f"training with --batch-size {config.batch_size} and --image-size "
                                             f"{size_text(config.image_size)}", "Smaller ones need less"):
                train(config, interrupt=interrupt)
            distributed.stop()
        except distributed.RankZeroError:
            status = 2
        except (TrainingError, RunFolderError, DataError, CheckpointError, devices.DeviceError, OSError) as error:
            status = 2
            if distributed.rank() == 0 or not isinstance(error, TrainingError | devices.DeviceError):  # all raise these
                print_error(str(error))
        except KeyboardInterrupt:
            if distributed.rank() == 0:
                print_error("stopped at once; the newest checkpoint is from before" if interrupt.deferred
                            else "stopped while preparing; nothing was left half done")
    return status or (128 + interrupt.received if interrupt.received else 0)


if __name__ == "__main__":
    sys.exit(main())
