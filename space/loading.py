"""Which model the Space shows, and its example texts."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

logger = logging.getLogger("space")


@dataclass(frozen=True)
class Source:
    """Where the model comes from.

    Args:
        model (`str`): Hub id or folder.
        revision (`str`, *optional*): The commit, of weights and code.
        dataset (`str`, *optional*): Hub id of the data set it was trained on.
    """

    model: str
    revision: str | None = None
    dataset: str | None = None

    @property
    def name(self) -> str:
        """What the page calls it: no visitor needs a server's folders."""
        return "/".join(Path(self.model).parts[-2:])


@dataclass(frozen=True)
class Example:
    """An example text: its fields, or one string."""

    title: str
    text: str | dict[str, str]


def read_source(folder: Path, environment: Mapping[str, str]) -> Source:
    """The model that `CLSGEN_MODEL` and `CLSGEN_REVISION` name, or else `space.json`.

    Raises:
        ValueError: where neither names one, or the file can't be read.
    """
    if environment.get("CLSGEN_MODEL"):
        return Source(environment["CLSGEN_MODEL"], environment.get("CLSGEN_REVISION") or None)
    path = folder / "space.json"
    if not path.is_file():
        raise ValueError(
            'No model is named. Set CLSGEN_MODEL (and CLSGEN_REVISION), or write {"model": ..., "revision": ..., '
            f'"dataset": ...}} to {path.name} beside app.py.'
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Source(values["model"], values.get("revision"), values.get("dataset"))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} must hold {{"model": ..., "revision": ..., "dataset": ...}}: {error!r}.') from error


def load_model(source: Source) -> Any:
    """The model, on a GPU where there is one."""
    if source.revision is None and not Path(source.model).is_dir():
        logger.warning("No revision is pinned: whatever code %s holds at the moment is run.", source.model)
    model = AutoModel.from_pretrained(source.model, revision=source.revision, trust_remote_code=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_examples(path: Path, fields: list[str]) -> list[Example]:
    """The examples of `examples.json` that this model can read: `[{"title": ..., "text": ... or {field: ...}}]`.

    Those of another task are left out, so that the file may stay when the model is another.
    """
    if not path.is_file():
        return []
    examples = [Example(each["title"], each["text"]) for each in json.loads(path.read_text(encoding="utf-8"))]
    return [each for each in examples if isinstance(each.text, str) or set(each.text) == set(fields)]
