"""One run in several processes: torchrun --nproc-per-node K training.py ...

Every process draws the same random numbers for the whole batch and works on its own part of it. Gradients are averaged by
hand, all of an update in one message. Rank 0 leads: it alone prints and writes. Without torchrun every function here does
what is right for a process on its own.
"""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

PATIENCE = datetime.timedelta(days=1)  # the others wait while rank 0 decodes a large folder; torchrun ends them if it fails


class LeaderError(RuntimeError):
    """Rank 0 cannot go on, and has said why; the others leave in silence."""


def start(device):
    """Joins the processes that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, own_rank, number = next(rendezvous("env://", timeout=PATIENCE))
        # torchrun keeps the store when it starts the processes again, and in it the addresses of those that are gone.
        store = dist.PrefixStore(f"attempt {_restarts()}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, store=store,
                                rank=own_rank, world_size=number)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def restarted():
    """Whether torchrun has started this process again after a failure."""
    return _restarts() > 0


def _restarts():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextlib.contextmanager
def lead_first():
    """Within this context rank 0 works alone; the others do the same after it, and find what it has made.

    Raises:
        LeaderError: in the others, where rank 0 has left with an error.
    """
    if rank() > 0:
        if largest(0):
            raise LeaderError
        yield
        return
    failed = 1
    try:
        yield
        failed = 0
    finally:
        largest(failed)


def own_part(batch):
    """Returns this process's part of a batch, cut along its first axis."""
    return batch.chunk(world_size())[rank()]


def broadcast_(tensors):
    """Replaces the tensors by those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def average_(tensors):
    """Replaces the tensors, all of one type, by their means over the processes, in one all_reduce."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def largest(number):
    """Returns the largest of the whole numbers that the processes have given."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)  # on the CPU: no device is waited for
    return found.item()
