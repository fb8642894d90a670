"""TinyBERT's layer mapping and losses (paper: arXiv 1909.10351, section 3)."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer.batching import Batch
from transformer.file_utils import UserError
from transformer.modeling import BertConfig, BertModelOutput, TaskOutput, model_inputs

# Indices into the teacher's attention scores, and into its hidden states.
LayerMap = tuple[list[int], list[int]]


def map_layers(
    teacher_layers: int, student_layers: int, chosen: Sequence[int] | None = None
) -> LayerMap:
    """Return which teacher layers the student learns from (paper: n = g(m) = m * N / M).

    Where M does not divide N, each step is the mean of those that are left, rounded up, as in
    Vooblin/distillation: 5 of 12 layers are 3, 6, 8, 10 and 12.

    Args:
        teacher_layers: number of the teacher's Transformer layers, N.
        student_layers: number of the student's Transformer layers, M.
        chosen: the teacher's layers, from 1, in place of these: one for each student layer.

    Returns:
        Indices into the teacher's attention scores (one per student layer, 0 is the first
        layer), and indices into its hidden states (one more, 0 is the embedding output).

    Raises:
        UserError: no student layer or more than N; chosen layers that the teacher lacks, that do
            not ascend, or of another number than M.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise UserError(
            f"the teacher has {teacher_layers} layers and the student {student_layers};"
            f" expected a student of 1 to {teacher_layers} layers"
        )
    if chosen is None:
        chosen = []
        for left in range(student_layers, 0, -1):
            below = chosen[-1] if chosen else 0
            chosen.append(below - (below - teacher_layers) // left)  # rounded up
    ascending = all(first < second for first, second in pairwise([0, *chosen, teacher_layers + 1]))
    if len(chosen) != student_layers or not ascending:
        raise UserError(
            f"--layer_map {' '.join(map(str, chosen))}: expected {student_layers} ascending numbers"
            f" from 1 to {teacher_layers}, a layer of the teacher for each of the student"
        )
    return [layer - 1 for layer in chosen], [0, *chosen]


def attention_loss(
    student_scores: Tensor, teacher_scores: Tensor, attention_mask: Tensor,
    match_original: bool = False,
) -> Tensor:
    """Mean squared difference of the raw attention scores of one layer (Eq. 7).

    Args:
        student_scores, teacher_scores: [batch, heads, length, length] before the softmax.
        attention_mask: [batch, length], 1 for real tokens.
        match_original: average over all positions, those of padding set to 0, as the
            original does; otherwise over pairs of real tokens, sentence by sentence.

    Returns:
        A scalar in float32.
    """
    student_scores, teacher_scores = student_scores.float(), teacher_scores.float()
    if match_original:
        # Kept from the original: scores of masked keys (about -10000) count as 0.
        student_scores = student_scores.masked_fill(student_scores <= -1e2, 0.0)
        teacher_scores = teacher_scores.masked_fill(teacher_scores <= -1e2, 0.0)
        return F.mse_loss(student_scores, teacher_scores)
    heads = student_scores.shape[1]
    mask = attention_mask.to(student_scores.dtype)
    squared = (student_scores - teacher_scores).square().sum(dim=1)  # [batch, length, length]
    # Not a matrix product: autocast would round that to bf16, and overflow it in float16.
    per_query = (squared * mask[:, None, :]).sum(dim=2)  # [batch, length]
    per_sentence = (per_query * mask).sum(dim=1) / (heads * mask.sum(dim=1).square())
    return per_sentence.mean()


def hidden_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor,
    match_original: bool = False,
) -> Tensor:
    """Mean squared difference of one layer's hidden states, embeddings included (Eq. 8, 9).

    Args:
        student_hidden: [batch, length, width], already mapped to the teacher's width.
        teacher_hidden: [batch, length, width].
        attention_mask: [batch, length], 1 for real tokens.
        match_original: average over all positions, padding included, as the original does;
            otherwise over real tokens, sentence by sentence.

    Returns:
        A scalar in float32.
    """
    student_hidden, teacher_hidden = student_hidden.float(), teacher_hidden.float()
    if match_original:
        return F.mse_loss(student_hidden, teacher_hidden)
    mask = attention_mask.to(student_hidden.dtype)
    per_token = (student_hidden - teacher_hidden).square().mean(dim=-1)  # [batch, length]
    return ((per_token * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0,
    match_original: bool = False,
) -> Tensor:
    """Cross-entropy of the student's prediction against the teacher's (Eq. 10).

    Args:
        student_logits, teacher_logits: [batch, labels].
        temperature: divides both; 1 in the paper.
        match_original: divide by the number of labels too, as the original does.

    Returns:
        A scalar in float32, the mean over the batch.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.softmax(teacher_logits.float() / temperature, dim=-1)
    if match_original:
        return -(teacher * log_student).mean()
    return -(teacher * log_student).sum(dim=-1).mean()


def prediction_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0,
    match_original: bool = False,
) -> Tensor:
    """The prediction stage's loss: Eq. 10, or for regression the squared error of the logits.

    Regression (STS-B) is known by its single logit; the target is the teacher's score.
    """
    if student_logits.shape[-1] == 1:
        return F.mse_loss(student_logits.float(), teacher_logits.float())
    return soft_cross_entropy(student_logits, teacher_logits, temperature, match_original)


def hinton_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float,
    hard_weight: float, soft_weight: float, temperature_squared: bool = False,
    match_original: bool = False, label_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Hinton's loss, a CE(labels, s) + b CE(softmax(t / T), softmax(s / T)) (arXiv 1503.02531).

    Regression has squared errors in place of both cross-entropies, and no temperature.

    Args:
        student_logits, teacher_logits: s and t, [batch, labels].
        labels: [batch], class numbers, or a regression's scores.
        temperature: T, of the soft term alone.
        hard_weight, soft_weight: a and b.
        temperature_squared: multiply the soft term by T^2, so that its gradient keeps its size.
        match_original: see `soft_cross_entropy`.
        label_mask: [batch], false for rows that have no part in the hard term, which stays a mean
            over all rows.

    Returns:
        `hard_loss` and `soft_loss`, weighted: scalars in float32, means over the batch.
    """
    student, is_regression = student_logits.float(), student_logits.shape[-1] == 1
    if is_regression:
        hard = (student[:, 0] - labels.float()).square()  # [batch]
    else:
        hard = F.cross_entropy(student, labels, reduction="none")
    if label_mask is not None:
        hard = hard * label_mask
    soft = prediction_loss(student_logits, teacher_logits, temperature, match_original)
    if temperature_squared and not is_regression:
        soft = temperature**2 * soft
    return {"hard_loss": hard_weight * hard.mean(), "soft_loss": soft_weight * soft}


def check_heads(teacher_heads: int, student_heads: int) -> None:
    """Raise a `UserError` that names both numbers of attention heads when they differ."""
    if student_heads != teacher_heads or not teacher_heads:
        raise UserError(
            f"the teacher has {teacher_heads} attention heads and the student {student_heads};"
            " the attention loss needs the same number; --no_attention_loss of the distillation"
            " scripts leaves it out"
        )


def check_layers(
    teacher: BertConfig, student: BertConfig, chosen: Sequence[int] | None = None,
    attention: bool = True,
) -> None:
    """Raise a `UserError` unless the student's layers can learn from the teacher's.

    Args:
        teacher, student: their settings. Where K-prune has removed heads, they can differ from
            layer to layer.
        chosen: see `map_layers`.
        attention: whether there is an attention loss, for which a layer needs as many heads as
            the one it learns from.
    """
    layers, _ = map_layers(teacher.num_hidden_layers, student.num_hidden_layers, chosen)
    if attention:
        for student_heads, layer in zip(student.heads, layers, strict=True):
            check_heads(teacher.heads[layer], student_heads)


def check_shapes(student_scores: Sequence[Tensor], student_hidden: Sequence[Tensor],
                 teacher_scores: Sequence[Tensor], teacher_hidden: Sequence[Tensor]) -> None:
    """Raise a `UserError` that names both numbers when heads or widths do not agree.

    `teacher_scores` are those of the layers that the student's learn from.
    """
    for student_layer, teacher_layer in zip(student_scores, teacher_scores, strict=True):
        check_heads(teacher_layer.shape[1], student_layer.shape[1])
    student_width, teacher_width = student_hidden[0].shape[-1], teacher_hidden[0].shape[-1]
    if student_width != teacher_width:
        raise UserError(
            f"the student's hidden states are mapped to width {student_width}, the teacher is"
            f" {teacher_width} wide; fit_dense must map to the teacher's width"
        )


def intermediate_losses(
    student_scores: Sequence[Tensor], student_hidden: Sequence[Tensor],
    teacher_scores: Sequence[Tensor], teacher_hidden: Sequence[Tensor],
    attention_mask: Tensor, match_original: bool = False, layer_map: LayerMap | None = None,
    attention: bool = True,
) -> dict[str, Tensor]:
    """Attention and hidden losses over all student layers (Eq. 7-9, first case of Eq. 11).

    Args:
        student_scores, teacher_scores: per layer, [batch, heads, length, length].
        student_hidden, teacher_hidden: per layer and the embeddings first,
            [batch, length, teacher width]; the student's already went through `fit_dense`.
        attention_mask: [batch, length], 1 for real tokens.
        match_original: see `attention_loss` and `hidden_loss`.
        layer_map: what `map_layers` returned; None: that of these depths.
        attention: false leaves the attention loss out; nobody reads the scores then.

    Returns:
        `att_loss` and `rep_loss`, each a scalar: the sum over the student's layers.

    Raises:
        UserError: heads or widths that do not agree, a student deeper than its teacher.
    """
    if layer_map is None:
        layer_map = map_layers(len(teacher_hidden) - 1, len(student_hidden) - 1)
    attention_map, hidden_map = layer_map
    teacher_scores = [teacher_scores[layer] for layer in attention_map if attention]
    student_scores = student_scores if attention else []
    check_shapes(student_scores, student_hidden, teacher_scores, teacher_hidden)
    losses = {}
    if attention:
        losses["att_loss"] = sum(
            attention_loss(student_layer, teacher_layer, attention_mask, match_original)
            for student_layer, teacher_layer in zip(student_scores, teacher_scores, strict=True)
        )
    losses["rep_loss"] = sum(
        hidden_loss(student_layer, teacher_hidden[layer], attention_mask, match_original)
        for student_layer, layer in zip(student_hidden, hidden_map, strict=True)
    )
    return losses


# ------------------------------------------------------------------ teacher and student losses


class IntermediateTeacher(nn.Module):
    """A frozen model's hidden states, and the raw scores of the layers that students learn from.

    Args:
        model: a frozen `BertModel`; or a classifier, whose outputs include its logits.
        score_layers: numbers of the layers whose scores are needed, from 0.
    """

    def __init__(self, model: nn.Module, score_layers: Iterable[int]) -> None:
        super().__init__()
        self.model, self.score_layers = model, tuple(sorted({*score_layers}))

    @torch.no_grad()
    def forward(self, batch: Batch) -> BertModelOutput | TaskOutput:
        return self.model(*model_inputs(batch), score_layers=self.score_layers)


def no_teacher(batch: Batch) -> None:
    """The teacher where the batch holds its logits already, or where none is needed."""


class PredictionLoss(nn.Module):
    """The prediction stage's loss on a batch that holds its rows' teacher logits.

    With the weights' defaults that is Eq. 10, `cls_loss`; with others Hinton's, whose hard term
    leaves out the rows that the batch's `label_mask`, if there is one, does.

    Args:
        student: its first output are the logits.
        temperature, match_original: see `prediction_loss`.
        hard_weight, soft_weight, temperature_squared: see `hinton_loss`.
    """

    def __init__(
        self, student: nn.Module, temperature: float = 1.0, match_original: bool = False,
        hard_weight: float = 0.0, soft_weight: float = 1.0, temperature_squared: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.match_original = match_original
        self.hard_weight, self.soft_weight = hard_weight, soft_weight
        self.temperature_squared = temperature_squared

    def losses(self, batch: Batch, logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """Return the losses of the student's logits [batch, labels]."""
        if (self.hard_weight, self.soft_weight, self.temperature_squared) == (0.0, 1.0, False):
            return {"cls_loss": prediction_loss(
                logits, teacher_logits, self.temperature, self.match_original)}
        return hinton_loss(
            logits, teacher_logits, batch["labels"], self.temperature, self.hard_weight,
            self.soft_weight, self.temperature_squared, self.match_original,
            batch.get("label_mask"))

    def forward(self, batch: Batch, teacher: None) -> dict[str, Tensor]:
        logits = self.student(*model_inputs(batch), score_layers=())[0]
        return self.losses(batch, logits, batch["teacher_logits"])


class IntermediateLoss(nn.Module):
    """Eq. 7-9 on a batch: attention scores, hidden states and embeddings, summed over layers.

    Args:
        student: its last two outputs are the raw attention scores and the hidden states.
        layer_map: what `map_layers` returned for it and its teacher.
        match_original: see `intermediate_losses`.
        attention_weight: of `att_loss`; 0 leaves it out, and no scores are computed.
        hidden_weight: of `rep_loss`.
        prediction: of the same student, to be added (Vooblin/distillation's single stage); the
            teacher's outputs then include its logits.
        arguments: further arguments of the student's `forward`.
    """

    def __init__(
        self, student: nn.Module, layer_map: LayerMap, match_original: bool = False,
        attention_weight: float = 1.0, hidden_weight: float = 1.0,
        prediction: PredictionLoss | None = None, **arguments: Any,
    ) -> None:
        super().__init__()
        self.student, self.layer_map, self.match_original = student, layer_map, match_original
        self.prediction, self.arguments = prediction, arguments
        self.weights = {"att_loss": attention_weight, "rep_loss": hidden_weight}
        if not attention_weight:
            del self.weights["att_loss"]
            self.arguments["score_layers"] = ()

    @property
    def score_layers(self) -> list[int]:
        """The teacher's layers whose scores are needed, from 0."""
        return self.layer_map[0] if "att_loss" in self.weights else []

    def forward(
        self, batch: Batch, teacher: BertModelOutput | TaskOutput
    ) -> dict[str, Tensor]:
        outputs = self.student(*model_inputs(batch), **self.arguments)
        scores, hidden = outputs[-2:]
        losses = intermediate_losses(
            scores, hidden, teacher.attention_scores, teacher.hidden_states,
            batch["attention_mask"], self.match_original, self.layer_map,
            attention="att_loss" in self.weights)
        losses = {name: self.weights[name] * value for name, value in losses.items()}
        if self.prediction is None:
            return losses
        return self.prediction.losses(batch, outputs.logits, teacher.logits) | losses


def describe_layers(losses: Iterable[IntermediateLoss]) -> str:
    """Return each student's map for a log line: the teacher's layers, from 1."""
    return ", ".join(" ".join(map(str, loss.layer_map[1][1:])) for loss in losses)
