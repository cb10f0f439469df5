"""The shape of the project: who may import whom, and what importing does."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "config": set(),
    "randomness": {"torch"},
    "program": {"torch", "tqdm"},
    "synthetic_video": {"torch"},
    "model_definitions": {"torch", "synthetic_video"},
    "losses": {"torch"},
    "augmentation": {"torch", "synthetic_video"},
    "safe_files": {"filelock"},
    "image_data": {"torch", "torchvision", "PIL", "tqdm", "randomness", "safe_files"},
    "data_report": {"image_data"},
    "demo_images": {"PIL", "tqdm"},
    "pictures": {"torch", "torchvision", "PIL", "av", "safe_files", "synthetic_video"},
    "checkpointing": {"torch", "model_definitions", "safe_files"},
    "run_folder": {"matplotlib", "checkpointing", "safe_files"},
    "acceleration": {"torch", "parallel"},
    "parallel": {"torch"},
    "generate": {"torch", "PIL", "tqdm", "program", "checkpointing", "config", "image_data", "pictures", "randomness",
                 "synthetic_video"},
    "quality": {"torch", "torch_fidelity"},
    "evaluate": {"torch", "tqdm", "program", "checkpointing", "config", "image_data", "quality", "randomness"},
    "training": {"torch", "tqdm", "config", "program", "randomness", "synthetic_video", "model_definitions", "losses",
                 "augmentation", "image_data", "data_report", "demo_images", "pictures", "checkpointing", "quality",
                 "run_folder", "acceleration", "parallel"},
}
OPTIONAL = ("av", "matplotlib", "tensorboard", "torch_fidelity")
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_table_knows_every_module():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_imports_only_what_its_place_allows(module):
    assert set(imported(ROOT / f"{module}.py")) - set(sys.stdlib_module_names) <= MAY_IMPORT[module]


def test_importing_every_module_does_no_work(tmp_path):
    code = f"""
import random, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["notebook", "--data", "nowhere"]
import torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
python_state = random.getstate()
import {", ".join(MAY_IMPORT)}
assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
assert sys.argv == ["notebook", "--data", "nowhere"] and torch.get_num_threads() == threads
assert not torch.cuda.is_initialized()
assert not {{*{OPTIONAL!r}}} & {{*sys.modules}}
"""
    done = subprocess.run([sys.executable, "-B", "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}, path


def test_every_checkpoint_is_read_as_data_and_nothing_is_executed():
    found = [call for path in SOURCES for call in calls(path)]
    loads = [call for call in found if call[0] == "torch.load"]
    assert loads
    assert all(keywords.get("weights_only") == "True" for _, keywords, _ in loads)
    for name, keywords, path in found:
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), path
        assert not name.startswith(("os.system", "os.popen", "os.exec", "os.spawn", "subprocess.getoutput",
                                    "subprocess.getstatusoutput")), path
        assert keywords.get("shell") in (None, "False"), path
    mentions = [ast.unparse(node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute)]
    assert mentions.count("torch.load") == len(loads)  # under no other name
    assert not [name for name in mentions if name.endswith("safe_globals")]


def test_the_programs_import_nothing_that_runs_what_it_reads():
    for path in ROOT.glob("*.py"):
        assert not {"pickle", "marshal", "shelve", "dill", "subprocess"} & set(imported(path)), path
