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
        "--device: must be one of auto, cpu, cuda, cuda:1, mps, got tpu",
        "--batch-size: must be at least 1, got 0",
        "--kl-weight: must be at least 0, got nan",
    ]


@pytest.mark.parametrize(("arguments", "fault"), [
    (["--data", "x", "--demo"], "--data: name a folder of images, or use --demo; one of the two"),
    *((["--data", "x", "--image-size", size], f"--image-size: must be one of 32, 64, 128, 256, 512, or HEIGHTxWIDTH such as "
       "128x224: the shorter side one of these, the longer a multiple of its quarter, at most 4 times it; "
       f"got {size}") for size in ("100", "128x225", "64x512", "128x", "32.0", "1e3", "-32")),
    (["--data", "x", "--channels", "2"], "--channels: must be one of 1, 3, 4, got 2"),
    (["--data", "x", "--resize-mode", "fit"], "--resize-mode: must be one of crop, pad, stretch, got fit"),
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


@pytest.mark.parametrize(("given", "size"), [("64", 64), ("64x112", (64, 112)), ("512x128", (512, 128)), ("64x64", 64)])
def test_a_size_is_a_number_or_height_and_width_however_it_is_given(given, size):
    sides = tuple(map(int, given.split("x")))
    for value in (given, sides if len(sides) == 2 else sides[0], list(sides) if len(sides) == 2 else sides[0]):
        config = Config(data="x", image_size=value)
        assert config.image_size == size
        assert not config.faults()
    assert from_command_line(["--data", "x", "--image-size", given]).image_size == size
