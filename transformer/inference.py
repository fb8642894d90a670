"""One way to load a trained classifier, whatever it was made into, and to know its labels."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from transformer.checkpoint import has_weights, load_state, weights_path
from transformer.config import BertConfig, find_config
from transformer.file_utils import ONNX_NAME, UserError, read_json
from transformer.modeling import SequenceClassifier
from transformer.own_tasks import stored_task
from transformer.recurrent import classifier_class, read_config
from transformer.tasks import Task, label_order
from transformer.tokenization import AnyTokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformer.onnx_model import OnnxClassifier

logger = logging.getLogger(__name__)


def match_labels(task: Task, config: BertConfig, path: Path) -> tuple[str, ...]:
    """Match a classifier's labels with a task's by its configuration alone, before its weights.

    Returns:
        The task's labels in the order of the classifier's outputs (see `label_order`).

    Raises:
        UserError: it has other labels, or another number of them; both are listed. Or it is no
            classifier of one label a row.
    """
    # Older files leave their number out: then the weights will tell.
    is_told = any(read_json(path).get(name) for name in ("id2label", "label2id", "num_labels"))
    if is_told and config.num_labels != task.num_labels:
        has, wants = ([*names][:12] for names in (config.id2label.values(), task.labels))
        raise UserError(f"{path}: its classifier has {config.num_labels} labels; expected"
                        f" {task.num_labels} for {task.name} (it has {has}, the task {wants})")
    config.check_task(path)
    warn_of_seen_rows(task, path.parent)
    try:
        return label_order(task, config.id2label)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_classifier(
    folder: Path, task: Task, max_seq_length: int, do_lower_case: bool | None = None
) -> tuple[BertConfig, AnyTokenizer, tuple[str, ...]]:
    """Read a classifier's configuration, tokenizer and labels (see `match_labels`); no weights.

    Raises:
        UserError: labels, vocabulary or rows of `max_seq_length` word pieces do not fit the model.
    """
    config = read_config(path := find_config(folder))
    labels = match_labels(task, config, path)
    tokenizer = load_tokenizer(folder, do_lower_case)
    config.check_vocabulary(len(tokenizer), folder)
    config.check_length(max_seq_length, folder)
    return config, tokenizer, labels


def warn_of_seen_rows(task: Task, folder: Path) -> None:
    """Warn where some rows that are held back now are rows that the model was trained on."""
    stored = stored_task(folder)
    if stored is None or stored.is_glue or stored.name != task.name:
        return
    if task.dev_share + task.test_share > stored.dev_share + stored.test_share + 1e-9:
        logger.warning(
            "!!! %s was trained with --dev_share %g --test_share %g, here they are %g and %g:"
            " scores on rows that it was trained on are too good. !!!", folder, stored.dev_share,
            stored.test_share, task.dev_share, task.test_share)


def note_task(config: BertConfig, task: Task, labels: tuple[str, ...]) -> None:
    """Write an own task and the names of its labels, in the order of the outputs, into a config.

    The models of GLUE's tasks keep the names that they have.
    """
    if not task.is_glue:
        config.other["finetuning_task"] = task.name
        if labels:
            config.set_labels(labels)


def load_classifier(
    model_dir: Path | str, num_labels: int | None = None, device: torch.device | None = None
) -> "SequenceClassifier | OnnxClassifier":
    """Load a trained classifier from a model directory.

    Its weights are PyTorch's, which all scripts read, or where there are none `model.onnx`. What
    comes back is called as a `SequenceClassifier` is.

    Args:
        model_dir: a directory that training or `quantize.py` wrote.
        num_labels: how many outputs the task needs; None: as many as there are.
        device: where an ONNX model should run; None: on the CPU. A PyTorch model is moved by `to`.

    Raises:
        UserError: missing or damaged files, no trained classifier, one of another size, or an
            ONNX file that does not fit `config.json`.
    """
    folder = Path(model_dir)
    if (folder / ONNX_NAME).is_file() and has_weights(folder):
        logger.warning("%s: not read; the weights beside it are", folder / ONNX_NAME)
    elif (folder / ONNX_NAME).is_file():
        from transformer.onnx_model import OnnxClassifier  # here: a second to load

        return OnnxClassifier(folder, num_labels, device)
    config, state = read_config(find_config(folder)), load_state(folder)
    if "classifier.weight" not in state:
        raise UserError(f"{weights_path(folder)}: holds no trained classifier; expected a model"
                        " that was fine-tuned or distilled on a task")
    return classifier_class(config).from_state(config, state, folder, num_labels=num_labels)
