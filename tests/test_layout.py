"""The shape of the project: who may import whom, and what importing does."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "image_sizes": set(),
    "config": {"image_sizes"},
    "randomness": {"torch"},
    "synthetic_video": {"torch"},
    "model_definitions": {"torch", "image_sizes", "synthetic_video"},
    "losses": {"torch"},
    "augmentation": {"torch", "synthetic_video"},
    "safe_files": {"filelock"},
    "devices": {"torch", "safe_files"},
    "distributed": {"torch"},
    "console": {"tqdm", "distributed"},
    "image_files": {"torch", "torchvision", "PIL", "pillow_heif", "devices", "image_sizes"},
    "image_data": {"torch", "tqdm", "console", "devices", "image_files", "image_sizes", "randomness", "safe_files",
                   "video_files", "video_frames"},
    "data_report": {"console", "image_data", "image_sizes"},
    "demo_images": {"PIL", "tqdm"},
    "pictures": {"torch", "torchvision", "PIL", "safe_files", "synthetic_video"},
    "video_files": {"av", "pictures", "safe_files"},
    "video_frames": {"av", "PIL", "devices", "image_files", "video_files"},
    "checkpointing": {"torch", "devices", "image_sizes", "model_definitions", "safe_files"},
    "image_metrics": {"torch", "torch_fidelity", "model_definitions", "pictures"},
    "latent_paths": {"torch", "tqdm", "checkpointing", "image_files", "model_definitions", "randomness", "video_frames"},
    "film_sound": {"av", "image_files", "video_frames"},
    "class_gaussians": {"torch", "tqdm", "console", "image_data", "image_files"},
    "growth": {"devices", "image_sizes", "model_definitions"},
    "wgan_gp": {"torch", "augmentation", "checkpointing", "distributed", "growth", "losses", "model_definitions",
                "randomness"},
    "fast_paths": {"torch", "distributed", "losses", "model_definitions", "randomness", "synthetic_video"},
    "resuming": {"checkpointing", "config", "console", "devices", "distributed", "growth", "image_data", "image_sizes",
                 "safe_files"},
    "run_log": {"torch", "matplotlib", "tqdm", "checkpointing", "config", "console", "data_report", "devices",
                "distributed", "growth", "image_data", "image_metrics", "image_sizes", "pictures", "randomness", "resuming",
                "safe_files"},
    "device_check": {"torch", "devices", "distributed", "fast_paths", "growth", "image_sizes", "randomness", "wgan_gp"},
    "batches": {"torch", "augmentation", "distributed", "growth", "image_data", "randomness"},
    "training": {"torch", "batches", "checkpointing", "config", "console", "data_report", "demo_images", "device_check",
                 "devices", "distributed", "fast_paths", "image_data", "image_sizes", "randomness", "resuming", "run_log",
                 "wgan_gp"},
    "generate": {"torch", "torchvision", "PIL", "tqdm", "checkpointing", "class_gaussians", "config", "console",
                 "data_report", "devices", "fast_paths", "film_sound", "image_data", "image_files", "latent_paths",
                 "pictures", "randomness", "safe_files", "synthetic_video", "video_files", "video_frames"},
    "evaluate": {"torch", "tqdm", "checkpointing", "config", "console", "devices", "image_data", "image_metrics",
                 "image_sizes", "pictures", "randomness"},
}
FOR_NOTEBOOKS = ("model_definitions", "losses", "synthetic_video", "checkpointing", "latent_paths", "pictures",
                 "demo_images")
OPTIONAL = ("av", "matplotlib", "pillow_heif", "tensorboard", "torch_fidelity")
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


@pytest.mark.parametrize("module", FOR_NOTEBOOKS)
def test_what_notebooks_import_needs_no_config(module):
    """A notebook's own folder may hold another config.py."""
    reached, new = set(), {module}
    while new:
        reached |= new
        new = {name for one in new for name in MAY_IMPORT[one] if name in MAY_IMPORT} - reached
    assert "config" not in reached


def test_no_private_name_is_used_from_another_module():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in MAY_IMPORT:
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MAY_IMPORT:
                assert not node.attr.startswith("_"), (path, node.lineno)


def test_training_is_short_enough_to_read():
    text = (ROOT / "training.py").read_text()
    (train,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert len(text.splitlines()) <= 220
    assert train.end_lineno - train.lineno < 70


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
