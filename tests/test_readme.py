"""The documents: what they print can be typed, is there or is made, and the README is short."""

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

from driver import checks

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
DOCUMENTS = [
    README,
    *(page for folder in ("docs", "benchmarks", "K-prune", "demo")
      for page in sorted((REPO / folder).glob("*.md"))),
]  # fmt: skip
# What the reader or the hub brings, and folders that only runs make.
BROUGHT = ["data/enwiki-20251101-pages-articles-multistream.xml.bz2", "data/squad", "data/mine",
           "data/my_vectors.txt", "models/my_bert", "models/my_deberta", "FacebookAI/roberta-base",
           "google-bert/bert-base-uncased", "data/snips", "sentence-transformers/all-MiniLM-L6-v2",
           "waimai_10k.csv"]
RUN_FOLDERS = {"data", "models", "results"}
OUTPUT_FLAGS = {"--output_dir", "--output_file", "--results_dir", "-o", "-p", ">"}
TORCHRUN_FLAGS = {"--max-restarts", "--nproc_per_node"}
FOREIGN_SETTINGS = ("AWS_", "HF_", "TORCH_", "OMP_", "SLURM_")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# ------------------------------------------------------------------ commands


class Command(NamedTuple):
    """One simple command: its words, and the folder that it is typed in."""

    words: list[str]
    folder: str = "."

    @property
    def call(self) -> list[str] | None:
        """The Python script, relative to the repository's root, and its arguments."""
        names = [n for n, word in enumerate(self.words) if word.endswith(".py")]
        if not names or not {"python", "torchrun"} & set(self.words):
            return None
        return ["python", self.path(self.words[names[0]]), *self.words[names[0] + 1 :]]

    def path(self, word: str) -> str:
        return os.path.normpath(Path(self.folder) / word)


def simple_commands(text: str) -> Iterator[Command]:
    """Yield the simple commands of shell text; `cd` moves those that follow it."""
    folder = "."
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if not re.fullmatch(r"[|&;]+", token):
                words.append(token)
                continue
            if words[:1] == ["cd"]:
                folder = os.path.normpath(Path(folder) / words[1])
            elif words:
                yield Command(words, folder)
            words = []


def shell_blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))


def inline_code(text: str) -> list[str]:
    """Return what stands between single back quotes outside blocks, each as one line."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands_of(text: str) -> list[Command]:
    typed = re.compile(r"([A-Z_]+=\S+ )*(python|bash|torchrun) [\w./-]+")
    inline = [code for code in inline_code(text) if typed.match(code)]
    return [*simple_commands(shell_blocks(text)), *simple_commands("\n".join(inline))]


# ------------------------------------------------------------------ paths


def made_by(command: Command) -> list[str]:
    """Return the paths that a command makes."""
    words, made, flag = command.words, [], command.words[0]
    for word in words[1:]:
        if word.startswith("-") or word == ">":
            flag = word
        elif flag in OUTPUT_FLAGS or words[0] in ("mv", "mkdir"):
            made.append(word)
    if words[1:2] == ["reproduction.sh"] and "--task" in words:
        task = Path(words[words.index("--task") + 1]).stem
        made += [f"models/{task}", f"results/{task}"]
    script = command.call[1] if command.call else None
    args = checks.parse(command.call) if script else None
    if script == "download_glue.py":
        tasks = "RTE,SST-2,CoLA,MRPC" if args.tasks == "all" else args.tasks
        made += [f"{args.data_dir}/{name}" for name in ("SHA256SUMS", *tasks.split(","))]
    elif script == "data_augmentation.py":
        made.append(f"{args.glue_dir}/{args.task_name}/train_aug.tsv")
    elif script == "get_bert_models.py":
        base = f"{args.output_dir}/{args.base_name}"
        made = [base, *([] if args.base_only else [f"{base}-{t}" for t in args.tasks.split(",")])]
    return [command.path(path) for path in made]


def read_by(command: Command) -> list[str]:
    """Return the words of a command that are paths, without those that it makes."""
    words = [word.partition("=")[2] or word for word in command.words[1:]]
    paths = [command.path(w) for w in words if "/" in w and "://" not in w and " " not in w]
    return [path for path in paths if path not in made_by(command)]


@cache
def made_by_driver(profile: str) -> list[str]:
    run = subprocess.run(
        ["bash", "reproduction.sh", "--profile", profile, "--dry-run"], cwd=REPO, text=True,
        capture_output=True, check=True, env={**os.environ, "PYTHON": sys.executable})  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if not line.startswith("#")]
    return [path for line in lines for path in made_by(Command(shlex.split(line)))]


def is_known(path: str, made: list[str], folder: Path) -> bool:
    """Whether a path exists, is made, lies in what is made or holds it; `*` and {a,b} match."""
    choice = re.search(r"\{([\w,.-]+)\}", path)
    if choice:
        names = choice.group(1).split(",")
        return all(is_known(path.replace(choice.group(), n), made, folder) for n in names)
    return any(list(root.glob(path)) for root in (REPO, folder)) or any(
        fnmatch(m, path) or f"{path}/".startswith(f"{m}/") or m.startswith(f"{path}/")
        for m in made
    )


def unknown_paths(text: str, folder: Path = REPO) -> list[str]:
    """Return the paths that a document prints and that nothing has made up to there."""
    profiles = {"full", *re.findall(r"(?:--profile |--)(demo|minilm)\b", text)}
    made = [*BROUGHT, *(path for profile in profiles for path in made_by_driver(profile))]
    unknown = []
    for command in commands_of(text):
        unknown += [path for path in read_by(command) if not is_known(path, made, folder)]
        made += made_by(command)
    folders = RUN_FOLDERS | {path.name for path in REPO.iterdir() if path.is_dir()}
    for word in (word.rstrip(".,;:/") for code in inline_code(text) for word in code.split()):
        is_path = "/" in word and word.split("/")[0] in folders
        if is_path or re.fullmatch(r"[\w./-]+\.(py|sh)", word):
            unknown += [] if is_known(word, made, folder) else [word]
    return unknown


def programs() -> list[Path]:
    """Return every program and profile of the repository, tests aside."""
    folders = ("", "transformer", "driver", "profiles", "benchmarks", "demo", "K-prune/**")
    paths = [path for folder in folders for path in REPO.glob(f"{folder}/*.*".lstrip("/"))]
    return [p for p in [*paths, REPO / "tests/run.sh"] if p.suffix in (".py", ".sh", ".env")]


# ------------------------------------------------------------------ claims


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def document(request) -> Path:
    return request.param


def test_every_printed_command_parses_with_its_scripts_own_parser(document):
    calls = [command.call for command in commands_of(read(document)) if command.call]
    assert list(checks.problems(calls)) == []


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
        headings = re.findall(r"^#+ (.*)$", read(page), re.M)
        anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in ["", *anchors], target


def test_every_flag_setting_and_file_name_in_the_text_occurs_in_a_program(document):
    text = "\n".join(read(path) for path in programs())
    flags = {flag for path in programs() for flag in re.findall(
        r'"(--[a-z][\w-]+)"' if path.suffix == ".py" else r"--[a-z][\w-]+", read(path))}
    for word in (word for code in inline_code(read(document)) for word in code.split()):
        flag = re.match(r"--(?:no-)?([a-z][\w-]+)", word)
        if flag:
            assert f"--{flag.group(1)}" in flags | TORCHRUN_FLAGS, f"{word}: no script has it"
        setting = re.match(r"\$?([A-Z]+_[A-Z_]+)\b", word)
        if setting and not setting.group(1).startswith(FOREIGN_SETTINGS):
            assert setting.group(1) in text, f"{word}: no program reads it"
        if re.fullmatch(r"\w[\w.-]*\.(json|jsonl|tsv|txt|png|npz|bin|zip)", word):
            name = word.removeprefix("step_N_")
            assert name in text or (REPO / word).exists(), f"{word}: no program writes it"


def test_every_test_that_the_table_of_reported_cases_names_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").glob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", read(REPO / "docs" / "interoperability.md")))
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_the_readme_has_at_most_250_lines_and_8_entries_of_troubleshooting():
    assert len(read(README).splitlines()) <= 250
    section = read(README).partition("## Troubleshooting")[2].partition("\n## ")[0]
    assert 1 <= len(re.findall(r"^- ", section, re.M)) <= 8


def test_the_first_thirty_lines_say_what_it_is_and_what_it_gave_and_the_commands():
    head = "\n".join(read(README).splitlines()[:30])
    assert "arxiv.org/abs/1909.10351" in head
    assert len(re.findall(r"^\|[-:|]+\|$", head, re.M)) == 1  # one table
    commands = [shlex.join(command.words) for command in simple_commands(shell_blocks(head))]
    assert commands == [
        "bash reproduction.sh --demo", "bash tests/run.sh",
        "bash reproduction.sh --task reviews.csv --teacher google-bert/bert-base-uncased",
        "bash reproduction.sh",
    ]  # fmt: skip


def test_the_readme_lists_every_script_and_module():
    (block,) = re.findall(r"^## Files\n+```\n(.*?)^```", read(README), re.S | re.M)
    first_columns = "\n".join(re.split(r"\s{2,}", line.strip())[0] for line in block.splitlines())
    listed = {name.rstrip("/") for name in re.findall(r"[\w./-]+", first_columns)}
    scripts = {path.name for path in REPO.glob("*.py")} | {"reproduction.sh"}
    modules = {path.stem for path in (REPO / "transformer").glob("[a-z]*.py")}
    assert scripts | modules <= listed
    assert [name for name in listed - scripts - modules if not (REPO / name).exists()] == []
