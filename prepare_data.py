"""Turn WikiExtractor's JSON files into the corpus that pregenerate_training_data.py reads.

One sentence a line, a blank line between documents.

Example:
    python -m wikiextractor.WikiExtractor DUMP.xml.bz2 --json -o data/extracted_wiki
    python prepare_data.py --input_dir data/extracted_wiki --output_file data/wiki_for_bert.txt
"""

import argparse
import bz2
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nltk
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTrainer
from tqdm import tqdm

from transformer.file_utils import UserError, atomic_path
from transformer.runtime import run_script

logger = logging.getLogger(__name__)

PUNKT_DATA = "tokenizers/punkt_tab/english/"
PUNKT_DOWNLOAD_SECONDS = 30
PUNKT_SAMPLE_CHARACTERS = 10_000_000

# The splitter of a worker process; `start_worker` sets it once, so that it never travels with a
# task.
_splitter: PunktSentenceTokenizer


class FileResult(NamedTuple):
    """What one input file gives: its part of the corpus (UTF-8) and its counts."""

    text: bytes
    documents: int
    empty: int
    sentences: int


def find_input_files(input_dir: Path) -> list[Path]:
    """List the `wiki_*` files under `input_dir`, sorted by path whatever the file system's order.

    A missing folder and a folder without such files are `UserError`s.
    """
    if not input_dir.is_dir():
        raise UserError(f"--input_dir {input_dir}: no such folder; expected WikiExtractor's output")
    files = sorted(path for path in input_dir.rglob("wiki_*") if path.is_file())
    if not files:
        raise UserError(
            f"--input_dir {input_dir}: 0 files; expected WikiExtractor's output (AA/wiki_00, ...), "
            "written with its --json option"
        )
    return files


def read_articles(path: Path) -> Iterator[str]:
    """Yield the text of each article of one file, which holds one JSON object a line.

    A line that is not such an object is a `UserError` with file and line.
    """
    expected = 'expected one JSON object a line with a "text" string (WikiExtractor --json)'
    with (bz2.open(path) if path.suffix == ".bz2" else path.open("rb")) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                article = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); {expected}") from error
            text = article.get("text") if isinstance(article, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{path}, line {number}: no text; {expected}")
            yield text


def split_sentences(text: str, splitter: PunktSentenceTokenizer) -> list[str]:
    """Cut a text into sentences with single spaces; the end of a paragraph also ends a sentence.

    No sentence holds a line break of any kind, so none can pass for the end of a document.
    """
    lines = (line for sentence in splitter.tokenize(text) for line in sentence.split("\n"))
    collapsed = (" ".join(line.split()) for line in lines)
    return [sentence for sentence in collapsed if sentence]


def sample_articles(files: list[Path], characters: int) -> Iterator[str]:
    """Yield articles of files spread evenly over the corpus, about `characters` in total."""
    stride = max(1, math.ceil(sum(path.stat().st_size for path in files) / characters))
    for path in files[::stride]:
        for text in read_articles(path):
            yield text
            characters -= len(text)
            if characters <= 0:
                return


def train_punkt(texts: Iterable[str]) -> PunktParameters:
    """Learn abbreviations and sentence starters from raw text (Kiss and Strunk 2006)."""
    trainer = PunktTrainer()
    # Also word pairs around a full stop that is no known abbreviation's, such as "St. Petersburg".
    trainer.INCLUDE_ALL_COLLOCS = True
    for text in texts:
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    return trainer.get_params()


def downloaded_punkt() -> PunktSentenceTokenizer | None:
    """Load nltk's English model, after one short attempt to download it; None if there is none."""
    try:
        nltk.data.find(PUNKT_DATA)
    except LookupError:
        # In a process of its own, as name look-ups without a network heed no socket timeout.
        command = [sys.executable, "-m", "nltk.downloader", "-q", "punkt_tab"]
        try:
            subprocess.run(command, timeout=PUNKT_DOWNLOAD_SECONDS, capture_output=True)
        except subprocess.TimeoutExpired:
            return None
    try:
        return nltk.tokenize.PunktTokenizer("english")
    except LookupError:
        return None


def get_splitter(choice: str, files: list[Path]) -> PunktSentenceTokenizer:
    """Return the sentence splitter that `--punkt` asks for, and print which one it is."""
    splitter = downloaded_punkt() if choice == "auto" else None
    if splitter is not None:
        print("sentence splitter: nltk's punkt_tab, English")
        return splitter
    texts = list(sample_articles(files, PUNKT_SAMPLE_CHARACTERS))
    reason = "punkt_tab can not be had" if choice == "auto" else "--punkt train"
    print(
        f"sentence splitter: Punkt trained on {sum(map(len, texts)):,} characters of "
        f"{len(texts):,} articles of this corpus ({reason})"
    )
    return PunktSentenceTokenizer(train_punkt(texts))


def start_worker(splitter: PunktSentenceTokenizer) -> None:
    """Keep the splitter for all the files of this process."""
    global _splitter
    _splitter = splitter


def convert_file(path: Path) -> FileResult:
    """Split all articles of one file; articles without text (redirects) are only counted."""
    documents, empty, sentence_count = [], 0, 0
    for text in read_articles(path):
        sentences = split_sentences(text, _splitter)
        empty += not sentences
        sentence_count += len(sentences)
        if sentences:
            documents.append("\n".join(sentences) + "\n")
    # JSON can spell half a surrogate pair, which UTF-8 can not.
    content = "\n".join(documents).encode("utf-8", errors="replace")
    return FileResult(content, len(documents), empty, sentence_count)


def convert_all(
    files: list[Path], target: Path, splitter: PunktSentenceTokenizer, workers: int
) -> FileResult:
    """Write the corpus in the order of `files` whatever the number of workers; return the totals.

    `text` of the totals is empty.
    """
    documents = empty = sentences = 0
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(splitter,))
    with pool, target.open("wb") as output:
        results = pool.map(convert_file, files)
        for result in tqdm(results, total=len(files), unit="file", desc="sentences"):
            if documents and result.documents:
                output.write(b"\n")
            output.write(result.text)
            documents += result.documents
            empty += result.empty
            sentences += result.sentences
    return FileResult(b"", documents, empty, sentences)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input_dir", type=Path, default=Path("data/extracted_wiki"),
        help="folder of WikiExtractor's --json output (AA/wiki_00, ...)",
    )
    parser.add_argument(
        "--output_file", type=Path, default=Path("data/wiki_for_bert.txt"),
        help="text file to write: one sentence a line, a blank line between documents",
    )
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count() or 1,
        help="number of processes; the output is the same whatever it is",
    )
    parser.add_argument(
        "--punkt", choices=["auto", "train"], default="auto",
        help="sentence model: auto is nltk's punkt_tab where it is there or can be downloaded, "
        f"else train; train learns one from at most {PUNKT_SAMPLE_CHARACTERS:,} characters of "
        "this corpus",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing output file (switch)"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Find the input, get a splitter, write the corpus, print the counts."""
    start = time.perf_counter()

    # Check what was asked for before anything slow happens.
    if args.num_workers < 1:
        raise UserError(f"--num_workers {args.num_workers}: expected at least 1 process")
    if args.output_file.is_dir():
        raise UserError(f"--output_file {args.output_file}: is a folder; expected a file")
    if args.output_file.exists() and not args.overwrite:
        raise UserError(f"--output_file {args.output_file}: exists; --overwrite replaces it")
    files = find_input_files(args.input_dir)

    # One model for all processes.
    splitter = get_splitter(args.punkt, files)

    # Write the corpus beside its target and rename it when it is whole.
    with atomic_path(args.output_file) as temporary:
        totals = convert_all(files, temporary, splitter, min(args.num_workers, len(files)))
        if not totals.documents:
            raise UserError(
                f"--input_dir {args.input_dir}: 0 documents in {len(files)} files "
                f"({totals.empty} articles without text); expected articles with text"
            )
    print(
        f"{args.output_file}: {totals.documents:,} documents, {totals.sentences:,} sentences, "
        f"{args.output_file.stat().st_size:,} bytes; {totals.empty:,} articles without text "
        f"skipped; {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    run_script(main, get_args_parser())
