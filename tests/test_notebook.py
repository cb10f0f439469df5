import os

import nbformat
import pytest
from helpers import ROOT
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
