"""Real answers of a checkpoint, kept beside it as `examples.json`: what a model page shows where nothing can run."""

from pathlib import Path
from typing import Any

from transformers import AutoModel

from clsgen.atomic_io import write_json
from clsgen.publishing.cards import model_card
from clsgen.tasks import Task


def write_examples(folder: str | Path, task: Task, most: int) -> list[dict[str, Any]]:
    """Loads the checkpoint as a user would, asks it about the first rows of the test split (or else of the training
    split), and writes the answers beside it and into its card.

    Args:
        folder (`str` or `Path`): The checkpoint.
        task (`Task`): Its task.
        most (`int`): How many rows.

    Returns:
        `list[dict]`: `id`, `split`, `text`, `labels`, `gold` (a label's name or `None`), and `prediction` as
        `Prediction.to_dict` gives it.
    """
    split = "test" if "test" in task.splits else "train"
    rows = task.splits[split].select(range(min(most, len(task.splits[split]))))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    texts = [{name: row[name] for name in task.fields} for row in rows]
    examples = [
        {
            "id": row["id"],
            "split": split,
            "text": text,
            "labels": list(task.labels),
            "gold": None if row["label"] is None else task.labels[int(row["label"])],
            "prediction": prediction.to_dict(),
        }
        for row, text, prediction in zip(rows, texts, model.classify_and_explain(texts), strict=True)
    ]
    write_json(Path(folder) / "examples.json", examples)
    model_card(folder).save(Path(folder) / "README.md")
    return examples
