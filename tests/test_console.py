import os
import signal

import pytest
import torch

import console
import devices
from safe_files import atomic_write


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_file_half_written(number, tmp_path):
    before = signal.getsignal(number)
    if number == signal.SIGHUP:  # whatever pytest was started by
        signal.signal(number, before := signal.SIG_DFL)

    def write():
        with console.program_output(), atomic_write(tmp_path / "picture.png") as file:
            file.write(b"half")
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as stopped:
        write()
    assert stopped.value.code == 128 + number
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(number) is before


def test_the_device_is_there_or_refused():
    assert devices.pick_device("cpu") == torch.device("cpu")
    assert devices.pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(devices.DeviceError, match="--device: cuda is not available here"):
            devices.pick_device("cuda")
