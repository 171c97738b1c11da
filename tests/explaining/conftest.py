"""A teacher, a task without explanations, and the command that builds them."""

import json
import time

import pytest
import yaml
from teacher_server import Server

from clsgen.build_explanations import BuildArguments as Build
from clsgen.build_explanations import build
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.teacher import TeacherArguments

SPEC = {
    "name": "mine",
    "system_prompt": "You read reports.",
    "template": "Report {text}",
    "document": "text",
    "question": "Is it good?",
    "labels": ["bad", "good"],
    "verdicts": ["not good", "good"],
    "data_files": {"train": "train.jsonl", "validation": "validation.jsonl"},
    "license": "cc0-1.0",
}
ROWS = 12


@pytest.fixture
def server():
    server = Server()
    server.thread.start()
    deadline = time.monotonic() + 30
    while not server.server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield server
    server.server.should_exit = True
    server.thread.join()


@pytest.fixture
def folder(tmp_path):
    def write(rows=ROWS, **spec):
        path = tmp_path / "source"
        path.mkdir(exist_ok=True)
        for split, numbers in (("train", range(rows)), ("validation", range(rows, rows + 4))):
            lines = [
                {"id": f"r{n}", "text": f"{n} tells of a {'good' if n % 2 else 'poor'} day.", "label": n % 2}
                for n in numbers
            ]
            (path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (path / "task.yaml").write_text(yaml.safe_dump({**SPEC, **spec}))
        return path

    return write


@pytest.fixture
def run(server, folder, tmp_path):
    """Builds from the task with the server as teacher."""

    def call(source=None, teacher=None, filters=None, **arguments):
        asked = Build(task=str(source or folder()), output_dir=str(tmp_path / "built"), **arguments)
        options = {"model": "teacher", "base_url": server.url, "max_retries": 1, **(teacher or {})}
        # The reports are alike, and so are the answers about them.
        return build(asked, TeacherArguments(**options), FilterArguments(**{"near_duplicate_similarity": 0.95,
                                                                            **(filters or {})}))  # fmt: skip

    return call
