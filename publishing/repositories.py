"""What goes into each repository: the exact files of a model, a data set and a Space, before anything is sent."""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets import ClassLabel, Dataset
from huggingface_hub import DatasetCard, RepoCard, SpaceCard

from clsgen.publishing.cards import TEMPLATE, hub_id, model_card
from clsgen.publishing.checksums import FILE_NAME, checksum_lines
from clsgen.run_record import without_local_paths
from clsgen.tasks import find_task, load_task, raw_splits

DATASET_USAGE = Path(__file__).with_name("dataset_usage.md")
SPACE_FILE = "space.json"
UNKNOWN_REVISION = "0" * 40
MODEL_FILES = (".json", ".safetensors", ".py", ".jinja", ".yaml", ".png", ".txt", ".model")
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "generation_config.json")
IGNORED = ("README.md", FILE_NAME, SPACE_FILE)
LARGEST_FILE = 50 * 1000**3  # bytes
Content = Path | bytes


@dataclass(frozen=True)
class Repository:
    """One repository as it is to be.

    Args:
        repo_id (`str`): `namespace/name`.
        repo_type (`"model"`, `"dataset"` or `"space"`).
        files (`dict[str, Path | bytes]`): By path in the repository, all but the card.
        card (`Callable[[str], RepoCard]`): Makes `README.md`, given the commit that holds the files.
        pins_itself (`bool`): Whether the card names that commit.
    """

    repo_id: str
    repo_type: Literal["model", "dataset", "space"]
    files: dict[str, Content]
    card: Callable[[str], RepoCard]
    pins_itself: bool = True

    @property
    def url(self) -> str:
        """Its path on the Hub."""
        return self.repo_id if self.repo_type == "model" else f"{self.repo_type}s/{self.repo_id}"

    def write_to(self, folder: Path, revision: str = UNKNOWN_REVISION) -> list[str]:
        """Writes the tree below `folder`; returns its paths with their sizes."""
        readme = str(self.card(revision)).encode()
        lines = []
        for path, content in sorted({**self.files, "README.md": readme}.items()):
            target = folder / self.url / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
            lines.append(f"{self.url}/{path} ({target.stat().st_size:,} bytes)")
        return lines


def _with_checksums(files: dict[str, Content]) -> dict[str, Content]:
    for path, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(
                f"{path} has {size:,} bytes, and the Hub takes at most {LARGEST_FILE:,} in a file. Save the model "
                "again with a lower `max_shard_size`."
            )
    return {**files, FILE_NAME: checksum_lines(files).encode()}


def _files_below(folder: Path) -> dict[str, Content]:
    """All files but hidden ones, caches, and those that publishing writes itself."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix(): folder / path
        for path in paths
        if path.as_posix() not in IGNORED and not any(part.startswith((".", "__")) for part in path.parts)
    }


def model_repository(
    checkpoint: str | Path,
    repo_id: str,
    *,
    adapter: str | Path | None = None,
    template: str | Path = TEMPLATE,
    commits: Mapping[str, str] | None = None,
    **card_arguments: Any,
) -> Repository:
    """The repository of a checkpoint.

    Args:
        checkpoint (`str` or `Path`): A folder that `train_sft_cls.py` wrote.
        repo_id (`str`): Where to.
        adapter (`str` or `Path`, *optional*): The folder of the LoRA adapter, to publish that in place of the weights.
        template (`str` or `Path`): The card's.
        commits (`Mapping[str, str]`, *optional*): Where `dataset` is there when the card is made, it pins that commit.
        card_arguments: For [`cards.model_card`].

    Raises:
        FileNotFoundError: where the folder is no checkpoint.
        ValueError: for a file that has no place in a checkpoint, a pickle for instance.
    """
    checkpoint = Path(checkpoint)
    for name in ("config.json", "metrics.json"):
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{checkpoint} is no checkpoint of train_sft_cls.py: it has no {name}.")
    files = {**_files_below(checkpoint), "config.json": _config_without_local_path(checkpoint / "config.json")}
    for name in {"metrics.json", "recipe.yaml"} & set(files):
        files[name] = without_local_paths((checkpoint / name).read_text(encoding="utf-8")).encode()
    if adapter is not None:
        weights = {path.name for pattern in WEIGHT_FILES for path in checkpoint.glob(pattern)}
        files = {path: content for path, content in files.items() if path not in weights}
        files |= _adapter_files(Path(adapter), json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8")))
    strange = [path for path in files if not path.endswith(MODEL_FILES)]
    if strange:
        raise ValueError(f"{checkpoint} holds {strange}, which have no place in a checkpoint. Move them elsewhere.")
    if not any(path.endswith(".safetensors") for path in files):
        raise FileNotFoundError(f"{checkpoint} holds no weights (*.safetensors).")

    def card(revision: str) -> RepoCard:
        variant = "merged" if adapter is None else "adapter"
        return model_card(
            checkpoint, repo_id=repo_id, revision=revision, dataset_revision=(commits or {}).get("dataset"),
            variant=variant, template=template, **card_arguments,
        )  # fmt: skip

    return Repository(repo_id, "model", _with_checksums(files), card)


def _config_without_local_path(path: Path) -> Content:
    config = json.loads(path.read_text(encoding="utf-8"))
    text_config = config.get("text_config", {})
    if not Path(text_config.get("_name_or_path") or "").is_absolute():
        return path
    text_config["_name_or_path"] = ""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _adapter_files(folder: Path, report: dict[str, Any]) -> dict[str, Content]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter. Train with `--save_adapter true`, or name its folder with --adapter."
        )
    if report.get("base_model_source"):
        raise ValueError(
            f"The adapter was trained on {report['base_model']} {report['base_model_source']}: on the original's "
            "weights it would give other answers. Publish the merged checkpoint."
        )
    if hub_id(report["base_model"]) is None:
        raise ValueError(
            f"The adapter was trained on {report['base_model']}, which nobody else can load. Publish the merged "
            "checkpoint, or train on a backbone by its name on the Hub."
        )
    config = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": report["base_model"]}
    return {
        "adapter_config.json": json.dumps(config, indent=2).encode(),
        "adapter_model.safetensors": folder / "adapter_model.safetensors",
    }


def dataset_repository(
    task: str | Path, repo_id: str, *, model_id: str | None = None, space_id: str | None = None
) -> Repository:
    """The repository of a task: its splits as Parquet with all their columns, its `task.yaml` and its card.

    The result is a task folder again: `load_task` on a copy of it gives the same rows.

    Args:
        task (`str` or `Path`): A task's folder, or its name below `data/`.
        repo_id (`str`): Where to.
        model_id, space_id (`str`, *optional*): What the card links to.
    """
    folder, spec = find_task(task)
    load_task(folder)  # every row is checked, before anybody else gets it
    names = spec["labels"]
    splits = {
        split: _as_published(rows, spec.get("label_column", "label"), names)
        for split, rows in raw_splits(folder, spec).items()
    }
    paths = {split: f"data/{split}.parquet" for split in splits}
    kept = {key: value for key, value in spec.items() if key not in ("prepare", "dataset", "revision", "config_name")}
    task_yaml = yaml.safe_dump({**kept, "data_files": paths}, sort_keys=False, allow_unicode=True)
    files: dict[str, Content] = {"task.yaml": task_yaml.encode()}
    files |= {paths[split]: _parquet(rows) for split, rows in splits.items()}
    card = DatasetCard.load(folder / "README.md")
    data_files = [{"split": split, "path": path} for split, path in paths.items()]
    card.data.configs = [{"config_name": "default", "data_files": data_files}]
    card.data.license = card.data.license or spec.get("license")

    def with_usage(revision: str) -> RepoCard:
        usage = RepoCard.from_template(
            card.data,
            template_path=str(DATASET_USAGE),
            repo_id=repo_id, revision=revision, model_id=model_id, space_id=space_id, labels=names, name=spec["name"],
            rows={split: len(rows) for split, rows in splits.items()},
        )  # fmt: skip
        return DatasetCard(f"{str(card).rstrip()}\n\n{usage.text.strip()}\n")

    return Repository(repo_id, "dataset", _with_checksums(files), with_usage)


def _as_published(rows: Dataset, label: str, names: list[str]) -> Dataset:
    """Labels as a `ClassLabel`, so that the viewer shows their names; the rest as it is."""
    values = [None if value is None else int(float(value)) for value in rows[label]]
    return rows.remove_columns(label).add_column(label, values, feature=ClassLabel(names=names))


def _parquet(rows: Dataset) -> bytes:
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    return buffer.getvalue()


def space_repository(
    folder: str | Path, repo_id: str, *, model_id: str, model_revision: str, dataset_id: str | None = None
) -> Repository:
    """The repository of the demo: the app, and a `space.json` that tells it which checkpoint to load.

    Args:
        folder (`str` or `Path`): With `README.md` (front matter), `app.py` and `requirements.txt`.
        repo_id (`str`): Where to.
        model_id, model_revision (`str`): What the app loads; the revision is a commit.
        dataset_id (`str`, *optional*): Where its examples come from.

    Raises:
        FileNotFoundError: where one of the three files is missing.
    """
    folder = Path(folder)
    missing = [name for name in ("README.md", "app.py", "requirements.txt") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no Space: it has no {', '.join(missing)}.")
    what = {"model": model_id, "revision": model_revision, "dataset": dataset_id}
    files = {**_files_below(folder), SPACE_FILE: (json.dumps(what, indent=2) + "\n").encode()}
    card = SpaceCard.load(folder / "README.md")
    card.data.models = [model_id]
    if dataset_id:
        card.data.datasets = [dataset_id]
    return Repository(repo_id, "space", _with_checksums(files), lambda revision: card, pins_itself=False)
