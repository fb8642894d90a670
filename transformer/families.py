"""Relatives of BERT: the same computation under other names.

RoBERTa (and XLM-RoBERTa, CamemBERT), ELECTRA, ALBERT and DistilBERT, their classifiers included,
are read into our BERT exactly and written back as what they are. Here stand the names, in
`config.json` and among the weights, and what is laid out differently:

* RoBERTa counts positions from pad_token_id + 1; the rows before that, which no token reads, are
  left out here and written as zeros;
* DistilBERT has no segments; here it has one, a row of zeros at first, which is added to the
  positions when written;
* the classifiers of all but ALBERT bring their own pooler, which a pre-trained model lacks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transformer.file_utils import UserError

WORDS, POSITIONS, SEGMENTS = (f"bert.embeddings.{kind}_embeddings.weight"
                              for kind in ("word", "position", "token_type"))
POOLER = "bert.pooler."
OUR_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
# How the names of a bare encoder begin, which lack the prefix.
BARE = ("embeddings.", "embeddings_project.", "encoder.", "transformer.", "pooler.")
SHAPES = ("embedding_size", "num_hidden_groups")  # fields that a BERT does not have


@dataclass(frozen=True)
class Family:
    """How a relative of BERT names what BERT has; every table is ours -> theirs.

    architecture: how the names of its classes begin, where BERT's have `Bert`
    prefix: of its encoder's parameters
    layer: how the parameters of a layer begin
    parts: of a layer, where they differ
    others: beginnings of further names, the first that fits
    head_pooler: the pooler that comes with the classifier; "": the encoder has one
    heads: of pre-training, which are not read
    fields: of `config.json`, where they differ
    defaults: of fields (ours), where they differ from BERT's
    fixed: fields of ours whose value is always this, and which its `config.json` lacks
    expected: fields of its `config.json` and the one value that is computed here
    shapes: which of `SHAPES` it has
    padded_positions: whether positions count from pad_token_id + 1
    """

    architecture: str
    prefix: str
    layer: str
    parts: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    head_pooler: str = ""
    heads: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[str, ...] = ()
    padded_positions: bool = False


def _roberta(architecture: str, **defaults: Any) -> Family:
    return Family(
        architecture, prefix="roberta.", layer="roberta.encoder.layer.{}.",
        others={"classifier.": "classifier.out_proj."}, head_pooler="classifier.dense.",
        heads=("lm_head.",), defaults={"pad_token_id": 1, **defaults}, padded_positions=True)


FAMILIES = {
    "roberta": _roberta("Roberta", vocab_size=50265),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "electra": Family(
        "Electra", prefix="electra.", layer="electra.encoder.layer.{}.",
        others={"bert.embeddings.project.": "electra.embeddings_project.",
                "classifier.": "classifier.out_proj."},
        head_pooler="classifier.dense.",
        heads=("discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
        defaults={"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4,
                  "intermediate_size": 1024},
        fixed={"pooler_act": "gelu"}, shapes=("embedding_size",)),
    "albert": Family(
        "Albert", prefix="albert.",
        layer="albert.encoder.albert_layer_groups.{}.albert_layers.0.",
        parts={"attention.self.query": "attention.query", "attention.self.key": "attention.key",
               "attention.self.value": "attention.value",
               "attention.output.dense": "attention.dense",
               "attention.output.LayerNorm": "attention.LayerNorm",
               "intermediate.dense": "ffn", "output.dense": "ffn_output",
               "output.LayerNorm": "full_layer_layer_norm"},
        others={"bert.embeddings.project.": "albert.encoder.embedding_hidden_mapping_in.",
                "bert.pooler.dense.": "albert.pooler."},
        heads=("predictions.", "sop_classifier."),
        defaults={"vocab_size": 30000, "embedding_size": 128, "hidden_size": 4096,
                  "num_hidden_groups": 1, "num_attention_heads": 64, "intermediate_size": 16384,
                  "hidden_act": "gelu_new", "hidden_dropout_prob": 0.0,
                  "attention_probs_dropout_prob": 0.0},
        expected={"inner_group_num": 1}, shapes=SHAPES),
    "distilbert": Family(
        "DistilBert", prefix="distilbert.", layer="distilbert.transformer.layer.{}.",
        parts={"attention.self.query": "attention.q_lin", "attention.self.key": "attention.k_lin",
               "attention.self.value": "attention.v_lin",
               "attention.output.dense": "attention.out_lin",
               "attention.output.LayerNorm": "sa_layer_norm",
               "intermediate.dense": "ffn.lin1", "output.dense": "ffn.lin2",
               "output.LayerNorm": "output_layer_norm"},
        head_pooler="pre_classifier.",
        heads=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
        fields={"hidden_size": "dim", "num_hidden_layers": "n_layers",
                "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim",
                "hidden_act": "activation", "hidden_dropout_prob": "dropout",
                "attention_probs_dropout_prob": "attention_dropout"},
        defaults={"num_hidden_layers": 6},
        fixed={"pooler_act": "relu", "type_vocab_size": 1, "layer_norm_eps": 1e-12}),
}


# ------------------------------------------------------------------ config.json


def _unread_positions(values: Mapping[str, Any]) -> int:
    """Return how many rows of positions no token reads, in a model with padded ones."""
    pad = values["pad_token_id"]
    if type(pad) is not int or pad < 0:
        raise UserError(f"pad_token_id is {pad!r}; expected a whole number from 0, after which the"
                        " positions are counted")
    return pad + 1


def our_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of any `config.json` under BERT's names, and `family` where it is none.

    Raises:
        UserError: a value with which the model computes something else.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        return dict(values)
    family = FAMILIES[name]
    for key, expected in family.expected.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{key} is {values[key]!r}, which changes what the model computes;"
                            f" expected {expected!r}")
    renamed = {ours: values[theirs] for ours, theirs in family.fields.items() if theirs in values}
    rest = {key: value for key, value in values.items() if key not in family.fields.values()}
    ours = {"max_position_embeddings": 512, **family.defaults, **rest, **renamed, **family.fixed,
            "family": name}
    positions = ours["max_position_embeddings"]
    if family.padded_positions and type(positions) is int:
        ours["max_position_embeddings"] = positions - _unread_positions(ours)
        if ours["max_position_embeddings"] < 1:
            raise UserError(f"max_position_embeddings is {positions}; expected more than"
                            f" pad_token_id + 1, {positions - ours['max_position_embeddings']}")
    # Only an ALBERT has a projection between equal widths.
    if name == "electra" and ours["embedding_size"] == ours["hidden_size"]:
        ours["embedding_size"] = None
    return ours


def foreign_fields(values: Mapping[str, Any]) -> set[str]:
    """Return which fields of ours no reader of such a `config.json` looks at."""
    name = values.get("model_type")
    if name in FAMILIES:
        return {*SHAPES} - {*FAMILIES[name].shapes}
    return {"embedding_size"} if name == "bert" and "family" not in values else set()


def their_config(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of `config.json` of a family, from those of a BERT; undoes `our_config`."""
    family, values = FAMILIES[name], dict(values)
    if family.padded_positions:
        values["max_position_embeddings"] += _unread_positions(values)
    if name == "electra":
        values.setdefault("embedding_size", values["hidden_size"])
    return {family.fields.get(key, key): value for key, value in values.items()
            if key not in {*family.fixed, "classifier_relu", "family"}}


def check_shape(name: str, values: Mapping[str, Any]) -> None:
    """Raise a `UserError` for fields, under BERT's names, that no model of the family has."""
    family = FAMILIES[name]
    for key, expected in family.fixed.items():
        if values[key] != expected:
            raise UserError(f"{key} is {values[key]!r}; expected {expected!r} for a model_type of"
                            f" {name!r}")
    for key in SHAPES:
        if key not in family.shapes and values[key] is not None:
            raise UserError(f"{key} is {values[key]!r}, which a model_type of {name!r} lacks")
        # An ELECTRA may do without a projection.
        if key in family.shapes and values[key] is None and name != "electra":
            raise UserError(f"{key} is missing; expected a whole number for a model_type of"
                            f" {name!r}")
    if family.padded_positions:
        _unread_positions(values)


def architecture(model_type: str, bert_class: str) -> str:
    """Return the Hugging Face class of a model type that is to it what `bert_class` is to BERT."""
    if model_type not in FAMILIES:
        return bert_class
    return re.sub("bert", FAMILIES[model_type].architecture, bert_class, count=1, flags=re.I)


def pooler_in_head(name: str) -> bool:
    """Say whether a family's pooler comes with its classifier, so that both are new together."""
    return name in FAMILIES and FAMILIES[name].head_pooler != ""


# ------------------------------------------------------------------ weights


def _renamed(key: str, table: Mapping[str, str]) -> str:
    """Replace the first beginning of `key` that the table has."""
    for old, new in table.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def their_key(name: str, key: str, has_classifier: bool = True) -> str:
    """Return a family's name of one of our parameters.

    `has_classifier` says whether the model has one: its pooler is named after it.
    """
    family = FAMILIES[name]
    if layer := OUR_LAYER.fullmatch(key):
        return f"{family.layer.format(layer[1])}{family.parts.get(layer[2], layer[2])}.{layer[3]}"
    pooler = {f"{POOLER}dense.": family.head_pooler} if (
        family.head_pooler and has_classifier) else {}
    return _renamed(key, {**pooler, **family.others, "bert.": family.prefix})


def our_key(name: str, key: str) -> str:
    """Return our name of a family's parameter, or of one of its bare encoder."""
    family = FAMILIES[name]
    key = family.prefix + key if key.startswith(BARE) else key
    layer = re.fullmatch(
        re.escape(family.layer).replace(r"\{\}", r"(\d+)") + r"(.+)\.(weight|bias)", key)
    if layer:
        parts = {theirs: ours for ours, theirs in family.parts.items()}
        return f"bert.encoder.layer.{layer[1]}.{parts.get(layer[2], layer[2])}.{layer[3]}"
    table = {theirs: ours for ours, theirs in family.others.items()}
    if family.head_pooler:
        table = {family.head_pooler: f"{POOLER}dense.", **table}
    return _renamed(key, {**table, family.prefix: "bert."})


def our_state(name: str, state: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Return a family's weights as those of our BERT, without heads of pre-training.

    Raises:
        UserError: the classifier is another one than that of whole rows.
    """
    family = FAMILIES[name]
    has_own = any(key.startswith(family.head_pooler or "classifier.") for key in state)
    out = family.others.get("classifier.", "classifier.")
    for key in ("classifier.weight", "classifier.bias"):
        if key in state and not key.startswith(out):
            raise UserError(f"holds {key}; expected {out}{key.rpartition('.')[2]}, of a classifier"
                            " of whole rows")
    unread = family.heads
    if family.head_pooler and has_own:  # the encoder's own is not used
        unread = (*unread, "pooler.", f"{family.prefix}pooler.")
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(unread):
            continue
        if (ours_name := our_key(name, key)) in ours:
            raise UserError(f"holds {key} twice, with the name of its encoder and without")
        ours[ours_name] = tensor
    if family.padded_positions and POSITIONS in ours:
        ours[POSITIONS] = ours[POSITIONS][pad_token_id + 1 :]
    if name == "distilbert" and WORDS in ours:
        ours[SEGMENTS] = torch.zeros_like(ours[WORDS][:1])
    return ours


def their_state(name: str, state: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Return the weights of our BERT as those of a family; undoes `our_state`."""
    state, family = dict(state), FAMILIES[name]
    if family.padded_positions:
        rows = state[POSITIONS]
        state[POSITIONS] = torch.cat([rows.new_zeros(pad_token_id + 1, rows.shape[1]), rows])
    if name == "distilbert":
        state[POSITIONS] = state[POSITIONS] + state.pop(SEGMENTS)
    has_classifier = any(key.startswith("classifier.") for key in state)
    return {their_key(name, key, has_classifier): tensor for key, tensor in state.items()}
