"""The shape of a BERT model: its `config.json`, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from transformer.file_utils import CONFIG_NAME, UserError, read_json

ACTIVATIONS = {
    "gelu": F.gelu,  # the exact one, with erf, as BERT
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
# Fields that an ordinary BERT's config does not have, and what they are there.
ORDINARY = {"pooler_act": "tanh", "heads_per_layer": None, "neurons_per_layer": None}
MODEL_TYPES = ("bert", "pruned_bert")
DERIVED = ("label2id", "model_type", "architectures")  # written from the other fields
CONVERTED = ("num_labels", "id2label", "other")  # written in another form


@dataclass
class BertConfig:
    """The shape of a BERT model, read from and written to `config.json`.

    hidden_size: width of the hidden states; a multiple of `num_attention_heads`
    intermediate_size: width of the feed-forward layer
    classifier_relu: apply a ReLU between the pooler and the classifier, as the original TinyBERT
        did; false as in every Hugging Face BERT
    pooler_act: activation of the pooler; BERT's is tanh, that of a converted DistilBERT relu
    heads_per_layer, neurons_per_layer: what pruning left of each layer's attention heads and
        feed-forward neurons, zero allowed; None: all. A head stays `head_width` wide
    num_labels, id2label: size and names of the classifier's outputs; names win
    other: fields of a foreign config, which are written back
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    classifier_relu: bool = False
    pooler_act: str = "tanh"
    heads_per_layer: list[int] | None = None
    neurons_per_layer: list[int] | None = None
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    other: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size", "max_position_embeddings", "type_vocab_size"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise UserError(f"{name} is {size!r}; expected a whole number from 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not a multiple of"
                            f" num_attention_heads {self.num_attention_heads}")
        for activation in (self.hidden_act, self.pooler_act):
            if activation not in ACTIVATIONS:
                raise UserError(f"activation {activation!r}; expected one of {sorted(ACTIVATIONS)}")
        for name, most in (("heads_per_layer", self.num_attention_heads),
                           ("neurons_per_layer", self.intermediate_size)):
            counts = getattr(self, name)
            if counts is not None and not (
                    isinstance(counts, list) and len(counts) == self.num_hidden_layers
                    and all(type(count) is int and 0 <= count <= most for count in counts)):
                raise UserError(f"{name} is {counts!r}; expected {self.num_hidden_layers} whole"
                                f" numbers from 0 to {most}")
        labels = 2 if self.num_labels is None else self.num_labels
        names = self.id2label or {i: f"LABEL_{i}" for i in range(labels)}
        self.id2label = {int(i): name for i, name in names.items()}
        self.num_labels = len(self.id2label)

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def heads(self) -> list[int]:
        """The number of attention heads of each layer."""
        return self.heads_per_layer or [self.num_attention_heads] * self.num_hidden_layers

    @property
    def neurons(self) -> list[int]:
        """The number of feed-forward neurons of each layer."""
        return self.neurons_per_layer or [self.intermediate_size] * self.num_hidden_layers

    @property
    def model_type(self) -> str:
        """The name in `config.json`: `pruned_bert` for what only this package can build."""
        ordinary = all(getattr(self, name) == value for name, value in ORDINARY.items())
        return "bert" if ordinary else "pruned_bert"

    @property
    def label2id(self) -> dict[str, int]:
        return {name: i for i, name in self.id2label.items()}

    def set_labels(self, names: Sequence[str]) -> None:
        """Name the classifier's outputs, in their order."""
        self.id2label = dict(enumerate(names))
        self.num_labels = len(self.id2label)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Describe a model of these layers of the present one, counted from 0."""
        if self.heads_per_layer is not None:
            self.heads_per_layer = [self.heads_per_layer[layer] for layer in layers]
        if self.neurons_per_layer is not None:
            self.neurons_per_layer = [self.neurons_per_layer[layer] for layer in layers]
        self.num_hidden_layers = len(layers)

    def check_vocabulary(self, pieces: int, source: Path | str) -> None:
        """Raise a `UserError` unless a vocabulary of `pieces` word pieces fits this model.

        The embedding may be padded by fewer than 128 rows, as some toolkits do.
        """
        if not pieces <= self.vocab_size < pieces + 128:
            raise UserError(f"{source}: its vocabulary has {pieces} word pieces;"
                            f" the model expects {self.vocab_size}")

    def check_length(self, length: int, source: Path | str) -> None:
        """Raise a `UserError` unless the model has positions for `length` word pieces."""
        if length > self.max_position_embeddings:
            raise UserError(f"--max_seq_length {length}; {source} has"
                            f" {self.max_position_embeddings} positions")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BertConfig":
        """Build a config from the fields of a `config.json`."""
        names = {item.name for item in fields(cls)} - {"other"}
        other = {name: value for name, value in values.items() if name not in {*names, *DERIVED}}
        return cls(**{name: values[name] for name in names & values.keys()}, other=other)

    @classmethod
    def from_json_file(cls, path: Path | str) -> "BertConfig":
        """Read a `config.json`; errors name the file."""
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object with the shape of a BERT")
        if values.get("model_type", "bert") not in MODEL_TYPES:
            raise UserError(f"{path}: model_type is {values['model_type']!r}; expected 'bert'")
        try:
            return cls.from_dict(values)
        except (UserError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `config.json`; an ordinary BERT's are those of Hugging Face."""
        values = {name: value for name, value in vars(self).items()
                  if name not in CONVERTED and (name not in ORDINARY or value != ORDINARY[name])}
        labels = {str(i): name for i, name in self.id2label.items()}
        return {"model_type": self.model_type, **self.other, **values,
                "num_labels": self.num_labels, "id2label": labels, "label2id": self.label2id}


def find_config(directory: Path | str) -> Path:
    """Return the config file of a model or config directory (or the file itself)."""
    path = Path(directory)
    path = path if path.is_file() else path / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a model's {CONFIG_NAME}")
    return path
