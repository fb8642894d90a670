"""Count what the scripts survive: kills, damaged files and every other fault that the tests inject.

Each of the five long scripts is killed with SIGKILL at random moments, started again with --resume
and compared, byte by byte, with a run that nobody disturbed; saved states and models are cut and
changed; then the tests of faults run, the long ones too. Writes RELIABILITY.md.

Examples:
    python benchmarks/reliability.py
    python benchmarks/reliability.py --kills 3 --no_tests --output_file /tmp/RELIABILITY.md
"""

import argparse
import logging
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import kill
import torch
from helpers import BAD, GOOD, NEUTRAL, SPECIAL, make_glue, make_model
from test_resume_training import CASES, DROPOUT, damaged, same_state, without_times

from benchmarks.run import machine
from transformer.checkpoint import load_state, load_training_state, read_state
from transformer.file_utils import UserError, write_text
from transformer.modeling import BertForMaskedLM
from transformer.runtime import run_script

logger = logging.getLogger(__name__)

REPO = kill.REPO
# The files whose tests inject faults; what is measured here is left out.
TESTS = ["test_resume_training.py", "test_parts.py", "test_faults.py", "test_downloads.py",
         "test_distributed.py", "test_reproduction.py"]
LEFT_OUT = "not (twenty_kills or small_demo)"


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reliability.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--kills", type=int, default=20, help="kills that each script has to survive")
    add("--changes", type=int, default=10, help="times 70 damaged versions of each file")
    add("--no_tests", action="store_true", help="leave out the tests of faults")
    add("--seed", type=int, default=0, help="seed of the moments and of the damage")
    add("--output_file", type=Path, default=REPO / "benchmarks" / "RELIABILITY.md",
        help="file to write")
    return parser


# ------------------------------------------------------------------ kills


@dataclass
class Killed:
    """A script that is to be killed.

    command: from the name of a run to its command line.
    outputs: from that name to the files and folders that it makes, and what lies beside them.
    ready: whether a process with this output has started to work.
    """

    command: Callable[[str], list[str]]
    outputs: Callable[[str], list[Path]]
    ready: Callable[[str], bool] = kill.says_commit

    def remove(self, name: str) -> None:
        for output in self.outputs(name):
            for path in [output, *output.parent.glob(f".{output.name}*"),
                         *output.parent.glob(f"{output.name}.*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@dataclass
class Result:
    """What became of a script: kills survived, runs, seconds of work, bytes of the outputs."""

    kills: int = 0
    runs: int = 0
    seconds: float = 0.0
    compared: int = 0
    differing: int = 0
    problems: list[str] = field(default_factory=list)


def training(root: Path, name: str) -> Killed:
    case = CASES[name](root, DROPOUT)
    return Killed(case.command, case.folders)


def sentences(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(GOOD + BAD + NEUTRAL, k=10)) + " ." for _ in range(count)]


def pregeneration(root: Path) -> Killed:
    make_model(root / "bert", BertForMaskedLM)
    rng = random.Random(0)
    documents = ["\n".join(sentences(rng, 12)) for _ in range(20_000)]
    write_text(root / "corpus.txt", "\n\n".join(documents) + "\n")
    return Killed(
        lambda name: kill.script(
            "pregenerate_training_data.py", "--train_corpus", root / "corpus.txt", "--bert_model",
            root / "bert", "--do_lower_case", "--epochs_to_generate", 3, "--max_seq_len", 32,
            "--output_dir", root / name),
        lambda name: [root / name], lambda log: "pregeneration needs" in log)


def augmentation(root: Path) -> Killed:
    make_model(root / "bert", BertForMaskedLM)
    make_glue(root / "glue" / "SST-2", rows=1500)
    rng = random.Random(0)
    words = [*GOOD, *BAD, *NEUTRAL]
    assert not set(words) & set(SPECIAL)
    write_text(root / "vectors.txt", "".join(
        f"{word} {' '.join(f'{rng.gauss(0, 1):.4f}' for _ in range(8))}\n" for word in words))
    return Killed(
        lambda name: kill.script(
            "data_augmentation.py", "--pretrained_bert_model", root / "bert", "--glove_embs",
            root / "vectors.txt", "--glue_dir", root / "glue", "--task_name", "SST-2", "--N", 30,
            "--precision", "fp32", "--no_cuda", "--output_file", root / f"{name}.tsv"),
        lambda name: [root / f"{name}.tsv"])


SCRIPTS: dict[str, Callable[[Path], Killed]] = {
    "general_distill.py (two students, batches of 64 and 128)": partial(training, name="general"),
    "task_distill.py, intermediate stage": partial(training, name="intermediate"),
    "task_distill.py, prediction stage": partial(training, name="prediction"),
    "finetune_teacher.py": partial(training, name="finetune"),
    "data_augmentation.py": augmentation,
    "pregenerate_training_data.py": pregeneration,
}


def files(outputs: list[Path]) -> dict[str, Path]:
    """Return the files of an output by what they are called in any run."""
    found = {}
    for number, output in enumerate(outputs):
        if output.is_file():
            found[str(number)] = output
        for path in output.rglob("*"):
            if path.is_file():
                found[f"{number}/{path.relative_to(output)}"] = path
    return found


def compare(whole: list[Path], found: list[Path], result: Result) -> None:
    """Count the bytes that differ; of logs and arguments, what is not time or path."""
    expected, made = files(whole), files(found)
    for name in expected.keys() ^ made.keys():
        result.problems.append(f"{name} is in one of two outputs")
    for name in expected.keys() & made.keys():
        if name.endswith("args.json"):
            continue
        if name.endswith("log.jsonl"):
            if without_times(made[name].parent) != without_times(expected[name].parent):
                result.problems.append(f"{name} differs")
            continue
        first, second = expected[name].read_bytes(), made[name].read_bytes()
        result.compared += len(first)
        result.differing += abs(len(first) - len(second))
        if first != second:
            result.differing += sum(a != b for a, b in zip(first, second, strict=False))


def kill_often(make: Callable[[Path], Killed], kills: int, seed: int) -> Result:
    """Kill runs of a script until they have survived so many kills, and compare each output."""
    result = Result()
    with tempfile.TemporaryDirectory() as folder:
        killed = make(Path(folder))
        result.seconds = kill.run_whole(killed.command("whole"), killed.ready).seconds
        while result.kills < kills:
            killed.remove("killed")
            report = kill.run_with_kills(
                killed.command("killed"), kills - result.kills, seed + result.runs, killed.ready,
                seconds=result.seconds)
            result.kills += report.kills
            result.runs += 1
            compare(killed.outputs("whole"), killed.outputs("killed"), result)
            if result.runs > kills + 3:
                raise UserError(f"{killed.command('killed')}: over before it can be killed")
    return result


# ------------------------------------------------------------------ damaged files


def damage_states(root: Path, rounds: int, seed: int) -> Counter:
    """Damage a run's newest state in many ways; count what becomes of it."""
    case = CASES["intermediate"](root, DROPOUT)
    process = kill.Process(case.command("stopped"))
    process.wait_until(lambda log: log.count("state saved") > 5)
    process.kill()
    folder = case.folders("stopped")[0]
    *_, older, newest = sorted((folder / "training_state").glob("step_*.pt"))
    data, previous, last = newest.read_bytes(), read_state(older), read_state(newest)

    def outcome() -> str:
        state = load_training_state(folder)
        if same_state(state, last):
            return "same"
        return "previous" if same_state(state, previous) else "wrong"

    return damage(newest, data, outcome, rounds, seed)


def damage_model(root: Path, rounds: int, seed: int) -> Counter:
    """Damage a model's weights in many ways; count what becomes of it."""
    make_model(root, labels=("0", "1"))
    path = root / "pytorch_model.bin"
    whole = load_state(root)

    def outcome() -> str:
        try:
            state = load_state(root)
        except UserError:
            return "refused"
        same = state.keys() == whole.keys() and all(
            torch.equal(state[name], tensor) for name, tensor in whole.items())
        return "same" if same else "wrong"

    return damage(path, path.read_bytes(), outcome, rounds, seed)


def damage(path: Path, data: bytes, outcome: Callable[[], str], rounds: int, seed: int) -> Counter:
    counts: Counter = Counter()
    logging.disable(logging.WARNING)  # a warning of each
    for number in range(rounds):
        for version in damaged(data, random.Random(seed + number)):
            path.write_bytes(version)
            counts[outcome()] += 1
            counts["versions"] += 1
    logging.disable(logging.NOTSET)
    return counts


# ------------------------------------------------------------------ tests


def run_tests() -> list[tuple[str, str, bool | None]]:
    """Run the tests of faults; returns file, claim and whether it passed (None: skipped)."""
    there = [f"tests/{name}" for name in TESTS if (REPO / "tests" / name).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile",
             "-k", LEFT_OUT, f"--junitxml={report}", *there],
            cwd=REPO, env=kill.environment(), check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        results = []
        for case in cases:
            kinds = {child.tag for child in case}
            passed = None if "skipped" in kinds else not kinds & {"failure", "error"}
            results.append((case.get("classname", "").rpartition(".")[2], case.get("name", ""),
                            passed))
    return sorted(results)


# ------------------------------------------------------------------ the page


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page(kills: dict[str, Result], states: Counter, model: Counter, seconds: float,
         tests: list[tuple[str, str, bool | None]]) -> str:
    """Return RELIABILITY.md."""
    facts = machine(torch.device("cpu")) | {
        "command": shlex.join(["python", *sys.argv]), "minutes": f"{seconds / 60:.0f}"}
    lost = sum(result.differing for result in kills.values())
    problems = [f"{name}: {text}" for name, result in kills.items() for text in result.problems]
    text = f"""# Reliability

{sum(r.kills for r in kills.values())} kills survived, {states['versions'] + model['versions']} \
damaged files read, bytes lost: {lost or 'none'}.

{table(["", ""], [[name, value] for name, value in facts.items()])}

## Killed with SIGKILL

At random moments spread over the work, imports left out; each time started again with `--resume`.
Every output is compared with that of an undisturbed run: weights, results, vocabularies and data
files byte by byte, logs line by line (without the times).

{table(["script", "kills survived", "runs", "seconds of work, undisturbed", "bytes compared",
        "bytes that differ"],
       [[name, r.kills, r.runs, f"{r.seconds:.1f}", f"{r.compared:,}", r.differing]
        for name, r in kills.items()])}

{chr(10).join(problems) or "No file is missing, none is left over, no log has a gap or a repeat."}

## Damaged files

Cut at every 10 % of their length, and with one or eight bytes changed at random places.

{table(["file", "versions", "refused, or the state before it taken", "read as it was", "misread"],
       [["state of a run (newest of two)", states["versions"], states["previous"], states["same"],
         states["wrong"]],
        ["pytorch_model.bin", model["versions"], model["refused"], model["same"],
         model["wrong"]]])}

*Read as it was*: the change hit a byte that holds no content, such as the padding between tensors.
"""
    if tests:
        passed = sum(result[2] is True for result in tests)
        text += f"""
## Faults in tests

{passed} of {len(tests)} passed.

{table(["file", "claim", "result"],
       [[file, name.removeprefix("test_").replace("_", " "),
         {True: "passed", False: "**failed**", None: "skipped"}[ok]]
        for file, name, ok in tests])}
"""
    return text


def main(args: argparse.Namespace) -> None:
    began = time.monotonic()
    kills = {}
    for name, make in SCRIPTS.items():
        kills[name] = result = kill_often(make, args.kills, args.seed)
        logger.info("%s: %d kills in %d runs, %d bytes compared, %d differ", name, result.kills,
                    result.runs, result.compared, result.differing)
    with tempfile.TemporaryDirectory() as folder:
        states = damage_states(Path(folder) / "run", args.changes, args.seed)
        model = damage_model(Path(folder) / "model", args.changes, args.seed)
    logger.info("damaged states %s, damaged models %s", dict(states), dict(model))
    tests = [] if args.no_tests else run_tests()
    write_text(args.output_file, page(kills, states, model, time.monotonic() - began, tests))
    logger.info("wrote %s", args.output_file)


if __name__ == "__main__":
    run_script(main, get_args_parser())
