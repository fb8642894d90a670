"""Turn WikiExtractor's JSON files into the corpus that pregenerate_training_data.py reads.

One sentence a line, a blank line between documents. Finished text waits in a folder beside the
output, .unfinished-NAME, until all is there; --resume goes on with it after a kill. Under torchrun
each process converts its share of the files.

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
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import nltk
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTrainer
from tqdm import tqdm

from transformer import distributed
from transformer.file_utils import UserError, read_json
from transformer.parts import WorkFolder, fingerprint, processes, share
from transformer.runtime import add_resume_argument, check_room, run_script

logger = logging.getLogger(__name__)

PUNKT_DATA = "tokenizers/punkt_tab/english/"
PUNKT_DOWNLOAD_SECONDS = 30
PUNKT_SAMPLE_CHARACTERS = 10_000_000
PARTS = 1024  # of a large corpus, or up to twice as many; a smaller one has one a file
PROCESS_MEMORY = 200_000_000  # bytes, with the splitter
COMPRESSION = 4  # how many times smaller a .bz2 of text is
SPLITTER_BYTES = 2_000_000
SPLITTER, SPLITTER_SUFFIX = "splitter", ".json"
JOINED, SUFFIX = "corpus", ".txt"


class Part(NamedTuple):
    """The input files [begin, end)."""

    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"files_{self.begin}"


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


def downloaded_punkt() -> PunktParameters | None:
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


def parameters_to_json(parameters: PunktParameters, name: str) -> bytes:
    """Spell a sentence model out; the same model is the same text."""
    return json.dumps({
        "name": name,
        "abbreviations": sorted(parameters.abbrev_types),
        "collocations": sorted(parameters.collocations),
        "sentence_starters": sorted(parameters.sent_starters),
        "orthography": dict(sorted(parameters.ortho_context.items())),
    }).encode()


def parameters_from_json(content: dict) -> PunktParameters:
    """Read what `parameters_to_json` wrote."""
    parameters = PunktParameters()
    parameters.abbrev_types = set(content["abbreviations"])
    parameters.collocations = set(map(tuple, content["collocations"]))
    parameters.sent_starters = set(content["sentence_starters"])
    parameters.ortho_context = defaultdict(int, content["orthography"])
    return parameters


@dataclass
class Work:
    """What every process knows, and its kind of task."""

    files: list[Path]
    folder: WorkFolder

    @cached_property
    def splitter(self) -> PunktSentenceTokenizer:
        """The sentence splitter, from the work folder: one model for all processes and calls."""
        content = read_json(self.folder.file(SPLITTER, SPLITTER_SUFFIX))
        return PunktSentenceTokenizer(parameters_from_json(content))

    def convert(self, part: Part) -> Part:
        """Split all articles of the part's files, unless that is done."""
        if self.folder.facts(part.name) is None:
            with self.folder.writing(part.name, SUFFIX) as new:
                new.facts.update(documents=0, empty=0, sentences=0)
                for path in self.files[part.begin : part.end]:
                    for text in read_articles(path):
                        sentences = split_sentences(text, self.splitter)
                        new.facts["empty"] += not sentences
                        if not sentences:  # such as those of redirects
                            continue
                        new.facts["sentences"] += len(sentences)
                        document = "\n".join(sentences) + "\n"
                        if new.facts["documents"]:
                            document = "\n" + document
                        # JSON can spell half a surrogate pair, which UTF-8 can not.
                        new.files[0].write(document.encode("utf-8", errors="replace"))
                        new.facts["documents"] += 1
        return part


def cut(files: int) -> list[Part]:
    """Cut so many files into parts."""
    size = max(1, files // PARTS)
    return [Part(begin, min(begin + size, files)) for begin in range(0, files, size)]


def check_needs(work: Work, workers: int) -> None:
    """Raise a `UserError` if the disk or the memory will not do."""
    text_bytes = sum(path.stat().st_size * (COMPRESSION if path.suffix == ".bz2" else 1)
                     for path in work.files)
    need = 2 * text_bytes + SPLITTER_BYTES  # the text once in parts, once joined
    check_room("the corpus", work.folder.path, max(0, need - work.folder.used()),
               workers * PROCESS_MEMORY)


def say(text: str) -> None:
    """Print a line, in the first process of the run."""
    if distributed.is_main():
        print(text)


def choose_splitter(work: Work, choice: str) -> None:
    """Keep the sentence model in the work folder, and print which one it is.

    Where a later call goes on, the model is still the same, whatever can be downloaded then.
    """

    def write() -> None:
        work.folder.remove(part.name for part in cut(len(work.files)))  # of a model that was lost
        with work.folder.writing(SPLITTER, SPLITTER_SUFFIX) as new:
            new.files[0].write(parameters_to_json(*get_parameters(choice, work.files)))

    work.folder.whole(SPLITTER, [], make=lambda: None, join=write)
    name = read_json(work.folder.file(SPLITTER, SPLITTER_SUFFIX))["name"]
    say(f"sentence splitter: {name}")


def convert_all(work: Work, workers: int) -> dict[str, int]:
    """Make the corpus, in the order of the files; return its counts."""
    parts = cut(len(work.files))
    mine = share(parts)

    def make() -> None:
        bar = tqdm(total=sum(part.end - part.begin for part in mine), unit="file",
                   desc="sentences", disable=not distributed.is_main())
        with processes(work, max(1, min(workers, len(mine)))) as run, bar:
            for part in run("convert", mine):
                bar.update(part.end - part.begin)

    names = [part.name for part in parts]
    return work.folder.joined(JOINED, [SUFFIX], names, make, separator=b"\n")


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
    add_resume_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Find the input, get a splitter, write the corpus, print the counts."""
    start = time.perf_counter()

    # Check what was asked for before anything slow happens.
    if args.num_workers < 1:
        raise UserError(f"--num_workers {args.num_workers}: expected at least 1 process")
    output = args.output_file
    if output.is_dir():
        raise UserError(f"--output_file {output}: is a folder; expected a file")
    files = find_input_files(args.input_dir)
    distributed.connect()

    # All work is done in a folder beside the target.
    folder = WorkFolder.of_file(output)
    exists = output.exists() and not args.overwrite
    taken = f"--output_file {output}: exists; --overwrite replaces it" if exists else None
    if not folder.begin(args, {"--input_dir": fingerprint(files)}, taken):
        say(f"{output}: whole already, by an earlier call with these arguments")
        return
    with folder:
        work = Work(files, folder)
        check_needs(work, args.num_workers)
        choose_splitter(work, args.punkt)
        counts = convert_all(work, args.num_workers)
        if not counts["documents"]:
            raise UserError(
                f"--input_dir {args.input_dir}: 0 documents in {len(files)} files "
                f"({counts['empty']} articles without text); expected articles with text"
            )
        if distributed.is_main():
            folder.publish({folder.file(JOINED, SUFFIX): output.name})
            say(
                f"{output}: {counts['documents']:,} documents, {counts['sentences']:,} sentences, "
                f"{output.stat().st_size:,} bytes; {counts['empty']:,} articles without text "
                f"skipped; {time.perf_counter() - start:.1f} s"
            )


if __name__ == "__main__":
    run_script(main, get_args_parser())
