import functools
import re
import sys

import pytest
import torch
from helpers import ROOT, TINY, newest, tiny_gan
from torch.utils._python_dispatch import TorchDispatchMode

import device_check
import devices
import distributed
import run_log
import training
from config import Config
from fast_paths import use_fast_layers

CPU = torch.device("cpu")
GROWN = Config(**{"data": "x", **TINY, "image_size": 64})


def difference(prepare=None):
    return device_check.difference(GROWN, CPU, training.training_step, prepare=prepare)


# A device against the CPU


def test_the_cpu_computes_what_the_cpu_does():
    assert difference() == (0, 0)


def test_sums_in_another_order_are_rounding():
    found = difference(lambda gan, images: (use_fast_layers(gan, report=pytest.fail), gan.critic.to(
        memory_format=torch.contiguous_format), gan.generator.to(memory_format=torch.contiguous_format)))
    assert found.metrics > 0
    assert found.weights > 0
    assert found.is_rounding()


def wrong_convolution(gan, images):
    """As one that reads its channels in another order."""
    gan.critic.blocks[0].register_forward_hook(lambda layer, inputs, output: output.flip(1))


def wrong_at_64(gan, images):
    gan.generator.decoder[-1].register_forward_hook(
        lambda layer, inputs, output: output.roll(1, -1) if output.shape[-1] == 64 else output)


def wrong_optimizer(gan, images):
    gan.generator_optimizer.step = lambda: None


def not_finite(gan, images):
    with torch.no_grad():
        next(gan.critic.parameters()).fill_(torch.nan)


@pytest.mark.parametrize("prepare", [wrong_convolution, wrong_at_64, wrong_optimizer, not_finite])
def test_a_device_that_computes_something_else_is_noticed(prepare):
    assert not difference(prepare).is_rounding()


# A Mac


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("mac")
@pytest.mark.skipif(torch.backends.mps.is_built(), reason="the first tensor on mps has to fail")
def test_auto_is_the_cpu_where_mps_fails(train_tiny, capfd):
    run = train_tiny(steps=1, device="auto")
    assert newest(run)["step"] == 1
    assert "note: mps is not used: " in capfd.readouterr().out
    assert devices.pick_device("auto") == CPU


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(("found", "expected"), [((1e-5, 1e-2), "mps"), ((1e-5, 0.3), "cpu"), ((0.3, 1e-3), "cpu"),
                                                 ((float("nan"), 0.0), "cpu")])
def test_auto_is_mps_where_it_computes_what_the_cpu_does(monkeypatch, found, expected):
    monkeypatch.setattr(device_check, "difference", lambda *arguments, prepare: device_check.Difference(*found))
    said = []
    config = Config(data="x", device="auto")
    assert device_check.pick_training_device(config, training.training_step, report=said.append).type == expected
    assert [line.split(":")[0] for line in said[1:]] == ["note"] * (expected == "cpu")


@pytest.mark.usefixtures("mac")
def test_several_processes_are_on_the_cpu_or_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29688"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device_check, "difference", pytest.fail)
    assert device_check.pick_training_device(Config(data="x"), training.training_step, report=pytest.fail) == CPU
    with pytest.raises(distributed.LaunchError, match="not on mps"):
        distributed.start(torch.device("mps"))


def test_the_comparison_is_of_what_training_computes(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = []

    def compare(config, device, take_step, *, prepare):
        gan = tiny_gan()
        prepare(gan, torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
        seen.append(gan.input_gradient)
        return device_check.Difference(0.0, 0.0)

    monkeypatch.setattr(device_check, "difference", compare)
    device_check.pick_training_device(Config(data="x"), training.training_step, report=lambda line: None)
    assert [callable(gradient) for gradient in seen] == [True]


@pytest.mark.usefixtures("mac")
def test_a_gpu_or_the_cpu_that_was_asked_for_is_not_compared(monkeypatch):
    monkeypatch.setattr(device_check, "difference", pytest.fail)
    assert device_check.pick_training_device(Config(data="x", device="cpu"), training.training_step, report=print) == CPU


@pytest.fixture
def ignored_found_inf(monkeypatch):
    """Fused Adam as mps had it in some releases of torch."""
    fused = torch._fused_adam_

    def ignoring(*arguments, found_inf=None, **options):
        fused(*arguments, found_inf=None, **options)

    monkeypatch.setattr(torch, "_fused_adam_", ignoring)


def parameters(gan):
    return [*gan.generator.parameters(), *gan.critic.parameters()]


@pytest.mark.usefixtures("ignored_found_inf")
def test_what_is_not_finite_reaches_no_weight_on_a_device_that_ignores_found_inf(train_tiny, monkeypatch):
    take_step, seen = training.training_step, []

    def broken(gan, images, step, *others):
        with torch.no_grad():
            before = [parameter.clone() for parameter in parameters(gan)]
            bias = gan.critic.blocks[0].bias
            kept = bias.clone()
            if step == 2:
                bias.fill_(torch.nan)
        found = take_step(gan, images, step, *others)
        if step == 2:
            with torch.no_grad():
                bias.copy_(kept)
            seen.append(all(map(torch.equal, before, parameters(gan))))
        return found

    monkeypatch.setattr(training, "training_step", broken)
    with pytest.raises(run_log.TrainingError, match="step 3: .* is nan"):
        train_tiny(steps=6, checkpoint_every=2)
    assert seen == [True]


# GPUs


@pytest.fixture
def a_gpu_without_kernels(monkeypatch):
    def refuse(*arguments, device=None, **options):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", refuse)


@pytest.mark.usefixtures("a_gpu_without_kernels")
def test_a_gpu_without_kernels_is_refused_or_passed_over(capfd):
    with pytest.raises(devices.DeviceError, match="^--device: cuda:0 cannot be used: CUDA error: no kernel image.* device$"):
        devices.pick_device("cuda")
    assert devices.pick_device("auto") == CPU
    assert "note: cuda:0 cannot be used: CUDA error: no kernel image" in capfd.readouterr().err


def test_a_gpu_that_is_full_for_now_is_no_reason_for_the_cpu(monkeypatch):
    def refuse(*arguments, device=None, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", refuse)
    assert devices.pick_device("auto") == torch.device("cuda:0")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_not_tf32_and_the_settings_of_before_are_there_again(allowed):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = allowed
    kinds = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        with devices.usual_settings():
            assert (cudnn.allow_tf32, cudnn.conv.fp32_precision) == (False, "ieee")
        assert (cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == (allowed, *kinds)
    finally:
        cudnn.allow_tf32 = before


@pytest.mark.usefixtures("cuda")
def test_settings_of_torch_that_contradict_each_other_are_kept():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"  # and that of recurrent networks is tf32: torch then refuses to tell the older setting
    try:
        with devices.usual_settings():
            assert torch.backends.cudnn.rnn.fp32_precision == "ieee"
        assert conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = before
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("kind", "nccl", "expected"), [("cuda", True, "cpu:gloo,cuda:nccl"), ("cuda", False, "gloo"),
                                                        ("cpu", True, "gloo")])
def test_processes_talk_by_what_their_torch_has(monkeypatch, kind, nccl, expected):
    seen = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29688"}.items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "rendezvous",
                        lambda *arguments, **options: iter([(store, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: seen.append(backend))
    distributed.start(torch.device(kind))
    distributed.stop()
    assert seen == [expected]


def test_a_rate_may_be_a_whole_number():
    assert tiny_gan(critic_learning_rate=1).critic_optimizer.param_groups[0]["lr"].dtype == torch.float32


class Reads(TorchDispatchMode):
    """Counts what a CPU would wait for a GPU for."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                                   torch.ops.aten.equal.default)
        return function(*arguments, **options or {})


def test_a_line_of_the_log_and_the_check_of_a_checkpoint_read_the_device_once(train_tiny, monkeypatch):
    counts = {}

    def counting(owner, name):
        method = getattr(owner, name)

        def counted(*arguments):
            with Reads() as reads:
                found = method(*arguments)
            counts.setdefault(name, []).append(reads.count)
            return found
        monkeypatch.setattr(owner, name, counted)

    counting(run_log.RunLog, "_mean_metrics")
    counting(run_log.RunLog, "save")
    train_tiny(steps=4, log_every=4, checkpoint_every=2)
    assert max(counts["save"]) <= 1
    assert max(counts["_mean_metrics"]) <= 1


# The command


def test_the_command_prints_one_table(monkeypatch, capfd):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import check_device

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check_device.main(["--device", "cpu", "--sizes", "32", "--batches", "2", "--seconds", "0.5"])
    out = capfd.readouterr().out
    title, _, *rows = out.strip().splitlines()
    assert title.startswith("cpu: ")
    assert rows[0] == "|  | plain | compiled |"
    cells = {row.split(" | ")[0].removeprefix("| "): row.removesuffix(" |").split(" | ")[1:] for row in rows[2:]}
    assert list(cells) == ["32 px: metrics, weights differ from the CPU's by", "NaN in a step", "32 px, batch 2: a step",
                           "32 px, batch 2, growth: a step", "pictures and curves of a run of 32 px",
                           "checkpoints of a run of 32 px"]
    differences, after_nan, *times, drawn, saved = cells.values()
    assert all(re.fullmatch(r"\de[+-]\d\d, \de[+-]\d\d", cell) for cell in differences)
    assert after_nan == ["weights kept"] * 2
    assert all(re.fullmatch(r"[\d.]+ ms, [\d.e+]+ images/s", cell) for cells in times for cell in cells)
    assert re.fullmatch(r"\d+ in \d+ s, [\d.]+ s each: [\d.]+%", drawn[0])
    assert "WRONG" not in out
    assert sys.modules.pop("check_device")
