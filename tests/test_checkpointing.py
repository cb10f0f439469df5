import collections
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from helpers import MODEL, STATE, Payload

from checkpointing import (
    CheckpointError,
    check_tensors,
    list_checkpoints,
    load_checkpoint,
    load_generator,
    load_newest,
    save_checkpoint,
)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path / "new", 12, STATE, keep=2)
    assert path.name == "step_0000012.pt"
    state = load_checkpoint(path)
    assert state["step"] == 12
    assert torch.equal(state["generator"]["a"], STATE["generator"]["a"])
    assert os.listdir(path.parent) == [path.name]


def test_only_the_newest_are_kept_in_order_of_steps(tmp_path):
    for step in (5, 99, 100, 10_000_000):
        save_checkpoint(tmp_path, step, STATE, keep=4)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [5, 99, 100, 10_000_000]
    save_checkpoint(tmp_path, 10_000_001, STATE, keep=2)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [10_000_000, 10_000_001]


def test_checkpoints_that_cannot_be_read_do_not_push_out_the_one_just_saved(tmp_path):
    save_checkpoint(tmp_path, 5, STATE, keep=1)
    for step in (7, 8):
        (tmp_path / f"step_000000{step}.pt").write_bytes(b"torn")
    save_checkpoint(tmp_path, 6, STATE, keep=1)
    assert load_newest(tmp_path, report=lambda line: None)["step"] == 6
    assert not (tmp_path / "step_0000005.pt").exists()


@pytest.mark.parametrize("content", ["code", "code in an old format", "noise", "nothing", "tar", "list", "other format",
                                     "cut", "incomplete", "state in an old format"])
def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path, content):
    path = tmp_path / "step_0000001.pt"
    if content == "code":
        torch.save({"format": 2, "x": Payload()}, path)
    elif content == "code in an old format":
        path.write_bytes(pickle.dumps(Payload()))
    elif content == "state in an old format":
        torch.save({"format": 2, "step": 1, **STATE}, path, _use_new_zipfile_serialization=False)
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
        torch.save({"format": 2, "step": 3}, path)
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


def test_the_newest_that_can_be_read_is_taken(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, STATE, keep=3)
    (tmp_path / "step_0000003.pt").write_bytes(b"")
    said = []
    assert load_newest(tmp_path, report=said.append)["step"] == 2
    assert len(said) == 1
    assert "step_0000003.pt" in said[0]
    assert load_newest(tmp_path / "nowhere") is None


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
        with pytest.raises(OSError, match=r"000002.pt could not be written: 400,000 bytes are needed, [\d,]+ bytes"):
            save_checkpoint(tmp_path, 2, {"generator": torch.zeros(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001.pt"]
    assert load_checkpoint(tmp_path / "step_0000001.pt")["step"] == 1


def test_a_process_killed_while_writing_leaves_the_older_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, STATE, keep=1)
    code = ("import os, signal, checkpointing\n"
            "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"checkpointing.save_checkpoint({str(tmp_path)!r}, 2, {{}}, keep=1)")
    root = __file__.rsplit("tests", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".step_0000002.pt.*.tmp"))
    assert load_newest(tmp_path)["step"] == 1


# Files from a stranger


class Liar(collections.OrderedDict):
    """Loaded as an OrderedDict that holds a tensor and whose attributes, set by the file, may say otherwise."""

    def __reduce__(self):
        empty = collections.OrderedDict
        attributes = {"items": empty, "values": empty, "get": 5, "keys": 5, "_metadata": 5}
        return collections.OrderedDict, (), attributes, None, iter([("a", torch.zeros(2))])


def nested(depth):
    value = ()
    for _ in range(depth):
        value = (value,)
    return value


@pytest.mark.parametrize("change", [
    {"format": torch.zeros(3)}, {"config": {nested(100): 1}}, {"config": [1]},
    {"config": {"a": {"b": {"c": {"d": 1}}}}}, {"averaged": dict.fromkeys(range(100_000), 1)},
    {"config": Liar()}, {"model_arguments": Liar()}, {"pending_metrics": Liar()}, {"averaged": Liar()},
    {"pending_metrics": {"loss": torch.zeros(1, device="meta")}}, {"pending_metrics": {"loss": torch.zeros(1).to_sparse()}},
])
def test_what_is_dressed_up_as_a_checkpoint_ends_in_one_line(tmp_path, change):
    torch.save({"format": 2, "step": 1, **STATE, **change}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt: ") as caught:
        load_generator(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_what_a_tensor_says_of_itself_is_not_believed(tmp_path):
    weights = dict(STATE["averaged"])
    weights["mu.bias"] = torch.nn.Parameter(torch.full_like(weights["mu.bias"], float("nan")))
    weights["mu.bias"].isfinite = 5  # saved, and set again on loading
    torch.save({"format": 2, "step": 1, **STATE, "averaged": weights}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="averaged.mu.bias holds numbers that are not finite"):
        load_generator(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{nested(3): torch.zeros(1)}, dict.fromkeys(range(100_000), 1), {"a": {"b": {"c": {}}}}])
def test_what_is_more_than_named_tensors_is_refused_before_anything_looks_into_it(tmp_path, content):
    torch.save({"format": 2, "step": 1, **STATE, "generator": content}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt: not a checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "x.pt")


def test_other_files_beside_the_checkpoints_are_left_alone(tmp_path):
    others = ["step_best.pt", "step_0000009 (copy).pt", "step_1.pt", "notes.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "step_0000000.pt").mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, STATE, keep=1)
    assert load_newest(tmp_path)["step"] == 2
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "step_0000002.pt", "step_0000000.pt"])


def test_a_single_flipped_bit_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE | {"generator": {"a": torch.arange(10_000.0)}}, keep=1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a checkpoint, or a damaged one"):
        load_checkpoint(path)


def test_a_file_that_unpacks_to_more_than_it_takes_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE | {"generator": {"a": torch.zeros(100_000)}}, keep=1)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(CheckpointError, match="not a checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "small.pt")


@pytest.mark.parametrize(("change", "named"), [
    ({"extra": 1}, "'extra' is not part of one"),
    ({"images_seen": -1}, "images_seen is out of range"),
    ({"images_seen": 10**600}, "images_seen is out of range"),
    ({"elapsed_seconds": float("nan")}, "elapsed_seconds is out of range"),
    ({"num_images": True}, "num_images is missing or no int"),
    ({"config": {"out": torch.zeros(2)}}, "config holds other things than plain values"),
    ({"model_arguments": {1: 2}}, "model_arguments holds other things"),
    ({"pending_metrics": {"loss": "high"}}, "pending_metrics.loss is no plain tensor"),
    ({"pending_metrics": {"loss": torch.zeros(2)}}, "pending_metrics is of 2 steps, of 1 that were taken"),
    ({"pending_metrics": {"loss": torch.zeros(1), "other": torch.zeros(())}}, "pending_metrics.other is .*shape"),
    ({"pending_metrics": {"loss": torch.tensor([float("inf")])}}, "pending_metrics.loss holds numbers that are not finite"),
])
def test_a_state_of_another_form_is_refused_by_name(tmp_path, change, named):
    path = tmp_path / "x.pt"
    torch.save({"format": 2, "step": 1, **STATE, **change}, path)
    with pytest.raises(CheckpointError, match=f"x.pt: not a checkpoint of this program: {named}"):
        load_checkpoint(path)


@pytest.mark.parametrize("detail", [1.01, -0.1, float("nan"), float("inf"), 1])
def test_detail_that_no_generator_can_have_is_refused(tmp_path, detail):
    path = save_checkpoint(tmp_path, 1, STATE | {"detail": detail}, keep=1)
    with pytest.raises(CheckpointError, match="step_0000001.pt: not a checkpoint of this program: detail"):
        load_checkpoint(path)


@pytest.mark.parametrize(("saved", "said"), [
    ({"a": torch.zeros(2)}, r"net: 'b' is missing"),
    ({"a": torch.zeros(2), "b": {"c": torch.ones(())}, "d": 1}, r"net: 'd' is not part of it"),
    ({"a": torch.zeros(3), "b": {"c": torch.ones(())}}, r"net.a is torch.float32 of shape \(3,\), expected .*\(2,\)"),
    ({"a": torch.zeros(2).half(), "b": {"c": torch.ones(())}}, r"net.a is torch.float16"),
    ({"a": torch.zeros(2), "b": torch.ones(())}, r"net.b is no dict"),
    ({"a": torch.zeros(2), "b": {"c": 1.0}}, r"net.b.c is no plain tensor"),
    ({"a": torch.zeros(2, device="meta"), "b": {"c": torch.ones(())}}, r"net.a is no plain tensor"),
    ({"a": torch.zeros(2).to_sparse(), "b": {"c": torch.ones(())}}, r"net.a is no plain tensor"),
    ({"a": torch.zeros(1).expand(2), "b": {"c": torch.ones(())}}, r"net.a is not stored in full"),
    ({"a": torch.tensor([1.0, float("inf")]), "b": {"c": torch.ones(())}}, r"net.a holds numbers that are not finite"),
])
def test_tensors_that_do_not_fit_are_refused_by_name(saved, said):
    expected = {"a": torch.empty(2, device="meta"), "b": {"c": torch.empty((), device="meta")}}
    check_tensors({"a": torch.zeros(2), "b": {"c": torch.ones(())}}, expected, "net")
    with pytest.raises(CheckpointError, match=said):
        check_tensors(saved, expected, "net")


def test_a_generator_comes_from_a_file_or_from_the_newest_in_a_run_folder(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 3, STATE, keep=1)
    for source in (path, tmp_path, str(tmp_path)):
        vae = load_generator(source)
        assert all(torch.equal(value, STATE["averaged"][name]) for name, value in vae.state_dict().items())
        assert not any(parameter.requires_grad for parameter in vae.parameters())
    with pytest.raises(CheckpointError, match="no checkpoints below it"):
        load_generator(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        load_generator(tmp_path / "nowhere")


@pytest.mark.parametrize(("arguments", "said"), [
    ({"image_size": 100}, "image_size must be one of"),
    ({"latent_dim": 9}, "expected torch.float32 of shape"),
    ({"base_channels": 10**6}, "expected torch.float32 of shape"),  # and no memory was taken for it
    ({"num_frames": 10**9}, "num_frames must be from 1 to"),
    ({"num_frames": 0}, "num_frames must be from 1 to"),
    ({"num_frames": 4_000, "image_size": (512, 2048)}, "num_frames must be from 1 to"),
    ({"image_size": None, "image_height": 33, "image_width": 44}, "image_size must be one of .* got 33x44"),
    ({"base_channels": "2"}, "model_arguments"),
    ({"output_layer": "os.system"}, "output_layer"),
    ({"device": "cuda"}, "device"),
    ({"image_size": 32.0}, "model_arguments"),
    ({"latent_dim": 0}, "model_arguments"),
])
def test_a_generator_is_not_built_before_the_file_is_known_to_hold_it(tmp_path, arguments, said):
    path = save_checkpoint(tmp_path, 1, STATE | {"model_arguments": MODEL | arguments}, keep=1)
    with pytest.raises(CheckpointError, match=f"step_0000001.pt: .*{said}") as caught:
        load_generator(path)
    assert "\n" not in str(caught.value)


def test_a_generator_is_found_in_the_home_directory_and_is_in_evaluation_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tmp_path / "saved", 3, STATE, keep=1)
    assert not load_generator("~/saved/step_0000003.pt").training


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_holds_names_twice_is_counted_in_full(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE | {"generator": {"a": torch.rand(100_000)}}, keep=1)
    assert load_checkpoint(path)["step"] == 1
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for entry in list(archive.infolist()):
            same = archive.read(entry.filename) if "pkl" in entry.filename else bytes(entry.file_size)
            archive.writestr(entry.filename, same)
    with pytest.raises(CheckpointError, match="not a checkpoint, or a damaged one \\(ValueError\\)"):
        load_checkpoint(path)
