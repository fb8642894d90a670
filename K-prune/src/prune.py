"""K-prune: structured pruning without retraining (paper: arXiv 2308.03449).

Attention heads and feed-forward neurons go, sub-layer by sub-layer from the bottom. For each the
knowledge of every remaining unit is measured on a sample of the training rows, those with the
least knowledge per operation are pruned, and what is left of the output projection is refitted to
the output of the unpruned model's sub-layer.
"""

import copy
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformer.file_utils import UserError
from transformer.modeling import (
    MASKED_SCORE,
    BertConfig,
    BertForQuestionAnswering,
    BertLayer,
    TinyBertForSequenceClassification,
    model_inputs,
)

logger = logging.getLogger(__name__)

Model = TinyBertForSequenceClassification | BertForQuestionAnswering

QR_ROWS = 4096  # tokens that are taken into a least-squares problem at once
SMALLEST_DIRECTION = 1e-6  # of a feature's norm: what is smaller is float32's rounding


# ------------------------------------------------------------------ operations


def head_flops(config: BertConfig, seq_len: float) -> float:
    """Return the operations of one attention head on a row of `seq_len` tokens.

    A multiplication and an addition are two: four projections between the hidden states and the
    head, the scores, and their product with the values.
    """
    return 2 * config.head_width * (4 * config.hidden_size * seq_len + 2 * seq_len**2)


def neuron_flops(config: BertConfig, seq_len: float) -> float:
    """Return the operations of one feed-forward neuron on a row of `seq_len` tokens."""
    return 2 * 2 * config.hidden_size * seq_len


def encoder_flops(config: BertConfig, seq_len: float) -> float:
    """Return the operations of all heads and neurons on a row of `seq_len` tokens."""
    return (sum(config.heads) * head_flops(config, seq_len)
            + sum(config.neurons) * neuron_flops(config, seq_len))


# ------------------------------------------------------------------ sub-layers


class SubLayer:
    """The attention or the feed-forward network of a layer: units, projection, residual, norm.

    Attributes:
        units: heads or neurons.
        width: how many inputs of the output projection belong to one unit.
        output: the output projection and what follows it.
    """

    def __init__(self, layer: BertLayer, is_attention: bool) -> None:
        self.is_attention = is_attention
        self.inner = layer.attention.self if is_attention else layer.intermediate
        self.output = layer.attention.output if is_attention else layer.output
        self.width = self.inner.head_width if is_attention else 1

    @property
    def units(self) -> int:
        return self.inner.heads if self.is_attention else self.inner.neurons

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the inputs of the output projection, [batch, length, units * width].

        Args:
            hidden: [batch, length, hidden].
            mask: what is added to the attention scores, [batch, 1, 1, length].
        """
        if self.is_attention:
            return self.inner(hidden, mask, need_scores=False)[0]
        return self.inner(hidden)

    def per_unit(self, values: Tensor) -> Tensor:
        """Return the mean of each unit's values, [units * width] -> [units]."""
        return values.view(self.units, self.width).mean(dim=1)

    def keep(self, kept: Tensor) -> None:
        """Remove the units for which `kept`, bool [units], is false."""
        indices = kept.repeat_interleave(self.width).nonzero().flatten()
        names = ("query", "key", "value") if self.is_attention else ("dense",)
        for name in names:
            old = getattr(self.inner, name)
            setattr(self.inner, name, _smaller(old.weight[indices], old.bias[indices]))
        dense = self.output.dense
        self.output.dense = _smaller(dense.weight[:, indices], dense.bias)
        if self.is_attention:
            self.inner.heads = int(kept.sum())
        else:
            self.inner.neurons = int(kept.sum())


def _smaller(weight: Tensor, bias: Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs).requires_grad_(False).to(weight)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


def sub_layers(model: Model) -> list[SubLayer]:
    """Return a model's sub-layers from the bottom: attention, feed-forward, attention, ..."""
    return [SubLayer(layer, is_attention)
            for layer in model.bert.encoder.layer for is_attention in (True, False)]


# ------------------------------------------------------------------ the sample


@dataclass
class SampleBatch:
    """A batch of the sample on its way through the layers.

    hidden: what goes into the present sub-layer of the model that is pruned, [batch, length,
        hidden]; kept, so that what lies below is not computed again.
    reference: the same of the unpruned model, where tuning needs it.
    logits: the unpruned model's.
    added_mask: what is added to attention scores, [batch, 1, 1, length].
    real: bool [batch, length], false for padding.
    """

    hidden: Tensor
    reference: Tensor
    added_mask: Tensor
    real: Tensor
    logits: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.real.sum())


def start_batch(model: Model, batch: Mapping[str, Tensor] | Sequence[Tensor]) -> SampleBatch:
    """Embed a batch: a dictionary as `Features.collate` makes it, or ids, segments and mask."""
    device = next(model.parameters()).device
    inputs = model_inputs(batch) if isinstance(batch, Mapping) else batch[:3]
    ids, segments, mask = (tensor.to(device) for tensor in inputs)
    hidden = model.bert.embeddings(ids, segments)
    added = (1.0 - mask[:, None, None, :].to(hidden.dtype)) * MASKED_SCORE
    return SampleBatch(hidden, hidden, added, mask.bool())


# ------------------------------------------------------------------ knowledge


class Knowledge(NamedTuple):
    """Knowledge of one sub-layer's units, summed over the sample: each [units * width].

    predictive: half the squared gradient of the divergence from the unpruned model's logits.
    representational: the squared features over real tokens.
    """

    predictive: Tensor
    representational: Tensor


def divergence(current: Tensor, original: Tensor, temperature: float, real: Tensor) -> Tensor:
    """Return how far logits are from the unpruned model's, a scalar: the mean over the batch.

    T^2 KL(original || current) of the classes at temperature T; for regression, which is known by
    its single output, the squared error; for question answering the mean of the divergences of
    start and end over the real positions.

    Args:
        current, original: [batch, labels], or [batch, length, 2].
        real: bool [batch, length].
    """
    if current.dim() == 3:
        padding = ~real[..., None]
        current, original = (
            x.masked_fill(padding, MASKED_SCORE).transpose(1, 2) for x in (current, original))
    elif current.shape[-1] == 1:
        return F.mse_loss(current, original)
    log_current = F.log_softmax(current / temperature, dim=-1)
    log_original = F.log_softmax(original / temperature, dim=-1)
    divergences = (log_original.exp() * (log_original - log_current)).sum(dim=-1)
    return temperature**2 * divergences.mean()


def squared_features(features: Tensor, real: Tensor) -> Tensor:
    """Return the sum over real tokens of the squared features, [units * width]."""
    return real.flatten().to(features.dtype) @ features.flatten(0, 1).square()


def zero_sums(sublayers: list[SubLayer]) -> list[Tensor]:
    """Return a float64 zero for each input of each output projection, [units * width] each."""
    return [torch.zeros_like(sublayer.output.dense.weight[0], dtype=torch.float64)
            for sublayer in sublayers]


@torch.no_grad()
def first_knowledge(model: Model, remaining: list[SubLayer], sample: list[SampleBatch]
                    ) -> list[Knowledge]:
    """Measure the unpruned model, whose logits become the reference.

    It does not diverge from itself, so no gradient has to be computed: all are 0.
    """
    found = zero_sums(remaining), zero_sums(remaining)
    for batch in sample:
        hidden = batch.hidden
        for sublayer, squares in zip(remaining, found[1], strict=True):
            features = sublayer.features(hidden, batch.added_mask)
            squares += squared_features(features, batch.real)
            hidden = sublayer.output(features, hidden)
        batch.logits = model.head_logits(hidden)
    return [Knowledge(*both) for both in zip(*found, strict=True)]


def knowledge(model: Model, remaining: list[SubLayer], sample: list[SampleBatch],
              temperature: float) -> list[Knowledge]:
    """Measure the units of the `remaining` sub-layers, from the kept input of the first on.

    The gradient for a mask of ones on features is the sum over tokens of the features times
    their own gradient; no other gradients are computed.
    """
    found = zero_sums(remaining), zero_sums(remaining)
    for batch in sample:
        hidden = batch.hidden
        all_features = []
        for sublayer, squares in zip(remaining, found[1], strict=True):
            if sublayer is remaining[-1] and model.only_cls_reaches_head:
                with torch.no_grad():
                    squares += squared_features(
                        sublayer.features(hidden, batch.added_mask), batch.real)
                hidden = hidden[:, :1]  # only [CLS] reaches the head from here on
                features = sublayer.features(hidden, batch.added_mask)
            else:
                features = sublayer.features(hidden, batch.added_mask)
                squares += squared_features(features.detach(), batch.real)
            if not features.requires_grad:
                features.requires_grad_()
            hidden = sublayer.output(features, hidden)
            all_features.append(features)
        loss = divergence(model.head_logits(hidden), batch.logits, temperature, batch.real)
        if not loss.requires_grad:  # no sub-layer has units left
            continue
        gradients = torch.autograd.grad(
            loss, all_features, allow_unused=True, materialize_grads=True)
        for predictive, features, gradient in zip(
                found[0], all_features, gradients, strict=True):
            predictive += 0.5 * (features.detach() * gradient).sum(dim=(0, 1)).square()
    return [Knowledge(*both) for both in zip(*found, strict=True)]


@dataclass(frozen=True)
class Scoring:
    """How knowledge becomes scores (paper, section 3.3).

    lam_pred, lam_rep: weights of predictive and representational knowledge.
    mu: what the scores of heads are multiplied by.
    head_flops, neuron_flops: the operations of one of them.
    samples, tokens: rows and real tokens of the sample.
    """

    lam_pred: float
    lam_rep: float
    mu: float
    head_flops: float
    neuron_flops: float
    samples: int
    tokens: int

    def cost(self, sublayer: SubLayer) -> float:
        """Return the operations of one unit of a sub-layer."""
        return self.head_flops if sublayer.is_attention else self.neuron_flops

    def scores(self, sublayer: SubLayer, known: Knowledge) -> Tensor:
        """Return each unit's knowledge for a billion operations, [units], float64."""
        weight_squares = sublayer.output.dense.weight.double().square().mean(dim=0)
        representational = known.representational * weight_squares / self.tokens
        mixed = (self.lam_pred * known.predictive / self.samples
                 + self.lam_rep * representational)
        scores = sublayer.per_unit(mixed) / (self.cost(sublayer) / 1e9)
        return (scores * self.mu if sublayer.is_attention else scores).cpu()


def find_threshold(scores: Tensor, costs: Tensor, budget: float) -> float:
    """Return the smallest threshold for which the units strictly above it cost less than `budget`.

    One sorting and one running sum; minus infinity where all units together cost less.

    Args:
        scores, costs: [units], float64.
        budget: more than 0.
    """
    values, groups = scores.unique(return_inverse=True)  # ascending; equal scores go together
    group_costs = torch.zeros_like(values).index_add_(0, groups, costs)
    above = group_costs.flip(0).cumsum(0).flip(0)  # what a value's units and all above it cost
    affordable = int((above < budget).sum())  # values, counted from the greatest
    dearer = len(values) - affordable
    return float(values[dearer - 1]) if dearer else -math.inf


# ------------------------------------------------------------------ tuning


class LeastSquares:
    """Solves min |features @ solution - targets| over tokens that are added batch by batch.

    By orthogonal transformations of the matrix itself (QR), whose condition is not squared as
    by the normal equations, and in memory that does not grow with the tokens.

    Args:
        inputs: features of a token.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.triangle: Tensor | None = None  # of the features and targets so far
        self.waiting: list[Tensor] = []

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add tokens: features [tokens, inputs], targets [tokens, outputs]."""
        self.waiting.append(torch.cat([features, targets], dim=1))
        if sum(map(len, self.waiting)) >= QR_ROWS:
            self.reduce()

    def reduce(self) -> None:
        """Reduce the rows added since the last time to the triangle."""
        rows = [] if self.triangle is None else [self.triangle]
        self.triangle = torch.linalg.qr(torch.cat(rows + self.waiting), mode="r").R
        self.waiting = []

    def solve(self) -> Tensor:
        """Return the solution [inputs, outputs], the least in norm where there are many.

        Raises:
            torch.linalg.LinAlgError: the features are no finite numbers.
        """
        if self.waiting:
            self.reduce()
        triangle = self.triangle[: self.inputs].double().cpu()
        features, targets = triangle.split([self.inputs, triangle.shape[1] - self.inputs], dim=1)
        # Features of unit norm, so that a small one is not taken for rounding.
        norms = features.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        if not (torch.isfinite(features).all() and torch.isfinite(targets).all()):
            raise torch.linalg.LinAlgError("not finite")
        # gelsd: PyTorch's default, gelsy, starts from pivots that it does not set, and then takes
        # a solvable problem with dependent features for one without a solution.
        solution = torch.linalg.lstsq(
            features / norms, targets, rcond=SMALLEST_DIRECTION, driver="gelsd").solution
        return solution / norms[:, None]


@torch.no_grad()
def advance(sublayer: SubLayer, sample: list[SampleBatch]) -> None:
    """Replace the kept inputs of a sub-layer by its outputs."""
    for batch in sample:
        features = sublayer.features(batch.hidden, batch.added_mask)
        batch.hidden = sublayer.output(features, batch.hidden)


@torch.no_grad()
def tune_and_advance(sublayer: SubLayer, reference: SubLayer, sample: list[SampleBatch]) -> None:
    """Do as `advance` in both models, after a refit of the output projection's weight.

    Its input plus its output are to be the unpruned model's; the bias stays. What is solved for
    is the change of the weight, so that where the sample leaves it open the weight stays as it
    was.
    """
    dense = sublayer.output.dense
    problem = LeastSquares(dense.in_features)
    features = []
    for batch in sample:
        features.append(sublayer.features(batch.hidden, batch.added_mask))
        theirs = reference.features(batch.reference, batch.added_mask)
        aim = batch.reference + reference.output.dense(theirs)
        missing = aim - batch.hidden - dense(features[-1])
        if sublayer.units:
            problem.add(features[-1][batch.real], missing[batch.real])
        batch.reference = reference.output.LayerNorm(aim)
    if sublayer.units:
        try:
            dense.weight += problem.solve().T.to(dense.weight)
        except torch.linalg.LinAlgError as error:
            logger.warning("the output projection of a sub-layer is not refitted: %s", error)
    for batch, values in zip(sample, features, strict=True):
        batch.hidden = sublayer.output(values, batch.hidden)


# ------------------------------------------------------------------ pruning


@dataclass
class Pruned:
    """What `kprune` returns.

    model: the smaller model, in eval mode; its config says what is left of each layer.
    head_masks: [layers, heads], 1 for a head that stays; neuron_masks: [layers, neurons].
    head_scores, neuron_scores: the scores of the unpruned model's units, at the same indices.
    flops_before, flops_after: operations of all heads and neurons on a row of the mean length.
    """

    model: Model
    head_masks: Tensor
    neuron_masks: Tensor
    head_scores: Tensor
    neuron_scores: Tensor
    flops_before: float
    flops_after: float


def check_share(constraint: float) -> None:
    """Raise a `UserError` unless `constraint` is a share that can be removed of anything."""
    if not 0 < constraint < 1:
        raise UserError(f"--constraint {constraint}; expected a share of the operations to remove,"
                        " above 0 and below 1")


def check_constraint(constraint: float, config: BertConfig, seq_len: float) -> None:
    """Raise a `UserError` unless a unit of the model can stay when `constraint` is removed."""
    check_share(constraint)
    total = encoder_flops(config, seq_len)
    costs = [cost for cost, counts in (
        (head_flops(config, seq_len), config.heads),
        (neuron_flops(config, seq_len), config.neurons)) if any(counts)]
    if not costs:
        raise UserError("the model has no heads and no neurons left to prune")
    cheapest = min(costs)
    if cheapest >= (1 - constraint) * total:
        raise UserError(
            f"--constraint {constraint} cannot be met: a single head or neuron costs"
            f" {cheapest / total:.2g} of the operations, so nothing would be left"
        )


@torch.no_grad()
def kprune(
    model: Model,
    batches: Iterable[Mapping[str, Tensor] | Sequence[Tensor]],
    *,
    constraint: float,
    seq_len: float,
    lam_pred: float,
    lam_rep: float,
    mu: float,
    T: float,  # the paper's name
    sublayerwise_tuning: bool,
) -> Pruned:
    """Remove heads and neurons from a copy of `model` until it costs `constraint` less.

    Args:
        model: a fine-tuned classifier, regressor or question answerer; unpruned or not.
        batches: the sample, batches of input_ids, token_type_ids and attention_mask, each
            [batch, length].
        constraint: share of the operations to remove.
        seq_len: the task's mean length in word pieces, for which operations are counted.
        lam_pred, lam_rep, mu: see `Scoring`.
        T: the temperature of the divergence.
        sublayerwise_tuning: refit each output projection after its sub-layer was pruned.

    Raises:
        UserError: a constraint that cannot be met, or a model whose numbers are not finite.
    """
    check_constraint(constraint, model.config, seq_len)
    original = copy.deepcopy(model).float().eval().requires_grad_(False)
    pruned = copy.deepcopy(original)
    config = pruned.config
    sublayers, references = sub_layers(pruned), sub_layers(original)
    sample = [start_batch(original, batch) for batch in batches]
    scoring = Scoring(
        lam_pred, lam_rep, mu, head_flops(config, seq_len), neuron_flops(config, seq_len),
        samples=sum(len(batch.real) for batch in sample),
        tokens=sum(batch.tokens for batch in sample))
    before = encoder_flops(config, seq_len)
    budget = (1 - constraint) * before

    first_scores: list[Tensor] = []
    masks: list[Tensor] = []
    for index, (sublayer, reference) in enumerate(zip(sublayers, references, strict=True)):
        remaining = sublayers[index:]
        if index == 0:
            known = first_knowledge(pruned, remaining, sample)
        else:
            with torch.enable_grad():
                known = knowledge(pruned, remaining, sample, T)
        scores = [scoring.scores(*pair) for pair in zip(remaining, known, strict=True)]
        costs = [torch.full_like(s, scoring.cost(p))
                 for p, s in zip(remaining, scores, strict=True)]
        if not all(torch.isfinite(s).all() for s in scores):
            raise UserError("the model's logits for the sample are not finite numbers")
        first_scores = first_scores or scores
        kept = scores[0] > find_threshold(torch.cat(scores), torch.cat(costs), budget)
        masks.append(kept)
        if sublayer.units > 1 and scores[0].min() == scores[0].max():
            logger.warning(
                "layer %d: all %d %s have the same score and cannot be told apart: %s",
                index // 2 + 1, sublayer.units, "heads" if sublayer.is_attention else "neurons",
                "all of them stay" if kept.all() else "all of them are removed")
        budget -= int(kept.sum()) * scoring.cost(sublayer)
        sublayer.keep(kept.to(sample[0].hidden.device))
        if sublayerwise_tuning:
            tune_and_advance(sublayer, reference, sample)
        else:
            advance(sublayer, sample)

    config.heads_per_layer = [sublayer.units for sublayer in sublayers[0::2]]
    config.neurons_per_layer = [sublayer.units for sublayer in sublayers[1::2]]
    return Pruned(
        pruned.requires_grad_(), *(_table(x) for x in (
            masks[0::2], masks[1::2], first_scores[0::2], first_scores[1::2])),
        before, encoder_flops(config, seq_len))


def _table(rows: list[Tensor]) -> Tensor:
    """Return rows as one float32 tensor, shorter ones (of a pruned model) filled with zeros."""
    return nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True)
