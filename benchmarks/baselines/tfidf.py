"""TF-IDF of 1- and 2-grams with logistic regression."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline

from benchmarks.baselines.running import Baseline, Row, labelled, labels_of


class TfidfBaseline(Baseline):
    """The penalty is chosen by 5-fold cross-validation on the training split; nothing in it is random."""

    def fit(self) -> dict[str, Any]:
        rows = labelled(self.task, "train")
        regression = LogisticRegressionCV(
            Cs=10, cv=5, scoring="neg_log_loss", max_iter=2000, l1_ratios=(0,), use_legacy_attributes=False
        )
        self._model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), regression)
        self._model.fit([self.task.text_of(row) for row in rows], labels_of(rows))
        return {"C": float(regression.C_)}

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        return self._model.decision_function([self.task.text_of(row) for row in rows])
