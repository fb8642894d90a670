"""Project the hours of the full run's training (profiles/full.env) on one device, from its peak.

The students go through general distillation on one teacher pass, then through every task. Not
counted: smart initialisation (its general epoch and its tasks), augmentation, pre-generation, dev
scores and the time of torch.compile.

Example:
    python benchmarks/project_full_run.py --peak_tflops 165 --efficiency 0.45
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flops import TRAINING_PASSES, distillation_flops, forward_flops
from benchmarks.measure import ROOT
from transformer.file_utils import UserError
from transformer.modeling import BertConfig, find_config
from transformer.runtime import run_script
from transformer.tables import text_table

TEACHER = BertConfig()
GENERAL_ROWS = 50_000_000  # next-sentence instances of Wikipedia, an epoch
GENERAL_LENGTH = 111  # word pieces
GENERAL_EPOCHS, TEACHER_EPOCHS, INTERMEDIATE_EPOCHS, PREDICTION_EPOCHS = 3, 5, 10, 3


class TaskRows(NamedTuple):
    """What a task's rows are like.

    augmented: rows of train_aug.tsv for a row of train.tsv: itself and the share of its N draws a
        sentence that give a new one, by the words that may vary (short sentences repeat).
    length: mean word pieces of a row.
    """

    train: int
    augmented: float
    length: int


TASKS = {
    "SST-2": TaskRows(67349, 1 + 20 * 0.75, 13), "CoLA": TaskRows(8551, 1 + 30 * 0.78, 12),
    "MRPC": TaskRows(3668, 1 + 30 * 2 * 0.98, 53), "RTE": TaskRows(2490, 1 + 30 * 2 * 0.93, 70),
}


class StageWork(NamedTuple):
    """One line of the projection: `amount` is rows times epochs, `flops` operations."""

    stage: str
    amount: int
    flops: float


def training_work(students: list[BertConfig]) -> list[StageWork]:
    """Return the distillation of students that learn side by side, and their teachers' training."""
    rows = GENERAL_ROWS * GENERAL_EPOCHS
    work = [StageWork("general distillation", rows, rows
                      * distillation_flops(TEACHER, students, [GENERAL_LENGTH]))]
    for task, facts in TASKS.items():
        length, teacher_rows = [facts.length], facts.train * TEACHER_EPOCHS
        rows = round(facts.train * facts.augmented)
        teacher = forward_flops(TEACHER, length)
        training = TRAINING_PASSES * sum(forward_flops(student, length) for student in students)
        work += [
            StageWork(f"{task}: teacher fine-tuning", teacher_rows,
                      teacher_rows * TRAINING_PASSES * teacher),
            StageWork(f"{task}: intermediate", rows * INTERMEDIATE_EPOCHS, rows
                      * INTERMEDIATE_EPOCHS * distillation_flops(TEACHER, students, length)),
            StageWork(f"{task}: prediction", rows * PREDICTION_EPOCHS,
                      rows * (teacher + PREDICTION_EPOCHS * training))]
    return work


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "project_full_run.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--peak_tflops", type=float, required=True, help="bf16 matrix peak in TFLOP/s")
    add("--efficiency", type=float, default=0.45, help="share of the peak that training reaches")
    add("--students", nargs="+", default=["tinybert_4l_config", "tinybert_6l_config"],
        help="folders with a student's config.json; a second learning rate is a second student")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the operations and hours of every stage."""
    if not args.peak_tflops > 0 or not 0 < args.efficiency <= 1:
        raise UserError(f"--peak_tflops {args.peak_tflops} --efficiency {args.efficiency}; expected"
                        " a peak above 0 and a share of at most 1")
    students = [
        BertConfig.from_json_file(find_config(path if Path(path).exists() else ROOT / path))
        for path in args.students
    ]
    works = training_work(students)
    works.append(StageWork("total", sum(w.amount for w in works), sum(w.flops for w in works)))
    rate = args.peak_tflops * 1e12 * args.efficiency * 3600  # operations an hour
    print(f"Stages at {args.efficiency:.0%} of {args.peak_tflops} TFLOP/s\n")
    print(text_table(["stage", "rows x epochs", "EFLOP", "hours"],
                     [[w.stage, f"{w.amount:,}", f"{w.flops / 1e18:.4f}", f"{w.flops / rate:.2f}"]
                      for w in works]))


if __name__ == "__main__":
    run_script(main, get_args_parser())
