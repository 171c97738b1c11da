"""What each part of CLSGen is worth: the task's recipe with one part changed, trained and scored as usual.

Where that part needs another learning rate and more epochs, these change too, see `ABLATIONS`.

python -m benchmarks.ablations --name no-lm-loss
python -m benchmarks.ablations --name explanations-100 --task clinifact --data_dir CliniFact --seed 1

Further flags go to `train_sft_cls.py`. A run takes as long as training does; `make table` reads its result file.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import yaml

from clsgen.run_record import describe_run
from clsgen.tasks import Task, load_task
from clsgen.train_sft_cls import main as train

ROOT = Path(__file__).resolve().parent.parent
ABLATIONS = {
    "full": [],
    "no-lm-loss": ["--lm_weight", "0"],
    "no-bce": ["--cls_weight", "0"],
    "lm-weight-0.5": ["--lm_weight", "0.5"],
    "lm-weight-2": ["--lm_weight", "2"],
    "head-alone": ["--lm_reading_weight", "0"],
    "no-verdict-loss": ["--verdict_weight", "0", "--verdict_texts", "0"],
    "no-verdict-texts": ["--verdict_texts", "0"],
    "verdict-texts-6": ["--verdict_texts", "6"],
    "no-verdict-line": ["--explanation_mode", "free", "--verdict_weight", "0", "--verdict_texts", "0"],
    "no-warm-start": ["--warm_start", "false"],
    "decision-token": ["--cls_reads", "18:decision"],
    "mean-pooling": ["--cls_reads", "18:mean"],
    "all-layers": ["--lora_first_layer", "0", "--learning_rate", "2e-4", "--num_train_epochs", "3"],
    "final-layer": ["--cls_reads=-1:decision"],
    "packing": ["--packing", "true"],
    "explanations-0": [],
    "explanations-50": [],
    "explanations-100": [],
    "explanations-200": [],
}


def with_explanations(task: Task, count: int, folder: Path, seed: int = 0) -> Path:
    """Writes the task with `count` of its training explanations, drawn at random; its rows and labels stay.

    Args:
        task (`Task`): The task.
        count (`int`): Explanations to keep.
        folder (`Path`): Becomes the task's folder.
        seed (`int`, *optional*, defaults to 0): Of the draw; a larger count keeps what a smaller one keeps.

    Raises:
        ValueError: for more explanations than there are.
    """
    explained = [row["id"] for row in task.splits["train"] if row["explanation"] is not None]
    if count > len(explained):
        raise ValueError(f"{task.name} has {len(explained)} training explanations, fewer than {count}.")
    random.Random(seed).shuffle(explained)
    kept = set(explained[:count])
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in task.splits.items():
        lines = [
            {**row, "explanation": row["explanation"] if split != "train" or row["id"] in kept else None}
            for row in rows
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    spec = {
        **task.prompt, "name": task.name, "labels": list(task.labels), "credentialed": task.credentialed,
        "id_column": "id", "data_files": {split: f"{split}.jsonl" for split in task.splits},
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return folder


def plan(name: str, task_name: str, seed: int, further: list[str], data_dir: str | None = None) -> list[str]:
    """The arguments of `train_sft_cls.py` for an ablation.

    Args:
        name (`str`): One of `ABLATIONS`.
        task_name (`str`): A task's folder, or its name below `data/`.
        seed (`int`): Of the run, and of the draw of explanations.
        further (`list[str]`): The caller's own flags; they come last, and win.
        data_dir (`str`, *optional*): The source of the task's data.
    """
    short = Path(task_name).name
    recipe = ROOT / "recipes" / f"{short}.yaml"
    output = Path("outputs") / "ablations" / short / f"{name}-seed-{seed}"
    place = ["--task", task_name, *(["--data_dir", data_dir] if data_dir else [])]
    if name.startswith("explanations-"):
        task, count = load_task(task_name, data_dir), int(name.removeprefix("explanations-"))
        place = ["--task", str(with_explanations(task, count, output / "task", seed))]
    return [
        *(["--config", str(recipe.relative_to(ROOT))] if recipe.is_file() else []),
        *place,
        "--seed", str(seed),
        "--output_dir", str(output),
        "--results_dir", f"results/{short}/ablations/{name}/seed-{seed}",
        *ABLATIONS[name],
        *further,
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command line; run it from the repository's root."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, choices=list(ABLATIONS))
    parser.add_argument("--task", default="trial_claims", help="a task's folder, or its name below data/")
    parser.add_argument("--data_dir", help="source that the task's prepare.py reads")
    parser.add_argument("--seed", type=int, default=0)
    argv = sys.argv[1:] if argv is None else argv
    arguments, further = parser.parse_known_args(argv)
    try:
        planned = plan(arguments.name, arguments.task, arguments.seed, further, arguments.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # Training's own command may read a folder that was made here, and that nobody else has.
    train(planned, describe_run("-m", ["benchmarks.ablations", *argv]))


if __name__ == "__main__":
    main()
