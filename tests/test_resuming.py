"""Which checkpoint a training goes on from: its own newest whole one, never another run's."""

import json
import logging
from dataclasses import dataclass

import pytest
from conftest import PROMPT
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from test_train_sft_cls import command, task_folder  # noqa: F401

from clsgen.atomic_io import write_json
from clsgen.resuming import NEWEST, TrainingClock, claim_folder, last_complete_checkpoint, resumption, run_of
from clsgen.tasks import Task
from clsgen.train_sft_cls import main


@dataclass
class Arguments:
    seed: int = 0
    learning_rate: float = 1e-3
    logging_steps: int = 10
    num_train_epochs: float = 2.0


@pytest.fixture
def task():
    rows = Dataset.from_list([{"id": "1", "findings": "It fell.", "claim": "It works.", "label": 1.0}])
    return Task("my_own", PROMPT, ("no", "yes"), DatasetDict(train=rows))


def checkpoint(folder, step, content='{"global_step": 1}'):
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(content)
    return str(place)


def test_run_is_what_steps_depend_on(task):
    run = run_of(task, Arguments())
    assert run_of(task, Arguments(logging_steps=1, num_train_epochs=9.0)) == run
    assert run_of(task, Arguments(seed=1)) != run
    other = Dataset.from_list([{**task.splits["train"][0], "label": 0.0}])
    assert run_of(Task("my_own", PROMPT, ("no", "yes"), DatasetDict(train=other)), Arguments()) != run
    asked = {**PROMPT, "question": "Is it refuted?"}
    assert run_of(Task("my_own", asked, ("no", "yes"), task.splits), Arguments()) != run
    assert json.loads(json.dumps(run)) == run


def test_another_runs_checkpoints_are_refused_or_moved_aside(task, tmp_path, caplog):
    first, second = (run_of(task, Arguments(seed=seed)) for seed in (0, 1))
    claim_folder(tmp_path, first, resume=False)
    claim_folder(tmp_path, second, resume=True)  # nothing there yet to go on from
    claim_folder(tmp_path, first, resume=False)
    checkpoint(tmp_path, 4)
    claim_folder(tmp_path, first, resume=True)
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    with pytest.raises(ValueError, match=r"of another run \(`seed` was 0, is 1\)"):
        claim_folder(tmp_path, second, resume=True)
    with caplog.at_level(logging.WARNING):
        claim_folder(tmp_path, second, resume=False)
    assert "held checkpoints of an earlier run" in caplog.text
    assert (tmp_path / "earlier-run-1" / "checkpoint-4" / "trainer_state.json").is_file()
    assert last_complete_checkpoint(tmp_path) is None
    claim_folder(tmp_path, second, resume=True)
    # A run that starts afresh with more epochs, which a resumed one may have, does not go on from the shorter one's.
    checkpoint(tmp_path, 8)
    claim_folder(tmp_path, run_of(task, Arguments(seed=1, num_train_epochs=9.0)), resume=False)
    assert (tmp_path / "earlier-run-2" / "checkpoint-8").is_dir()
    assert last_complete_checkpoint(tmp_path) is None


def test_checkpoints_from_before_are_taken_with_a_warning(task, tmp_path, caplog):
    checkpoint(tmp_path, 4)
    with caplog.at_level(logging.WARNING):
        claim_folder(tmp_path, run_of(task, Arguments()), resume=True)
    assert "does not say which run its checkpoints are of" in caplog.text
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")


def test_a_torn_checkpoint_is_none(tmp_path):
    whole = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10, '{"global_step": ')
    (tmp_path / "checkpoint-11").mkdir()
    assert last_complete_checkpoint(tmp_path) == whole


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, None), (False, None), ("false", None), ("", None), (True, NEWEST), ("True", NEWEST), ("yes", NEWEST),
        ("out/checkpoint-3", "out/checkpoint-3"),
    ],
)  # fmt: skip
def test_resumption(asked, found):
    assert resumption(asked) == found


def test_a_run_does_not_go_on_from_another_ones_steps(task_folder, backbones, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    main(command(task_folder, backbones["llama"], output, "--num_examples", "0"))
    other = command(task_folder, backbones["llama"], output, "--num_examples", "0", "--seed", "7")
    with pytest.raises(ValueError, match="`seed` was 0, is 7"):
        main([*other, "--resume_from_checkpoint", "true"])
    assert json.loads((output / "metrics.json").read_text())["seed"] == 0
    main(other)
    alone = command(task_folder, backbones["llama"], tmp_path / "alone", "--num_examples", "0", "--seed", "7")
    main(alone)
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (output, tmp_path / "alone"))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert (output / "earlier-run-1" / "checkpoint-4").is_dir()


@pytest.mark.parametrize("best", ["false", "true"])
def test_a_run_that_had_taken_all_its_steps_takes_no_more(task_folder, backbones, tmp_path, best):  # noqa: F811
    # 24 rows, 8 a step: `max_steps` ends within the second epoch. The highest loss counts as best, that is the first.
    size = ["--per_device_train_batch_size", "8", "--lr_scheduler_type", "constant", "--num_examples", "0"]
    size += ["--load_best_model_at_end", best, "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    size += ["--save_total_limit", "3"]

    def run(folder, *more):
        main([*command(task_folder, backbones["llama"], folder), *size, *more])
        return load_file(folder / "model" / "model.safetensors"), json.loads((folder / "metrics.json").read_text())

    before, first = run(tmp_path / "out")
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-2")
    after, second = run(tmp_path / "out", "--resume_from_checkpoint", "true")
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert second["history"] == first["history"]
    assert second["test"] == first["test"]


def test_seconds_before_a_kill_count(tmp_path, task_folder, backbones):  # noqa: F811
    output = tmp_path / "out"
    main(command(task_folder, backbones["llama"], output, "--num_examples", "0"))
    write_json(output / "seconds.json", 1000.0)
    main(command(task_folder, backbones["llama"], output, "--num_examples", "0", "--resume_from_checkpoint", "true"))
    assert json.loads((output / "metrics.json").read_text())["wall_seconds"] > 1000
    main(command(task_folder, backbones["llama"], output, "--num_examples", "0"))
    assert json.loads((output / "metrics.json").read_text())["wall_seconds"] < 1000
    (output / "seconds.json").write_text("1000.0")
    assert TrainingClock(output / "seconds.json", goes_on=False).seconds < 1000  # killed before it had saved anything,
    assert TrainingClock(output / "seconds.json").seconds < 1000  # a fresh run does not go on from an earlier one's


def test_what_cannot_be_is_said_before_training(task_folder, backbones, tmp_path):  # noqa: F811
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=r"`results_dir` .* is not writable"):
        main(command(task_folder, backbones["llama"], tmp_path / "out", "--results_dir", str(blocked / "r")))
    with pytest.raises(ValueError, match=r"`max_length` is 4000, but .* reads 2048 tokens at most"):
        main(command(task_folder, backbones["llama"], tmp_path / "out", "--max_length", "4000"))
