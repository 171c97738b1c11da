"""The baseline that a head must beat: TF-IDF of 1- and 2-grams with logistic regression, on a task's own splits.

python -m benchmarks.baselines.tfidf --task trial_claims
python -m benchmarks.baselines.tfidf --task clinifact --data_dir CliniFact
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline

from clsgen.atomic_io import write_json
from clsgen.calibration import choose_threshold
from clsgen.classification_metrics import classification_metrics
from clsgen.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    """Fits on the training split (penalty by 5-fold cross-validation) and chooses the F1 threshold on the validation
    split; writes `results/<task>/tfidf/metrics.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="trial_claims")
    parser.add_argument("--data_dir")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    task = load_task(arguments.task, arguments.data_dir)

    texts, labels = {}, {}
    for name, split in task.splits.items():
        rows = [row for row in split if row["label"] is not None]
        texts[name] = [task.text_of(row) for row in rows]
        labels[name] = [int(row["label"]) for row in rows]

    regression = LogisticRegressionCV(Cs=10, cv=5, scoring="neg_log_loss", max_iter=2000, l1_ratios=(0,))
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), regression)
    model.fit(texts["train"], labels["train"])
    probabilities = {name: model.predict_proba(rows)[:, 1] for name, rows in texts.items() if name != "train"}
    threshold = choose_threshold(labels["validation"], probabilities["validation"])
    report = {
        "task": task.name,
        "command": shlex.join(["python", "-m", "benchmarks.baselines.tfidf", *sys.argv[1:]]),
        **{name: classification_metrics(labels[name], p, threshold) for name, p in probabilities.items()},
    }
    write_json(ROOT / "results" / task.name / "tfidf" / "metrics.json", report)
    print(f"{task.name}: test AUROC {report['test']['auroc']:.3f}, F1 {report['test']['f1']:.3f}")


if __name__ == "__main__":
    main()
