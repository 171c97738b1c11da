"""Training above frozen layers: what they make of a row never changes, so it is computed once and kept on disk."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from clsgen.batching_clsgen import pad_left
from clsgen.early_exit_clsgen import decoder_up_to, layer_stack
from clsgen.head_clsgen import positions_from_mask

States = dict[int, torch.Tensor]


@torch.inference_mode()
def run_layers(model: PreTrainedModel, rows: list[list[int]], layers: list[int]) -> list[States]:
    """Hidden states of rows of ids, by the layers that it takes and no more.

    Args:
        model (`PreTrainedModel`): Not wrapped by PEFT.
        rows (`list[list[int]]`): A batch.
        layers (`list[int]`): Indices into `hidden_states`, 0 or above.

    Returns:
        `list[dict[int, torch.Tensor]]`: For each row, by layer, of shape `(len(row), hidden_size)`.
    """
    batch = pad_left(rows, 0, model.device)
    mask, length = batch["attention_mask"], batch["input_ids"].shape[1]
    was_training = model.training
    model.eval()
    hidden_states = decoder_up_to(model.get_decoder(), max(layers))(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=positions_from_mask(mask, length),
        use_cache=False,
        output_hidden_states=layers,
        return_dict=True,
    ).hidden_states
    model.train(was_training)
    return [{layer: hidden_states[layer][i, length - len(row) :] for layer in layers} for i, row in enumerate(rows)]


def first_trained_layer(model: PreTrainedModel) -> int:
    """Index of the lowest layer that has a parameter to train; 0 where the embeddings have one."""

    def trains(module: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in module.parameters())

    stack = layer_stack(model.get_decoder()) or []
    if trains(model.get_input_embeddings()):
        return 0
    return next((i for i, layer in enumerate(stack) if trains(layer)), len(stack))


class FrozenLayers:
    """Keeps the states of the layers that training leaves alone, one file a row, and replays them.

    A file is named by the weights of those layers and by the row's ids: another run, another epoch and another batch
    find it, and nothing stale is ever found. Files are written whole or not at all.

    Args:
        model (`PreTrainedModel`): Whose embeddings and layers below `depth` stay as they are.
        depth (`int`): Index of the first layer that trains, see [`first_trained_layer`].
        folder (`str` or `Path`): Where the files go: `4 * hidden_size` bytes a token for each layer kept (float32).
        reads (`Iterable[int]`, *optional*): Indices into `hidden_states` that are asked for besides; those above
            `depth` are not kept.

    Raises:
        ValueError: for a depth or a backbone that leaves nothing to keep.
    """

    def __init__(self, model: PreTrainedModel, depth: int, folder: str | Path, reads: Iterable[int] = ()):
        self.model = model
        stack = layer_stack(model.get_decoder())
        if stack is None or not 0 < depth < len(stack):
            raise ValueError(
                f"Layers below {depth} can't be kept: none is frozen, or this backbone is built in an unknown way. "
                "Train without `cache_frozen_layers`, or with LoRA on the upper layers (`lora_first_layer`)."
            )
        self.frozen: list[nn.Module] = list(stack[:depth])
        self.layers = sorted({depth, *(layer for layer in reads if layer < depth)})
        self.folder = Path(folder) / self._key_of_weights()[:16]

    def _key_of_weights(self) -> str:
        config = {**self.model.config.get_text_config().to_dict(), "use_cache": None}  # the trainer's to set
        digest = hashlib.sha256(json.dumps([config, self.layers], sort_keys=True, default=str).encode())
        for module in (self.model.get_input_embeddings(), *self.frozen):
            for _, parameter in sorted(module.named_parameters()):
                digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _file(self, row: list[int]) -> Path:
        name = hashlib.sha256(json.dumps(row).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def states(self, rows: list[list[int]]) -> list[States]:
        """Hidden states of rows at `layers`, from their files; those of new rows are computed and kept.

        Raises:
            OSError: where a file cannot be written.
        """
        files = [self._file(row) for row in rows]
        new = {file: row for file, row in zip(files, rows, strict=True) if not file.exists()}
        if new:
            for file, states in zip(new, run_layers(self.model, list(new.values()), self.layers), strict=True):
                _save({str(layer): tensor.contiguous() for layer, tensor in states.items()}, file)
        loaded = [load_file(file, device=str(self.model.device)) for file in files]
        return [{int(layer): tensor for layer, tensor in tensors.items()} for tensors in loaded]

    @contextmanager
    def replay(self, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
        """While it is open, the frozen layers answer a forward of `inputs` with what is kept, and compute nothing.

        Args:
            inputs (`dict[str, torch.Tensor]`): A batch of the trainer: padded, with an `attention_mask`, or one
                sequence of rows, with `position_ids` that restart at each.
        """
        ids = inputs["input_ids"]
        places = _places(inputs)
        states = self.states([ids[row, columns].tolist() for row, columns in places])
        answers = {}
        for layer in self.layers:
            answers[layer] = states[0][layer].new_zeros((*ids.shape, states[0][layer].shape[-1]))
            for (row, columns), kept in zip(places, states, strict=True):
                answers[layer][row, columns] = kept[layer]
        try:
            for i, module in enumerate(self.frozen, start=1):
                module.forward = partial(_answer, answers.get(i))  # on the object: the hooks around it stay
            yield
        finally:
            for module in self.frozen:
                vars(module).pop("forward", None)


def _answer(kept: torch.Tensor | None, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """What a layer says; one that nobody reads passes on what it gets."""
    return hidden_states if kept is None else kept


def _places(inputs: dict[str, torch.Tensor]) -> list[tuple[int, slice]]:
    """Where the rows of a batch lie: index of the sequence, and its columns."""
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        starts, lengths = mask.argmax(dim=1).tolist(), mask.sum(dim=1).tolist()
        return [(i, slice(start, start + n)) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]
    position_ids = inputs["position_ids"][0]
    starts = [*(position_ids == 0).nonzero()[:, 0].tolist(), len(position_ids)]
    return [(0, slice(start, end)) for start, end in pairwise(starts)]


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{file} could not be written ({error}). Make room, or train without `cache_frozen_layers`."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
