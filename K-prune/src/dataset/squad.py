"""SQuAD 1.1 and 2.0: questions on paragraphs, cut into windows that a model can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from transformer.features import Features
from transformer.file_utils import UserError, read_json
from transformer.tokenization import AnyTokenizer

SQUAD_FILES = {
    "squad": {"train": "train-v1.1.json", "dev": "dev-v1.1.json"},
    "squad_v2": {"train": "train-v2.0.json", "dev": "dev-v2.0.json"},
}
MAX_QUESTION_LENGTH = 64  # word pieces
TYPE_NAMES = {str: "a string", int: "a whole number", bool: "true or false", list: "a list",
              dict: "an object"}
DOC_STRIDE = 128  # word pieces from the start of a window to the start of the next


class Question(NamedTuple):
    """One question; `answers` are the accepted ones and empty where the text holds none."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]


def read_squad(path: Path | str) -> list[Question]:
    """Read a SQuAD file; whatever is wrong with it is a `UserError` that names the file."""
    path = Path(path)
    content = read_json(path)
    questions = []
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                questions += [_question(path, entry, paragraph) for entry in paragraph["qas"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected SQuAD's layout (data, paragraphs, context, qas with id, question"
            f" and answers); {type(error).__name__}: {error}"
        ) from error
    if not questions:
        raise UserError(f"{path}: no questions; expected at least one")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{path}: question {question.id!r} is there more than once; expected"
                            " an id of its own for each")
        seen.add(question.id)
    return questions


def _question(path: Path, entry: Mapping[str, Any], paragraph: Mapping[str, Any]) -> Question:
    where = f"{path}: question {entry['id']!r}"
    name = _typed(where, "id", entry["id"], str)
    text = _typed(where, "question", entry["question"], str)
    context = _typed(where, "context", paragraph["context"], str)
    if _typed(where, "is_impossible", entry.get("is_impossible", False), bool):
        return Question(name, text, context, ())
    answers = []
    for answer in _typed(where, "answers", entry["answers"], list):
        _typed(where, "an answer", answer, dict)
        answers.append(_typed(where, "an answer's text", answer["text"], str))
        _typed(where, "answer_start", answer.get("answer_start", 0), int)
    return Question(name, text, context, tuple(answers))


def _typed(where: str, what: str, value: Any, kind: type) -> Any:
    """Return a value of the file; one of another type is a `UserError`."""
    if type(value) is not kind:  # not isinstance: for Python true is an integer, in JSON it is not
        raise UserError(f"{where}: {what} is {value!r:.60}; expected {TYPE_NAMES[kind]}")
    return value


def squad_path(task: str, data_dir: Path | str, split: str) -> Path:
    """Find the file of a split; where it is missing, the `UserError` says what was expected."""
    path = Path(data_dir) / SQUAD_FILES[task][split]
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the {split} file of {task}"
                        " (--data_dir is the folder that holds it)")
    return path


@dataclass
class Windows:
    """Questions with passages of their paragraphs: "[CLS] question [SEP] passage [SEP]".

    features: the windows as model input.
    starts: [windows], where the passage begins in each.
    question: [windows], the place of each window's question in the list it was made from.
    pieces: for each window the character span in the paragraph of each of its word pieces,
        int [pieces of the passage, 2].
    """

    features: Features
    starts: np.ndarray
    question: np.ndarray
    pieces: list[np.ndarray]

    def context_start(self, window: int) -> int:
        """Return where the passage begins in a window."""
        return int(self.starts[window])


def make_windows(
    questions: list[Question], tokenizer: AnyTokenizer, max_seq_length: int,
    doc_stride: int = DOC_STRIDE,
) -> Windows:
    """Cut each paragraph into windows that overlap, each with its whole question before it.

    A window starts `doc_stride` word pieces after the one before it, or where that one ends if
    it is shorter. Of a question the first 64 word pieces are kept, fewer where the length
    leaves no room.
    """
    if max_seq_length < 8 or doc_stride < 1:
        raise UserError(f"--max_seq_length {max_seq_length}, stride {doc_stride}; expected at"
                        " least 8 and 1")
    rows, starts, owners, pieces = [], [], [], []
    between = [tokenizer.sep_id] * tokenizer.separators
    special = 2 + len(between)
    spans_of: dict[str, tuple[list[int], np.ndarray]] = {}  # each paragraph has many questions
    for number, question in enumerate(questions):
        if question.context not in spans_of:
            ids, spans = tokenizer.encode_with_spans(question.context)
            spans_of = {question.context: (ids, np.array(spans).reshape(-1, 2))}
        ids, spans = spans_of[question.context]
        longest = min(MAX_QUESTION_LENGTH, (max_seq_length - special) // 2)
        query = tokenizer.encode_batch([question.question])[0][:longest]
        room = max_seq_length - special - len(query)
        start = 0
        while True:
            passage = ids[start : start + room]
            rows.append([tokenizer.cls_id, *query, *between, *passage, tokenizer.sep_id])
            starts.append(1 + len(query) + len(between))
            owners.append(number)
            pieces.append(spans[start : start + room])
            if start + room >= len(ids):
                break
            start += min(room, doc_stride)
    lengths = [len(row) for row in rows]
    first_lengths = np.array(starts if tokenizer.segments else lengths, dtype=np.int32)
    features = Features(
        np.concatenate(rows).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]),
        first_lengths, torch.zeros(len(rows)), (), tokenizer.pad_id)
    return Windows(features, np.array(starts), np.array(owners), pieces)
