"""Metrics by task, evaluation of a model on encoded rows, and the files that hold the result."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from transformer import distributed
from transformer.batching import batches, padded_collate, padding_multiple
from transformer.features import Features
from transformer.file_utils import UserError, write_json, write_text
from transformer.modeling import inference_copy, model_inputs
from transformer.tasks import Task, get_task, split_paths

logger = logging.getLogger(__name__)

GPU_TOKENS = 16384  # in one batch of evaluation


def _warn_if_constant(predicted: np.ndarray, gold: np.ndarray, what: str) -> bool:
    """Warn where a model predicts the same for every row; returns whether it does."""
    constant = bool(np.all(predicted == predicted[0]))
    if constant and np.any(gold != gold[0]):
        logger.warning(
            "!!! The model predicts %s for all %d rows: it has learned nothing, or its weights "
            "were not loaded. Its score is that of a constant prediction. !!!",
            what, len(predicted))
    return constant


def _correlations(
    task: Task, predicted: np.ndarray, gold: np.ndarray
) -> dict[str, float]:
    """Pearson and Spearman correlation and their mean; 0 where one side does not vary."""
    from scipy.stats import pearsonr, spearmanr  # here: a second to load, for STS-B alone

    pearson = spearman = 0.0
    if not np.all(np.isfinite(predicted)):
        logger.warning("!!! The model's scores are not finite numbers: training diverged. !!!")
    elif not _warn_if_constant(predicted, gold, "one score only") and np.any(gold != gold[0]):
        pearson = float(pearsonr(predicted, gold)[0])
        spearman = float(spearmanr(predicted, gold)[0])
    found = {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}
    return {name: value for name, value in found.items() if name in task.metrics}


def _classification_metrics(
    task: Task, predicted: np.ndarray, gold: np.ndarray, labels_order: tuple[str, ...]
) -> dict[str, float]:
    """Metrics of class numbers [rows] that count in `labels_order`.

    The mean of `macro_f1` is over the classes that rows have or are predicted to have.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef  # here: a second to load

    found = {"acc": float(np.mean(predicted == gold))}
    if "f1" in task.metrics or "acc_and_f1" in task.metrics:
        positive = labels_order.index(task.positive)
        found["f1"] = float(f1_score(gold == positive, predicted == positive, zero_division=0.0))
        found["acc_and_f1"] = (found["acc"] + found["f1"]) / 2
    if "macro_f1" in task.metrics:
        found["macro_f1"] = float(f1_score(gold, predicted, average="macro", zero_division=0.0))
    if "mcc" in task.metrics:
        found["mcc"] = float(matthews_corrcoef(gold, predicted))
    return {name: value for name, value in found.items() if name in task.metrics}


def compute_metrics(
    task: str | Task,
    logits: np.ndarray,
    labels: np.ndarray,
    labels_order: tuple[str, ...] | None = None,
) -> dict[str, float]:
    """Compute a task's metrics, as fractions of 1, from logits [rows, labels] and gold labels.

    `labels_order` names the columns of `logits` and the class numbers in `labels`; without it
    they stand in the task's own order. A model that predicts the same for every row is warned
    about, and its correlations are 0 and not undefined.
    """
    task = get_task(task)
    logits, labels = np.asarray(logits), np.asarray(labels)
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"{len(logits)} rows of logits for {len(labels)} labels")
    if task.is_regression:
        return _correlations(task, logits.reshape(len(labels)).astype(np.float64), labels)
    order = task.labels if labels_order is None else tuple(labels_order)
    predicted = logits.argmax(axis=1)
    _warn_if_constant(predicted, labels, f"one class only ({order[predicted[0]]!r})")
    return _classification_metrics(task, predicted, labels, order)


def majority_baseline(task: str | Task, labels: Sequence[str]) -> dict[str, float]:
    """Compute the task's metrics of always predicting the most common class, as fractions of 1.

    `labels` are those of the rows, as their file spells them. For a regression all metrics are 0:
    those of always predicting the same score.
    """
    task = get_task(task)
    if task.is_regression:
        return _correlations(task, np.zeros(1), np.zeros(1))
    gold = np.array([task.labels.index(label) for label in labels])
    predicted = np.full_like(gold, np.bincount(gold).argmax())
    return _classification_metrics(task, predicted, gold, task.labels)


def count_classes(
    predicted: np.ndarray, gold: np.ndarray, labels_order: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Count by class its rows, the rows that are predicted to be of it, and the right ones."""
    counts = [np.bincount(numbers, minlength=len(labels_order)).tolist()
              for numbers in (gold, predicted, gold[predicted == gold])]
    return {label: {"rows": rows, "predicted": found, "correct": correct}
            for label, rows, found, correct in zip(labels_order, *counts, strict=True)}


def warn_of_chance(
    task: Task, metrics: Mapping[str, Mapping[str, float]],
    per_class: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> None:
    """Warn where a final score is no better than always predicting the commonest class.

    `metrics` and `per_class` are by split; of rows that are all of one class nothing is said.
    """
    metric = task.metrics[0]
    for split, classes in per_class.items():
        labels = [label for label, counts in classes.items() for _ in range(counts["rows"])]
        score, baseline = metrics[split][metric], majority_baseline(task, labels)[metric]
        common, rows = Counter(labels).most_common(1)[0]
        if rows < len(labels) and not score > baseline:
            logger.warning(
                "!!! %s %.4f on %s is no better than always predicting %r, the commonest of %d"
                " classes (%.1f %% of %d rows): that gives %.4f. !!!", metric, score, split,
                common, len(classes), 100 * rows / len(labels), len(labels), baseline)


def predict_logits(
    model: nn.Module,
    features: Features,
    device: torch.device | str,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run a model over all rows, dropout off: logits [rows, labels], float32, in row order.

    It computes in `dtype`, on a copy of the model: the model itself is not touched. Under torchrun
    each process computes some of the batches, and all of them return all rows.
    """
    device = torch.device(device)
    if device.type == "cuda":  # a few short rows would not keep it busy
        batch_size = max(batch_size, GPU_TOKENS // int(features.lengths.max()))
    order = batches(features.lengths, batch_size)
    limit = model.config.max_position_embeddings
    collate = padded_collate(features, padding_multiple(device), limit=limit)
    model = inference_copy(model, dtype, device)
    own = order[distributed.rank() :: distributed.world_size()]
    outputs = []
    with torch.inference_mode():
        for indices in tqdm(own, desc="predict", unit="batch", leave=False, disable=None):
            inputs = [tensor.to(device) for tensor in model_inputs(collate(indices))]
            outputs.append(model(*inputs, score_layers=())[0].float())  # [batch, labels]
    return merge_rows(own, outputs, len(features))


def merge_rows(
    rows: Sequence[np.ndarray], logits: Sequence[torch.Tensor], count: int
) -> torch.Tensor:
    """Return the logits of all `count` rows in order, from those that each process computed.

    `rows` are the numbers of the rows of each of this process's batches, `logits` what came out.
    """
    own = torch.cat(list(logits)).cpu() if rows else torch.empty(0, 0)
    labels = distributed.largest(own.shape[1])
    merged = torch.zeros(count, labels)
    if rows:
        merged[torch.from_numpy(np.concatenate(rows))] = own
    return distributed.sum_over_ranks(merged)  # each row comes from one process


def evaluation_splits(
    task: Task, data_dir: Path | str, names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the splits to measure on: those of --eval_split, or not given the task's dev sets.

    One that the task does not have, or whose file is missing, is a `UserError`.
    """
    for name in names or ("dev",):
        if name not in task.splits:
            hint = "; --dev_share 0.1 sets a tenth of train aside" if name == "dev" else ""
            raise UserError(f"task {task.name} has no labelled split {name!r}; expected one of"
                            f" {', '.join(task.splits)}{hint}")
    splits = tuple(dict.fromkeys(names or task.dev_files))
    for split in splits:
        split_paths(task, data_dir, split)
    return splits


def evaluate_splits(
    model: nn.Module, splits: Mapping[str, Features], *arguments: Any
) -> dict[str, dict[str, Any]]:
    """Return the result of `evaluate` on each split (MNLI has two dev sets)."""
    return {split: evaluate(model, features, *arguments) for split, features in splits.items()}


def by_split(results: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return one value of each split that `evaluate_splits` returned, where it is not empty."""
    return {split: result[name] for split, result in results.items() if result[name]}


def evaluate(
    model: nn.Module,
    features: Features,
    task: str | Task,
    device: torch.device | str,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Evaluate a classifier on encoded rows, on a copy of it that computes in `dtype`.

    Returns "metrics" (see `compute_metrics`), "per_class" (see `count_classes`; empty for a
    regression), "logits" [rows, labels] float32 and "predictions" [rows] (class numbers or
    scores), in the order of `features`.
    """
    task = get_task(task)
    if not len(features):
        raise UserError(f"no rows of {task.name} to evaluate; expected at least one")
    logits = predict_logits(model, features, device, batch_size, dtype)
    logits, gold = logits.numpy(), features.labels.numpy()
    metrics = compute_metrics(task, logits, gold, features.label_names)
    predictions = logits[:, 0] if task.is_regression else logits.argmax(axis=1)
    per_class = {} if task.is_regression else count_classes(
        predictions, gold, features.label_names)
    return {"metrics": metrics, "per_class": per_class, "logits": logits,
            "predictions": predictions}


class Selection:
    """Keeps scores of a run's dev evaluations: first, best by the task's metric, and last.

    It starts at minus infinity, so the first evaluation always counts as the best.
    """

    def __init__(self, task: Task) -> None:
        self.metric = task.metrics[0]
        self.count = 0
        self.best_score = -math.inf
        self.first: dict[str, dict[str, float]] = {}
        self.best: dict[str, dict[str, float]] = {}
        self.last: dict[str, dict[str, float]] = {}
        self.per_class: dict[str, dict[str, Any]] = {}  # counts of the best, by split

    def update(self, results: dict[str, dict[str, Any]]) -> bool:
        """Note what `evaluate_splits` returned; says whether it is the best on "dev" so far."""
        metrics = by_split(results, "metrics")
        self.count += 1
        self.first = self.first or metrics
        self.last = metrics
        score = metrics["dev"][self.metric]
        if not score > self.best_score:
            return False
        self.best_score, self.best = score, metrics
        self.per_class = by_split(results, "per_class")
        return True

    def results(self) -> dict[str, Any]:
        """Return what `write_results` should say of the run."""
        return {
            "split": "dev",
            "metrics": self.best["dev"],
            "all_metrics": self.best,
            "best": self.best["dev"],
            "last": self.last["dev"],
            "per_class": self.per_class,
            "selection": f"best of {self.count} dev evaluations by {self.metric}",
        }


# ------------------------------------------------------------------ result files


def _flatten(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of nested results: metrics by their own name, others as outer_inner."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, prefix if key == "metrics" else f"{prefix}{key}_")
        else:
            yield prefix + ("eval_loss" if key == "loss" else key), value


def _as_json(value: Any) -> Any:
    """Turn numbers that JSON lacks (nan, inf) into null."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(output_dir: Path | str, result: Mapping[str, Any]) -> None:
    """Write a result as `eval_results.txt` and `eval_results.json`, each atomically.

    The text has one "key = value" line a value, sorted, as the original wrote it: metrics under
    their own names, a loss as `eval_loss`, other nested values as "outer_inner". The counts of
    "per_class" are in the JSON alone, and not where there are none. Of several processes the first
    writes.
    """
    if not distributed.is_main():
        return
    short = {key: value for key, value in result.items() if key != "per_class"}
    result = result if result.get("per_class") else short
    lines = [f"{key} = {value}\n" for key, value in sorted(dict(_flatten(short)).items())]
    write_text(Path(output_dir, "eval_results.txt"), "".join(lines))
    write_json(Path(output_dir, "eval_results.json"), _as_json(result))
