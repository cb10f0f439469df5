import os
import pathlib
import subprocess
import sys

import pytest

from safe_files import append_line, atomic_write, lock_folder, remove_temporary_files


def write(path, data=b"new", **options):
    with atomic_write(path, **options) as file:
        file.write(data)


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_name_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), done.append("fsync")))
    monkeypatch.setattr(os, "replace", lambda source, target: (replace(source, target), done.append("replace")))
    write(tmp_path / "below" / "a")
    assert done == ["fsync", "replace", "fsync"]
    assert (tmp_path / "below" / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path / "below") == ["a"]


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), KeyboardInterrupt(), ValueError("no")])
def test_what_fails_in_the_middle_leaves_the_file_of_before_and_nothing_else(tmp_path, monkeypatch, error):
    write(tmp_path / "a", b"old")
    expected = OSError if isinstance(error, OSError | RuntimeError) else type(error)

    def fail():
        raise error

    monkeypatch.setattr(os, "fsync", lambda descriptor: fail())
    with pytest.raises(expected):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_cannot_be_written_is_named_with_the_room_there_is(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"/a could not be written: 5,000 bytes are needed, [\d,]+ bytes are free.*file"):
        write(tmp_path / "file" / "a", bytes_needed=5_000)
    with pytest.raises(OSError, match=r"could not be written: [\d,]+ bytes are free there \(.*Is a directory"):
        append_line(tmp_path, "x")


def test_leftovers_are_what_was_half_written_and_nothing_else(tmp_path):
    for name in ("a.tmp", ".hidden", "b", ".b.tmp"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a.tmp", "b"]


def test_a_folder_without_locks_is_used_without(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no locks available")

    monkeypatch.setattr("safe_files.FileLock.acquire", fail)
    with lock_folder(tmp_path, busy=fail):
        pass


def test_a_folder_that_is_held_is_waited_for_after_a_word(tmp_path):
    said = []
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path, busy=None), \
            lock_folder(tmp_path, busy=lambda: said.append(1) or 1 / 0):
        pass
    assert said == [1]
    with lock_folder(tmp_path, busy=None):
        pass


def test_two_processes_can_write_the_same_file_and_the_last_one_has_it(tmp_path):
    code = f"from safe_files import atomic_write\nwith atomic_write({str(tmp_path / 'a')!r}) as file: file.write(b'other')"
    with atomic_write(tmp_path / "a") as file:
        file.write(b"mine, ")
        subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[1], check=True)
        assert (tmp_path / "a").read_bytes() == b"other"
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"mine, whole"
    assert os.listdir(tmp_path) == ["a"]
