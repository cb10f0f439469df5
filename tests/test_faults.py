"""What a run survives: signals, kills, full disks, files and processes that are not as they should be."""
import contextlib
import functools
import os
import pathlib
import pty
import re
import resource
import select
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, Child, assert_same, metrics, newest, save_picture, tiny_arguments, wait_until
from PIL import Image

import resuming
import run_log
import training
from checkpointing import list_checkpoints, load_newest
from image_data import load_images
from image_files import DataError, decode_image
from resuming import RunFolderError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")
RUN = pathlib.Path("runs/images")


def started(image_folder, first=None, **settings):
    """A run that has taken its first step."""
    child = Child("--data", image_folder, *tiny_arguments(**{"log_every": 1, "steps": 100_000, **settings}), first=first)
    wait_until((RUN / "metrics.jsonl").exists)
    return child


def assert_goes_on_exactly(train_tiny, steps, **settings):
    """Trained further, the run ends as one that was never stopped."""
    train_tiny(steps=steps, log_every=1, **settings)
    straight = train_tiny(steps=steps, log_every=1, out="straight", **settings)
    assert_same(newest(straight), newest(RUN))
    assert metrics(straight) == metrics(RUN)
    assert not [*RUN.rglob(".*.tmp")]


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_leaves(image_folder, train_tiny, number, status):
    child = started(image_folder, first=os.setsid)
    os.killpg(child.pid, number)
    assert child.wait() == status
    assert child.err.read_text() == ""
    stopped = newest(RUN)["step"]
    assert child.out.read_text().endswith(f"stopped after step {stopped}, saved; the same command goes on from there\n")
    assert metrics(RUN)[-1]["step"] == stopped
    assert_goes_on_exactly(train_tiny, stopped + 2)


def ignore_hang_ups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_a_closed_terminal_is_no_matter(image_folder):
    child = started(image_folder, first=ignore_hang_ups, steps=40)
    os.kill(child.pid, signal.SIGHUP)
    assert child.wait() == 0
    assert newest(RUN)["step"] == 40


def take_terminal(name):
    os.setsid()
    for number in (0, 1, 2):
        os.dup2(os.open(name, os.O_RDWR), number)


def test_a_terminal_that_is_closed_stops_the_run_like_ctrl_c(image_folder, train_tiny):
    ours, theirs = pty.openpty()
    child = Child("--data", image_folder, *tiny_arguments(log_every=1, steps=100_000),
                  first=functools.partial(take_terminal, os.ttyname(theirs)))

    def trains():
        while select.select([ours], [], [], 0)[0]:
            os.read(ours, 10_000)
        return (RUN / "metrics.jsonl").exists()

    wait_until(trains)
    os.close(theirs)
    os.close(ours)
    assert child.wait() == 129
    assert_goes_on_exactly(train_tiny, newest(RUN)["step"] + 2)


def test_a_reader_that_goes_away_does_not_stop_the_run(image_folder):
    os.mkfifo("child.out")
    child = Child("--data", image_folder, *tiny_arguments(log_every=1, steps=20))
    with open("child.out") as reader:
        assert "images in 3 classes" in reader.readline()
    assert child.wait() == 0
    assert child.err.read_text() == ""
    assert newest(RUN)["step"] == 20


def test_output_is_handed_on_line_by_line(image_folder):
    child = Child("--data", image_folder, *tiny_arguments(log_every=100_000, steps=100_000))  # which says three lines
    wait_until(lambda: child.out.exists() and "10 images" in child.out.read_text())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


def noisy_pictures(folder, number):
    """One picture that takes long to decode, so many times."""
    folder.mkdir()
    Image.effect_noise((2000, 2000), 90).save(folder / "0.png")
    for index in range(1, number):
        os.link(folder / "0.png", folder / f"{index}.png")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_while_images_are_decoded_leaves_no_torn_cache(tmp_path, number, status):
    noisy_pictures(tmp_path / "many", 40)
    child = Child("--data", "many", *tiny_arguments())
    wait_until(lambda: list(tmp_path.glob("cache/.*.tmp")))
    os.kill(child.pid, number)
    assert child.wait() == status
    assert not [*tmp_path.glob("cache/*.uint8")]
    assert not (tmp_path / "runs").exists()
    if number != signal.SIGKILL:
        assert child.out.read_text() == ""
        assert child.err.read_text() == "stopped while preparing; nothing was left half done\n"
        assert os.listdir("cache") == [".lock"]
    for index in range(1, 40):
        (tmp_path / "many" / f"{index}.png").unlink()
    images = load_images("many", 32, cache_dir="cache").images
    assert torch.equal(images[0], decode_image(tmp_path / "many" / "0.png", 32))
    assert not [*tmp_path.glob("cache/.*.tmp")]


# Writes


def in_the_middle_of_a_save(*numbers, step):
    """From now on, saving that step writes some of the file and then sends signals."""
    real = torch.save

    def save(state, file):
        if state["step"] == step:
            file.write(b"x" * 100_000)
            for number in numbers:
                os.kill(os.getpid(), number)
            file.seek(0)
        real(state, file)

    torch.save = save


@pytest.mark.parametrize(("numbers", "status"), [((signal.SIGINT,), 130), ((signal.SIGTERM, signal.SIGTERM), 143)])
def test_a_signal_in_the_middle_of_a_save_finishes_it(image_folder, train_tiny, numbers, status):
    child = Child("--data", image_folder, *tiny_arguments(steps=9, log_every=1, checkpoint_every=2),
                  first=functools.partial(in_the_middle_of_a_save, *numbers, step=4))
    assert child.wait() == status
    assert "stopped after step 4, saved" in child.out.read_text()
    assert newest(RUN)["step"] == 4
    assert_goes_on_exactly(train_tiny, 6)


@pytest.mark.parametrize(("numbers", "status"), [((signal.SIGKILL,), -9), ((signal.SIGINT, signal.SIGINT), 130)])
def test_death_in_the_middle_of_a_save_leaves_the_checkpoint_before_and_the_run_goes_on(image_folder, train_tiny, numbers,
                                                                                          status):
    child = Child("--data", image_folder, *tiny_arguments(steps=9, log_every=1, checkpoint_every=2, keep_checkpoints=1),
                  first=functools.partial(in_the_middle_of_a_save, *numbers, step=4))
    assert child.wait() == status
    *torn, whole = sorted(os.listdir(RUN / "checkpoints"))
    assert len(torn) == (status == -signal.SIGKILL)
    assert all(re.fullmatch(r"\.step_0000004\.pt\.\d+\.tmp", name) for name in torn)
    assert whole == "step_0000002.pt"
    if not torn:
        assert child.err.read_text() == "stopped at once; the newest checkpoint is from before\n"
    with open(RUN / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "ima')  # as a crash may leave it
    assert_goes_on_exactly(train_tiny, 6)


def allow_small_files_only():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(image_folder, train_tiny):
    train_tiny(steps=2, log_every=1, keep_checkpoints=1)
    child = Child("--data", image_folder, *tiny_arguments(steps=4, log_every=1, keep_checkpoints=1),
                  first=allow_small_files_only)
    assert child.wait() == 2
    (line,) = child.err.read_text().splitlines()
    assert line.startswith("runs/images/checkpoints/step_0000004.pt could not be written: ")
    assert "bytes are needed" in line
    assert os.listdir(RUN / "checkpoints") == ["step_0000002.pt"]
    assert_goes_on_exactly(train_tiny, 4, keep_checkpoints=1)


@pytest.mark.nightly
def test_a_disk_that_fills_up_is_named_and_leaves_the_checkpoint_before(image_folder, train_tiny, monkeypatch):
    os.mkdir("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", "disk"], check=False).returncode:
        pytest.skip("may not mount a disk of its own")
    try:
        settings = {"out": "disk/run", "cache_dir": "disk/cache", "keep_checkpoints": 1}
        train_tiny(steps=2, **settings)
        real = run_log.save_checkpoint

        def fill_up(*arguments, **keywords):
            with contextlib.suppress(OSError), open("disk/filler", "wb") as filler:
                while True:
                    filler.write(b"x" * 1_000)
            real(*arguments, **keywords)

        monkeypatch.setattr(run_log, "save_checkpoint", fill_up)
        with pytest.raises(OSError, match="step_0000004.pt could not be written: .* 0 bytes are free there"):
            train_tiny(steps=4, **settings)
        assert os.listdir("disk/run/checkpoints") == ["step_0000002.pt"]
        assert load_newest(pathlib.Path("disk/run/checkpoints"))["step"] == 2
    finally:
        subprocess.run(["umount", "disk"], check=True)


def test_two_processes_do_not_train_in_one_folder(image_folder, train_tiny):
    child = started(image_folder)
    with pytest.raises(RunFolderError, match="--out: another process is training in runs/images.*--fresh"):
        train_tiny(steps=1)
    assert train_tiny(steps=1, fresh=True) == pathlib.Path("runs/images-2")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert newest(train_tiny(steps=1, out=str(RUN)))["step"] == 1


def test_a_run_that_another_process_took_further_in_the_meantime_is_left_alone(train_tiny, monkeypatch):
    run = train_tiny(steps=2)
    log, load = (run / "metrics.jsonl").read_text(), resuming.load_images

    def meanwhile(*arguments, **keywords):
        monkeypatch.setattr(resuming, "load_images", load)
        train_tiny(steps=4)
        return load(*arguments, **keywords)

    monkeypatch.setattr(resuming, "load_images", meanwhile)
    with pytest.raises(RunFolderError, match="another process is training in runs/images"):
        train_tiny(steps=6)
    assert (run / "metrics.jsonl").read_text().startswith(log)
    assert newest(train_tiny(steps=5))["step"] == 5


@pytest.mark.parametrize(("option", "error"), [("out", RunFolderError), ("cache_dir", DataError)])
@pytest.mark.parametrize("place", ["/proc/nowhere", "file/below"])
def test_a_place_that_cannot_be_written_to_is_named_by_its_option(train_tiny, option, error, place):
    pathlib.Path("file").write_text("x")
    with pytest.raises(error, match=f"--{option.replace('_', '-')}: .*{place}"):
        train_tiny(steps=1, **{option: place})
    assert not pathlib.Path("runs").exists()


def test_a_run_inside_its_own_images_is_refused(train_tiny, image_folder):
    with pytest.raises(RunFolderError, match="--out: .*images/run is inside --data .*images, and its pictures would be"):
        train_tiny(steps=1, out=str(image_folder / "run"))
    assert len(os.listdir(image_folder)) == 3


@pytest.mark.parametrize("text", ['{"architectures": ["other"]}', "[1]", "{", "[" * 100_000])
def test_a_folder_of_another_program_is_not_taken_for_a_run(train_tiny, text):
    files = {"config.json": text, "metrics.jsonl": '{"loss": 1}\n', ".note.tmp": "mine"}
    os.mkdir("other")
    for name, content in files.items():
        pathlib.Path("other", name).write_text(content)
    with pytest.raises(RunFolderError, match="--out: other holds other things than a run"):
        train_tiny(steps=1, out="other")
    assert {path.name: path.read_text() for path in pathlib.Path("other").iterdir()} == files


@pytest.mark.parametrize("lose", [lambda path: path.unlink(), lambda path: path.write_text('{"dat')])
def test_a_run_whose_config_is_lost_goes_on_all_the_same(train_tiny, lose):
    train_tiny(steps=2, log_every=1)
    lose(RUN / "config.json")
    assert_goes_on_exactly(train_tiny, 4)


def test_a_damaged_line_of_the_log_costs_that_line(train_tiny):
    log = train_tiny(steps=4, log_every=1) / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "\0" * 9, *lines[2:]]))
    assert [line["step"] for line in metrics(train_tiny(steps=5, log_every=1))] == [1, 3, 4, 5]


def test_the_current_folder_can_be_the_run_folder(train_tiny, monkeypatch):
    os.mkdir("run")
    monkeypatch.chdir("run")
    assert newest(train_tiny(steps=1, out="."))["step"] == 1


def test_networks_that_do_not_fit_in_memory_are_refused(train_tiny):
    with pytest.raises(run_log.TrainingError, match="networks of this size cannot be made here: "):
        train_tiny(steps=1, latent_dim=10**14)
    assert not pathlib.Path("runs").exists()


def test_a_run_whose_output_is_closed_trains(image_folder):
    command = shlex.join([sys.executable, str(ROOT / "training.py"), "--data", str(image_folder), *tiny_arguments(steps=2)])
    assert subprocess.run(["bash", "-c", f"{command} >&- 2>&-"], check=False).returncode == 0
    assert newest(RUN)["step"] == 2


# Data


def test_names_that_a_terminal_would_obey_or_cannot_show_are_spelt_out(tmp_path, capfd):
    save_picture(tmp_path / "set" / "whole.png")
    for name in (b"\x1b[2Jcleared.png", b"latin-\xfc.png", b"two\nlines.png"):
        with open(os.fsencode(tmp_path / "set") + b"/" + name, "wb"):
            pass
    assert training.main(["--data", "set", *tiny_arguments()]) == 2
    err = capfd.readouterr().err
    assert r"\x1b[2Jcleared.png: " in err
    assert r"latin-\udcfc.png: " in err
    assert r"two\nlines.png: " in err
    assert training.main(["--data", "set", "--skip-bad", *tiny_arguments(steps=1)]) == 0
    assert "latin-" in capfd.readouterr().out


def under_a_memory_limit():
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
def test_pictures_larger_than_memory_are_named(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("1", (20_000, 20_000)).save("set/too_large.png")  # refused by Pillow from its header, and then tried
    Image.new("L", (16_000, 11_000)).convert("P").save("set/large.png")  # allowed by Pillow
    child = Child("--data", "set", *tiny_arguments(), first=under_a_memory_limit)
    assert child.wait() == 2
    lines = child.err.read_text().splitlines()
    assert lines[0].startswith("2 of 2 images in")
    assert lines[1:] == ["  large.png: not enough memory", "  too_large.png: not enough memory"]
    assert len(lines) == 3


# Files from a stranger


class Payload:
    def __reduce__(self):
        return os.mkdir, ("run-by-loading",)


def test_a_checkpoint_that_carries_code_is_refused_by_the_command(image_folder, capfd):
    torch.save({"format": 2, "step": Payload()}, "stranger.pt")
    assert training.main(["--data", str(image_folder), *tiny_arguments(), "--resume", "stranger.pt"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("stranger.pt: not a checkpoint")
    assert "weights_only" not in line
    assert not {"run-by-loading", "runs"} & set(os.listdir())


def test_our_own_checkpoints_need_no_class_to_be_allowed(train_tiny):
    (path,) = list_checkpoints(train_tiny(steps=1) / "checkpoints")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
