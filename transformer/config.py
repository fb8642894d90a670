"""The shape of a BERT model: its `config.json`, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from transformer import families
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
ORDINARY = {"family": "bert", "pooler_act": "tanh", "heads_per_layer": None,
            "neurons_per_layer": None, "embedding_size": None, "num_hidden_groups": None,
            "problem_type": None}
OWN_TYPES = ("pruned_bert", "other_pooler_bert", "relu_head_bert", "shared_layer_bert",
             "projected_bert")  # which other programs refuse
MODEL_TYPES = ("bert", *families.FAMILIES, *OWN_TYPES)
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Fields of Hugging Face's that change what is computed, unless they are null or this.
NEUTRAL = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute",
           "pruned_heads": {}, "per_layer_config": {}, "quantization_config": {}, "auto_map": {}}
# Fields that are true of another program's files, and not written back.
FOREIGN = ("dtype", "torch_dtype", "attn_implementation", "tie_word_embeddings",
           "transformers_version")
DERIVED = ("label2id", "model_type", "architectures")  # written from the other fields
CONVERTED = ("num_labels", "id2label", "other")  # written in another form
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "intermediate_size", "max_position_embeddings", "type_vocab_size")
# What the values of fields may be, and how to say so.
LEGAL = {
    **dict.fromkeys(SIZES, (lambda value: type(value) is int and value >= 1,
                            "a whole number from 1")),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range",
                     "layer_norm_eps"), (lambda value: type(value) in (int, float)
                                         and 0 <= value <= 1, "a number from 0 to 1")),
    **dict.fromkeys(("hidden_act", "pooler_act"), (lambda value: value in list(ACTIVATIONS),
                                                   f"one of {sorted(ACTIVATIONS)}")),
    **dict.fromkeys(families.SHAPES, (lambda value: value is None or type(value) is int
                                      and value >= 1, "a whole number from 1")),
    "classifier_relu": (lambda value: type(value) is bool, "true or false"),
    "family": (lambda value: value in ("bert", *families.FAMILIES),
               f"one of bert, {', '.join(families.FAMILIES)}"),
    "problem_type": (lambda value: value in (None, *PROBLEM_TYPES),
                     f"null or one of {', '.join(PROBLEM_TYPES)}"),
    "num_labels": (lambda value: value is None or type(value) is int and value >= 0,
                   "a whole number"),
}


def label_table(names: Any) -> dict[int, str]:
    """Return the names of a classifier's outputs by their numbers; raises for an illegal table.

    Names that are numbers, as data sets have them, become strings.
    """
    try:
        table = {int(number): str(name) if type(name) in (int, float) else name
                 for number, name in names.items()}
    except (AttributeError, TypeError, ValueError):
        table = None
    if table is None or sorted(table) != [*range(len(names))] or len(
            {name for name in table.values() if isinstance(name, str)}) < len(names):
        raise UserError(f"id2label is {str(names)[:100]}; expected a name of its own for each of 0,"
                        " 1, 2, ...")
    return dict(sorted(table.items()))


def has_names(table: dict[int, str]) -> bool:
    """Say whether labels have other names than Hugging Face's defaults."""
    return any(name != f"LABEL_{number}" for number, name in table.items())


def join_labels(id2label: Any, label2id: Any) -> Any:
    """Return the label table of a `config.json`, from whichever of its two tables has names."""
    if not label2id:
        return id2label
    try:
        names = {int(number): name for name, number in label2id.items()}
    except (AttributeError, TypeError, ValueError):
        names = {}
    if len(names) < len(label2id):
        raise UserError(f"label2id is {str(label2id)[:100]}; expected a number of its own for each"
                        " name")
    if not id2label or not has_names(table := label_table(id2label)):
        return names if has_names(names) else id2label
    if has_names(names) and names != table:
        raise UserError(f"label2id is {str(label2id)[:100]}; expected what id2label says,"
                        f" {str(id2label)[:100]}")
    return id2label


@dataclass
class BertConfig:
    """The shape of a BERT model, read from and written to `config.json`.

    hidden_size: width of the hidden states; a multiple of `num_attention_heads`
    intermediate_size: width of the feed-forward layer
    classifier_relu: apply a ReLU between the pooler and the classifier, as the original TinyBERT
        did; false as in every Hugging Face BERT
    pooler_act: activation of the pooler; BERT's is tanh
    family: which relative of BERT `config.json` describes; it is written as such again
    embedding_size: width of the embeddings, which a linear layer then brings to hidden_size; None:
        they are that wide
    num_hidden_groups: how many different layers there are, each used several times in a row;
        None: all are
    heads_per_layer, neurons_per_layer: what pruning left of each layer's attention heads and
        feed-forward neurons, zero allowed; None: all. A head stays `head_width` wide
    num_labels, id2label: size and names of the classifier's outputs; names win
    problem_type: one of `PROBLEM_TYPES`; None: several labels, of which one is right. One label
        is a regression
    other: fields of a foreign config, which are written back. `classifier_dropout` is one of
        them: as in the original, training drops nothing before the classifier
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
    family: str = "bert"
    embedding_size: int | None = None
    num_hidden_groups: int | None = None
    heads_per_layer: list[int] | None = None
    neurons_per_layer: list[int] | None = None
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    problem_type: str | None = None
    other: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (is_legal, expected) in LEGAL.items():
            if not is_legal(value := getattr(self, name)):
                raise UserError(f"{name} is {value!r}; expected {expected}")
        for name, neutral in NEUTRAL.items():
            if (value := self.other.get(name)) not in (None, neutral):
                raise UserError(f"{name} is {str(value)[:100]!r}, which changes what a BERT"
                                f" computes; expected {neutral or None!r}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not a multiple of"
                            f" num_attention_heads {self.num_attention_heads}")
        if self.pad_token_id is not None and not (
                type(self.pad_token_id) is int
                and -self.vocab_size <= self.pad_token_id < self.vocab_size):
            raise UserError(f"pad_token_id is {self.pad_token_id!r}; expected null or a whole"
                            f" number below vocab_size {self.vocab_size}")
        for name, most in (("heads_per_layer", self.num_attention_heads),
                           ("neurons_per_layer", self.intermediate_size)):
            counts = getattr(self, name)
            if counts is not None and not (
                    isinstance(counts, list) and len(counts) == self.num_hidden_layers
                    and all(type(count) is int and 0 <= count <= most for count in counts)):
                raise UserError(f"{name} is {counts!r}; expected {self.num_hidden_layers} whole"
                                f" numbers from 0 to {most}")
        if self.num_hidden_groups is not None and (
                self.num_hidden_groups > self.num_hidden_layers or self.is_pruned):
            raise UserError(f"num_hidden_groups is {self.num_hidden_groups}; expected at most"
                            f" num_hidden_layers {self.num_hidden_layers}, and no pruned layers")
        if self.family != "bert":
            families.check_shape(self.family, vars(self))
        labels = 2 if self.num_labels is None else self.num_labels
        self.id2label = label_table(self.id2label or {i: f"LABEL_{i}" for i in range(labels)})
        self.num_labels = len(self.id2label)
        if self.num_labels == 1:
            if self.problem_type == "single_label_classification":
                raise UserError("problem_type is 'single_label_classification' and there is one"
                                " label; expected 'regression', or several labels")
            self.problem_type = self.problem_type or "regression"

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
    def layer_order(self) -> list[int]:
        """Of each layer in turn, the number of that whose weights it has."""
        groups = self.num_hidden_groups or self.num_hidden_layers
        return [int(layer / (self.num_hidden_layers / groups))
                for layer in range(self.num_hidden_layers)]

    @property
    def is_pruned(self) -> bool:
        return self.heads_per_layer is not None or self.neurons_per_layer is not None

    @property
    def model_type(self) -> str:
        """The name in `config.json`: one of our own for what other readers would not compute."""
        if self.is_pruned:
            return "pruned_bert"
        if self.family != "bert" and not self.classifier_relu:
            return self.family
        if self.pooler_act != "tanh":
            return "other_pooler_bert"
        if self.classifier_relu:
            return "relu_head_bert"
        if self.num_hidden_groups is not None:
            return "shared_layer_bert"
        return "bert" if self.embedding_size is None else "projected_bert"

    @property
    def is_tied(self) -> bool:
        """Whether a masked-LM head may be read that has no decoder of its own."""
        return self.other.get("tie_word_embeddings") is not False

    @property
    def is_multi_label(self) -> bool:
        """Whether each label is right or wrong by itself."""
        return self.problem_type == "multi_label_classification"

    @property
    def label2id(self) -> dict[str, int]:
        return {name: i for i, name in self.id2label.items()}

    def set_labels(self, names: Sequence[str]) -> None:
        """Name the outputs of a new classifier, in their order: one is right, or it is a score."""
        self.id2label = dict(enumerate(names))
        self.num_labels = len(self.id2label)
        self.problem_type = "regression" if self.num_labels == 1 else None

    def check_task(self, source: Path | str) -> None:
        """Raise a `UserError` for a trained classifier of no task that is known here."""
        if self.problem_type not in (None, "regression" if self.num_labels == 1
                                     else "single_label_classification"):
            raise UserError(f"{source}: problem_type is {self.problem_type!r} with"
                            f" {self.num_labels} labels; expected a classifier of one label a row")

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Describe a model of these layers of the present one, counted from 0."""
        if self.heads_per_layer is not None:
            self.heads_per_layer = [self.heads_per_layer[layer] for layer in layers]
        if self.neurons_per_layer is not None:
            self.neurons_per_layer = [self.neurons_per_layer[layer] for layer in layers]
        self.num_hidden_layers = len(layers)

    def check_own_layers(self, source: Path | str, why: str) -> None:
        """Raise a `UserError` where layers share their weights, so that none can be changed."""
        if self.num_hidden_groups is not None:
            raise UserError(f"{find_config(source)}: num_hidden_groups is"
                            f" {self.num_hidden_groups}: its layers share their weights; {why}")

    def fits_vocabulary(self, pieces: int) -> bool:
        """Say whether a vocabulary of `pieces` word pieces fits this model.

        The embedding may be padded by fewer than 128 rows, as some toolkits do.
        """
        return pieces <= self.vocab_size < pieces + 128

    def check_vocabulary(
        self, pieces: int, source: Path | str, model: Path | str | None = None
    ) -> None:
        """Raise a `UserError` unless the vocabulary of `source`, of `pieces`, fits this model.

        `model` is the directory of a model whose vocabulary is another's, a student's.
        """
        if self.fits_vocabulary(pieces):
            return
        if model is not None:
            raise UserError(f"{find_config(model)}: vocab_size is {self.vocab_size}; expected"
                            f" that of {source}, {pieces} word pieces")
        raise UserError(f"{source}: its vocabulary has {pieces} word pieces;"
                        f" the model expects {self.vocab_size}")

    def check_length(self, length: int, source: Path | str) -> None:
        """Raise a `UserError` unless the model has positions for `length` word pieces."""
        if length > self.max_position_embeddings:
            raise UserError(f"--max_seq_length {length}; {source} has"
                            f" {self.max_position_embeddings} positions")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BertConfig":
        """Build a config from the fields of a `config.json`, of BERT or of a relative."""
        values = families.our_config(values)
        names = {item.name for item in fields(cls)} - {"other"}
        names -= families.foreign_fields(values)
        other = {name: value for name, value in values.items() if name not in {*names, *DERIVED}}
        labels = join_labels(values.get("id2label"), values.get("label2id"))
        known = {name: values[name] for name in names & values.keys()}
        return cls(**{**known, "id2label": labels}, other=other)

    @classmethod
    def from_json_file(cls, path: Path | str) -> "BertConfig":
        """Read a `config.json`; errors name the file."""
        values = read_json(path)
        if values.get("model_type", "bert") not in MODEL_TYPES:
            raise UserError(f"{path}: model_type is {values['model_type']!r}; expected 'bert' or a"
                            f" relative of it: {', '.join(families.FAMILIES)} (any classifier may"
                            " be a teacher of task_distill.py --pred_distill)")
        if "ForMultipleChoice" in str(values.get("architectures")):  # has a classifier's names
            raise UserError(f"{path}: architectures is {values['architectures']}, whose score"
                            " compares rows; expected a model that reads each alone")
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `config.json`: Hugging Face's, of BERT or of a relative."""
        values = {name: value for name, value in vars(self).items()
                  if name not in CONVERTED and (name not in ORDINARY or value != ORDINARY[name])}
        other = {name: value for name, value in self.other.items()
                 if name not in FOREIGN and not name.startswith("_")}
        labels = {str(i): name for i, name in self.id2label.items()}
        if self.model_type in families.FAMILIES:
            values = families.their_config(values, self.model_type)
        return {"model_type": self.model_type, **other, **values,
                "num_labels": self.num_labels, "id2label": labels, "label2id": self.label2id}


def is_supported(source: Path | str) -> bool:
    """Say whether our BERT computes the model of a directory, by its model_type."""
    values = read_json(find_config(source))
    family = families.FAMILIES.get(str(values.get("model_type")))
    return values.get("model_type", "bert") in MODEL_TYPES and (family is None or all(
        values.get(name, expected) == expected for name, expected in family.expected.items()))


def find_config(directory: Path | str) -> Path:
    """Return the config file of a model or config directory (or the file itself)."""
    path = Path(directory)
    path = path if path.is_file() else path / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a model's {CONFIG_NAME}")
    return path
