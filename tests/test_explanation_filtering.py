"""The benchmark of the data arms, on a tiny model: three trainings, one result file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_three_arms_are_trained_and_scored(backbones, tmp_path):
    spec = yaml.safe_load((ROOT / "data" / "trial_claims" / "task.yaml").read_text())
    spec["data_files"] = {"train": "train.jsonl", "validation": "validation.jsonl"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(spec))
    answers = []
    for split, most in (("train", 24), ("validation", 8)):
        lines = (ROOT / "data" / "trial_claims" / f"{split}.jsonl").read_text().splitlines()[:most]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
        for i, row in enumerate(map(json.loads, lines)):
            verdict = row["label"] if i % 6 else 1 - row["label"]  # a teacher that is wrong on every sixth row
            answers.append({"id": row["id"], "teacher_verdict": verdict, "teacher_probability": 0.2 + 0.6 * verdict,
                            "explanation": row["explanation"]})  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    command = [
        sys.executable, "-m", "benchmarks.explanation_filtering", "--task", str(tmp_path),
        "--answers", str(tmp_path / "answers.jsonl"), "--work_dir", str(tmp_path / "work"), "--result",
        str(tmp_path / "result.json"), "--modes", "free", "--model_name_or_path", backbones["llama"],
        "--cls_reads", "2:mean", "3:decision", "--lora_first_layer", "0", "--max_steps", "2", "--max_length", "464",
        "--max_explanation_length", "32", "--save_strategy", "no",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    found = {run["arm"]: run for run in result["runs"]}
    rows = {arm: (run["train_rows"]["rows"], run["train_rows"]["explained"]) for arm, run in found.items()}
    assert rows == {"all_explained": (24, 24), "filtered_dropped": (20, 20), "filtered_head_only": (24, 20)}
    for run in found.values():
        assert run["validation"]["rows"] == run["alignment_free"]["rows"] == 8
        assert 0 <= run["validation"]["auroc"] <= 1
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)  # nothing is trained again
