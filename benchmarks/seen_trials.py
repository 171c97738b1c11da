"""AUROC on CliniFact's test rows by whether a training or validation row is of the same trial.

python -m benchmarks.seen_trials --data_dir CliniFact

Reads the committed test predictions of every system, and of CliniFact the trials that ids name. Writes
`results/<task>/seen_trials.json`.
"""

import argparse
from typing import Any

from sklearn.metrics import roc_auc_score

from benchmarks.rivals import predictions_of
from benchmarks.table import RESULTS, contests, table_rows
from clsgen.atomic_io import write_json
from clsgen.evaluation.comparison import delong
from clsgen.run_record import describe_run
from clsgen.tasks import load_task

TASKS = ("clinifact", "clinifact_evidence")


def trial_of(row_id: str) -> str:
    """The registry's number of a row's trial, with which its id begins."""
    return row_id.partition("-")[0]


def by_trial(task_name: str, data_dir: str) -> dict[str, Any]:
    """The AUROC of each system on either part of a task's test rows, and CLSGen's less each baseline's ([`delong`]).

    Args:
        task_name (`str`): One of `TASKS`.
        data_dir (`str`): A CliniFact checkout.
    """
    splits = load_task(task_name, data_dir).splits
    known = {trial_of(row_id) for split in ("train", "validation") for row_id in splits[split]["id"]}
    report: dict[str, Any] = {"trial_seen": {}, "trial_unseen": {}}
    for ours, rivals in contests(table_rows(RESULTS, [task_name])):
        labels, scores = predictions_of(ours[0]["places"])
        seen = labels.index.map(trial_of).isin(known)
        for name, part in (("trial_seen", seen), ("trial_unseen", ~seen)):
            of_part = labels.to_numpy()[part]
            report[name] |= {"rows": int(part.sum()), "positive": int(of_part.sum()), "systems": {}}
            for row in {row["system"]: row for row in (ours[0], *rivals)}.values():
                theirs = predictions_of(row["places"], list(labels.index))[1]
                auroc = sum(roc_auc_score(of_part, run[part]) for run in theirs) / len(theirs)
                found = {"auroc": auroc, "seeds": len(theirs)}
                if row is not ours[0]:
                    found["ours_less_theirs"] = delong(of_part, scores[:, part], theirs[:, part])
                report[name]["systems"][row["system"]] = found
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a CliniFact checkout")
    arguments = parser.parse_args()
    for task_name in TASKS:
        run = describe_run("-m", ["benchmarks.seen_trials", "--data_dir", arguments.data_dir])
        write_json(RESULTS / task_name / "seen_trials.json", by_trial(task_name, arguments.data_dir) | run)


if __name__ == "__main__":
    main()
