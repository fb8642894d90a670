"""The tasks of K-prune: what each reads for its sample, and how its models are scored."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from evaluate.squad import evaluate_squad
from torch import nn

from dataset.squad import SQUAD_FILES, make_windows, read_squad, squad_path
from transformer.evaluation import by_split, evaluate_splits
from transformer.features import Features, load_features
from transformer.modeling import BertForQuestionAnswering, TinyBertForSequenceClassification
from transformer.tasks import GlueTask, get_task, label_order
from transformer.tokenization import BertTokenizer

# The original's names, in its order, and the tasks that it refused.
TASKS = ["mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "squad", "squad_v2", "cola", "rte", "wnli"]
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


def is_squad(task: str) -> bool:
    """Say whether a task asks for spans of a text, and not for a label."""
    return task in SQUAD_FILES


def model_arguments(task: str) -> tuple[type[nn.Module], dict[str, int]]:
    """Return the class of a task's models, and what it has to be built with."""
    if is_squad(task):
        return BertForQuestionAnswering, {}
    return TinyBertForSequenceClassification, {"num_labels": get_task(task).num_labels}


def default_length(task: str) -> int:
    """Return the longest input of a task in word pieces."""
    return SQUAD_LENGTH if is_squad(task) else get_task(task).max_seq_length


def data_folder(task: str) -> str:
    """Return the name of the folder that holds a task's files, below the others' folder."""
    return "squad" if is_squad(task) else get_task(task).folder


def load_data(
    task: str, data_dir: Path | str, tokenizer: BertTokenizer, max_seq_length: int,
    id2label: dict[int, str], device: torch.device,
) -> TaskData:
    """Read a task's training and dev rows; errors name file, line and value."""
    if is_squad(task):
        return _squad_data(task, data_dir, tokenizer, max_seq_length, device)
    return _glue_data(get_task(task), data_dir, tokenizer, max_seq_length, id2label, device)


def _glue_data(
    task: GlueTask, data_dir: Path | str, tokenizer: BertTokenizer, max_seq_length: int,
    id2label: dict[int, str], device: torch.device,
) -> TaskData:
    labels = label_order(task, id2label)
    rows = {split: load_features(task, data_dir, split, tokenizer, max_seq_length, labels,
                                 cache=True)
            for split in ("train", *task.dev_files)}
    train = rows.pop("train")
    return TaskData(train, lambda model: by_split(
        evaluate_splits(model, rows, task, device, EVAL_BATCH), "metrics"))


def _squad_data(
    task: str, data_dir: Path | str, tokenizer: BertTokenizer, max_seq_length: int,
    device: torch.device,
) -> TaskData:
    train = make_windows(
        read_squad(squad_path(task, data_dir, "train")), tokenizer, max_seq_length)
    questions = read_squad(squad_path(task, data_dir, "dev"))
    windows = make_windows(questions, tokenizer, max_seq_length)
    return TaskData(train.features, lambda model: {"dev": evaluate_squad(
        model, questions, windows, device, EVAL_BATCH, unanswerable=task == "squad_v2")})
