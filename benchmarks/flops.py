"""Floating-point operations of the models' matrix products, from their shapes and true lengths.

A multiplication and an addition are two operations. Embeddings, softmax, norms and losses are
left out; a training step is three forward passes (the backward pass is two).
"""

import numpy as np

from transformer.modeling import BertConfig

TRAINING_PASSES = 3


def forward_flops(
    config: BertConfig, lengths: np.ndarray, fit_size: int | None = None
) -> float:
    """Return the operations of one forward pass over rows of these lengths, [rows].

    Args:
        fit_size: the teacher's width, for a student whose hidden states are mapped to it.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    width, layers = config.hidden_size, config.num_hidden_layers
    attended = sum(config.heads) * config.head_width  # of all layers
    per_token = 2 * width * (4 * attended + 2 * sum(config.neurons))
    per_token += 2 * (layers + 1) * width * fit_size if fit_size else 0
    per_pair = 4 * attended  # scores, and their product with the values
    return float((per_token * lengths + per_pair * lengths**2).sum())


def distillation_flops(
    teacher: BertConfig, students: list[BertConfig], lengths: np.ndarray
) -> float:
    """Return the operations of training students on one pass of the teacher over the rows."""
    training = sum(forward_flops(student, lengths, teacher.hidden_size) for student in students)
    return forward_flops(teacher, lengths) + TRAINING_PASSES * training


def masked_word_flops(config: BertConfig, words: int) -> float:
    """Return the operations of the masked-LM head on `words` positions."""
    return 2.0 * words * config.hidden_size * (config.hidden_size + config.vocab_size)
