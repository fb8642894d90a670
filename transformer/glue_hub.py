"""GLUE as the Hugging Face hub has it (nyu-mll/glue), written as the files that GLUE publishes."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformer.file_utils import UserError
from transformer.own_tasks import find_task
from transformer.table_files import PARQUET, iterate_table, write_tsv
from transformer.tasks import Task, iterate_examples, plain_name

logger = logging.getLogger(__name__)

DATASET = "nyu-mll/glue"
DIAGNOSTIC, DIAGNOSTIC_CONFIG, DIAGNOSTIC_FILE = "diagnostic", "ax", "diagnostic.tsv"
GAP = re.compile(r"\r\n|[\t\r\n]")  # what a cell cannot hold

# The columns of GLUE's files: of train and dev, and of test, which has no labels.
PAIR = "index,sentence1,sentence2"
MNLI = ("index,promptID,pairID,genre,sentence1_binary_parse,sentence2_binary_parse,"
        "sentence1_parse,sentence2_parse,sentence1,sentence2")
STSB = "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2"
HEADERS = {
    "CoLA": ("source,label,star,sentence", "index,sentence"),
    "SST-2": ("sentence,label", "index,sentence"),
    "MRPC": ("Quality,#1 ID,#2 ID,#1 String,#2 String",
             "index,#1 ID,#2 ID,#1 String,#2 String"),
    "STS-B": (f"{STSB},score", STSB),
    "QQP": ("id,qid1,qid2,question1,question2,is_duplicate", "id,question1,question2"),
    "MNLI": (f"{MNLI},label1,gold_label", MNLI),
    "QNLI": ("index,question,sentence,label", "index,question,sentence"),
    "RTE": (f"{PAIR},label", PAIR),
    "WNLI": (f"{PAIR},label", PAIR),
}
TEST_FILES = {"test.tsv": "test-*.parquet", "test_matched.tsv": "test_matched-*.parquet",
              "test_mismatched.tsv": "test_mismatched-*.parquet"}

Row = tuple[str, ...]  # its texts and, but for test, the label


def hub_config(folder: str) -> str:
    """Return what the hub calls the task of one of GLUE's folders."""
    return DIAGNOSTIC_CONFIG if folder == DIAGNOSTIC else plain_name(folder)


def write_glue(folder: str, source: Path, target: Path) -> None:
    """Write a task's Parquet files in `source` as TSV files in `target`, as GLUE's `folder` has.

    Labels are matched by name. What the hub lacks (ids, genres, parses) is empty; a tab or line end
    inside a text becomes a space; rows without a label, but those of test, are left out.
    """
    if folder == DIAGNOSTIC:
        rows = _texts(source, "test-*.parquet", ("premise", "hypothesis"))
        _write(target / DIAGNOSTIC_FILE, PAIR, PAIR.split(",")[1:], rows)
        return
    hub_task = find_task(folder, source)
    task = find_task(folder)
    if hub_task == task:
        raise UserError(f"{source}: no train-*.parquet; expected {DATASET}'s files of {folder}")
    header, test_header = HEADERS[folder]
    texts = [name for name in (task.text_a, task.text_b) if name is not None]
    for split, file in task.dev_files.items() | {("train", task.files["train"])}:
        # The labels of MNLI's five annotators, in the development sets.
        columns = header.replace("label1", "label1,label2,label3,label4,label5") \
            if split != "train" else header
        _write(target / file, columns, [*texts, task.label], _labelled(hub_task, source, split),
               has_header=not task.columns)
    hub_texts = [name for name in (hub_task.text_a, hub_task.text_b) if name is not None]
    for file, pattern in TEST_FILES.items():
        if any(source.glob(pattern)):
            _write(target / file, test_header, texts, _texts(source, pattern, hub_texts))


def _labelled(task: Task, source: Path, split: str) -> Iterator[Row]:
    for example in iterate_examples(task, source, split):
        # The hub's scores are the published ones, of three digits, as float32.
        label = f"{float(example.label):.3f}" if task.is_regression else example.label
        texts = (example.text_a,) if example.text_b is None else (example.text_a, example.text_b)
        yield *texts, label


def _texts(source: Path, pattern: str, names: Sequence[str]) -> Iterator[Row]:
    for path in sorted(source.glob(pattern)):
        rows = iterate_table(path, PARQUET)
        _, found = next(rows)
        if missing := {*names} - {*found}:
            raise UserError(f"{path}: no column {min(missing)!r}; expected {', '.join(names)}")
        places = [found.index(name) for name in names]
        for _, cells in rows:
            yield tuple(cells[place] for place in places)


def _write(path: Path, header: str, names: Sequence[str], rows: Iterator[Row],
           has_header: bool = True) -> None:
    """Write rows that hold the columns `names` of a header; its first column may number them."""
    columns, changed = header.split(","), 0

    def lines() -> Iterator[list[str]]:
        nonlocal changed
        if has_header:
            yield columns
        for number, row in enumerate(rows):
            cells = dict.fromkeys(columns, "") | {"index": str(number), "id": str(number)}
            plain = [GAP.sub(" ", cell) for cell in row]
            changed += plain != [*row]
            cells |= zip(names, plain, strict=True)
            yield [cells[name] for name in columns]

    write_tsv(path, lines())
    if changed:
        logger.info("%s: a tab or line end became a space in the texts of %d rows", path, changed)
