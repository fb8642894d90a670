"""BERT and its TinyBERT students, parts before whole.

Parameter names are those of the original and of Hugging Face, so checkpoints of either load.
Every model returns what distillation needs: raw attention scores and all hidden states.
"""

import copy
import dataclasses
import logging
import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import families
from transformer.checkpoint import has_weights, key_list, load_state, load_weights
from transformer.config import ACTIVATIONS, BertConfig, find_config, has_names
from transformer.file_utils import CONFIG_NAME, UserError, read_json

if TYPE_CHECKING:
    from transformer.tokenization import AnyTokenizer

logger = logging.getLogger(__name__)

FLOAT_LAYERS = ("classifier", "qa_outputs", "recurrent")  # of frozen models, in any precision
MASKED_SCORE = -10000.0  # added to the raw scores of padding, as in the original
FUSED_HEAD_MULTIPLE = 8  # head widths that the fused attention kernels of a GPU take

# Of layers whose heads or neurons were all pruned; PyTorch computes them as any other.
warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")


# ------------------------------------------------------------------ layers


class Dropout(nn.Module):
    """Dropout that takes 16 random bits a value on a CPU.

    Drawing random numbers is nearly all that dropout costs there, and `F.dropout` draws 32 bits
    or more for each value: this is 3 times as fast. The probability is exact to 1/65536.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu" or self.probability == 1 or torch.compiler.is_compiling():
            return F.dropout(x, self.probability)
        return x * self.scaled_mask(x.shape, x.dtype)

    @torch.no_grad()
    def scaled_mask(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return random values of 0 (dropped) and 1 / (1 - probability) (kept)."""
        count = shape.numel()
        words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        values = words.view(torch.int16)[:count].view(shape)  # each from -32768 to 32767
        threshold = round(self.probability * 2**16) - 2**15
        mask = torch.ge(values, threshold, out=torch.empty(shape, dtype=dtype))
        return mask.mul_(1 / (1 - self.probability))


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float
) -> Tensor:
    """Attend without keeping the scores; all [batch, heads, length, head width].

    Heads whose width the kernels do not take (TinyBERT4's 26) are padded with zeros, which
    changes neither scores nor context.
    """
    width = query.shape[-1]
    if padding := -width % FUSED_HEAD_MULTIPLE:
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    context = F.scaled_dot_product_attention(
        query, key, value, mask.to(query.dtype), dropout, scale=1 / math.sqrt(width))
    return context[..., :width]


class BertEmbeddings(nn.Module):
    """Sum of word, position and segment embeddings, normalised.

    A model of one type of segments reads none. Narrower embeddings are brought to the model's
    width at the end (ALBERT, small ELECTRA).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.project = None if config.embedding_size is None else nn.Linear(
            width, config.hidden_size)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        embeddings = self.word_embeddings(input_ids)  # [batch, length, hidden]
        embeddings = embeddings + self.position_embeddings.weight[:length]
        embeddings = embeddings + (
            self.token_type_embeddings.weight if len(self.token_type_embeddings.weight) == 1
            else self.token_type_embeddings(token_type_ids))
        embeddings = self.dropout(self.LayerNorm(embeddings))
        return embeddings if self.project is None else self.project(embeddings)


def softmax(scores: Tensor) -> Tensor:
    """Return the attention probabilities of scores; the last dimension is that of the keys.

    A CPU's bfloat16 kernel treats what exceeds a multiple of 32 keys one by one and takes up to 5
    times as long there; float32 and rounding differ from it in the last bit of 1 value in 100,000.
    """
    keys = scores.shape[-1]
    if scores.device.type != "cpu" or keys < 16 or keys % 32 == 0:
        return scores.softmax(dim=-1)
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


class BertSelfAttention(nn.Module):
    """Multi-head attention that returns its scores before the softmax where they are wanted."""

    def __init__(self, config: BertConfig, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = config.head_width
        self.query = nn.Linear(config.hidden_size, heads * self.head_width)
        self.key = nn.Linear(config.hidden_size, heads * self.head_width)
        self.value = nn.Linear(config.hidden_size, heads * self.head_width)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def split_heads(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, self.heads, self.head_width).transpose(1, 2)

    def forward(
        self, hidden: Tensor, mask: Tensor, need_scores: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        query = self.split_heads(self.query(hidden))  # [batch, heads, length, head width]
        key = self.split_heads(self.key(hidden))
        value = self.split_heads(self.value(hidden))
        if not need_scores and self.heads and hidden.device.type == "cuda":
            dropout = self.dropout.probability if self.training else 0.0
            context = fused_attention(query, key, value, mask, dropout)
            return context.transpose(1, 2).flatten(start_dim=2), None
        # Also where nobody wants the scores on a CPU: its fused kernel is slower than this one
        # (bf16: by half at length 128, and 4 to 10 times in training).
        scores = self.scores(query, key, mask)  # [batch, heads, length, length]
        attention = self.dropout(softmax(scores))
        context = (attention @ value).transpose(1, 2)  # [batch, length, heads, head width]
        return context.flatten(start_dim=2), scores if need_scores else None

    def scores(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        """Return query key^T / sqrt(head width) + mask, as one operation."""
        batch, heads, length, _ = query.shape
        scores = torch.baddbmm(
            mask.expand(batch, heads, 1, length).flatten(0, 1),
            query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2),
            alpha=1 / math.sqrt(self.head_width))
        return scores.view(batch, heads, length, length)


class BertOutput(nn.Module):
    """Output projection of a sub-layer's units, added to its input and normalised."""

    def __init__(self, config: BertConfig, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, units: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(units)) + residual)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig, heads: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, heads)
        self.output = BertOutput(config, heads * config.head_width)

    def forward(
        self, hidden: Tensor, mask: Tensor, need_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        context, scores = self.self(hidden, mask, need_scores)
        return self.output(context, hidden), scores


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig, neurons: int) -> None:
        super().__init__()
        self.neurons = neurons
        self.dense = nn.Linear(config.hidden_size, neurons)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))  # [batch, length, neurons]


class BertLayer(nn.Module):
    """One Transformer layer: attention, then the feed-forward network."""

    def __init__(self, config: BertConfig, heads: int, neurons: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, heads)
        self.intermediate = BertIntermediate(config, neurons)
        self.output = BertOutput(config, neurons)

    def forward(
        self, hidden: Tensor, mask: Tensor, need_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended, scores = self.attention(hidden, mask, need_scores)
        return self.output(self.intermediate(attended), attended), scores


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.order = config.layer_order
        self.layer = nn.ModuleList(
            BertLayer(config, config.heads[number], config.neurons[number])
            for number in range(config.num_hidden_groups or config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, mask: Tensor, score_layers: Collection[int] | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        all_hidden, all_scores = [hidden], []
        for number, place in enumerate(self.order):
            need_scores = score_layers is None or number in score_layers
            hidden, scores = self.layer[place](hidden, mask, need_scores)
            all_hidden.append(hidden)
            all_scores.append(scores)
        return all_hidden, all_scores


class BertPooler(nn.Module):
    """A tanh layer on the hidden state of [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.pooler_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden[:, 0]))  # [batch, hidden]


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden)))


class BertLMPredictionHead(nn.Module):
    """The masked-LM head; its decoder shares the weight of the word embeddings."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = word_embeddings.weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden)) + self.bias


# ------------------------------------------------------------------ models


def model_inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what every model is called with: ids, segments and mask, each [batch, length]."""
    return batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]


class BertModelOutput(NamedTuple):
    """What `BertModel` returns.

    hidden_states: layers + 1 tensors [batch, length, hidden], the embeddings first.
    attention_scores: layers tensors [batch, heads, length, length], raw, before the softmax;
        keys that are padding carry -10000. None for a layer whose scores were not asked for.
    pooled_output: [batch, hidden], or None for a model without a pooler.
    """

    hidden_states: list[Tensor]
    attention_scores: list[Tensor | None]
    pooled_output: Tensor | None


class PretrainingStudentOutput(NamedTuple):
    """What `TinyBertForPreTraining` returns: all layers, hidden states at the teacher's width."""

    attention_scores: list[Tensor | None]
    hidden_states: list[Tensor]


class TaskOutput(NamedTuple):
    """What models with the head of a task return.

    logits: float32 [batch, labels], or for question answering [batch, length, 2].
    attention_scores, hidden_states: those of `BertModelOutput`.
    """

    logits: Tensor
    attention_scores: list[Tensor | None]
    hidden_states: list[Tensor]


class MaskedLMOutput(NamedTuple):
    """What `BertForMaskedLM` returns.

    logits: [batch, length, vocab], or [count, vocab] where positions were chosen.
    loss: the mean cross-entropy over the labelled tokens; None without labels.
    """

    logits: Tensor
    loss: Tensor | None


def scratch_config(
    config_dir: Path | str, tokenizer: "AnyTokenizer | None" = None,
    config_class: type[BertConfig] = BertConfig,
) -> BertConfig:
    """Read the `config.json` of a directory for a model with random weights.

    Where the directory holds no weights, a vocab_size that is missing or does not fit the
    tokenizer, a pad_token_id that is another token's, and the number of segments give way to it.
    """
    path = find_config(config_dir)
    config, stated = config_class.from_json_file(path), "vocab_size" in read_json(path)
    if tokenizer is None or has_weights(path.parent):
        return config
    fits = stated and config.fits_vocabulary(len(tokenizer))
    segments = config.type_vocab_size
    if config.family != "distilbert":  # which has none
        segments = max(2, segments) if tokenizer.segments else 1
    return dataclasses.replace(
        config, vocab_size=config.vocab_size if fits else len(tokenizer),
        pad_token_id=tokenizer.pad_id, type_vocab_size=segments)


class BertPreTrainedModel(nn.Module):
    """Initialisation and loading that all models share."""

    hugging_face_class = "BertModel"
    config_class = BertConfig
    # Parameters that a checkpoint may always lack, and those of a head that the caller asks for.
    optional: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    only_distillation: tuple[str, ...] = ()  # what a finished model is saved without

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config

    def init_weights(self, *parts: nn.Module) -> None:
        """Initialise new parts as BERT: normal weights, zero biases."""
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def parameter_total(self) -> int:
        """The number of parameters that a finished model has."""
        return sum(parameter.numel() for name, parameter in self.named_parameters()
                   if not name.startswith(self.only_distillation))

    @classmethod
    def check_family(cls, config: BertConfig, path: Path | str) -> None:
        """Raise a `UserError` for a relative of BERT whose head is not computed here."""

    @classmethod
    def from_scratch(
        cls, config_dir: Path | str, tokenizer: "AnyTokenizer | None" = None, **kwargs: Any
    ) -> "BertPreTrainedModel":
        """Build a model with random weights from the `config.json` of a directory.

        `tokenizer` is that of `scratch_config`; a vocab_size that gives way to it is logged.
        """
        config = scratch_config(config_dir, tokenizer, cls.config_class)
        cls.check_family(config, path := find_config(config_dir))
        stated = read_json(path).get("vocab_size", "missing")
        if tokenizer is not None and stated != config.vocab_size:
            logger.info("%s: vocab_size is %s; the model takes the vocabulary's, %d (pad_token_id"
                        " %s, type_vocab_size %d)", path, stated, config.vocab_size,
                        config.pad_token_id, config.type_vocab_size)
        return cls(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls, model_dir: Path | str, new_head: bool = False, **kwargs: Any
    ) -> "BertPreTrainedModel":
        """Load a model directory strictly: every parameter must come from the checkpoint.

        Args:
            model_dir: directory with `config.json` and `pytorch_model.bin` or
                `model.safetensors`.
            new_head: the caller wants a freshly initialised head where the checkpoint has none.
            kwargs: passed on to the class.

        Raises:
            UserError: missing or damaged files, or a checkpoint that does not fill the model.
        """
        config = cls.config_class.from_json_file(path := find_config(model_dir))
        cls.check_family(config, path)
        return cls.from_state(config, load_state(model_dir), model_dir, new_head, **kwargs)

    @classmethod
    def from_state(
        cls, config: BertConfig, state: dict[str, Tensor], source: Path | str,
        new_head: bool = False, **kwargs: Any,
    ) -> "BertPreTrainedModel":
        """Build a model of `config` from weights that `load_state` read, as `from_pretrained`."""
        stored = cls.stored_sizes(state)
        given = {name: value for name, value in kwargs.items() if value is not None}
        labels, wanted = stored.get("num_labels"), given.get("num_labels")
        if None not in (labels, wanted) and labels != wanted:
            raise UserError(f"{source}: its classifier has {labels} labels; expected {wanted}")
        if labels not in (None, config.num_labels) and has_names(config.id2label):
            raise UserError(f"{source}: its classifier has {labels} labels; its {CONFIG_NAME} names"
                            f" {config.num_labels}")
        if wanted is not None and labels is not None:
            config.check_task(source)
        model = cls(config, **{**stored, **given})
        if wanted is not None and labels is None:
            config.set_labels([*config.id2label.values()])
        optional = cls.optional + (cls.head if new_head else ())
        if labels is None and families.pooler_in_head(config.family):
            optional += (families.POOLER,)
            if cls.head:  # it is new as well, whatever the encoder had
                state = {key: tensor for key, tensor in state.items()
                         if not key.startswith(families.POOLER)}
        missing = load_weights(model, state, source, optional)
        # Of a map to no teacher's width (`fit_size`) nobody needs to know: it is not used.
        new = [key for key in missing if "fit_size" in given or not key.startswith(cls.optional)]
        if new:
            logger.info("%s: not in the checkpoint, newly initialised: %s", source, key_list(new))
        return model

    @classmethod
    def stored_sizes(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the class that the checkpoint tells and the config does not."""
        return {}


class BertModel(BertPreTrainedModel):
    """The encoder: embeddings, Transformer layers and (unless told otherwise) the pooler."""

    def __init__(self, config: BertConfig, add_pooler: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooler else None
        self.init_weights(self)

    @classmethod
    def stored_sizes(cls, state):
        return {"add_pooler": "bert.pooler.dense.weight" in state}

    def forward(
        self,
        input_ids: Tensor,  # [batch, length]
        token_type_ids: Tensor | None = None,  # [batch, length], 0 or 1
        attention_mask: Tensor | None = None,  # [batch, length], 1 for real tokens
        score_layers: Collection[int] | None = None,  # whose scores to return; None: all
    ) -> BertModelOutput:
        self.config.check_length(input_ids.shape[1], "the model")
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * MASKED_SCORE
        all_hidden, all_scores = self.encoder(hidden, mask, score_layers)
        pooled = None if self.pooler is None else self.pooler(all_hidden[-1])
        return BertModelOutput(all_hidden, all_scores, pooled)


class BertForMaskedLM(BertPreTrainedModel):
    """BERT with its masked-LM head (data augmentation, masked-LM training)."""

    hugging_face_class = "BertForMaskedLM"
    head = ("cls.predictions.bias", "cls.predictions.transform.")

    @classmethod
    def check_family(cls, config, path):
        if config.family != "bert" or config.embedding_size is not None:
            raise UserError(f"{path}: model_type is {config.model_type!r}, whose masked-LM head is"
                            " not computed here; expected a BERT")

    def __init__(self, config: BertConfig, add_pooler: bool = True) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooler)
        self.cls = nn.ModuleDict({
            "predictions": BertLMPredictionHead(config, self.bert.embeddings.word_embeddings)})
        self.init_weights(self.cls["predictions"].transform)

    @classmethod
    def stored_sizes(cls, state):
        return BertModel.stored_sizes(state)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_positions: Tensor | tuple[Tensor, Tensor] | None = None,
        labels: Tensor | None = None,  # [batch, length], -100 is ignored
    ) -> MaskedLMOutput:
        """Compute the logits of all positions, or of `masked_positions` or labelled ones only.

        `masked_positions` is a mask [batch, length], or the indices of rows and of positions.
        """
        output = self.bert(input_ids, token_type_ids, attention_mask, score_layers=())
        hidden = output.hidden_states[-1]
        if labels is not None:
            masked_positions = labels != -100
        if masked_positions is not None:
            hidden = hidden[masked_positions]  # [count, hidden]
        logits = self.cls["predictions"](hidden).float()
        loss = None if labels is None else F.cross_entropy(logits, labels[masked_positions])
        return MaskedLMOutput(logits, loss)


class _FittedModel(BertPreTrainedModel):
    """A student: its hidden states are mapped to the teacher's width by `fit_dense` (W_h, W_e).

    One map serves all layers, as in the original code. Checkpoints with a map per layer
    (`fit_denses.0`, ...) are loaded as such.
    """

    optional = ("fit_dense.",)

    def add_fit_dense(self, fit_size: int | None, per_layer: bool) -> None:
        width = self.config.hidden_size
        fit_size = width if fit_size is None else fit_size
        if per_layer:
            layers = self.config.num_hidden_layers + 1
            self.fit_denses = nn.ModuleList(nn.Linear(width, fit_size) for _ in range(layers))
        else:
            self.fit_dense = nn.Linear(width, fit_size)
        for fit in self.fit_denses if per_layer else [self.fit_dense]:
            self.init_weights(fit)
            if width == fit_size:  # equal widths need no map: start from the identity
                nn.init.eye_(fit.weight)

    def fit_hidden(self, hidden_states: list[Tensor]) -> list[Tensor]:
        """Map all hidden states to the teacher's width, [batch, length, teacher width]."""
        if hasattr(self, "fit_denses"):
            return [f(h) for f, h in zip(self.fit_denses, hidden_states, strict=True)]
        return [self.fit_dense(h) for h in hidden_states]

    @classmethod
    def stored_sizes(cls, state):
        per_layer = "fit_denses.0.weight" in state
        stored = state.get("fit_denses.0.weight" if per_layer else "fit_dense.weight")
        return {"per_layer_fit": per_layer, "fit_size": None if stored is None else len(stored)}


class TinyBertForPreTraining(_FittedModel):
    """The student of general distillation.

    Args:
        fit_size: the teacher's width; None means the student's own.
    """

    def __init__(
        self, config: BertConfig, fit_size: int | None = None, per_layer_fit: bool = False
    ) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.add_fit_dense(fit_size, per_layer_fit)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, score_layers: Collection[int] | None = None,
    ) -> PretrainingStudentOutput:
        output = self.bert(input_ids, token_type_ids, attention_mask, score_layers)
        return PretrainingStudentOutput(
            output.attention_scores, self.fit_hidden(output.hidden_states))


class SequenceClassifier(BertPreTrainedModel):
    """What classifiers of whole inputs share: a linear layer, `classifier`, on a pooled output."""

    head = ("classifier.",)

    def add_classifier(self, inputs: int, num_labels: int | None) -> None:
        """Add the linear layer; `num_labels` is its size, None: what the config says."""
        if num_labels is not None and num_labels != self.config.num_labels:
            self.config.set_labels(tuple(f"LABEL_{i}" for i in range(num_labels)))
        self.classifier = nn.Linear(inputs, self.config.num_labels)

    @classmethod
    def stored_sizes(cls, state):
        stored = state.get("classifier.weight")
        labels = None if stored is None else len(stored)
        return {"num_labels": labels, **super().stored_sizes(state)}

    def renew_classifier(self, num_labels: int) -> None:
        """Replace the classifier by a random one of `num_labels` outputs without names."""
        self.config.set_labels(tuple(f"LABEL_{i}" for i in range(num_labels)))
        self.classifier = nn.Linear(self.classifier.in_features, num_labels)
        self.init_weights(self.classifier)

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits [batch, labels] for a pooled output [batch, width]."""
        if self.config.classifier_relu:
            # Kept from the original: only where the config asks for it.
            pooled = torch.relu(pooled)
        # In float32 whatever the rest computes in: bfloat16 scores would come in steps of 1/64.
        with torch.autocast(pooled.device.type, enabled=False):
            return self.classifier(pooled.float())


class TinyBertForSequenceClassification(SequenceClassifier, _FittedModel):
    """A classifier on the pooled output; teacher and student of task distillation.

    Args:
        num_labels: size of the classifier; None means what the config says.
        fit_size: the teacher's width; None means the model's own.
    """

    hugging_face_class = "BertForSequenceClassification"
    only_distillation = ("fit_dense.", "fit_denses.")
    only_cls_reaches_head = True  # of the last layer's output

    def __init__(
        self, config: BertConfig, num_labels: int | None = None, fit_size: int | None = None,
        per_layer_fit: bool = False,
    ) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.add_classifier(config.hidden_size, num_labels)
        self.add_fit_dense(fit_size, per_layer_fit)
        self.init_weights(self.classifier)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, is_student: bool = False,
        score_layers: Collection[int] | None = None,
    ) -> TaskOutput:
        """Classify rows; with `is_student` the hidden states are at the teacher's width.

        `score_layers` is that of `BertModel`.
        """
        output = self.bert(input_ids, token_type_ids, attention_mask, score_layers)
        hidden = self.fit_hidden(output.hidden_states) if is_student else output.hidden_states
        return TaskOutput(self.classify(output.pooled_output), output.attention_scores, hidden)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [batch, labels] for the last layer's output [batch, length, hidden]."""
        return self.classify(self.bert.pooler(hidden))


class BertForQuestionAnswering(BertPreTrainedModel):
    """BERT that points at the start and the end of an answer in its input (SQuAD)."""

    hugging_face_class = "BertForQuestionAnswering"
    head = ("qa_outputs.",)
    only_cls_reaches_head = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooler=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights(self.qa_outputs)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, score_layers: Collection[int] | None = None,
    ) -> TaskOutput:
        """Compute the logits of an answer's start and end at every position."""
        output = self.bert(input_ids, token_type_ids, attention_mask, score_layers)
        logits = self.head_logits(output.hidden_states[-1])
        return TaskOutput(logits, output.attention_scores, output.hidden_states)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [batch, length, 2] for the last layer's output [batch, length, hidden]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.qa_outputs(hidden.float())


# ------------------------------------------------------------------ models that only compute


class PackedLinear(nn.Module):
    """A frozen bfloat16 linear layer whose weight lies as oneDNN's kernels read it.

    `nn.Linear` brings its weight into that order at every call, which costs a tenth of BERT-base's
    forward pass on a CPU. A model of such layers can be neither saved nor moved.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack() -> bool:
    """Say whether this build of torch has oneDNN and the operations of `PackedLinear`."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def pack_linears(module: nn.Module) -> None:
    """Replace every bfloat16 linear layer below `module` by a packed one."""
    for name, child in module.named_children():
        # A layer all of whose units were pruned has nothing to pack.
        if isinstance(child, nn.Linear) and child.weight.dtype == torch.bfloat16 \
                and child.weight.numel():
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


def freeze(
    model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None,
    pack: bool = True,
) -> nn.Module:
    """Put a model that is not trained into eval mode and stop its gradients; returns it.

    Args:
        model: a teacher, or a model that is evaluated; changed in place.
        dtype: precision to keep its weights and to compute in, `FLOAT_LAYERS` apart: neither
            scores nor a state that is passed on a hundred times are rounded. None leaves it.
        device: where to move it. In bfloat16 on a CPU its linear layers are packed as well, after
            which it can no longer be saved.
        pack: false leaves them, for torch.compile, which does not know packed ones.
    """
    model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    for name in FLOAT_LAYERS:
        if hasattr(model, name):
            getattr(model, name).float()
    on_cpu = device is not None and device.type == "cpu"
    if pack and on_cpu and dtype == torch.bfloat16 and can_pack():
        pack_linears(model)
    return model


def inference_copy(
    model: nn.Module, dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    """Return a frozen copy of a model that is in training; a frozen model is returned itself."""
    if not model.training and not any(p.requires_grad for p in model.parameters()):
        return model
    return freeze(copy.deepcopy(model), dtype, device)
