"""Project the hours of the full run's distillation (profiles/full.env) on one device.

The students go through general distillation on one teacher pass, then through every task. Smart
initialisation (its general epoch and its tasks) and the time of torch.compile are not counted.
Either from what `benchmarks/run.py` measured there, or from a given peak and efficiency; then
the steps from the original's run to this project's are shown as well. Every assumption is printed.

Examples:
    python benchmarks/project_full_run.py --measured results/benchmarks/benchmarks.json
    python benchmarks/project_full_run.py --peak_tflops 165 --efficiency 0.45
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flops import TRAINING_PASSES, distillation_flops, forward_flops
from benchmarks.measure import ROOT
from transformer.file_utils import UserError, read_json
from transformer.modeling import BertConfig, find_config
from transformer.runtime import run_script
from transformer.tables import text_table
from transformer.tasks import get_task

NOT_MEASURED = "not measured"
PADDED_LENGTH = 128


class TaskRows(NamedTuple):
    """What a task's rows are like.

    distinct: the share of the N draws a sentence that give a new sentence, by the words that
        may vary in each (short sentences repeat).
    length: mean word pieces of a row. rate: the stage of run.py that augments rows like these.
    """

    train: int
    dev: int
    sentences: int
    distinct: float
    length: int
    rate: str

    def augmented(self, task: str) -> int:
        """Return the rows of train_aug.tsv: each row and its distinct variations."""
        draws = get_task(task).augmentation_n
        return round(self.train * (1 + draws * self.sentences * self.distinct))


TASKS = {
    "SST-2": TaskRows(67349, 872, 1, 0.75, 13, "augmentation-sst2"),
    "CoLA": TaskRows(8551, 1043, 1, 0.78, 12, "augmentation-sst2"),
    "MRPC": TaskRows(3668, 408, 2, 0.98, 53, "augmentation-rte"),
    "RTE": TaskRows(2490, 277, 2, 0.93, 70, "augmentation-rte"),
}


@dataclass
class Assumptions:
    """The full run in numbers; lengths in word pieces, stages by their passes over the rows."""

    teacher: BertConfig
    students: list[BertConfig]  # each goes through every stage
    corpus_gigabytes: float = 20.4  # 4.25G word pieces of 4.8 bytes
    general_rows: int = 50_000_000  # next-sentence instances of Wikipedia, an epoch
    general_epochs: int = 3
    general_length: int = 111  # 87 % of 128
    teacher_epochs: int = 5
    intermediate_epochs: int = 10
    prediction_epochs: int = 3
    batch_size: int = 32
    eval_step: int = 100
    # Both are chosen so that the original's run takes the 7 days that it reports: 28.5 TFLOP/s in
    # float32 of a 4090's 165, and a GPU that waits a day while Python parses JSON.
    original_efficiency: float = 0.173
    original_idle_hours: float = 24.0

    def lines(self) -> list[list[str]]:
        """Return a table's line for each assumption."""
        models = {"teacher": [self.teacher], "students": self.students}
        lines = [[name, ", ".join(f"{c.num_hidden_layers} x {c.hidden_size}" for c in configs)]
                 for name, configs in models.items()]
        lines += [[name.replace("_", " "), f"{value:,}"]
                  for name, value in vars(self).items() if name not in models]
        lines += [[f"{task}: rows, augmented, mean length",
                   f"{rows.train:,}, {rows.augmented(task):,}, {rows.length}"]
                  for task, rows in TASKS.items()]
        return [*lines, ["not counted", "smart initialisation, compiling"]]


class StageWork(NamedTuple):
    """One line of the projection: passes over rows, and their operations.

    measured_by: the stage of run.py whose rate applies.
    """

    stage: str
    rows: int
    flops: float | None
    measured_by: str


def distillation_work(
    assumed: Assumptions, shared: bool = True, padded: bool = False
) -> list[StageWork]:
    """Return general and task distillation.

    Args:
        shared: the students learn side by side on one pass of the teacher, whose logits are
            computed once for the prediction stage; otherwise each student has its own.
        padded: every row counts as 128 word pieces.
    """
    teacher, students = assumed.teacher, assumed.students

    def flops(rows: int, length: int) -> float:
        length = PADDED_LENGTH if padded else length
        return rows * distillation_flops(teacher, students, [length], shared)

    def prediction_flops(rows: int, length: int) -> float:
        length = PADDED_LENGTH if padded else length
        passes = 1 if shared else len(students) * assumed.prediction_epochs
        training = sum(forward_flops(student, [length]) for student in students)
        return rows * (passes * forward_flops(teacher, [length])
                       + assumed.prediction_epochs * TRAINING_PASSES * training)

    general_rows = assumed.general_rows * assumed.general_epochs
    several = "general-both" if len(students) > 1 else "general"
    work = [StageWork("general distillation", general_rows,
                      flops(general_rows, assumed.general_length), several)]
    for task, facts in TASKS.items():
        rows = facts.augmented(task)
        passes = rows * assumed.intermediate_epochs
        work.append(StageWork(f"{task}: intermediate", passes, flops(passes, facts.length),
                         "intermediate"))
        work.append(StageWork(f"{task}: prediction", rows * assumed.prediction_epochs,
                         prediction_flops(rows, facts.length), "prediction"))
    return work


def other_work(assumed: Assumptions) -> list[StageWork]:
    """Return what surrounds distillation: data, teachers, dev scores."""
    work = [StageWork("pregenerate", assumed.general_rows * assumed.general_epochs, None,
                 "pregenerate-2")]
    for task, facts in TASKS.items():
        work.append(StageWork(f"{task}: augmentation", facts.train, None, facts.rate))
        passes = facts.train * assumed.teacher_epochs
        flops = TRAINING_PASSES * passes * forward_flops(assumed.teacher, [facts.length])
        work.append(StageWork(f"{task}: teacher fine-tuning", passes, flops, "finetune"))
        steps = facts.augmented(task) * assumed.prediction_epochs // assumed.batch_size
        evaluated = steps // assumed.eval_step * facts.dev
        flops = sum(forward_flops(student, [facts.length]) for student in assumed.students)
        work.append(StageWork(f"{task}: dev scores", evaluated, evaluated * flops, "evaluation"))
    return work


def cumulative(assumed: Assumptions, peak: float, efficiency: float) -> list[tuple]:
    """Return (step, operations, hours) from the original's run to ours; peak in FLOP/s."""
    original, one_pass, trimmed = (
        sum(work.flops for work in distillation_work(assumed, shared, padded))
        for shared, padded in ((False, True), (True, True), (True, False))
    )
    slow, fast = (3600 * peak * share for share in (assumed.original_efficiency, efficiency))
    return [
        ("the original: float32, padded, idle GPU", original,
         original / slow + assumed.original_idle_hours),
        ("the data path never starves the GPU", original, original / slow),
        (f"bf16 and fused, {efficiency:.0%} of peak", original, original / fast),
        ("one teacher pass, cached logits", one_pass, one_pass / fast),
        ("no padding", trimmed, trimmed / fast),
        ("100% of peak", trimmed, trimmed / (3600 * peak)),
    ]


def measured_hours(work: StageWork, stages: dict[str, Any], assumed: Assumptions) -> float | None:
    """Return the hours of one line at the rate that run.py measured; None where it did not."""
    ours = (stages.get(work.measured_by) or {}).get("ours")
    if not ours:
        return None
    if work.flops is not None:
        return work.flops / ours["flops_per_second"] / 3600
    if work.measured_by.startswith("pregenerate"):
        # Its rate is megabytes of text and epoch a second.
        megabytes = 1000 * assumed.corpus_gigabytes * assumed.general_epochs
        return megabytes / ours["rate"] / 3600
    return work.rows / ours["rate"] / 3600


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


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a `UserError` for rates that make no sense."""
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UserError(f"--peak_tflops {args.peak_tflops}; expected more than 0")
    if not 0 < args.efficiency <= 1:
        raise UserError(f"--efficiency {args.efficiency}; expected a share above 0, at most 1")


def projection_table(works: list[StageWork], hours: list[float | None]) -> str:
    """Format stage, rows, operations and hours, and the sum of what is known."""
    rows = [[work.stage, f"{work.rows:,}",
             "-" if work.flops is None else f"{work.flops / 1e18:.4f}",
             NOT_MEASURED if hour is None else f"{hour:.2f}"]
            for work, hour in zip(works, hours, strict=True)]
    missing = sum(hour is None for hour in hours)
    total = sum(hour for hour in hours if hour is not None)
    without = f"total, without {missing} not measured" if missing else "total"
    flops = sum(work.flops or 0 for work in works)
    rows.append([without, "", f"{flops / 1e18:.4f}", f"{total:.2f}"])
    return text_table(["stage", "rows x epochs", "EFLOP", "hours"], rows)


def main(args: argparse.Namespace) -> None:
    """Print the assumptions, the steps from the original (with --peak_tflops), and the stages."""
    check_arguments(args)
    students = [
        BertConfig.from_json_file(find_config(path if Path(path).exists() else ROOT / path))
        for path in args.students
    ]
    assumed = Assumptions(BertConfig(), students)
    works = distillation_work(assumed) + other_work(assumed)
    if args.measured:
        content = read_json(args.measured)
        if not isinstance(content, dict) or not {"machine", "stages"} <= content.keys():
            raise UserError(f"{args.measured}: expected the benchmarks.json of benchmarks/run.py")
        rates = f"measured, {content['machine']['device']}"
        hours = [measured_hours(work, content["stages"], assumed) for work in works]
    else:
        rate = args.peak_tflops * 1e12 * args.efficiency
        rates = f"{args.efficiency:.0%} of {args.peak_tflops} TFLOP/s"
        hours = [None if work.flops is None else work.flops / rate / 3600 for work in works]
    print("Assumptions\n")
    print(text_table(["what", "value"], [*assumed.lines(), ["rates", rates]]))
    if args.peak_tflops:
        steps = cumulative(assumed, args.peak_tflops * 1e12, args.efficiency)
        print("\nDistillation, from the original's run to this one (each step keeps those above)\n")
        print(text_table(["step", "EFLOP", "hours"], [
            [name, f"{flops / 1e18:.1f}", f"{hour:.1f}"] for name, flops, hour in steps]))
    print("\nStages\n")
    print(projection_table(works, hours))


if __name__ == "__main__":
    run_script(main, get_args_parser())
