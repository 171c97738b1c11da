"""What the head of a task should read, and which labels its probe should be fitted to: writes `head_forms.json`.

python -m benchmarks.head_forms --task clinifact --data_dir CliniFact --results_dir results/clinifact

Linear probes on the frozen backbone, by 5-fold cross-validation on train and validation together (AUROC; also with the
rows of a trial in one fold, where ids begin with a trial), and fitted on train alone, by AUROC on validation. The
test split is not read. Labels are gold, or mixed with a teacher's probability (`teacher_share`), where there is one.
"""

import argparse
import logging
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from benchmarks.measuring import describe_run
from clsgen.atomic_io import write_json
from clsgen.backbones import resolve_backbone
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.tasks import Task, load_task
from clsgen.training_rows import encode_rows
from clsgen.warm_start import Read, extract_features

SPLITS = ("train", "validation")
LAYERS = tuple(range(4, 30, 2))
INVERSE_PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2)
TEACHER_SHARES = (0.0, 0.3, 0.5, 0.7, 1.0)
FORMS: dict[str, list[Read]] = {
    "decision 16": [(16, "decision")],
    "mean 14": [(14, "mean")],
    "mean 16": [(16, "mean")],
    "mean 20": [(20, "mean")],
    "mean 14, decision 18": [(14, "mean"), (18, "decision")],
    "mean 18, decision 18": [(18, "mean"), (18, "decision")],
    "mean 20, decision 16": [(20, "mean"), (16, "decision")],
    "mean 8, 16, 20": [(8, "mean"), (16, "mean"), (20, "mean")],
    "mean 4 to 20, decision 10": [*((layer, "mean") for layer in range(4, 21, 4)), (10, "decision")],
    "mean 4 to 28": [(layer, "mean") for layer in range(4, 29, 4)],
    "mean and decision 4 to 28": list(product(range(4, 29, 4), ("mean", "decision"))),
}


def features_of(task: Task, backbone: str, template: str, max_prompt_length: int) -> dict[str, Any]:
    """Frozen features, gold labels, teacher's probabilities and trials of each split."""
    model = ClsGenForCausalLMAndClassification.from_backbone(
        resolve_backbone(backbone),
        task={**task.prompt, "template": template},
        labels=task.labels,
        config_kwargs={"max_prompt_length": max_prompt_length},
        dtype="float32",
    )
    found = {}
    for split in SPLITS:
        rows = task.splits[split].filter(lambda row: row["label"] is not None)
        encoded = encode_rows(rows, model.encoder, 1, guided=False, name=split)
        features, labels = extract_features(model, encoded, list(LAYERS))
        teacher = rows["teacher_probability"] if "teacher_probability" in rows.column_names else [None] * len(rows)
        found[split] = {
            "features": features,
            "labels": labels.astype(int),
            "teacher": np.array([np.nan if value is None else value for value in teacher], dtype=float),
            "trials": np.array([row_id.split("-")[0] for row_id in rows["id"]]),
        }
    return found


def fit(x: np.ndarray, targets: np.ndarray, inverse_penalty: float) -> Pipeline:
    """Logistic regression on targets between 0 and 1: each row counts as both labels, with its shares as weights."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=300))
    labels = np.repeat([1, 0], len(x))
    weights = np.concatenate([targets, 1 - targets])
    used = weights > 0
    return probe.fit(np.concatenate([x, x])[used], labels[used], logisticregression__sample_weight=weights[used])


def score(data: dict[str, Any], reads: list[Read], inverse_penalty: float, teacher_share: float) -> dict[str, float]:
    """AUROC of one probe in the three ways of the module's docstring."""

    def columns(split: str) -> np.ndarray:
        return np.concatenate([data[split]["features"][read] for read in reads], axis=1)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([data[split][name] for split in SPLITS])

    x, labels, teacher = np.concatenate([columns(split) for split in SPLITS]), joined("labels"), joined("teacher")
    mixed = np.where(np.isnan(teacher), labels, (1 - teacher_share) * labels + teacher_share * teacher)
    aurocs = {}
    for name, folds in (("cv_auroc", StratifiedKFold), ("cv_auroc_by_trial", StratifiedGroupKFold)):
        scores = np.zeros(len(labels))
        for fitted, held_out in folds(5, shuffle=True, random_state=0).split(x, labels, joined("trials")):
            probe = fit(x[fitted], mixed[fitted], inverse_penalty)
            scores[held_out] = probe.decision_function(x[held_out])
        aurocs[name] = roc_auc_score(labels, scores)
    train = len(data["train"]["labels"])
    scores = fit(x[:train], mixed[:train], inverse_penalty).decision_function(x[train:])
    return {**aurocs, "validation_auroc": roc_auc_score(labels[train:], scores)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="clinifact")
    parser.add_argument("--data_dir", help="Source that the task's prepare.py reads.")
    parser.add_argument("--templates", nargs="*", help="Templates besides the task's own.")
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--backbone", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--results_dir", required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore", ConvergenceWarning)
    task = load_task(arguments.task, arguments.data_dir)
    rows = []
    for template in [task.prompt["template"], *(arguments.templates or ())]:
        template = template.replace("\\n", "\n")
        data = features_of(task, arguments.backbone, template, arguments.max_prompt_length)
        shares = TEACHER_SHARES if np.isfinite(data["train"]["teacher"]).any() else (0.0,)
        grid = list(product(FORMS.items(), shares, INVERSE_PENALTIES))
        for (name, reads), teacher_share, inverse_penalty in tqdm(grid, desc="Fitting probes", unit="probe"):
            setting = {"template": template, "reads": name, "teacher_share": teacher_share, "C": inverse_penalty}
            rows.append({**setting, **score(data, reads, inverse_penalty, teacher_share)})
        report = {
            **describe_run(),
            "task": task.name,
            "max_prompt_length": arguments.max_prompt_length,
            "probes": sorted(rows, key=lambda row: -row["cv_auroc"]),
        }
        write_json(Path(arguments.results_dir) / "head_forms.json", report)
    for row in report["probes"][:20]:
        print(" ".join(f"{value:.3f}" if isinstance(value, float) else repr(value) for value in row.values()))


if __name__ == "__main__":
    main()
