import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from test_training import metrics, newest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Three steps in float64, from the same data; every process leaves its metrics, its gradients and what it ends with.
STEPS = """
import sys
import torch
import parallel, training
from config import Config

parallel.start(torch.device("cpu"))
config = Config(data="x", **{settings})
trainer = training.Trainer(config, torch.device("cpu"))
for network in (trainer.generator, trainer.critic, trainer.averaged):
    network.double()
trainer.critic_optimizer = training._adam(trainer.critic, 1e-3)
trainer.generator_optimizer = training._adam(trainer.generator, 1e-3)
for tensor in trainer.tensors():
    tensor += parallel.rank()  # to be put right by the others hearing from rank 0
parallel.broadcast_(trainer.tensors())
generator = torch.Generator().manual_seed(0)
images = torch.randint(256, (10, 3, 32, 32), generator=generator, dtype=torch.uint8)
torch.set_default_dtype(torch.float64)
found = []
for step in range(3):
    batch = training._critic_batch(trainer, images, step, 0, 4 * step)
    assert len(batch[0]) * parallel.world_size() == 4
    found.append(trainer.critic_update(*(tensor.double() for tensor in batch)))
    batch = training._generator_batch(trainer, batch[0], step, 4 * step + 4)
    found.append(trainer.generator_update(*(tensor.double() for tensor in batch)))
    found.append(trainer.gradients())
torch.save([found, trainer.tensors()], sys.argv[1] + str(parallel.rank()))
parallel.stop()
"""


def run_processes(number, *arguments):
    """Runs Python with the arguments in so many processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(number)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return outputs


def flat(nested):
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for value in (nested.values() if isinstance(nested, dict) else nested) for tensor in flat(value)]


def test_two_processes_take_the_steps_of_one_with_the_joined_batch():
    code = STEPS.replace("{settings}", repr(TINY))
    run_processes(2, "-c", code, "two")
    run_processes(1, "-c", code, "one")
    one, first, second = (torch.load(name, weights_only=True) for name in ("one0", "two0", "two1"))
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))
    for alone, together in zip(flat(one), flat(first), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert max(tensor.abs().max() for tensor in one[0][2]) > 0.1  # there were gradients to compare


def test_a_run_in_two_processes_writes_one_log_and_one_checkpoint_and_goes_on_alone(image_folder, train_tiny):
    options = [part for name, value in TINY.items() for part in ("--" + name.replace("_", "-"), value)]
    arguments = [ROOT / "training.py", "--data", image_folder, *options, "--steps", "4", "--out", "two"]
    (said, _), (silent, errors) = run_processes(2, *arguments)
    assert "done: 4 steps" in said
    assert (silent, errors) == ("", "")
    alone = train_tiny(steps=4, out="one")
    assert os.listdir("two/checkpoints") == os.listdir("one/checkpoints") == ["step_0000004.pt"]
    two, one = newest(pathlib.Path("two")), newest(alone)
    for name, value in one["averaged"].items():
        torch.testing.assert_close(two["averaged"][name], value, rtol=1e-3, atol=1e-4)
    assert [line["step"] for line in metrics(pathlib.Path("two"))] == [2, 4]
    last, expected = metrics(pathlib.Path("two"))[-1], metrics(alone)[-1]
    assert last["reconstruction"] == pytest.approx(expected["reconstruction"], rel=1e-3)
    assert newest(train_tiny(steps=5, out="two"))["step"] == 5


def test_a_batch_that_cannot_be_shared_evenly_is_refused(image_folder):
    with pytest.raises(AssertionError, match="--batch-size: must be a multiple of 2, the number of processes, got 3"):
        run_processes(2, ROOT / "training.py", "--data", image_folder, "--batch-size", "3")
