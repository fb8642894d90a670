"""Make the next-sentence instances of general distillation from a text corpus.

Writes OUTPUT_DIR/epoch_N.json (one instance a line) and OUTPUT_DIR/epoch_N_metrics.json.

Example:
    python pregenerate_training_data.py --train_corpus data/wiki_for_bert.txt \
        --bert_model models/bert-base-uncased --reduce_memory --do_lower_case \
        --epochs_to_generate 3 --output_dir data/json_wiki
"""

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import RLock
from pathlib import Path
from typing import Any

from tqdm import tqdm

from transformer.file_utils import UserError, s3_address, upload_folder
from transformer.pretraining_data import (
    Corpus,
    EpochSettings,
    Masking,
    build_corpus,
    check_corpus,
    epoch_paths,
    read_corpus_lines,
    write_epoch,
)
from transformer.runtime import prepare_output_dir, run_script
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

UNFINISHED_PREFIX = ".unfinished-"


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
    if args.max_seq_len < shortest:
        raise UserError(
            f"--max_seq_len {args.max_seq_len}: expected at least {shortest} tokens, two of text "
            "and the special ones"
        )


# ------------------------------------------------------------------ stages


def corpus_lines_with_progress(path: Path) -> Iterator[str]:
    """Yield the corpus's lines under a progress bar that counts characters."""
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="tokenize") as bar:
        for line in read_corpus_lines(path):
            yield line
            bar.update(len(line.encode()) + 1)


def generate_epoch(
    corpus: Corpus,
    pieces: list[str],
    folder: Path,
    settings: EpochSettings,
    epoch: int,
    position: int = 0,
) -> int:
    """Write one epoch, under the progress bar of line `position`; return its instances."""
    documents = tqdm(
        range(corpus.documents), unit="document", desc=f"epoch {epoch}", position=position
    )
    return write_epoch(corpus, pieces, folder, epoch, settings, documents)


# What a worker process keeps: it maps the corpus once and receives only epoch numbers.
_generate: Callable[[int, int], int]


def start_worker(folder: Path, pieces: list[str], settings: EpochSettings, lock: Any) -> None:
    """Map the tokenized corpus into this process; its memory is shared with the others'."""
    global _generate
    tqdm.set_lock(lock)
    _generate = partial(
        generate_epoch, Corpus.open(folder, len(pieces)), pieces, folder, settings
    )


def work_on(epoch: int, position: int) -> int:
    """Generate one epoch in a worker process."""
    return _generate(epoch, position)


def generate_all(
    corpus: Corpus,
    pieces: list[str],
    folder: Path,
    settings: EpochSettings,
    epochs: int,
    workers: int,
) -> list[int]:
    """Write all epochs, in `workers` processes if more than one; return their instances.

    Several processes expect the corpus's files in `folder`, where the epochs go too.
    """
    if workers == 1:
        return [generate_epoch(corpus, pieces, folder, settings, epoch) for epoch in range(epochs)]
    tqdm.set_lock(RLock())
    pool = ProcessPoolExecutor(
        workers, initializer=start_worker, initargs=(folder, pieces, settings, tqdm.get_lock())
    )
    with pool:
        positions = [epoch % workers for epoch in range(epochs)]
        return list(pool.map(work_on, range(epochs), positions))


def publish(folder: Path, output_dir: Path, epochs: int) -> list[Path]:
    """Move finished epochs to where they belong, in place of all those of an earlier run."""
    for path in output_dir.glob("epoch_*.json"):
        path.unlink()
    files = []
    for epoch in range(epochs):
        for path in epoch_paths(folder, epoch):
            files.append(path.replace(output_dir / path.name))
    return files


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
        help="keep the tokenized documents on disk, in a temporary folder of output_dir (switch)")
    add("--num_workers", type=int, default=1,
        help="number of processes, each on epochs of its own; the output is the same")
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
    workers = min(args.num_workers, args.epochs_to_generate)
    masking = Masking.of(
        tokenizer, args.masked_lm_prob, args.max_predictions_per_seq, args.do_whole_word_mask
    )
    settings = EpochSettings(
        args.seed, args.max_seq_len, args.short_seq_prob, args.one_seq, masking
    )

    # All work is done in a folder of its own, so that only a whole run leaves files behind.
    for stale in output_dir.glob(f"{UNFINISHED_PREFIX}*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED_PREFIX, dir=output_dir) as name:
        # Tokenize: in memory, or in files that several processes can share.
        folder = Path(name)
        corpus = build_corpus(
            corpus_lines_with_progress(args.train_corpus),
            tokenizer,
            folder if args.reduce_memory or workers > 1 else None,
        )
        check_corpus(corpus, args.train_corpus, args.one_seq)
        print(
            f"{args.train_corpus}: {corpus.documents:,} documents, {corpus.sentences:,} "
            f"sentences, {len(corpus.token_ids):,} word pieces"
        )

        # Generate.
        rows = generate_all(
            corpus, list(tokenizer.vocab), folder, settings, args.epochs_to_generate, workers
        )
        files = publish(folder, output_dir, args.epochs_to_generate)

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
