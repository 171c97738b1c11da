"""Texts that nobody labelled: made of the training split's, every field in its place, the same for the same seed."""

from test_training import arguments

from clsgen.prompting_clsgen import TaskPrompt
from clsgen.text_variants import with_variants
from clsgen.trainer_clsgen import ClsGenSFTTrainer

PROMPT = TaskPrompt(template="{claim} / {findings}", document="findings")
ONE_FIELD = TaskPrompt(template="{findings}", document="findings")


def test_rows_stay_and_variants_follow_by_turns(task_rows):
    rows = task_rows.map(lambda row: {"findings": f"One of {row['id']}. Two of it. Three (p = 0.03). Four."})
    found = with_variants(rows, PROMPT, 2, seed=1)
    assert found.column_names == rows.column_names
    assert found.select(range(len(rows))).to_list() == rows.to_list()
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
    assert with_variants(task_rows, PROMPT, 3, 0).to_list() == with_variants(task_rows, PROMPT, 3, 0).to_list()
    assert with_variants(task_rows, PROMPT, 3, 0).to_list() != with_variants(task_rows, PROMPT, 3, 1).to_list()
    assert with_variants(task_rows, PROMPT, 0) is task_rows
    texts = task_rows.select_columns(["findings"])
    assert all(row["findings"] for row in with_variants(texts, ONE_FIELD, 1))


def test_the_trainer_adds_them_to_the_training_rows_alone(model, task_rows, tmp_path):
    settings = {"verdict_weight": 1.0, "verdict_texts": 2}
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, **settings), task_rows, eval_dataset=task_rows)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (3 * len(task_rows), len(task_rows))
    assert sum(map(sum, trainer.train_dataset["verdicts"][len(task_rows) :])) == 2 * len(task_rows)
    assert trainer.train().training_loss > 0
