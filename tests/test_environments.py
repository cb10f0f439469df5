"""Other people's environments: notebooks, what other programs have left behind, file systems that lack something."""
import builtins
import contextlib
import errno
import io
import itertools
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from helpers import MODEL, ROOT, TINY, Child, assert_same, metrics, newest, save_picture, tiny_arguments, wait_until
from PIL import Image

import devices
import distributed
import evaluate
import generate
import resuming
import run_log
import safe_files
import training
from checkpointing import CheckpointError, load_generator
from config import Config
from generate import Options
from image_data import load_images
from image_files import DataError
from model_definitions import VAE, Decoded

RUN = pathlib.Path("runs/images")


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    safe_files.say_once.cache_clear()


# Notebooks


def test_the_programs_run_where_stdout_is_no_file(image_folder):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert training.main(["--data", str(image_folder), *tiny_arguments(steps=1)]) == 0
        assert generate.main([str(RUN), "--num-images", "1"]) == 0
        assert evaluate.main([str(RUN), "--data", str(image_folder), "--num-images", "4"]) == 0
    assert len([*pathlib.Path("cache").glob("*.uint8")]) == 1  # the same for all programs
    assert all(text in said.getvalue() for text in ("done: 1 steps", "wrote generated/seed0-00000.png", "diversity"))


def test_a_run_in_a_thread_ends_like_any_other(image_folder):
    status = []
    thread = threading.Thread(target=lambda: status.append(
        training.main(["--data", str(image_folder), *tiny_arguments(steps=2)])))
    thread.start()
    thread.join()
    assert status == [0]
    assert newest(RUN)["step"] == 2


def test_paths_numbers_and_the_home_directory_are_taken_as_python_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = Config(data=pathlib.Path("~/a"), out="~/b", cache_dir="~", resume=pathlib.Path("~/c"), steps=np.int64(3))
    assert config.data == str(tmp_path / "a")
    assert config.out == str(tmp_path / "b")
    assert config.cache_dir == str(tmp_path)
    assert config.resume == str(tmp_path / "c")
    assert config.steps == 3
    options = Options(keyframes=["~/a.png", pathlib.Path("~/b.png")], export="~/c.pt", class_=["~"], seed=np.int32(2))
    assert options.keyframes == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert options.export == str(tmp_path / "c.pt")
    assert options.class_ == ["~"]  # a class may be called so
    assert options.seed == 2
    assert evaluate.Options(data="~", held_out="~/h").held_out == str(tmp_path / "h")


# What training can do without


@pytest.mark.parametrize("broken", ["save_picture", "draw_curves", "patches", "save_generator", "read_metrics",
                                    "detail_worth_drawing"])
def test_what_is_optional_never_ends_a_run_and_is_said_once(train_tiny, monkeypatch, capfd, broken):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "used by another process", "x.png")

    monkeypatch.setattr(run_log, broken, fail)
    run = train_tiny(steps=4, sample_every=1, evaluate_every=1)
    assert newest(run)["step"] == 4
    said = [line for line in capfd.readouterr().out.splitlines() if "used by another process" in line]
    assert len(said) == {"save_picture": 2, "read_metrics": 2}.get(broken, 1)  # reals.png, samples; curves.png, measurement
    assert all(line.endswith("; training goes on without it") for line in said)


def test_a_log_that_is_held_open_gets_its_lines_later(train_tiny, monkeypatch, capfd):
    append, calls = run_log.append_line, []

    def held(path, text):
        calls.append(text)
        if len(calls) < 3:
            raise OSError("used by another process")
        append(path, text)

    monkeypatch.setattr(run_log, "append_line", held)
    run = train_tiny(steps=8)
    assert [line["step"] for line in metrics(run)] == [2, 4, 6, 8]
    assert capfd.readouterr().out.count("warning: metrics.jsonl: used by another process") == 1


def test_tensorboard_that_breaks_ends_no_run(train_tiny, monkeypatch, capfd):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    class Broken(tensorboard.SummaryWriter):
        def add_scalar(self, *_, **__):
            raise TypeError("no")

        def close(self):
            super().close()
            raise OSError("full")

    for writer in (None, Broken):
        monkeypatch.setattr(tensorboard, "SummaryWriter", writer)
        assert newest(train_tiny(steps=2, tensorboard=True, fresh=True))["step"] == 2
        assert capfd.readouterr().out.count("warning: TensorBoard: ") == 1


@pytest.mark.parametrize("backend", ["module://nowhere", "nonsense"])
def test_a_backend_of_matplotlib_that_is_not_there_is_no_matter(image_folder, backend):
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, ROOT / "training.py", "--data", image_folder, *tiny_arguments(steps=2)],
                          env=os.environ | {"MPLBACKEND": backend}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert newest(RUN)["step"] == 2


# Variables left by others


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "1"}, {"WORLD_SIZE": "many"},
    {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "tcp"},
    {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": "29500"}])
def test_variables_that_are_no_whole_set_are_refused_in_one_line(image_folder, monkeypatch, capfd, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert training.main(["--data", str(image_folder), *tiny_arguments(steps=1)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("the environment says that this process is one of several, but not how: WORLD_SIZE ")
    assert not RUN.exists()


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"}, {"LOCAL_RANK": "3"},
    {"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "4"}, {"WORLD_SIZE": "", "RANK": ""}])
def test_variables_that_name_no_others_are_no_matter(train_tiny, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert newest(train_tiny(steps=1))["step"] == 1


def alone():
    os.environ.update(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29577")
    distributed.SAID_EVERY = 0.2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_for_processes_that_never_come_is_said_and_can_be_interrupted(image_folder, number):
    child = Child("--data", image_folder, *tiny_arguments(steps=1), first=alone)
    wait_until(lambda: child.err.exists() and "waiting for " in child.err.read_text())
    os.kill(child.pid, number)
    assert child.wait() == 128 + number
    assert "for the others of 2 processes, at localhost:29577" in child.err.read_text()
    assert not RUN.exists()


@pytest.mark.parametrize(("name", "count", "expected"), [
    ("cuda", 2, "cuda:0"), ("cuda:1", 2, "cuda:1"), ("auto", 1, "cuda:0"), ("cuda:2", 2, None), ("cuda", 0, None)])
def test_a_gpu_is_chosen_by_its_number(monkeypatch, name, count, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", None)
    if expected:
        assert str(devices.pick_device(name)) == expected
        assert str(devices.pick_device("cuda", local_rank=count - 1)) == f"cuda:{count - 1}"
    else:
        with pytest.raises(devices.DeviceError, match="there is no cuda:2; there are 2" if count else "built without it"):
            devices.pick_device(name)


# Disks


def test_a_disk_that_cannot_synchronise_folders_is_used_and_said_once(train_tiny, monkeypatch, capfd):
    fsync = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    assert newest(train_tiny(steps=2))["step"] == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "a power failure may take the newest files" in line]
    assert len(said) == len(set(said)) > 0


def test_a_disk_that_cannot_append_keeps_the_whole_log(train_tiny, monkeypatch):
    real = builtins.open

    def no_append(file, mode="r", *arguments, **keywords):
        if "a" in mode:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(file, mode, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", no_append)
    assert [line["step"] for line in metrics(train_tiny(steps=8))] == [2, 4, 6, 8]


def test_half_a_line_that_could_not_be_written_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "log"
    safe_files.append_line(path, "first")
    real = builtins.open

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:3])
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(builtins, "open", lambda file, mode="r", *rest, **more: (
        Full(file, "a") if mode == "ab" else real(file, mode, *rest, **more)))
    safe_files.append_line(path, "second")
    assert path.read_text() == "first\nsecond\n"


@pytest.mark.parametrize("usage", [types.SimpleNamespace(free=0), OSError("Function not implemented")])
def test_a_disk_that_does_not_say_how_much_is_free_is_used(train_tiny, monkeypatch, usage):
    def tell(path):
        if isinstance(usage, OSError):
            raise usage
        return usage

    monkeypatch.setattr(safe_files.shutil, "disk_usage", tell)
    assert newest(train_tiny(steps=2))["step"] == 2


def test_a_disk_without_locks_is_used_and_said_once(train_tiny, monkeypatch, capfd):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(safe_files.FileLock, "acquire", fail)
    assert newest(train_tiny(steps=2))["step"] == 2
    said = capfd.readouterr().err.splitlines()
    assert f"note: {RUN}/.lock cannot be locked ([Errno {errno.ENOLCK}] No locks available), so two processes could write " \
           "there at the same time" in said


def test_who_is_refused_is_told_the_path_of_the_lock_which_stays(image_folder, train_tiny, capfd):
    train_tiny(steps=1)
    with safe_files.lock_folder(RUN, busy=pytest.fail):
        assert training.main(["--data", str(image_folder), *tiny_arguments(steps=2)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("--out: another process is training in runs/images; ")
    assert line.endswith(f"remove {RUN / '.lock'}")
    assert (RUN / ".lock").exists()


# Settings of torch


@contextlib.contextmanager
def while_set(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


@pytest.mark.parametrize("setting", [
    lambda: while_set(torch.set_default_dtype, torch.float64, torch.float32),
    lambda: while_set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    lambda: while_set(torch.set_default_device, "meta", None), torch.inference_mode, torch.no_grad])
def test_settings_of_torch_that_another_program_has_made_change_nothing(train_tiny, image_folder, setting):
    size = {"image_size": 64, "grow_every_images": 4, "steps": 2, "evaluate_every": 2}
    plain = train_tiny(**size)
    with setting():
        before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        run = train_tiny(**size, out="other")
        assert generate.main([str(run), "--num-images", "1"]) == 0
        assert evaluate.main([str(run), "--data", str(image_folder), "--num-images", "4"]) == 0
        vae = load_generator(run)
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before
    assert_same(newest(run), newest(plain))
    z = torch.randn(1, 8, requires_grad=True)
    vae.decode(z).sum().backward()
    assert z.grad.isfinite().all()


def test_autocast_around_a_run_is_refused(train_tiny):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(devices.DeviceError, match="torch.autocast is on around this"):
        train_tiny(steps=1)
    assert not RUN.exists()


def test_deterministic_algorithms_are_had(train_tiny):
    with while_set(torch.use_deterministic_algorithms, True, False):
        assert_same(newest(train_tiny(steps=3)), newest(train_tiny(steps=3, out="again")))


def test_a_model_made_without_memory_and_filled_draws_the_same():
    vae = VAE(**MODEL).requires_grad_(False)
    with torch.device("meta"):
        empty = [VAE(**MODEL), VAE(**MODEL).requires_grad_(False)]
    empty[0].to_empty(device="cpu").load_state_dict(vae.state_dict())
    empty[1].load_state_dict(vae.state_dict(), assign=True)
    z = torch.randn(2, MODEL["latent_dim"])
    for filled in empty:
        assert torch.equal(filled.decode(z), vae.decode(z))


# Moved


def test_a_run_whose_images_or_project_were_moved_or_copied_goes_on(image_folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "was").mkdir()
    image_folder.rename(tmp_path / "was" / "images")
    monkeypatch.chdir(tmp_path / "was")
    arguments = ["--data", "images", *tiny_arguments()]
    assert training.main([*arguments, "--steps", "2"]) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "was").rename(tmp_path / "now")
    monkeypatch.chdir(tmp_path / "now")
    for path in (tmp_path / "now" / "images").rglob("*.png"):  # copied: other times
        os.utime(path, (1, 1))
    assert training.main([*arguments, "--steps", "3"]) == 0
    assert f"note: the images of runs/images were at {tmp_path / 'was' / 'images'}; " in capfd.readouterr().out
    assert newest(RUN)["step"] == 3
    assert training.main([*arguments, "--steps", "4"]) == 0
    assert "were at" not in capfd.readouterr().out
    shutil.copytree("images", tmp_path / "images")
    elsewhere = ["--data", str(tmp_path / "images"), "--out", "runs/images", *tiny_arguments()]
    assert training.main([*elsewhere, "--steps", "5"]) == 0
    assert newest(RUN)["config"]["data"] == str(tmp_path / "images")
    assert os.listdir("runs") == ["images"]
    assert [line["step"] for line in metrics(RUN)] == [2, 4, 5]


def test_a_moved_run_that_began_with_a_grey_generator_goes_on(image_folder, train_tiny, tmp_path):
    train_tiny(steps=1, channels=1, out="first")
    train_tiny(steps=1, initial_checkpoint="first")
    (tmp_path / "now").mkdir()
    image_folder.rename(tmp_path / "now" / "images")
    run = train_tiny(steps=2, initial_checkpoint="first", data=str(tmp_path / "now" / "images"))
    assert run == RUN
    assert newest(run)["step"] == 2


def test_where_the_images_are_others_or_unknown_the_run_is_named_and_how_to_go_on(image_folder, train_tiny, tmp_path, capfd):
    train_tiny(steps=2)
    (tmp_path / "now").mkdir()
    other = tmp_path / "now" / "images"
    image_folder.rename(other)
    save_picture(other / "circle" / "new.png")
    capfd.readouterr()
    train_tiny(steps=1, data=str(other))
    said = capfd.readouterr().out
    assert "note: runs/images holds another run (--data " in said
    assert "so this one gets runs/images-2; with these settings that one goes on, and with other images by --resume " \
           "runs/images/checkpoints/step_0000002.pt --out NEW\n" in said
    with pytest.raises(CheckpointError, match="^--data: this run has .*, where --resume goes on from a checkpoint"):
        train_tiny(steps=3, data=str(other), out="runs/images")
    run = train_tiny(steps=3, data=str(other), resume="runs/images/checkpoints/step_0000002.pt", out="third")
    assert newest(run)["step"] == 3


def test_another_folder_of_the_same_name_is_another_run_and_fresh_starts_from_nothing(image_folder, train_tiny, tmp_path):
    train_tiny(steps=2)
    save_picture(tmp_path / "b" / "images" / "x.png")
    train_tiny(steps=1, data=str(tmp_path / "b" / "images"))
    shutil.copytree(image_folder, tmp_path / "c" / "images")
    train_tiny(steps=1, data=str(tmp_path / "c" / "images"), fresh=True)
    assert {path.name: newest(path)["step"] for path in pathlib.Path("runs").iterdir()} == {
        "images": 2, "images-2": 1, "images-3": 1}


def test_a_bfloat16_run_goes_on_in_float32_where_bfloat16_is_slow(train_tiny, monkeypatch, capfd):
    train_tiny(steps=2, precision="bfloat16")
    monkeypatch.setattr(resuming, "pick_precision", lambda device: "float32")
    assert newest(train_tiny(steps=3, precision="bfloat16"))["config"]["precision"] == "bfloat16"
    assert "is slow here" not in capfd.readouterr().out
    assert newest(train_tiny(steps=4, precision="auto"))["config"]["precision"] == "float32"
    assert capfd.readouterr().out.count("note: this run was in bfloat16, which is slow here") == 1


def test_a_moved_run_keeps_the_scale_of_its_16_bit_images(tmp_path, train_tiny):
    (tmp_path / "scans").mkdir()
    for index, brightest in enumerate([900, 1000, 4000]):
        samples = np.linspace(0, brightest, 32 * 32).reshape(32, 32).astype(np.uint16)
        Image.fromarray(samples).save(tmp_path / "scans" / f"{index}.png")
        if index:
            train_tiny(steps=index, data=str(tmp_path / "scans"), channels=1)  # the third is scaled as those before it
    (tmp_path / "scans").rename(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "old").rename(tmp_path / "new" / "scans")
    train_tiny(steps=3, data=str(tmp_path / "new" / "scans"), channels=1)
    assert os.listdir("runs") == ["scans"]


# Alarms, and too little memory


def alarms_of(run):
    return [line for line in metrics(run) if "alarm" in line]


def test_a_run_that_stands_still_is_said_once_and_logged(train_tiny, monkeypatch, capfd):
    monkeypatch.setattr(run_log, "STANDS_STILL", 2)
    monkeypatch.setattr(run_log, "LOOKED_EVERY", 0.05)
    take_step = training.training_step

    def slow(gan, images, step, *arguments):
        if step == 2:
            time.sleep(5)
        return take_step(gan, images, step, *arguments)

    monkeypatch.setattr(training, "training_step", slow)
    run = train_tiny(steps=4, log_every=1)
    (line,) = alarms_of(run)
    assert line["step"] == 2
    assert line["alarm"].endswith("s since step 2: the run stands still")
    assert f"warning: {line['alarm']}\n" in capfd.readouterr().out
    assert [line["step"] for line in metrics(run) if "alarm" not in line] == [1, 2, 3, 4]


def test_a_disk_that_will_be_full_is_said_before_it_is(train_tiny, monkeypatch, capfd):
    left = iter([10**12, 10**12, 1_000, 2_000, 10**12, 10**12])  # of which the first is for the start
    monkeypatch.setattr(run_log, "free_bytes", lambda path: next(left))
    run = train_tiny(steps=5, log_every=1)
    (line,) = alarms_of(run)
    assert line["step"] == 3
    assert re.fullmatch(r"the next checkpoint needs [\d,]+ bytes in runs/images, 1,000 are free", line["alarm"])
    assert f"warning: {line['alarm']}\n" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["collapse", "copying"])
def test_samples_that_are_alike_or_are_training_images_are_said_once(train_tiny, image_folder, monkeypatch, capfd, kind):
    monkeypatch.setattr(run_log, "JUDGED_AFTER", 8)
    known = load_images(image_folder, 32, cache_dir="cache").images / 255
    shown = itertools.cycle(known if kind == "copying" else torch.rand(1, 3, 32, 32))
    decode = VAE.decode_parts

    def drawn(self, z, y=None):
        if torch.is_grad_enabled():
            return decode(self, z)
        return Decoded(None, None, None, torch.stack([next(shown) for _ in z]))

    monkeypatch.setattr(VAE, "decode_parts", drawn)
    run = train_tiny(steps=4, sample_every=1)
    (line,) = alarms_of(run)
    assert line["step"] == 2  # 8 images
    assert line["alarm"].startswith(f"{kind}: generated images are less than half as ")
    assert capfd.readouterr().out.count(f"warning: {line['alarm']}\n") == 1


@pytest.mark.parametrize("program", [generate, evaluate])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nx"),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_too_little_memory_is_said_in_one_line(train_tiny, image_folder, monkeypatch, capfd, program, error):
    run = train_tiny(steps=1)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(VAE, "decode_parts", fail)
    more = ["--data", str(image_folder)] if program is evaluate else []
    assert program.main([str(run), *more]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "it/s" not in line and "img" not in line and line]
    assert " does not fit into memory: " in line
    assert "--device cpu" in line


def test_samples_for_which_memory_is_too_small_are_left_out(train_tiny, monkeypatch, capfd):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(run_log, "alpha_picture", fail)
    assert newest(train_tiny(steps=2, sample_every=1))["step"] == 2
    assert capfd.readouterr().out.count("warning: samples: CUDA out of memory; a smaller --batch-size needs less; ") == 1


# Caches


def test_old_caches_of_a_folder_are_named_with_their_size(image_folder, tmp_path, capfd):
    load_images(image_folder, 32, cache_dir="cache")
    save_picture(tmp_path / "else" / "images" / "a.png")
    load_images(tmp_path / "else" / "images", 32, cache_dir="cache")  # of the same name
    assert "keeps other states" not in capfd.readouterr().out
    save_picture(image_folder / "circle" / "new.png")
    load_images(image_folder, 32, cache_dir="cache")
    load_images(image_folder, 32, cache_dir="cache")
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "keeps other states" in line]
    assert re.fullmatch(rf"note: cache keeps other states or sizes of {image_folder} too, 0.0 MB, which may be removed: "
                        r"images-32px-[0-9a-f]{16}\.uint8", line)


# Odd streams, paths and values


class OnlyWrites:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def closed(stream):
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [
    OnlyWrites, lambda: closed(io.StringIO()), lambda: closed(io.TextIOWrapper(io.BytesIO())),
    lambda: io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_streams_that_are_less_than_a_file_are_no_matter(image_folder, monkeypatch, stream):
    image_folder.rename("bilder_ü漢")
    monkeypatch.setattr(sys, "stdout", stream())
    assert training.main(["--data", "bilder_ü漢", *tiny_arguments(steps=2), "--out", "run"]) == 0
    assert generate.main(["run", "--num-images", "1"]) == 0
    monkeypatch.setattr(sys, "stderr", stream())
    assert generate.main(["no_漢"]) == 2


def test_a_stdout_of_a_program_whose_flush_fails_does_not_cost_the_process_its_own(image_folder, monkeypatch):
    class Fails(io.StringIO):
        def flush(self):
            raise OSError("no")

    before = os.fstat(1)
    monkeypatch.setattr(sys, "stdout", Fails())
    assert training.main(["--data", str(image_folder), *tiny_arguments(steps=1)]) == 0
    assert os.path.samestat(os.fstat(1), before)


def test_a_path_that_begins_with_a_tilde_and_is_none_of_a_home_is_itself(train_tiny, capfd):
    run = train_tiny(steps=1)
    save_picture("~photo.png")
    assert generate.main([str(run), "--reconstruct", "~photo.png"]) == 0
    assert generate.main([str(run), "--animate", "~photo.png"]) == 0
    assert generate.main(["~no-such-user/a.pt"]) == 2
    assert evaluate.main([str(run), "--data", "~no-such-user/images"]) == 2
    assert capfd.readouterr().err.count("~no-such-user/") >= 2


@pytest.mark.parametrize("settings", [{"images": 7}, {"images": [1, 2]}, {"seeds": range(3)}, {"seeds": 5.5}])
def test_options_of_another_type_are_refused_by_name(settings):
    (fault,) = Options(**settings).faults()
    assert fault.startswith(f"--{next(iter(settings))}: must be text, got ")


@pytest.mark.parametrize("images", [np.zeros((4, 3, 32, 32), np.uint8)[:, ::-1], [torch.zeros(3, 32, 32)] * 4, "images"])
def test_images_in_memory_that_torch_cannot_take_are_refused_in_one_line(images):
    with pytest.raises(DataError, match=r"^data: expected uint8 images \(M, C, H, W\).*$"):
        training.train(Config(data="mine", **TINY, steps=1), data=images)


# More of what other programs do


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(train_tiny, monkeypatch):
    train_tiny(steps=2)
    run = train_tiny(steps=4)
    for error, kind in ((OSError(errno.EIO, "Input/output error"), OSError), (MemoryError(), MemoryError)):
        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", fail)
            with pytest.raises(kind, match="step_0000004.pt cannot be read now: Input" if kind is OSError else None):
                train_tiny(steps=6)
    assert newest(train_tiny(steps=6))["step"] == 6
    assert [line["step"] for line in metrics(run)] == [2, 4, 6]


def test_checksums_that_another_program_has_turned_off_are_written(train_tiny):
    torch.serialization.set_crc32_options(False)
    try:
        train_tiny(steps=2)
        assert newest(train_tiny(steps=3))["step"] == 3
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)


def test_files_that_another_program_holds_open_are_left_and_the_run_goes_on(train_tiny, monkeypatch, capfd):
    unlink, replace = pathlib.Path.unlink, os.replace
    train_tiny(steps=1)
    (RUN / ".curves.png.1.tmp").touch()

    def held(self, *arguments, **keywords):
        if self.name.startswith(("step_", ".curves")):
            raise PermissionError(errno.EACCES, "used by another process")
        unlink(self, *arguments, **keywords)

    def pinned(source, target):
        if str(target).endswith("config.json"):
            raise PermissionError(errno.EACCES, "used by another process")
        replace(source, target)

    monkeypatch.setattr(pathlib.Path, "unlink", held)
    monkeypatch.setattr(os, "replace", pinned)
    assert newest(train_tiny(steps=6, checkpoint_every=2, keep_checkpoints=1))["step"] == 6
    said = capfd.readouterr()
    assert "note: runs/images/checkpoints/step_0000002.pt cannot be removed: used by another process" in said.err
    assert said.out.count("config.json could not be written") == 1


def test_a_restart_counts_only_where_torchrun_has_started_the_process(train_tiny, monkeypatch):
    train_tiny(steps=1)
    for left in ("1", "abc"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", left)
        assert train_tiny(steps=1, fresh=True).name != "images"


def test_a_file_that_a_run_began_with_is_known_by_another_name_of_its_path(train_tiny, tmp_path):
    run = train_tiny(steps=2, out="first")
    begun = train_tiny(steps=1, initial_checkpoint="first", latent_dim=8)
    assert train_tiny(steps=2, initial_checkpoint=str(tmp_path / "first"), latent_dim=8) == begun
    path = newest_path(run)
    train_tiny(steps=3, resume=str(path), out="second")
    assert newest(train_tiny(steps=4, resume=str(tmp_path / path), out="second"))["step"] == 4


def newest_path(run):
    return max((run / "checkpoints").glob("step_*.pt"))


def test_a_run_of_the_same_name_with_damaged_checkpoints_is_no_matter_to_another(train_tiny, tmp_path):
    newest_path(train_tiny(steps=1)).write_text("x")
    save_picture(tmp_path / "b" / "images" / "x.png")
    assert train_tiny(steps=1, data=str(tmp_path / "b" / "images")) == pathlib.Path("runs/images-2")


def test_a_group_of_processes_that_the_caller_has_made_stays(image_folder, tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert training.main(["--data", str(image_folder), *tiny_arguments(steps=1)]) == 0
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_cannot_be_joined_are_said_in_one_line(image_folder, monkeypatch, capfd):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    assert training.main(["--data", str(image_folder), *tiny_arguments(steps=1)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("the other processes cannot be joined at localhost:99999: ")


def test_a_process_that_may_start_no_thread_trains(train_tiny, monkeypatch):
    run = train_tiny(steps=1)

    def fail(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert newest(train_tiny(steps=2, out=str(run)))["step"] == 2


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_disks_that_refuse_to_synchronise_anything_are_used(train_tiny, monkeypatch, capfd, call):
    real = getattr(os, call)

    def fail(first, *arguments, **keywords):
        if call == "fsync" or os.path.isdir(first):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(first, *arguments, **keywords)

    monkeypatch.setattr(os, call, fail)
    assert newest(train_tiny(steps=1))["step"] == 1
    assert "cannot be synchronised ([Errno 22] Invalid argument)" in capfd.readouterr().err


def test_a_disk_that_cannot_map_files_is_read(train_tiny, monkeypatch):
    mapped = newest(train_tiny(steps=2))

    def fail(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("image_data.mmap.mmap", fail)
    assert_same(newest(train_tiny(steps=2, out="read")), mapped)


def test_a_disk_that_has_told_what_is_free_is_full_where_it_tells_nothing(train_tiny, monkeypatch):
    left = iter([10**12, 0, 0])
    monkeypatch.setattr(run_log, "free_bytes", lambda path: next(left))
    (line,) = alarms_of(train_tiny(steps=3, log_every=1))
    assert line["step"] == 2


def test_too_little_memory_anywhere_in_training_is_one_line(image_folder, monkeypatch, capfd):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(training, "GAN", fail)
    assert training.main(["--data", str(image_folder), *tiny_arguments(steps=1)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("training with --batch-size 4 and --image-size 32 does not fit into memory: MemoryError. ")


def test_a_block_of_another_device_around_a_run_changes_nothing(train_tiny, image_folder):
    plain = train_tiny(steps=2)
    with torch.device("meta"):
        run = train_tiny(steps=2, out="other")
        assert generate.main([str(run), "--num-images", "1"]) == 0
        assert torch.empty(0).device.type == "meta"
    assert_same(newest(run), newest(plain))


@pytest.mark.parametrize("threads", ["", "abc", "0"])
def test_a_number_of_threads_that_is_none_is_no_number(monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(devices, "num_cpus", lambda: 1)
    torch.set_num_threads(2)
    devices.limit_threads()
    assert torch.get_num_threads() == 1


def test_a_folder_can_be_checked_where_no_cache_can_be_kept(image_folder, capfd):
    pathlib.Path("file").write_text("x")
    arguments = ["--data", str(image_folder), "--image-size", "32", "--check-data"]
    assert training.main([*arguments, "--cache-dir", "file/below"]) == 0
    said = capfd.readouterr().out
    assert "note: --cache-dir: " in said
    assert "nothing is kept" in said
    assert "10 images, 0 of them cannot be read" in said
