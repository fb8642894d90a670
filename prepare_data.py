"""Turn raw text into the corpus that pregenerate_training_data.py reads.

One sentence a line, a blank line between documents. Input is WikiExtractor's JSON files, JSON
lines, Parquet and Arrow (such as wikimedia/wikipedia on the Hugging Face hub), or plain text, where
a blank line ends a document; .gz and .bz2 of them, too; or the texts of a task's training rows
(--data_dir), each row a document. Sentences end as in the language of the text. Finished shards
wait in a folder beside the output, .unfinished-NAME, until all are there; --resume continues with
them after a kill. Under torchrun each process converts its share.

Example:
    python -m wikiextractor.WikiExtractor DUMP.xml.bz2 --json -o data/extracted_wiki
    python prepare_data.py --input_dir data/extracted_wiki --output_file data/wiki_for_bert.txt
    python prepare_data.py --input novels/ news.jsonl.gz --language zh --output_file data/zh.txt
"""

import argparse
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from transformer import distributed
from transformer.documents import (
    COMPRESSION,
    READABLE,
    ROWS,
    Piece,
    TextFormat,
    cut_pieces,
    folder_files,
    kind_of,
    read_documents,
)
from transformer.file_utils import UserError, read_json
from transformer.own_tasks import add_data_arguments, task_of
from transformer.run_folder import ARGUMENTS_NAME
from transformer.runtime import add_resume_argument, as_list, run_script
from transformer.sentences import (
    CJK_LANGUAGES,
    PUNKT_LANGUAGES,
    cjk_share,
    downloaded_punkt,
    parse_language,
    read_splitter,
    split_sentences,
    train_punkt,
    write_splitter,
)
from transformer.shards import Shard, ShardedFile, cut, fingerprint
from transformer.tasks import split_paths

logger = logging.getLogger(__name__)

PUNKT_SAMPLE_CHARACTERS = 10_000_000
LANGUAGE_SAMPLE_FILES, LANGUAGE_SAMPLE_CHARACTERS = 20, 10_000  # characters of each
CJK_SHARE = 0.3  # of the letters, from which on a text counts as Chinese or Japanese
SHARDS = 1024  # of a large corpus, or up to twice as many; a smaller one has one a file
LONGEST_INSTANCE = 510  # word pieces of text
LETTERS_A_PIECE = 4  # where words are not single characters, about


# ------------------------------------------------------------------ input


def find_input_files(places: Sequence[Path], output: Path) -> list[Path]:
    """List the files, and those of the folders, sorted by path whatever the file system's order.

    Raises:
        UserError: nothing there or nothing that is read, or an output that would be an input.
    """
    files: list[Path] = []
    for place in places:
        if not place.exists():
            raise UserError(f"--input_dir {place}: no such file or folder; expected {READABLE}")
        found = files_of_one_kind(place, output) if place.is_dir() else [place]
        if not found or not kind_of(found[0]):
            raise UserError(f"--input_dir {place}: {describe_place(place)}; expected {READABLE}")
        files += found
    if any(output.resolve() == path.resolve() for path in files):
        raise UserError(f"--output_file {output}: is an input; expected another name")
    return list(dict.fromkeys(files))


def files_of_one_kind(folder: Path, output: Path) -> list[Path]:
    """List the files of one kind of a folder; log how many of other kinds are passed over."""
    kind, paths, others = folder_files(folder)
    paths = [path for path in paths if not path.name.endswith(f".{ARGUMENTS_NAME}")]
    if kind and kind_of(output) == kind and output.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output_file {output}: the name and place of an input; expected another")
    for other, count in others.items():
        if kind and other:
            logger.warning("%s: %d files of %s are passed over, as the folder has %s files", folder,
                           count, other, kind)
    return paths


def describe_place(place: Path) -> str:
    """Say what is there in place of what can be read."""
    if not place.is_dir():
        return f"a file of unknown kind ({place.suffix or 'no suffix'})"
    names = sorted(path.name for path in place.iterdir())
    held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"0 files that can be read ({f'it holds {held}' if names else 'it is empty'})"


def find_documents(args: argparse.Namespace) -> tuple[str, list[Path], list[Piece], TextFormat]:
    """Return the flag that names the input, its files, their pieces, and how to read them."""
    if args.data_dir is None:
        if others := {"task_name", "dev_share", "test_share", "train_split"} & args.given:
            raise UserError(f"--{min(others)} without --data_dir; expected the folder of a task")
        files = find_input_files(args.input_dir, args.output_file)
        text_format = TextFormat(args.text_column, args.documents == "file")
        return "--input_dir", files, cut_pieces(files, text_format.whole_files), text_format
    if others := {"input_dir", "text_column", "documents"} & args.given:
        raise UserError(f"--data_dir and --{min(others)}: the task says which texts are read;"
                        " expected one of the two")
    task = task_of(args)
    files = split_paths(task, args.data_dir, "train")
    if any(args.output_file.resolve() == path.resolve() for path in files):
        raise UserError(f"--output_file {args.output_file}: is an input; expected another name")
    return "--data_dir", files, [Piece(Path(args.data_dir), ROWS)], TextFormat(task=task)


def sample_texts(
    pieces: Sequence[Piece], text_format: TextFormat, characters: int
) -> Iterator[str]:
    """Yield texts of pieces spread evenly over the corpus, about `characters` in total."""
    size = sum(path.stat().st_size for path in {piece.path for piece in pieces})
    stride = max(1, math.ceil(size / characters))
    for piece in pieces[::stride]:
        for document in read_documents(piece, text_format):
            for text in document:
                yield text
                characters -= len(text)
                if characters <= 0:
                    return


# ------------------------------------------------------------------ sentences


def sampled_cjk_share(pieces: Sequence[Piece], text_format: TextFormat) -> float:
    """Return the share of Chinese and Japanese among the letters of a few files."""
    chosen = pieces[:: math.ceil(len(pieces) / LANGUAGE_SAMPLE_FILES)]
    return cjk_share("".join(text for piece in chosen for text in
                             sample_texts([piece], text_format, LANGUAGE_SAMPLE_CHARACTERS)))


def choose_splitter(
    path: Path, args: argparse.Namespace, pieces: Sequence[Piece], text_format: TextFormat
) -> None:
    """Keep the sentence model beside the shards, and log which one it is.

    Where a later call continues, the model is still the same, whatever can be downloaded then.
    """
    if distributed.is_main() and not path.is_file():
        share, language = sampled_cjk_share(pieces, text_format), parse_language(args.language)
        if language == "auto":
            language = "zh" if share >= CJK_SHARE else "en"
        elif language not in CJK_LANGUAGES and share >= CJK_SHARE:
            logger.warning("--language %s: %.0f %% of the letters are Chinese or Japanese, whose"
                           " sentences --language zh would find", args.language, 100 * share)
        name, parameters = make_splitter(language, args, pieces, text_format)
        write_splitter(path, name, parameters, share)
    distributed.barrier()
    logger.info("sentence splitter: %s", read_json(path)["name"])


def make_splitter(
    language: str, args: argparse.Namespace, pieces: Sequence[Piece], text_format: TextFormat
) -> tuple:
    """Return what to call the sentence model of a language, and Punkt's, if that is the model."""
    if language in CJK_LANGUAGES:
        chosen = "" if args.language != "auto" else (
            ", as most letters are Chinese or Japanese (--language says otherwise)")
        return f"the marks of Chinese and Japanese{chosen}", None
    parameters = downloaded_punkt(language) if args.punkt == "auto" else None
    if parameters is not None:
        return f"nltk's punkt_tab, {PUNKT_LANGUAGES[language].capitalize()}", parameters
    texts = list(sample_texts(pieces, text_format, PUNKT_SAMPLE_CHARACTERS))
    reason = "punkt_tab can not be had" if args.punkt == "auto" else "--punkt train"
    return (f"Punkt trained on {sum(map(len, texts)):,} characters of {len(texts):,} texts of this"
            f" corpus ({reason})"), train_punkt(texts)


def warn_of_long_sentences(path: Path, counts: Counter[str]) -> None:
    """Warn where the sentences are longer than instances, as those without an end found are."""
    share = read_json(path).get("cjk_share", 0.0)
    characters = counts["characters"] / max(1, counts["sentences"])
    pieces = characters * (share + (1 - share) / LETTERS_A_PIECE)
    if pieces > LONGEST_INSTANCE:
        logger.warning("sentences have %.0f characters on average, about %.0f word pieces, more"
                       " than an instance of pre-training holds: their ends were not found;"
                       " --language names the text's language", characters, pieces)


# ------------------------------------------------------------------ the corpus


def convert(
    pieces: Sequence[Piece], text_format: TextFormat, splitter_path: Path,
    shard: Shard, output: BinaryIO, counts: Counter[str],
) -> None:
    """Write the sentences of all documents of the shard's pieces."""
    splitter = read_splitter(splitter_path)
    for piece in pieces[shard.begin : shard.end]:
        for document in read_documents(piece, text_format):
            sentences = 0
            for text in document:
                found = split_sentences(text, splitter)
                if not found:
                    continue
                separator = "\n" if counts["documents"] and not sentences else ""
                lines = separator + "\n".join(found) + "\n"
                # JSON can spell half a surrogate pair, which UTF-8 can not.
                output.write(lines.encode("utf-8", errors="replace"))
                sentences += len(found)
                counts["characters"] += len(lines) - len(found) - len(separator)
            counts["documents" if sentences else "empty"] += 1  # redirects have none
            counts["sentences"] += sentences


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input_dir", "--input", type=Path, nargs="+", default=[Path("data/extracted_wiki")],
        help=f"files, or folders with files of one kind: {READABLE}")
    add("--output_file", type=Path, default=Path("data/wiki_for_bert.txt"),
        help="text file to write: one sentence a line, a blank line between documents")
    add("--language", type=str, default="auto",
        help="language of the text: zh and ja end sentences at their own marks, others by Punkt,"
        f" with nltk's model for {', '.join(sorted(PUNKT_LANGUAGES))}, else with one learned from"
        " this corpus; auto: zh where most letters are Chinese or Japanese, else en")
    add("--punkt", choices=["auto", "train"], default="auto",
        help="sentence model: auto is nltk's punkt_tab where it is there or can be downloaded, "
        f"else train; train learns one from at most {PUNKT_SAMPLE_CHARACTERS:,} characters of "
        "this corpus")
    add("--text_column", type=str, default="text",
        help="column of Parquet and Arrow files, and key of JSON lines, that holds the text")
    add("--documents", choices=["blank_line", "file"], default="blank_line",
        help="what ends a document in plain text: a blank line, or only the file's end; a line's "
        "end always ends a sentence")
    add_data_arguments(parser, required=False)
    add("--num_workers", type=int, default=os.cpu_count() or 1,
        help="number of processes; the output is the same whatever it is")
    add("--overwrite", action="store_true", help="replace an existing output file (switch)")
    add_resume_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Find the input, choose a splitter, write the corpus, log the counts."""
    start = time.perf_counter()

    output = args.output_file
    parse_language(args.language)
    flag, files, pieces, text_format = find_documents(args)
    distributed.connect()

    # All work is done in a folder beside the target.
    corpus, shards = ShardedFile(output), cut(len(pieces), max(1, len(pieces) // SHARDS))
    size = sum(path.stat().st_size * COMPRESSION.get(path.suffix, 1) for path in files)
    if not corpus.begin(args, {flag: fingerprint(files)}, size):
        return
    splitter_path = corpus.folder / "splitter.json"
    choose_splitter(splitter_path, args, pieces, text_format)
    counts = corpus.make(shards, partial(convert, pieces, text_format, splitter_path), "piece",
                         args.num_workers)
    if not counts["documents"]:
        raise UserError(
            f"{flag} {' '.join(map(str, as_list(getattr(args, flag[2:]))))}: 0 documents in "
            f"{len(files)} files ({counts['empty']} without text); expected documents with text"
        )
    if distributed.is_main():
        warn_of_long_sentences(splitter_path, counts)
        corpus.merge(shards, separator=b"\n")
        logger.info("%s: %d documents, %d sentences, %d bytes; %d documents without text skipped; "
                    "%.1f s", output, counts["documents"], counts["sentences"],
                    output.stat().st_size, counts["empty"], time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main, get_args_parser())
