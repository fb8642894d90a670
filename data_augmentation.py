"""Write a task's augmented training file, train_aug.tsv (TinyBERT, arXiv 1909.10351, Algorithm 1).

Every row of train.tsv is written once as it is, then up to N times with other words in its first
sentence, then up to N times with other words in its second one; the sentence that is not varied
stays the original. Replacements of words that are one word piece come from BERT's masked-LM head,
those of other words are the nearest neighbours among the word vectors.

Example:
    python data_augmentation.py --pretrained_bert_model models/bert-base-uncased \
        --glove_embs data/glove.840B.300d.txt --glue_dir data/glue_data --task_name RTE
"""

import argparse
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from transformer.augmentation import BATCH_TOKENS, DataAugmentor, GloveIndex
from transformer.file_utils import UserError
from transformer.glue import GLUE_TASKS, TaskRows, TsvWriter, get_task, task_rows
from transformer.inference import freeze
from transformer.modeling import BertForMaskedLM
from transformer.runtime import (
    add_precision_argument,
    get_device,
    log_start,
    resolve_precision,
    run_script,
)
from transformer.tokenization import BertTokenizer

logger = logging.getLogger("data_augmentation")

CHUNK_ROWS = 512  # rows whose masked words are sorted by length together
UNKNOWN_SHARE_LIMIT = 0.10


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data_augmentation.py",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    tasks = ", ".join(f"{task.name} {task.augmentation_n}" for task in GLUE_TASKS.values())
    add("--pretrained_bert_model", type=str, required=True,
        help="folder of a BERT with masked-LM head (config.json, weights, vocab.txt)")
    add("--glove_embs", type=str, required=True,
        help="file of word vectors as text, one word a line")
    add("--glue_dir", type=str, required=True,
        help="folder that holds the tasks' folders (RTE, SST-2, ...)")
    add("--task_name", type=str, required=True,
        help=f"GLUE task, in any case: {', '.join(GLUE_TASKS)}")
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
    add("--no_cuda", action="store_true", help="compute on the CPU")
    return parser


def augmented_rows(
    table: TaskRows, augmentor: DataAugmentor, varied: int, chunk_rows: int = CHUNK_ROWS
) -> Iterator[list[list[str]]]:
    """Yield for each row of the table the rows that replace it: itself, then its variations.

    The two sentences of a pair are varied one at a time, each beside the original of the other.
    Rows after the first `varied` stay alone.
    """
    columns = [column for column in (table.text_a, table.text_b) if column is not None]
    for start in range(0, varied, chunk_rows):
        chunk = table.rows[start : min(start + chunk_rows, varied)]
        variations = iter(augmentor.augment([row[column] for row in chunk for column in columns]))
        for row in chunk:
            new_rows = [row]
            for column in columns:
                for sentence in next(variations)[1:]:
                    new_rows.append([*row[:column], sentence, *row[column + 1 :]])
            yield new_rows
    for row in table.rows[varied:]:
        yield [row]


def output_path(args: argparse.Namespace, data_dir: Path) -> Path:
    """Where to write; a file that is there is a `UserError` unless it may be replaced."""
    path = Path(args.output_file) if args.output_file else data_dir / "train_aug.tsv"
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a file to write with --output_file")
    if path.exists() and not args.overwrite:
        raise UserError(f"{path}: exists; --overwrite replaces it")
    return path


def write_augmented(
    table: TaskRows, augmentor: DataAugmentor, varied: int, output_file: Path
) -> int:
    """Write header and rows; the file appears when it is complete. Returns the rows written."""
    written = 0
    progress = tqdm(total=len(table.rows), desc=output_file.name, unit="row", disable=None)
    with TsvWriter(output_file) as writer, progress:
        if table.header is not None:
            writer.write(table.header)
        for new_rows in augmented_rows(table, augmentor, varied):
            for row in new_rows:
                writer.write(row)
            written += len(new_rows)
            progress.update()
    return written


def report(augmentor: DataAugmentor, rows: int, written: int, seconds: float) -> None:
    """Print what came out, and warn where the model hardly knows the text."""
    counts = augmentor.counts
    logger.info(
        "%d rows in, %d rows out (%.1f for one) in %.1f s, %.1f rows/s; %d words varied, %d of "
        "them without candidates; %d of %d word pieces are [UNK]",
        rows, written, written / rows, seconds, rows / seconds, counts["words"],
        counts["no_candidates"], counts["unknown"], counts["pieces"],
    )
    if counts["unknown"] > UNKNOWN_SHARE_LIMIT * counts["pieces"]:
        logger.warning(
            "%.0f %% of the word pieces are [UNK]; does the vocabulary fit the text, and its case?",
            100 * counts["unknown"] / counts["pieces"],
        )


def main(args: argparse.Namespace) -> None:
    # What to augment
    task = get_task(args.task_name)
    data_dir = Path(args.glue_dir) / task.folder
    output_file = output_path(args, data_dir)
    for name in ("max_train_rows", "max_varied_rows"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: expected 0 (all) or more")
    table = task_rows(task, data_dir)
    if args.max_train_rows:
        table = table._replace(rows=table.rows[: args.max_train_rows])
    if "N" not in args.given:
        args.N = task.augmentation_n

    # Model and word vectors
    device = get_device(args.no_cuda)
    dtype = resolve_precision(args.precision, device)
    tokenizer = BertTokenizer.from_pretrained(args.pretrained_bert_model)
    model = freeze(BertForMaskedLM.from_pretrained(args.pretrained_bert_model), dtype, device)
    glove = GloveIndex.load(args.glove_embs)
    augmentor = DataAugmentor(
        model, tokenizer, glove, args.M, args.N, args.p, args.seed,
        batch_tokens=args.batch_tokens,
    )
    log_start(args, device, dtype, task=task.name, rows=len(table.rows), vectors=len(glove))

    # Write
    start = time.perf_counter()
    varied = min(args.max_varied_rows or len(table.rows), len(table.rows))
    written = write_augmented(table, augmentor, varied, output_file)
    report(augmentor, len(table.rows), written, time.perf_counter() - start)
    logger.info("wrote %s", output_file)


if __name__ == "__main__":
    run_script(main, get_args_parser())
