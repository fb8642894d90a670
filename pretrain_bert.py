"""Trains a masked language model: a whole small BERT, or a head for a BERT that has none.

The demo pre-trains its base model with it (--config); --vocab_size makes a vocabulary for any
language from the same text. A real BERT that was published without its masked-LM head gets one
with --bert_model and --head_only, which leaves every other weight as it is. Prints loss and
accuracy on held-out text before and after.

Example:
    python pretrain_bert.py --config data/demo/bert_config --train_corpus data/corpus.txt \
        --output_dir models/bert-base-uncased --max_seq_length 64 \
        --shallow_layers 3 --shallow_steps 1000 --steps 250
    python pretrain_bert.py --config profiles/chinese_4l_config --vocab_size 3000 \
        --train_corpus data/waimai/corpus.txt --output_dir models/chinese/bert
    python pretrain_bert.py --bert_model models/minilm --head_only \
        --train_corpus data/corpus.txt --output_dir models/bert-base-uncased
"""

import argparse
import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from transformer import run_folder, runtime
from transformer.checkpoint import save_pretrained
from transformer.config import BertConfig, find_config
from transformer.file_utils import UserError, text_lines
from transformer.hub import fetch_model
from transformer.modeling import BertForMaskedLM
from transformer.optimization import BertAdam, param_groups
from transformer.tokenization import BertTokenizer, load_tokenizer
from transformer.tokenizer_files import train_vocabulary
from transformer.training import autocast, to_device

logger = logging.getLogger(__name__)

HELD_OUT_EVERY = 20  # every twentieth document is kept for measuring
HELD_OUT_ROWS = 256  # sequences at most
IGNORED = -100
Document = list[list[int]]  # word-piece ids of each sentence
Batch = dict[str, torch.Tensor]


class Row(NamedTuple):
    """One training row: its ids with [CLS] and [SEP], and how many belong to segment 0."""

    ids: list[int]
    first_length: int


def read_documents(path: Path, tokenizer: BertTokenizer) -> list[Document]:
    """Read a corpus: one sentence a line, a blank line between documents.

    Where no line is blank, each is a document.
    """
    documents: list[Document] = [[]]
    lines = [line for _, line in text_lines(path)]
    for line, ids in zip(lines, tokenizer.encode_batch(lines), strict=True):
        if line.strip():
            documents[-1].append(ids)
        elif documents[-1]:
            documents.append([])
    documents = [document for document in documents if document]
    if not documents:
        raise UserError(f"{path}: no text; expected one sentence a line")
    if len(documents) == 1:
        logger.info("%s: no blank line between documents; each line is one", path)
        documents = [[sentence] for sentence in documents[0] if sentence]
    return documents


def pack(
    document: Document, tokenizer: BertTokenizer, length: int, rng: np.random.Generator
) -> Iterator[Row]:
    """Cut a document into rows of whole sentences, as full as `length` allows.

    A row of several sentences is split at one of them into two segments, as BERT's rows are.
    """
    room = length - 3
    waiting: Document = []
    for number, sentence in enumerate(document):
        waiting.append(sentence[:room])
        following = len(document[number + 1][:room]) if number + 1 < len(document) else length
        if sum(map(len, waiting)) + following <= room:
            continue
        split = int(rng.integers(1, len(waiting))) if len(waiting) > 1 else 1
        first = [tokenizer.cls_id, *sum(waiting[:split], []), tokenizer.sep_id]
        second = sum(waiting[split:], [])
        yield Row(first + ([*second, tokenizer.sep_id] if second else []), len(first))
        waiting = []


def mask_rows(
    rows: list[Row], tokenizer: BertTokenizer, probability: float, rng: np.random.Generator
) -> Batch:
    """Pad rows to a batch and mask it: 80 % [MASK], 10 % another word piece, 10 % unchanged.

    Returns tensors [batch, length]; `labels` is -100 where nothing is to be predicted. Each row
    gets at least one masked token, unless the probability is 0.
    """
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), tokenizer.pad_id, dtype=np.int64)
    segments = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
        segments[number, row.first_length : len(row.ids)] = 1
    special = np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id])
    draw = rng.random(ids.shape) + 2.0 * special  # special tokens are never drawn
    chosen = (draw < probability) | ((draw == draw.min(1, keepdims=True)) & (probability > 0))
    chosen &= ~special
    labels = np.where(chosen, ids, IGNORED)
    kind = rng.random(ids.shape)
    other = rng.integers(len(tokenizer), size=ids.shape)
    masked = np.where(chosen & (kind < 0.8), tokenizer.mask_id, ids)
    masked = np.where(chosen & (kind >= 0.9), other, masked)
    attention = (ids != tokenizer.pad_id).astype(np.int64)
    arrays = {"input_ids": masked, "token_type_ids": segments, "attention_mask": attention,
              "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def training_batches(
    documents: list[Document], tokenizer: BertTokenizer, args: argparse.Namespace
) -> Iterator[Batch]:
    """Yield masked batches for ever; each pass over the text packs and masks it anew."""
    rng = np.random.default_rng(args.seed % 2**64)
    while True:
        rows = [row for document in documents
                for row in pack(document, tokenizer, args.max_seq_length, rng)]
        rng.shuffle(order := np.arange(len(rows)))
        for start in range(0, len(rows), args.train_batch_size):
            batch = [rows[i] for i in order[start : start + args.train_batch_size]]
            yield mask_rows(batch, tokenizer, args.masked_lm_prob, rng)


@torch.no_grad()
def measure(
    model: BertForMaskedLM, batches: list[Batch], device: torch.device, dtype: torch.dtype | None
) -> tuple[float, float]:
    """Return (loss in nats, accuracy) over the masked tokens of all batches."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for batch in batches:
        batch = to_device(batch, device)
        labels = batch.pop("labels")
        with autocast(device, dtype):
            logits = model(**batch, masked_positions=labels != IGNORED).logits  # [count, vocab]
        labels = labels[labels != IGNORED]
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        correct += int((logits.argmax(dim=-1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count


def most_frequent_share(training: list[Document], batches: list[Batch]) -> float:
    """Return the accuracy of always guessing the most frequent word piece."""
    counts = np.bincount([i for document in training for sentence in document for i in sentence])
    labels = torch.cat([batch["labels"][batch["labels"] != IGNORED] for batch in batches])
    return float((labels == int(counts.argmax())).float().mean())


def build_model(args: argparse.Namespace) -> tuple[BertForMaskedLM, BertTokenizer]:
    """Make or load the model and its tokenizer; --head_only freezes all but the head."""
    source = fetch_model(args.config or args.bert_model, weights=args.config is None)
    if args.vocab_size:
        pieces = train_vocabulary([line for _, line in text_lines(args.train_corpus)],
                                  args.vocab_size)
        logger.info("%s: a vocabulary of %d word pieces", args.train_corpus, len(pieces))
        tokenizer = BertTokenizer({piece: number for number, piece in enumerate(pieces)})
    else:
        vocabulary = args.vocab or source
        if not Path(vocabulary).is_file():
            vocabulary = fetch_model(vocabulary, weights=False)
        tokenizer = load_tokenizer(vocabulary)
        if not isinstance(tokenizer, BertTokenizer):
            raise UserError(f"{tokenizer.file}: no BERT's vocabulary; expected one (vocab.txt)")
    if args.config is not None:
        config = BertConfig.from_json_file(path := find_config(source))
        BertForMaskedLM.check_family(config, path)
        config.pad_token_id = tokenizer.pad_id
        if args.vocab_size:
            config.vocab_size = len(tokenizer)
        model = BertForMaskedLM(config)
        sinusoidal_positions(model)
    else:
        model = BertForMaskedLM.from_pretrained(source, new_head=True)
    model.config.check_vocabulary(len(tokenizer), source)
    model.config.check_length(args.max_seq_length, source)
    if args.shallow_layers >= model.config.num_hidden_layers:
        raise UserError(f"--shallow_layers {args.shallow_layers}; expected fewer than the model's "
                        f"{model.config.num_hidden_layers}")
    if args.head_only:
        model.bert.requires_grad_(False)  # the decoder's weight is the word embedding: frozen too
    return model, tokenizer


def sinusoidal_positions(model: BertForMaskedLM) -> None:
    """Start the position embeddings from waves, of the other embeddings' size.

    A short training finds neighbouring words sooner from them than from random vectors.
    """
    weight = model.bert.embeddings.position_embeddings.weight
    positions, width = weight.shape
    half = torch.arange((width + 1) // 2)
    angles = torch.arange(positions)[:, None] * 100.0 ** (-half / len(half))  # [positions, half]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
    with torch.no_grad():
        weight.copy_(waves * model.config.initializer_range)


def shallow_model(model: BertForMaskedLM, layers: int) -> BertForMaskedLM:
    """Make a model that shares all weights of `model` but has its first `layers` layers alone."""
    shallow = copy.copy(model)
    shallow._modules = dict(model._modules)
    shallow.bert, encoder = copy.copy(model.bert), copy.copy(model.bert.encoder)
    shallow.bert._modules = {**model.bert._modules, "encoder": encoder}
    encoder._modules = {"layer": model.bert.encoder.layer[:layers]}
    encoder.order = encoder.order[:layers]
    return shallow


def stack_layers(model: BertForMaskedLM, layers: int) -> None:
    """Copy the first `layers` layers over all later ones, again and again."""
    encoder = model.bert.encoder.layer
    for number in range(layers, len(encoder)):
        encoder[number].load_state_dict(encoder[number % layers].state_dict())


def train(
    model: BertForMaskedLM, batches: Iterator[Batch], args: argparse.Namespace, steps: int,
    schedule_steps: int, learning_rate: float, device: torch.device, dtype: torch.dtype | None,
    log: run_folder.JsonLog,
) -> None:
    """Take `steps` optimizer steps of a schedule that falls to 0 after `schedule_steps`."""
    # BertAdam does not correct its moments' bias: with the usual 0.999 the first thousand steps
    # would be several times too large, and a short run consists of them.
    optimizer = BertAdam(
        param_groups(model, args.weight_decay), lr=learning_rate,
        warmup=args.warmup_proportion, t_total=schedule_steps, b2=0.98)
    model.train()
    if args.head_only:
        model.bert.eval()  # a frozen body gives the features that it gives when it is used
    layers = len(model.bert.encoder.layer)
    means = run_folder.RunningMean()
    progress = tqdm(range(1, steps + 1), desc=f"{layers} layers", unit="step", mininterval=5)
    for step in progress:
        batch = to_device(next(batches), device)
        with autocast(device, dtype):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        means.add({"loss": loss})
        if step % args.log_step == 0 or step == steps:
            record = {"layers": layers, "step": step, "steps": means.count, **means.read(),
                      "lr": optimizer.get_lr()[0]}
            log.write(record)
            progress.set_postfix(loss=f"{record['loss']:.3f}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train_corpus", type=Path, required=True,
        help="text file: one sentence a line, a blank line between documents")
    add("--config", type=str,
        help="folder, URL or hub id with config.json and vocab.txt: start from random")
    add("--bert_model", type=str,
        help="trained BERT, with or without the head: folder, URL or hub id")
    add("--vocab", type=str,
        help="folder, URL, hub id or file of the vocabulary, where it is elsewhere")
    add("--vocab_size", type=int, default=0,
        help="with --config: train a lower-case vocabulary of at most this many word pieces on"
        " the corpus; 0: take what is there")
    add("--output_dir", type=Path, required=True, help="folder for the trained model")
    add("--head_only", action="store_true", help="train the masked-LM head alone")
    add("--max_seq_length", type=int, default=64, help="word pieces a row, special ones included")
    add("--steps", type=int, default=600, help="optimizer steps")
    add("--shallow_layers", type=int, default=0,
        help="layers to train alone first and then copy to the full depth; 0: none. A deep, "
        "narrow BERT learns little in its first thousand steps, a shallow one does")
    add("--shallow_steps", type=int, default=0, help="optimizer steps with those layers alone")
    add("--train_batch_size", type=int, default=32, help="rows a step")
    add("--learning_rate", type=float, default=2e-3,
        help="peak learning rate, of the shallow layers where they are trained first")
    add("--masked_lm_prob", type=float, default=0.15, help="share of the tokens to predict")
    add("--log_step", type=int, default=50, help="steps between lines of log.jsonl")
    add("--warmup_proportion", type=float, default=0.1, help="share of the steps that warm up")
    add("--weight_decay", type=float, default=0.01, help="decoupled weight decay")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--no_cuda", action="store_true", help="compute on the CPU")
    runtime.add_precision_argument(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a number out of range, or flags that do not fit together."""
    if (args.config is None) == (args.bert_model is None):
        raise UserError("give either --config (random weights) or --bert_model (trained ones)")
    if args.head_only and args.config is not None:
        raise UserError("--head_only trains a head for a trained model; expected --bert_model")
    if args.vocab_size and (args.vocab_size < 100 or args.config is None or args.vocab):
        raise UserError(f"--vocab_size {args.vocab_size} makes a vocabulary; expected at least"
                        " 100, with --config and without --vocab")
    if args.max_seq_length < 8:
        raise UserError(f"--max_seq_length {args.max_seq_length}; expected at least 8")
    if not 0 < args.masked_lm_prob < 1:
        raise UserError(f"--masked_lm_prob {args.masked_lm_prob}; expected between 0 and 1")
    if bool(args.shallow_layers) != bool(args.shallow_steps) or args.shallow_layers < 0:
        raise UserError("--shallow_layers and --shallow_steps belong together and are >= 1")


def main(args: argparse.Namespace) -> None:
    """Train and save a masked language model."""
    # Model and text
    check_args(args)
    runtime.set_seed(args.seed)
    device = runtime.get_device(args.no_cuda)
    dtype = runtime.resolve_precision(args.precision, device)
    model, tokenizer = build_model(args)
    documents = read_documents(args.train_corpus, tokenizer)
    held_out = documents[::HELD_OUT_EVERY]
    training = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY] or documents
    rng = np.random.default_rng((args.seed + 1) % 2**64)
    rows = [r for d in held_out for r in pack(d, tokenizer, args.max_seq_length, rng)]
    rows = rows[:HELD_OUT_ROWS]
    test = [mask_rows(rows[start : start + 32], tokenizer, args.masked_lm_prob, rng)
            for start in range(0, len(rows), 32)]

    # Training, with a measurement on held-out text on either side
    inputs = filter(None, (args.config, args.bert_model, args.vocab, args.train_corpus))
    run_folder.prepare_output_dir(args.output_dir, args.overwrite_output_dir, inputs)
    start = runtime.log_start(args, device, dtype, parameters=runtime.parameter_count(model),
                              documents=len(training), held_out=len(held_out))
    model.to(device)
    report = "%s: masked-LM loss %.3f, accuracy %.1f %% on held-out text"
    before = measure(model, test, device, dtype)
    logger.info(report + " (most frequent piece: %.1f %%)", "start", before[0], 100 * before[1],
                100 * most_frequent_share(training, test))
    batches = training_batches(training, tokenizer, args)
    log = run_folder.JsonLog(args.output_dir / "log.jsonl")
    rate = args.learning_rate
    if args.shallow_steps:
        # Progressive stacking (Gong et al. 2019). The shallow model's rate stays high to its end;
        # the deep one bears a lower rate and would forget everything at the shallow one's.
        shallow = shallow_model(model, args.shallow_layers)
        train(shallow, batches, args, args.shallow_steps, 3 * args.shallow_steps, rate, device,
              dtype, log)
        stack_layers(model, args.shallow_layers)
        rate *= (args.shallow_layers / model.config.num_hidden_layers) ** 0.5
    train(model, batches, args, args.steps, args.steps, rate, device, dtype, log)
    after = measure(model, test, device, dtype)
    logger.info(report, "end", after[0], 100 * after[1])

    # Saving
    save_pretrained(model, args.output_dir, tokenizer)
    start["masked_lm"] = {"loss_before": before[0], "accuracy_before": before[1],
                          "loss": after[0], "accuracy": after[1]}
    run_folder.save_arguments(args.output_dir, start)


if __name__ == "__main__":
    runtime.run_script(main, get_args_parser())
