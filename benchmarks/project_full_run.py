"""Project the hours of the full run's distillation (profiles/full.env) on one device.

The students go through general distillation on one teacher pass, then through every task. The
rates are those that `benchmarks/run.py` measured there, or follow from a given peak and efficiency.
Not counted: smart initialisation (its general epoch and its tasks), dev scores and the time of
torch.compile.

Examples:
    python benchmarks/project_full_run.py --measured results/benchmarks/benchmarks.json
    python benchmarks/project_full_run.py --peak_tflops 165 --efficiency 0.45
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flops import TRAINING_PASSES, distillation_flops, forward_flops
from benchmarks.measure import ROOT
from transformer.file_utils import UserError, read_json
from transformer.modeling import BertConfig, find_config
from transformer.runtime import run_script
from transformer.tables import text_table

TEACHER = BertConfig()
CORPUS_MEGABYTES = 20_400  # 4.25G word pieces of 4.8 bytes
GENERAL_ROWS = 50_000_000  # next-sentence instances of Wikipedia, an epoch
GENERAL_LENGTH = 111  # word pieces
GENERAL_EPOCHS, TEACHER_EPOCHS, INTERMEDIATE_EPOCHS, PREDICTION_EPOCHS = 3, 5, 10, 3


class TaskRows(NamedTuple):
    """What a task's rows are like.

    augmented: rows of train_aug.tsv for a row of train.tsv: itself and the share of its N draws a
        sentence that give a new one, by the words that may vary (short sentences repeat).
    length: mean word pieces of a row. rate: the stage of run.py that augments rows like these.
    """

    train: int
    augmented: float
    length: int
    rate: str


TASKS = {
    "SST-2": TaskRows(67349, 1 + 20 * 0.75, 13, "augmentation-sst2"),
    "CoLA": TaskRows(8551, 1 + 30 * 0.78, 12, "augmentation-sst2"),
    "MRPC": TaskRows(3668, 1 + 30 * 2 * 0.98, 53, "augmentation-rte"),
    "RTE": TaskRows(2490, 1 + 30 * 2 * 0.93, 70, "augmentation-rte"),
}


class StageWork(NamedTuple):
    """One line of the projection.

    amount: rows times epochs, of pregenerate megabytes. flops: operations, where they are counted.
    measured_by: the stage of run.py whose rate applies.
    """

    stage: str
    amount: int
    flops: float | None
    measured_by: str

    def hours(self, stages: dict[str, dict]) -> float | None:
        """Return the hours at the rates that run.py measured; None where it did not."""
        ours = stages.get(self.measured_by, {}).get("ours")
        if ours is None:
            return None
        seconds = (self.amount / ours["rate"] if self.flops is None
                   else self.flops / ours["flops_per_second"])
        return seconds / 3600


def distillation_work(students: list[BertConfig]) -> list[StageWork]:
    """Return general and task distillation of students that learn side by side."""
    rows = GENERAL_ROWS * GENERAL_EPOCHS
    general = distillation_flops(TEACHER, students, [GENERAL_LENGTH])
    work = [StageWork("general distillation", rows, rows * general,
                      "general-both" if len(students) > 1 else "general")]
    for task, facts in TASKS.items():
        rows, length = round(facts.train * facts.augmented), [facts.length]
        training = TRAINING_PASSES * sum(forward_flops(student, length) for student in students)
        work += [
            StageWork(f"{task}: intermediate", rows * INTERMEDIATE_EPOCHS, rows
                      * INTERMEDIATE_EPOCHS * distillation_flops(TEACHER, students, length),
                      "intermediate"),
            StageWork(f"{task}: prediction", rows * PREDICTION_EPOCHS, rows * (
                forward_flops(TEACHER, length) + PREDICTION_EPOCHS * training), "prediction")]
    return work


def preparation_work() -> list[StageWork]:
    """Return what comes before distillation: data and teachers."""
    work = [StageWork("pregenerate (MB)", CORPUS_MEGABYTES * GENERAL_EPOCHS, None, "pregenerate-2")]
    for task, facts in TASKS.items():
        passes = facts.train * TEACHER_EPOCHS
        flops = TRAINING_PASSES * passes * forward_flops(TEACHER, [facts.length])
        work += [StageWork(f"{task}: augmentation", facts.train, None, facts.rate),
                 StageWork(f"{task}: teacher fine-tuning", passes, flops, "finetune")]
    return work


def stage_table(works: list[StageWork], hours: list[float | None]) -> str:
    """Format stage, amount, operations and hours, and the sum of what is known."""
    rows = [[work.stage, f"{work.amount:,}",
             "-" if work.flops is None else f"{work.flops / 1e18:.4f}",
             "not measured" if hour is None else f"{hour:.2f}"]
            for work, hour in zip(works, hours, strict=True)]
    flops = sum(work.flops or 0 for work in works)
    rows.append(["total of what has hours", "", f"{flops / 1e18:.4f}",
                 f"{sum(hour or 0 for hour in hours):.2f}"])
    return text_table(["stage", "rows x epochs", "EFLOP", "hours"], rows)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "project_full_run.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    rates = parser.add_mutually_exclusive_group(required=True)
    rates.add_argument("--measured", type=Path, help="benchmarks.json that run.py wrote")
    rates.add_argument("--peak_tflops", type=float,
        help="the device's bf16 matrix peak in TFLOP/s, where nothing was measured")
    parser.add_argument("--efficiency", type=float, default=0.45,
        help="share of the peak that training reaches; with --peak_tflops")
    parser.add_argument("--students", nargs="+",
        default=["tinybert_4l_config", "tinybert_6l_config"],
        help="folders with a student's config.json; a second learning rate is a second student")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the operations and hours of every stage."""
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UserError(f"--peak_tflops {args.peak_tflops}; expected more than 0")
    if not 0 < args.efficiency <= 1:
        raise UserError(f"--efficiency {args.efficiency}; expected a share above 0, at most 1")
    students = [
        BertConfig.from_json_file(find_config(path if Path(path).exists() else ROOT / path))
        for path in args.students
    ]
    works = distillation_work(students) + preparation_work()
    if args.measured:
        content = read_json(args.measured)
        if not isinstance(content, dict) or not {"machine", "stages"} <= content.keys():
            raise UserError(f"{args.measured}: expected the benchmarks.json of benchmarks/run.py")
        hours = [work.hours(content["stages"]) for work in works]
        print(f"Stages at the rates measured on {content['machine']['device']}\n")
    else:
        peak = args.peak_tflops * 1e12
        hours = [None if work.flops is None else work.flops / (peak * args.efficiency) / 3600
                 for work in works]
        print(f"Stages at {args.efficiency:.0%} of {args.peak_tflops} TFLOP/s\n")
    print(stage_table(works, hours))


if __name__ == "__main__":
    run_script(main, get_args_parser())
