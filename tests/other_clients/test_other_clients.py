"""What is published, as software reads it that neither this project nor `huggingface_hub` is made of.

make test-clients

`@huggingface/hub` (npm) is a second client of the Hub, `olah` (PyPI) a mirror between a client and the Hub. Both check
the test Hub too: what it and this project understand wrongly in the same way would pass everywhere else.
"""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from hub_on_loopback import TOKEN, LoopbackHub, free_ports
from published_things import tiny_checkpoint, tiny_space, tiny_task

pytestmark = pytest.mark.clients
HERE = Path(__file__).resolve().parent
OLAH = HERE.parents[1] / ".venv-olah" / "bin" / "olah-cli"
USE = """
import json, sys
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoModel, pipeline

model_id, revision, text = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModel.from_pretrained(model_id, revision=revision, trust_remote_code=True)
print(json.dumps({"probability": model.classify(text).probability}))
"""
USE_ALL = f"""{USE}
classifier = pipeline("text-classification", model=model_id, revision=revision, trust_remote_code=True, device=-1)
rows, space = load_dataset("alice/tiny-task"), snapshot_download("alice/tiny", repo_type="space")
print(json.dumps({{"pipeline": classifier(text)[0]["probability"], "rows": len(rows["test"]), "space": space}}))
"""
TEXT = {"findings": "aaaa 1", "claim": "Drug 1."}


@pytest.fixture
def hub(tmp_path):
    hub = LoopbackHub(tmp_path, xet=False)  # a mirror of files knows no Xet
    yield hub
    hub.stop()


@pytest.fixture
def published(hub, model, tmp_path):
    """A published model's commit, and its folder here."""
    task, space = tiny_task(tmp_path / "tiny_task"), tiny_space(tmp_path / "space")
    checkpoint = tiny_checkpoint(model, task, tmp_path / "model")
    pushed = hub.push(
        "--model", str(checkpoint), "--repo_id", "alice/tiny", "--task", str(task), "--space_dir", str(space),
        "--license", "mit",
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    return hub.api().repo_info("alice/tiny").sha, checkpoint


def javascript(hub, *arguments):
    """The JSON that `hub_client.mjs` prints."""
    done = subprocess.run(
        ["node", str(HERE / "hub_client.mjs"), *arguments],
        env={**os.environ, "HF_TOKEN": TOKEN}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_another_client_reads_what_is_published(hub, published, model):
    revision, _ = published
    found = javascript(hub, "read", hub.url, "alice/tiny", revision)
    folder = Path(hub.api().snapshot_download("alice/tiny", local_dir=hub.folder / "copy"))
    listed = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert listed.items() <= found["sha256"].items()
    assert set(found["sha256"]) - set(listed) == {".gitattributes", "README.md", "SHA256SUMS"}
    assert found["task"] == "text-classification"
    assert {"transformers", "clsgen", "custom_code", "license:mit"} <= set(found["tags"])
    assert found["parameters"] == {"F32": sum(parameter.numel() for parameter in model.parameters())}


def test_what_another_client_uploads_is_loaded(hub, model, published):
    _, checkpoint = published
    revision = javascript(hub, "write", hub.url, "alice/copied", str(checkpoint))["revision"]
    used = hub.run(USE, "user", "alice/copied", revision, json.dumps(TEXT))
    assert used.returncode == 0, used.stderr
    probability = json.loads(used.stdout.splitlines()[-1])["probability"]
    assert probability == pytest.approx(model.classify(TEXT).probability, abs=1e-5)


@pytest.fixture
def mirror(hub, tmp_path):
    """The address of `olah` before the Hub."""
    (port,) = free_ports(1)
    log = (tmp_path / "olah.log").open("w")
    process = subprocess.Popen(
        [
            OLAH, "--port", str(port), "--host", "127.0.0.1", "--hf-scheme", "http", "--hf-netloc",
            f"127.0.0.1:{hub.port}", "--hf-lfs-netloc", f"127.0.0.1:{hub.cdn_port}", "--mirror-scheme", "http",
            "--mirror-netloc", f"127.0.0.1:{port}", "--mirror-lfs-netloc", f"127.0.0.1:{port}", "--repos-path",
            str(tmp_path / "mirror"), "--log-path", str(tmp_path / "log"),
        ],
        stdout=log, stderr=log, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/")
            break
        time.sleep(0.1)
    else:
        process.kill()
        pytest.fail(f"olah did not start:\n{(tmp_path / 'olah.log').read_text()}")
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)
    log.close()


def test_a_mirror_passes_everything_on(hub, published, mirror, model):
    revision, _ = published
    expected, direct = pytest.approx(model.classify(TEXT).probability, abs=1e-5), len(hub.requests())
    used = hub.run(USE_ALL, "mirrored", "alice/tiny", revision, json.dumps(TEXT), endpoint=mirror)
    assert used.returncode == 0, used.stderr
    first, second = map(json.loads, used.stdout.splitlines()[-2:])
    assert first["probability"] == second["pipeline"] == expected
    assert second["rows"] == 20
    asked = hub.requests()[direct:]
    assert asked
    assert not [request for request in asked if "huggingface_hub/" in request["ua"]]  # but the mirror's own requests
