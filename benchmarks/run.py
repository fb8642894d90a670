"""Measure every stage against the yardstick (benchmarks/plain.py) on this machine.

Each stage has two processes, plain and ours, that set up, stay alive and take turns; the table
shows the medians. Prints the table and writes benchmarks.json and benchmarks.md (the same table,
the growth with work, the machine and the command) to --output_dir.

Examples:
    python benchmarks/run.py --corpus data/wiki_for_bert.txt
    python benchmarks/run.py --device cuda --stages general general-both
    python benchmarks/run.py --quick --output_dir /tmp/benchmarks
"""

import argparse
import logging
import multiprocessing
import os
import platform
import random
import re
import shlex
import statistics
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.stages import (
    PREDICTION_EPOCHS,
    PREGENERATE_EPOCHS,
    SEED,
    STAGES,
    Failure,
    Load,
    Run,
    Stage,
    Timing,
    Work,
    matrix_peak,
    our_memory,
    pregenerate,
    sentences_of,
    serve,
)
from transformer.file_utils import UserError, write_json, write_text
from transformer.modeling import BertConfig, find_config
from transformer.run_folder import prepare_output_dir
from transformer.runtime import commit_id, resolve_precision, run_script
from transformer.tables import markdown_table, text_table
from transformer.tasks import GLUE_TASKS, get_task, read_tsv, task_rows, write_tsv
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = ROOT / "tests" / "golden" / "bert_base_uncased_vocab.txt"
# Looked for in this order; without either, the demo's inputs are made.
GLUE_DIRS = (ROOT.parent / "shared" / "data" / "glue_data", ROOT / "data" / "glue_data",
             ROOT / "data" / "demo" / "glue_data")
DEMO_CORPUS = ROOT / "data" / "demo" / "corpus.txt"
SIDES = ("plain", "ours")
MEMORY = "memory"  # a stage of ours alone
MEMORY_ROWS = {False: 1_000_000, True: 2000}  # without --quick and with
NOT_MEASURED = "not measured"
ROWS = 1024  # the --rows for which the stages' numbers of rows are given
GROWTH = (0.25, 0.5, 1.0)
GENERAL_TEXT = "general.txt"
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
CORPUS_BYTES = {False: 16_000_000, True: 100_000}  # the most, without --quick and with
# A process of its own either way, with no settings of another's; a fork server starts it at once.
START_METHOD = (
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
NOTES = f"""\
Both sides run the same shapes, random weights and rows on the same machine, in turns, each in a
process of its own, after one run of each that does not count. `plain` is benchmarks/plain.py:
float32, every row padded, word by word. It gets fewer rows, chosen evenly over their lengths.
Rates are medians; the time that torch.compile takes at first is not in them. Peak memory is the
process's, models and libraries included; on a GPU, what torch held there. The share of the peak
counts the operations that the work needs at the rows' true lengths, against the measured peak of
a large matrix product in the precision of that side. Prediction counts the teacher's one pass
over the rows as spread over {PREDICTION_EPOCHS} epochs. Pregenerate counts text times its
{PREGENERATE_EPOCHS} epochs and always compares with one plain process. The word vectors of
augmentation are random, for the rows' and the vocabulary's words."""


# ------------------------------------------------------------------ inputs


def make_demo(folder: Path) -> Path:
    """Make the demo's inputs, as no others were found; returns their folder."""
    from demo import make_inputs

    logger.info("no GLUE data or corpus found; making the demo's")
    run_script(make_inputs.main, make_inputs.get_args_parser(), ["--output_dir", str(folder)])
    return folder


def find_inputs(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Return the folder of GLUE tasks and the corpus: given, found or made in `folder`."""
    glue_dir = args.glue_dir or next((path for path in GLUE_DIRS if path.is_dir()), None)
    corpus = args.corpus or (DEMO_CORPUS if DEMO_CORPUS.is_file() else None)
    if glue_dir is None or corpus is None:
        made = make_demo(folder)
        glue_dir, corpus = glue_dir or made / "glue_data", corpus or made / "corpus.txt"
    if not corpus.is_file():
        raise UserError(f"--corpus {corpus}: no such file; expected a text file, one sentence a"
                        " line and a blank line between documents")
    return glue_dir, corpus


def sample_rows(name: str, split: str, glue_dir: Path, folder: Path, most: int) -> int:
    """Copy at most `most` random rows of a task's file; returns how many."""
    task = get_task(name)
    rows = list(read_tsv(glue_dir / task.folder / task.files[split]))
    header, rows = (rows[:1], rows[1:]) if task.has_header else ([], rows)
    if len(rows) > most:
        rows = random.Random(SEED).sample(rows, most)
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    write_tsv(folder / task.folder / task.files[split], header + rows)
    return len(rows)


def corpus_documents(corpus: Path) -> Iterator[bytes]:
    """Yield the documents of a corpus, each ending with its last line's end."""
    with corpus.open("rb") as lines:
        for blank, block in groupby(lines, key=lambda line: not line.strip()):
            if not blank:
                yield b"".join(block).rstrip(b"\n") + b"\n"


def glue_documents(glue_dir: Path) -> Iterator[bytes]:
    """Yield the training sentences of the GLUE tasks that are there, 50 a document."""
    for task in GLUE_TASKS.values():
        folder = glue_dir / task.folder
        if (folder / task.files["train"]).is_file():
            sentences = sentences_of(task_rows(task, folder))
            for start in range(0, len(sentences), 50):
                yield "".join(f"{line}\n" for line in sentences[start : start + 50]).encode()


def first_documents(documents: Iterable[bytes], size: int) -> list[bytes]:
    """Return whole documents from the start until they hold `size` bytes, two at least."""
    taken, total = [], 0
    for document in documents:
        if len(taken) >= 2 and total >= size:
            break
        taken.append(document)
        total += len(document)
    return taken


def write_corpora(corpus: Path, glue_dir: Path, folder: Path, size: int) -> str:
    """Write the texts of general distillation and of pregenerate; returns what they are.

    The first is the corpus alone. The second goes on with GLUE's sentences where the corpus is
    small, so that the work outlasts the start of the processes; it is cut for the growth with work.

    Raises:
        UserError: a corpus without two documents, of which one has no random next sentences.
    """
    text = first_documents(corpus_documents(corpus), size)
    if len(text) < 2:
        raise UserError(f"--corpus {corpus}: {len(text)} documents; expected at least 2, with a"
                        " blank line between them")
    (folder / GENERAL_TEXT).write_bytes(b"\n".join(text))
    more = first_documents(chain(text, glue_documents(glue_dir)), size)
    ends = list(accumulate(map(len, more)))
    for part in GROWTH:
        count = max(2, 1 + bisect_left(ends, part * ends[-1]))
        (folder / f"corpus_{part}.txt").write_bytes(b"\n".join(more[:count]))
    alone = ends[len(text) - 1]
    added = f"; for pregenerate {ends[-1] - alone:,} of GLUE too" if ends[-1] > alone else ""
    return f"{alone:,} bytes of {corpus.name}{added}"


def prepare(args: argparse.Namespace, folder: Path, work: Work) -> dict[str, str]:
    """Fill the folder that both sides read; returns what the inputs are."""
    glue_dir, corpus = find_inputs(args, folder / "demo")
    vocabulary = folder / "vocabulary"
    vocabulary.mkdir()
    BertTokenizer(args.vocab or VOCABULARY, True).save_vocabulary(vocabulary)
    rows = {
        "SST-2 train": sample_rows(
            "sst-2", "train", glue_dir, folder / "glue", max(1, round(ROWS * work.factor))),
        "SST-2 dev": sample_rows("sst-2", "dev", glue_dir, folder / "glue", 10**6),
        "RTE train": sample_rows(
            "rte", "train", glue_dir, folder / "glue", max(1, round(ROWS * work.factor))),
    }
    text = write_corpora(corpus, glue_dir, folder, CORPUS_BYTES[args.quick])
    for length in lengths_of(work):
        pregenerate(vocabulary, folder / GENERAL_TEXT, folder / f"instances_{length}", length, 1)
    sampled = ", ".join(f"{count:,} of {name}" for name, count in rows.items())
    return {"rows": sampled, "corpus": text}


def lengths_of(work: Work) -> list[int]:
    """Return the lengths at which the growth of general distillation is measured."""
    return [work.max_length // 4, work.max_length // 2, work.max_length]


def make_work(args: argparse.Namespace, folder: Path) -> Work:
    """Return the sizes of models and rows: BERT-base and its students, or tiny ones."""
    factor = args.rows / ROWS
    if args.quick:
        tiny = {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 48}
        teacher = {**tiny, "hidden_size": 48, "num_hidden_layers": 4}
        students = ({**tiny, "num_hidden_layers": 2}, {**tiny, "num_hidden_layers": 4})
        return Work(args.device, folder, factor, 8, 32, teacher, students, (2000, 16))
    students = tuple(
        BertConfig.from_json_file(find_config(ROOT / name)).to_dict()
        for name in ("tinybert_4l_config", "tinybert_6l_config"))
    return Work(args.device, folder, factor, args.batch_size, 128, BertConfig().to_dict(),
                students, (100_000, 300))


# ------------------------------------------------------------------ measuring


class Worker:
    """One side of a stage, in a process of its own that only works when it is asked to."""

    def __init__(self, name: str, set_up: Callable[[Work], Run], work: Work) -> None:
        self.name = name
        context = multiprocessing.get_context(START_METHOD)
        if START_METHOD == "forkserver":
            context.set_forkserver_preload(["benchmarks.stages"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, set_up, work))
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """Wait for an answer; a side that failed is a `UserError`, its traceback is logged."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            answer = Failure(f"the process ended with code {self.process.exitcode}")
        if isinstance(answer, Failure):
            logger.error("%s", answer.text)
            raise UserError(f"{self.name}: {answer.text.splitlines()[-1]}")
        return answer

    def ask(self, message: Load | str) -> Any:
        self.pipe.send(message)
        return self.answer()

    def close(self) -> None:
        """Let the process end; one that is still at work is stopped."""
        if self.process.is_alive():
            with suppress(OSError):
                self.pipe.send(None)
            self.process.join(timeout=10)
            self.process.terminate()
        self.process.join()


def median_timing(timings: list[Timing]) -> Timing:
    """Return the timing with the median of the seconds."""
    facts = {name: statistics.median(timing.facts[name] for timing in timings)
             for name in timings[0].facts}
    seconds = statistics.median(timing.seconds for timing in timings)
    return timings[0]._replace(seconds=seconds, facts=facts)


def side_result(timings: list[Timing], memory: int, peak: float) -> dict[str, Any]:
    """Return what is known of one side, for the JSON file; peak in operations a second."""
    middle = median_timing(timings)
    speed = middle.flops / middle.seconds
    return {
        "rate": middle.amount / middle.seconds, "amount": middle.amount,
        "seconds": [timing.seconds for timing in timings],
        "flops_per_second": speed, "share_of_peak": speed / peak if speed else None,
        "peak_memory": memory, **middle.facts,
    }


def measure_growth(stage: Stage, ours: Worker, work: Work, full: float) -> dict[str, Any]:
    """Return our seconds at each part of the rows, and our rates at each length."""
    growth: dict[str, Any] = {"amount": {}, "length": {}}
    for part in GROWTH[:-1]:
        timing = ours.ask(Load(part, work.max_length))
        growth["amount"][part] = [timing.amount, timing.seconds]
    for length in lengths_of(work)[:-1] if stage.by_length else []:
        ours.ask(Load(0.25, length))  # new shapes
        timing = ours.ask(Load(1.0, length))
        growth["length"][length] = timing.amount / timing.seconds
    if stage.by_length:
        growth["length"][work.max_length] = full
    return growth


def measure_stage(
    name: str, work: Work, repeats: int, peaks: dict[str, float]
) -> dict[str, Any]:
    """Measure both sides of a stage in turns."""
    stage, full = STAGES[name], Load(1.0, work.max_length)
    timings: dict[str, list[Timing]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        workers = {}
        for side in SIDES:
            workers[side] = Worker(f"{name}, {side}", stage.side(side, work), work)
            stack.callback(workers[side].close)
        for worker in workers.values():
            worker.answer()
        for worker in workers.values():  # to warm up: an allocator settles over some steps
            worker.ask(full)
        for _ in range(repeats):
            for side, worker in workers.items():
                timings[side].append(worker.ask(full))
        results = {side: side_result(timings[side], worker.ask("memory"), peaks[side])
                   for side, worker in workers.items()}
        growth = measure_growth(stage, workers["ours"], work, results["ours"]["rate"])
    growth["amount"][1.0] = [results["ours"]["amount"],
                             statistics.median(results["ours"]["seconds"])]
    return {"title": stage.title, "unit": stage.unit, **results, "growth": growth,
            "ratio": results["ours"]["rate"] / results["plain"]["rate"]}


def measure_memory(work: Work, rows: int) -> dict[str, float]:
    """Return the peak memory of task distillation on many rows, and the weights in it, in bytes.

    It runs on the CPU, where the process's memory holds the models too.
    """
    work = replace(work, device="cpu")
    worker = Worker(MEMORY, partial(our_memory, rows=rows), work)
    try:
        worker.answer()
        timing = worker.ask(Load(1.0, work.max_length))
        return {"rows": timing.amount, "seconds_to_read": timing.seconds,
                "peak_memory": worker.ask("memory"), **timing.facts}
    finally:
        worker.close()


def measure_peaks(device: torch.device, quick: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Return the matrix peak that each side is held against, and all peaks in words."""
    size = MATRIX_SIZE[device.type] // (16 if quick else 1)
    measured = {name: matrix_peak(device, dtype, size)
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    ours = "fp32" if resolve_precision("auto", device) is None else "bf16"
    words = {f"{name} matrix peak": f"{peak / 1e12:.3g} TFLOP/s ({size} x {size})"
             for name, peak in measured.items()}
    return {"plain": measured["fp32"], "ours": measured[ours]}, {**words, "our precision": ours}


def machine(device: torch.device) -> dict[str, str]:
    """Describe what was measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        facts = dict(re.findall(r"^(.*?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
        # A virtual machine's "AMD EPYC" may be of any generation: these two tell which.
        generation = [f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts]
        cpu = ", ".join([facts.get("model name", cpu), *generation])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
        "CPU": f"{cpu}, {os.cpu_count()} cores", "torch": torch.__version__,
        "Python": platform.python_version(), "commit": commit_id(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


# ------------------------------------------------------------------ tables


def number(value: float) -> str:
    """Format with three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def stage_rows(stages: dict[str, Any]) -> list[list[str]]:
    """Return the table's lines; stages that were not measured say so."""
    rows = []
    for name, stage in STAGES.items():
        result = stages.get(name)
        title = stage.title + (f", {stage.unit}" if stage.unit != "rows/s" else "")
        if result is None:
            rows.append([title, *[""] * 2, NOT_MEASURED, *[""] * 4])
            continue
        sides = [result[side] for side in SIDES]
        shares = [side["share_of_peak"] for side in sides]
        rows.append([
            title, *(number(side["rate"]) for side in sides), f"{result['ratio']:.1f}x",
            *(f"{side['peak_memory'] / 1e9:.2f}" for side in sides),
            *("-" if share is None else f"{100 * share:.1f}" for share in shares)])
    return rows


HEADER = ["stage (rows/s)", "plain", "ours", "ratio", "GB pl.", "ours", "% peak", "ours"]
MARKDOWN_HEADER = ["stage (rows/s unless said)", "plain", "ours", "ratio", "GB plain", "GB ours",
                   "% of peak, plain", "% of peak, ours"]


def growth_rows(stages: dict[str, Any]) -> list[list[str]]:
    """Return, for each stage, our seconds for 1x, 2x and 4x the work."""
    rows = []
    for result in stages.values():
        grown = [result["growth"]["amount"][part] for part in GROWTH]
        unit, amount = result["unit"].removesuffix("/s"), grown[0][0]
        least = f"{amount:,}" if isinstance(amount, int) else number(amount)
        rows.append([result["title"], f"{least} {unit}",
                     *(f"{seconds:.2f} s" for _, seconds in grown)])
    return rows


def length_rows(stages: dict[str, Any]) -> list[list[str]]:
    """Return, for each stage measured so, our rate at each length."""
    return [[result["title"], str(length), number(rate)]
            for result in stages.values() for length, rate in result["growth"]["length"].items()]


def worker_rows(stages: dict[str, Any]) -> list[list[str]]:
    """Return our rate and bytes on disk by number of workers."""
    return [[str(workers), number(stages[name]["ours"]["rate"]),
             *(f"{stages[name][side]['bytes_per_byte']:.2f}" for side in SIDES)]
            for workers, name in ((1, "pregenerate-1"), (2, "pregenerate-2")) if name in stages]


def memory_row(memory: dict[str, float]) -> list[str]:
    """Return what task distillation on many rows holds."""
    held = memory["peak_memory"], memory["weights"], memory["peak_memory"] - memory["weights"]
    return ["intermediate", f"{memory['rows']:,}", f"{memory['seconds_to_read']:.1f}",
            *(f"{size / 1e9:.2f}" for size in held)]


def tables(content: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of growth that were measured: title, header, lines."""
    stages = content["stages"]
    found = [
        ("Growth with rows (ours)", ["stage", "1x is", "1x", "2x", "4x"], growth_rows(stages)),
        ("Growth with length (ours)", ["stage", "length", "rows/s"], length_rows(stages)),
        ("Growth with workers (ours)",
         ["workers", "MB/s", "bytes on disk per byte of text and epoch: plain", "ours"],
         worker_rows(stages)),
    ]
    if MEMORY in content:
        found.append((
            "Peak memory of task distillation, SST-2 (ours)",
            ["", "rows", "seconds to read", "GB", "GB of weights", "GB above them"],
            [memory_row(content[MEMORY])]))
    if "general-both" in stages:
        gain = stages["general-both"]["ours"]["gain_of_one_pass"]
        found.append(("Both students on one teacher pass (ours)",
                      ["", "time of each alone / together"], [["general", f"{gain:.2f}x"]]))
    return [table for table in found if table[2]]


def markdown_page(content: dict[str, Any]) -> str:
    """Return benchmarks.md: machine, table, growth, notes."""
    facts = [[name, value] for name, value in content["machine"].items()]
    parts = ["## " + content["machine"]["device"], "",
             markdown_table(["", ""], facts, align="---"),
             markdown_table(MARKDOWN_HEADER, stage_rows(content["stages"])), NOTES, ""]
    for title, header, rows in tables(content):
        parts += [f"### {title}", "", markdown_table(header, rows)]
    return "\n".join(parts)


def print_tables(content: dict[str, Any]) -> None:
    """Print the table, 80 columns wide, and those of growth."""
    for name, value in content["machine"].items():
        print(f"{name}: {value}")
    print("\n" + text_table(HEADER, stage_rows(content["stages"])))
    for title, header, rows in tables(content):
        print(f"\n{title}\n{text_table(header, rows)}")


# ------------------------------------------------------------------ command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "run.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run")
    add("--stages", nargs="+", choices=[*STAGES, MEMORY], default=[*STAGES, MEMORY],
        metavar="STAGE", help=f"what to measure: {', '.join([*STAGES, MEMORY])}")
    add("--repeats", type=int, default=3, help="timed runs of each side; the median counts")
    add("--rows", type=int, default=None,
        help="rows of a timed run of ours in task distillation; the other stages have their share"
             " of it; not given: 1024 on a CPU, 8192 on a GPU, 64 with --quick")
    add("--batch_size", type=int, default=32, help="rows a training step")
    add("--glue_dir", type=Path, default=None,
        help="folder of the GLUE tasks; not given: data/glue_data where present, else the demo's")
    add("--corpus", type=Path, default=None,
        help="text, one sentence a line, blank lines between documents; not given: the demo's")
    add("--vocab", type=Path, default=None,
        help="the models' vocabulary file; not given: that of BERT-base, uncased")
    add("--quick", action="store_true", help="tiny models and few rows: only to see it run")
    add("--output_dir", type=Path, default=Path("results/benchmarks"),
        help="folder for benchmarks.json and benchmarks.md")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a `UserError` for numbers that make no sense, and for a GPU that is not there."""
    if args.rows is None:
        args.rows = 64 if args.quick else {"cpu": ROWS, "cuda": 8 * ROWS}[args.device]
    for name in ("repeats", "rows", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}; expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")


def main(args: argparse.Namespace) -> None:
    """Prepare the inputs, measure stage by stage, print and write the tables."""
    check_arguments(args)
    device = torch.device(args.device)
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    content: dict[str, Any] = {"machine": machine(device), "stages": {}}
    content["machine"]["command"] = shlex.join(["python", *sys.argv])
    with tempfile.TemporaryDirectory(prefix="tinybert-benchmarks-") as name:
        folder = Path(name)
        work = make_work(args, folder)
        content["machine"] |= prepare(args, folder, work)
        peaks, words = measure_peaks(device, args.quick)
        content["machine"] |= words
        for stage in args.stages:
            if stage == MEMORY:
                content[MEMORY] = measure_memory(work, MEMORY_ROWS[args.quick])
            else:
                content["stages"][stage] = measure_stage(stage, work, args.repeats, peaks)
            logger.info("%s measured", stage)
            # After every stage, so that a long run that is stopped has measured something.
            write_json(output_dir / "benchmarks.json", content)
            write_text(output_dir / "benchmarks.md", markdown_page(content))
    print_tables(content)


if __name__ == "__main__":
    run_script(main, get_args_parser())
