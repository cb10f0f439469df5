import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, newest, save_picture

import devices
import image_data
from checkpointing import load_checkpoint, save_checkpoint

THREADS_OF_THEIR_OWN = """
import os, sys, torch, devices
threads = devices.start_threads()
before = {thread: os.sched_getaffinity(thread) for thread in threads or [0]}
with devices.one_core_each(threads):
    kept = [os.sched_getaffinity(thread) for thread in before]
assert {thread: os.sched_getaffinity(thread) for thread in before} == before
print(len(threads[1:]), kept == list(before.values()), sum(map(len, kept)) == len(set.union(*kept)), *map(min, kept))
"""

several_cpus = pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
                                  reason="needs Linux and two CPUs")


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize(("own", "files", "expected"), [
    ("0::/\n", {}, 8),
    ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "140000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "nonsense"}, 8),
    ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
    ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "100000 50000\n"}, 2),
    ("0::/docker/on_the_host\n", {"cpu.max": "500000 100000\n"}, 5),
    ("0::/../outside\n", {"cpu.max": "500000 100000\n"}, 5),
    ("3:memory:/x\n2:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 2),
    ("2:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 8),
    ("2:cpuset:/x\n", {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 8),
    (None, {"cpu.max": "100000 100000\n"}, 8),
])
def test_the_quota_of_a_cgroup_limits_the_number_of_cpus(tmp_path, eight_cpus, own, files, expected):
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    if own:
        (tmp_path / "own").write_text(own)
    assert devices.num_cpus(tmp_path / "cgroup", tmp_path / "own") == expected


STAT = "cache 7\nactive_file 300\ninactive_file 200\n"


@pytest.mark.parametrize(("own", "files", "expected"), [
    ("0::/a/b\n", {"a/memory.max": "5000", "a/memory.current": "4000", "a/memory.stat": STAT}, 1_500),
    ("0::/a/b\n", {"a/memory.max": "max", "a/memory.current": "4000", "a/memory.stat": STAT}, 1_024_000),
    ("3:memory:/x\n", {"memory/x/memory.limit_in_bytes": "6000", "memory/x/memory.usage_in_bytes": "4000",
                       "memory/x/memory.stat": STAT}, 2_500),
    ("0::/a\n", {"a/memory.max": "5000"}, 1_024_000),
])
def test_free_memory_is_what_the_system_and_the_cgroups_leave(tmp_path, own, files, expected):
    for name, text in {"own": own, "meminfo": "MemTotal: 9999 kB\nMemAvailable:   1000 kB\n",
                       **{f"cgroup/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices.free_memory(tmp_path / "cgroup", tmp_path / "own", tmp_path / "meminfo") == expected
    assert devices.free_memory(tmp_path / "none", tmp_path / "none", tmp_path / "none") is None


def test_the_number_of_cpus_is_that_of_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert devices.num_cpus(tmp_path, tmp_path / "own") == 2


def test_as_many_files_are_decoded_at_a_time_as_there_are_cpus(monkeypatch):
    seen = []

    class Threads(image_data.DecodingThreads):
        def __init__(self, number):
            seen.append(number)
            super().__init__(number)

    monkeypatch.setattr(image_data, "DecodingThreads", Threads)
    monkeypatch.setattr(image_data, "num_cpus", lambda: 3)
    save_picture("pictures/a.png")
    image_data.load_images("pictures", 32, cache_dir="cache")
    assert seen == [3]


@pytest.mark.parametrize(("cpus", "environment", "expected"), [(1, None, 1), (2, None, 2), (8, None, 3), (1, "3", 3)])
def test_threads_beyond_the_cpus_are_given_up_unless_they_were_asked_for(monkeypatch, cpus, environment, expected):
    monkeypatch.setattr(devices, "num_cpus", lambda: cpus)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    torch.set_num_threads(3)
    devices.limit_threads()
    assert torch.get_num_threads() == expected


def places(first="", **environment):
    done = subprocess.run([sys.executable, "-c", first + THREADS_OF_THEIR_OWN], cwd=ROOT, text=True, capture_output=True,
                          check=True, env=os.environ | environment)
    threads, unchanged, apart, *cpus = done.stdout.split()
    return int(threads), unchanged == "True", apart == "True", cpus


@several_cpus
def test_threads_have_a_core_each_where_they_take_up_all_cores():
    number = len(os.sched_getaffinity(0))
    threads, unchanged, apart, _ = places(OMP_NUM_THREADS=str(number))
    assert threads == number - 1
    assert apart
    assert not unchanged
    # Of two processes, each takes its own half of the cores.
    if number % 2 == 0:
        halves = [places(OMP_NUM_THREADS=str(number // 2), LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in (0, 1)]
        assert all(apart and not unchanged for _, unchanged, apart, _ in halves)
        assert not set(halves[0][3]) & set(halves[1][3])


@several_cpus
def test_threads_are_left_alone_where_some_cores_are_free_or_threads_are_unknown():
    number = len(os.sched_getaffinity(0))
    assert places(OMP_NUM_THREADS="1")[1]
    threads, unchanged, *_ = places(f"import torch; torch.set_num_threads({number + 1})")
    assert (threads, unchanged) == (number, True)
    for processes in (1, number):
        running = {"OMP_NUM_THREADS": str(number), "LOCAL_WORLD_SIZE": str(processes)}
        assert places("import torch; torch.ones(2**20).tanh()", **running)[:2] == (0, True)


def test_the_number_of_threads_is_saved_and_another_one_is_said(train_tiny, capfd):
    run = train_tiny(steps=1)
    assert newest(run)["threads"] == 1
    train_tiny(steps=2)
    assert "warning" not in capfd.readouterr().out
    torch.set_num_threads(2)
    train_tiny(steps=3)
    assert "warning: the run had 1 threads, has 2 from here on" in capfd.readouterr().out
    assert newest(run)["threads"] == 2


def test_a_checkpoint_that_does_not_name_the_threads_is_gone_on_with(train_tiny, capfd):
    run = train_tiny(steps=1)
    state = newest(run)
    del state["threads"]
    path = save_checkpoint(run / "checkpoints", state.pop("step"), state, keep=1)
    assert load_checkpoint(path)["threads"] == 0
    train_tiny(steps=2)
    assert "warning" not in capfd.readouterr().out
