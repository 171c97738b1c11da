"""Text and JSON files that are there whole or not at all."""

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes an object as JSON, first under a temporary name in the same folder, then by renaming.

    Args:
        path (`str` or `os.PathLike`): The file; its folder is made if need be.
        obj: JSON values; also numpy or torch numbers and arrays (anything with `tolist`), tuples and paths. A number
            that is not finite (an undefined metric) becomes `null`, for JSON has no name for it.

    Raises:
        TypeError: A value has no JSON form. The file is then as it was.
    """
    write_text(path, json.dumps(jsonable(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8, first under a temporary name in the same folder, then by renaming."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def jsonable(value: Any) -> Any:
    """What `json` can write of a value; see [`write_json`]."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
