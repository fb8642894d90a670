"""The baseline: a plain implementation of the work that the original code does, for measuring only.

It computes what this project computes with --match_original, without any of the shortcuts: float32,
every row padded to the full length, all scores and hidden states kept, a teacher in train mode.
Tests check that both do the same work.
"""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from transformer.modeling import BertConfig

EVAL_BATCH = 32
Batch = dict[str, Tensor]  # input_ids, token_type_ids, attention_mask [batch, length]; labels


# ------------------------------------------------------------------ BERT's tokenizer


def is_ideograph(character: str) -> bool:
    """Whether it is one of the CJK Unified Ideographs; those of two planes, as far as needed."""
    return "\u4e00" <= character <= "\u9fff" or "\u3400" <= character <= "\u4dbf"


def is_punctuation(character: str) -> bool:
    is_ascii = character.isascii() and character.isprintable()
    return (is_ascii and not character.isalnum() and character != " "
            ) or unicodedata.category(character).startswith("P")


def basic_tokens(text: str) -> Iterator[str]:
    """Lower-cased words without accents, ideographs and punctuation marks."""
    decomposed = unicodedata.normalize("NFD", text.lower())
    kept = (each for each in decomposed if unicodedata.category(each) != "Mn")
    for word in "".join(f" {each} " if is_ideograph(each) else each for each in kept).split():
        token = ""
        for character in word:
            if is_punctuation(character):
                yield from filter(None, (token, character))
                token = ""
            else:
                token += character
        yield from filter(None, [token])


def word_pieces(token: str, vocab: Mapping[str, int]) -> list[str]:
    """The longest pieces from the left; [UNK] for more than 100 characters, too."""
    if len(token) > 100:
        return ["[UNK]"]
    pieces: list[str] = []
    start = 0
    while start < len(token):
        prefix = "##" if start else ""
        for end in range(len(token), start, -1):
            if prefix + token[start:end] in vocab:
                break
        else:
            return ["[UNK]"]
        pieces.append(prefix + token[start:end])
        start = end
    return pieces


def tokenize(text: str, vocab: Mapping[str, int]) -> list[int]:
    """Ids of a text without special tokens and control characters, as the original finds them."""
    return [vocab[piece] for token in basic_tokens(text) for piece in word_pieces(token, vocab)]


# ------------------------------------------------------------------ BERT


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class PlainLayerNorm(nn.Module):
    """Layer normalization in single operations, as the original has it where apex is absent."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + self.eps)) + self.bias


class PlainLayer(nn.Module):
    """One Transformer layer that returns its raw attention scores too."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.output_norm = PlainLayerNorm(width, config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.down_norm = PlainLayerNorm(width, config.layer_norm_eps)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (
            self.split(part(hidden)) for part in (self.query, self.key, self.value)
        )  # [batch, heads, length, head width]
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1]) + mask
        attention = self.attention_dropout(nn.Softmax(dim=-1)(scores))
        context = torch.matmul(attention, value).permute(0, 2, 1, 3).contiguous()
        context = self.output(context.view(hidden.shape))
        hidden = self.output_norm(self.dropout(context) + hidden)
        return self.down_norm(self.dropout(self.down(gelu(self.up(hidden)))) + hidden), scores


class PlainBert(nn.Module):
    """Encoder and pooler; returns (all scores, all hidden states, pooled output).

    Args:
        fit_size: the teacher's width, for a student whose hidden states are mapped to it.
    """

    def __init__(self, config: BertConfig, fit_size: int | None = None) -> None:
        super().__init__()
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.segments = nn.Embedding(config.type_vocab_size, width)
        self.norm = PlainLayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(width, width)
        self.fit = nn.Linear(width, fit_size) if fit_size else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        embeddings = self.words(input_ids) + self.positions(positions.expand_as(input_ids))
        hidden = self.dropout(self.norm(embeddings + self.segments(token_type_ids)))
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
        all_scores, all_hidden = [], [hidden]
        for layer in self.layers:
            hidden, scores = layer(hidden, mask)
            all_scores.append(scores)
            all_hidden.append(hidden)
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        if self.fit is not None:
            all_hidden = [self.fit(hidden) for hidden in all_hidden]
        return all_scores, all_hidden, pooled


class PlainClassifier(nn.Module):
    """Teacher and student of task distillation; returns (logits, scores, hidden states)."""

    def __init__(self, config: BertConfig, labels: int = 2, fit_size: int | None = None) -> None:
        super().__init__()
        self.bert = PlainBert(config, fit_size)
        self.classifier = nn.Linear(config.hidden_size, labels)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        scores, hidden, pooled = self.bert(*inputs)
        return self.classifier(torch.relu(pooled)), scores, hidden


def inputs_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]


# ------------------------------------------------------------------ training


class PlainAdam:
    """Adam without bias correction, one parameter after the other."""

    def __init__(self, model: nn.Module, rate: float, decay: float = 0.01) -> None:
        self.rate, self.decay = rate, decay
        self.parameters = list(model.parameters())
        self.moments: dict[Tensor, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter not in self.moments:
                self.moments[parameter] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            first, second = self.moments[parameter]
            nn.utils.clip_grad_norm_(parameter, 1.0)
            first.mul_(0.9).add_(parameter.grad, alpha=0.1)
            second.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            update = first / (second.sqrt() + 1e-6)
            if parameter.dim() > 1:  # neither biases nor LayerNorms decay
                update += self.decay * parameter
            parameter.add_(-self.rate * update)
            parameter.grad = None


def intermediate_losses(
    student_scores: Sequence[Tensor], student_hidden: Sequence[Tensor],
    teacher_scores: Sequence[Tensor], teacher_hidden: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Attention and hidden loss, each the sum over the student's layers, padding included."""
    step = len(teacher_scores) // len(student_scores)
    square = nn.MSELoss()
    attention = hidden = 0.0
    for ours, theirs in zip(student_scores, teacher_scores[step - 1 :: step], strict=True):
        ours = torch.where(ours <= -1e2, torch.zeros_like(ours), ours)
        theirs = torch.where(theirs <= -1e2, torch.zeros_like(theirs), theirs)
        attention = attention + square(ours, theirs)
    for ours, theirs in zip(student_hidden, teacher_hidden[::step], strict=True):
        hidden = hidden + square(ours, theirs)
    return attention, hidden


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_student = nn.functional.log_softmax(student_logits, dim=-1)
    return (-nn.functional.softmax(teacher_logits, dim=-1) * log_student).mean()


def finish_step(optimizer: PlainAdam, *losses: Tensor) -> list[float]:
    """Backward pass and update; each loss is read at once, as the original logs it."""
    values = [loss.item() for loss in losses]
    sum(losses).backward()
    optimizer.step()
    return values


def general_step(
    student: PlainBert, teacher: PlainBert, optimizer: PlainAdam, batch: Batch
) -> list[float]:
    """One step of general distillation; the teacher's graph is built and thrown away.

    The original holds that graph until the next one is whole: 8 GB more, and no slower.
    """
    student.train()
    teacher.train()
    student_scores, student_hidden, _ = student(*inputs_of(batch))
    teacher_scores, teacher_hidden, _ = teacher(*inputs_of(batch))
    return finish_step(optimizer, *intermediate_losses(
        student_scores, student_hidden,
        [scores.detach() for scores in teacher_scores],
        [hidden.detach() for hidden in teacher_hidden]))


def task_step(
    student: PlainClassifier, teacher: PlainClassifier, optimizer: PlainAdam, batch: Batch,
    prediction: bool,
) -> list[float]:
    """One step of task distillation; the teacher runs in either stage, at every step."""
    student.train()
    teacher.train()
    student_logits, student_scores, student_hidden = student(*inputs_of(batch))
    with torch.no_grad():
        teacher_logits, teacher_scores, teacher_hidden = teacher(*inputs_of(batch))
    if prediction:
        return finish_step(optimizer, soft_cross_entropy(student_logits, teacher_logits))
    return finish_step(optimizer, *intermediate_losses(
        student_scores, student_hidden, teacher_scores, teacher_hidden))


def finetune_step(model: PlainClassifier, optimizer: PlainAdam, batch: Batch) -> list[float]:
    """One step on the labels."""
    model.train()
    loss = nn.functional.cross_entropy(model(*inputs_of(batch))[0], batch["labels"])
    return finish_step(optimizer, loss)


def evaluate(model: PlainClassifier, rows: Batch) -> Tensor:
    """Return the logits [rows, labels] on the CPU; batches of 32, in order."""
    model.eval()
    outputs = []
    for start in range(0, len(rows["labels"]), EVAL_BATCH):
        batch = {name: values[start : start + EVAL_BATCH] for name, values in rows.items()}
        with torch.no_grad():
            logits = model(*inputs_of(batch))[0]
        nn.functional.cross_entropy(logits, batch["labels"]).item()
        outputs.append(logits.cpu())
    return torch.cat(outputs)
