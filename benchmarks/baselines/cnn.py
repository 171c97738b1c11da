"""A convolutional network on word embeddings learned from scratch, as the LCD benchmark's paper has for a baseline.

Yoon et al., 2024, "LCD benchmark: long clinical document benchmark on mortality prediction for language models"; with
the sizes that the authors' library uses: embeddings of 100, 25 filters of each width 1, 2 and 3, maximum over time,
dropout 0.2.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from tqdm.auto import trange

from benchmarks.baselines.running import Baseline, Row, labelled, labels_of
from clsgen.evaluation.sentences import words

PADDING, UNKNOWN = 0, 1


class TextCnn(nn.Module):
    """Ids of shape `(batch_size, length)` to logits of shape `(batch_size,)`."""

    def __init__(self, vocabulary: int, size: int = 100, filters: int = 25, widths: Sequence[int] = (1, 2, 3)):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size, padding_idx=PADDING)
        self.convolutions = nn.ModuleList(nn.Conv1d(size, filters, width, padding=width - 1) for width in widths)
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(filters * len(widths), 1)

    def forward(self, ids: torch.LongTensor) -> torch.FloatTensor:
        embedded = self.embedding(ids).transpose(1, 2)  # (batch_size, size, length)
        lengths = (ids != PADDING).sum(dim=1, keepdim=True)
        pooled = [_largest(convolution, embedded, lengths) for convolution in self.convolutions]
        return self.output(self.dropout(torch.cat(pooled, dim=1)))[:, 0]


def _largest(convolution: nn.Conv1d, embedded: torch.FloatTensor, lengths: torch.LongTensor) -> torch.FloatTensor:
    """Each filter's maximum over the windows that hold a word: what a row is padded with must not answer for it."""
    activations = F.relu(convolution(embedded))  # 0 and above
    with_word = torch.arange(activations.shape[2]) < lengths + convolution.kernel_size[0] - 1  # (batch_size, windows)
    return (activations * with_word[:, None]).amax(dim=2)


class CnnBaseline(Baseline):
    """Trained with Adam; the learning rate and the epoch are those of the best validation AUROC."""

    options = {"learning_rates": [1e-3, 3e-3], "epochs": 30, "batch_size": 16, "max_words": 2000, "min_count": 2}  # noqa: RUF012

    def fit(self) -> dict[str, Any]:
        rows, validation = labelled(self.task, "train"), labelled(self.task, "validation")
        counts = Counter(word for row in rows for word in set(words(self.task.text_of(row))))
        kept = sorted(word for word, count in counts.items() if count >= self.settings["min_count"])
        self._vocabulary = {word: i for i, word in enumerate(kept, start=UNKNOWN + 1)}
        best = max((self._train(rows, validation, rate) for rate in self.settings["learning_rates"]), key=_auroc)
        self._model.load_state_dict(best.pop("weights"))
        return {**best, "vocabulary": len(self._vocabulary)}

    def _train(self, rows: Sequence[Row], validation: Sequence[Row], learning_rate: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        self._model = TextCnn(len(self._vocabulary) + 2)
        optimizer = torch.optim.Adam(self._model.parameters(), lr=learning_rate)
        labels, best = torch.tensor(labels_of(rows), dtype=torch.float32), {"validation_auroc": -1.0}
        for epoch in trange(1, self.settings["epochs"] + 1, desc=f"CNN, learning rate {learning_rate:g}"):
            self._model.train()
            for batch in torch.randperm(len(rows), generator=generator).split(self.settings["batch_size"]):
                logits = self._model(self._ids([rows[i] for i in batch.tolist()]))
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logits, labels[batch]).backward()
                optimizer.step()
            auroc = float(roc_auc_score(labels_of(validation), self.logits(validation)))
            if auroc > best["validation_auroc"]:
                weights = copy.deepcopy(self._model.state_dict())
                best = {
                    "learning_rate": learning_rate, "epoch": epoch, "validation_auroc": auroc, "weights": weights
                }  # fmt: skip
        return best

    def _ids(self, rows: Sequence[Row]) -> torch.LongTensor:
        most = self.settings["max_words"]
        found = [
            [self._vocabulary.get(word, UNKNOWN) for word in words(self.task.text_of(row))[:most]] or [UNKNOWN]
            for row in rows
        ]
        longest = max(map(len, found))
        return torch.tensor([ids + [PADDING] * (longest - len(ids)) for ids in found])

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        self._model.eval()
        batches = [rows[i : i + 64] for i in range(0, len(rows), 64)]
        return torch.cat([self._model(self._ids(batch)) for batch in batches]).double().numpy()


def _auroc(run: dict[str, Any]) -> float:
    return run["validation_auroc"]
