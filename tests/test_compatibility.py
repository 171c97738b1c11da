"""What was published stays usable: a checkpoint of every format version, and what its code may do when it is loaded.

To add a version: raise `configuration_clsgen.FORMAT_VERSION`, read the older form in `ClsGenConfig`, and run
`tests/fixtures/make_checkpoint.py` once. Fixtures never change afterwards.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import AutoModel

from clsgen.checkpoint_folder import ENTRY_POINTS, ROOT
from clsgen.configuration_clsgen import FORMAT_VERSION, ClsGenConfig
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("format_*"))
FORBIDDEN = {"ctypes", "ftplib", "http", "multiprocessing", "pickle", "shelve", "socket", "subprocess", "urllib"}
EVALUATING = {"__import__", "compile", "eval", "exec", "input", "open"}


def shipped_files():
    """What lies beside the weights of a checkpoint: the entry points, and all that these import from their folder."""
    found, new = set(), {"modeling_clsgen.py", *ENTRY_POINTS}
    while new:
        found |= new
        nodes = [node for name in new for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))]
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
        new = {f"{node.module}.py" for node in imports} - found
    return sorted(found)


SHIPPED = shipped_files()
LOAD = """
import json, sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
expected = json.load(open(sys.argv[1] + "/expected.json"))
for text, before in zip(expected["texts"], expected["predictions"]):
    now = model.classify_and_explain(text).to_dict()
    assert abs(now["probability"] - before["probability"]) < 1e-5, (now, before)
    assert now["explanation"] == before["explanation"], (now, before)
assert not any(name.split(".")[0] == "clsgen" for name in sys.modules)
"""


def answers_as_before(model, folder):
    expected = json.loads((folder / "expected.json").read_text())
    for text, before in zip(expected["texts"], expected["predictions"], strict=True):
        now = model.classify_and_explain(text).to_dict()
        for name in ("probability", "logit", "threshold", "lm_probability", "disagreement"):
            assert now.pop(name) == pytest.approx(before.pop(name), abs=1e-5), name
        now = json.loads(json.dumps(now))
        assert {name: now[name] for name in before} == before


def test_there_is_a_fixture_of_every_format_version():
    assert [folder.name for folder in FIXTURES] == [f"format_{i + 1}" for i in range(FORMAT_VERSION)]
    assert sum(path.stat().st_size for folder in FIXTURES for path in folder.iterdir()) < 200_000 * len(FIXTURES)


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_the_code_of_today_reads_it(folder, tmp_path):
    model = ClsGenForCausalLMAndClassification.from_pretrained(folder)
    answers_as_before(model, folder)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["clsgen_version"] == FORMAT_VERSION


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_its_own_code_still_runs_and_writes_nothing_outside_the_cache(folder, tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment = {**kept, "HF_HOME": str(tmp_path / "hf"), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment |= {"XDG_CACHE_HOME": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.rglob("*")) == list(home.rglob("*")) == []
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"modules"}


def test_a_file_without_a_version_has_the_first_and_a_newer_one_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES[0], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["clsgen_version"]
    (folder / "config.json").write_text(json.dumps(config))
    assert ClsGenConfig.from_pretrained(folder).clsgen_version == FORMAT_VERSION
    (folder / "config.json").write_text(json.dumps({**config, "clsgen_version": FORMAT_VERSION + 1}))
    for load in (ClsGenConfig, ClsGenForCausalLMAndClassification):
        with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION + 1}; this code reads versions up to"):
            load.from_pretrained(folder)
    with pytest.raises(ValueError, match="code_revision"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_code_imports_little_and_evaluates_nothing(name):
    """Of everything in the file, also inside functions: transformers asks users to install whatever it finds there."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            assert f"{node.module}.py" in SHIPPED
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in EVALUATING, node.func.id
    assert imported <= set(sys.stdlib_module_names) | {"torch", "transformers"}
    assert not imported & FORBIDDEN


def test_the_installed_transformers_is_the_one_that_is_pinned():
    """One version is admitted, so the reload tests of this file and of the round trip run on the oldest and newest."""
    pinned = re.search(r"^transformers==(\S+)$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert version("transformers") == pinned[1]
