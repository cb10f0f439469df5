import dataclasses
import subprocess
import sys

import pytest

from config import DEMO, Config, from_command_line, option_name, parser


def faults(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        from_command_line(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_every_field_is_an_option_with_help_and_the_default_shown():
    text = " ".join(parser().format_help().split())
    for field in dataclasses.fields(Config):
        assert option_name(field.name) in text
        assert " ".join(field.metadata["help"].split()) in text
        if field.default is not None and not isinstance(field.default, bool):
            assert f"(default: {field.default:{'g' if isinstance(field.default, float) else ''}})" in text


def test_all_faults_are_reported_at_once_and_by_option_name(capsys):
    assert faults(capsys, "--batch-size", "0", "--steps", "many", "--kl-weight", "nan", "--device", "tpu") == [
        "--data: name a folder of images, or use --demo; one of the two",
        "--steps: must be a whole number, got 'many'",
        "--device: must be one of auto, cpu, cuda, mps, got tpu",
        "--batch-size: must be at least 1, got 0",
        "--kl-weight: must be at least 0, got nan",
    ]


@pytest.mark.parametrize(("arguments", "fault"), [
    (["--data", "x", "--demo"], "--data: name a folder of images, or use --demo; one of the two"),
    (["--data", "x", "--image-size", "100"], "--image-size: must be one of 32, 64, 128, 256, got 100"),
    (["--data", "x", "--image-size", "32", "--alpha-grid", "64"], "--alpha-grid: must be at most --image-size (32), got 64"),
    (["--data", "x", "--critic-learning-rate", "inf"], "--critic-learning-rate: must be above 0, got inf"),
    (["--data", "x", "--kl-weight", "inf"], "--kl-weight: must be at least 0, got inf"),
    (["--data", ""], "--data: name a folder of images, or use --demo; one of the two"),
    (["--data", "x", "--epochs", "0"], "--epochs: must be above 0, got 0.0"),
    (["--data", "x", "--resume", "y", "--fresh"], "--fresh: starts from nothing, so it does not go with --resume"),
])
def test_a_setting_that_cannot_work_is_refused(capsys, arguments, fault):
    assert faults(capsys, *arguments) == [fault]


def test_abbreviations_and_typos_are_errors(capsys):
    assert "unrecognized arguments: --batch" in faults(capsys, "--data", "x", "--batch", "4")[-1]


def test_check_raises_one_error_with_all_faults():
    with pytest.raises(ValueError, match="(?s)--data.*--steps.*--latent-dim: must be a whole number, got 8.5"):
        Config(steps=0, latent_dim=8.5).check()


def test_demo_settings_yield_to_the_command_line():
    config = from_command_line(["--demo", "--steps", "7"])
    assert config.steps == 7
    assert config.image_size == DEMO["image_size"]


def test_command_line_gives_what_it_was_given():
    config = from_command_line(["--data", "x", "--augment", "--epochs", "2.5", "--kl-weight", "0"])
    assert config == Config(data="x", augment=True, epochs=2.5, kl_weight=0.0)


def test_help_needs_no_torch():
    code = "import sys, config; config.parser().format_help(); sys.exit('torch' in sys.modules)"
    root = __file__.rsplit("tests", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
