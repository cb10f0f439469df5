"""One run in several processes: torchrun --nproc-per-node K training.py ...

Every process draws the same random numbers for the whole batch and works on its own shard of it. The gradients of an update
are averaged in one all_reduce. Rank 0 alone prints and writes. Without torchrun: rank 0 of 1, and every collective does
nothing.
"""
import contextlib
import datetime
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(days=1)  # the others wait while rank 0 decodes a large folder; torchrun ends them if it fails
VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
_made = []  # whether start has made the process group
SAID_EVERY, LOOKED_EVERY = 30, 0.05  # seconds, while others are waited for


class LaunchError(EnvironmentError):
    """The variables that tell a process about the others of its run are not a whole set; the message says which are not."""


class RankZeroError(RuntimeError):
    """Rank 0 failed and has printed the reason; the other ranks exit without a message."""


def start(device):
    """Joins the processes that torchrun has started, if it has.

    Raises:
        LaunchError: its variables are not all there, or are not such numbers; or the device is mps.
    """
    if _is_initialized() or not is_one_of_several():
        return
    if device.type == "mps":
        raise LaunchError("--device: several processes train on CPUs or on CUDA, not on mps")
    failed = []

    def join():
        from torch.distributed.rendezvous import rendezvous  # which builds of torch without torch.distributed do not have

        try:
            store, own_rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps the store when it restarts the processes, and in it the addresses of those that are gone.
            store = dist.PrefixStore(f"attempt {num_restarts()}", store)
            nccl = device.type == "cuda" and dist.is_nccl_available()  # on Windows it is not
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT, store=store, rank=own_rank,
                                    world_size=size)
        except Exception as error:  # to be raised where the thread is waited for
            failed.append(error)

    # In another thread, because a signal is not seen while torch waits.
    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    _wait_until(lambda: not joining.is_alive(), "for the others of {WORLD_SIZE} processes, at "
                "{MASTER_ADDR}:{MASTER_PORT} (unset WORLD_SIZE to train alone)".format(**os.environ))
    if failed:
        raise LaunchError("the other processes cannot be joined at {MASTER_ADDR}:{MASTER_PORT}: ".format(**os.environ)
                          + str(failed[0]).splitlines()[0]) from failed[0]
    _made.append(True)


def local_rank():
    """Returns the number of this process among those of the run on this machine. Raises as start."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_one_of_several() else 0


def is_one_of_several():
    """Whether the environment makes this process one of several. Raises LaunchError as start."""
    values = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    try:
        size, own_rank = int(values.get("WORLD_SIZE", 1)), int(values.get("RANK", 0))
    except ValueError:
        size, own_rank = 0, 0
    if (size, own_rank) == (1, 0):
        return False
    if len(values) < len(VARIABLES) or not 0 <= own_rank < size or not values["MASTER_PORT"].isdecimal():
        shown = ", ".join(f"{name} {values.get(name, 'not set')}" for name in VARIABLES)
        raise LaunchError(f"the environment says that this process is one of several, but not how: {shown}. torchrun sets "
                          "all of them; unset them to train in one process")
    return True


def _wait_until(done, what):
    """Waits until done() is true, and says so every half minute. Signals are seen."""
    started = said = time.monotonic()
    while not done():
        time.sleep(LOOKED_EVERY)
        if time.monotonic() - said >= SAID_EVERY:
            said = time.monotonic()
            print(f"waiting for {said - started:.0f} s {what}", file=sys.stderr, flush=True)


def stop():
    """Ends what start has begun; not a group that the caller has made."""
    if _made and _is_initialized():
        dist.destroy_process_group()
    _made.clear()


def _is_initialized():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if _is_initialized() else 0


def world_size():
    return dist.get_world_size() if _is_initialized() else 1


def num_restarts():
    """Returns how often torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if is_one_of_several() else 0


@contextlib.contextmanager
def rank_zero_first():
    """Runs the block on rank 0 first, then on the other ranks, which find what rank 0 has written.

    Raises:
        RankZeroError: on the other ranks, if rank 0 has left the block with an error.
    """
    if rank() > 0:
        failed = torch.tensor(0)
        work = dist.all_reduce(failed, dist.ReduceOp.MAX, async_op=True)
        _wait_until(work.is_completed, "for process 0, which prepares the images and the run folder")
        work.wait()  # raises where it is gone
        if failed:
            raise RankZeroError
        yield
        return
    failed = 1
    try:
        yield
        failed = 0
    finally:
        all_reduce_max(failed)


def shard(batch):
    """Returns this process's part of a batch, cut along its first axis."""
    return batch.chunk(world_size())[rank()]


def broadcast_(tensors):
    """Replaces the tensors by those of rank 0."""
    if _is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def all_reduce_mean_(tensors):
    """Replaces the tensors, all of one type, by their means over the processes, in one all_reduce."""
    if _is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def all_reduce_max(number):
    """Returns the largest of the whole numbers that the processes have given."""
    if not _is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)  # on the CPU, so that no process waits for its device
    return largest.item()
