"""The backbone as it is, asked: the log-probability of its answer, a number in words, and after examples."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.baselines.running import Baseline, Row, labelled, labels_of
from clsgen.batching_clsgen import pad_left, pass_tokens, token_batches
from clsgen.evaluation.lm_scoring import answer_log_odds
from clsgen.prompting_clsgen import PromptEncoder, TaskPrompt

CLIP = 0.01  # a verbalised 0% or 100% is no certainty


class _Prompted(Baseline):
    """Loads the backbone; prompts are built as CLSGen's are, so that a text can't end one."""

    options = {"max_prompt_length": 2048}  # noqa: RUF012

    def load(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self.backbone, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(self.backbone)
        self._prompt = TaskPrompt.from_dict(self.task.prompt)

    def encoder(self, question: str, template: str | None = None) -> PromptEncoder:
        prompt = {**self._prompt.to_dict(), "question": question, "template": template or self._prompt.template}
        return PromptEncoder(self._tokenizer, TaskPrompt.from_dict(prompt), self.settings["max_prompt_length"])

    def choose(self, ways: dict[Any, Any]) -> tuple[Any, dict[Any, float]]:
        """Asks from here on in the way, of those by name, that ranks the validation split best.

        Returns:
            Its name, and the validation AUROC of each.
        """
        validation = labelled(self.task, "validation")
        logits = {}
        for name, self._way in ways.items():
            logits[name] = self.logits(validation)
        aurocs = {name: float(roc_auc_score(labels_of(validation), found)) for name, found in logits.items()}
        chosen = max(aurocs, key=aurocs.get)
        self._way, self._validation_logits = ways[chosen], logits[chosen]
        return chosen, aurocs

    def validation_logits(self) -> np.ndarray:
        """Those that [`Baseline.fit`] has asked for already."""
        return self._validation_logits

    def fields(self, row: Row) -> dict[str, str]:
        return {name: row[name] for name in self.task.fields}


def first_difference(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Both ids up to and with the first that differs: the token that tells one answer from the other.

    Raises:
        ValueError: One is the beginning of the other.
    """
    for i, (one, other) in enumerate(zip(first, second, strict=False), start=1):
        if one != other:
            return first[:i], second[:i]
    raise ValueError(f"No token tells the answers apart: {first} and {second}.")


class ZeroShotLogProbability(_Prompted):
    """First-token log-probability of the answer; in the words, of these two ways, that do better on validation."""

    def fit(self) -> dict[str, Any]:
        self.load()
        against, in_favour = self._prompt.verdicts
        ways = {
            "yes or no": (("No", "Yes"), "Reply with Yes or No alone."),
            "verdict": ((against, in_favour), f'Reply with "{against}" or "{in_favour}" alone.'),
        }
        chosen, aurocs = self.choose(ways)
        return {"answer": chosen, "validation_aurocs": aurocs}

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        words, instruction = self._way
        encoder = self.encoder(f"{self._prompt.question} {instruction}")
        prompts = [encoder.encode(self.fields(row)).input_ids for row in rows]
        answers = first_difference(*(encoder.encode_plain(word) for word in words))
        return np.array(answer_log_odds(self._model, prompts, answers, description="Zero-shot"))


class FewShot(_Prompted):
    """The same after examples from the training split, as many of either label; how many, validation chooses."""

    options = {"max_prompt_length": 4096, "examples": [4, 8]}  # noqa: RUF012

    def fit(self) -> dict[str, Any]:
        self.load()
        chosen, aurocs = self.choose({count: self._examples(count) for count in self.settings["examples"]})
        return {"examples": chosen, "validation_aurocs": aurocs}

    def _examples(self, count: int) -> str:
        generator, rows = random.Random(self.seed), labelled(self.task, "train")
        chosen = [
            row
            for label in (0, 1)
            for row in generator.sample([row for row in rows if row["label"] == label], count // 2)
        ]
        generator.shuffle(chosen)
        return "\n\n".join(
            f"{self.task.text_of(row)}\n{self._prompt.question}\nAnswer: {self._prompt.verdicts[int(row['label'])]}"
            for row in chosen
        )

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        against, in_favour = self._prompt.verdicts
        # The examples are a field of their own: what they say is never read as part of the template.
        template = "{examples_of_the_task}\n\n" + self._prompt.template
        encoder = self.encoder(f'{self._prompt.question}\nReply with "{against}" or "{in_favour}" alone.', template)
        prompts = [encoder.encode({"examples_of_the_task": self._way, **self.fields(row)}).input_ids for row in rows]
        answers = first_difference(encoder.encode_plain(against), encoder.encode_plain(in_favour))
        return np.array(answer_log_odds(self._model, prompts, answers, description="Few-shot"))


def verbalised_probability(reply: str) -> float | None:
    """The first number of a reply, as a probability: "85%", "85" and "0.85" are 0.85; `None` without one in range."""
    found = re.search(r"\d+(?:\.\d+)?", reply)
    if not found:
        return None
    value = float(found.group())
    per_cent = value > 1 or reply[found.end() :].lstrip().startswith(("%", "per"))
    value = value / 100 if per_cent else value
    return value if value <= 1 else None


class ZeroShotVerbalised(_Prompted):
    """The backbone says a number, in a reply of its own or in one begun for it: what does better on validation.

    A reply without a number counts as the training split's share of label 1.
    """

    options = {"max_prompt_length": 2048, "max_new_tokens": 12}  # noqa: RUF012

    def fit(self) -> dict[str, Any]:
        self.load()
        self._base_rate = float(labels_of(labelled(self.task, "train")).mean())
        self._unreadable: dict[str, int] = {}  # by how the reply begins, of the rows asked about last
        chosen, aurocs = self.choose({beginning: beginning for beginning in ("", "Probability:")})
        return {
            "reply_begins": chosen,
            "validation_aurocs": aurocs,
            "base_rate": self._base_rate,
            "unreadable_replies_on_validation": dict(self._unreadable),
        }

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        question = (
            f'{self._prompt.question} How likely is it that the answer is "{self._prompt.verdicts[1]}"? Reply with a '
            "probability from 0% to 100% alone."
        )
        encoder = self.encoder(question)
        beginning = encoder.encode_plain(self._way) if self._way else []
        prompts = [[*encoder.encode(self.fields(row)).input_ids, *beginning] for row in rows]
        found = [verbalised_probability(reply) for reply in self._replies(prompts)]
        self._unreadable[self._way] = sum(value is None for value in found)
        values = np.array([self._base_rate if value is None else value for value in found]).clip(CLIP, 1 - CLIP)
        return np.log(values / (1 - values))

    @torch.inference_mode()
    def _replies(self, prompts: list[list[int]]) -> list[str]:
        """What the model writes behind each prompt."""
        replies = [""] * len(prompts)
        with tqdm(total=len(prompts), desc="Verbalised") as bar:
            for indices in token_batches(list(map(len, prompts)), pass_tokens(self._model.device)):
                batch = pad_left([prompts[i] for i in indices], self._tokenizer.pad_token_id or 0)
                ids = self._model.generate(**batch, max_new_tokens=self.settings["max_new_tokens"], do_sample=False)
                new = ids[:, batch["input_ids"].shape[1] :]
                told = self._tokenizer.batch_decode(new, skip_special_tokens=True)
                for i, reply in zip(indices, told, strict=True):
                    replies[i] = reply
                bar.update(len(indices))
        return replies
