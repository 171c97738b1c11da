"""Further texts, made of those of the training split: nobody labelled them, and the LM learns the head's verdicts."""

import random

from datasets import Dataset, Value, concatenate_datasets

from clsgen.attribution_clsgen import sentence_spans
from clsgen.prompting_clsgen import TaskPrompt
from clsgen.training_rows import EPOCH

KEPT_SENTENCES = 0.6  # of a document, on average


def with_variants(rows: Dataset, prompt: TaskPrompt, count: int, epochs: int = 1, seed: int = 0) -> Dataset:
    """The rows, and behind them new texts made of each one's text, with neither label nor explanation.

    By turns, the document meets the other fields of a row drawn at random, and loses some of its sentences while the
    rest change their order; where a task has one field, always the latter. Such texts are as many as one likes, so
    that each epoch has its own; the head has a probability for each, which `--verdict_weight` teaches the LM.

    Args:
        rows (`Dataset`): A task's training rows.
        prompt ([`TaskPrompt`]): Tells the fields, and which is the document.
        count (`int`): How many for each row, in each epoch.
        epochs (`int`, *optional*, defaults to 1): How many epochs to make them for.
        seed (`int`, *optional*, defaults to 0): Of what is drawn.

    Returns:
        `Dataset` of the same columns; those that are no field are null in the new rows, but for `id`. With new rows
        there is one column more, `EPOCH`: which one a row is for, null for all.
    """
    draw, texts = random.Random(seed), rows.select_columns(prompt.fields).to_list()
    ids = rows["id"] if "id" in rows.column_names else range(len(rows))
    variants = []
    for turn in range(count * epochs):
        for name, text in zip(ids, texts, strict=True):
            if turn % 2 == 0 and len(prompt.fields) > 1:
                fields = {**draw.choice(texts), prompt.document: text[prompt.document]}
            else:
                fields = {**text, prompt.document: _some_sentences(text[prompt.document], draw)}
            row = {**dict.fromkeys(rows.column_names), **fields, EPOCH: turn // count}
            variants.append({**row, "id": f"{name}/variant-{turn}"} if "id" in row else row)
    if not variants:
        return rows
    rows = rows.add_column(EPOCH, [None] * len(rows), feature=Value("int64"))
    return concatenate_datasets([rows, Dataset.from_list(variants, features=rows.features)])


def _some_sentences(document: str, draw: random.Random) -> str:
    sentences = [document[start:end] for start, end in sentence_spans(document)]
    kept = [sentence for sentence in sentences if draw.random() < KEPT_SENTENCES] or sentences
    draw.shuffle(kept)
    return " ".join(kept)
