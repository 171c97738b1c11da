"""A tiny task, checkpoint and Space to publish."""

import json
from pathlib import Path

import numpy as np
import yaml
from conftest import PROMPT

from clsgen.checkpoint_folder import write_checkpoint
from clsgen.classification_metrics import classification_metrics
from clsgen.publishing.examples import write_examples
from clsgen.publishing.footprint import estimate_footprint
from clsgen.tasks import load_task, rows_digest

LABELS = ["not_supported", "supported"]
APP = """
import json, os, pathlib
from transformers import AutoModel
what = json.loads(pathlib.Path(__file__).with_name("space.json").read_text())
model = AutoModel.from_pretrained(what["model"], revision=what["revision"], trust_remote_code=True)
print("probability", model.classify("Findings: A.").probability, what["dataset"])
"""


def tiny_task(folder: Path, **spec) -> Path:
    """A task folder with three splits; rows have a column beside those that CLSGen knows."""
    folder.mkdir()
    files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    spec = {"name": "tiny_task", **PROMPT, "labels": LABELS, "data_files": files, "license": "mit", **spec}
    (folder / "task.yaml").write_text(yaml.safe_dump(spec))
    for name, size in (("train", 24), ("validation", 12), ("test", 20)):
        rows = [
            {"id": f"{name}{i}", "findings": f"{'zzzz' if i % 2 else 'aaaa'} {i} | <b>*", "claim": f"Drug {i}.",
             "label": i % 2 if i != 7 else None, "explanation": None if i % 5 == 0 else "Seen.", "area": "x"}
            for i in range(size)
        ]  # fmt: skip
        (folder / files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = "".join(f"  - split: {name}\n    path: {file}\n" for name, file in files.items())
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\npretty_name: Tiny\nconfigs:\n- config_name: default\n  data_files:\n"
        f"{entries}---\n\n# Tiny\n\nMade for a test.\n"
    )
    return folder


def tiny_report(model, task) -> tuple[dict, list[dict]]:
    """A report as training writes it, with true numbers of this model, and its predictions."""
    report = {
        "task": task.name, "credentialed": task.credentialed, "base_model": "someone/tiny-llama", "seed": 0,
        "train_rows": {"rows": 24, "positive": 12, "negative": 11, "unlabelled": 1, "explained": 19},
        "threshold_method": "f1", "command": "python train_sft_cls.py --task tiny_task", "commit": "1234567",
        "versions": {"torch": "2"}, "calibration": model.config.calibration, "threshold": model.config.threshold,
        "wall_seconds": 3600.0, "peak_memory_gib": 2.0, "footprint": estimate_footprint(3600.0, 2.0, 2),
    }  # fmt: skip
    for split in ("validation", "test"):
        rows = task.splits[split].filter(lambda row: row["label"] is not None)
        answers = model.classify([{name: row[name] for name in task.fields} for row in rows])
        probabilities = np.array([answer.probability for answer in answers])
        labels = np.array(rows["label"])
        report[split] = classification_metrics(labels, probabilities, model.config.threshold)
    report["test_rows_sha256"] = rows_digest(task.splits["test"])
    predictions = [{"label": int(y), "probability": p} for y, p in zip(labels, probabilities, strict=True)]
    return report, predictions


def tiny_checkpoint(model, task_folder: Path, folder: Path) -> Path:
    """A complete checkpoint with metrics, plot, recipe and examples."""
    model.generation_config.max_new_tokens = 5
    model.config.calibration = {"temperature": 1.5, "bias": -0.25}
    model.config.threshold = 0.4375
    model.config.conformal = {"error_rate": 0.1, "quantiles": [0.6, 0.7]}
    task = load_task(task_folder)
    report, predictions = tiny_report(model, task)
    write_checkpoint(model, folder, report, predictions, recipe="seed: 0\n")
    write_examples(folder, task, 2)
    return folder


def tiny_space(folder: Path) -> Path:
    """An app that loads what its `space.json` names."""
    folder.mkdir()
    (folder / "README.md").write_text("---\ntitle: Tiny\nsdk: gradio\napp_file: app.py\n---\n\n# Tiny\n")
    (folder / "app.py").write_text(APP)
    (folder / "requirements.txt").write_text("torch\ntransformers\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "app.pyc").write_bytes(b"\0")
    return folder
