"""Look at the teacher and the student of own data: what is to be done with them, and do they fit.

A teacher that has a classifier for the task's labels is taken as it is (no epochs of training);
another BERT gets a new one.
"""

import argparse
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformer.checkpoint import has_weights, weights_record
from transformer.config import BertConfig, find_config
from transformer.distillation import check_layers
from transformer.file_utils import CONFIG_NAME, UserError, read_json
from transformer.hub import fetch_model
from transformer.tasks import Task, label_order
from transformer.tokenization import load_tokenizer

logger = logging.getLogger(__name__)


class Model(NamedTuple):
    """A model as the user named it; `folder` may lack weights that are still to be fetched.

    is_random: it is a folder of a shape without weights.
    content: a hash of what the user can change in it.
    """

    name: str
    folder: Path
    config: BertConfig
    is_random: bool
    content: str


def read_model(name: str, flag: str, length: int) -> Model:
    """Look at a model, which must have positions for `length` word pieces."""
    try:
        folder = fetch_model(name, weights=False, attempts=2)
        config = BertConfig.from_json_file(find_config(folder))
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from error
    if length > config.max_position_embeddings:
        raise UserError(f"--{flag} {name}: has {config.max_position_embeddings} positions, for rows"
                        f" of {length} word pieces; MAX_SEQ_LENGTH={config.max_position_embeddings}"
                        " cuts them")
    parts = [find_config(folder).read_text(encoding="utf-8")]
    is_trained = has_weights(folder)
    if Path(name).is_dir() and is_trained:
        parts.append(weights_record(name)["source_sha256"])
    content = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    return Model(name, folder, config, Path(name).is_dir() and not is_trained, content)


def describe_models(args: argparse.Namespace, task: Task) -> Iterator[tuple[str, str]]:
    """Yield (variable, value) on the teacher and the student, whose shapes must fit the task."""
    length = args.max_seq_length or task.max_seq_length
    teacher = read_model(args.teacher, "teacher", length)
    yield from describe_teacher(args, task, teacher)
    if args.student:
        student = read_model(args.student, "student", length)
        if args.own_layers == "yes":
            student.config.check_own_layers(
                student.folder, "none is pruned or made a graph; expected PRUNE_STUDENTS="
                " QUANTIZE_STUDENTS= EXPORT_STUDENTS=, all empty")
        yield from describe_student(student, teacher)
    else:
        teacher.config.check_own_layers(
            teacher.folder, "expected --student FOLDER_OR_HUB_ID, a shape for one to start from")
        yield from describe_copy(teacher.config.num_hidden_layers, args.num_layers)
    yield "LENGTH", str(length)


def describe_teacher(args: argparse.Namespace, task: Task,
                     teacher: Model) -> Iterator[tuple[str, str]]:
    """Yield what is to be done with the teacher."""
    if teacher.is_random:
        raise UserError(f"--teacher {teacher.name}: no weights there; expected a trained BERT")
    pieces = len(load_tokenizer(teacher.folder))
    teacher.config.check_vocabulary(pieces, teacher.name)
    heads = str(read_json(teacher.folder / CONFIG_NAME).get("architectures") or "")
    if args.masked_lm == "yes" and heads and not (
            re.search("MaskedLM|PreTraining", heads) and teacher.config.family == "bert"):
        raise UserError(f"--vectors: {teacher.name} has no masked-LM head ({heads}); expected"
                        " AUGMENTATION_MODEL=FOLDER_OR_HUB_ID, a BERT that has one")
    is_ready = "SequenceClassification" in heads and args.new_classifier != "yes"
    if is_ready:
        check_labels(task, teacher)
        yield "TEACHER_EPOCHS", "0"
    logger.info("teacher: %s %s", teacher.name, "as it is, with its classifier" if is_ready
                else "gets a new classifier and is fine-tuned")
    yield "NEW_CLASSIFIER", "no" if is_ready else "yes"
    yield "TEACHER_CONTENT", teacher.content


def check_labels(task: Task, teacher: Model) -> None:
    """Raise a `UserError` unless the teacher's classifier is one for the task."""
    try:
        teacher.config.check_task(teacher.name)
        label_order(task, teacher.config.id2label)
        if teacher.config.num_labels != task.num_labels:
            raise UserError(f"its classifier has {teacher.config.num_labels} outputs, the task"
                            f" {task.num_labels}")
    except UserError as error:
        raise UserError(f"--teacher {teacher.name}: {error} (NEW_CLASSIFIER=yes trains a new"
                        " classifier)") from error


def describe_copy(depth: int, layers: int | None) -> Iterator[tuple[str, str]]:
    """Yield that the student starts as `layers` of the teacher's `depth` layers; None: half."""
    if layers is None:
        layers = max((n for n in range(1, depth // 2 + 1) if depth % n == 0), default=1)
    if not 1 <= layers <= depth:
        raise UserError(f"STUDENT_LAYERS={layers}: expected a number from 1 to the teacher's"
                        f" {depth} layers")
    logger.info("student: %d of the teacher's %d layers", layers, depth)
    yield from {"STUDENT_START": "copied", "STUDENT_LAYERS": str(layers)}.items()


def describe_student(student: Model, teacher: Model) -> Iterator[tuple[str, str]]:
    """Yield how a student that was given starts; its layers and heads must fit the teacher's."""
    try:
        check_layers(teacher.config, student.config)
        if not student.is_random:
            pieces = len(load_tokenizer(teacher.folder))
            student.config.check_vocabulary(pieces, teacher.name)
    except UserError as error:
        raise UserError(f"--student {student.name}: {error}") from error
    logger.info("student: %s%s", student.name, " from random weights" * student.is_random)
    yield "STUDENT_START", "random" if student.is_random else "given"
    yield "STUDENT_CONTENT", student.content
