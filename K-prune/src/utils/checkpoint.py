"""Checkpoints that can be pruned: of BERT, its relatives and our students, with a trained head."""

from pathlib import Path
from typing import Any

from transformer.checkpoint import load_state, weights_path
from transformer.config import BertConfig, find_config
from transformer.file_utils import UserError
from transformer.modeling import (
    BertForQuestionAnswering,
    BertPreTrainedModel,
    TinyBertForSequenceClassification,
)

HEAD_NAMES = {TinyBertForSequenceClassification: "classifier",
              BertForQuestionAnswering: "span head"}


def read_config(folder: Path | str) -> BertConfig:
    """Read the shape of a model; one whose layers cannot be pruned one by one is refused."""
    config = BertConfig.from_json_file(find_config(folder))
    config.check_own_layers(folder, "pruning one would prune all")
    return config


def load_model(
    model_class: type[BertPreTrainedModel], folder: Path | str, **kwargs: Any
) -> BertPreTrainedModel:
    """Load a model strictly, its head included.

    Args:
        kwargs: passed on to the class.

    Raises:
        UserError: missing or damaged files, a checkpoint that does not fill the model, has no
            trained head, or was made by `quantize.py` in a format that cannot be pruned.
    """
    config, state = read_config(folder), load_state(folder)
    if not any(key.startswith(model_class.head) for key in state):
        raise UserError(f"{weights_path(folder)}: holds no trained {HEAD_NAMES[model_class]};"
                        " expected a model that was fine-tuned or distilled on a task")
    return model_class.from_state(config, state, folder, **kwargs)
