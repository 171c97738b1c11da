"""Texts that nobody labelled: made of the training split's, every field in its place, the same for the same seed."""

from itertools import accumulate, pairwise

import pytest
from accelerate.data_loader import prepare_data_loader
from conftest import build
from test_training import arguments
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from clsgen.epoch_sampler import EpochSampler
from clsgen.prompting_clsgen import TaskPrompt
from clsgen.text_variants import with_variants
from clsgen.trainer_clsgen import ClsGenSFTTrainer
from clsgen.training_rows import EPOCH, encode_rows, pack_rows

PROMPT = TaskPrompt(template="{claim} / {findings}", document="findings")
ONE_FIELD = TaskPrompt(template="{findings}", document="findings")


def test_rows_stay_and_variants_follow_by_turns(task_rows):
    rows = task_rows.map(lambda row: {"findings": f"One of {row['id']}. Two of it. Three (p = 0.03). Four."})
    found = with_variants(rows, PROMPT, 2, seed=1)
    assert found.column_names == [*rows.column_names, EPOCH]
    assert found.select(range(len(rows))).to_list() == [{**row, EPOCH: None} for row in rows]
    variants = found.select(range(len(rows), len(found))).to_list()
    assert len(variants) == 2 * len(rows)
    assert all(variant["label"] is None and variant["explanation"] is None for variant in variants)
    assert len({variant["id"] for variant in variants}) == len(variants)
    recombined, shortened = variants[: len(rows)], variants[len(rows) :]
    assert [variant["findings"] for variant in recombined] == rows["findings"]
    assert {variant["claim"] for variant in recombined} <= set(rows["claim"])
    assert [variant["claim"] for variant in recombined] != rows["claim"]
    assert [variant["claim"] for variant in shortened] == rows["claim"]
    for variant, whole in zip(shortened, rows["findings"], strict=True):
        sentences = {f"{part}." for part in variant["findings"].removesuffix(".").split(". ")}
        assert sentences <= {f"{part}." for part in whole.removesuffix(".").split(". ")}
    assert any(
        len(variant["findings"]) < len(whole) for variant, whole in zip(shortened, rows["findings"], strict=True)
    )


def test_one_seed_draws_the_same_and_one_field_is_enough(task_rows):
    once = with_variants(task_rows, PROMPT, 3, seed=0).to_list()
    assert once == with_variants(task_rows, PROMPT, 3, seed=0).to_list()
    assert once != with_variants(task_rows, PROMPT, 3, seed=1).to_list()
    assert with_variants(task_rows, PROMPT, 0) is with_variants(task_rows, PROMPT, 3, epochs=0) is task_rows
    texts = task_rows.select_columns(["findings"])
    assert all(row["findings"] for row in with_variants(texts, ONE_FIELD, 1))


class BatchRecorder(TrainerCallback):
    """Keeps the rows of ids that each epoch's steps were fed."""

    def __init__(self, trainer):
        self.epochs, collator = [], trainer.data_collator

        def collate(rows):
            self.epochs[-1] += [tuple(row["input_ids"]) for row in rows]
            return collator(rows)

        trainer.data_collator = collate
        trainer.add_callback(self)

    def on_epoch_begin(self, *args, **kwargs):
        self.epochs.append([])


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_each_epoch_has_the_training_rows_and_texts_of_its_own(model, task_rows, tmp_path, strategy):
    settings = {"verdict_weight": 1.0, "verdict_texts": 2, "max_steps": -1, "num_train_epochs": 2}
    settings |= {"train_sampling_strategy": strategy}
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, **settings), task_rows, eval_dataset=task_rows)
    rows = [tuple(ids) for ids in trainer.train_dataset["input_ids"]]
    assert (len(rows), len(trainer.eval_dataset)) == (5 * len(task_rows), len(task_rows))
    assert sum(map(sum, trainer.train_dataset["verdicts"][len(task_rows) :])) == 4 * len(task_rows)
    recorder = BatchRecorder(trainer)
    assert trainer.train().training_loss > 0
    labelled, texts = rows[: len(task_rows)], rows[len(task_rows) :]
    half = len(texts) // 2
    assert [sorted(epoch) for epoch in recorder.epochs] == [
        sorted(labelled + texts[:half]), sorted(labelled + texts[half:])
    ]  # fmt: skip
    assert recorder.epochs[0] != labelled + texts[:half]


@pytest.mark.parametrize(("strategy", "count"), [("random", 0), ("random", 2), ("group_by_length", 2)])
def test_a_process_of_two_goes_on_in_the_order_of_the_epoch_it_was_in(backbones, task_rows, tmp_path, strategy, count):
    def run(folder, resume=None):
        settings = {"verdict_weight": 1.0, "verdict_texts": count, "max_steps": -1, "num_train_epochs": 2}
        settings |= {"train_sampling_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
        trainer = ClsGenSFTTrainer(build(backbones["llama"]), arguments(folder, **settings), task_rows)
        recorder = BatchRecorder(trainer)

        def loader_of_the_second_process():
            plain = DataLoader(
                trainer.train_dataset.select_columns(["input_ids", "labels", "cls_labels", "verdicts"]),
                batch_size=4,
                sampler=trainer._get_train_sampler(),
                collate_fn=trainer.data_collator,
            )
            return prepare_data_loader(plain, num_processes=2, process_index=1)

        trainer.get_train_dataloader = loader_of_the_second_process
        trainer.train(resume_from_checkpoint=resume)
        return recorder.epochs

    whole = run(tmp_path / "whole")
    steps = len(whole[0]) // 4
    (resumed,) = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{steps + 1}"))
    assert resumed == whole[1][4:]


def test_a_column_of_the_users_own_drops_no_row(model, task_rows, tmp_path):
    rows = task_rows.add_column("epoch", list(range(len(task_rows))))
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, train_sampling_strategy="group_by_length"), rows)
    assert sorted(trainer._get_train_sampler()) == list(range(len(rows)))


def test_packing_keeps_the_texts_of_epochs_apart(model, task_rows):
    rows = encode_rows(with_variants(task_rows, PROMPT, 2, epochs=3), model.encoder, 60, True, teach_verdicts=True)
    packed = pack_rows(rows, 800, seed=0)
    assert len(packed) < len(rows)
    for epoch in (None, 0, 1, 2):
        of_epoch = {tuple(ids) for ids, e in zip(rows["input_ids"], rows[EPOCH], strict=True) if e == epoch}
        for ids, lengths, e in zip(packed["input_ids"], packed["seq_lengths"], packed[EPOCH], strict=True):
            starts = [0, *accumulate(lengths)]
            if e == epoch:
                assert {tuple(ids[a:b]) for a, b in pairwise(starts)} <= of_epoch
    for epoch in range(4):
        sampler = EpochSampler(list(packed[EPOCH]), seed=0, epoch=lambda epoch=epoch: epoch)
        order = list(sampler)
        assert len(order) == len(sampler)
        assert {packed[EPOCH][i] for i in order} == {None, epoch % 3}
        assert {i for i, e in enumerate(packed[EPOCH]) if e in (None, epoch % 3)} == set(order)
    assert list(sampler) == list(sampler)


def test_an_order_without_epochs_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="others in each epoch, which needs `train_sampling_strategy`"):
        arguments(tmp_path, verdict_weight=1.0, verdict_texts=2, train_sampling_strategy="sequential")
