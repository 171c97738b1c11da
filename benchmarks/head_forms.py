"""What the head of a task should read, and which labels its probe should be fitted to: writes `head_forms.json`.

python -m benchmarks.head_forms --task clinifact --data_dir CliniFact --results_dir results/clinifact \\
    --trial_ids_end - --answers data/clinifact/explanations.jsonl --answers_id "{nctId}-{PMID}-{index}"

Probes of the frozen backbone, linear or with a hidden layer (`mlp`), by 5-fold cross-validation on train and
validation together (AUROC; with `--trial_ids_end` also with the rows of a trial in one fold), and fitted on train
alone, by AUROC on validation. The test split is not read. Labels are gold, or mixed with a teacher's probability
(`teacher_share`), where there is one.
"""

import argparse
import hashlib
import logging
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from benchmarks.measuring import describe_run
from clsgen.atomic_io import write_json
from clsgen.backbones import DEFAULT_BACKBONE, resolve_backbone
from clsgen.explanations.recorded import read_recorded
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.tasks import Task, load_task
from clsgen.training_rows import encode_rows
from clsgen.warm_start import Read, extract_features

SPLITS = ("train", "validation")
LAYERS = tuple(range(0, 30, 2))
INVERSE_PENALTIES = (3e-4, 1e-3, 3e-3)
MLP_PENALTIES = (1.0, 10.0)
HIDDEN_UNITS = 64
TEACHER_SHARES = (0.0, 0.5, 1.0)


def reads_of(mean: Iterable[int] = (), decision: Iterable[int] = ()) -> list[Read]:
    """What a head reads: the mean over the prompt at some layers, and the decision token at some."""
    return [*((layer, "mean") for layer in mean), *((layer, "decision") for layer in decision)]


FORMS: dict[str, list[Read]] = {
    "decision 16": reads_of(decision=[16]),
    "mean 14": reads_of([14]),
    "mean 16": reads_of([16]),
    "mean 20": reads_of([20]),
    "mean 14, decision 18": reads_of([14], [18]),
    "mean 18, decision 18": reads_of([18], [18]),
    "mean 20, decision 16": reads_of([20], [16]),
    "mean 8, 16, 20": reads_of([8, 16, 20]),
    "mean 0, 2, 20, decision 10": reads_of([0, 2, 20], [10]),
    "mean 4 to 20, decision 10": reads_of(range(4, 21, 4), [10]),
    "mean 0, 2, 8, 20, decision 10, 18": reads_of([0, 2, 8, 20], [10, 18]),
    "mean 4 to 28": reads_of(range(4, 29, 4)),
    "mean and decision 4 to 28": reads_of(range(4, 29, 4), range(4, 29, 4)),
}


def features_of(task: Task, backbone: str, template: str, max_prompt_length: int) -> dict[str, np.ndarray]:
    """Frozen features, gold labels and ids of train and then validation, and which rows are of train."""
    model = ClsGenForCausalLMAndClassification.from_backbone(
        resolve_backbone(backbone),
        task={**task.prompt, "template": template},
        labels=task.labels,
        config_kwargs={"max_prompt_length": max_prompt_length},
        dtype="float32",
    )
    parts = []
    for split in SPLITS:
        rows = task.splits[split].filter(lambda row: row["label"] is not None)
        encoded = encode_rows(rows, model.encoder, 1, guided=False, name=split)
        features, labels = extract_features(model, encoded, list(LAYERS))
        parts.append(
            {
                **{f"{layer}:{pooling}": x for (layer, pooling), x in features.items()},
                "labels": labels.astype(int),
                "ids": np.array(rows["id"]),
                "is_train": np.full(len(rows), split == "train"),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def kept_features(folder: Path, *key: Any) -> dict[str, np.ndarray]:
    """[`features_of`], computed once and kept in `folder`."""
    made_of = [
        [part.prompt, *(part.splits[split].to_list() for split in SPLITS)] if isinstance(part, Task) else part
        for part in key
    ]
    name = hashlib.sha256(repr([made_of, LAYERS]).encode()).hexdigest()[:16]
    file = folder / f"{name}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.npz"
        np.savez(temporary, **features_of(*key))
        temporary.rename(file)
    with np.load(file) as arrays:
        return dict(arrays)


def probes() -> dict[str, ClassifierMixin]:
    """New probes of each kind and strength of L2 penalty, by name."""
    linear = {f"linear, C={c:g}": LogisticRegression(C=c, max_iter=300) for c in INVERSE_PENALTIES}
    mlp = {
        f"mlp, alpha={alpha:g}": MLPClassifier(HIDDEN_UNITS, alpha=alpha, early_stopping=True, random_state=0)
        for alpha in MLP_PENALTIES
    }
    return {**linear, **mlp}


def fit_and_score(
    x: np.ndarray, targets: dict[float, np.ndarray], fitted: np.ndarray, held_out: np.ndarray
) -> dict[tuple[float, str], np.ndarray]:
    """Scores of the held-out rows, by teacher's share and probe.

    A row counts as both labels, with its shares of them as weights. PCA keeps all there is: it turns features so that
    there are no more of them than rows, which an L2 penalty does not notice.
    """
    turn = make_pipeline(StandardScaler(), PCA()).fit(x[fitted])
    z, z_held_out = turn.transform(x[fitted]), turn.transform(x[held_out])
    labels, found = np.repeat([1, 0], len(z)), {}
    for share, (name, probe) in product(targets, probes().items()):
        weights = np.concatenate([targets[share][fitted], 1 - targets[share][fitted]])
        kept = weights > 0
        probe.fit(np.concatenate([z, z])[kept], labels[kept], sample_weight=weights[kept])
        found[share, name] = probe.predict_proba(z_held_out)[:, 1]
    return found


def teacher_probabilities(ids: np.ndarray, task: Task, answers: Path | None, answers_id: str) -> np.ndarray:
    """The teacher's probability of label 1 for each row; nan where there is none."""
    found = read_recorded(answers, task, answers_id) if answers else {}
    blind = (found[row_id].blind.answer if row_id in found else None for row_id in ids)
    return np.array([np.nan if answer is None else answer.probability for answer in blind])


def score(
    data: dict[str, np.ndarray],
    teacher: np.ndarray,
    reads: list[Read],
    shares: tuple[float, ...],
    trials: list[str] | None = None,
) -> list[dict[str, float]]:
    """AUROC of the probes of one head form in the ways of the module's docstring; `trials` holds each row's."""
    x = np.concatenate([data[f"{layer}:{pooling}"] for layer, pooling in reads], axis=1)
    labels, is_train = data["labels"], data["is_train"]
    targets = {share: np.where(np.isnan(teacher), labels, (1 - share) * labels + share * teacher) for share in shares}
    ways = {
        "cv_auroc": list(StratifiedKFold(5, shuffle=True, random_state=0).split(x, labels)),
        "validation_auroc": [(np.flatnonzero(is_train), np.flatnonzero(~is_train))],
    }
    if trials is not None:
        apart = StratifiedGroupKFold(5, shuffle=True, random_state=0)
        ways["cv_auroc_by_trial"] = list(apart.split(x, labels, trials))
    rows = {key: {"teacher_share": key[0], "probe": key[1]} for key in product(shares, probes())}
    for name, folds in ways.items():
        scores = {key: np.full(len(labels), np.nan) for key in rows}
        for fitted, held_out in folds:
            for key, values in fit_and_score(x, targets, fitted, held_out).items():
                scores[key][held_out] = values
        scored = np.concatenate([held_out for _, held_out in folds])
        for key, row in rows.items():
            row[name] = roc_auc_score(labels[scored], scores[key][scored])
    return list(rows.values())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="clinifact")
    parser.add_argument("--data_dir", help="Source that the task's prepare.py reads.")
    parser.add_argument("--templates", nargs="*", help="Templates besides the task's own.")
    parser.add_argument("--answers", type=Path, help="A teacher's, see build_explanations.py.")
    parser.add_argument("--answers_id", default="{id}", help="The row's id, from their columns.")
    parser.add_argument("--trial_ids_end", help="What ends the trial at the beginning of each row's id.")
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--results_dir", required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    task = load_task(arguments.task, arguments.data_dir)
    rows = []
    for template in [task.prompt["template"], *(arguments.templates or ())]:
        template = template.replace("\\n", "\n")
        data = kept_features(
            Path("outputs/head_forms"), task, arguments.backbone, template, arguments.max_prompt_length
        )
        teacher = teacher_probabilities(data["ids"], task, arguments.answers, arguments.answers_id)
        end = arguments.trial_ids_end
        trials = [row_id.split(end)[0] for row_id in data["ids"]] if end else None
        shares = TEACHER_SHARES if np.isfinite(teacher).any() else (0.0,)
        for name, reads in tqdm(FORMS.items(), desc="Fitting probes", unit="form"):
            scored = score(data, teacher, reads, shares, trials)
            rows += [{"template": template, "reads": name, **row} for row in scored]
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
