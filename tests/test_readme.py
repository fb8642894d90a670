"""The documents: what they print can be typed, is there or is made, and the README is short."""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
DOCUMENTS = [
    README, *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "benchmarks").glob("*.md")),
    REPO / "K-prune" / "README.md", REPO / "demo" / "README.md",
]  # fmt: skip
# What the reader brings.
BROUGHT = {
    "data/enwiki-20251101-pages-articles-multistream.xml.bz2",
    "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "data/squad",
}  # fmt: skip
OUTPUT_FLAGS = {"--output_dir", "--output_file", "--results_dir", "-o", "-p", "--target"}
# Folders that only runs make; other paths that begin with a folder's name are the repository's.
MADE_FOLDERS = ("data", "models", "results")
FOREIGN_SETTINGS = ("AWS_", "HF_", "TORCH_", "OMP_", "SLURM_")
TORCHRUN_FLAGS = {"--max-restarts", "--nproc_per_node", "--nnodes", "--standalone"}


# ------------------------------------------------------------------ what a document prints


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class Command(NamedTuple):
    """One simple command: its words, and the folder that it is typed in."""

    words: list[str]
    folder: str

    @property
    def script(self) -> str | None:
        """The Python script that it runs, relative to the repository's root."""
        starts = [n for n, word in enumerate(self.words) if word in ("python", "torchrun")]
        for word in self.words[starts[0] + 1 :] if starts else []:
            if word == "-m" or word == "-c":
                return None
            if word.endswith(".py"):
                return self.path(word)
        return None

    @property
    def arguments(self) -> list[str]:
        """The words after the script's name."""
        names = [n for n, word in enumerate(self.words) if word.endswith(".py")]
        return self.words[names[0] + 1 :]

    def path(self, word: str) -> str:
        return os.path.normpath(Path(self.folder) / word)


def simple_commands(text: str, folder: str = ".") -> Iterator[Command]:
    """Yield the simple commands of shell text; `cd` moves those that follow it."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token == ">" or not re.fullmatch(r"[|&;]+", token):
                words.append(token)
            elif words:
                if words[0] == "cd":
                    folder = os.path.normpath(Path(folder) / words[1])
                else:
                    yield Command(words, folder)
                words = []


def shell_blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))


def inline_code(text: str) -> list[str]:
    """Return what stands between single back quotes outside blocks, each as one line."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def document_commands(text: str) -> list[Command]:
    commands = list(simple_commands(shell_blocks(text)))
    for code in inline_code(text):
        if re.match(r"([A-Z_]+=\S+ )*(python|bash|torchrun) [\w./-]+", code):
            commands += simple_commands(code)
    return commands


# ------------------------------------------------------------------ parsers


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    # Under a name of its own: other tests have imported the script, and pickle looks it up.
    name = f"documented_{Path(script).stem}"
    spec = importlib.util.spec_from_file_location(name, REPO / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.get_args_parser()


def parse(command: Command) -> argparse.Namespace:
    try:
        return parser_of(command.script).parse_args(command.arguments)
    except SystemExit:
        pytest.fail(f"does not parse: {shlex.join(command.words)}")


def scripts() -> list[str]:
    """Return every script of the repository."""
    found = subprocess.run(["git", "ls-files", "*.py"], cwd=REPO, text=True, capture_output=True)
    names = found.stdout.split() or [str(p.relative_to(REPO)) for p in REPO.rglob("*.py")]
    names = [name for name in names if not name.startswith("tests/")]
    return [n for n in names if "def get_args_parser" in read(REPO / n)]


# ------------------------------------------------------------------ paths


def made_by(command: Command) -> list[str]:
    """Return the paths that a command makes."""
    words, made = command.words, []
    flag = words[0]
    for word in words[1:]:
        if word.startswith("-") or word == ">":
            flag = word
        elif flag in {*OUTPUT_FLAGS, ">"} or words[0] in ("mv", "cp", "mkdir"):
            made.append(word)
    if command.script == "download_glue.py":
        args = parse(command)
        tasks = "RTE,SST-2,CoLA,MRPC" if args.tasks == "all" else args.tasks
        made += [f"{args.data_dir}/{task}" for task in tasks.split(",")]
        made.append(f"{args.data_dir}/SHA256SUMS")
    elif command.script == "data_augmentation.py":
        args = parse(command)
        made.append(f"{args.glue_dir}/{args.task_name}/train_aug.tsv")
    elif command.script == "get_bert_models.py":
        args = parse(command)
        base = f"{args.output_dir}/{args.base_name}"
        made = [base, *([] if args.base_only else [f"{base}-{t}" for t in args.tasks.split(",")])]
    return [command.path(path) for path in made]


def read_by(command: Command) -> list[str]:
    """Return the words of a command that are paths, without those that it makes."""
    made = made_by(command)
    words = [word.partition("=")[2] or word for word in command.words[1:]]
    paths = [command.path(w) for w in words if "/" in w and "://" not in w and " " not in w]
    return [p for p in paths if p not in made and not p.startswith(("google-bert/", "JeremiahZ/"))]


@cache
def made_by_driver(profile: str) -> list[str]:
    run = subprocess.run(
        ["bash", "reproduction.sh", "--profile", profile, "--dry-run"], cwd=REPO, text=True,
        capture_output=True, check=True, env={**os.environ, "PYTHON": sys.executable})  # fmt: skip
    lines = (line for line in run.stdout.splitlines() if not line.startswith("#"))
    commands = (Command(shlex.split(line), ".") for line in lines)
    return [path for command in commands for path in made_by(command)]


def profiles_of(text: str) -> set[str]:
    """Return the full profile and those that a document names."""
    named = set(re.findall(r"--profile (\w+)", text)) & {"demo", "minilm"}
    return {"full", *named, *(["demo"] if "--demo" in text else [])}


def is_known(path: str, made: list[str], folder: Path = REPO) -> bool:
    """Whether a path exists, is made, lies in what is made or holds it; patterns match as such."""
    patterns = [path]
    for choice in re.findall(r"\{([\w,.-]+)\}", path):
        patterns = [p.replace(f"{{{choice}}}", c) for p in patterns for c in choice.split(",")]
    return all(
        any((root / p).exists() or ("*" in p and any(root.glob(p))) for root in (REPO, folder))
        or p in BROUGHT
        or any(fnmatch(m, p) or f"{p}/".startswith(f"{m}/") or m.startswith(f"{p}/") for m in made)
        for p in (os.path.normpath(pattern) for pattern in patterns)
    )


def unknown_paths(text: str, folder: Path = REPO) -> list[str]:
    """Return the paths that a document prints and that nothing has made up to there."""
    made = [path for profile in profiles_of(text) for path in made_by_driver(profile)]
    unknown = []
    for command in document_commands(text):
        unknown += [path for path in read_by(command) if not is_known(path, made, folder)]
        made += made_by(command)
    tops = {*MADE_FOLDERS, *(path.name for path in REPO.iterdir() if path.is_dir())}
    for word in (word.rstrip(".,;:") for code in inline_code(text) for word in code.split()):
        path = word.partition("#")[0]
        if "/" in path and path.split("/")[0] in tops or re.fullmatch(r"[\w./-]+\.(py|sh)", path):
            unknown += [] if is_known(path, made, folder) else [path]
    return unknown


@cache
def sources() -> str:
    """Return the text of every program and profile, where file names and settings occur."""
    suffixes = {".py", ".sh", ".env"}
    paths = [p for p in REPO.rglob("*") if p.suffix in suffixes and "tests" not in p.parts]
    return "\n".join(read(path) for path in paths if ".venv" not in path.parts)


# ------------------------------------------------------------------ claims


def named(path: Path) -> str:
    return str(path.relative_to(REPO))


@pytest.fixture(params=DOCUMENTS, ids=named)
def document(request) -> Path:
    return request.param


def test_every_printed_command_parses_with_its_scripts_own_parser(document):
    for command in document_commands(read(document)):
        if command.script:
            assert (REPO / command.script).is_file(), command
            if "--help" not in command.words:
                parse(command)


def test_every_printed_path_exists_or_is_made_by_an_earlier_command(document):
    assert unknown_paths(read(document), document.parent) == []


def test_a_path_that_nothing_makes_is_noticed():
    text = "```bash\npython predict.py --model models/{}\n```\n"
    assert unknown_paths(text.format("bert_base_uncased")) == ["models/bert_base_uncased"]
    assert unknown_paths(text.format("bert-base-uncased")) == []
    assert unknown_paths("`transformer/no_such_module.py`") == ["transformer/no_such_module.py"]


def test_every_link_leads_to_a_file_and_a_heading(document):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read(document)):
        path, _, anchor = target.partition("#")
        page = document.parent / path if path else document
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read(page), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


def test_every_flag_in_the_text_is_one_of_a_script(document):
    known = {flag for script in scripts() for flag in parser_of(script)._option_string_actions}
    shell = [REPO / "reproduction.sh", REPO / "tests" / "run.sh", *REPO.glob("driver/*.*")]
    known |= {flag for path in shell for flag in re.findall(r"--[\w-]+", read(path))}
    for code in inline_code(read(document)):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", code):
            assert flag in known | TORCHRUN_FLAGS, f"{flag}: no script has it"


def test_every_setting_and_file_name_in_the_text_occurs_in_a_program(document):
    for word in (word for code in inline_code(read(document)) for word in code.split()):
        setting = re.match(r"\$?([A-Z]+_[A-Z_]+)\b", word)
        if setting and not setting.group(1).startswith(FOREIGN_SETTINGS):
            assert setting.group(1) in sources(), f"{word}: no program reads it"
        if re.fullmatch(r"\w[\w.-]*\.(json|jsonl|tsv|txt|png|npz|bin|zip)", word):
            name = word.removeprefix("step_N_")
            assert name in sources() or (REPO / word).exists(), f"{word}: no program writes it"


def test_the_readme_has_at_most_220_lines():
    assert len(read(README).splitlines()) <= 220


def test_the_first_thirty_lines_say_what_it_is_and_what_it_gave_and_the_three_commands():
    head = "\n".join(read(README).splitlines()[:30])
    assert "arxiv.org/abs/1909.10351" in head
    assert len(re.findall(r"^\|[-:|]+\|$", head, re.M)) == 1  # one table
    assert "has not been made" in head
    commands = [shlex.join(command.words) for command in simple_commands(shell_blocks(head))]
    assert commands == [
        "bash reproduction.sh --demo", "bash tests/run.sh", "bash reproduction.sh",
    ]  # fmt: skip


def test_the_troubleshooting_has_at_most_eight_entries():
    section = read(README).partition("## Troubleshooting")[2].partition("\n## ")[0]
    assert 1 <= len(re.findall(r"^- ", section, re.M)) <= 8
