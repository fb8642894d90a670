"""Download the GLUE benchmark and lay it out as `<data_dir>/<TASK>/{train,dev,test}.tsv`.

Example:
    python download_glue.py --data_dir data/glue_data --tasks RTE,SST-2,CoLA,MRPC

Archives come from the addresses that the benchmark publishes (or from `--base_url`). MRPC is
built here: `msr_paraphrase_train.txt` is split into train and dev by a list of dev ids, from
`--path_to_mrpc` or downloaded. GLUE publishes no checksums. So the SHA-256 of every file is
written to `<data_dir>/SHA256SUMS` (for `sha256sum -c`) when it is first downloaded, and every
later run is held to that; the first download itself is checked for completeness and against the
archive's own CRC only, unless `--checksums` names a file of sums that you trust, or the mirror
named by `--base_url` (http, https or s3) has a file SHA256SUMS beside its archives. A task whose
train and dev files are there is skipped, an interrupted download goes on where it ended.
"""

import argparse
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from transformer.file_utils import (
    CHECKSUMS_NAME,
    UserError,
    add_download_arguments,
    download,
    download_settings,
    extract_zip,
    file_lock,
    file_sha256,
    mirror_checksums,
    read_checksums,
    write_text,
)
from transformer.runtime import run_script
from transformer.tasks import GLUE_TASKS, get_task, iterate_tsv

logger = logging.getLogger(__name__)

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
SCRATCH_NAME = ".downloads"
# The archives, as they are published; each holds one folder named like the task's.
ARCHIVES = {
    "CoLA": "CoLA.zip",
    "SST-2": "SST-2.zip",
    "STS-B": "STS-B.zip",
    "QQP": "QQP-clean.zip",
    "MNLI": "MNLI.zip",
    "QNLI": "QNLIv2.zip",
    "RTE": "RTE.zip",
    "WNLI": "WNLI.zip",
}
MRPC = "MRPC"
MRPC_TRAIN, MRPC_TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
MRPC_DEV_IDS = "mrpc_dev_ids.tsv"
MRPC_TEST_HEADER = "index\t#1 ID\t#2 ID\t#1 String\t#2 String"
DIAGNOSTIC, DIAGNOSTIC_SOURCE, DIAGNOSTIC_FILE = "diagnostic", "AX.tsv", "diagnostic.tsv"
# What the diagnostic set, and older scripts their tasks, are called as well.
OTHER_NAMES = {DIAGNOSTIC: DIAGNOSTIC, "ax": DIAGNOSTIC, "sst": "SST-2", "sts": "STS-B"}
FOLDERS = (*(task.folder for task in GLUE_TASKS.values()), DIAGNOSTIC)

Fetch = Callable[..., Path]  # fetch(name) or fetch(name, base): a downloaded file
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
        help="address of a mirror (http, https or s3) that holds all files side by side, and, "
        f"if it can, their sums in {CHECKSUMS_NAME}, which are held to")
    add("--checksums", type=Path, default=None,
        help="file in the format of sha256sum that names the archives (RTE.zip) or the files "
        "(RTE/train.tsv) of every task; what it does not name or what differs is refused")
    add_download_arguments(parser)
    return parser


def parse_tasks(text: str) -> list[str]:
    """Return the folders of the tasks named in `text`, in the order of the table."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {text!r} names no task; expected 'all' or {', '.join(FOLDERS)}")
    if "all" in map(str.lower, names):
        names = [*names, *FOLDERS]
    chosen = {find_folder(name) for name in names if name.lower() != "all"}
    return [folder for folder in FOLDERS if folder in chosen]


def find_folder(name: str) -> str:
    """Return the folder of a task; a `UserError` lists the names."""
    if name.lower() in OTHER_NAMES:
        return OTHER_NAMES[name.lower()]
    try:
        return get_task(name).folder
    except UserError:
        known = ", ".join(FOLDERS)
        raise UserError(f"unknown task {name!r}; expected 'all' or {known}") from None


def needed_files(folder: str) -> list[str]:
    """Return the files without which the pipeline cannot use a task."""
    if folder == DIAGNOSTIC:
        return [DIAGNOSTIC_FILE]
    return ["train.tsv", *get_task(folder).dev_files.values()]


# ------------------------------------------------------------------ checksums


def check_files(paths: dict[str, Path], sums: Sums, source: Path | str, advice: str) -> None:
    """Compare files, given under the names they have in `sums`, with those of them it knows."""
    for name, path in paths.items():
        if name in sums and (found := file_sha256(path)) != sums[name]:
            raise UserError(f"{path}: SHA-256 is {found}; {source} says {sums[name]}; {advice}")


def check_named(folder: str, source: Path, trusted: Sums) -> None:
    """Refuse a task that `source` (from --checksums) does not name."""
    for name in needed_files(folder):
        if f"{folder}/{name}" not in trusted:
            raise UserError(f"{source}: names neither {folder}/{name} nor what it is made from")


# ------------------------------------------------------------------ preparing one task


def prepare_archive(folder: str, fetch: Fetch, target: Path, scratch: Path) -> None:
    """Unpack a task's archive and move the content of its one folder into `target`."""
    archive = fetch(ARCHIVES[folder])
    unpacked = extract_zip(archive, scratch / "unpacked")
    if not (unpacked / folder).is_dir():
        found = ", ".join(sorted(path.name for path in unpacked.iterdir())) or "nothing"
        raise UserError(f"{archive.name}: holds {found}; expected a folder {folder}")
    for path in (unpacked / folder).iterdir():
        path.rename(target / path.name)


def prepare_mrpc(path_to_mrpc: str, fetch: Fetch, base: str, target: Path) -> None:
    """Build MRPC's three files from its two sources and the ids of the dev pairs."""
    given = Path(path_to_mrpc) if path_to_mrpc else None
    if given is not None and not (given / MRPC_TRAIN).is_file():
        raise UserError(f"{given / MRPC_TRAIN}: no such file; --path_to_mrpc must hold it")

    def source(name: str, base: str) -> Path:
        return given / name if given and (given / name).is_file() else fetch(name, base)

    dev_ids = source(MRPC_DEV_IDS, GLUE_URL if base == MRPC_URL else base)
    split_mrpc(source(MRPC_TRAIN, base), dev_ids, target)
    if given is None or (given / MRPC_TEST).is_file():
        write_mrpc_test(source(MRPC_TEST, base), target / "test.tsv")
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
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def task_files(folder: str, place: Path) -> dict[str, Path]:
    """Return the files in `place` under the names that they have in a file of sums."""
    return {f"{folder}/{path.relative_to(place).as_posix()}": path for path in all_files(place)}


def files_to_move(prepared: Path, target: Path) -> list[tuple[Path, Path]]:
    """Return what a task's folder lacks; a file that is there with other content is an error."""
    missing = []
    for path in all_files(prepared):
        place = target / path.relative_to(prepared)
        if not place.exists():
            missing.append((path, place))
        elif file_sha256(place) != file_sha256(path):
            raise UserError(f"{place}: differs from what was downloaded; move it away and repeat")
    return missing


def install(prepared: Path, target: Path) -> None:
    """Move a prepared task to its place."""
    if not target.is_dir() or not any(target.iterdir()):
        prepared.replace(target)  # all files at once
        return
    for path, place in files_to_move(prepared, target):
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def prepare_task(
    folder: str, args: argparse.Namespace, scratch: Path, trusted: Sums
) -> tuple[Path, set[str]]:
    """Bring a task's files into a folder in `scratch`; return it and the names downloaded."""
    base = args.base_url.rstrip("/")
    fetched = set()

    def fetch(name: str, base: str = base) -> Path:
        fetched.add(name)
        return download(
            f"{base}/{name}", scratch / name, trusted.get(name), **download_settings(args)
        )

    prepared = scratch / "prepared"
    for rest_of_an_interrupted_run in (prepared, scratch / "unpacked"):
        shutil.rmtree(rest_of_an_interrupted_run, ignore_errors=True)
    prepared.mkdir(parents=True)
    if folder == MRPC:
        prepare_mrpc(args.path_to_mrpc, fetch, MRPC_URL if base == GLUE_URL else base, prepared)
    elif folder == DIAGNOSTIC:
        shutil.copyfile(fetch(DIAGNOSTIC_SOURCE), prepared / DIAGNOSTIC_FILE)
    else:
        prepare_archive(folder, fetch, prepared, scratch)
    for name in needed_files(folder):
        if not (prepared / name).is_file():
            raise UserError(f"{folder}: what was downloaded holds no {name}")
    return prepared, fetched


def get_task_files(folder: str, args: argparse.Namespace, recorded: Sums, trusted: Sums) -> None:
    """Download, prepare, check, record and install one task."""
    data_dir = Path(args.data_dir)
    # Inside the data folder, so that the last step is a renaming, and under a name that stays
    # the same, so that an interrupted download goes on.
    scratch = data_dir / SCRATCH_NAME / folder
    try:
        prepared, fetched = prepare_task(folder, args, scratch, trusted)
        files = task_files(folder, prepared)
        if args.checksums and not (fetched and fetched <= set(trusted)):
            check_named(folder, args.checksums, trusted)
        check_files(files, trusted, args.checksums or args.base_url, "the file is refused")
        check_files(files, recorded, data_dir / CHECKSUMS_NAME,
                    "delete its line there if the new version is right")  # fmt: skip
        files_to_move(prepared, data_dir / folder)
    except UserError:
        forget_downloads(scratch)
        raise
    # Recorded first: a task that is there and has no sums is taken for the user's own.
    recorded = {**recorded, **{name: file_sha256(path) for name, path in files.items()}}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(recorded.items())]
    write_text(data_dir / CHECKSUMS_NAME, "".join(lines))
    install(prepared, data_dir / folder)


def forget_downloads(scratch: Path) -> None:
    """Remove what proved to be no good, save unfinished downloads, which can go on."""
    for path in scratch.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.endswith((".part", ".part.json")):
            path.unlink()
    remove_if_empty(scratch)


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_present(folder: str, args: argparse.Namespace, recorded: Sums, trusted: Sums) -> None:
    """Hold the files of a task that is already there to the sums that are known of them."""
    target = Path(args.data_dir) / folder
    files = task_files(folder, target)
    advice = f"delete {target} to download it again"
    check_files(files, recorded, Path(args.data_dir) / CHECKSUMS_NAME, advice)
    needed = {f"{folder}/{name}" for name in needed_files(folder)}
    if not needed & set(trusted) and needed <= set(recorded):
        return  # the sums of an archive say nothing about its files; those of its download do
    if args.checksums:
        check_named(folder, args.checksums, trusted)
        check_files(files, trusted, args.checksums, "the file is refused")


def recorded_sums(data_dir: Path) -> Sums:
    """Return the sums of what was downloaded into `data_dir` before."""
    record = data_dir / CHECKSUMS_NAME
    return read_checksums(record) if record.is_file() else {}


def is_complete(folder: str, data_dir: Path) -> bool:
    return all((data_dir / folder / name).is_file() for name in needed_files(folder))


def trusted_sums(args: argparse.Namespace) -> Sums:
    """Return the sums that --checksums gives, else those that the mirror has."""
    base = args.base_url.rstrip("/")
    if args.checksums or base == GLUE_URL:  # which publishes none
        return read_checksums(args.checksums) if args.checksums else {}
    return mirror_checksums(base, Path(args.data_dir) / SCRATCH_NAME, **download_settings(args))


def main(args: argparse.Namespace) -> None:
    folders = parse_tasks(args.tasks)
    data_dir = Path(args.data_dir)

    # What is there already
    given = read_checksums(args.checksums) if args.checksums else {}
    for folder in folders:
        if is_complete(folder, data_dir):
            check_present(folder, args, recorded_sums(data_dir), given)
            logger.info("%s: complete in %s, skipped", folder, data_dir / folder)
    missing = [folder for folder in folders if not is_complete(folder, data_dir)]
    if not missing and not (data_dir / SCRATCH_NAME).exists():
        return

    # One task after the other; each is complete and recorded before the next begins
    with file_lock(data_dir / CHECKSUMS_NAME):
        try:
            trusted = trusted_sums(args) if missing else {}
            for folder in folders:
                if not is_complete(folder, data_dir):  # nor has another process been faster
                    get_task_files(folder, args, recorded_sums(data_dir), trusted)
                    logger.info("%s: written to %s", folder, data_dir / folder)
                shutil.rmtree(data_dir / SCRATCH_NAME / folder, ignore_errors=True)
        finally:
            remove_if_empty(data_dir / SCRATCH_NAME)
            for left_by_a_killed_call in data_dir.glob(f".{CHECKSUMS_NAME}.*.tmp"):
                left_by_a_killed_call.unlink()


if __name__ == "__main__":
    run_script(main, get_args_parser())
