"""TinyBERT's layer mapping and losses (paper: arXiv 1909.10351, section 3)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer.file_utils import UserError


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
    if student_heads != teacher_heads:
        raise UserError(
            f"the teacher has {teacher_heads} attention heads and the student {student_heads};"
            " the attention loss needs the same number"
        )


def check_shapes(student_scores: Sequence[Tensor], student_hidden: Sequence[Tensor],
                 teacher_scores: Sequence[Tensor], teacher_hidden: Sequence[Tensor]) -> None:
    """Raise a `UserError` that names both numbers when heads or widths do not agree."""
    check_heads(teacher_scores[0].shape[1], student_scores[0].shape[1])
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
    check_shapes(student_scores, student_hidden, teacher_scores, teacher_hidden)
    att_loss = sum(
        attention_loss(ours, teacher_scores[layer], attention_mask, match_original)
        for ours, layer in zip(student_scores, attention_map, strict=True)
    )
    rep_loss = sum(
        hidden_loss(ours, teacher_hidden[layer], attention_mask, match_original)
        for ours, layer in zip(student_hidden, hidden_map, strict=True)
    )
    return {"att_loss": att_loss, "rep_loss": rep_loss}


def freeze(model: nn.Module) -> nn.Module:
    """Put a teacher into eval mode and stop its gradients; returns the same model."""
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------ training steps

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[int]], Batch]


def micro_batches(rows: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Split the rows of one step into at most `parts` pieces of nearly equal size."""
    size = -(-len(rows) // parts)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def train(
    student: nn.Module,
    losses: Callable[[Batch], dict[str, Tensor]],
    epochs: Iterable[tuple[Collate, list[list[int]]]],
    optimizer: torch.optim.Optimizer,
    accumulation: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager],
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Train a student, one optimizer step at a time.

    Args:
        student: trained in place; put into train mode before each step.
        losses: from a batch to named losses, each a mean over rows; their sum is minimised.
        epochs: for each pass, what turns row numbers into a batch, and the rows of each step.
        optimizer: of the student.
        accumulation: micro-batches a step. A row counts the same in whichever micro-batch it
            stands, so the step's result does not depend on this number.
        device: where the batches go.
        context: makes the autocast context of the forward pass.
        scaler: scales the loss for float16.

    Yields:
        After each step its losses, detached and still on the device, and whether it ended a pass.
    """
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    for collate, epoch_batches in epochs:
        for place, rows in enumerate(epoch_batches, start=1):
            student.train()
            step_losses: dict[str, Tensor] = {}
            for part in micro_batches(rows, accumulation):
                with context():
                    values = losses(to_device(collate(part), device))
                share = len(part) / len(rows)
                scaler.scale(sum(values.values()) * share).backward()
                for name, value in values.items():
                    step_losses[name] = step_losses.get(name, 0.0) + value.detach() * share
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            yield step_losses, place == len(epoch_batches)
