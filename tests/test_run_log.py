import itertools
from types import SimpleNamespace

import pytest
from helpers import assert_same, newest, read

import run_log
import safe_files
from checkpointing import export_generator, load_generator
from pictures import grid
from randomness import latent_noise
from run_log import Pace
from safe_files import atomic_write


@pytest.fixture
def clock(monkeypatch):
    seconds = [1000.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_what_takes_time_takes_a_fortieth_of_it(clock):
    pace, done, takes, start = Pace(None), 0.0, 1.5, clock[0]
    for step in range(20_000):
        clock[0] += 0.1
        if pace.is_due(step):
            with pace.timed(step):
                clock[0] += takes
                done += takes
    assert 0.02 < done / (clock[0] - start) <= 0.025


@pytest.mark.parametrize(("takes", "shortest", "longest"), [(60, 600, 610), (0.1, 60, 70)])  # a slow disk, a fast one
def test_a_checkpoint_is_made_at_least_every_ten_minutes_and_at_most_every_minute(clock, takes, shortest, longest):
    pace, saved = Pace(None, between=run_log.BETWEEN_CHECKPOINTS), []
    for step in range(400):
        clock[0] += 10
        if pace.is_due(step):
            with pace.timed(step):
                clock[0] += takes
            saved.append(clock[0])
    between = [later - earlier for earlier, later in zip(saved, saved[1:], strict=False)]
    assert between
    assert shortest <= min(between) <= max(between) <= longest + takes


def test_a_number_of_steps_is_obeyed_to_the_step(clock):
    pace = Pace(3)
    assert [step for step in range(1, 10) if pace.is_due(step)] == [3, 6, 9]


def test_the_first_time_is_after_a_minute(clock):
    pace = Pace(None)
    clock[0] += 59
    assert not pace.is_due(1)
    clock[0] += 1
    assert pace.is_due(2)


@pytest.mark.parametrize(("is_rank_zero", "said_by_rank_zero", "expected"), [(True, 0, True), (False, 0, False),
                                                                             (False, 1, True)])
def test_all_processes_save_when_the_clock_of_the_first_one_says_so(clock, monkeypatch, is_rank_zero, said_by_rank_zero,
                                                                    expected):
    monkeypatch.setattr(run_log.distributed, "all_reduce_max", lambda own: max(own, said_by_rank_zero))
    log = SimpleNamespace(saving=Pace(None), step=7, is_rank_zero=is_rank_zero)
    clock[0] += 60
    assert run_log.RunLog.is_time_to_save(log) == expected


def test_outputs_as_often_as_time_allows_change_nothing_and_none_is_made_twice(train_tiny, monkeypatch):
    drawn, saved = [], []
    for name, found in (("_draw_samples", drawn), ("_facts", saved)):
        method = getattr(run_log.RunLog, name)
        monkeypatch.setattr(run_log.RunLog, name, lambda log, method=method, found=found: (
            found.append(log.step), method(log))[1])
    often = {"sample_every": None, "checkpoint_every": None, "image_size": 64, "grow_every_images": 8}
    rarely = train_tiny(steps=5, out="rarely", **often)
    assert (drawn, saved) == ([0, 2, 5], [2, 5])  # the growth and the end
    monkeypatch.setattr(run_log, "FIRST_OUTPUT", 0)
    monkeypatch.setattr(run_log, "SHARE", 1)
    monkeypatch.setattr(run_log, "BETWEEN_CHECKPOINTS", (0, 600))
    del drawn[:], saved[:]
    always = train_tiny(steps=5, out="always", **often)
    assert (drawn, saved) == ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert_same(newest(rarely), newest(always))


def test_pictures_and_files_have_the_detail_that_is_chosen_and_training_has_all_of_it(train_tiny, monkeypatch, capfd):
    runs = []
    for detail in (0.25, 1.0):
        monkeypatch.setattr(run_log, "detail_worth_drawing", lambda real, again, detail=detail: detail)
        run = train_tiny(steps=2, out=str(detail), evaluate_every=1, sample_every=1, log_every=1)
        assert ("  detail 0.25  " in capfd.readouterr().out) == (detail < 1)
        runs.append(newest(run))
        for source in (run, run / "checkpoints" / "best.pt", export_generator(run, run / "small.pt")):
            vae = load_generator(source)
            assert vae.detail == detail
        expected = grid(load_generator(run).decode(latent_noise(0, range(64), 8)), columns=8)
        assert (read(run / "samples/step_0000002.png") - expected).abs().max() < 1 / 255
    assert_same(*({**state, "detail": None} for state in runs))


def test_the_detail_of_a_step_does_not_depend_on_what_was_done_before(train_tiny, monkeypatch):
    monkeypatch.setattr(run_log, "detail_worth_drawing", lambda real, again: 1e4 * again.std().item() % 1)
    often, once = (train_tiny(steps=3, out=out, sample_every=1, checkpoint_every=every)
                   for out, every in (("often", 1), ("once", 3)))
    assert 0 < newest(often)["detail"] < 1
    assert_same(newest(often), newest(once))
    for step in range(4):
        assert len({(run / f"samples/step_{step:07d}.png").read_bytes() for run in (often, once)}) == 1


def test_the_detail_is_chosen_once_a_step_and_kept_by_a_measurement_and_on_resume(train_tiny, monkeypatch, capfd):
    chosen = []
    monkeypatch.setattr(run_log, "detail_worth_drawing", lambda real, again: chosen.append(real) or 0.25)
    train_tiny(steps=2, sample_every=2, checkpoint_every=2)
    assert len(chosen) == 2  # for the first picture and for the last step, which is saved and drawn
    capfd.readouterr()
    worse = itertools.count(1)
    monkeypatch.setattr(run_log, "sliced_wasserstein", lambda *images, generator: {32: next(worse)})
    train_tiny(steps=5, log_every=1, evaluate_every=1)
    assert capfd.readouterr().out.count("  detail 0.25  ") == 3


def test_where_nothing_is_reconstructed_all_detail_is_drawn(train_tiny):
    assert newest(train_tiny(steps=1, out="without", reconstruction_weight=0.0))["detail"] == 1
    assert newest(train_tiny(steps=1, out="with"))["detail"] < 1


def test_a_file_that_another_program_holds_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    replace, refused = safe_files.os.replace, []

    def held(source, target):
        if len(refused) < 3:
            refused.append(target)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(safe_files.os, "replace", held)
    for patience in (0, 5):
        monkeypatch.setattr(safe_files, "PATIENCE", patience)
        del refused[:]
        if patience:
            with atomic_write(tmp_path / "a.png") as file:
                file.write(b"new")
        else:
            with pytest.raises(OSError, match="could not be written"), atomic_write(tmp_path / "a.png") as file:
                file.write(b"new")
    assert (tmp_path / "a.png").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
