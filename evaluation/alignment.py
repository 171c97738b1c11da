"""Whether words and number agree, and what that agreement is worth.

Agreement is not faithfulness: an explanation may repeat the decision and say nothing of the text (it leaks the
answer). So [`leakage_report`] stands beside [`alignment_report`].
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import logit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer

from clsgen.classification_metrics import check_labels, check_probabilities
from clsgen.evaluation.intervals import SAMPLES, metrics_with_intervals, share, undefined
from clsgen.evaluation.judges import TOKEN, Judge

COLUMNS = ("probability", "predicted", "explanation", "gold")
FOLDS = 5
READING_WEIGHTS = np.linspace(0, 1, 11)
CERTAIN = (1e-12, 1 - 1e-12)  # what the log-odds of a probability are cut at
_INPUTS = ("input_only", "explanation_only", "both")


def alignment_metrics(probabilities: ArrayLike, predicted: ArrayLike, judged: ArrayLike) -> dict[str, Any]:
    """Agreement of the model's number and label with the labels that a judge reads out of its explanations.

    Args:
        probabilities: Shape `(rows,)`, the model's probability of label 1, in [0, 1].
        predicted: Shape `(rows,)`, the model's label, 0 or 1.
        judged: Shape `(rows,)`, the judge's label, 0 or 1.

    Returns:
        `dict[str, Any]`, where nan means undefined, for the reason that `undefined` gives by name:

        - `auroc_alignment`: AUROC of `probabilities` against `judged`; undefined where the judge found one label only.
        - `kappa`: Cohen's, of `predicted` and `judged`; undefined where either is one label only, since chance alone
          then explains any agreement.
        - `agreement` and `contradiction_rate`: shares of rows where the two are the same, or are not.

    Raises:
        ValueError: As [`classification_metrics.classification_metrics`], but for no rows, which leave all undefined.
    """
    names = ("auroc_alignment", "kappa", "agreement", "contradiction_rate")
    if not np.size(judged):
        return {**dict.fromkeys(names, math.nan), "undefined": dict.fromkeys(names, "no explanation was judged")}
    judged, predicted = check_labels(judged, probabilities), check_labels(predicted, probabilities)
    probabilities = check_probabilities(probabilities)
    report: dict[str, Any] = {"auroc_alignment": math.nan, "kappa": math.nan}
    undefined = {}
    one_judged, one_predicted = len(set(judged)) == 1, len(set(predicted)) == 1
    if one_judged:
        undefined["auroc_alignment"] = f"all explanations were judged to argue for label {judged[0]}"
    else:
        report["auroc_alignment"] = float(roc_auc_score(judged, probabilities))
    if one_judged or one_predicted:
        undefined["kappa"] = f"only one label was {'judged' if one_judged else 'predicted'}"
    else:
        report["kappa"] = float(cohen_kappa_score(predicted, judged))
    agreement = float((predicted == judged).mean())
    return {**report, "agreement": agreement, "contradiction_rate": 1 - agreement, "undefined": undefined}


def alignment_report(rows: pd.DataFrame, judge: Judge) -> dict[str, Any]:
    """Judges explanations, and measures their agreement with the model's numbers; one mode of explanation at a time.

    Args:
        rows (`pandas.DataFrame`): One a prediction: `probability` of label 1, `predicted` label, `explanation` (or
            missing) and `gold` label (may be missing).
        judge ([`Judge`]): Sees the explanations, and nothing else.

    Returns:
        `dict[str, Any]`: What [`alignment_metrics`] gives over the judged rows, and

        - `judge`: its name and what it is worth (see [`Judge.describe`]).
        - `rows`, `explained` (with an explanation), `judged` (with an answer of the judge), as `int`.
        - `words_auroc`, `words_accuracy`: the judge's reading against the gold label, over the judged rows with one:
          how right the words are.
        - `judged_probability` and `judged_label` (`list`): of each row, `None` where there is none.

    Raises:
        ValueError: A missing column; a probability or label that is none.
    """
    missing = [column for column in COLUMNS if column not in rows.columns]
    if missing:
        raise ValueError(
            f"Alignment needs the columns {list(COLUMNS)}; missing {missing}, found {list(rows.columns)}."
        )
    explanations = [text if isinstance(text, str) and text.strip() else None for text in rows["explanation"]]
    answers = judge.judge(explanations)
    labels = [None if answer is None else int(answer >= 0.5) for answer in answers]
    judged = rows.assign(answer=answers, judged=labels)[np.array([answer is not None for answer in answers], bool)]
    metrics = alignment_metrics(judged["probability"], judged["predicted"], judged["judged"])
    with_gold = judged[judged["gold"].notna()]
    words = _against_gold(with_gold["gold"], with_gold["answer"])
    metrics["undefined"] |= words.pop("undefined")
    return {
        "judge": judge.describe(),
        "rows": len(rows),
        "explained": sum(text is not None for text in explanations),
        "judged": len(judged),
        **metrics,
        **words,
        "judged_probability": answers,
        "judged_label": labels,
    }


def _against_gold(gold: pd.Series, answers: pd.Series) -> dict[str, Any]:
    if gold.empty:
        reasons = dict.fromkeys(("words_auroc", "words_accuracy"), "no judged row has a gold label")
        return {"words_auroc": math.nan, "words_accuracy": math.nan, "undefined": reasons}
    gold, answers = check_labels(gold, answers), answers.to_numpy(dtype=float)
    accuracy = float(((answers >= 0.5) == gold).mean())
    if len(set(gold)) == 1:
        reasons = {"words_auroc": f"all judged rows have the gold label {gold[0]}"}
        return {"words_auroc": math.nan, "words_accuracy": accuracy, "undefined": reasons}
    return {"words_auroc": float(roc_auc_score(gold, answers)), "words_accuracy": accuracy, "undefined": {}}


def second_reading_report(
    rows: pd.DataFrame, threshold: float, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What the LM's own reading of the verdict is worth, and whether its distance from the number points to errors.

    Args:
        rows (`pandas.DataFrame`): `gold`, `predicted`, `probability` and `lm_probability`.
        threshold (`float`): The model's.
        samples, seed (`int`): Of the bootstrap.

    Returns:
        `dict` of estimates (see [`intervals.metrics_with_intervals`]):

        - `auroc`: of `lm_probability` for the gold label.
        - `agreement`: share of rows where it lies on the decision's side of 0.5.
        - `errors_where_agreed`, `errors_where_not`: share of wrong decisions among these rows, and among the others.
        - `auroc_of_distance`: how well `|probability - lm_probability|` tells wrong decisions from right ones; and
          `auroc_of_closeness`: how well the probability's closeness to the threshold does.
    """
    wrong = (rows["predicted"] != rows["gold"]).to_numpy()
    agreed = ((rows["lm_probability"] >= 0.5) == (rows["predicted"] == 1)).to_numpy()
    found = {
        "auroc": metrics_with_intervals(rows["gold"], rows["lm_probability"], 0.5, samples, seed)["auroc"],
        "agreement": share(int(agreed.sum()), len(rows), "rows"),
        "errors_where_agreed": share(int(wrong[agreed].sum()), int(agreed.sum()), "row where both agree"),
        "errors_where_not": share(int(wrong[~agreed].sum()), int((~agreed).sum()), "row where they differ"),
    }
    signs = {
        "auroc_of_distance": (rows["probability"] - rows["lm_probability"]).abs(),
        "auroc_of_closeness": 1 - (rows["probability"] - threshold).abs(),
    }
    for name, sign in signs.items():
        if wrong.all() or not wrong.any():
            found[name] = undefined("no wrong decision" if not wrong.any() else "no right decision")
        else:
            found[name] = metrics_with_intervals(wrong, sign, 0.5, samples, seed)["auroc"]
    return found


def auroc_by_weight(rows: pd.DataFrame, weight: float) -> dict[str, float]:
    """The number's AUROC, were `lm_reading_weight` another: what to choose it by, on validation rows.

    Args:
        rows (`pandas.DataFrame`): `gold`, `logit` and `lm_probability`.
        weight (`float`): The model's, which is in `logit`.

    Returns:
        `dict[str, float]`: AUROC by weight, "0.0" to "1.0"; empty where rows are of one class, or the logit holds
        nothing of the head.
    """
    if weight == 1 or rows["gold"].nunique() < 2:
        return {}
    readings = logit(rows["lm_probability"].clip(*CERTAIN))
    of_head = (rows["logit"] - weight * readings) / (1 - weight)
    return {
        f"{other:.1f}": float(roc_auc_score(rows["gold"], (1 - other) * of_head + other * readings))
        for other in READING_WEIGHTS
    }


def leakage_report(rows: pd.DataFrame, texts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """What explanations add for somebody who wants to foresee the model's decisions, leaks set apart.

    Leakage-adjusted simulatability (LAS; Hase, Zhang, Xie and Bansal, 2020, "Leakage-Adjusted Simulatability: Can
    Models Generate Non-Trivial Explanations of Their Behavior in Natural Language?"): a simulator predicts the model's
    label from the text, from the explanation, and from both. A row *leaks* where the explanation alone is enough. LAS
    is the gain in accuracy of both over the text alone, as the mean of that among leaking and among other rows: what
    is above 0 was not bought by saying the answer.

    The simulator is small: logistic regression on TF-IDF, text and explanation apart. It is fitted on the evaluated
    rows themselves, in five folds, and each row is predicted by a simulator that has not seen it. On a hundred rows it
    knows little: a LAS near 0 says no more than that *this* simulator learned nothing from the explanations.

    Args:
        rows (`pandas.DataFrame`): As for [`alignment_report`]; rows without an explanation are left out.
        texts (`Sequence[str]`): The text of each row.
        seed (`int`, *optional*, defaults to 0): Of the folds.

    Returns:
        `dict[str, Any]`, where nan means undefined, for the reason that `undefined` gives by name: `rows`; `las`, with
        `gain_leaking`, `gain_not_leaking`, `leaking_rows`, `not_leaking_rows`; and for the targets `predicted` and
        `gold`, a dict of the simulator's AUROC from `input_only`, `explanation_only` and `both`.

    Raises:
        ValueError: A missing column; not as many texts as rows.
    """
    missing = [column for column in ("predicted", "explanation", "gold") if column not in rows.columns]
    if missing or len(texts) != len(rows):
        raise ValueError(f"Leakage needs a text a row ({len(texts)} for {len(rows)}); missing columns: {missing}.")
    rows = rows.assign(text=list(texts))
    rows = rows[np.array([isinstance(text, str) and bool(text.strip()) for text in rows["explanation"]], bool)]
    report: dict[str, Any] = {"rows": len(rows), "undefined": {}}
    scores = {}
    for target in ("predicted", "gold"):
        known = rows[rows[target].notna()]
        scores[target], reason = _simulate(known, target, seed)
        report[target] = {
            name: math.nan if reason else float(roc_auc_score(known[target].astype(int), scores[target][name]))
            for name in _INPUTS
        }
        if reason:
            report["undefined"][target] = reason
    return {**report, **_simulatability(rows["predicted"], scores["predicted"], report["undefined"])}


def _simulate(rows: pd.DataFrame, target: str, seed: int) -> tuple[dict[str, np.ndarray], str | None]:
    """Out-of-fold probabilities of label 1, by what the simulator sees; or why there are none."""
    labels = rows[target].astype(int).to_numpy()
    counts = [int((labels == label).sum()) for label in (0, 1)]
    if min(counts) < FOLDS:
        return {}, f"{FOLDS} rows of either label are needed, got {counts[0]} and {counts[1]}"
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    pairs = rows[["text", "explanation"]].to_numpy(dtype=object)
    return {
        name: cross_val_predict(_simulator(columns), pairs, labels, cv=folds, method="predict_proba")[:, 1]
        for name, columns in zip(_INPUTS, ((0,), (1,), (0, 1)), strict=True)
    }, None


def _simulator(columns: tuple[int, ...]) -> Any:
    features = [
        make_pipeline(
            FunctionTransformer(np.take, kw_args={"indices": column, "axis": 1}),
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=TOKEN),
        )
        for column in columns
    ]
    return make_pipeline(make_union(*features), LogisticRegression(C=10.0, max_iter=2000))


def _simulatability(
    predicted: pd.Series, scores: dict[str, np.ndarray], undefined: dict[str, str]
) -> dict[str, float | int]:
    names = ("las", "gain_leaking", "gain_not_leaking")
    if not scores:
        undefined.update(dict.fromkeys(names, undefined["predicted"]))
        return {**dict.fromkeys(names, math.nan), "leaking_rows": 0, "not_leaking_rows": 0}
    right = {name: (scores[name] >= 0.5) == predicted.astype(int).to_numpy() for name in _INPUTS}
    found = leakage_adjusted_simulatability(right["input_only"], right["explanation_only"], right["both"])
    for name in names:
        if math.isnan(found[name]):
            undefined[name] = "all rows leak, or none does"
    return found


def leakage_adjusted_simulatability(
    input_only: ArrayLike, explanation_only: ArrayLike, both: ArrayLike
) -> dict[str, float | int]:
    """LAS, from whether a simulator was right on each row.

    Args:
        input_only, explanation_only, both: Shape `(rows,)`, bool: whether the simulator foresaw the model's label from
            the text, from the explanation, from both.

    Returns:
        `dict`: `las`, `gain_leaking`, `gain_not_leaking` (nan for a group without rows, and `las` where either is),
        `leaking_rows`, `not_leaking_rows`.
    """
    leaks = np.asarray(explanation_only, dtype=bool)
    gains = np.asarray(both, dtype=float) - np.asarray(input_only, dtype=float)
    leaking, not_leaking = (float(gains[group].mean()) if group.any() else math.nan for group in (leaks, ~leaks))
    return {
        "las": (leaking + not_leaking) / 2,
        "gain_leaking": leaking,
        "gain_not_leaking": not_leaking,
        "leaking_rows": int(leaks.sum()),
        "not_leaking_rows": int((~leaks).sum()),
    }
