"""Copy the files of a task of the user's own, so that what is made of them never lies beside them.

Writes the files of its splits as they are, and a task.json with the task's new name, in which the
shares stand as well. A run's other scripts read this copy.

Example:
    python driver/copy_task.py --source data/mine --name mine --output_dir models/mine/data/mine
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.file_utils import UserError, atomic_folder
from transformer.own_tasks import find_task, save_task
from transformer.runtime import run_script
from transformer.tasks import Task, split_paths


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="driver/copy_task.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of the task's files, or its one file")
    add("--name", required=True, help="name of the copy")
    for split in ("dev", "test"):
        add(f"--{split}_share", type=float, default=0.0,
            help=f"share of the training rows, by a hash of their texts, that serve as {split}")
    add("--output_dir", type=Path, required=True, help="folder to write")
    return parser


def task_files(task: Task, source: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the path of each file of a task's splits, and its path inside the task's folder."""
    folder = source.parent if source.is_file() else source
    for split in {file: split for split, file in task.splits.items()}.values():
        for path in split_paths(task, source, split):
            if not path.is_relative_to(folder) or ".." in path.parts[len(folder.parts) :]:
                raise UserError(f"{path}: lies outside {folder}; expected the files of a task in"
                                " its folder")
            yield path, path.relative_to(folder)


def main(args: argparse.Namespace) -> None:
    task = find_task(None, args.source, args.dev_share, args.test_share)
    with atomic_folder(args.output_dir) as temporary:
        for path, place in task_files(task, args.source):
            (temporary / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / place)
        save_task(task if task.is_glue else replace(task, name=args.name), temporary)


if __name__ == "__main__":
    run_script(main, get_args_parser())
