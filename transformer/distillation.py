"""TinyBERT's layer mapping and losses (paper: arXiv 1909.10351, section 3)."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer.batching import Batch
from transformer.file_utils import UserError
from transformer.modeling import BertConfig, BertModel, BertModelOutput, model_inputs


def map_layers(teacher_layers: int, student_layers: int) -> tuple[list[int], list[int]]:
    """Return which teacher layers the student learns from (paper: n = g(m) = m * N / M).

    Args:
        teacher_layers: number of the teacher's Transformer layers, N.
        student_layers: number of the student's Transformer layers, M.

    Returns:
        Indices into the teacher's attention scores (one per student layer, 0 is the first
        layer), and indices into its hidden states (one more, 0 is the embedding output).

    Raises:
        UserError: N is not a multiple of M.
    """
    if student_layers < 1 or teacher_layers % student_layers:
        raise UserError(
            f"the teacher has {teacher_layers} layers and the student {student_layers};"
            " expected a number of student layers that divides the teacher's"
        )
    step = teacher_layers // student_layers
    attention = [(layer + 1) * step - 1 for layer in range(student_layers)]
    hidden = [layer * step for layer in range(student_layers + 1)]
    return attention, hidden


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


def check_heads(teacher_heads: int, student_heads: int) -> None:
    """Raise a `UserError` that names both numbers of attention heads when they differ."""
    if student_heads != teacher_heads or not teacher_heads:
        raise UserError(
            f"the teacher has {teacher_heads} attention heads and the student {student_heads};"
            " the attention loss needs the same number"
        )


def check_layer_heads(teacher: BertConfig, student: BertConfig) -> None:
    """Raise a `UserError` unless each student layer has the heads of the one it learns from.

    They can differ in some layers only where K-prune has removed heads.
    """
    attention_map, _ = map_layers(teacher.num_hidden_layers, student.num_hidden_layers)
    for student_heads, layer in zip(student.heads, attention_map, strict=True):
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
    attention_mask: Tensor, match_original: bool = False,
) -> dict[str, Tensor]:
    """Attention and hidden losses over all student layers (Eq. 7-9, first case of Eq. 11).

    Args:
        student_scores, teacher_scores: per layer, [batch, heads, length, length].
        student_hidden, teacher_hidden: per layer and the embeddings first,
            [batch, length, teacher width]; the student's already went through `fit_dense`.
        attention_mask: [batch, length], 1 for real tokens.
        match_original: see `attention_loss` and `hidden_loss`.

    Returns:
        `att_loss` and `rep_loss`, each a scalar: the sum over the student's layers.

    Raises:
        UserError: depths that do not divide, or heads or widths that do not agree.
    """
    attention_map, hidden_map = map_layers(len(teacher_scores), len(student_scores))
    teacher_scores = [teacher_scores[layer] for layer in attention_map]
    check_shapes(student_scores, student_hidden, teacher_scores, teacher_hidden)
    att_loss = sum(
        attention_loss(student_layer, teacher_layer, attention_mask, match_original)
        for student_layer, teacher_layer in zip(student_scores, teacher_scores, strict=True)
    )
    rep_loss = sum(
        hidden_loss(student_layer, teacher_hidden[layer], attention_mask, match_original)
        for student_layer, layer in zip(student_hidden, hidden_map, strict=True)
    )
    return {"att_loss": att_loss, "rep_loss": rep_loss}


# ------------------------------------------------------------------ teacher and student losses


class IntermediateTeacher(nn.Module):
    """A frozen encoder's hidden states, and the raw scores of the layers that students learn from.

    Args:
        encoder: a frozen `BertModel`.
        student_depths: the students' numbers of layers; each must divide the encoder's.
    """

    def __init__(self, encoder: BertModel, student_depths: Iterable[int]) -> None:
        super().__init__()
        self.encoder = encoder
        depth = encoder.config.num_hidden_layers
        self.score_layers = tuple(sorted(
            {layer for student in student_depths for layer in map_layers(depth, student)[0]}))

    @torch.no_grad()
    def forward(self, batch: Batch) -> BertModelOutput:
        return self.encoder(*model_inputs(batch), score_layers=self.score_layers)


def no_teacher(batch: Batch) -> None:
    """The teacher where the batch holds its logits already, or where none is needed."""


class IntermediateLoss(nn.Module):
    """Eq. 7-9 on a batch: attention scores, hidden states and embeddings, summed over layers.

    Args:
        student: its last two outputs are the raw attention scores and the hidden states.
        match_original: see `intermediate_losses`.
        arguments: further arguments of the student's `forward`.
    """

    def __init__(self, student: nn.Module, match_original: bool = False, **arguments: bool) -> None:
        super().__init__()
        self.student, self.match_original, self.arguments = student, match_original, arguments

    def forward(self, batch: Batch, teacher: BertModelOutput) -> dict[str, Tensor]:
        *_, scores, hidden = self.student(*model_inputs(batch), **self.arguments)
        return intermediate_losses(
            scores, hidden, teacher.attention_scores, teacher.hidden_states,
            batch["attention_mask"], self.match_original)


class PredictionLoss(nn.Module):
    """Eq. 10 on a batch that holds its rows' teacher logits."""

    def __init__(
        self, student: nn.Module, temperature: float = 1.0, match_original: bool = False
    ) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.match_original = match_original

    def forward(self, batch: Batch, teacher: None) -> dict[str, Tensor]:
        logits = self.student(*model_inputs(batch), score_layers=())[0]
        return {"cls_loss": prediction_loss(
            logits, batch["teacher_logits"], self.temperature, self.match_original)}
