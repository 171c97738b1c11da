"""What filtering explanations does to a model: one recipe, three training sets, the same validation rows.

python -m benchmarks.explanation_filtering --task clinifact --data_dir CliniFact --config recipes/clinifact.yaml \\
    --answers data/clinifact/explanations.jsonl --answers_id "{nctId}-{PMID}-{index}"

Flags that are not this command's own go to `train_sft_cls.py`. Finished arms are not trained again.
"""

import argparse
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from transformers import AutoModel

from clsgen.atomic_io import write_json
from clsgen.build_explanations import BuildArguments, build
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.recorded import read_recorded
from clsgen.explanations.task_folder import DROP, EXPLAIN, HEAD
from clsgen.explanations.teacher import TeacherArguments
from clsgen.tasks import Task, load_task

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
# The arms differ in one thing only: what becomes of a training row whose explanation the filters refuse.
ARMS = {"all_explained": EXPLAIN, "filtered_dropped": DROP, "filtered_head_only": HEAD}
METRICS = ("auroc", "f1", "accuracy", "brier", "ece", "rows", "positive", "threshold")
Judge = Callable[[list[str]], list[int]]


def fit_judge(task: Task, answers: Path, answers_id: str) -> tuple[Judge, dict[str, float]]:
    """A reader that tells which label an explanation argues for: TF-IDF and logistic regression on the teacher's
    training explanations and the verdicts that it gave with them. Returns it with its cross-validated accuracy."""
    train = set(task.splits["train"]["id"])
    found = [each.blind.answer for row_id, each in read_recorded(answers, task, answers_id).items() if row_id in train]
    usable = [answer for answer in found if answer is not None]
    texts, verdicts = [answer.explanation for answer in usable], [answer.verdict for answer in usable]
    reader = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
    folds = min(5, verdicts.count(0), verdicts.count(1))
    accuracy = cross_val_score(reader, texts, verdicts, cv=folds).mean() if folds > 1 else float("nan")
    reader.fit(texts, verdicts)
    quality = {"name": "TF-IDF, logistic regression", "explanations": len(texts), "cv_accuracy": float(accuracy)}
    return lambda explanations: reader.predict(explanations).tolist(), quality


def alignment(model: Any, task: Task, judge: Judge, mode: str) -> dict[str, float]:
    """Whether explanations of the validation rows argue for the label that the head predicts."""
    texts = [{name: row[name] for name in task.fields} for row in task.splits["validation"]]
    predictions = model.classify_and_explain(texts, mode=mode)
    spoken = [each for each in predictions if each.explanation and each.explanation.strip()]
    predicted, judged = [each.label_id for each in spoken], judge([each.explanation for each in spoken])
    agreed = sum(a == b for a, b in zip(predicted, judged, strict=True))
    both = len({*predicted, *judged}) > 1
    return {
        "rows": len(predictions),
        "empty": len(predictions) - len(spoken),
        "contradiction_rate": 1 - agreed / len(spoken) if spoken else float("nan"),
        "kappa": float(cohen_kappa_score(predicted, judged)) if both else float("nan"),
    }


def train(arm: str, data: Path, output: Path, flags: list[str]) -> None:
    """Trains on one arm's data in a process of its own, unless that is done already."""
    if (output / "metrics.json").exists() and (output / "model" / "config.json").exists():
        logger.info("%s: trained already, in %s", arm, output)
        return
    command = ["train_sft_cls.py", *flags, "--task", str(data), "--output_dir", str(output), "--num_examples", "0"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def main() -> None:
    """Builds the arms, trains and scores each, and writes one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--answers", type=Path, required=True, help="see build_explanations.py")
    parser.add_argument("--answers_id", default="{id}")
    parser.add_argument("--config", help="recipe for train_sft_cls.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--modes", nargs="+", choices=["free", "guided"], default=["free", "guided"])
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/explanation_filtering"))
    parser.add_argument("--result", type=Path, help="results/explanations/<task>/filtering.json by default")
    arguments, flags = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = load_task(arguments.task, arguments.data_dir)
    judge, judge_quality = fit_judge(source, arguments.answers, arguments.answers_id)
    runs: list[dict[str, Any]] = []
    for arm, filtered_rows in ARMS.items():
        data = (arguments.work_dir / arm / "data").resolve()
        built = BuildArguments(
            task=arguments.task, answers=str(arguments.answers), answers_id=arguments.answers_id,
            output_dir=str(data), filtered_rows=filtered_rows,
        )  # fmt: skip
        report = build(built, TeacherArguments(), FilterArguments())
        for seed in arguments.seeds:
            output = (arguments.work_dir / arm / f"seed{seed}").resolve()
            recipe = ["--config", arguments.config] if arguments.config else []
            train(arm, data, output, [*recipe, *flags, "--seed", str(seed)])
            metrics = json.loads((output / "metrics.json").read_text())
            model = AutoModel.from_pretrained(output / "model", trust_remote_code=True)
            task = load_task(data)
            run = {"arm": arm, "filtered_rows": filtered_rows, "seed": seed, "train_rows": metrics["train_rows"]}
            run |= {"validation": {name: metrics["validation"][name] for name in METRICS}}
            run |= {f"alignment_{mode}": alignment(model, task, judge, mode) for mode in arguments.modes}
            runs.append(run)
            logger.info("%s", run)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.explanation_filtering", *sys.argv[1:]]),
        "task": source.name,
        "judge": judge_quality,
        "note": "Threshold and calibration are fitted on the same validation rows, in every arm alike.",
        "ledger": report["ledger"],
        "runs": runs,
    }
    path = arguments.result or ROOT / "results" / "explanations" / source.name / "filtering.json"
    write_json(path, result)
    print(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main()
