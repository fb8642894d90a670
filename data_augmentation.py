"""Write a task's augmented training file, train_aug.tsv (TinyBERT, arXiv 1909.10351, Algorithm 1).

Every row of train.tsv is written once as it is, then up to N times with other words in its first
sentence, then up to N times with other words in its second one; the sentence that is not varied
stays the original. Replacements of words that are one word piece come from BERT's masked-LM head,
those of other words are the nearest neighbours among the word vectors.

Finished shards wait in a folder beside the output, .unfinished-train_aug.tsv, until all are there;
--resume continues with them after a kill. Under torchrun each process varies its share of the rows.

Example:
    python data_augmentation.py --pretrained_bert_model models/bert-base-uncased \
        --glove_embs data/glove.840B.300d.txt --glue_dir data/glue_data --task_name RTE

Where there is no GloVe, this first composes word vectors of the model's word-piece embeddings:
    python data_augmentation.py --compose_vectors data/wiki_for_bert.txt \
        --pretrained_bert_model models/bert-base-uncased --glove_embs data/vectors.txt
"""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Iterator
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
from transformer.table_files import tsv_line
from transformer.tasks import GLUE_TASKS, TaskRows, get_task, split_paths, task_rows
from transformer.tokenization import BertTokenizer

logger = logging.getLogger("data_augmentation")

SHARD_ROWS = 512  # rows of a shard, whose masked words are sorted by length together
UNKNOWN_SHARE_LIMIT = 0.10
VARIED_SHARE_LIMIT = 0.01  # of the rows
IN_WORDS_SHARE_LIMIT = 0.10  # of the ideographs


class ComposeVectors(argparse.Action):
    """Store the files of --compose_vectors, which needs no task."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[Path],
        option_string: str | None = None,
    ) -> None:
        namespace.compose_vectors = values
        for action in parser._actions:
            action.required = action.required and action.dest not in ("glue_dir", "task_name")


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
    add("--glue_dir", type=str, required=True,
        help="folder that holds the tasks' folders (RTE, SST-2, ...)")
    add("--task_name", type=str, required=True,
        help=f"GLUE task, in any case: {', '.join(GLUE_TASKS)}")
    add("--compose_vectors", type=Path, nargs="+", default=None, metavar="TEXT_FILE",
        action=ComposeVectors,
        help="write to --glove_embs instead: vectors of the words of these files, the most "
             f"frequent {COMPOSED_WORDS:,}, composed of the model's word-piece embeddings")
    add("--N", type=int, default=30,
        help="new sentences tried for each sentence; where the flag is not given, the task's own "
             f"number applies ({tasks})")
    add("--M", type=int, default=15, help="replacements considered for each word")
    add("--p", type=float, default=0.4, help="probability, 0 to 1, that a word is replaced")
    add("--seed", type=int, default=42, help="seed of the draws, an integer")
    add("--output_file", type=str, default=None,
        help="file to write; None: train_aug.tsv beside the task's train.tsv")
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
    """Raise a `UserError` for a number out of range."""
    if not 0 <= args.p <= 1:
        raise UserError(f"--p {args.p}: expected a probability from 0 to 1")


def augmented_rows(
    table: TaskRows, augmentor: DataAugmentor, shard: Shard, varied: int
) -> Iterator[list[list[str]]]:
    """Yield for each row of the shard the rows that replace it: itself, then its variations.

    Only the first `varied` rows of the table are varied. The two sentences of a pair are varied
    one at a time, each beside the original of the other.
    """
    columns = [column for column in (table.text_a, table.text_b) if column is not None]
    augmentor.next_sentence = shard.begin * len(columns)
    variations = iter(augmentor.augment([
        row[column] for row in table.rows[shard.begin : min(shard.end, varied)]
        for column in columns]))
    for index in range(shard.begin, shard.end):
        row = table.rows[index]
        new_rows = [row]
        for column in columns if index < varied else ():
            for sentence in next(variations)[1:]:
                new_rows.append([*row[:column], sentence, *row[column + 1 :]])
        yield new_rows


def write_rows(
    table: TaskRows, augmentor: DataAugmentor, varied: int, source: Path,
    shard: Shard, output: BinaryIO, counts: Counter[str],
) -> None:
    """Write the rows that replace those of a shard, in the first one after the header."""
    header = [] if table.header is None else [table.header]
    augmentor.counts.clear()
    if shard.begin == 0:
        output.write("".join(tsv_line(row, source, 1) for row in header).encode())
    first = shard.begin + len(header) + 1
    for number, new_rows in enumerate(augmented_rows(table, augmentor, shard, varied), first):
        output.write("".join(tsv_line(row, source, number) for row in new_rows).encode())
        counts["written"] += len(new_rows)
        counts["varied_rows"] += len(new_rows) > 1
    counts.update(augmentor.counts)


def fingerprints(
    args: argparse.Namespace, source: Path, model_dir: Path, device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """Return what flags stand for: digests of files, and the precision that auto chooses."""
    model_files = sorted(path for path in model_dir.glob("*") if path.is_file())
    return {
        "--task_name": fingerprint([source]),
        "--glove_embs": fingerprint([Path(args.glove_embs)]),
        "--pretrained_bert_model": fingerprint(model_files),
        "--precision": f"{dtype} on {device.type}",
    }


def output_bytes(table: TaskRows, varied: int, draws: int) -> int:
    """Return how large the augmented rows are at most, roughly."""
    sizes = [len("\t".join(row).encode()) + 1 for row in table.rows]
    new = draws * (1 if table.text_b is None else 2)  # of each row
    return sum(sizes) + new * sum(sizes[:varied])


def check_varied(counts: Counter[str], rows: int, args: argparse.Namespace, source: Path) -> None:
    """Raise a `UserError` if none of the rows that should vary does; warn if hardly any does."""
    if counts["varied_rows"] >= VARIED_SHARE_LIMIT * rows or args.N == 0 or args.p == 0:
        return
    if counts["varied_rows"]:
        logger.warning("only %d of %d rows vary; do the word vectors fit the text?",
                       counts["varied_rows"], rows)
        return
    vectors = f"word vectors of its language, not {args.glove_embs}, or --compose_vectors"
    if not counts["words"]:
        reason = ("no word of the letters a-z besides function words; expected English, or"
                  " --data_dir for a task of your own")
    elif counts["words"] == counts["no_candidates"]:
        reason = f"none of the {counts['words']} words has replacements; expected {vectors}"
    else:
        reason = f"{args.N} draws for each sentence changed no word; expected a larger --N or --p"
    raise UserError(f"{source}: nothing was varied: {reason}")


def report(counts: Counter[str], rows: int, seconds: float) -> None:
    """Log what came out, and warn where the model hardly knows the text."""
    written = counts["written"]
    logger.info(
        "%d rows in, %d rows out (%.1f for one) in %.1f s; %d words varied, %d of them without "
        "candidates; %d of %d word pieces are [UNK]",
        rows, written, written / rows, seconds, counts["words"], counts["no_candidates"],
        counts["unknown"], counts["pieces"],
    )
    if counts["unknown"] > UNKNOWN_SHARE_LIMIT * counts["pieces"]:
        logger.warning(
            "%.0f %% of the word pieces are [UNK]; does the vocabulary fit the text, and its case?",
            100 * counts["unknown"] / counts["pieces"],
        )


def write_composed_vectors(args: argparse.Namespace) -> None:
    """Write the word vectors that --compose_vectors asks for."""
    if not distributed.is_main():
        return
    output_file = Path(args.glove_embs)
    model_dir = fetch_model(args.pretrained_bert_model)
    check_output_file(output_file)
    check_not_input(output_file, [*args.compose_vectors, *model_dir.glob("*")])
    if output_file.exists() and not (args.overwrite or args.resume):
        raise UserError(f"--glove_embs {output_file}: exists; --overwrite replaces it")
    words, vectors = compose_vectors(model_dir, args.compose_vectors)
    write_vectors(output_file, words, vectors)
    logger.info("wrote %d vectors of %d numbers to %s", *vectors.shape, output_file)


def main(args: argparse.Namespace) -> None:
    """Augment the rows of a task, or with --compose_vectors make the word vectors for that."""
    if args.compose_vectors:
        write_composed_vectors(args)
        return

    # What to augment
    task = get_task(args.task_name)
    data_dir = Path(args.glue_dir) / task.folder
    output_file = Path(args.output_file or data_dir / "train_aug.tsv")
    check_args(args)
    table = task_rows(task, data_dir)
    if args.max_train_rows:
        table = table._replace(rows=table.rows[: args.max_train_rows])
    varied = min(args.max_varied_rows or len(table.rows), len(table.rows))
    if "N" not in args.given:
        args.N = task.augmentation_n
    device = get_device(args.no_cuda)
    dtype = resolve_precision(args.precision, device)
    model_dir = fetch_model(args.pretrained_bert_model)

    # A new start, or where an earlier call was stopped
    output, source = ShardedFile(output_file), split_paths(task, data_dir, "train")[0]
    check_not_input(output_file, [
        *(data_dir / name for split, name in task.files.items() if split != "aug"),
        Path(args.glove_embs), *model_dir.glob("*")])
    size = output_bytes(table, varied, args.N)
    if not output.begin(args, fingerprints(args, source, model_dir, device, dtype), size):
        return

    # Model and word vectors
    tokenizer = BertTokenizer.from_pretrained(model_dir)
    model = freeze(BertForMaskedLM.from_pretrained(model_dir), dtype, device)
    glove = GloveIndex.load(args.glove_embs)
    augmentor = DataAugmentor(model, tokenizer, glove, args.M, args.N, args.p, args.seed,
                              batch_tokens=args.batch_tokens)
    log_start(args, device, dtype, task=task.name, rows=len(table.rows), vectors=len(glove))

    # Write
    start, shards = time.perf_counter(), cut(len(table.rows), SHARD_ROWS)
    counts = output.make(shards, partial(write_rows, table, augmentor, varied, source), "row")
    try:
        check_varied(counts, varied, args, source)
    except UserError:
        if distributed.is_main():
            output.remove_folder()
        raise
    if distributed.is_main():
        output.merge(shards)
    report(counts, len(table.rows), time.perf_counter() - start)
    logger.info("wrote %s", output_file)


if __name__ == "__main__":
    run_script(main, get_args_parser())
