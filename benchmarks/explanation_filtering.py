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
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoModel

from clsgen.atomic_io import write_json
from clsgen.build_explanations import BuildArguments, build
from clsgen.evaluation.alignment import alignment_report
from clsgen.evaluation.judges import Judge, make_judge
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.task_folder import DROP, EXPLAIN, HEAD
from clsgen.explanations.teacher import TeacherArguments
from clsgen.tasks import Task, load_task

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
# The arms differ in one thing only: what becomes of a training row whose explanation the filters refuse.
ARMS = {"all_explained": EXPLAIN, "filtered_dropped": DROP, "filtered_head_only": HEAD}
METRICS = ("auroc", "f1", "accuracy", "brier", "ece", "rows", "positive", "threshold")


def alignment(model: Any, task: Task, judge: Judge, mode: str) -> dict[str, Any]:
    """Whether explanations of the validation rows argue for the label that the head predicts."""
    rows = task.splits["validation"]
    predictions = model.classify_and_explain([{name: row[name] for name in task.fields} for row in rows], mode=mode)
    table = pd.DataFrame(
        {
            "probability": [each.probability for each in predictions],
            "predicted": [each.label_id for each in predictions],
            "explanation": [each.explanation for each in predictions],
            "gold": rows["label"],
        }
    )
    report = alignment_report(table, judge)
    return {name: value for name, value in report.items() if name not in ("judged_probability", "judged_label")}


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
    judge = make_judge("tfidf", source)
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
        "note": "Threshold and calibration are fitted on the same validation rows, in every arm alike.",
        "ledger": report["ledger"],
        "runs": runs,
    }
    path = arguments.result or ROOT / "results" / "explanations" / source.name / "filtering.json"
    write_json(path, result)
    print(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main()
