"""Checkpoints of BERT, of our students and of DistilBERT, as one kind of model."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, zeros

from transformer.checkpoint import load_state, weights_path
from transformer.config import NEUTRAL, BertConfig, find_config
from transformer.file_utils import UserError, read_json
from transformer.modeling import (
    BertForQuestionAnswering,
    BertPreTrainedModel,
    TinyBertForSequenceClassification,
)

HEAD_NAMES = {TinyBertForSequenceClassification: "classifier",
              BertForQuestionAnswering: "span head"}

# DistilBERT's names of what BERT has as well.
CONFIG_NAMES = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
    "activation": "hidden_act", "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob", "pad_token_id": "pad_token_id",
    "max_position_embeddings": "max_position_embeddings", "id2label": "id2label",
    "num_labels": "num_labels", "initializer_range": "initializer_range",
    **{name: name for name in ("label2id", "problem_type", *NEUTRAL)},
}
WEIGHT_NAMES = {
    "attention.q_lin": "attention.self.query", "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value", "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm", "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense", "output_layer_norm": "output.LayerNorm",
}
DISTILBERT_ACTIVATION = "relu"  # between `pre_classifier` and `classifier`, where BERT has tanh


def convert_config(values: dict[str, Any], source: Path) -> BertConfig:
    """Return the shape of a DistilBERT as that of a BERT whose pooler has a ReLU."""
    known = {ours: values[theirs] for theirs, ours in CONFIG_NAMES.items() if theirs in values}
    try:
        return BertConfig.from_dict({**known, "pooler_act": DISTILBERT_ACTIVATION})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def convert_weights(state: dict[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    """Return a DistilBERT's weights under BERT's names; its segment embeddings are zeros."""
    converted = {"bert.embeddings.token_type_embeddings.weight":
                 zeros(config.type_vocab_size, config.hidden_size)}
    for key, tensor in state.items():
        name = key.removeprefix("distilbert.")
        layer = re.fullmatch(r"transformer\.(layer\.\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            part = WEIGHT_NAMES.get(layer[2], layer[2])
            name = f"bert.encoder.{layer[1]}.{part}.{layer[3]}"
        elif name.startswith("embeddings."):
            name = f"bert.{name}"
        elif name.startswith("pre_classifier."):
            name = name.replace("pre_classifier", "bert.pooler.dense")
        converted[name] = tensor
    return converted


def is_distilbert(folder: Path | str) -> bool:
    """Say whether the `config.json` of a model directory is a DistilBERT's."""
    return read_json(find_config(folder)).get("model_type") == "distilbert"


def read_config(folder: Path | str) -> BertConfig:
    """Read the shape of a BERT, a student of ours or a DistilBERT, as that of a BERT."""
    path = find_config(folder)
    if is_distilbert(folder):
        return convert_config(read_json(path), path)
    return BertConfig.from_json_file(path)


def load_model(
    model_class: type[BertPreTrainedModel], folder: Path | str, **kwargs: Any
) -> BertPreTrainedModel:
    """Load a BERT, a student of ours or a DistilBERT strictly, its head included.

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
    if is_distilbert(folder):
        state = convert_weights(state, config)
    return model_class.from_state(config, state, folder, **kwargs)
