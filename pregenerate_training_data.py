"""Make the next-sentence instances of general distillation from a text corpus.

Writes the corpus as word-piece ids, OUTPUT_DIR/corpus.bin, and for each epoch the instances as
spans of it, OUTPUT_DIR/epoch_N.bin; with --format json one JSON object an instance,
OUTPUT_DIR/epoch_N.json. OUTPUT_DIR/epoch_N_metrics.json has the counts.

A process takes at most 150 MB beside its libraries, whatever the corpus (its longest line aside);
pages of mapped files, which the system takes back when it needs them, are not counted. Finished
work is kept in OUTPUT_DIR/.unfinished until all is there; --resume goes on with it after a kill.
Under torchrun the work is split over the processes, which must all see OUTPUT_DIR.

Example:
    python pregenerate_training_data.py --train_corpus data/wiki_for_bert.txt \
        --bert_model models/bert-base-uncased --reduce_memory --do_lower_case \
        --epochs_to_generate 3 --output_dir data/json_wiki
"""

import argparse
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from transformer import distributed
from transformer.corpus import (
    BLOCK_SUFFIXES,
    CORPUS_IDS_NAME,
    CORPUS_SUFFIXES,
    Corpus,
    EpochSettings,
    Masking,
    line_blocks,
    read_block,
    tokenize_block,
    write_blocks,
    write_corpus,
)
from transformer.file_utils import UserError
from transformer.parts import Run, WorkFolder, fingerprint, processes, share
from transformer.pretraining_data import (
    CORPUS_INFO_NAME,
    METRICS_SUFFIX,
    EpochWriter,
    epoch_path,
    generated_files,
    mask_dtype,
    record_dtype,
    vocabulary_sha256,
)
from transformer.run_folder import prepare_output_dir
from transformer.runtime import add_resume_argument, check_room, run_script
from transformer.tokenization import BLOCK_BYTES, BertTokenizer
from transformer.uploads import s3_address, upload_folder

logger = logging.getLogger(__name__)

LONGEST_INSTANCE = 2**16 - 1  # what a record's 16 bits can count
PARTS = 32  # of a small corpus; a larger one has more, of the most bytes or sentences
MOST_BYTES = 1 << 24
FEWEST_SENTENCES, MOST_SENTENCES = 1 << 13, 1 << 19
PROCESS_MEMORY = 150_000_000  # bytes, beside the libraries
# Of English, measured and rounded up: how many times the instances of an epoch would hold the
# text if they were full, and the bytes of a JSON line.
COVERED, JSON_ROW_BYTES, JSON_TOKEN_BYTES = 1.6, 100, 13


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


def check_disk(work: "Work", epochs: int, workers: int) -> None:
    """Raise a `UserError` if the disk or the memory will not do, judged by the first block."""
    masks = work.masking.predictions(work.settings.max_seq_len)
    block = next(line_blocks(work.train_corpus), (0, 0))
    sample = tokenize_block(work.train_corpus, block, work.tokenizer)
    growth = work.train_corpus.stat().st_size / max(1, block[1])
    tokens = growth * len(sample.token_ids)
    documents = growth * len(sample.blank_lines)  # whose last instances are short
    rows = COVERED * tokens / work.settings.max_tokens + documents
    if work.format == "json":
        row_bytes = JSON_ROW_BYTES + JSON_TOKEN_BYTES * (work.settings.max_seq_len + masks)
    else:
        row_bytes = record_dtype(int(tokens)).itemsize
        row_bytes += masks * mask_dtype(len(work.tokenizer)).itemsize
    corpus = tokens * sample.token_ids.itemsize + 12 * growth * len(sample.lengths)
    # What is joined is there twice: first the corpus, later one epoch after the other.
    need = max(2 * corpus, corpus + (epochs + 1) * rows * row_bytes)
    check_room("pregeneration", work.folder.path, max(0, round(need) - work.folder.used()),
               workers * PROCESS_MEMORY)


# ------------------------------------------------------------------ parts


class TextPart(NamedTuple):
    """Bytes [start, end) of the corpus, whole lines."""

    start: int
    end: int

    @property
    def name(self) -> str:
        return f"text_{self.start}"


class EpochPart(NamedTuple):
    """The instances of sentences [begin, end) for one epoch."""

    epoch: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"epoch_{self.epoch}_{self.begin}"


@dataclass
class Work:
    """What every process knows, and the two kinds of tasks."""

    train_corpus: Path
    folder: WorkFolder
    tokenizer: BertTokenizer
    settings: EpochSettings
    masking: Masking
    format: str

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenized corpus, which processes share as files in `folder`."""
        facts = self.folder.noted("corpus")
        return Corpus.open(self.folder.stem("corpus"), len(self.tokenizer), facts["unknown"])

    @cached_property
    def writer(self) -> EpochWriter:
        """What writes instances of the corpus."""
        return EpochWriter(self.corpus, self.tokenizer, self.settings, self.masking, self.format)

    def tokenize(self, part: TextPart) -> TextPart:
        """Tokenize a part of the text, unless that is done."""
        if self.folder.facts(part.name) is None:
            with self.folder.writing(part.name, *BLOCK_SUFFIXES) as new:
                blocks = line_blocks(self.train_corpus, BLOCK_BYTES, *part)
                new.facts["unknown"] = write_blocks(
                    self.train_corpus, blocks, self.tokenizer, new.files)
        return part

    def generate(self, part: EpochPart) -> EpochPart:
        """Write the instances of a part, unless that is done."""
        if self.folder.facts(part.name) is None:
            with self.folder.writing(part.name, *self.writer.suffixes) as new:
                new.facts["rows"] = self.writer.write(new.files, *part)
        return part


def text_parts(train_corpus: Path) -> list[TextPart]:
    """Cut the text between lines."""
    size = min(max(train_corpus.stat().st_size // PARTS, BLOCK_BYTES), MOST_BYTES)
    return [TextPart(*block) for block in line_blocks(train_corpus, size)]


def epoch_parts(corpus: Corpus, epoch: int) -> list[EpochPart]:
    """Cut an epoch at borders of documents, into parts of roughly the same size."""
    size = min(max(corpus.sentences // PARTS, FEWEST_SENTENCES), MOST_SENTENCES)
    wanted = np.arange(0, corpus.sentences, size)
    borders = np.unique(corpus.document_starts[np.searchsorted(corpus.document_starts, wanted)])
    borders = [*borders[borders < corpus.sentences].tolist(), corpus.sentences]
    return [EpochPart(epoch, *border) for border in itertools.pairwise(borders)]


# ------------------------------------------------------------------ stages


def say(text: str) -> None:
    """Print a line, in the first process of the run."""
    if distributed.is_main():
        print(text)


def tokenize(work: Work, run: Run) -> Corpus:
    """Tokenize the corpus, with a bar that counts bytes."""
    parts = text_parts(work.train_corpus)
    mine = share(parts)

    def make() -> None:
        with tqdm(total=sum(part.end - part.start for part in mine), unit="B", unit_scale=True,
                  desc="tokenize", disable=not distributed.is_main()) as bar:
            for part in run("tokenize", mine):
                bar.update(part.end - part.start)

    def join() -> None:
        blocks = (read_block(work.folder.stem(part.name), len(work.tokenizer),
                             work.folder.noted(part.name)["unknown"]) for part in parts)
        with work.folder.writing("corpus", *CORPUS_SUFFIXES, lasting=True) as corpus:
            corpus.facts["unknown"] = write_corpus(blocks, corpus.files)

    work.folder.whole("corpus", [part.name for part in parts], make, join)
    return work.corpus


def generate(work: Work, run: Run, epoch: int) -> int:
    """Write the data files of an epoch; return its number of instances."""
    parts = epoch_parts(work.corpus, epoch)
    mine = share(parts)

    def make() -> None:
        with tqdm(total=sum(part.end - part.begin for part in mine), unit="sentence",
                  unit_scale=True, desc=f"epoch {epoch}", disable=not distributed.is_main()) as bar:
            for part in run("generate", mine):
                bar.update(part.end - part.begin)

    names = [part.name for part in parts]
    return work.folder.joined(f"epoch_{epoch}", work.writer.suffixes, names, make)["rows"]


def begin(work: Work, args: argparse.Namespace) -> bool:
    """Begin or go on; False if the output is there already."""
    asked = distributed.is_main() and not args.overwrite_output_dir
    found = generated_files(args.output_dir) if asked else []
    taken = f"{found[0]}: exists; --overwrite_output_dir replaces it" if found else None
    vocabulary = f"{vocabulary_sha256(work.tokenizer)} {work.tokenizer.do_lower_case}"
    inputs = {"--train_corpus": fingerprint([args.train_corpus]), "--bert_model": vocabulary}
    return work.folder.begin(args, inputs, taken)


def run_stages(work: Work, args: argparse.Namespace) -> tuple[list[int], list[Path]]:
    """Tokenize, generate and publish; return the instances of each epoch, and the files."""
    check_disk(work, args.epochs_to_generate, args.num_workers)
    with processes(work, args.num_workers) as run:
        corpus = tokenize(work, run)
        check_corpus(corpus, args.train_corpus, args.one_seq)
        say(
            f"{args.train_corpus}: {corpus.documents:,} documents, {corpus.sentences:,} "
            f"sentences, {len(corpus.token_ids):,} word pieces"
        )
        rows = [generate(work, run, epoch) for epoch in range(args.epochs_to_generate)]
    files = publish(work, rows, args.output_dir) if distributed.is_main() else []
    return rows, files


def publish(work: Work, rows: Sequence[int], output_dir: Path) -> list[Path]:
    """Write what describes the data, and move all to where it belongs, in place of an earlier run.

    `rows` are the instances of each epoch. Files that are moved in this order do not pass for a
    run until all are there.
    """
    folder, files = work.folder, {}
    if work.format == "binary":
        work.writer.write_info(folder.path / CORPUS_INFO_NAME)
        files = {folder.file("corpus", CORPUS_SUFFIXES[0]): CORPUS_IDS_NAME,
                 folder.path / CORPUS_INFO_NAME: CORPUS_INFO_NAME}
    # The last epoch first: epochs are only read if they are numbered from 0 without a gap.
    for epoch in reversed(range(len(rows))):
        for suffix in work.writer.suffixes:
            path = folder.file(f"epoch_{epoch}", suffix)
            files[path] = epoch_path(output_dir, epoch, suffix).name
        metrics = epoch_path(folder.path, epoch, METRICS_SUFFIX)
        work.writer.write_metrics(metrics, rows[epoch])
        files[metrics] = metrics.name
    return folder.publish(files, obsolete=generated_files(output_dir))


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
        help="changes nothing: the tokenized documents are always on disk, in output_dir, and a "
        "process takes at most 150 MB beside its libraries, whatever the corpus (switch)")
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
    add_resume_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Tokenize the corpus once, write each epoch from it, print the counts."""
    start = time.perf_counter()

    # Check everything that can be checked before the long work.
    check_arguments(args)
    address = s3_address(args.data_url)
    tokenizer = BertTokenizer.from_pretrained(args.bert_model, args.do_lower_case or None)
    distributed.connect()
    folder = WorkFolder.of_folder(args.output_dir)
    args.resume = folder.resumes(args)
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir, args.resume)
    masking = Masking(
        tokenizer, args.masked_lm_prob, args.max_predictions_per_seq, args.do_whole_word_mask
    )
    settings = EpochSettings(args.seed, args.max_seq_len, args.short_seq_prob, args.one_seq)

    # All work is done in a folder of its own, so that only a whole run leaves files behind.
    work = Work(args.train_corpus, folder, tokenizer, settings, masking, args.format)
    if begin(work, args):
        with folder:
            rows, files = run_stages(work, args)
        say(
            f"{output_dir}: {len(rows)} epochs of {', '.join(f'{count:,}' for count in rows)} "
            f"instances, {sum(path.stat().st_size for path in files):,} bytes, "
            f"{time.perf_counter() - start:.1f} s"
        )
    else:
        say(f"{output_dir}: whole already, by an earlier call with these arguments")

    # Copy, where asked to.
    if address and distributed.is_main():
        upload_folder(output_dir, *address)


if __name__ == "__main__":
    run_script(main, get_args_parser())
