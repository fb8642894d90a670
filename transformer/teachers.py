"""The teachers of a task: classifiers, each with its own tokenizer and its own order of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import hugging_face
from transformer.config import BertConfig, find_config, has_names, is_supported
from transformer.file_utils import UserError, has_vocabulary, read_json
from transformer.inference import match_labels, note_task, read_classifier
from transformer.modeling import TinyBertForSequenceClassification, freeze, scratch_config
from transformer.recurrent import LAYERS, RecurrentConfig, read_config
from transformer.runtime import parameter_count
from transformer.tasks import Task
from transformer.tokenization import AnyTokenizer, load_tokenizer


@dataclass
class Teacher:
    """A fine-tuned classifier: its settings, and after `load` its frozen model.

    source: as the user named it.
    folder: where its settings are.
    config: of a model that only Hugging Face's library reads, what it says of the labels.
    labels: the task's labels, in the order of its outputs.
    tokenizer: ours or, where `is_ours` is false, the library's.
    size: the number of its parameters, such as `110.1M`.
    """

    source: str
    folder: Path
    config: BertConfig
    labels: tuple[str, ...]
    tokenizer: Any
    is_ours: bool
    model: nn.Module | None = None
    size: str = ""

    @classmethod
    def read(cls, source: str, folder: Path, task: Task, max_seq_length: int,
             do_lower_case: bool | None = None, needs_layers: bool = False) -> "Teacher":
        """Read a teacher's settings, without its weights.

        Args:
            source: what the user called it.
            folder: where it is.
            task: what it teaches.
            max_seq_length: the longest row, in tokens of its tokenizer.
            do_lower_case: of our tokenizers, see `load_tokenizer`.
            needs_layers: whether more than its logits is to be read.

        Raises:
            UserError: labels, vocabulary or length do not fit, or nothing here can read it.
        """
        path = find_config(folder)
        if is_supported(folder):
            config, tokenizer, labels = read_classifier(
                folder, task, max_seq_length, do_lower_case)
            return cls(source, folder, config, labels, tokenizer, is_ours=True)
        if (kind := read_json(path).get("model_type")) in LAYERS:
            raise UserError(f"{path}: a {kind} is a student; expected a BERT or a classifier of the"
                            " package transformers as the teacher")
        if needs_layers:
            try:
                BertConfig.from_json_file(path)
            except UserError as error:
                raise UserError(f"{error}. Of {source} only the logits can be read, by"
                                " --pred_distill without --joint") from error
        config = hugging_face.read_labels(path)
        labels = match_labels(task, config, path)
        tokenizer = hugging_face.load_tokenizer(folder, max_seq_length)
        if do_lower_case and not getattr(tokenizer, "do_lower_case", False):
            raise UserError(f"--do_lower_case: the tokenizer of {source} keeps the case, and the"
                            " model was trained with it; expected a call without the flag")
        return cls(source, folder, config, labels, tokenizer, is_ours=False)

    def load(self, folder: Path, task: Task, device: torch.device, dtype: torch.dtype | None,
             pack: bool = True) -> None:
        """Load its weights strictly; for `dtype` and `pack` see `freeze`."""
        if self.is_ours:
            self.model = TinyBertForSequenceClassification.from_pretrained(
                folder, num_labels=task.num_labels)
            self.config = self.model.config
            note_task(self.config, task, self.labels)
            self.size = parameter_count(self.model)
            freeze(self.model, dtype, device, pack)
        else:
            self.model = hugging_face.load_model(
                folder, self.tokenizer, task.num_labels, device, dtype)
            self.size = parameter_count(self.model)


def choose_tokenizer(
    students: Mapping[str, Path], teacher: Teacher, do_lower_case: bool | None = None,
    same_pieces: bool = True,
) -> AnyTokenizer:
    """Return the students' tokenizer: their own, or where its pieces are the same the teacher's.

    Args:
        students: their folders, by what the user called them.
        teacher: the first one, whose tokenizer those take that have none.
        do_lower_case: see `load_tokenizer`.
        same_pieces: whether they need the teacher's pieces, as the ids that both read.

    Raises:
        UserError: they need them and have others; students whose pieces differ, or that do not fit
            their tokenizer.
    """
    found: AnyTokenizer | None = None
    for source, folder in students.items():
        of_teacher = not has_vocabulary(folder)
        own = load_tokenizer(teacher.folder if of_teacher else folder, do_lower_case)
        if teacher.is_ours and own.vocab == teacher.tokenizer.vocab:
            own, of_teacher = teacher.tokenizer, True
        path = find_config(folder)
        config = read_config(path)
        if isinstance(config, RecurrentConfig):  # it may leave the vocabulary's size open
            config = scratch_config(folder, own, RecurrentConfig)
        config.check_vocabulary(len(own), teacher.source if of_teacher else source, path)
        if same_pieces and own is not teacher.tokenizer:
            raise UserError(f"{source}: its vocabulary has other pieces than that of"
                            f" {teacher.source}; expected the same, or --pred_distill without"
                            " --joint and --copy_embeddings, which takes any")
        if found is not None and own.vocab != found.vocab:
            raise UserError(f"{source}: its vocabulary has other pieces than that of"
                            f" {next(iter(students))}; expected a call of its own")
        found = found or own
    return found


def choose_labels(
    students: Mapping[str, Path], teacher: Teacher, task: Task, same_order: bool = True
) -> tuple[tuple[str, ...], dict[int, str]]:
    """Return the task's labels in the order of the students' outputs, and their names there.

    They are the teacher's, or unless `same_order` those of students that have names already; two
    orders are a `UserError`.
    """
    labels, names, whose = teacher.labels, teacher.config.id2label, "the teacher's"
    for source, folder in students.items():
        config = read_config(path := find_config(folder))
        # Of another number are those of a model without classifier, or its weights will tell.
        if not has_names(config.id2label) or config.num_labels != task.num_labels:
            continue
        if (own := match_labels(task, config, path)) != labels:
            if same_order:
                raise UserError(f"{source}: its labels are ordered {own}, {whose} {labels}")
            labels, names = own, config.id2label
        same_order, whose = True, f"those of {source}"
    return labels, names if task.is_glue or not labels else dict(enumerate(labels))


def in_order(logits: Tensor, own: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Return logits [rows, labels] whose columns are the labels `own` in the order `wanted`."""
    if tuple(own) == tuple(wanted):
        return logits
    return logits[:, [own.index(label) for label in wanted]]


def mean_logits(
    logits: Sequence[Tensor], weights: Sequence[float], temperature: float = 1.0
) -> Tensor:
    """Combine the logits of several teachers, each [rows, labels]: the mean of their probabilities.

    softmax(result / temperature) is the weighted mean of each softmax(logits / temperature), so
    the loss must divide by the same temperature. The scores of a regression are averaged
    themselves, and a single teacher's logits are returned as they are. Weights need not sum to 1.
    """
    if len(logits) == 1:
        return logits[0]
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = (shares / shares.sum())[:, None, None]  # [teachers, 1, 1]
    stacked = torch.stack([*logits]).double()  # [teachers, rows, labels]
    if stacked.shape[2] == 1:
        return (shares * stacked).sum(dim=0).float()
    log_probabilities = F.log_softmax(stacked / temperature, dim=-1)
    return (temperature * torch.logsumexp(log_probabilities + shares.log(), dim=0)).float()
