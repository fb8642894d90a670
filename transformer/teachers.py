"""The teachers of a task: classifiers, each with its own tokenizer and its own order of labels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import hugging_face
from transformer.config import BertConfig, find_config, reads
from transformer.file_utils import UserError
from transformer.inference import match_labels, note_task, read_classifier
from transformer.modeling import TinyBertForSequenceClassification, freeze
from transformer.runtime import parameter_count
from transformer.tasks import Task

logger = logging.getLogger(__name__)


@dataclass
class Teacher:
    """A fine-tuned classifier: its settings, and after `load` its frozen model.

    source: as the user named it.
    config: of a model that only Hugging Face's library reads, what it says of the labels.
    labels: the task's labels, in the order of its outputs.
    tokenizer: ours or, where `is_ours` is false, the library's.
    size: the number of its parameters, such as `110.1M`.
    """

    source: str
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
        if reads(folder):
            config, tokenizer, labels = read_classifier(
                folder, task, max_seq_length, do_lower_case)
            return cls(source, config, labels, tokenizer, is_ours=True)
        if needs_layers:
            try:
                BertConfig.from_json_file(path)
            except UserError as error:
                raise UserError(f"{error}. Of {source} only the logits can be read, by"
                                " --pred_distill") from error
        config = hugging_face.read_labels(path)
        labels = match_labels(task, config, path)
        tokenizer = hugging_face.load_tokenizer(folder, max_seq_length)
        if do_lower_case and not getattr(tokenizer, "do_lower_case", False):
            raise UserError(f"--do_lower_case: the tokenizer of {source} keeps the case, and the"
                            " model was trained with it; expected a call without the flag")
        return cls(source, config, labels, tokenizer, is_ours=False)

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
            self.model = hugging_face.load_model(folder, task.num_labels, device, dtype)
            self.size = parameter_count(self.model)


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
