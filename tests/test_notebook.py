import os
import pathlib
import signal
import sys
import threading

import nbformat
import pytest
from helpers import ROOT, newest, wait_until
from nbclient import NotebookClient


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs_from_top_to_bottom_and_shows_pictures(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    os.symlink(ROOT / "pretrained", "pretrained")
    notebook = nbformat.read(ROOT / "explore.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": os.getcwd()}}).execute()
    kinds = [kind for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
             for kind in output.get("data", {})]
    assert kinds.count("image/png") >= 8
    assert kinds.count("image/gif") == 3


CELLS = ["""
import sys
sys.path.insert(0, PROJECT)
import training
arguments = ["--data", "images", "--image-size", "32", "--base-channels", "4", "--checkpoint-every", "100000"]
status = training.main([*arguments, "--steps", "100000", "--log-every", "1"])
print("status", status)
""", """
status = training.main([*arguments, "--steps", "3", "--out", "other"])
print("status", status, open("runs/images/metrics.jsonl").read().count("\\n") > 0)
""", """
import sys
sys.path.insert(0, PROJECT)
%run {PROJECT}/training.py --data images --image-size 32 --base-channels 4 --steps 4 --out other
%run {PROJECT}/generate.py other --num-images 1
%run {PROJECT}/evaluate.py other --data images --num-images 4
""", """
import pathlib, time
pathlib.Path("waits").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted as ever")
"""]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_hour_in_a_notebook_main_the_stop_button_another_kernel_and_going_on(image_folder, monkeypatch):
    project = f"PROJECT = {str(ROOT)!r}\n"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(project + source) for source in CELLS])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": os.getcwd()}})

    def stop_when(ready):
        wait_until(ready)
        os.kill(client.km.provisioner.process.pid, signal.SIGINT)

    def run(number, *, stopped=None):
        if stopped:
            threading.Thread(target=stop_when, args=[stopped]).start()
        return "".join(output.get("text", "") for output in client.execute_cell(notebook.cells[number], number).outputs)

    with client.setup_kernel():
        text = run(0, stopped=pathlib.Path("runs/images/metrics.jsonl").exists)
        assert "stopped after step " in text
        assert "status 130" in text
        assert "status 0 True" in run(1)
        assert newest(pathlib.Path("other"))["step"] == 3
    with client.setup_kernel():
        text = run(2)
        assert "steps 3 to 4" in text
        assert "wrote generated/seed0-00000.png" in text
        assert "reconstruction_error" in text
        assert "interrupted as ever" in run(3, stopped=pathlib.Path("waits").exists)
    assert newest(pathlib.Path("other"))["step"] == 4
