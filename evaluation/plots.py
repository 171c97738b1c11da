"""The report's figures, as SVG text: colours that colour-blind readers can tell apart, and a mark or dash for each."""

import io
import re
from collections.abc import Callable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from clsgen.classification_metrics import reliability_bins
from clsgen.evaluation.intervals import TAILS, share
from clsgen.evaluation.resampling import RankedRows, bootstrap_counts

# Okabe and Ito's colours. In the HTML each becomes a CSS variable, so that figures follow the reader's light or dark.
INK, MUTED, GRID, PAPER = "#1a1a1b", "#6b6b6c", "#d9d9da", "#fffffe"
ONE, ZERO, OTHER = "#0072b2", "#d55e00", "#007a5a"
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", ONE: "one", ZERO: "zero", OTHER: "other",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "clsgen", "font.family": "DejaVu Sans", "font.size": 10,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "figure.facecolor": PAPER,
    "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "legend.frameon": False, "legend.fontsize": 9,
    "legend.handlelength": 2.2, "lines.linewidth": 1.9,
}  # fmt: skip
GRID_POINTS = np.linspace(0, 1, 101)
BAND_SAMPLES = 500
Curve = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _figure(width: float = 4.6, height: float = 3.7) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _drawn(draw):
    """Gives a drawing function matplotlib's settings, whatever the caller's are, and makes it return SVG."""

    def drawing(*args, **kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            return _svg(draw(*args, **kwargs))

    drawing.__doc__ = draw.__doc__
    return drawing


def for_page(svg: str, title: str) -> str:
    """The SVG as part of a page: as wide as its place, in the page's colours, named for who can't see it."""
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    safe = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    # The page's font is not matplotlib's; generic names end the list, so that no viewer is left without one.
    svg = svg.replace("'DejaVu Sans'", "var(--font)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)


def _band(axes: matplotlib.axes.Axes, x: np.ndarray, drawn: np.ndarray, colour: str) -> None:
    low, high = np.nanquantile(drawn, TAILS, axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def sensitivity_at(false_positives: np.ndarray, true_positives: np.ndarray) -> np.ndarray:
    """Sensitivity at each of `GRID_POINTS` false positive rates, on straight lines between the thresholds."""
    return np.interp(
        GRID_POINTS,
        np.r_[0, false_positives[::-1]] / false_positives[0],
        np.r_[0, true_positives[::-1]] / true_positives[0],
    )


def precision_at(false_positives: np.ndarray, true_positives: np.ndarray) -> np.ndarray:
    """Precision at each of `GRID_POINTS` recalls: that of the highest threshold that reaches the recall."""
    recall = true_positives[::-1] / true_positives[0]
    flagged = (true_positives + false_positives)[::-1]
    precision = np.divide(true_positives[::-1], flagged, out=np.zeros(len(flagged)), where=flagged > 0)
    reached = np.searchsorted(recall, GRID_POINTS - 1e-12, side="left")
    # At recall 0 the first found row counts.
    reached[0] = np.argmax(recall > 0)
    return precision[np.minimum(reached, len(recall) - 1)]


def _sampled(labels: np.ndarray, probabilities: np.ndarray, curve: Curve, seed: int) -> np.ndarray:
    """The curves of those bootstrap samples that hold both labels, shape `(samples, points)`."""
    ranked, curves = RankedRows(labels, probabilities), []
    for counts in bootstrap_counts(len(labels), BAND_SAMPLES, seed):
        true_positives, false_positives = ranked.at_or_above(counts, ranked.values)
        for true, false in zip(true_positives, false_positives, strict=True):
            if true[0] and false[0]:
                curves.append(curve(false, true))
    return np.array(curves)


def _mark(axes: matplotlib.axes.Axes, x: float, y: float, threshold: float) -> None:
    label = f"at threshold {threshold:.2f}"
    axes.plot([x], [y], "o", color=ZERO, markersize=8, markeredgecolor=PAPER, label=label)


@_drawn
def roc(labels: np.ndarray, probabilities: np.ndarray, threshold: float, seed: int = 0) -> Figure:
    """ROC curve with its pointwise 95% band, and the operating point of the stored threshold."""
    figure, axes = _figure()
    _band(axes, GRID_POINTS, _sampled(labels, probabilities, sensitivity_at, seed), ONE)
    false_positive_rate, sensitivity, _ = roc_curve(labels, probabilities, drop_intermediate=False)
    axes.plot(false_positive_rate, sensitivity, color=ONE, label="model, 95% band")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2, label="chance")
    flagged = probabilities >= threshold
    _mark(axes, flagged[labels == 0].mean(), flagged[labels == 1].mean(), threshold)
    axes.set(xlabel="1 - specificity", ylabel="Sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    axes.legend(loc="lower right")
    return figure


@_drawn
def precision_recall(labels: np.ndarray, probabilities: np.ndarray, threshold: float, seed: int = 0) -> Figure:
    """Precision-recall curve with its pointwise 95% band, and the operating point of the stored threshold."""
    figure, axes = _figure()
    _band(axes, GRID_POINTS, _sampled(labels, probabilities, precision_at, seed), ONE)
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    precision[-1] = precision[-2]  # scikit-learn's last point stands for no threshold
    first = np.flatnonzero(recall == 1)[-1]  # lower thresholds find nothing more
    axes.plot(recall[first:], precision[first:], color=ONE, drawstyle="steps-post", label="model, 95% band")
    axes.axhline(labels.mean(), color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2, label="base rate")
    flagged = probabilities >= threshold
    if flagged.any():
        _mark(axes, flagged[labels == 1].mean(), labels[flagged].mean(), threshold)
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    axes.legend(loc="lower left")
    return figure


@_drawn
def reliability(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Share of label 1 against the mean probability in bins of equal mass, with Wilson intervals."""
    figure, axes = _figure()
    x, positive, rows = zip(*reliability_bins(labels, probabilities), strict=True)
    shares = [share(part, whole, "rows") for part, whole in zip(positive, rows, strict=True)]
    y, low, high = (np.array([entry[key] for entry in shares]) for key in ("value", "low", "high"))
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2, label="perfect calibration")
    axes.errorbar(
        x, y, yerr=[np.maximum(0, y - low), np.maximum(0, high - y)], color=ONE, fmt="o-", linewidth=1.4,
        elinewidth=1.1, markersize=6, label=f"bins of about {len(labels) // len(rows)} rows, 95%",
    )  # fmt: skip
    axes.set(xlabel="Mean probability", ylabel="Share of label 1", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    axes.legend(loc="best")
    return figure


@_drawn
def histogram(labels: np.ndarray, probabilities: np.ndarray, threshold: float, names: tuple[str, str]) -> Figure:
    """Probabilities of the rows of label 1 (upwards) and of label 0 (downwards)."""
    figure, axes = _figure()
    edges = np.linspace(0, 1, 21)
    for label, colour, hatch in ((1, ONE, None), (0, ZERO, "////")):
        counts = np.histogram(probabilities[labels == label], edges)[0]
        axes.bar(
            edges[:-1], counts if label else -counts, width=0.05, align="edge", edgecolor=colour, hatch=hatch,
            facecolor=colour if label else PAPER, linewidth=0.8, label=f"{names[label]} ({int(counts.sum())} rows)",
        )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(
        threshold, ymax=0.8, color=INK, linestyle=(0, (4, 2)), linewidth=1.2, label=f"threshold {threshold:.2f}"
    )
    limit = max(1, *np.abs(axes.get_ylim()))
    axes.set(xlabel="Probability of label 1", ylabel="Rows", xlim=(-0.02, 1.02), ylim=(-limit, limit * 1.45))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    axes.legend(loc="upper center", ncols=2, columnspacing=1.0)
    return figure


def net_benefit(true_positives: np.ndarray, false_positives: np.ndarray, rows: float, thresholds: np.ndarray):
    """`TP / n - FP / n * t / (1 - t)` (Vickers and Elkin, 2006, "Decision Curve Analysis"), arrays as given."""
    return (true_positives - false_positives * thresholds / (1 - thresholds)) / rows


@_drawn
def decision_curve(labels: np.ndarray, probabilities: np.ndarray, seed: int = 0) -> Figure:
    """Net benefit against the threshold at which one would act, beside acting on all and on none."""
    figure, axes = _figure()
    thresholds, rows = np.linspace(0.01, 0.95, 95), len(labels)
    ranked = RankedRows(labels, probabilities)
    curve = net_benefit(*ranked.at_or_above(np.ones((1, rows)), thresholds), rows, thresholds)[0]
    drawn = [
        net_benefit(*ranked.at_or_above(counts, thresholds), rows, thresholds)
        for counts in bootstrap_counts(rows, BAND_SAMPLES, seed)
    ]
    _band(axes, thresholds, np.concatenate(drawn), ONE)
    positive = int(labels.sum())
    on_all = net_benefit(np.full(95, positive), np.full(95, rows - positive), rows, thresholds)
    axes.plot(thresholds, curve, color=ONE, label="model, 95% band")
    axes.plot(thresholds, on_all, color=ZERO, linestyle=(0, (5, 2)), linewidth=1.5, label="act on all")
    axes.axhline(0, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2, label="act on none")
    top = max(0.05, positive / rows)
    axes.set(xlabel="Threshold probability", ylabel="Net benefit a row", xlim=(0, 1), ylim=(-0.35 * top, 1.45 * top))
    axes.legend(loc="upper right")
    return figure


@_drawn
def alignment(rows: pd.DataFrame, threshold: float, names: tuple[str, str]) -> Figure:
    """The model's probability against what a judge reads in the explanation; disagreement has its own mark."""
    figure, axes = _figure()
    judged = rows[rows["judged_label"].notna()]
    # Judges that answer 0 or 1 alone would hide rows behind each other.
    noise = np.random.default_rng(0).uniform(-0.03, 0.03, len(judged))
    y = judged["judged_probability"].to_numpy(float)
    y = y + noise if set(y) <= {0.0, 1.0} else y
    x = judged["probability"].to_numpy(float)
    agree = (judged["judged_label"] == judged["predicted"]).to_numpy()
    axes.axhline(0.5, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0)
    axes.axvline(threshold, ymax=0.84, color=MUTED, linestyle=(0, (4, 2)), linewidth=1.0)
    for keep, colour, marker, label in ((agree, ONE, "o", "agree"), (~agree, ZERO, "X", "contradict")):
        axes.scatter(
            x[keep], y[keep], s=38, c=colour, marker=marker, alpha=0.75, linewidths=0, label=f"{label} ({keep.sum()})"
        )
    axes.set(
        xlabel="Probability of label 1 (model)", ylabel=f"Words argue for “{names[1]}” (judge)", xlim=(-0.03, 1.03),
        ylim=(-0.06, 1.24),
    )  # fmt: skip
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper center", ncols=2)
    return figure
