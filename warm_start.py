"""The warm start: a linear probe on the frozen backbone becomes the head that fine-tuning starts from.

Fine-tuning from a random head distorts features that are good already (Kumar et al. 2022, "Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution": linear probe, then fine-tune).
"""

import logging
import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from clsgen.configuration_clsgen import POOLINGS
from clsgen.frozen_layers import FrozenLayers, run_layers
from clsgen.losses_clsgen import IGNORE_INDEX
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.training_rows import hard_labels

logger = logging.getLogger(__name__)
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
Read = tuple[int, str]


@dataclass(frozen=True)
class Probe:
    """A linear probe: what it reads, its inverse L2 penalty `C`, and its cross-validated quality."""

    reads: tuple[Read, ...]
    inverse_penalty: float
    log_loss: float
    auroc: float


def candidate_reads(num_hidden_layers: int) -> list[tuple[Read, ...]]:
    """Head forms worth trying, the simplest first: the stock form, one middle layer, and a mean with a decision.

    Of the middle layers, six between 40 and 80% of the depth: a search over all would cost more than it finds.
    """
    low, high = round(0.4 * num_hidden_layers), round(0.8 * num_hidden_layers)
    middle = sorted({int(layer) for layer in np.linspace(low, high, 6).round()} - {0})
    singles = [((layer, pooling),) for pooling, layer in product(("decision", "mean"), middle)]
    pairs = [((first, "mean"), (second, "decision")) for first, second in product(middle, middle)]
    return [((-1, "decision"),), *singles, *pairs]


def extract_features(
    model: ClsGenForCausalLMAndClassification,
    rows: Dataset,
    layers: list[int],
    batch_size: int = 8,
    frozen_layers: FrozenLayers | None = None,
) -> tuple[dict[Read, np.ndarray], np.ndarray]:
    """Features of the frozen backbone at each row's decision, by one forward pass over the prompts.

    Where there are several processes, each reads its share of the rows, and all get the whole.

    Args:
        model (`ClsGenForCausalLMAndClassification`): Not wrapped by PEFT.
        rows (`Dataset`): Encoded rows, see [`encode_rows`]; those without a label are passed over.
        layers (`list[int]`): Indices into `hidden_states`, 0 or above.
        batch_size (`int`, *optional*, defaults to 8): Rows a forward pass.
        frozen_layers ([`FrozenLayers`], *optional*): Gets the states of the whole rows, and keeps them for training.

    Returns:
        Features by read, each float32 of shape `(labelled_rows, hidden_size)`, and labels of shape `(labelled_rows,)`.
    """
    ids, decisions, labels = [], [], []
    for row in rows.select_columns(["input_ids", "cls_labels"]):
        cls_labels = np.asarray(row["cls_labels"])
        for position in np.flatnonzero(cls_labels != IGNORE_INDEX):
            ids.append(row["input_ids"] if frozen_layers else row["input_ids"][: position + 1])
            decisions.append(position)
            labels.append(cls_labels[position])
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = np.argsort([-len(row) for row in ids])[rank::processes]
    size = (len(ids), model.config.text_config.hidden_size)
    features = {read: np.zeros(size, dtype=np.float32) for read in product(layers, POOLINGS)}
    with tqdm(total=len(order), desc="Reading frozen features", unit="text", disable=rank > 0) as progress:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [ids[i] for i in indices]
            found = frozen_layers.states(batch) if frozen_layers else run_layers(model, batch, layers)
            for i, states in zip(indices, found, strict=True):
                for layer in layers:
                    prompt = states[layer][: decisions[i] + 1].float()  # (prompt_length, hidden_size)
                    features[layer, "decision"][i] = prompt[-1].cpu().numpy()
                    features[layer, "mean"][i] = prompt.mean(dim=0).cpu().numpy()
            progress.update(len(indices))
    if processes > 1:
        features = {read: _sum_over_processes(share, model.device) for read, share in features.items()}
    return features, np.asarray(labels)


def _sum_over_processes(array: np.ndarray, device: torch.device) -> np.ndarray:
    tensor = torch.from_numpy(array).to(device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def _cross_validate(
    features: np.ndarray, labels: np.ndarray, reads: tuple[Read, ...], folds: StratifiedKFold, bias: bool
) -> Probe:
    best = None
    for inverse_penalty in INVERSE_PENALTIES:
        regression = LogisticRegression(C=inverse_penalty, max_iter=1000, fit_intercept=bias)
        probe = make_pipeline(StandardScaler(with_mean=bias), regression)
        probabilities = cross_val_predict(probe, features, labels, cv=folds, method="predict_proba")[:, 1]
        found = Probe(reads, inverse_penalty, log_loss(labels, probabilities), roc_auc_score(labels, probabilities))
        if best is None or found.log_loss < best.log_loss:
            best = found
    return best


def choose_probe(
    features: dict[Read, np.ndarray],
    labels: np.ndarray,
    candidates: list[tuple[Read, ...]],
    seed: int = 0,
    bias: bool = True,
) -> Probe:
    """The head form and penalty of the lowest 5-fold cross-validated log loss.

    Pairs are tried only of the layers that rank among the best three alone. Without `bias`, probes have no constant
    term.

    Raises:
        ValueError: with fewer than two training rows in a class.
    """
    counts = np.bincount(labels.astype(int), minlength=2)
    if counts.min() < 2:
        raise ValueError(f"The warm start needs at least 2 training rows of each class, got {counts.tolist()}.")
    folds = StratifiedKFold(min(5, int(counts.min())), shuffle=True, random_state=seed)

    def cross_validate(chosen: list[tuple[Read, ...]]) -> list[Probe]:
        columns = (np.concatenate([features[read] for read in reads], axis=1) for reads in chosen)
        return [_cross_validate(x, labels, reads, folds, bias) for reads, x in zip(chosen, columns, strict=True)]

    probes = cross_validate([reads for reads in candidates if len(reads) == 1])
    good = {probe.reads[0] for pooling in POOLINGS for probe in _best(probes, pooling)}
    probes += cross_validate([reads for reads in candidates if len(reads) > 1 and (not probes or good >= set(reads))])
    best = min(probes, key=lambda probe: probe.log_loss)
    for probe in sorted(probes, key=lambda probe: probe.log_loss)[:5]:
        logger.info("Probe %s: cross-validated log loss %.4f, AUROC %.3f", probe.reads, probe.log_loss, probe.auroc)
    return best


def _best(probes: list[Probe], pooling: str, most: int = 3) -> list[Probe]:
    return sorted((p for p in probes if p.reads[0][1] == pooling), key=lambda probe: probe.log_loss)[:most]


def warm_start(
    model: ClsGenForCausalLMAndClassification,
    rows: Dataset,
    reads: list[Read] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    frozen_layers: FrozenLayers | None = None,
) -> Probe:
    """Fits the head on frozen features and writes it into the model.

    Features are standardised for the fit, and that is folded into the head's weights. The probe is unweighted, so the
    log of the config's `pos_weight`, which inference subtracts, is added to the head's bias.

    Args:
        model (`ClsGenForCausalLMAndClassification`): Gets `cls_reads` and head weights.
        rows (`Dataset`): Encoded training rows.
        reads (`list[tuple[int, str]]`, *optional*): What the head reads; chosen by cross-validation on the training
            rows where `None`.
        batch_size, seed (`int`, *optional*): Of the forward pass, and of the folds.
        frozen_layers ([`FrozenLayers`], *optional*): Used and filled where it keeps all the layers that are needed.

    Returns:
        [`Probe`]: What was fitted.

    Raises:
        ValueError: with fewer than two training rows in a class.
    """
    depth = model.config.text_config.num_hidden_layers
    candidates = [tuple(tuple(read) for read in reads)] if reads else candidate_reads(depth)
    layers = {layer: layer % (depth + 1) for candidate in candidates for layer, _ in candidate}
    needed = sorted(set(layers.values()))
    if frozen_layers is not None and not set(needed) <= set(frozen_layers.layers):
        frozen_layers = None
    found, labels = extract_features(model, rows, needed, batch_size, frozen_layers)
    features = {(layer, pooling): found[layers[layer], pooling] for layer in layers for pooling in POOLINGS}
    labels = hard_labels(labels)
    has_bias = model.config.cls_bias
    probe = choose_probe(features, labels, candidates, seed, has_bias)
    columns = np.concatenate([features[read] for read in probe.reads], axis=1).astype(np.float64)
    scaler = StandardScaler(with_mean=has_bias).fit(columns)
    regression = LogisticRegression(C=probe.inverse_penalty, max_iter=5000, fit_intercept=has_bias)
    regression.fit(scaler.transform(columns), labels)
    weight = regression.coef_ / scaler.scale_
    model.set_reads(list(probe.reads))
    with torch.no_grad():
        model.cls_head.weight.copy_(torch.as_tensor(weight))
        if has_bias:
            bias = regression.intercept_ - weight @ scaler.mean_ + math.log(model.config.pos_weight)
            model.cls_head.bias.copy_(torch.as_tensor(bias))
    logger.info(
        "Warm start: the head reads %s, C=%g, cross-validated AUROC %.3f, log loss %.4f",
        list(probe.reads), probe.inverse_penalty, probe.auroc, probe.log_loss,
    )  # fmt: skip
    return probe
