"""Trainers that take turns: each trains in a process of its own, one optimizer step whenever it is asked for one."""

import math
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from transformers import Trainer, TrainerCallback, set_seed

from clsgen.run_record import peak_memory_mib


class _OneStepAtATime(TrainerCallback):
    """Holds a trainer after each optimizer step, until the parent asks for another or says that it is enough."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def on_train_begin(self, args, state, control, **kwargs):
        self._wait(control)

    def on_step_end(self, args, state, control, **kwargs):
        self._wait(control)

    def _wait(self, control) -> None:
        self.connection.send(("ready", None))
        if self.connection.recv() == "stop":
            control.should_training_stop = True


def _train(connection: Connection, build: Callable[..., Trainer], arguments: tuple) -> None:
    try:
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(folder, *arguments)
            trainer.add_callback(_OneStepAtATime(connection))
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            connection.send(("done", {"peak_mib": peak_memory_mib(), "losses": losses}))
    except Exception:
        connection.send(("failed", traceback.format_exc()))


class SteppedTrainer:
    """A trainer in its own process, so that peak memory is its own too; between steps it costs no time.

    Its steps are whole ones: rows are fetched and batched, both passes run, the optimizer moves.

    Args:
        build (`Callable`): Makes the `Trainer` of a folder for its output and of `arguments`; of a module's top level.
        arguments: For `build`; they must pickle.

    Raises:
        RuntimeError: from any method, with the trainer's own traceback, where it has failed.
    """

    def __init__(self, build: Callable[..., Trainer], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_train, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"A trainer's process ended with exit code {self.process.exitcode}.") from None
        if kind == "failed":
            raise RuntimeError(f"A trainer failed:\n{value}")
        return value

    def step(self) -> None:
        """One optimizer step."""
        self.connection.send("step")
        self._receive()

    def finish(self) -> dict[str, Any]:
        """Ends the training: `peak_mib`, its peak resident memory, and its logged `losses`."""
        self.connection.send("stop")
        result = self._receive()
        self.process.join()
        if any(not math.isfinite(loss) for loss in result["losses"]):
            raise RuntimeError(f"A trainer's loss is not finite: {result['losses']}.")
        return result
