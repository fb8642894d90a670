"""Instances of general distillation made from text: its files, the work, the user's cache."""

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from tqdm import tqdm

from transformer import distributed
from transformer.corpus import (
    CORPUS_IDS_NAME,
    SENTENCES_PER_BLOCK,
    Corpus,
    EpochSettings,
    Masking,
    TextBlock,
    TokenizedBlock,
    document_blocks,
    line_blocks,
    load_array,
    tokenize_block,
    write_corpus,
)
from transformer.file_utils import (
    UserError,
    atomic_folder,
    cache_root,
    file_lock,
    file_sha256,
    is_packed,
    parse_json,
    read_json,
    sync_file,
    text_lines,
    write_json,
)
from transformer.pretraining_data import (
    BINARY_SUFFIX,
    CORPUS_INFO_NAME,
    METRICS_SUFFIX,
    EpochWriter,
    epoch_path,
    generated_files,
    record_dtype,
    vocabulary_sha256,
)
from transformer.runtime import check_disk
from transformer.shards import progress, worker_pool
from transformer.tokenization import BLOCK_BYTES, AnyTokenizer

logger = logging.getLogger(__name__)

INSTANCE_FLAGS = ("instances", "long_lines", "short_seq_prob", "num_workers")
LONGEST_INSTANCE = 2**16 - 1  # what a record's 16 bits can count
TEXT_SUFFIXES = (".txt", ".gz", ".bz2")  # of the files that are read of a folder
# How files begin that are no text, and what they are.
NO_TEXT = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"PK\x03\x04": "a zip archive",
           b"\xfd7zXZ": "compressed by xz", b"\x28\xb5\x2f\xfd": "compressed by zstd"}
DISK_SHARE = 1.2  # bytes of the tokenized corpus and an epoch, a byte of text, at most
PACKED_SHARE = 4  # bytes of text, a compressed one
VERSION = 1  # of how text becomes instances: another one does not read what the cache holds
RECORD_NAME = "instances.json"


# ------------------------------------------------------------------ command line


def add_instance_arguments(parser: argparse.ArgumentParser, instances: str) -> None:
    """Add the flags that say how instances are made of text; `instances` is the default."""
    add = parser.add_argument
    add("--instances", choices=["pairs", "packed", "lines"], default=instances,
        help="pairs: two segments, the second half of the time a random one (BERT's next"
             " sentences); packed: one segment of as many sentences as fit; lines: each line of"
             " the corpus is one, two texts with a tab between them a pair; blank lines mean"
             " nothing")
    add("--long_lines", choices=["cut", "split"], default="cut",
        help="of --instances lines: what does not fit is left out (of a pair, the longer text's"
             " end first), or makes further instances")
    add("--short_seq_prob", type=float, default=0.1,
        help="share of documents (0 to 1) cut into instances of a random shorter length; not of"
             " --instances lines")
    add("--num_workers", type=int, default=1,
        help="number of processes to tokenize and generate in; the output is the same")


def epoch_settings(args: argparse.Namespace, length_flag: str) -> EpochSettings:
    """Return what the flags of `add_instance_arguments` and of the length say, checked."""
    length, lines = getattr(args, length_flag), args.instances == "lines"
    if not 0 <= args.short_seq_prob <= 1:
        raise UserError(f"--short_seq_prob {args.short_seq_prob}: expected a share from 0 to 1")
    for flag, fits, expected in (("long_lines", lines, "lines"),
                                 ("short_seq_prob", not lines, "pairs or packed")):
        if flag in args.given and not fits:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected --instances {expected}, not"
                            f" {args.instances}")
    shortest = 4 if args.instances == "packed" else 5
    if not shortest <= length <= LONGEST_INSTANCE:
        raise UserError(
            f"--{length_flag} {length}: expected at least {shortest} tokens, two of text and the "
            f"special ones, and at most {LONGEST_INSTANCE}"
        )
    return EpochSettings(args.seed, length, 0.0 if lines else args.short_seq_prob, args.instances,
                         args.long_lines if lines else "cut")


def fit_to_tokenizer(settings: EpochSettings, tokenizer: AnyTokenizer) -> EpochSettings:
    """Return the settings with what a tokenizer puts between two texts; checks the length."""
    settings = settings._replace(separators=tokenizer.separators)
    if settings.max_tokens < 2:
        raise UserError(f"instances of {settings.max_seq_len} tokens; expected at least"
                        f" {settings.max_seq_len + 2 - settings.max_tokens}: two of text and this"
                        " model's special ones")
    return settings


# ------------------------------------------------------------------ files


def corpus_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of a corpus: those given, and the .txt, .gz and .bz2 files of folders.

    What does not exist, and what does not begin as text in UTF-8, is a `UserError`.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _files_below(path)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(
                f"--train_corpus {path}: no such file or folder; expected a text file, one "
                "sentence a line"
            )
    for file in files:
        _check_text(file)
    return files


def _files_below(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not any(
        part.startswith(".") for part in path.relative_to(folder).parts))
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    if not texts:
        held = ", ".join(path.name for path in files[:3])
        raise UserError(f"--train_corpus {folder}: holds no .txt, .gz or .bz2 file"
                        f"{f' ({held}, ...)' if held else ''}; expected text files, or their names"
                        " one by one")
    logger.info("%s: %d text files of %d", folder, len(texts), len(files))
    return texts


def _check_text(path: Path) -> None:
    """Raise a `UserError` for a file that does not begin as text in UTF-8."""
    with path.open("rb") as file:
        start = file.read(8)
    kinds = [kind for magic, kind in NO_TEXT.items() if start.startswith(magic)]
    if not kinds:
        with closing(text_lines(path)) as lines:  # the first one tells the encoding, too
            _, line = next(lines, (0, ""))
        with suppress(UserError):
            parse_json(line, str(path))
            kinds = ["JSON lines"]
    if kinds:
        raise UserError(f"{path}: is {kinds[0]}; expected plain text, one sentence a line, or that"
                        " compressed by gzip or bzip2; prepare_data.py makes it of other files")


# ------------------------------------------------------------------ the work


def check_corpus(corpus: Corpus, unknown: int, source: str, instances: str) -> None:
    """Raise a `UserError` for a corpus that no instances can be made from; warn of many [UNK]."""
    if not corpus.documents:
        if instances == "lines":
            raise UserError(f"{source}: no line of text; expected one sentence a line")
        raise UserError(
            f"{source}: 0 documents; expected one sentence a line and a blank line between "
            "documents (prepare_data.py writes it so)"
        )
    if corpus.documents == 1 and instances == "pairs":
        raise UserError(
            f"{source}: 1 document, so there is no other to take random next sentences from; "
            "expected --instances lines, where each line is an instance, or a blank line between "
            "documents, or --instances packed"
        )
    share = unknown / len(corpus.token_ids)
    if share > 0.1:
        logger.warning(
            "%s: %.0f %% of the word pieces are [UNK]; does the vocabulary fit the language "
            "and the case (--do_lower_case)?", source, 100 * share,
        )
    if instances == "lines":
        logger.info("%s: %d lines, %d of them pairs, %d word pieces", source, corpus.documents,
                    corpus.sentences - corpus.documents, len(corpus.token_ids))
    else:
        logger.info("%s: %d documents, %d sentences, %d word pieces", source, corpus.documents,
                    corpus.sentences, len(corpus.token_ids))


def tokenize(
    folder: Path, files: Sequence[Path], tokenizer: AnyTokenizer, by_line: bool, workers: int
) -> int:
    """Write the files of the tokenized corpus; return how many word pieces are [UNK]."""
    size = sum(path.stat().st_size for path in files)

    def blocks() -> Iterator[TextBlock]:
        for path in files:
            yield from line_blocks(path, BLOCK_BYTES)

    def tokenized(results: Iterator[TokenizedBlock]) -> Iterator[TokenizedBlock]:
        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenize",
                  disable=not distributed.is_main()) as bar:
            for block in results:
                yield block
                bar.update(block.size)

    with worker_pool(partial(tokenize_block, tokenizer, by_line=by_line), workers) as run:
        return write_corpus(folder, tokenized(run(blocks())))


def generate(
    folder: Path, corpus: Corpus, writer: EpochWriter, epoch: int, workers: int
) -> int:
    """Write the data files of an epoch and its counts; return its number of instances."""
    blocks, rows = document_blocks(corpus, SENTENCES_PER_BLOCK), 0
    sizes = [end - begin for begin, end in blocks]
    with ExitStack() as stack:
        run = stack.enter_context(worker_pool(partial(writer.encode, epoch), workers))
        files = [stack.enter_context(epoch_path(folder, epoch, suffix).open("wb"))
                 for suffix in writer.suffixes]
        for count, contents in progress(run(blocks), sizes, "sentence", f"epoch {epoch}"):
            for file, content in zip(files, contents, strict=True):
                file.write(content)
            rows += count
    writer.write_metrics(epoch_path(folder, epoch, METRICS_SUFFIX), rows)
    return rows


def report_cut(folder: Path, corpus: Corpus, source: str) -> None:
    """Say how much of the lines is in no instance of the first epoch, if anything."""
    tokens = len(corpus.token_ids)
    records = load_array(epoch_path(folder, 0, BINARY_SUFFIX), record_dtype(tokens))
    kept = sum(int(records[name].sum(dtype=np.int64)) for name in ("first_length",
                                                                  "second_length"))
    if kept < tokens:
        share = 1 - kept / tokens
        logger.log(logging.WARNING if share > 0.1 else logging.INFO,
                   "%s: %.1f %% of the word pieces are beyond the length of an instance and left"
                   " out; --long_lines split makes further instances of them", source, 100 * share)


def generate_all(
    folder: Path, files: Sequence[Path], tokenizer: AnyTokenizer, settings: EpochSettings,
    masking: Masking, epochs: int, data_format: str = "binary", workers: int = 1,
) -> list[int]:
    """Write the epochs that are made of text files into `folder`; return the instances of each.

    `generated_files` are what to keep of the folder.
    """
    settings, by_line = fit_to_tokenizer(settings, tokenizer), settings.instances == "lines"
    check_disk("the tokenized corpus", folder, DISK_SHARE * sum(
        path.stat().st_size * (PACKED_SHARE if is_packed(path) else 1) for path in files))
    unknown = tokenize(folder, files, tokenizer, by_line, workers)
    corpus = Corpus.open(folder, len(tokenizer))
    source = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    check_corpus(corpus, unknown, source, settings.instances)
    writer = EpochWriter(folder, tokenizer, settings, masking, data_format)
    rows = [generate(folder, corpus, writer, 0, workers)]
    if by_line and writer.format == "binary":
        report_cut(folder, corpus, source)
    # The other epochs are as large as the first.
    size = sum(path.stat().st_size for path in folder.glob("epoch_0*"))
    if epochs > 1:
        check_disk("pregeneration", folder, (epochs - 1) * size)
    rows += [generate(folder, corpus, writer, epoch, workers) for epoch in range(1, epochs)]
    if writer.format == "binary":
        writer.write_info(folder / CORPUS_INFO_NAME)
    else:
        (folder / CORPUS_IDS_NAME).unlink()
    return rows


# ------------------------------------------------------------------ the user's cache


def cached_instances(
    files: Sequence[Path], tokenizer: AnyTokenizer, settings: EpochSettings, epochs: int,
    workers: int = 1, expected: Collection[str] = (),
) -> Path:
    """Return the folder with the epochs of a corpus, without masks, made by this call if need be.

    Its name stands for the files' contents, the vocabulary, the settings and the number of epochs.
    Of several calls one makes it while the others wait; of several processes of this run the first
    of each machine does.

    Raises:
        UserError: a corpus that gives no instances, another one on another machine, or a name
            other than the `expected` one, that of a run to resume.
    """
    if settings.instances == "lines":
        settings = settings._replace(seed=0)  # which nothing of them depends on
    found = None
    if distributed.local_rank() == 0:
        found = cache_root() / "instances" / _content_key(files, tokenizer, settings, epochs)
        if {*expected} - {found.name}:
            raise UserError("--resume: --train_corpus or the vocabulary is no longer what the run"
                            " was begun with; expected the same, or a call without --resume")
        _find_or_make(found, files, tokenizer, settings, epochs, workers)
    folders = distributed.gather(found)
    if len({folder.name for folder in folders if folder}) > 1:
        raise UserError(f"--train_corpus {files[0]}: other contents on another machine; expected"
                        " the same files on all")
    return folders[distributed.rank() - distributed.local_rank()]


def _content_key(
    files: Sequence[Path], tokenizer: AnyTokenizer, settings: EpochSettings, epochs: int
) -> str:
    content = {"version": VERSION, "files": [file_sha256(path) for path in files],
               "vocabulary": vocabulary_sha256(tokenizer), "tokenizer": tokenizer.settings,
               **settings._asdict(), "epochs": epochs}
    del content["separators"]  # the tokenizer's
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = file_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: waiting for another call, which makes it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _find_or_make(folder: Path, *work: Any) -> None:
    """Have `folder` hold the epochs that `_make` makes of the rest of the arguments."""
    try:
        with _locked(folder):
            if _is_complete(folder):
                logger.info("%s: made by an earlier call", folder)
            else:
                _make(folder, *work)
    except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{folder}: cannot be kept ({error}); TINYBERT_CACHE names another folder"
                        " for what is made of --train_corpus") from error


def _make(
    folder: Path, files: Sequence[Path], tokenizer: AnyTokenizer, settings: EpochSettings,
    epochs: int, workers: int,
) -> None:
    for left in folder.parent.glob(f".{folder.name}.*"):  # of a killed call
        if left.is_dir():
            shutil.rmtree(left)
    with atomic_folder(folder) as new:
        masking = Masking(tokenizer, 0.0, 0, False)
        rows = generate_all(new, files, tokenizer, settings, masking, epochs, workers=workers)
        kept = generated_files(new)
        for path in {*new.iterdir()} - {*kept}:
            path.unlink()
        for path in kept:
            sync_file(path)
        write_json(new / RECORD_NAME, _sizes(kept))
    logger.info("%s: %d epochs of %s instances", folder, len(rows), ", ".join(map(str, rows)))


def _is_complete(folder: Path) -> bool:
    """Say whether a folder holds the files that were made for it; a damaged one is warned of."""
    if not folder.is_dir():
        return False
    try:
        sizes = read_json(folder / RECORD_NAME)
        if sizes == _sizes(generated_files(folder)):
            return True
    except UserError:
        pass
    logger.warning("%s: damaged; the instances are made again", folder)
    return False


def _sizes(files: Sequence[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in files}
