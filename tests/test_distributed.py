import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, TINY, Child, assert_same, metrics, newest, tiny_arguments, wait_until

import distributed
import training
import wgan_gp
from batches import critic_batch, generator_batch
from config import Config


def start_processes(number, *arguments, first=None):
    """Starts training.py, or `first`, in so many processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Child(*arguments, first=first, name=f"rank{rank}", environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port)}) for rank in range(number)]


def run_processes(number, *arguments, first=None, status=0):
    """Starts processes and waits for them; returns what each has written to stdout and stderr."""
    children = start_processes(number, *arguments, first=first)
    assert [child.wait() for child in children] == number * [status], [child.err.read_text() for child in children]
    return [(re.sub(r"(?m)^\[Gloo\].*\n", "", child.out.read_text()), child.err.read_text()) for child in children]


def take_steps(name, num_classes):
    """Three steps in float64, from the same data; every process leaves its metrics, its gradients and what it ends with."""
    distributed.start(torch.device("cpu"))
    gan = training.GAN(Config(data="x", **TINY), torch.device("cpu"), num_classes=num_classes)
    for network in (gan.generator, gan.critic, gan.averaged):
        network.double()
        if num_classes:
            torch.manual_seed(1)
            torch.nn.init.normal_(network.classes.weight)
    gan.critic_optimizer = wgan_gp.make_adam(gan.critic, 1e-3, 0.9)
    gan.generator_optimizer = wgan_gp.make_adam(gan.generator, 1e-3, 0.9)
    for tensor in gan.tensors():
        tensor += distributed.rank()  # to be put right by the others hearing from rank 0
    distributed.broadcast_(gan.tensors())
    images = torch.randint(256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = [torch.arange(10) % num_classes] if num_classes else []
    torch.set_default_dtype(torch.float64)
    found = []
    for step in range(3):
        batch = critic_batch(gan, images, step, 0, 4 * step, *labels)
        assert len(batch[0]) * distributed.world_size() == 4
        found.append(gan.critic_update(*in_float64(batch)))
        batch = generator_batch(gan, batch[0], step, 4 * step + 4, *batch[4:])
        found.append(gan.generator_update(*in_float64(batch)))
        found.append(gan.gradients())
    torch.save([found, gan.tensors()], f"{name}{distributed.rank()}")
    distributed.stop()


def in_float64(batch):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]


def flat(nested):
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for value in (nested.values() if isinstance(nested, dict) else nested) for tensor in flat(value)]


@pytest.mark.parametrize("num_classes", [0, 3])
def test_two_processes_take_the_steps_of_one_with_the_joined_batch(num_classes):
    run_processes(2, first=functools.partial(take_steps, "two", num_classes))
    run_processes(1, first=functools.partial(take_steps, "one", num_classes))
    one, first, second = (torch.load(name, weights_only=True) for name in ("one0", "two0", "two1"))
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))
    for alone, together in zip(flat(one), flat(first), strict=True):
        bound = 1e-9 if num_classes else 1e-10  # Adam makes more of rounding in weights that begin at zero
        torch.testing.assert_close(together, alone, rtol=bound, atol=bound)
    assert max(tensor.abs().max() for tensor in one[0][2].values()) > 0.1  # there were gradients to compare


@pytest.mark.parametrize("shape", [{}, {"image_size": "32x40", "channels": 4},
                                   {"image_size": 64, "grow_every_images": 20}])  # grows before step 6
def test_a_run_in_two_processes_writes_one_log_and_one_checkpoint_and_goes_on_alone(image_folder, train_tiny, shape):
    leader, other = run_processes(2, "--data", image_folder, *tiny_arguments(steps=10, **shape), "--out", "two")
    assert "done: 10 steps" in leader[0]
    assert other == ("", "")
    alone = train_tiny(steps=10, out="one", **shape)
    assert sorted(os.listdir("two/checkpoints")) == sorted(os.listdir("one/checkpoints"))
    two, one = newest(pathlib.Path("two")), newest(alone)
    for name, value in one["averaged"].items():
        torch.testing.assert_close(two["averaged"][name], value, rtol=1e-2, atol=1e-3)
    assert [line["step"] for line in metrics(pathlib.Path("two"))] == [2, 4, 6, 8, 10]
    last, expected = metrics(pathlib.Path("two"))[-1], metrics(alone)[-1]
    assert last["reconstruction"] == pytest.approx(expected["reconstruction"], rel=1e-2)
    assert newest(train_tiny(steps=11, out="two", **shape))["step"] == 11


# When things go wrong


@pytest.mark.parametrize(("arguments", "said"), [
    (["--data", "nowhere"], "nowhere is missing, a folder of images or a film is needed"),
    (["--data", "images", "--batch-size", "3"], "--batch-size: must be a multiple of 2, the number of processes, got 3"),
    (["--data", "images", "--out", "/proc/nowhere"], "--out: "),
])
def test_what_one_process_refuses_ends_the_others_and_is_said_once(image_folder, arguments, said):
    leader, other = run_processes(2, *tiny_arguments(), *arguments, status=2)
    (line,) = leader[1].splitlines()
    assert said in line
    assert other == ("", "")


def poison_the_third_update_of_rank_1():
    real = training.GAN.critic_update

    def update(self, images, *rest):
        update.calls += 1
        return real(self, images * float("nan") if update.calls == 3 and distributed.rank() == 1 else images, *rest)

    update.calls = 0
    training.GAN.critic_update = update


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_is_said_once(image_folder):
    leader, other = run_processes(2, "--data", image_folder, *tiny_arguments(steps=9, checkpoint_every=2),
                                  first=poison_the_third_update_of_rank_1, status=2)
    (line,) = leader[1].splitlines()
    assert line.startswith("step 3: wasserstein_distance is nan")
    assert other == ("", "")
    state = newest(pathlib.Path("runs/images"))
    assert state["step"] == 2
    assert all(tensor.isfinite().all() for name in wgan_gp.NETWORKS for tensor in state[name].values())


def test_a_signal_to_one_process_stops_all_at_the_same_step(image_folder):
    children = start_processes(2, "--data", image_folder, *tiny_arguments(log_every=1, steps=100_000))
    run = pathlib.Path("runs/images")
    wait_until((run / "metrics.jsonl").exists)
    os.kill(children[1].pid, signal.SIGTERM)
    assert [child.wait() for child in children] == [143, 143]
    assert newest(run)["step"] == metrics(run)[-1]["step"]


# training.py, but one of its processes breaks in the middle of the fifth step, unless torchrun has started it again
BREAKING = """
import os, sys
sys.path.insert(0, {root!r})
import distributed, training
real, calls = training.GAN.generator_update, []

def update(self, *arguments):
    calls.append(1)
    if len(calls) == 5 and distributed.rank() == 1 and not distributed.num_restarts():
        raise RuntimeError("this process broke")
    return real(self, *arguments)

training.GAN.generator_update = update
sys.exit(training.main())
"""


def torchrun(*arguments):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_running(folder):
    """Whether a process has the folder in its command line."""
    commands = (path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists())
    return any(os.fsencode(folder) in command for command in commands)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_breaks_brings_the_others_down_with_its_traceback(image_folder):
    pathlib.Path("breaking.py").write_text(BREAKING.format(root=str(ROOT)))
    process = torchrun("breaking.py", "--data", image_folder, *tiny_arguments(checkpoint_every=2))
    wait_until(pathlib.Path("runs/images/checkpoints").exists)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert process.returncode == 1
    assert "RuntimeError: this process broke" in err
    assert not is_running(image_folder)
    assert newest(pathlib.Path("runs/images"))["step"] == 4


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_sigterm_to_torchrun_stops_all_at_the_same_step_and_saves_once(image_folder):
    process = torchrun(ROOT / "training.py", "--data", image_folder, *tiny_arguments(log_every=1, steps=100_000))
    run = pathlib.Path("runs/images")
    wait_until((run / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=25)  # after 30 seconds torchrun would kill what is left
    assert process.returncode != 0
    stopped = newest(run)["step"]
    assert f"stopped after step {stopped}, saved" in out
    assert metrics(run)[-1]["step"] == stopped
    assert os.listdir(run / "checkpoints") == [f"step_{stopped:07d}.pt"]
    assert not is_running(image_folder)


@pytest.mark.nightly
def test_a_run_that_torchrun_starts_again_ends_as_one_that_never_broke(image_folder):
    pathlib.Path("breaking.py").write_text(BREAKING.format(root=str(ROOT)))
    settings = tiny_arguments(steps=8, log_every=1, checkpoint_every=3)
    process = torchrun("--max-restarts", "1", "breaking.py", "--data", image_folder, *settings, "--fresh")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert os.listdir("runs") == ["images"]
    assert "runs/images, steps 3 to 8" in out
    run_processes(2, "--data", image_folder, *settings, "--out", "straight")
    assert_same(newest(pathlib.Path("straight")), newest(pathlib.Path("runs/images")))
    assert metrics(pathlib.Path("straight")) == metrics(pathlib.Path("runs/images"))


def take_steps_with_statistics():
    """A step of networks with running statistics; every process leaves what a checkpoint would hold."""
    from torch import nn

    distributed.start(torch.device("cpu"))
    gan = training.GAN(Config(data="x", **TINY), torch.device("cpu"))
    gan.critic.blocks.insert(1, nn.BatchNorm2d(gan.critic.blocks[0].out_channels))
    gan.critic_optimizer = wgan_gp.make_adam(gan.critic, 1e-3, 0.9)
    images = torch.randint(256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    training.training_step(gan, images, 0, 0)
    torch.save(gan.critic.state_dict(), f"statistics{distributed.rank()}")
    distributed.stop()


def test_running_statistics_are_the_same_in_all_processes():
    run_processes(2, first=take_steps_with_statistics)
    first, second = (torch.load(f"statistics{rank}", weights_only=True) for rank in range(2))
    assert first["blocks.1.running_mean"].abs().sum() > 0
    assert all(torch.equal(first[name], second[name]) for name in first)
