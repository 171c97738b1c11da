"""Linguistic collapse: what fine-tuning cost the language model, as its perplexity against that of its backbone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from clsgen.backbones import resolve_backbone
from clsgen.evaluation.lm_scoring import continuation_log_likelihoods
from clsgen.prompting_clsgen import PromptEncoder, TaskPrompt
from clsgen.tasks import Task

GENERAL_TEXT = Path(__file__).resolve().parent / "general_text.txt"
MAX_PROMPT_LENGTH = 864


def perplexity(
    model: Any, prompts: Sequence[list[int]], continuations: Sequence[list[int]], description: str | None = None
) -> float:
    """`exp` of the mean negative log-likelihood of a token of the continuations; nan without any token.

    A model that diverged may have an infinite one.

    Args:
        model (`PreTrainedModel`): A causal LM.
        prompts, continuations (`Sequence[list[int]]`): Ids; prompts are not scored.
        description (`str`, *optional*): Of a progress bar; none without.
    """
    tokens = sum(map(len, continuations))
    if not tokens:
        return math.nan
    mean = sum(continuation_log_likelihoods(model, prompts, continuations, description=description)) / tokens
    with np.errstate(over="ignore"):
        return float(np.exp(-mean))


def general_passages() -> list[str]:
    """The held-out passages of general English (written for this project, CC0), one a paragraph of the file."""
    return [passage.strip() for passage in GENERAL_TEXT.read_text(encoding="utf-8").split("\n\n") if passage.strip()]


def perplexity_report(
    model: PreTrainedModel, backbone: str | PreTrainedModel, task: Task, guided: bool | None = None
) -> dict[str, Any]:
    """Perplexity of a fine-tuned LM and of its backbone, on general text and on the teacher's validation explanations.

    Both are given the same ids. General passages start from the tokenizer's first token (bos, or eos where there is
    none). Explanations stand behind the prompt of their row and, if `guided`, the verdict line of the gold label;
    neither is scored.

    Args:
        model (`PreTrainedModel`): A causal LM: a CLSGen model, or another that was made from the backbone.
        backbone (`str` or `PreTrainedModel`): What it was made from: a folder, a Hub id, or the model.
        task (`Task`): With a `validation` split, for the explanations.
        guided (`bool`, *optional*): Whether the model learned explanations behind verdict lines; what its config's
            `explanation_mode` says by default, and not without one.

    Returns:
        `dict[str, Any]`: For `general` and `explanations`: `{"perplexity", "backbone_perplexity", "ratio", "tokens",
        "rows"}`, nan where there are no rows, for the reason that `undefined` gives by name. Above 1, the model is
        worse at it than its backbone.
    """
    if isinstance(backbone, str):
        folder = resolve_backbone(backbone)
        backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, device_map="auto")
    tokenizer = _tokenizer(model, backbone)
    if guided is None:
        guided = getattr(model.config, "explanation_mode", "free") == "guided"
    explanations = _explanation_rows(model, tokenizer, task, guided)
    sets = {"general": _general_rows(tokenizer), "explanations": explanations}
    report: dict[str, Any] = {"undefined": {}}
    for name, (prompts, continuations) in sets.items():
        ours, theirs = (
            perplexity(lm, prompts, continuations, f"Perplexity of {whose}, {name}")
            for lm, whose in ((model, "the model"), (backbone, "its backbone"))
        )
        tokens = sum(map(len, continuations))
        report[name] = {
            "perplexity": ours,
            "backbone_perplexity": theirs,
            "ratio": ours / theirs,
            "tokens": tokens,
            "rows": len(prompts),
        }
        if not tokens:
            report["undefined"][name] = f"{task.name} has no explanation in its validation split"
        elif not math.isfinite(ours / theirs):
            report["undefined"][name] = f"no finite perplexity: the model's is {ours}, the backbone's {theirs}"
    return report


def _tokenizer(model: PreTrainedModel, backbone: PreTrainedModel) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    return AutoTokenizer.from_pretrained(backbone.config.name_or_path) if tokenizer is None else tokenizer


def _general_rows(tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    passages = [tokenizer(passage, add_special_tokens=False)["input_ids"] for passage in general_passages()]
    return [[first]] * len(passages), passages


def _explanation_rows(
    model: PreTrainedModel, tokenizer: Any, task: Task, guided: bool
) -> tuple[list[list[int]], list[list[int]]]:
    prompt = TaskPrompt.from_dict(task.prompt)
    encoder = PromptEncoder(tokenizer, prompt, getattr(model.config, "max_prompt_length", MAX_PROMPT_LENGTH))
    prompts, continuations = [], []
    for row in task.splits.get("validation", []):
        if not row["explanation"] or (guided and row["label"] is None):
            continue
        ids = encoder.encode({field: row[field] for field in prompt.fields}).input_ids
        prompts.append([*ids, *encoder.encode_verdict(int(row["label"]))] if guided else ids)
        continuations.append(encoder.encode_plain(row["explanation"].strip()))
    return prompts, continuations
