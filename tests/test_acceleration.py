import functools

import pytest
import torch
from test_training import assert_same, metrics, newest, tiny_trainer

import training
from acceleration import CapturedUpdate, accelerate


class Repeated:
    """Stands in for CapturedUpdate: copies its arguments to the same tensors every time, then runs what it was given."""

    def __init__(self, update, arguments):
        self.update, self.arguments = update, [argument.clone() for argument in arguments]
        update(*arguments)

    def __call__(self, *arguments):
        for static, argument in zip(self.arguments, arguments, strict=True):
            static.copy_(argument)
        return self.update(*self.arguments)


class Forgetful(Repeated):
    """A capture that has missed that its arguments change."""

    def __call__(self, *arguments):
        return self.update(*(torch.zeros_like(argument) for argument in self.arguments))


class Failing(Repeated):
    """Fails in the middle of an update of the generator, and again on the way out, as a capture does."""

    def __call__(self, *arguments):
        if self.update.__name__ == "generator_update":
            try:
                self.update(arguments[0], None, *arguments[2:])
            except Exception:
                raise RuntimeError("previous error during capture")  # noqa: B904
        return super().__call__(*arguments)


@pytest.fixture
def trainer():
    return tiny_trainer(compile="on")


def batches(trainer):
    images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    critic = training._critic_batch(trainer, images, 0, 0, 0)
    return {"critic": critic, "generator": training._generator_batch(trainer, critic[0], 0, 4)}


def two_steps(trainer):
    for _ in range(2):
        for name, arguments in batches(trainer).items():
            getattr(trainer, f"{name}_update")(*arguments)
    return trainer.state()


@pytest.mark.parametrize("capture", [Repeated, Forgetful, Failing])
def test_neither_an_accepted_nor_a_refused_acceleration_changes_the_state(trainer, capture):
    expected = two_steps(tiny_trainer())
    said = []
    accelerate(trainer, batches(trainer), compiled=False, capture=capture, report=said.append)
    assert ("critic_update" in vars(trainer)) == (capture is Repeated) == (not said)
    assert_same(two_steps(trainer), expected)


def test_it_says_why_it_goes_on_without(trainer):
    said = []
    for capture in (Forgetful, Failing):
        accelerate(trainer, batches(trainer), compiled=False, capture=capture, report=said.append)
    assert said[0].startswith("warning: training goes on without --compile: its results differ by ")
    assert said[1].startswith("warning: training goes on without --compile: ")
    assert "NoneType" in said[1]  # the first error, not the last


def test_a_metric_that_is_not_finite_is_noticed(trainer):
    class Poisoned(Repeated):
        def __call__(self, *arguments):
            found = super().__call__(*arguments)
            return found | ({"alpha": found["alpha"] * torch.nan} if "alpha" in found else {})

    said = []
    accelerate(trainer, batches(trainer), compiled=False, capture=Poisoned, report=said.append)
    assert said == ["warning: training goes on without --compile: its results differ by nan%"]


@pytest.mark.parametrize("part", ["critic_losses", "generator_losses", "critic_update", "generator_update"])
def test_a_difference_of_a_part_in_a_hundred_is_noticed(trainer, part):
    name, kind = part.split("_")
    plain = getattr(trainer, part)

    def altered(*arguments):
        if kind == "update":  # the metrics alone
            return {name: 1.01 * value for name, value in plain(*arguments).items()}
        loss, found = plain(*arguments)  # the gradient alone
        return 1.01 * loss, found

    def capture(update, arguments):
        if update.__name__ != f"{name}_update":
            return update
        if kind == "losses":
            setattr(trainer, part, altered)
            return update
        return altered

    said = []
    accelerate(trainer, batches(trainer), compiled=False, capture=capture, report=said.append)
    assert len(said) == 1
    assert "differ by 1.0%" in said[0]


def test_compiled_losses_are_the_plain_ones(trainer, monkeypatch):
    # Traced and differentiated as for the real compiler, without the minutes that it takes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    expected = two_steps(tiny_trainer())
    said = []
    accelerate(trainer, batches(trainer), compiled=True, capture=None, report=said.append)
    assert not said
    assert "critic_losses" in vars(trainer)
    for name, value in two_steps(trainer)["generator"].items():
        torch.testing.assert_close(value, expected["generator"][name], rtol=1e-3, atol=1e-3)


def test_a_machine_without_a_compiler_trains_all_the_same(train_tiny, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    run = train_tiny(steps=2, compile="on")
    assert "warning: training goes on without --compile: " in capfd.readouterr().out
    assert_same(newest(run), newest(train_tiny(steps=2, out="plain")))


@pytest.mark.nightly
def test_a_compiled_run_is_the_plain_one_and_resumes_exactly(train_tiny, capfd):
    straight, cut = train_tiny(steps=4, out="straight", compile="on"), train_tiny(steps=2, out="cut", compile="on")
    assert_same(newest(straight), newest(train_tiny(steps=4, out="cut", compile="on")))
    assert metrics(straight) == metrics(cut)
    assert "without --compile" not in capfd.readouterr().out
    plain = newest(train_tiny(steps=4, out="plain"))["averaged"]
    for name, value in newest(straight)["averaged"].items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", [{}, {"augment": True, "critic_steps": 2}, {"precision": "bfloat16"}])
def test_a_captured_run_is_the_plain_one_and_resumes(train_tiny, capfd, settings):
    settings = {"device": "cuda", **settings}
    straight, cut = train_tiny(steps=4, out="straight", **settings), train_tiny(steps=2, out="cut", **settings)
    resumed = train_tiny(steps=4, out="cut", **settings)
    plain = train_tiny(steps=4, out="plain", compile="off", **settings)
    assert "without --compile" not in capfd.readouterr().out
    assert cut == resumed
    for other in (resumed, plain):
        for name, value in newest(straight)["averaged"].items():
            torch.testing.assert_close(value, newest(other)["averaged"][name], rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_capture_takes_new_arguments_and_hands_out_values_of_its_own():
    total = torch.zeros((), device="cuda")

    def update(value):
        return {"double": 2 * value, "total": total.add_(value)}

    captured = CapturedUpdate(update, [torch.ones((), device="cuda")])
    total.zero_()
    first, second = captured(torch.tensor(3.0)), captured(torch.tensor(5.0))
    assert [first["double"].item(), second["double"].item(), total.item()] == [6, 10, 8]
