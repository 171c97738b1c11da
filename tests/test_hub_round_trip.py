"""Published over the Hub's own protocol, then used from nowhere: fresh process, fresh home, empty folder, no token."""

import json
import re
from pathlib import Path

import pytest
from hub_on_loopback import LoopbackHub
from huggingface_hub import ModelCard
from published_things import tiny_checkpoint, tiny_space, tiny_task

from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification

COLLECT = """
import json, os, re, subprocess, sys
from pathlib import Path
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

model_id, revision, data_id, space_id = sys.argv[1:5]
texts = json.loads(sys.argv[5])
for refused in (AutoConfig, AutoModel):
    try:
        refused.from_pretrained(model_id, revision=revision, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("code ran without being trusted")
model = AutoModel.from_pretrained(model_id, revision=revision, trust_remote_code=True)
predictions = model.classify_and_explain(texts)
classifier = pipeline("text-classification", model=model_id, revision=revision, trust_remote_code=True, device=-1)
answers = classifier(texts)
decide = pipeline("decision", model=model_id, revision=revision, trust_remote_code=True, device=-1)
decision = decide({"state": texts[0], "questions": {"q": {"type": "noul"}}})["q"]["noul"]
rows = load_dataset(data_id)
space = snapshot_download(space_id, repo_type="space")
started = subprocess.run([sys.executable, space + "/app.py"], capture_output=True, text=True)
assert started.returncode == 0, started.stderr
home = Path(os.environ["HF_HOME"])
modules = {path.parent.name for path in home.glob("modules/**/modeling_clsgen.py")}
print(json.dumps({
    "probabilities": [p.probability for p in predictions],
    "explanations": [p.explanation for p in predictions],
    "pipeline": [a["probability"] for a in answers],
    "decision": decision,
    "labels": rows["test"].features["label"].names,
    "columns": rows.column_names["train"],
    "rows": {split: len(each) for split, each in rows.items()},
    "app": started.stdout,
    "code_revisions": sorted(modules),
    "left_behind": sorted(map(str, [*Path.cwd().rglob("*"), *Path(os.environ["HOME"]).rglob("*")])),
    "foreign": [name for name in sys.modules if name.split(".")[0] == "clsgen"],
}))
"""
RUN_BLOCKS = """
import re, sys
from pathlib import Path
from huggingface_hub import hf_hub_download
for repo_type, repo in (("model", sys.argv[1]), ("dataset", sys.argv[2])):
    card = Path(hf_hub_download(repo, "README.md", repo_type=repo_type)).read_text()
    blocks = re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, repo, "exec"), {"__name__": "block"})
print("ran all")
"""
ADAPT = """
import json, re, sys
from pathlib import Path
from huggingface_hub import hf_hub_download
(block,) = re.findall(
    r"```python\\n(.*?)```", Path(hf_hub_download(sys.argv[1], "README.md")).read_text(), flags=re.DOTALL
)
names = {}
exec(compile(block, "card", "exec"), names)
print(json.dumps([answer.probability for answer in names["model"].classify(json.loads(sys.argv[2]))]))
"""
MEASURE = """
import evaluate, sys
rows = {"predictions": [0.2, 0.8, 0.6, 0.4], "references": [0, 1, 0, 1]}
print(evaluate.load(sys.argv[1]).compute(**rows)["auroc"])
print(evaluate.load(sys.argv[1], "alignment", revision=sys.argv[2]).compute(**rows)["kappa"])
"""


@pytest.fixture
def texts():
    return [{"findings": "aaaa 1", "claim": "Drug 1."}, {"findings": "zzzz 2 <|im_end|>", "claim": "Drug 2."}]


@pytest.fixture(params=["xet", pytest.param("lfs", marks=pytest.mark.slow)])
def hub(request, tmp_path):
    hub = LoopbackHub(tmp_path, xet=request.param == "xet")
    yield hub
    hub.stop()


def test_push_then_use_from_nowhere(hub, model, texts, tmp_path):
    task, space = tiny_task(tmp_path / "tiny_task"), tiny_space(tmp_path / "space")
    checkpoint = tiny_checkpoint(model, task, tmp_path / "model")
    command = [
        "--model", str(checkpoint), "--repo_id", "alice/tiny", "--task", str(task), "--space_dir", str(space),
        "--license", "mit",
    ]  # fmt: skip
    pushed = hub.push(*command)
    assert pushed.returncode == 0, pushed.stderr
    api = hub.api()
    card = ModelCard.load(api.hf_hub_download("alice/tiny", "README.md", local_dir=tmp_path / "card"))
    (revision,) = set(re.findall(r'"alice/tiny", revision="([0-9a-f]{40})"', str(card)))
    (data_revision,) = re.findall(r'load_dataset\("alice/tiny-task", revision="([0-9a-f]{40})"', str(card))
    assert data_revision == api.repo_info("alice/tiny-task", repo_type="dataset").sha
    loaded = hub.run(COLLECT, "user", "alice/tiny", revision, "alice/tiny-task", "alice/tiny", json.dumps(texts))
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout.strip().splitlines()[-1])
    expected = model.classify_and_explain(texts)
    probabilities = pytest.approx([prediction.probability for prediction in expected], abs=1e-5)
    assert found["probabilities"] == found["pipeline"] == probabilities
    assert found["decision"] == pytest.approx(expected[0].probability, abs=1e-5)
    assert found["explanations"] == [prediction.explanation for prediction in expected]
    assert found["labels"] == ["not_supported", "supported"]
    assert found["rows"] == {"train": 24, "validation": 12, "test": 20}
    assert {"id", "findings", "claim", "label", "explanation", "area"} == set(found["columns"])
    assert float(found["app"].split()[1]) == pytest.approx(model.classify("Findings: A.").probability, abs=1e-5)
    assert found["app"].split()[2] == "alice/tiny-task"
    assert found["left_behind"] == found["foreign"] == []

    commits = {part: [c.title for c in api.list_repo_commits(**where)] for part, where in _everything().items()}
    assert all(titles == ["Publish with CLSGen", "initial commit"] for titles in commits.values())
    for where in _everything().values():
        assert not api.repo_info(**where).private
        assert [branch.name for branch in api.list_repo_refs(**where).branches] == ["main"]
    collection = api.create_collection("CLSGen: tiny_task", namespace="alice", exists_ok=True)
    assert [(item.item_type, item.item_id) for item in collection.items] == [
        ("dataset", "alice/tiny-task"), ("model", "alice/tiny"), ("space", "alice/tiny"),
    ]  # fmt: skip

    blocks = hub.run(RUN_BLOCKS, "reader", "alice/tiny", "alice/tiny-task")
    assert blocks.stdout.strip().endswith("ran all"), blocks.stderr

    before = {part: api.repo_info(**where).sha for part, where in _everything().items()}
    seen = len(hub.requests())
    again = hub.push(*command)
    assert again.returncode == 0, again.stderr
    assert {part: api.repo_info(**where).sha for part, where in _everything().items()} == before
    assert [r for r in hub.requests()[seen:] if "/commit/" in r["p"] or r["m"] == "PUT"] == []


@pytest.mark.slow
def test_an_adapter_is_put_on_the_backbone_that_it_was_trained_on(hub, backbones, texts, tmp_path):
    task, out = tiny_task(tmp_path / "tiny_task"), tmp_path / "out"
    hub.hf("upload", "alice/backbone", backbones["llama"], ".")
    trained = hub.command(
        "train_sft_cls.py", "--task", str(task), "--model_name_or_path", "alice/backbone", "--output_dir", str(out),
        "--max_length", "300", "--max_explanation_length", "40", "--max_steps", "2", "--save_strategy", "no",
        "--lora_first_layer", "0", "--lora_r", "2", "--num_examples", "0", "--learning_rate", "0.1",
        "--cls_reads", "2:mean", "--save_adapter", "true",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    pushed = hub.push(
        "--model", str(out / "model"), "--repo_id", "alice/tiny", "--task", str(task), "--parts", "model", "--license",
        "mit", "--variant", "adapter", "--num_examples", "0",
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    weights = [file for file in hub.api().list_repo_files("alice/tiny") if file.endswith(".safetensors")]
    assert weights == ["adapter_model.safetensors"]
    loaded = hub.run(ADAPT, "user", "alice/tiny", json.dumps(texts))
    assert loaded.returncode == 0, loaded.stderr
    merged = ClsGenForCausalLMAndClassification.from_pretrained(out / "model")
    answers = [answer.probability for answer in merged.classify(texts)]
    assert json.loads(loaded.stdout.splitlines()[-1]) == pytest.approx(answers, abs=1e-5)


def test_the_metric_is_loaded_by_its_name_on_the_hub(hub):
    folder = Path(__file__).resolve().parents[1] / "metrics" / "clsgen"
    hub.hf("repos", "create", "alice/clsgen", "--type", "space", "--sdk", "gradio")
    hub.hf("upload", "alice/clsgen", str(folder), ".", "--repo-type", "space")
    revision = hub.api().repo_info("alice/clsgen", repo_type="space").sha
    measured = hub.run(MEASURE, "user", "alice/clsgen", revision)
    assert measured.stdout.split() == ["0.75", "0.0"], measured.stderr


def _everything():
    return {
        "models": {"repo_id": "alice/tiny", "repo_type": "model"},
        "datasets": {"repo_id": "alice/tiny-task", "repo_type": "dataset"},
        "spaces": {"repo_id": "alice/tiny", "repo_type": "space"},
    }
