"""Small students: word embeddings and a bidirectional LSTM or GRU instead of a Transformer.

They have neither attention scores nor the hidden states of a BERT, so that they learn labels or
a teacher's logits. Every model directory that may hold one is read through `read_config` and
`classifier_class`.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from transformer.checkpoint import WORD_EMBEDDINGS, load_state
from transformer.config import BertConfig
from transformer.file_utils import UserError, read_json
from transformer.modeling import (
    Dropout,
    SequenceClassifier,
    TaskOutput,
    TinyBertForSequenceClassification,
)

LAYERS = {"bilstm": nn.LSTM, "bigru": nn.GRU}  # by `model_type`
# The fields of a BERT's config that a recurrent model has, too.
SHARED_FIELDS = (
    "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "hidden_dropout_prob",
    "max_position_embeddings", "type_vocab_size", "initializer_range", "pad_token_id",
    "classifier_relu", "num_labels", "id2label", "problem_type", "other")


@dataclass
class RecurrentConfig(BertConfig):
    """The shape of a recurrent classifier, read from and written to `config.json`.

    cell: its `model_type`, one of `LAYERS`
    embedding_size: width of the word embeddings
    hidden_size: width of each direction
    max_position_embeddings: the longest input; the model itself has no positions
    type_vocab_size: segments are not read; only the separators tell two texts apart
    """

    embedding_size: int = 128
    hidden_size: int = 128
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    cell: str = "bilstm"

    def __post_init__(self) -> None:
        if type(self.embedding_size) is not int or self.embedding_size < 1:
            raise UserError(f"embedding_size is {self.embedding_size!r}; expected a whole number"
                            " from 1")
        super().__post_init__()

    @property
    def model_type(self) -> str:
        return self.cell

    @classmethod
    def from_json_file(cls, path: Path | str) -> "RecurrentConfig":
        """Read a `config.json`; errors name the file."""
        values = read_json(path)
        if (cell := values.get("model_type")) not in LAYERS:
            raise UserError(f"{path}: model_type is {cell!r}; expected {' or '.join(LAYERS)}")
        if strange := sorted(values.keys() & BERT_FIELDS):
            raise UserError(f"{path}: {', '.join(strange)}: a {cell} has none; expected only"
                            f" {', '.join(SHARED_FIELDS[:-1])}")
        try:
            return cls.from_dict({**values, "cell": cell})
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `config.json`."""
        return {name: value for name, value in super().to_dict().items()
                if name not in {*BERT_FIELDS, "cell"}}


BERT_FIELDS = {item.name for item in fields(BertConfig)} - {*SHARED_FIELDS}


class RecurrentClassifier(SequenceClassifier):
    """A classifier on the last states of both directions: forward's at the end of the input,
    backward's at its beginning.

    Args:
        num_labels: size of the classifier; None means what the config says.
    """

    hugging_face_class = "RecurrentForSequenceClassification"
    config_class = RecurrentConfig

    def __init__(self, config: RecurrentConfig, num_labels: int | None = None) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        layers = config.num_hidden_layers
        self.recurrent = LAYERS[config.cell](
            config.embedding_size, config.hidden_size, layers, batch_first=True,
            bidirectional=True, dropout=config.hidden_dropout_prob if layers > 1 else 0.0)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.add_classifier(2 * config.hidden_size, num_labels)
        self.init_weights(self.word_embeddings, self.classifier)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, score_layers: Any = None,
    ) -> TaskOutput:
        """Classify rows [batch, length]; padding is not read. Scores and states are empty lists.

        `token_type_ids` and `score_layers` are there for who calls any classifier.

        Raises:
            UserError: an input that is too long, or one whose padding is not at its end.
        """
        length = input_ids.shape[1]
        self.config.check_length(length, "the model")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.cpu().bool()
        lengths = mask.sum(dim=1)  # [batch]
        if not torch.equal(mask, torch.arange(length) < lengths[:, None]) or not lengths.all():
            raise UserError("a row without tokens, or with padding before one; expected padding at"
                            " the end of each row")
        words = self.dropout(self.word_embeddings(input_ids))  # [batch, length, embedding]
        # In float32 whatever the rest computes in: a state's rounding errors would add up.
        with torch.autocast(input_ids.device.type, enabled=False):
            packed = pack_padded_sequence(
                words.float(), lengths, batch_first=True, enforce_sorted=False)
            state = self.recurrent(packed)[1]
        hidden = state[0] if isinstance(state, tuple) else state  # [2 x layers, batch, hidden]
        pooled = torch.cat([hidden[-2], hidden[-1]], dim=1)  # [batch, 2 x hidden]
        return TaskOutput(self.classify(self.dropout(pooled)), [], [])


# ------------------------------------------------------------------ either kind


def read_config(path: Path | str) -> BertConfig:
    """Read the `config.json` of a classifier: a `RecurrentConfig`, or a `BertConfig`."""
    is_recurrent = read_json(path).get("model_type") in LAYERS
    return (RecurrentConfig if is_recurrent else BertConfig).from_json_file(path)


def classifier_class(config: BertConfig) -> type[SequenceClassifier]:
    """Return the class of classifiers of this configuration."""
    is_recurrent = isinstance(config, RecurrentConfig)
    return RecurrentClassifier if is_recurrent else TinyBertForSequenceClassification


# ------------------------------------------------------------------ a teacher's word embeddings


def copy_embeddings(model: RecurrentClassifier, folder: Path | str) -> None:
    """Give a model the word embeddings of a BERT's directory, of the same vocabulary.

    Where the model's are narrower they are the BERT's `principal_components`.
    """
    state = load_state(folder)
    if WORD_EMBEDDINGS not in state:
        raise UserError(f"--copy_embeddings: {folder} holds no word embeddings of a BERT; expected"
                        " a BERT or a relative of it")
    weight = model.word_embeddings.weight
    vectors = principal_components(state[WORD_EMBEDDINGS].float(), weight.shape[1])
    with torch.no_grad():
        weight.copy_(vectors[: len(weight)])  # behind its vocabulary a BERT may be padded


def principal_components(vectors: Tensor, width: int) -> Tensor:
    """Return the `width` directions in which centred vectors [rows, any] differ most, as new ones.

    Equal widths leave the vectors as they are. Which way a direction points is fixed: its largest
    entry is positive.

    Raises:
        UserError: the vectors are narrower.
    """
    if vectors.shape[1] == width:
        return vectors
    if vectors.shape[1] < width:
        raise UserError(f"--copy_embeddings: the teacher's word embeddings are {vectors.shape[1]}"
                        f" wide, the student's embedding_size is {width}; expected at most theirs")
    centred = vectors.double() - vectors.double().mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -width:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))  # [1, width]
    return (centred @ (axes * largest.sign())).float()
