"""The picture of a card: how often label 1 came true at each predicted probability."""

import io

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from clsgen.classification_metrics import reliability_bins


def calibration_plot(labels: ArrayLike, probabilities: ArrayLike, threshold: float) -> bytes:
    """A PNG: predicted probability against the share of label 1, above a histogram of the predictions.

    Whiskers are 95% Wilson intervals of each share (Wilson, 1927, "Probable Inference, the Law of Succession, and
    Statistical Inference").
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import MaxNLocator

    bins = reliability_bins(labels, probabilities)
    predicted, observed = (np.array(values) for values in zip(*((mean, k / n) for mean, k, n in bins), strict=True))
    low, high = np.array([binomtest(k, n).proportion_ci(method="wilson") for _, k, n in bins]).T
    figure = Figure(figsize=(5, 5.4), dpi=110, layout="constrained")
    curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect")
    errors = np.stack([observed - low, high - observed]).clip(min=0)
    label = "test split, 95% intervals"
    curve.errorbar(predicted, observed, yerr=errors, marker="o", capsize=3, color="#1f5fa8", label=label)
    curve.set(ylabel="share of label 1", xlim=(0, 1), ylim=(-0.02, 1.02))
    histogram.hist(np.asarray(probabilities, dtype=float), bins=20, range=(0, 1), color="#1f5fa8")
    histogram.set(xlabel="predicted probability of label 1", ylabel="rows")
    histogram.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in (curve, histogram):
        axes.axvline(threshold, color="#b5532d", linestyle=":", label=f"threshold {threshold:.3f}")
    curve.legend(loc="upper left")
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
