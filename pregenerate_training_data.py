"""Make the next-sentence instances of general distillation from a text corpus.

Writes the corpus as word-piece ids, OUTPUT_DIR/corpus.bin, and for each epoch the instances as
spans of it, OUTPUT_DIR/epoch_N.bin; with --format json one JSON object an instance,
OUTPUT_DIR/epoch_N.json. OUTPUT_DIR/epoch_N_metrics.json has the counts.

With --reduce_memory a process takes at most 150 MB beside its libraries, whatever the corpus (its
longest line aside); pages of mapped files, which the system takes back when it needs them, are
not counted. Without it one process also holds 8 bytes a sentence and, for --format json, 2 a
word piece; several processes always work as with it.

Example:
    python pregenerate_training_data.py --train_corpus data/wiki_for_bert.txt \
        --bert_model models/bert-base-uncased --reduce_memory --do_lower_case \
        --epochs_to_generate 3 --output_dir data/json_wiki
"""

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from transformer.corpus import (
    CORPUS_IDS_NAME,
    Corpus,
    EpochSettings,
    Masking,
    TokenizedBlock,
    build_corpus,
    line_blocks,
    tokenize_block,
)
from transformer.file_utils import UserError, s3_address, upload_folder
from transformer.pretraining_data import EpochWriter, epoch_path, generated_files
from transformer.runtime import prepare_output_dir, run_script
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

UNFINISHED_PREFIX = ".unfinished-"
LONGEST_INSTANCE = 2**16 - 1  # what a record's 16 bits can count
FEWEST_SENTENCES, MOST_SENTENCES = 1 << 13, 1 << 19  # of a part of an epoch

# Runs a method of `Work` on each of some tasks; yields the results in the order of the tasks.
Run = Callable[[str, Iterable[Any]], Iterator[Any]]


# ------------------------------------------------------------------ checks


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a value that no corpus could make sense of."""
    if not args.train_corpus.is_file():
        raise UserError(
            f"--train_corpus {args.train_corpus}: no such file; expected a text file, one "
            "sentence a line and a blank line between documents"
        )
    for name in ("epochs_to_generate", "num_workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    for name in ("short_seq_prob", "masked_lm_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected a share from 0 to 1")
    if args.max_predictions_per_seq < 0:
        raise UserError(f"--max_predictions_per_seq {args.max_predictions_per_seq}: expected >= 0")
    shortest = 4 if args.one_seq else 5
    if not shortest <= args.max_seq_len <= LONGEST_INSTANCE:
        raise UserError(
            f"--max_seq_len {args.max_seq_len}: expected at least {shortest} tokens, two of text "
            f"and the special ones, and at most {LONGEST_INSTANCE}"
        )


def check_corpus(corpus: Corpus, source: Path, one_seq: bool) -> None:
    """Raise a `UserError` for a corpus that no instances can be made from; warn of many [UNK]."""
    if not corpus.documents:
        raise UserError(
            f"{source}: 0 documents; expected one sentence a line and a blank line between "
            "documents (prepare_data.py writes it so)"
        )
    if corpus.documents == 1 and not one_seq:
        raise UserError(
            f"{source}: 1 document, so there is no other to take random next sentences from; "
            "expected a blank line between documents, or --one_seq"
        )
    share = corpus.unknown / len(corpus.token_ids)
    if share > 0.1:
        logger.warning(
            "%s: %.0f %% of the word pieces are [UNK]; does the vocabulary fit the language "
            "and the case (--do_lower_case)?", source, 100 * share,
        )


# ------------------------------------------------------------------ work in several processes


class Part(NamedTuple):
    """The instances of sentences [begin, end) for one epoch."""

    epoch: int
    begin: int
    end: int

    def stem(self, folder: Path) -> Path:
        """Return the part's files without their suffix."""
        return folder / f"part_{self.epoch}_{self.begin}"


@dataclass
class Work:
    """What every process knows, and the two kinds of tasks."""

    train_corpus: Path
    folder: Path
    tokenizer: BertTokenizer
    settings: EpochSettings
    masking: Masking
    format: str

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenized corpus, which processes share as files in `folder`."""
        return Corpus.open(self.folder, len(self.tokenizer))

    @cached_property
    def writer(self) -> EpochWriter:
        """What writes instances of the corpus."""
        return EpochWriter(self.corpus, self.tokenizer, self.settings, self.masking, self.format)

    def tokenize(self, block: tuple[int, int]) -> TokenizedBlock:
        """Tokenize a block of lines."""
        return tokenize_block(self.train_corpus, block, self.tokenizer)

    def generate(self, part: Part) -> tuple[Part, int]:
        """Write the files of a part; return it and its number of instances."""
        return part, self.writer.write(part.stem(self.folder), *part)


_work: Work  # of a worker process


def start_worker(work: Work) -> None:
    """Keep in this process what its tasks need, so that it does not travel with each."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of --num_workers


def call(method: str, task: Any) -> Any:
    """Do a task in a worker process."""
    return getattr(_work, method)(task)


@contextmanager
def processes(work: Work, workers: int) -> Iterator[Run]:
    """Yield what runs tasks, in `workers` processes or, for one, in this process."""
    if workers == 1:
        yield lambda method, tasks: map(getattr(work, method), tasks)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(work,)) as pool:
        pool.submit(int)  # starts the processes now, as a progress bar adds a thread to this one

        def run(method: str, tasks: Iterable[Any]) -> Iterator[Any]:
            # Few results wait at a time, so that memory does not grow with the corpus.
            waiting: deque = deque()
            for task in tasks:
                waiting.append(pool.submit(call, method, task))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield run


# ------------------------------------------------------------------ stages


def tokenize(work: Work, run: Run, in_files: bool) -> Corpus:
    """Tokenize the corpus, with a bar that counts bytes; `in_files` keeps it out of memory."""

    def blocks() -> Iterator[TokenizedBlock]:
        with tqdm(total=work.train_corpus.stat().st_size, unit="B", unit_scale=True,
                  desc="tokenize") as bar:
            for block in run("tokenize", line_blocks(work.train_corpus)):
                yield block
                bar.update(block.text_bytes)

    ids_file = work.folder / CORPUS_IDS_NAME if work.format == "binary" else None
    return build_corpus(
        blocks(), len(work.tokenizer), work.folder if in_files else None, ids_file)


def corpus_parts(corpus: Corpus, epochs: int, workers: int) -> Iterator[Part]:
    """Cut every epoch at borders of documents, into parts of roughly the same size."""
    size = min(max(corpus.sentences // workers, FEWEST_SENTENCES), MOST_SENTENCES)
    wanted = np.arange(0, corpus.sentences, size)
    borders = np.unique(corpus.document_starts[np.searchsorted(corpus.document_starts, wanted)])
    borders = [*borders[borders < corpus.sentences].tolist(), corpus.sentences]
    for epoch in range(epochs):
        for begin, end in zip(borders, borders[1:], strict=False):
            yield Part(epoch, begin, end)


def generate(work: Work, run: Run, corpus: Corpus, epochs: int, workers: int) -> list[int]:
    """Write the data files of all epochs; return their numbers of instances."""
    rows = [0] * epochs
    with tqdm(total=epochs * corpus.sentences, unit="sentence", unit_scale=True,
              desc=f"{epochs} epochs") as bar:
        for part, count in run("generate", corpus_parts(corpus, epochs, workers)):
            rows[part.epoch] += count
            for suffix in work.writer.suffixes:
                stem = part.stem(work.folder)
                append(stem.with_name(stem.name + suffix),
                       epoch_path(work.folder, part.epoch, suffix))
            bar.update(part.end - part.begin)
    return rows


def append(source: Path, target: Path) -> None:
    """Move a file to the end of another."""
    if not target.exists():
        source.replace(target)
        return
    with source.open("rb") as content, target.open("ab") as output:
        shutil.copyfileobj(content, output, 1 << 20)
    source.unlink()


def publish(files: list[Path], output_dir: Path) -> list[Path]:
    """Move finished files to where they belong, in place of those of an earlier run."""
    for path in generated_files(output_dir):
        path.unlink()
    return [path.replace(output_dir / path.name) for path in files]


# ------------------------------------------------------------------ command line


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train_corpus", type=Path, required=True,
        help="text file: one sentence a line, a blank line between documents")
    add("--output_dir", type=Path, required=True, help="folder to write the epochs to")
    add("--bert_model", type=str, required=True,
        help="folder of the model, with its vocab.txt and tokenizer_config.json")
    add("--do_lower_case", action="store_true",
        help="lower-case the text whatever the model's tokenizer config says (switch)")
    add("--do_whole_word_mask", action="store_true",
        help="mask all pieces of a word or none (switch)")
    add("--reduce_memory", action="store_true",
        help="keep the tokenized documents on disk, in output_dir, not in memory; then a process "
        "takes at most 150 MB beside its libraries, whatever the corpus (switch)")
    add("--num_workers", type=int, default=1,
        help="number of processes to tokenize and generate in; the output is the same")
    add("--format", choices=["binary", "json"], default="binary",
        help="binary: the corpus once and instances as spans of it; json: the original's files")
    add("--epochs_to_generate", type=int, default=3, help="number of epochs of instances")
    add("--max_seq_len", type=int, default=128,
        help="length of an instance, in tokens with the special ones")
    add("--short_seq_prob", type=float, default=0.1,
        help="share of documents (0 to 1) cut into instances of a random shorter length")
    add("--masked_lm_prob", type=float, default=0.0,
        help="share of tokens (0 to 1) to mask; 0 masks nothing")
    add("--max_predictions_per_seq", type=int, default=20,
        help="most masked tokens of an instance")
    add("--one_seq", action="store_true",
        help="one segment an instance, no next sentence (switch)")
    add("--data_url", type=str, default="",
        help="s3://bucket/folder to copy the epochs to as well; empty for none")
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--overwrite_output_dir", action="store_true",
        help="replace the epochs of an output folder that is not empty (switch)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Tokenize the corpus once, write each epoch from it, print the counts."""
    start = time.perf_counter()

    # Check everything that can be checked before the long work.
    check_arguments(args)
    address = s3_address(args.data_url)
    tokenizer = BertTokenizer.from_pretrained(args.bert_model, args.do_lower_case or None)
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    masking = Masking(
        tokenizer, args.masked_lm_prob, args.max_predictions_per_seq, args.do_whole_word_mask
    )
    settings = EpochSettings(args.seed, args.max_seq_len, args.short_seq_prob, args.one_seq)

    # All work is done in a folder of its own, so that only a whole run leaves files behind.
    for stale in output_dir.glob(f"{UNFINISHED_PREFIX}*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED_PREFIX, dir=output_dir) as name:
        work = Work(args.train_corpus, Path(name), tokenizer, settings, masking, args.format)
        with processes(work, args.num_workers) as run:
            # Tokenize: in memory, or in files that several processes can share.
            corpus = tokenize(work, run, args.reduce_memory or args.num_workers > 1)
            check_corpus(corpus, args.train_corpus, args.one_seq)
            print(
                f"{args.train_corpus}: {corpus.documents:,} documents, {corpus.sentences:,} "
                f"sentences, {len(corpus.token_ids):,} word pieces"
            )

            # Generate.
            work.corpus = corpus
            rows = generate(work, run, corpus, args.epochs_to_generate, args.num_workers)
        files = publish(work.writer.finish(work.folder, rows), output_dir)

    # Copy, where asked to.
    if address:
        upload_folder(output_dir, *address)
    size = sum(path.stat().st_size for path in files)
    print(
        f"{output_dir}: {len(rows)} epochs of {', '.join(f'{count:,}' for count in rows)} "
        f"instances, {size:,} bytes, {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    run_script(main, get_args_parser())
