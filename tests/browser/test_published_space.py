"""The Space as others get it: published with its model, downloaded from the Hub, started, asked."""

import json

import pytest
from hub_on_loopback import LoopbackHub
from published_things import tiny_checkpoint, tiny_task

pytestmark = pytest.mark.browser
START = """
import contextlib, json, os, signal, socket, subprocess, sys, time
from pathlib import Path
from gradio_client import Client
from huggingface_hub import snapshot_download

folder, home = snapshot_download("alice/tiny", repo_type="space"), os.environ["HOME"]
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
app = subprocess.Popen(
    [sys.executable, folder + "/app.py"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    env={**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": home},
)
try:
    deadline, client = time.monotonic() + 120, None
    while client is None and app.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=home)
        time.sleep(0.3)
    shown = client and client.predict("By field", True, "", *json.loads(sys.argv[1]), api_name="/answer_text")
finally:
    app.send_signal(signal.SIGINT)
    told = app.communicate(timeout=60)[1]
print(json.dumps({"shown": shown, "card": Path(folder, "README.md").read_text(), "told": told}))
"""


@pytest.fixture
def hub(tmp_path):
    hub = LoopbackHub(tmp_path, xet=True)
    yield hub
    hub.stop()


def test_the_published_space_starts_and_shows_the_published_model(hub, model, tmp_path):
    task = tiny_task(tmp_path / "tiny_task")
    checkpoint = tiny_checkpoint(model, task, tmp_path / "model")
    pushed = hub.push(
        "--model", str(checkpoint), "--repo_id", "alice/tiny", "--task", str(task), "--license", "mit"
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    text = {"findings": "aaaa 1 of 9. bbbb 2.", "claim": "Drug 1."}
    ran = hub.run(START, "user", json.dumps(list(text.values())))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["shown"], found["told"]
    announced, answer, _, sentences = found["shown"]
    expected = model.classify_and_explain(text, attributions=True)
    assert f"{100 * expected.probability:.1f}%" in answer
    assert announced == "The sentences are weighed."
    assert sentences.count("scored") == len(expected.attributions)
    assert "models:\n- alice/tiny\n" in found["card"]
    assert "datasets:\n- alice/tiny-task\n" in found["card"]
    assert "Traceback" not in found["told"]
