"""Which checkpoint a training goes on from: one of its own, never one that another run left in the folder."""

import hashlib
import json
import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from clsgen.atomic_io import write_json
from clsgen.scoring import CalibrationArguments
from clsgen.tasks import Task

logger = logging.getLogger("clsgen.train_sft_cls")
CHECKPOINT_COMPLETE = "trainer_state.json"  # the last file that `Trainer` writes into a checkpoint
RUN = "run.json"
NEWEST = "true"  # the newest checkpoint of this run, and no path
# Arguments that say where, how long and with how much talk, and what happens after the last step.
_FREE = {
    "task", "data_dir", "output_dir", "results_dir", "resume_from_checkpoint", "num_train_epochs", "max_steps",
    "per_device_eval_batch_size", "num_examples", "save_adapter", "report_to", "run_name", "project",
    "disable_tqdm", "model_license", "i_may_publish_credentialed_data", "dataset_num_proc", "cache_frozen_layers",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience",
    "explanation_no_repeat_ngram_size", "explanation_guidance_scale",
    *(each.name for each in fields(CalibrationArguments)),
}  # fmt: skip
_FREE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "dataloader_", "ddp_", "trackio_")


def run_of(task: Task, *arguments: Any) -> dict[str, Any]:
    """What the steps of a training depend on, as far as task and command line say it: JSON.

    Args:
        task (`Task`): Prompt, labels and rows count, whatever its folder is called.
        arguments: Dataclasses of arguments.
    """
    digest = hashlib.sha256(json.dumps([task.prompt, task.labels], sort_keys=True).encode())
    for split in ("train", "validation"):
        for row in task.splits.get(split, ()):
            digest.update(json.dumps([split, row], sort_keys=True, default=str).encode())
    values = {each.name: getattr(some, each.name) for some in arguments for each in fields(some)}
    kept = {name: value for name, value in values.items() if name not in _FREE and not name.startswith(_FREE_PREFIXES)}
    return {"data": digest.hexdigest()[:16], **json.loads(json.dumps(kept, sort_keys=True, default=str))}


def resumption(asked: str | bool | None) -> str | None:
    """What `resume_from_checkpoint` asks for: `NEWEST` for a yes in any form, `None` for a no, or a path."""
    said = str(asked).lower()
    if said in ("true", "1", "yes"):
        return NEWEST
    return None if said in ("false", "0", "no", "none", "") else str(asked)


def claim_folder(output_dir: str | Path, run: dict[str, Any], resume: bool) -> None:
    """Makes a folder this run's: without `resume`, checkpoints there are moved aside; with it, another run's refused.

    A run that starts afresh moves even its own like's: killed before it saved anything, it would go on from theirs.

    Args:
        output_dir (`str` or `Path`): Where checkpoints lie, and will.
        run (`dict`): Of [`run_of`].
        resume (`bool`): Whether this run is to go on from a checkpoint there.

    Raises:
        ValueError: The checkpoints are another run's; names the arguments that differ.
    """
    folder = Path(output_dir)
    file, checkpoints = folder / RUN, sorted(folder.glob("checkpoint-*"))
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if checkpoints and known is None and resume:
        logger.warning("%s does not say which run its checkpoints are of; they are taken for this one's.", folder)
    elif checkpoints and known != run and resume:
        told = ", ".join(_differences(known, run))
        raise ValueError(
            f"The checkpoints in {folder} are of another run ({told}). Run it with what it was started with, or "
            "without --resume_from_checkpoint, or choose another --output_dir."
        )
    elif checkpoints and not resume:
        aside = next(place for i in range(1, 10**6) if not (place := folder / f"earlier-run-{i}").exists())
        aside.mkdir()
        for checkpoint in checkpoints:
            checkpoint.rename(aside / checkpoint.name)
        logger.warning("%s held checkpoints of an earlier run: they are in %s now.", folder, aside)
    write_json(file, run)


def take_up_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Loads a run's result where `max_steps` leaves nothing to do after `checkpoint`: `train` would take a step more.

    That is the best checkpoint where `load_best_model_at_end` asks for it, as at a training's end.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / CHECKPOINT_COMPLETE))
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # theirs are loaded into wrapped models alone
    if sharded or not 0 < trainer.args.max_steps <= state.global_step:
        return False
    logger.info("All of its %d steps have been taken.", state.global_step)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        best = Path(checkpoint).with_name(Path(state.best_model_checkpoint).name)
        if (best / CHECKPOINT_COMPLETE).is_file():
            checkpoint = str(best)
        else:
            logger.warning("The best checkpoint, %s, is not there any more: %s is taken.", best, checkpoint)
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = state
    return True


class TrainingClock(TrainerCallback):
    """Seconds of a training, those before the last checkpoint included where it was cut.

    Args:
        file (`Path`): Where they are kept.
        goes_on (`bool`, *optional*, defaults to `True`): Whether what is found there counts, or is removed.
    """

    def __init__(self, file: Path, goes_on: bool = True):
        self.file = file
        if not goes_on:
            file.unlink(missing_ok=True)
        self.before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0.0
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + time.perf_counter() - self.start

    def on_save(self, args: Any, state: Any, control: Any, **kwargs) -> None:
        if state.is_world_process_zero:
            write_json(self.file, self.seconds)


def _differences(known: dict[str, Any], run: dict[str, Any]) -> list[str]:
    return [
        f"`{name}` was {known.get(name)!r}, is {run.get(name)!r}"
        for name in sorted({*known, *run})
        if known.get(name) != run.get(name)
    ]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint below `output_dir` that was written to its end, if any."""
    complete = [
        file.parent for file in Path(output_dir).glob(f"checkpoint-*/{CHECKPOINT_COMPLETE}") if _is_whole(file)
    ]
    return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]))) if complete else None


def _is_whole(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:  # `Trainer` does not write it by renaming
        return False
