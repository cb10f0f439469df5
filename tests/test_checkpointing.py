import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile

import pytest
import torch

from checkpointing import CheckpointError, list_checkpoints, load_checkpoint, load_newest, remove_leftovers, save_checkpoint

STATE = {"images_seen": 0, "elapsed_seconds": 0.0, "num_images": 1, "config": {"seed": 0}, "model_arguments": {},
         "pending_metrics": ["x"], "weights": {"a": torch.arange(6.0)}}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path / "new", 12, STATE, keep=2)
    assert path.name == "step_0000012.pt"
    state = load_checkpoint(path)
    assert state["step"] == 12
    assert torch.equal(state["weights"]["a"], STATE["weights"]["a"])
    assert os.listdir(path.parent) == [path.name]


def test_only_the_newest_are_kept_in_order_of_steps(tmp_path):
    for step in (5, 99, 100, 10_000_000):
        save_checkpoint(tmp_path, step, STATE, keep=4)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [5, 99, 100, 10_000_000]
    save_checkpoint(tmp_path, 10_000_001, STATE, keep=2)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [10_000_000, 10_000_001]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("run-by-loading",)


def test_checkpoints_that_cannot_be_read_do_not_push_out_the_one_just_saved(tmp_path):
    save_checkpoint(tmp_path, 5, STATE, keep=1)
    for step in (7, 8):
        (tmp_path / f"step_000000{step}.pt").write_bytes(b"torn")
    save_checkpoint(tmp_path, 6, STATE, keep=1)
    assert load_newest(tmp_path, report=lambda line: None)["step"] == 6
    assert not (tmp_path / "step_0000005.pt").exists()


@pytest.mark.parametrize("content", ["code", "code in an old format", "noise", "nothing", "tar", "list", "other format",
                                     "cut", "incomplete"])
def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path, content):
    path = tmp_path / "step_0000001.pt"
    if content == "code":
        torch.save({"format": 1, "x": Payload()}, path)
    elif content == "code in an old format":
        path.write_bytes(pickle.dumps(Payload()))
    elif content == "noise":
        path.write_bytes(bytes(range(256)) * 40)
    elif content == "nothing":
        path.touch()
    elif content == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "storages")
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "incomplete":
        torch.save({"format": 1, "step": 3}, path)
    elif content == "other format":
        torch.save({"format": 99}, path)
    else:
        save_checkpoint(tmp_path, 1, STATE, keep=1)
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="step_0000001.pt: not a checkpoint") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    assert not os.path.exists("run-by-loading")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="none.pt: no such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_the_newest_that_can_be_read_is_taken_and_torn_files_are_removed(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, STATE, keep=3)
    (tmp_path / "step_0000003.pt").write_bytes(b"")
    (tmp_path / "step_0000004.tmp").write_bytes(b"half")
    said = []
    assert load_newest(tmp_path, report=said.append)["step"] == 2
    assert len(said) == 1
    assert "step_0000003.pt" in said[0]
    assert load_newest(tmp_path / "nowhere") is None
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step_0000001.pt", "step_0000002.pt", "step_0000003.pt"]


def test_checkpoints_of_which_none_can_be_read_are_not_an_empty_folder(tmp_path):
    (tmp_path / "step_0000001.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the checkpoints can be read"):
        load_newest(tmp_path, report=lambda line: None)


def test_a_failing_write_leaves_the_older_checkpoint_and_no_torn_file(tmp_path):
    save_checkpoint(tmp_path, 1, STATE, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step_0000002.pt could not be written, [\d,]+ bytes are free there"):
            save_checkpoint(tmp_path, 2, {"large": torch.zeros(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001.pt"]
    assert load_checkpoint(tmp_path / "step_0000001.pt")["step"] == 1


def test_a_process_killed_while_writing_leaves_the_older_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, STATE, keep=1)
    code = ("import os, signal, checkpointing, torch\n"
            "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"checkpointing.save_checkpoint({str(tmp_path)!r}, 2, {{}}, keep=1)")
    root = __file__.rsplit("tests", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "step_0000002.tmp").exists()
    assert load_newest(tmp_path)["step"] == 1
