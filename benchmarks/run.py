"""Measure every stage on this machine, the models' against a plain implementation (plain.py).

The two sides take turns, each turn in a process of its own (benchmarks/stages.py), with the same
shapes, random weights and inputs; the plain side gets fewer rows. Prints the table of medians and
writes benchmarks.json and benchmarks.md to --output_dir. RESULTS.md says what the columns mean.

Examples:
    python benchmarks/run.py --glue_dir data/glue_data --corpus data/wiki_for_bert.txt \
        --vocab models/bert-base-uncased/vocab.txt
    python benchmarks/run.py --device cuda --stages general general-both
    python benchmarks/run.py --against ../before --stages general intermediate --repeats 5
    python benchmarks/run.py --quick --output_dir /tmp/benchmarks
"""

import argparse
import json
import logging
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import ROOT, machine, matrix_peak, three_digits
from benchmarks.stages import SEED, STAGES, pregenerate
from transformer.file_utils import VOCAB_NAME, UserError, write_json, write_text
from transformer.modeling import BertConfig, find_config
from transformer.run_folder import prepare_output_dir
from transformer.runtime import resolve_precision, run_script
from transformer.table_files import read_tsv, write_tsv
from transformer.tables import markdown_table
from transformer.tasks import get_task
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

NOT_MEASURED = "not measured"
ROWS = 1024  # the --rows for which the stages' numbers of rows are given
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
CORPUS_BYTES = {False: 16_000_000, True: 100_000}  # at most, without --quick and with

# ------------------------------------------------------------------ inputs


def find_inputs(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Return GLUE folder, corpus and vocabulary; those not given are the demo's, made here."""
    from demo import make_inputs

    given = {"glue_dir": args.glue_dir, "corpus": args.corpus, "vocab": args.vocab}
    if None in given.values():
        logger.info("making the demo's inputs in place of those not given")
        run_script(make_inputs.main, make_inputs.get_args_parser(), ["--output_dir", str(folder)])
    made = {"glue_dir": folder / "glue_data", "corpus": folder / make_inputs.CORPUS_NAME,
            "vocab": folder / "bert_config" / VOCAB_NAME}
    return {name: path or made[name] for name, path in given.items()}


def sample_rows(name: str, split: str, glue_dir: Path, folder: Path, most: int) -> str:
    """Copy at most `most` random rows of a task's file; says how many of what."""
    task = get_task(name)
    rows = read_tsv(glue_dir / task.folder / task.files[split])
    header, rows = (rows[:1], rows[1:]) if not task.columns else ([], rows)
    rows = random.Random(SEED).sample(rows, most) if len(rows) > most else rows
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    write_tsv(folder / task.folder / task.files[split], header + rows)
    return f"{len(rows):,} of {task.folder} {split}"


def write_corpus(corpus: Path, folder: Path, size: int) -> str:
    """Write the documents in the first `size` bytes of a corpus; returns what they are.

    A small corpus is repeated, so that pre-generation outlasts the start of its processes.
    """
    if not corpus.is_file():
        raise UserError(f"--corpus {corpus}: no such file; expected a text file, one sentence a"
                        " line and a blank line between documents")
    with corpus.open("rb") as file:
        text = file.read(size).rpartition(b"\n\n")[0]  # the last one may be cut
    repeats = max(1, size // max(1, len(text)))
    (folder / "corpus.txt").write_bytes(b"\n\n".join([text] * repeats))
    return f"{len(text):,} bytes of {corpus.name}, {repeats} times"


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Fill the folder that both sides read; returns what the inputs are."""
    inputs, setup = find_inputs(args, folder / "demo"), make_setup(args)
    write_json(folder / "setup.json", setup)
    (folder / "vocabulary").mkdir()
    BertTokenizer(inputs["vocab"], True).save_vocabulary(folder / "vocabulary")
    most = max(1, round(ROWS * setup["scale"]))
    rows = [sample_rows(name, split, inputs["glue_dir"], folder / "glue", count)
            for name, split, count in (
                ("sst-2", "train", most), ("sst-2", "dev", 10**6), ("rte", "train", most))]
    text = write_corpus(inputs["corpus"], folder, CORPUS_BYTES[args.quick])
    pregenerate(folder, folder / "instances", setup["max_length"], epochs=1)
    return {"rows": ", ".join(rows), "corpus": text, "vocabulary": str(inputs["vocab"])}


def make_setup(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Setup`: BERT-base and its students, or tiny models."""
    shared = {"device": args.device, "scale": args.rows / ROWS}
    if args.quick:
        tiny = {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 48}
        return {**shared, "batch_size": 8, "max_length": 32, "vectors": [2000, 16],
                "teacher": {**tiny, "hidden_size": 48, "num_hidden_layers": 4},
                "students": [{**tiny, "num_hidden_layers": layers} for layers in (2, 4)]}
    students = [BertConfig.from_json_file(find_config(ROOT / name)).to_dict()
                for name in ("tinybert_4l_config", "tinybert_6l_config")]
    return {**shared, "batch_size": args.batch_size, "max_length": 128, "vectors": [100_000, 300],
            "teacher": BertConfig().to_dict(), "students": students}


# ------------------------------------------------------------------ measuring


def take_turn(name: str, side: str, tree: Path, folder: Path) -> dict[str, Any]:
    """Measure one side of a stage in a process of its own, by the programs of `tree`."""
    command = [sys.executable, str(tree / "benchmarks" / "stages.py"),
               "plain" if side == "plain" else "ours", name, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name}, {side}: ended with code {done.returncode}: {shlex.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def side_result(turns: list[dict[str, Any]], peak: float) -> dict[str, Any]:
    """Return what is known of one side; peak in operations a second."""
    seconds = statistics.median(turn["seconds"] for turn in turns)
    speed = turns[0]["flops"] / seconds
    return {
        "rate": turns[0]["amount"] / seconds, "amount": turns[0]["amount"],
        "seconds": [turn["seconds"] for turn in turns],
        "flops_per_second": speed, "share_of_peak": speed / peak if speed else None,
        "peak_memory": max(turn["peak_memory"] for turn in turns),
    }


def measure_stage(
    name: str, folder: Path, trees: dict[str, Path], repeats: int, peaks: dict[str, float]
) -> dict[str, Any]:
    """Measure the sides of a stage in turns, each by the programs of its tree."""
    trees = {side: tree for side, tree in trees.items() if side != "plain" or STAGES[name].plain}
    turns: dict[str, list] = {side: [] for side in trees}
    for _ in range(repeats):
        for side, tree in trees.items():
            turns[side].append(take_turn(name, side, tree, folder))
    results = {side: side_result(turns[side], peaks["plain" if side == "plain" else "ours"])
               for side in trees}
    first, *others = (result["rate"] for result in results.values())
    return {**results, "ratio": others[0] / first if others else None}


def measure_peaks(device: torch.device, quick: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Return the matrix peak that each side is held against, and all peaks as text."""
    size = MATRIX_SIZE[device.type] // (16 if quick else 1)
    measured = {name: matrix_peak(device, dtype, size)
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    ours = "fp32" if resolve_precision("auto", device) is None else "bf16"
    facts = {f"{name} matrix peak": f"{peak / 1e12:.3g} TFLOP/s ({size} x {size})"
             for name, peak in measured.items()}
    return {"plain": measured["fp32"], "ours": measured[ours]}, {**facts, "our precision": ours}


# ------------------------------------------------------------------ tables


def stage_row(name: str, result: dict[str, Any] | None, other: str) -> list[str]:
    """Return a stage's line of the table; one that was not measured says so."""
    if result is None:
        return [name, "-", "-", NOT_MEASURED, *["-"] * 4]

    def cells(key: str, form: Callable[[float], str]) -> list[str]:
        values = [result.get(side, {}).get(key) for side in (other, "ours")]
        return ["-" if value is None else form(value) for value in values]

    ratio = result["ratio"]
    return [name, *cells("rate", three_digits), "-" if ratio is None else f"{three_digits(ratio)}x",
            *cells("peak_memory", lambda size: f"{size / 1e9:.2f}"),
            *cells("share_of_peak", lambda share: f"{100 * share:.1f}")]


def markdown_page(content: dict[str, Any], other: str) -> str:
    """Return benchmarks.md: machine and table."""
    header = ["stage (rows/s; tokenize, pregenerate: MB/s)", other, "ours", "ratio",
              f"GB {other}", "GB ours", f"% of peak, {other}", "% of peak, ours"]
    return "\n".join([
        "## " + content["machine"]["device"], "",
        markdown_table(["", ""], [list(item) for item in content["machine"].items()], "---"),
        markdown_table(header, [stage_row(name, content["stages"].get(name), other)
                                for name in STAGES])])


# ------------------------------------------------------------------ command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "run.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
        help=f"what to measure: {', '.join(STAGES)}")
    add("--repeats", type=int, default=3, help="timed runs of each side; the median counts")
    add("--rows", type=int, default=None,
        help="rows of a timed run of ours in task distillation; the other stages have their share"
             " of it; not given: 1024 on a CPU, 8192 on a GPU, 64 with --quick")
    add("--batch_size", type=int, default=32, help="rows a training step")
    add("--glue_dir", type=Path, default=None,
        help="folder of the GLUE tasks; not given: the demo's")
    add("--corpus", type=Path, default=None,
        help="text, one sentence a line, blank lines between documents; not given: the demo's")
    add("--vocab", type=Path, default=None,
        help="vocabulary file, such as models/bert-base-uncased/vocab.txt; not given: the demo's")
    add("--against", type=Path, default=None,
        help="another checkout of this project, to be measured in place of the plain side")
    add("--quick", action="store_true", help="tiny models and few rows: only to see it run")
    add("--output_dir", type=Path, default=Path("results/benchmarks"),
        help="folder for benchmarks.json and benchmarks.md")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a `UserError` for numbers that make no sense, and for what is not there."""
    if args.rows is None:
        args.rows = 64 if args.quick else {"cpu": ROWS, "cuda": 8 * ROWS}[args.device]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    if args.against and not (args.against / "benchmarks" / "stages.py").is_file():
        raise UserError(f"--against {args.against}: has no benchmarks/stages.py; expected a"
                        " checkout of this project")


def main(args: argparse.Namespace) -> None:
    """Prepare the inputs, measure stage by stage, print and write the tables."""
    check_arguments(args)
    device = torch.device(args.device)
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir, keep=True)
    other = "against" if args.against else "plain"
    trees = {other: args.against or ROOT, "ours": ROOT}
    content: dict[str, Any] = {"machine": machine(device), "stages": {}}
    content["machine"]["command"] = shlex.join(["python", *sys.argv])
    with tempfile.TemporaryDirectory(prefix="tinybert-benchmarks-") as name:
        folder = Path(name)
        content["machine"] |= prepare(args, folder)
        peaks, facts = measure_peaks(device, args.quick)
        content["machine"] |= facts
        for stage in args.stages:
            content["stages"][stage] = measure_stage(stage, folder, trees, args.repeats, peaks)
            logger.info("%s measured", stage)
            # After every stage, so that a long run that is stopped has measured something.
            write_json(output_dir / "benchmarks.json", content)
            write_text(output_dir / "benchmarks.md", markdown_page(content, other))
    print(markdown_page(content, other))


if __name__ == "__main__":
    run_script(main, get_args_parser())
