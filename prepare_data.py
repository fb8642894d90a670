"""Turn WikiExtractor's JSON files into the corpus that pregenerate_training_data.py reads.

One sentence a line, a blank line between documents. Finished shards wait in a folder beside the
output, .unfinished-NAME, until all are there; --resume continues with them after a kill. Under
torchrun each process converts its share of the files.

Example:
    python -m wikiextractor.WikiExtractor DUMP.xml.bz2 --json -o data/extracted_wiki
    python prepare_data.py --input_dir data/extracted_wiki --output_file data/wiki_for_bert.txt
"""

from __future__ import annotations

import argparse
import bz2
import html
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from transformer import distributed
from transformer.file_utils import UserError, parse_json, read_json, write_text
from transformer.runtime import add_resume_argument, run_script
from transformer.shards import Shard, ShardedFile, cut, fingerprint

if TYPE_CHECKING:  # imported where it is needed, as it takes a second
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

logger = logging.getLogger(__name__)

INPUT_NAMES = "wiki_*"
PUNKT_DATA = "tokenizers/punkt_tab/english/"
PUNKT_DOWNLOAD_SECONDS = 30
PUNKT_SAMPLE_CHARACTERS = 10_000_000
SHARDS = 1024  # of a large corpus, or up to twice as many; a smaller one has one a file
COMPRESSION = 4  # how many times smaller a .bz2 of text is

# A tag, not any text in brackets: attributes have values.
TAG = re.compile(r"</?([a-z][a-z0-9]*)(?:\s+[a-z-]+\s*=[^<>]*)?\s*/?>", re.I)
BREAKS = {"br", "div", "hr", "li", "p", "td", "th", "tr"}
PLACEHOLDER = re.compile(r"\b(?:formula|codice)_\d+")


def find_input_files(input_dir: Path) -> list[Path]:
    """List the `wiki_*` files under `input_dir`, sorted by path whatever the file system's order.

    A missing folder and a folder without such files are `UserError`s.
    """
    if not input_dir.is_dir():
        raise UserError(f"--input_dir {input_dir}: no such folder; expected WikiExtractor's output")
    files = sorted(path for path in input_dir.rglob(INPUT_NAMES) if path.is_file())
    if not files:
        raise UserError(
            f"--input_dir {input_dir}: 0 files; expected WikiExtractor's output (AA/wiki_00, ...), "
            "written with its --json option"
        )
    return files


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, compressed or not; a damaged .bz2 is a `UserError`."""
    if path.suffix != ".bz2":
        with path.open("rb") as lines:
            yield from lines
        return
    try:
        with bz2.open(path) as lines:
            yield from lines
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole bzip2 file ({error})") from error


def read_articles(path: Path) -> Iterator[str]:
    """Yield the text of each article of one file, which holds one JSON object a line.

    A line that is not such an object is a `UserError` with file and line.
    """
    expected = 'one JSON object a line with a "text" string (WikiExtractor --json)'
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        text = parse_json(line, place, expected).get("text")
        if not isinstance(text, str):
            raise UserError(f"{place}: no text; expected {expected}")
        yield clean(text)


def clean(text: str) -> str:
    """Drop the markup that WikiExtractor leaves in a text; entities become what they stand for.

    That is tags such as `&lt;br&gt;`, `formula_1` and `codice_1` in place of formulas and code, and
    NUL characters.
    """
    # Twice: the dump escapes what a page shows, and WikiExtractor escapes that again.
    text = html.unescape(html.unescape(text)).replace("\0", "")
    if "<" in text:
        text = TAG.sub(lambda tag: " " if tag[1].lower() in BREAKS else "", text)
    if "formula_" in text or "codice_" in text:
        text = PLACEHOLDER.sub("", text)
    return text


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
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    # Also word pairs around a full stop that is no known abbreviation's, such as "St. Petersburg".
    trainer.INCLUDE_ALL_COLLOCS = True
    for text in texts:
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    return trainer.get_params()


def downloaded_punkt() -> PunktParameters | None:
    """Load nltk's English model, after one short attempt to download it; None if there is none."""
    import nltk

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
        return nltk.tokenize.punkt.load_punkt_params(nltk.data.find(PUNKT_DATA))
    except LookupError:
        return None


def get_parameters(choice: str, files: list[Path]) -> tuple[PunktParameters, str]:
    """Return the sentence model that `--punkt` asks for, and what to call it."""
    parameters = downloaded_punkt() if choice == "auto" else None
    if parameters is not None:
        return parameters, "nltk's punkt_tab, English"
    texts = list(sample_articles(files, PUNKT_SAMPLE_CHARACTERS))
    reason = "punkt_tab can not be had" if choice == "auto" else "--punkt train"
    return train_punkt(texts), (
        f"Punkt trained on {sum(map(len, texts)):,} characters of {len(texts):,} articles of "
        f"this corpus ({reason})"
    )


def write_splitter(path: Path, parameters: PunktParameters, name: str) -> None:
    """Write a sentence model as JSON, its sets as sorted lists."""
    write_text(path, json.dumps({"name": name, **vars(parameters)}, default=sorted))


@cache
def read_splitter(path: Path) -> PunktSentenceTokenizer:
    """Read what `write_splitter` wrote, as a sentence splitter."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    content, parameters = read_json(path), PunktParameters()
    parameters.abbrev_types.update(content["abbrev_types"])
    parameters.collocations.update(map(tuple, content["collocations"]))
    parameters.sent_starters.update(content["sent_starters"])
    parameters.ortho_context.update(content["ortho_context"])
    return PunktSentenceTokenizer(parameters)


def choose_splitter(path: Path, choice: str, files: list[Path]) -> None:
    """Keep the sentence model beside the shards, and log which one it is.

    Where a later call continues, the model is still the same, whatever can be downloaded then.
    """
    if distributed.is_main() and not path.is_file():
        write_splitter(path, *get_parameters(choice, files))
    distributed.barrier()
    logger.info("sentence splitter: %s", read_json(path)["name"])


def convert(
    files: list[Path], splitter_path: Path, shard: Shard, output: BinaryIO, counts: Counter[str]
) -> None:
    """Write the sentences of all articles of the shard's files."""
    splitter = read_splitter(splitter_path)
    for text in chain.from_iterable(map(read_articles, files[shard.begin : shard.end])):
        sentences = split_sentences(text, splitter)
        if sentences:  # redirects have none
            separator = "\n" if counts["documents"] else ""
            document = separator + "\n".join(sentences) + "\n"
            # JSON can spell half a surrogate pair, which UTF-8 can not.
            output.write(document.encode("utf-8", errors="replace"))
        counts["documents" if sentences else "empty"] += 1
        counts["sentences"] += len(sentences)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input_dir", type=Path, default=Path("data/extracted_wiki"),
        help="folder of WikiExtractor's --json output (AA/wiki_00, ...)")
    add("--output_file", type=Path, default=Path("data/wiki_for_bert.txt"),
        help="text file to write: one sentence a line, a blank line between documents")
    add("--num_workers", type=int, default=os.cpu_count() or 1,
        help="number of processes; the output is the same whatever it is")
    add("--punkt", choices=["auto", "train"], default="auto",
        help="sentence model: auto is nltk's punkt_tab where it is there or can be downloaded, "
        f"else train; train learns one from at most {PUNKT_SAMPLE_CHARACTERS:,} characters of "
        "this corpus")
    add("--overwrite", action="store_true", help="replace an existing output file (switch)")
    add_resume_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Find the input, choose a splitter, write the corpus, log the counts."""
    start = time.perf_counter()

    output = args.output_file
    files = find_input_files(args.input_dir)
    if output.match(INPUT_NAMES) and output.resolve().is_relative_to(args.input_dir.resolve()):
        raise UserError(f"--output_file {output}: the name and place of an input; expected another")
    distributed.connect()

    # All work is done in a folder beside the target.
    corpus, shards = ShardedFile(output), cut(len(files), max(1, len(files) // SHARDS))
    size = sum(path.stat().st_size * (COMPRESSION if path.suffix == ".bz2" else 1)
               for path in files)
    if not corpus.begin(args, {"--input_dir": fingerprint(files)}, size):
        return
    splitter_path = corpus.folder / "splitter.json"
    choose_splitter(splitter_path, args.punkt, files)
    counts = corpus.make(shards, partial(convert, files, splitter_path), "file", args.num_workers)
    if not counts["documents"]:
        raise UserError(
            f"--input_dir {args.input_dir}: 0 documents in {len(files)} files "
            f"({counts['empty']} articles without text); expected articles with text"
        )
    if distributed.is_main():
        corpus.merge(shards, separator=b"\n")
        logger.info("%s: %d documents, %d sentences, %d bytes; %d articles without text skipped; "
                    "%.1f s", output, counts["documents"], counts["sentences"],
                    output.stat().st_size, counts["empty"], time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main, get_args_parser())
