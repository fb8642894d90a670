"""Say what reproduction.sh has to know of a user's own data and models, as bash assignments.

All that is wrong with them is one line on stderr here, before anything is planned; else some lines
there say what was understood.
"""

import argparse
import hashlib
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from driver.copy_task import task_files
from transformer.data_layout import TASK_NAME, find_files
from transformer.file_utils import UserError, file_sha256, read_json
from transformer.own_tasks import find_task, task_record
from transformer.runtime import run_script
from transformer.tasks import GLUE_TASKS, Task, is_glue_name, plain_name

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reproduction.sh", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", required=True, help="folders or files")
    add("--dev_share", type=float, default=0.0, help="where there is no dev file")
    add("--test_share", type=float, default=0.0, help="where there is no test file")
    add("--teacher", default="", help="teacher of the first task: folder, URL or hub id")
    add("--student", default="", help="folder, URL or hub id; empty: layers of the teacher")
    add("--num_layers", type=int, help="so many of them; not given: half")
    add("--new_classifier", default="no", help="yes: fine-tune the teacher, whatever it has")
    add("--max_seq_length", type=int, help="not given: the task's")
    add("--masked_lm", default="no", help="yes: the teacher has to have that head")
    add("--own_layers", default="no", help="yes: the student's layers may not share weights")
    return parser


def slug_of(task: Task) -> str:
    """Return the task's name for folders and settings: a-z, 0-9 and _, a letter first."""
    if task.is_glue:
        return plain_name(task.name)
    slug = re.sub("[^a-z0-9]+", "_", task.name.lower()).strip("_")
    if not task.name.isascii():  # two names in Chinese are different ones
        slug += "_" * bool(slug) + hashlib.sha256(task.name.encode()).hexdigest()[:6]
    return slug if slug[:1].isalpha() else f"task_{slug}".rstrip("_")


def content(task: Task, source: Path) -> str:
    """Return a hash of a task's description and of the files of its splits."""
    digest = hashlib.sha256(json.dumps(task_record(task)).encode())
    for path, place in task_files(task, source):
        digest.update(f"{place} {file_sha256(path)}".encode())
    return digest.hexdigest()[:16]


def missing_shares(source: Path, shares: dict[str, float]) -> dict[str, float]:
    """Return the shares of the splits that have no file, by their flags' names, and say so."""
    description = (source.parent if source.is_file() else source) / TASK_NAME
    settings = read_json(description) if description.is_file() else {}
    if not settings and is_glue_name(source.resolve().name):
        return {}
    files = settings.get("files") or find_files(source)
    missing = {f"{split}_share": share for split, share in shares.items()
               if share and split not in files and f"{split}_share" not in settings}
    for name, share in missing.items():
        logger.info("no %s file: %g of the training rows, by a hash of their texts (%s)",
                    name.removesuffix("_share"), share, name.upper())
    return missing


def describe_task(source: str, shares: dict[str, float]) -> tuple[Task, dict[str, str]]:
    """Return the task in a folder or file, and what the driver has to know of it."""
    if not Path(source).exists():
        raise UserError(f"{source}: no such folder or file; expected texts and labels")
    missing = missing_shares(Path(source), shares)
    task = find_task(None, source, **missing)
    if "dev" not in task.splits:
        raise UserError(f"{source}: no dev file; expected one, or a share of train: DEV_SHARE=0.1")
    return task, {
        "SLUG": slug_of(task), "SOURCE": source, "CONTENT": content(task, Path(source)),
        "SHARES": " ".join(f"--{name} {share:g}" for name, share in missing.items()),
        "AUG_FILE": task.files["aug"],
        "EVAL_SPLITS": " ".join([*task.dev_files, "test"] if "test" in task.splits else []),
    }


@contextmanager
def held_log() -> Iterator[None]:
    """Keep what is logged until the block has succeeded: of a mistake the user sees one line."""
    root = logging.getLogger()
    handlers, held = root.handlers, MemoryHandler(1 << 16, logging.CRITICAL + 1, flushOnClose=False)
    root.handlers = [held]
    try:
        yield
    finally:
        root.handlers = handlers
    for record in held.buffer:
        root.handle(record)


@held_log()
def main(args: argparse.Namespace) -> None:
    shares = {"dev": args.dev_share, "test": args.test_share}
    taken = {plain_name(name): f"GLUE's {task.folder}" for name, task in GLUE_TASKS.items()}
    tasks = []
    for source in args.tasks:
        task, values = describe_task(source, shares)
        slug = values["SLUG"]
        if slug in taken and not task.is_glue:
            raise UserError(f"{source} is called {slug}, as is {taken[slug]}; expected another"
                            ' "name" in its task.json')
        taken[slug] = source
        tasks.append(task)
        key = task.folder if task.is_glue else slug  # in TASKS
        print(f"OWN+=({key})", *(f"{name}[{key}]={shlex.quote(value)}"
                                 for name, value in values.items()), sep="\n")
    if args.teacher:
        from driver.own_models import describe_models  # here: torch takes seconds

        for name, value in describe_models(args, tasks[0]):
            print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_script(main, get_args_parser())
