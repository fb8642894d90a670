"""The tasks of K-prune: what each reads for its sample, and how its models are scored."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from evaluate.squad import evaluate_squad
from torch import nn

from dataset.squad import SQUAD_FILES, make_windows, read_squad, squad_path
from transformer.evaluation import (
    by_split,
    evaluate_splits,
    evaluation_splits,
    warn_of_chance,
)
from transformer.features import Features, load_features
from transformer.file_utils import UserError
from transformer.modeling import BertForQuestionAnswering, TinyBertForSequenceClassification
from transformer.own_tasks import task_of
from transformer.tasks import Task, get_task
from transformer.tokenization import AnyTokenizer

DATA = Path(__file__).resolve().parents[3] / "data"
SQUAD_LENGTH = 384
EVAL_BATCH = 32

Metrics = dict[str, dict[str, float]]  # by split


class TaskData(NamedTuple):
    """What pruning needs of a task.

    train: the training rows, for the sample and the mean length.
    score: measures a model on the dev rows.
    """

    train: Features
    score: Callable[[nn.Module], Metrics]


def find(args: argparse.Namespace) -> Task | str:
    """Return the task, or SQuAD's name; --data_dir, if not given, becomes the one below data/."""
    is_squad = args.task_name in SQUAD_FILES
    if args.data_dir is None:
        if args.task_name is None:
            raise UserError("--task_name or --data_dir is missing; expected the task to prune for")
        args.data_dir = str(DATA / "squad" if is_squad else
                            DATA / "glue_data" / get_task(args.task_name).folder)
    if is_squad and (args.dev_share or args.test_share or args.train_split):
        raise UserError(f"--task_name {args.task_name} has files of its own; leave out --dev_share,"
                        " --test_share and --train_split")
    return args.task_name if is_squad else task_of(args)


def model_arguments(task: Task | str) -> tuple[type[nn.Module], dict[str, int]]:
    """Return the class of a task's models, and what it has to be built with."""
    if isinstance(task, str):
        return BertForQuestionAnswering, {}
    return TinyBertForSequenceClassification, {"num_labels": task.num_labels}


def default_length(task: Task | str) -> int:
    """Return the longest input of a task in word pieces."""
    return SQUAD_LENGTH if isinstance(task, str) else task.max_seq_length


def load_data(
    task: Task | str, data_dir: Path | str, tokenizer: AnyTokenizer, max_seq_length: int,
    labels: tuple[str, ...], device: torch.device,
) -> TaskData:
    """Read a task's training and dev rows; errors name file, line and value.

    `labels` stand in the order of the model's outputs.
    """
    if isinstance(task, str):
        return _squad_data(task, data_dir, tokenizer, max_seq_length, device)
    rows = {split: load_features(task, data_dir, split, tokenizer, max_seq_length, labels,
                                 cache=True)
            for split in ("train", *evaluation_splits(task, data_dir))}
    train = rows.pop("train")

    def score(model: nn.Module) -> Metrics:
        results = evaluate_splits(model, rows, task, device, EVAL_BATCH)
        metrics = by_split(results, "metrics")
        warn_of_chance(task, metrics, by_split(results, "per_class"))
        return metrics

    return TaskData(train, score)


def _squad_data(
    task: str, data_dir: Path | str, tokenizer: AnyTokenizer, max_seq_length: int,
    device: torch.device,
) -> TaskData:
    train_path, dev_path = (squad_path(task, data_dir, split) for split in ("train", "dev"))
    train = make_windows(read_squad(train_path), tokenizer, max_seq_length)
    questions = read_squad(dev_path)
    windows = make_windows(questions, tokenizer, max_seq_length)
    return TaskData(train.features, lambda model: {"dev": evaluate_squad(
        model, questions, windows, device, EVAL_BATCH, unanswerable=task == "squad_v2")})
