"""Which device, precision, threads and cores to compute with, and how memory is kept."""
import contextlib
import ctypes
import math
import os
import pathlib
import sys
import threading

import torch

from safe_files import say_once


class DeviceError(ValueError):
    """There is no such device here; the message says which there are."""


def pick_device(name, *, local_rank=0):
    """Returns the torch.device of a name in config.DEVICES, or of one GPU, such as cuda:1; "auto" is CUDA or the CPU.

    Args:
        name: cuda without a number is GPU number local_rank.
        local_rank: of this process among those on this machine.

    Raises:
        DeviceError: not available, or a GPU that this torch has no kernels for; or autocast is on, and blocks of autocast in
            it would keep casts of weights of before.
    """
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise DeviceError("--device: torch.autocast is on around this call; --precision is what sets the precision here, so "
                          "leave that block first")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, number = name.partition(":")
    if name == "auto":
        kind = "cuda" if available["cuda"] else "cpu"
    if not available[kind]:
        names = ", ".join(kind for kind in available if available[kind])
        built = "" if kind != "cuda" or torch.version.cuda else (
            ": this torch is built without it; https://pytorch.org/get-started says how to install one that has it")
        raise DeviceError(f"--device: {kind} is not available here{built}; there is {names}")
    if kind != "cuda":
        return torch.device(kind)
    number, there = int(number or local_rank), torch.cuda.device_count()
    if number >= there:
        raise DeviceError(f"--device: there is no cuda:{number}; there are {there}, one for a process. Where each one sees "
                          "a GPU of its own, that is cuda:0")
    device = torch.device("cuda", number)
    if fault := _lack_of_kernels(device):
        if name != "auto":
            raise DeviceError(f"--device: {fault}")
        say_once(f"note: {fault}; the CPU is used")
        return torch.device("cpu")
    return device


def _lack_of_kernels(device):
    """What torch says of a GPU that it counts and has no kernels for; None of others, which may be full for a while."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        if "no kernel image" in str(error):
            return f"{device} cannot be used: {str(error).splitlines()[0]}"
    return None


def pick_precision(device):
    """Returns "bfloat16" where the device computes fast in it, else "float32"."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # public from torch 2.14 on
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def num_cpus(cgroups="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Returns the number of CPUs that this process may use, at least 1: by its affinity and the quotas of its cgroups.

    A quota is time, and threads beyond it take time from each other: one of 1.5 CPUs counts as 2, one of 1.4 as 1.

    Args:
        cgroups: where cgroups of version 1 or 2 are mounted.
        own: the file that names those of this process.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = min(_cgroup_quotas(pathlib.Path(cgroups), pathlib.Path(own)), default=allowed)
    return max(1, min(allowed, math.floor(quota + 0.5)))


def _cgroup_quotas(cgroups, own):
    """Yields the quotas, in CPUs, of the cgroups of this process and of those around them."""
    for folder, version in _cgroups_of_this_process(cgroups, own, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no quota
            if version == 1:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            if quota > 0 and period > 0:  # -1: no quota
                yield quota / period


def _cgroups_of_this_process(cgroups, own, controller):
    """Yields the folder of each cgroup that this process is in, and its version, 1 or 2."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers and controller not in controllers.split(","):
            continue
        # A container can be told the path on its host, and sees its own cgroup at the top: what is missing is passed over.
        mounted = cgroups / controller if controllers else cgroups
        for folder in pathlib.PurePath(path, "x").relative_to("/").parents:
            yield mounted / folder, 1 if controllers else 2


def free_memory(cgroups="/sys/fs/cgroup", own="/proc/self/cgroup", system="/proc/meminfo"):
    """Returns the bytes of memory that this process can still have, None where the system does not tell.

    Args:
        cgroups, own: as for num_cpus.
        system: the file that tells what all of the system has.
    """
    found = []
    with contextlib.suppress(KeyError, OSError, ValueError):
        lines = dict(line.split(":", 1) for line in pathlib.Path(system).read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    for folder, version in _cgroups_of_this_process(pathlib.Path(cgroups), pathlib.Path(own), "memory"):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        with contextlib.suppress(KeyError, OSError, ValueError):
            limit, used = (int((folder / name).read_text()) for name in names)
            parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = int(parts["active_file"]) + int(parts["inactive_file"])  # kept of files, and given up when it is needed
            found.append(limit - used + files)
    return min(found, default=None)


def is_out_of_memory(error):
    """Whether an exception says that there is too little memory."""
    text = str(error).lower()  # torch raises a plain RuntimeError on the CPU
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text


@contextlib.contextmanager
def lack_of_memory_said(what, advice):
    """Turns an error that says that there is too little memory into one line.

    Args:
        what: returns what did not fit.
        advice: what needs less.

    Raises:
        DeviceError: there is too little memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DeviceError(f"{what()} does not fit into memory: {reason}. {advice}") from None


@contextlib.contextmanager
def usual_settings():
    """Runs a block, or a function, with torch's own default type and device, with gradients, and without TF32.

    A program around it may have set others, and has them again afterwards. In TF32, torch's default for convolutions in
    float32 on GPUs from Ampere on, they have 10 bits of mantissa.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    # Within a block of another device, every call passes through this one, which takes time.
    on_cpu = contextlib.nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
    try:
        with torch.inference_mode(False), torch.enable_grad(), on_cpu, _without_tf32():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)


@contextlib.contextmanager
def _without_tf32():
    """Sets what torch has of old and of new for it, which it refuses to tell where they differ."""
    if not torch.cuda.is_available():
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        allowed = cudnn.allow_tf32
        cudnn.allow_tf32 = False
    except RuntimeError:  # they differ already
        allowed = None
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        if allowed is not None:
            cudnn.allow_tf32 = allowed
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


def limit_threads():
    """Lowers the number of torch's threads to num_cpus(), unless OMP_NUM_THREADS is set to a number."""
    if not _number_in_environment("OMP_NUM_THREADS") and num_cpus() < torch.get_num_threads():
        torch.set_num_threads(num_cpus())


def start_threads():
    """Starts torch's threads; returns their ids, this one first.

    An empty list where they run already or the system does not tell.
    """
    before = _thread_ids()
    torch.ones(2**20).tanh()
    threads = [threading.get_native_id(), *sorted(_thread_ids() - before)]
    return threads if len(threads) == torch.get_num_threads() else []


def _thread_ids():
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()


@contextlib.contextmanager
def one_core_each(threads):
    """Keeps each thread on a core of its own, where those of all processes of the run take up all cores.

    Threads wait for each other thousands of times a second. Beside another busy process the system would often let two of
    them share a core while the other process has one for itself.

    Args:
        threads: what start_threads has returned; of an empty list none is moved.
    """
    places = _places(len(threads))
    allowed = os.sched_getaffinity(0) if places else set()
    with contextlib.suppress(OSError):  # not permitted
        for thread, place in zip(threads, places, strict=False):
            os.sched_setaffinity(thread, place)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for thread in threads if places else ():
                os.sched_setaffinity(thread, allowed)


def _places(num_threads):
    """Returns a set of CPUs for each thread of this process; an empty list unless the run has as many threads as cores."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    local_rank, local_size = (_number_in_environment(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    start = (local_rank or 0) * num_threads
    cpus = sorted(os.sched_getaffinity(0))
    cores = {}
    for cpu in cpus:
        siblings = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text() if siblings.exists() else cpu, set()).add(cpu)
    for places in (list(cores.values()), [{cpu} for cpu in cpus]):
        if len(places) == num_threads * (local_size or 1):
            return places[start:start + num_threads]
    return []


def _number_in_environment(name):
    """The whole number that a variable holds, None where it holds none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def keep_freed_memory():
    """Makes glibc keep freed memory for reuse; otherwise every step pays page faults for memory it has just freed."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:
            return
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
