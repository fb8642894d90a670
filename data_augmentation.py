"""Write a task's augmented training file, train_aug.tsv (TinyBERT, arXiv 1909.10351, Algorithm 1).

Every row of train.tsv is written once as it is, then up to N times with other words in its first
sentence, then up to N times with other words in its second one; the sentence that is not varied
stays the original. Replacements of words that are one word piece come from BERT's masked-LM head,
those of other words are the nearest neighbours among the word vectors.

GLUE's tasks have words of the letters a-z. The texts of other tasks (--data_dir) may be in any
script: where they are Chinese, the words are those of the word vectors, and the model replaces
what is left of single characters. A negation is never varied there.

Finished shards wait in a folder beside the output, .unfinished-train_aug.tsv, until all are there;
--resume continues with them after a kill. Under torchrun each process varies its share of the rows.

Example:
    python data_augmentation.py --pretrained_bert_model models/bert-base-uncased \
        --glove_embs data/glove.840B.300d.txt --glue_dir data/glue_data --task_name RTE
    python data_augmentation.py --pretrained_bert_model models/bert-base-chinese \
        --glove_embs data/chinese_vectors.txt --data_dir data/reviews

Where there is no GloVe, this first composes word vectors of the model's word-piece embeddings, of
the words in text files, or in the training rows of --data_dir, or in both:
    python data_augmentation.py --compose_vectors data/wiki_for_bert.txt \
        --pretrained_bert_model models/bert-base-uncased --glove_embs data/vectors.txt
    python data_augmentation.py --compose_vectors --data_dir data/reviews \
        --pretrained_bert_model models/bert-base-chinese --glove_embs data/chinese_vectors.txt
"""

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from transformer import distributed
from transformer.augmentation import (
    BATCH_TOKENS,
    COMPOSED_WORDS,
    DataAugmentor,
    GloveIndex,
    compose_vectors,
    write_vectors,
)
from transformer.file_utils import UserError, check_output_file
from transformer.hub import fetch_model
from transformer.modeling import BertForMaskedLM, freeze
from transformer.own_tasks import add_data_arguments, find_task, task_record
from transformer.run_folder import check_not_input
from transformer.runtime import (
    add_precision_argument,
    add_resume_argument,
    get_device,
    log_start,
    resolve_precision,
    run_script,
)
from transformer.shards import Shard, ShardedFile, cut, fingerprint
from transformer.table_files import JSON, format_of, row_line
from transformer.tasks import GLUE_TASKS, Task, TaskRows, get_task, split_paths, task_rows
from transformer.tokenization import load_tokenizer
from transformer.tokenizer_files import is_berts
from transformer.words import Sentence, WordFinder, english_words

logger = logging.getLogger("data_augmentation")

SHARD_ROWS = 512  # rows of a shard, whose masked words are sorted by length together
UNKNOWN_SHARE_LIMIT = 0.10
VARIED_SHARE_LIMIT = 0.01  # of the rows
IN_WORDS_SHARE_LIMIT = 0.10  # of the ideographs


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data_augmentation.py",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    tasks = ", ".join(f"{task.name} {task.augmentation_n}" for task in GLUE_TASKS.values())
    add("--pretrained_bert_model", type=str, required=True,
        help="BERT with masked-LM head: folder, URL or hub id")
    add("--glove_embs", type=str, required=True,
        help="file of word vectors as text, one word a line")
    add("--glue_dir", type=str, default=None,
        help="folder that holds the folders of GLUE's tasks (RTE, SST-2, ...); one of them is"
             " --task_name")
    add_data_arguments(parser, required=False)
    add("--compose_vectors", type=Path, nargs="*", default=None, metavar="TEXT_FILE",
        help="write to --glove_embs instead: vectors of the words of these files, and of the"
             f" training rows in --data_dir, the most frequent {COMPOSED_WORDS:,}, composed of the"
             " model's word-piece embeddings")
    add("--N", type=int, default=30,
        help="new sentences tried for each sentence; where the flag is not given, the task's own "
             f"number applies ({tasks})")
    add("--M", type=int, default=15, help="replacements considered for each word")
    add("--p", type=float, default=0.4, help="probability, 0 to 1, that a word is replaced")
    add("--seed", type=int, default=42, help="seed of the draws, an integer")
    add("--output_file", type=str, default=None,
        help="file to write, in the format of train (of Parquet, Arrow and text files: JSON"
             " lines); None: train_aug beside the task's train, such as train_aug.tsv")
    add("--overwrite", action="store_true", help="replace an output file that exists")
    add("--max_train_rows", type=int, default=0,
        help="read only this many rows, the first of the file; 0: all")
    add("--max_varied_rows", type=int, default=0,
        help="vary only this many rows, the first, and copy the others as they are; 0: all")
    add("--batch_tokens", type=int, default=0,
        help="word pieces in one batch of the model, fewer need less memory; 0: "
             f"{BATCH_TOKENS['cuda']} on a GPU, {BATCH_TOKENS['cpu']} on a CPU")
    add_precision_argument(parser)
    add_resume_argument(parser)
    add("--no_cuda", action="store_true", help="compute on the CPU")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a number out of range, or where no task or two are given."""
    if args.glue_dir is not None and args.data_dir is not None:
        raise UserError("--glue_dir and --data_dir: expected one of them")
    if args.glue_dir is None and args.data_dir is None and not args.compose_vectors:
        raise UserError("expected --glue_dir with --task_name, or --data_dir"
                        + ("" if args.compose_vectors is None else ", or files to take words from"))
    if args.glue_dir is not None and args.task_name is None and args.compose_vectors is None:
        raise UserError("--glue_dir: expected --task_name beside it")
    if not 0 <= args.p <= 1:
        raise UserError(f"--p {args.p}: expected a probability from 0 to 1")


def find_rows(args: argparse.Namespace) -> tuple[Task, Path, TaskRows]:
    """Find the task, its folder (or its file), and the rows to learn from."""
    data_dir = Path(args.data_dir or Path(args.glue_dir, get_task(args.task_name).folder))
    task = find_task(args.task_name, data_dir, args.dev_share, args.test_share,
                     args.train_split or "")
    table = task_rows(task, data_dir)
    return task, data_dir, table._replace(rows=table.rows[: args.max_train_rows or None])


def text_columns(table: TaskRows) -> list[int]:
    """Return the columns of the texts."""
    return [column for column in (table.text_a, table.text_b) if column is not None]


def texts_of(table: TaskRows, row: list[str]) -> tuple[str, ...]:
    """Return the texts of a row."""
    return tuple(row[column] for column in text_columns(table))


def held_out_texts(task: Task, data_dir: Path) -> set[tuple[str, ...]]:
    """Return the texts of the rows of train that are set aside: dev, test, another half."""
    if not (task.dev_share or task.test_share or task.train_split):
        return set()
    learned = task_rows(task, data_dir)
    whole = task_rows(replace(task, dev_share=0.0, test_share=0.0, train_split=""), data_dir)
    return ({texts_of(whole, row) for row in whole.rows}
            - {texts_of(learned, row) for row in learned.rows})


def augmented_rows(
    table: TaskRows, augmentor: DataAugmentor, shard: Shard, varied: int,
    held_out: Collection[tuple[str, ...]] = (),
) -> Iterator[list[list[str]]]:
    """Yield for each row of the shard the rows that replace it: itself, then its variations.

    Only the first `varied` rows of the table are varied. The two sentences of a pair are varied
    one at a time, each beside the original of the other. No variation has the texts of a row that
    is held out.
    """
    columns = text_columns(table)
    augmentor.next_sentence = shard.begin * len(columns)
    variations = iter(augmentor.augment([
        row[column] for row in table.rows[shard.begin : min(shard.end, varied)]
        for column in columns]))
    for index in range(shard.begin, shard.end):
        row = table.rows[index]
        new_rows = [row]
        for column in columns if index < varied else ():
            for sentence in next(variations)[1:]:
                new_row = [*row[:column], sentence, *row[column + 1 :]]
                if texts_of(table, new_row) not in held_out:
                    new_rows.append(new_row)
        yield new_rows


def write_rows(
    table: TaskRows, augmentor: DataAugmentor, varied: int,
    held_out: Collection[tuple[str, ...]], source: Path, form: str,
    shard: Shard, output: BinaryIO, counts: Counter[str],
) -> None:
    """Write the rows that replace those of a shard, in the first one after the header."""
    header = [] if table.header is None or form == JSON else [table.header]
    augmentor.counts.clear()

    def write(rows: list[list[str]], number: int) -> None:
        lines = (row_line(row, table.header, form, source, number) for row in rows)
        output.write("".join(lines).encode())

    if shard.begin == 0:
        write(header, 1)
    first = shard.begin + len(header) + 1
    groups = augmented_rows(table, augmentor, shard, varied, held_out)
    for number, new_rows in enumerate(groups, first):
        write(new_rows, number)
        counts["written"] += len(new_rows)
        counts["varied_rows"] += len(new_rows) > 1
    counts.update(augmentor.counts)


def fingerprints(
    args: argparse.Namespace, task: Task, sources: list[Path], model_dir: Path,
    device: torch.device, dtype: torch.dtype | None,
) -> dict[str, str]:
    """Return what flags stand for: digests of files, and the precision that auto chooses."""
    model_files = sorted(path for path in model_dir.glob("*") if path.is_file())
    description = "" if task.is_glue else f" {json.dumps(task_record(task))}"
    return {
        "--task_name": fingerprint(sources) + description,
        "--glove_embs": fingerprint([Path(args.glove_embs)]),
        "--pretrained_bert_model": fingerprint(model_files),
        "--precision": f"{dtype} on {device.type}",
    }


def output_bytes(table: TaskRows, varied: int, draws: int, form: str) -> int:
    """Return how large the augmented rows are at most, roughly."""
    names = json.dumps(dict.fromkeys(table.header, "")) if form == JSON else ""
    sizes = [len("\t".join(row).encode()) + len(names) + 1 for row in table.rows]
    new = draws * len(text_columns(table))  # of each row
    return sum(sizes) + new * sum(sizes[:varied])


@contextmanager
def nothing_left_of(output: ShardedFile) -> Iterator[None]:
    """Remove the unfinished output where the block finds that it is of no use."""
    try:
        yield
    except UserError:
        if distributed.is_main():
            output.remove_folder()
        raise


def check_words(
    table: TaskRows, varied: int, find_words: Callable[[str], Sentence], task: Task, vectors: str
) -> None:
    """Raise an error if no text has a word that may be varied."""
    texts = (text for row in table.rows[:varied] for text in texts_of(table, row))
    if not any(find_words(text).words for text in texts):
        raise UserError(f"task {task.name}: nothing to vary: " + (
            "no text has words of the letters a-z; expected English, as in GLUE, or a task of your"
            " own in --data_dir" if task.is_glue else
            f"no word of the texts is in {vectors}; expected word vectors of their language, such"
            " as --compose_vectors makes"))


def check_varied(counts: Counter[str], rows: int, args: argparse.Namespace) -> None:
    """Raise an error if none of the rows that should vary does; warn if hardly any does."""
    if counts["varied_rows"] >= VARIED_SHARE_LIMIT * rows or args.N == 0 or args.p == 0:
        return
    if counts["varied_rows"]:
        logger.warning("only %d of %d rows vary; do the word vectors fit the texts?",
                       counts["varied_rows"], rows)
    elif counts["words"] == counts["no_candidates"]:
        raise UserError(f"--glove_embs {args.glove_embs}: has neighbours of no word of the"
                                 " texts, so that nothing was varied; expected word vectors of"
                                 " their language, such as --compose_vectors makes")
    else:
        raise UserError(f"--N {args.N} --p {args.p:g}: no draw has changed anything;"
                                 " expected more draws, or likelier ones")


def report_ideographs(counts: Counter[str]) -> None:
    """Log how many ideographs are in words that the vectors know; warn where they are few."""
    logger.info("%d of %d ideographs are in words of the vectors",
                counts["in_words"], counts["ideographs"])
    if counts["in_words"] < IN_WORDS_SHARE_LIMIT * counts["ideographs"]:
        logger.warning("hardly any ideographs are in words of the vectors, so that most are varied"
                       " one by one; do the vectors fit the language?")


def report(counts: Counter[str], rows: int, seconds: float) -> None:
    """Log what came out, and warn where the model hardly knows the text."""
    written = counts["written"]
    logger.info(
        "%d rows in, %d rows out (%.1f for one) in %.1f s; %d words varied, %d of them without "
        "candidates; %d of %d word pieces are [UNK]",
        rows, written, written / rows, seconds, counts["words"], counts["no_candidates"],
        counts["unknown"], counts["pieces"],
    )
    if 2 * counts["ideographs"] > counts["pieces"]:
        report_ideographs(counts)
    if counts["unknown"] > UNKNOWN_SHARE_LIMIT * counts["pieces"]:
        logger.warning(
            "%.0f %% of the word pieces are [UNK]; does the vocabulary fit the text, and its case?",
            100 * counts["unknown"] / counts["pieces"],
        )


def check_word_pieces(model_dir: Path) -> None:
    """Raise a `UserError` for a model whose vocabulary is not a BERT's."""
    if not is_berts(model_dir):
        raise UserError(f"--pretrained_bert_model {model_dir}: its tokenizer.json is no BERT's, of"
                        " whose basic tokens augmentation makes rows; expected a BERT (the rows fit"
                        " teachers of every kind)")


def write_composed_vectors(args: argparse.Namespace) -> None:
    """Write the word vectors that --compose_vectors asks for."""
    if not distributed.is_main():
        return
    output_file = Path(args.glove_embs)
    texts = []
    if args.data_dir is not None:
        *_, table = find_rows(args)
        texts = [text for row in table.rows for text in texts_of(table, row)]
    model_dir = fetch_model(args.pretrained_bert_model)
    check_word_pieces(model_dir)
    check_output_file(output_file)
    check_not_input(output_file, [*args.compose_vectors, *model_dir.glob("*")])
    if output_file.exists() and not (args.overwrite or args.resume):
        raise UserError(f"--glove_embs {output_file}: exists; --overwrite replaces it")
    words, vectors = compose_vectors(model_dir, args.compose_vectors, texts)
    write_vectors(output_file, words, vectors)
    logger.info("wrote %d vectors of %d numbers to %s", *vectors.shape, output_file)


def main(args: argparse.Namespace) -> None:
    """Augment the rows of a task, or with --compose_vectors make the word vectors for that."""
    check_args(args)
    if args.compose_vectors is not None:
        write_composed_vectors(args)
        return

    # What to augment
    task, data_dir, table = find_rows(args)
    folder = data_dir.parent if data_dir.is_file() else data_dir
    output_file = Path(args.output_file or folder / task.files["aug"])
    form = format_of(task.files["aug"])
    varied = min(args.max_varied_rows or len(table.rows), len(table.rows))
    if "N" not in args.given:
        args.N = task.augmentation_n
    device = get_device(args.no_cuda)
    dtype = resolve_precision(args.precision, device)
    model_dir = fetch_model(args.pretrained_bert_model)
    check_word_pieces(model_dir)

    # A new start, or where an earlier call was stopped
    output, sources = ShardedFile(output_file), split_paths(task, data_dir, "train")
    check_not_input(output_file, [
        *(path for name in task.splits.values()
          for path in (folder.glob(name) if "*" in name else [folder / name])),
        Path(args.glove_embs), *model_dir.glob("*")])
    inputs = fingerprints(args, task, sources, model_dir, device, dtype)
    if not output.begin(args, inputs, output_bytes(table, varied, args.N, form)):
        return

    # Words and model
    tokenizer = load_tokenizer(model_dir)
    glove = GloveIndex.load(args.glove_embs)
    find_words = (partial(english_words, basic_tokenizer=tokenizer.basic_tokenizer) if task.is_glue
                  else WordFinder(glove.words, tokenizer.basic_tokenizer).find)
    with nothing_left_of(output):
        check_words(table, varied, find_words, task, args.glove_embs)
    model = freeze(BertForMaskedLM.from_pretrained(model_dir), dtype, device)
    augmentor = DataAugmentor(model, tokenizer, glove, args.M, args.N, args.p, args.seed,
                              batch_tokens=args.batch_tokens, find_words=find_words)
    log_start(args, device, dtype, task=task.name, rows=len(table.rows), vectors=len(glove))

    # Write
    start, shards = time.perf_counter(), cut(len(table.rows), SHARD_ROWS)
    write = partial(write_rows, table, augmentor, varied, held_out_texts(task, data_dir),
                    sources[0], form)
    counts = output.make(shards, write, "row")
    with nothing_left_of(output):
        check_varied(counts, varied, args)
    if distributed.is_main():
        output.merge(shards)
    report(counts, len(table.rows), time.perf_counter() - start)
    logger.info("wrote %s", output_file)


if __name__ == "__main__":
    run_script(main, get_args_parser())
