"""SQuAD: from the logits of start and end to answers, and from answers to exact match and F1."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from dataset.squad import Question, Windows
from torch import nn

from transformer.batching import batches
from transformer.modeling import inference_copy, model_inputs

BEST_POSITIONS = 20  # of starts and of ends that are combined
LONGEST_ANSWER = 30  # word pieces

# ------------------------------------------------------------------ metrics


def normalize(answer: str) -> str:
    """Return an answer in lower case, without punctuation, articles and surplus white space."""
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(predicted: str, gold: str) -> float:
    """Return 1 where two answers are the same after `normalize`, else 0."""
    return float(normalize(predicted) == normalize(gold))


def f1(predicted: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over words.

    Where one of the two is "no answer", 1 if both are and else 0.
    """
    ours, theirs = normalize(predicted).split(), normalize(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def squad_metrics(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, float]:
    """Return exact match and F1, means over questions as fractions of 1.

    Each question counts with the best of its accepted answers. Where some have none (2.0), the
    means over those that have one and over the others follow.
    """
    scores = []
    for question in questions:
        # An answer that is nothing after normalisation is not one that can be matched.
        accepted = [text for text in question.answers if normalize(text)] or [""]
        given = answers[question.id]
        scores.append([max(measure(given, text) for text in accepted)
                       for measure in (exact_match, f1)])
    table = np.array(scores)
    means = table.mean(axis=0)
    metrics = {"exact_match": float(means[0]), "f1": float(means[1])}
    answerable = np.array([bool(question.answers) for question in questions])
    for name, chosen in (("answerable", answerable), ("unanswerable", ~answerable)):
        if not answerable.all() and chosen.any():
            metrics[f"{name}_f1"] = float(table[chosen, 1].mean())
    return metrics


# ------------------------------------------------------------------ answers


def best_span(start: np.ndarray, end: np.ndarray) -> tuple[float, int, int]:
    """Return the score and the first and last position of the best span.

    A span ends where it starts or later, and is at most 30 word pieces long; the score is the sum
    of both logits. Minus infinity and (0, 0) without positions.

    Args:
        start, end: logits [positions].
    """
    starts, ends = (np.argsort(-x, kind="stable")[:BEST_POSITIONS] for x in (start, end))
    length = ends[None, :] - starts[:, None] + 1
    scores = start[starts][:, None] + end[ends][None, :]
    scores = np.where((length >= 1) & (length <= LONGEST_ANSWER), scores, -np.inf)
    if not scores.size:
        return -np.inf, 0, 0
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[row, column]), int(starts[row]), int(ends[column])


def decode(
    questions: Sequence[Question], windows: Windows, logits: Sequence[np.ndarray],
    unanswerable: bool,
) -> dict[str, str]:
    """Return the answer to each question: the best span of all its windows, cut from the text.

    Args:
        logits: for each window [length, 2], start and end.
        unanswerable: SQuAD 2.0: answer "" where [CLS] scores higher than the best span.
    """
    best = {question.id: (-np.inf, "") for question in questions}
    no_answer = dict.fromkeys(best, np.inf)
    for window, scores in enumerate(logits):
        question = questions[windows.question[window]]
        first, spans = windows.context_start(window), windows.pieces[window]
        start, end = scores[first : first + len(spans)].T
        score, left, right = best_span(start, end)
        no_answer[question.id] = min(no_answer[question.id], float(scores[0].sum()))
        if score > best[question.id][0]:
            best[question.id] = score, question.context[spans[left][0] : spans[right][1]]
    return {name: "" if unanswerable and no_answer[name] > score else text
            for name, (score, text) in best.items()}


def window_logits(
    model: nn.Module, windows: Windows, device: torch.device, batch_size: int
) -> list[np.ndarray]:
    """Return the logits of a question-answering model for each window, [length, 2]."""
    features = windows.features
    model = inference_copy(model, None, device)
    logits: list[np.ndarray] = [np.empty(0)] * len(features)
    with torch.inference_mode():
        for indices in batches(features.lengths, batch_size):
            inputs = [tensor.to(device) for tensor in model_inputs(features.collate(indices))]
            found = model(*inputs, score_layers=()).logits.cpu().numpy()
            for window, scores in zip(indices, found, strict=True):
                logits[window] = scores[: features.lengths[window]]
    return logits


def evaluate_squad(
    model: nn.Module, questions: Sequence[Question], windows: Windows, device: torch.device,
    batch_size: int, unanswerable: bool,
) -> dict[str, float]:
    """Return the metrics of a question-answering model on questions cut into `windows`."""
    logits = window_logits(model, windows, device, batch_size)
    return squad_metrics(questions, decode(questions, windows, logits, unanswerable))
