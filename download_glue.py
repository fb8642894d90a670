"""Download the GLUE benchmark and lay it out as `<data_dir>/<TASK>/{train,dev,test}.tsv`.

Example:
    python download_glue.py --data_dir data/glue_data --tasks RTE,SST-2,CoLA,MRPC

Archives come from the addresses that the benchmark publishes (or from `--base_url`). MRPC is
built here: `msr_paraphrase_train.txt` is split into train and dev by a list of dev ids, from
`--path_to_mrpc` or downloaded. GLUE publishes no checksums. So the SHA-256 of every file is
written to `<data_dir>/SHA256SUMS` (for `sha256sum -c`) when it is first downloaded, and every
later run is held to that; the first download itself is checked for completeness and against the
archive's own CRC only, unless `--checksums` names a file of sums that you trust. A task whose
train and dev files are there is skipped, an interrupted download goes on where it ended.
"""

import argparse
import logging
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from transformer.file_utils import (
    UserError,
    add_download_arguments,
    download,
    download_settings,
    extract_zip,
    file_lock,
    file_sha256,
    write_text,
)
from transformer.runtime import run_script
from transformer.tasks import GLUE_TASKS, get_task, iterate_tsv

logger = logging.getLogger(__name__)

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
CHECKSUMS_NAME = "SHA256SUMS"
SCRATCH_NAME = ".downloads"
MRPC = "MRPC"
MRPC_TRAIN, MRPC_TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
MRPC_DEV_IDS = "mrpc_dev_ids.tsv"
MRPC_TEST_HEADER = "index\t#1 ID\t#2 ID\t#1 String\t#2 String"
DIAGNOSTIC, DIAGNOSTIC_SOURCE, DIAGNOSTIC_FILE = "diagnostic", "AX.tsv", "diagnostic.tsv"
# What the diagnostic set, and older scripts their tasks, are called as well.
OTHER_NAMES = {DIAGNOSTIC: DIAGNOSTIC, "ax": DIAGNOSTIC, "sst": "SST-2", "sts": "STS-B"}
FOLDERS = (*(task.folder for task in GLUE_TASKS.values()), DIAGNOSTIC)
# The archives, as they are published; each holds one folder named like the task's.
ARCHIVES = {folder: f"{folder}.zip" for folder in FOLDERS if folder not in (MRPC, DIAGNOSTIC)}
ARCHIVES |= {"QQP": "QQP-clean.zip", "QNLI": "QNLIv2.zip"}

Fetch = Callable[[str], Path]  # fetch(name): a downloaded file
Sums = dict[str, str]  # path relative to data_dir, or name of an archive: SHA-256


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Download the GLUE tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", type=str, default="glue_data", help="folder that gets one folder a task")
    add("--tasks", type=str, default="all",
        help=f"'all' or names separated by commas, in any case: {', '.join(FOLDERS)}")
    add("--path_to_mrpc", type=str, default="",
        help=f"folder with {MRPC_TRAIN}, {MRPC_TEST} and, if you have it, {MRPC_DEV_IDS}; "
        "'': download them")
    add("--base_url", type=str, default=GLUE_URL,
        help="address of a mirror (http, https or s3) that holds all files side by side")
    add("--checksums", type=Path, default=None,
        help="file in the format of sha256sum that names the archives (RTE.zip) or the files "
        "(RTE/train.tsv) of every task; what it does not name or what differs is refused")
    add_download_arguments(parser)
    return parser


def parse_tasks(text: str) -> list[str]:
    """Return the folders of the tasks named in `text`, in the order of the table."""
    chosen = set()
    for name in map(str.strip, text.lower().split(",")):
        try:
            folder = OTHER_NAMES.get(name) or get_task(name).folder
        except UserError:
            if name != "all":
                raise UserError(f"--tasks {text}: unknown task {name!r}; expected 'all' or "
                                f"{', '.join(FOLDERS)}") from None
            chosen.update(FOLDERS)
        else:
            chosen.add(folder)
    return [folder for folder in FOLDERS if folder in chosen]


def needed_files(folder: str) -> list[str]:
    """Return the files without which the pipeline cannot use a task."""
    if folder == DIAGNOSTIC:
        return [DIAGNOSTIC_FILE]
    return ["train.tsv", *get_task(folder).dev_files.values()]


# ------------------------------------------------------------------ checksums


def read_checksums(path: Path) -> Sums:
    """Read the format of sha256sum: 64 hexadecimal digits, white space, an optional `*`, a name."""
    sums = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        digest, _, name = line.partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if not line.strip() or line.startswith("#"):
            continue
        if len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef") or not name:
            raise UserError(
                f"{path}, line {number}: expected 64 hexadecimal digits, two spaces and a name"
            )
        sums[name] = digest.lower()
    return sums


def recorded_sums(data_dir: Path) -> Sums:
    """Return the sums of what was downloaded into `data_dir` before."""
    record = data_dir / CHECKSUMS_NAME
    return read_checksums(record) if record.is_file() else {}


def task_sums(folder: str, place: Path) -> Sums:
    """Return the sums of the files in `place` under the names that they have in a file of sums."""
    return {f"{folder}/{path.relative_to(place).as_posix()}": file_sha256(path)
            for path in all_files(place)}  # fmt: skip


def check_sums(
    folder: str,
    found: Sums,
    args: argparse.Namespace,
    trusted: Sums,
    downloaded: Collection[str] = (),
) -> None:
    """Hold a task's files to the sums of their first download and those of --checksums.

    With --checksums a task is refused unless that file names its files, or every one of the
    `downloaded` sources, or its files were recorded when their sources were checked.
    """
    record = Path(args.data_dir) / CHECKSUMS_NAME
    recorded = recorded_sums(record.parent)
    for source, sums in ((args.checksums, trusted), (record, recorded)):
        for name in found.keys() & sums.keys():
            if found[name] != sums[name]:
                raise UserError(
                    f"{name}: SHA-256 is {found[name]}; {source} says {sums[name]}; delete "
                    f"{record.parent / name} to download it again, or the line if it is outdated"
                )
    needed = {f"{folder}/{name}" for name in needed_files(folder)}
    is_named = needed <= trusted.keys() or needed <= recorded.keys()
    if args.checksums and not is_named and not (downloaded and trusted.keys() >= set(downloaded)):
        raise UserError(f"{args.checksums}: names neither the files of {folder} (such as "
                        f"{min(needed)}) nor what they are made from")


# ------------------------------------------------------------------ preparing one task


def prepare_mrpc(path_to_mrpc: str, fetch: Fetch, target: Path) -> None:
    """Build MRPC's three files from its two sources and the ids of the dev pairs."""
    given = Path(path_to_mrpc) if path_to_mrpc else None
    if given is not None and not (given / MRPC_TRAIN).is_file():
        raise UserError(f"{given / MRPC_TRAIN}: no such file; --path_to_mrpc must hold it")

    def source(name: str) -> Path:
        return given / name if given and (given / name).is_file() else fetch(name)

    split_mrpc(source(MRPC_TRAIN), source(MRPC_DEV_IDS), target)
    if given is None or (given / MRPC_TEST).is_file():
        write_mrpc_test(source(MRPC_TEST), target / "test.tsv")
    else:
        logger.warning("%s: no such file, so MRPC gets no test.tsv", given / MRPC_TEST)


def read_mrpc(path: Path) -> tuple[str, list[list[str]]]:
    """Return the header line, byte-order mark included, and the five cells of each row."""
    rows = list(iterate_tsv(path))
    for number, cells in rows:
        if len(cells) != 5:
            raise UserError(f"{path}, line {number}: {len(cells)} columns; expected 5")
    with path.open("rb") as stream:
        # Kept from the published files: they begin with the source's byte-order mark.
        mark = "\ufeff" if stream.read(3) == b"\xef\xbb\xbf" else ""
    if not rows:
        raise UserError(f"{path}: empty; expected a header and rows of 5 columns")
    return mark + "\t".join(rows[0][1]), [cells for _, cells in rows[1:]]


def split_mrpc(train_source: Path, dev_ids: Path, target: Path) -> None:
    """Write train.tsv and dev.tsv; both keep the order of the source."""
    wanted = {}
    for number, cells in iterate_tsv(dev_ids):
        if len(cells) == 2 and all(cell.strip().isdigit() for cell in cells):
            wanted[tuple(cell.strip() for cell in cells)] = number
        elif number > 1 and cells != [""]:  # the first line may be a header
            raise UserError(f"{dev_ids}, line {number}: {cells}; expected two ids and a tab")
    if not wanted:
        raise UserError(f"{dev_ids}: no ids; expected two ids and a tab on each line")
    header, rows = read_mrpc(train_source)
    unknown = set(wanted) - {(cells[1], cells[2]) for cells in rows}
    if unknown:
        pair = min(unknown, key=wanted.__getitem__)
        raise UserError(f"{dev_ids}, line {wanted[pair]}: no pair {pair} in {train_source}")
    parts = {"train.tsv": [header], "dev.tsv": [header]}
    for cells in rows:
        is_dev = (cells[1], cells[2]) in wanted
        parts["dev.tsv" if is_dev else "train.tsv"].append("\t".join(cells))
    for name, lines in parts.items():
        write_text(target / name, "".join(f"{line}\n" for line in lines))


def write_mrpc_test(test_source: Path, path: Path) -> None:
    """Write the test pairs as GLUE does: numbered, and without their labels."""
    _, rows = read_mrpc(test_source)
    lines = [MRPC_TEST_HEADER, *("\t".join([str(i), *row[1:]]) for i, row in enumerate(rows))]
    write_text(path, "".join(f"{line}\n" for line in lines))


# ------------------------------------------------------------------ putting it in place


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_complete(folder: str, data_dir: Path) -> bool:
    return all((data_dir / folder / name).is_file() for name in needed_files(folder))


def prepare_task(folder: str, path_to_mrpc: str, fetch: Fetch, scratch: Path) -> Path:
    """Return a folder in `scratch` with a task's files."""
    if folder in ARCHIVES:
        prepared = extract_zip(fetch(ARCHIVES[folder]), scratch / "unpacked") / folder
    else:
        prepared = scratch / "prepared"
        prepared.mkdir(parents=True)
    if folder == MRPC:
        prepare_mrpc(path_to_mrpc, fetch, prepared)
    elif folder == DIAGNOSTIC:
        shutil.copyfile(fetch(DIAGNOSTIC_SOURCE), prepared / DIAGNOSTIC_FILE)
    for name in needed_files(folder):
        if not (prepared / name).is_file():
            raise UserError(f"{folder}: what was downloaded holds no {folder}/{name}")
    return prepared


def download_task(folder: str, args: argparse.Namespace, trusted: Sums, scratch: Path) -> None:
    """Download, prepare, check, record and move one task."""
    data_dir, base_url = Path(args.data_dir), args.base_url.rstrip("/")
    downloaded = []

    def fetch(name: str) -> Path:
        downloaded.append(name)
        published = MRPC_URL if name in (MRPC_TRAIN, MRPC_TEST) else GLUE_URL
        url = published if base_url == GLUE_URL else base_url
        return download(f"{url}/{name}", scratch / name, trusted.get(name),
                        **download_settings(args))  # fmt: skip

    prepared = prepare_task(folder, args.path_to_mrpc, fetch, scratch)
    found = task_sums(folder, prepared)
    check_sums(folder, found, args, trusted, downloaded)
    moves = {path: data_dir / folder / path.relative_to(prepared) for path in all_files(prepared)}
    for path, place in moves.items():
        if place.exists() and file_sha256(place) != file_sha256(path):
            raise UserError(f"{place}: differs from what was downloaded; move it away and repeat")
    # Recorded first: a task that is there and has no sums is taken for the user's own.
    sums = {**recorded_sums(data_dir), **found}
    write_text(data_dir / CHECKSUMS_NAME,
               "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))  # fmt: skip
    for path, place in moves.items():  # train.tsv last: a task is not complete without it
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def clean(scratch: Path) -> None:
    """Remove everything save unfinished downloads, which a later call goes on with."""
    for path in scratch.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif ".part" not in path.suffixes:
            path.unlink()
    for folder in (scratch, scratch.parent):
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()


def main(args: argparse.Namespace) -> None:
    folders, data_dir = parse_tasks(args.tasks), Path(args.data_dir)
    trusted = read_checksums(args.checksums) if args.checksums else {}
    for folder in folders:
        if is_complete(folder, data_dir):
            check_sums(folder, task_sums(folder, data_dir / folder), args, trusted)
            logger.info("%s: complete in %s, skipped", folder, data_dir / folder)
            continue
        # Inside the data folder, so that files only need a new name, and under a name that stays
        # the same, so that an interrupted download goes on.
        scratch = data_dir / SCRATCH_NAME / folder
        with file_lock(data_dir / CHECKSUMS_NAME):
            clean(scratch)
            try:
                if not is_complete(folder, data_dir):  # another process may have been faster
                    download_task(folder, args, trusted, scratch)
                    logger.info("%s: written to %s", folder, data_dir / folder)
            finally:
                clean(scratch)


if __name__ == "__main__":
    run_script(main, get_args_parser())
