"""Download the GLUE benchmark and lay it out as `<data_dir>/<TASK>/{train,dev,test}.tsv`.

Example:
    python download_glue.py --data_dir data/glue_data --tasks RTE,SST-2,CoLA,MRPC
    python download_glue.py --data_dir data/glue_data --source hub   # nyu-mll/glue, needs pyarrow

Archives come from the addresses that the benchmark publishes (or from `--base_url`). MRPC is
built here: `msr_paraphrase_train.txt` is split into train and dev by a list of dev ids, from
`--path_to_mrpc` or downloaded. GLUE publishes no checksums. So the SHA-256 of every file is
written to `<data_dir>/SHA256SUMS` (for `sha256sum -c`) when it is first downloaded, and every
later run is held to that; the first download itself is checked for completeness and against the
archive's own CRC only, unless `--checksums` names a file of sums that you trust. A task whose
train and dev files are there is skipped, an interrupted download goes on where it ended.

From the hub come the same rows as Parquet files, MRPC included, and are written as GLUE's files:
labels matched by name, and empty what the hub lacks (ids, genres, parses). The library obeys
HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.
"""

import argparse
import codecs
import logging
import re
import shutil
from collections.abc import Callable, Collection
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
from transformer.glue_hub import DATASET, DIAGNOSTIC, DIAGNOSTIC_FILE, hub_config, write_glue
from transformer.hub import fetch_dataset
from transformer.runtime import run_script
from transformer.table_files import import_pyarrow, iterate_tsv
from transformer.tasks import GLUE_TASKS, get_task

logger = logging.getLogger(__name__)

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
CHECKSUMS_NAME = "SHA256SUMS"
MRPC = "MRPC"
MRPC_TRAIN, MRPC_TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
MRPC_DEV_IDS = "mrpc_dev_ids.tsv"
MRPC_TEST_HEADER = "index\t#1 ID\t#2 ID\t#1 String\t#2 String"
DIAGNOSTIC_SOURCE = "AX.tsv"
# What the diagnostic set, and older scripts their tasks, are called as well.
OTHER_NAMES = {DIAGNOSTIC: DIAGNOSTIC, "ax": DIAGNOSTIC, "sst": "SST-2", "sts": "STS-B"}
FOLDERS = (*(task.folder for task in GLUE_TASKS.values()), DIAGNOSTIC)
# The archives, as they are published; each holds one folder named like the task's.
ARCHIVES = {folder: f"{folder}.zip" for folder in FOLDERS if folder not in (MRPC, DIAGNOSTIC)}
ARCHIVES |= {"QQP": "QQP-clean.zip", "QNLI": "QNLIv2.zip"}

Fetch = Callable[[str], Path]  # fetch(name): a downloaded file


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
    add("--source", choices=["glue", "hub"], default="glue",
        help=f"glue: the archives that the benchmark publishes; hub: {DATASET} on the Hugging Face"
        " hub")
    add("--base_url", type=str, default=GLUE_URL,
        help="address of a mirror (http, https or s3) that holds all files side by side; with"
        " --source hub: of a mirror of the hub")
    add("--checksums", type=Path, default=None,
        help="file in the format of sha256sum that names the archives (RTE.zip) or the files "
        "(RTE/train.tsv) of every task; what it does not name or what differs is refused")
    add_download_arguments(parser)
    return parser


def parse_tasks(text: str) -> list[str]:
    """Return the folders of the tasks named in `text`, in the order of the table."""
    names = [name.strip() for name in text.lower().split(",")]
    if "all" in names:
        return list(FOLDERS)
    chosen = {OTHER_NAMES.get(name) or get_task(name).folder for name in names}
    return [folder for folder in FOLDERS if folder in chosen]


def needed_files(folder: str) -> list[str]:
    """Return the files without which the pipeline cannot use a task."""
    if folder == DIAGNOSTIC:
        return [DIAGNOSTIC_FILE]
    return ["train.tsv", *get_task(folder).dev_files.values()]


# ------------------------------------------------------------------ checksums


def read_checksums(path: Path) -> dict[str, str]:
    """Read the format of sha256sum: 64 hexadecimal digits, white space, an optional `*`, a name."""
    sums = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if match := re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(?:\./)?(\S.*)", line.rstrip()):
            sums[match[2]] = match[1].lower()
        elif line.strip() and not line.startswith("#"):
            raise UserError(
                f"{path}, line {number}: expected 64 hexadecimal digits, two spaces and a name"
            )
    return sums


def check_sums(
    folder: str, place: Path, args: argparse.Namespace, sources: Collection[str] | None = None
) -> None:
    """Hold the files of a task in `place` to the sums of --checksums and of their first download.

    `sources` are the names of what the files were made from, if this is a download; the sums are
    recorded then. --checksums must name the files or the sources, or be of an earlier call.
    """
    record = Path(args.data_dir) / CHECKSUMS_NAME
    recorded = read_checksums(record) if record.is_file() else {}
    trusted = read_checksums(args.checksums) if args.checksums else {}
    found = {f"{folder}/{path.relative_to(place).as_posix()}": file_sha256(path)
             for path in all_files(place)}
    for source, sums in ((args.checksums, trusted), (record, recorded)):
        for name in found.keys() & sums.keys():
            if found[name] != sums[name]:
                raise UserError(
                    f"{name}: SHA-256 is {found[name]}; {source} says {sums[name]}; delete "
                    f"{record.parent / name} to download it again, or the line if it is outdated"
                )
    needed = {f"{folder}/{name}" for name in needed_files(folder)}
    are_named = needed <= {**recorded, **trusted}.keys()
    if args.checksums and not are_named and not (sources and set(sources) <= trusted.keys()):
        raise UserError(f"{args.checksums}: names neither the files of {folder} (such as "
                        f"{min(needed)}) nor what they are made from")
    if sources is not None:
        sums = sorted({**recorded, **found}.items())
        write_text(record, "".join(f"{digest}  {name}\n" for name, digest in sums))


# ------------------------------------------------------------------ preparing one task


def prepare_mrpc(path_to_mrpc: str, fetch: Fetch, target: Path) -> None:
    """Write MRPC's three files from its two sources and the ids of the dev pairs."""

    def source(name: str) -> Path:
        given = Path(path_to_mrpc, name)
        return given if path_to_mrpc and (name != MRPC_DEV_IDS or given.is_file()) else fetch(name)

    # Train and dev keep the order of the source.
    header, rows = read_mrpc(source(MRPC_TRAIN))
    dev_ids = read_dev_ids(source(MRPC_DEV_IDS), {(cells[1], cells[2]) for cells in rows})
    parts = {"train.tsv": [header], "dev.tsv": [header]}
    for cells in rows:
        name = "dev.tsv" if (cells[1], cells[2]) in dev_ids else "train.tsv"
        parts[name].append("\t".join(cells))

    # As in GLUE, test pairs are numbered and have no labels.
    _, rows = read_mrpc(source(MRPC_TEST))
    tests = ["\t".join([str(number), *cells[1:]]) for number, cells in enumerate(rows)]
    for name, lines in {**parts, "test.tsv": [MRPC_TEST_HEADER, *tests]}.items():
        write_text(target / name, "".join(f"{line}\n" for line in lines))


def read_mrpc(path: Path) -> tuple[str, list[list[str]]]:
    """Return the header line, byte-order mark included, and the five cells of each row."""
    rows = []
    for number, cells in iterate_tsv(path):
        if cells == [""]:
            continue
        if len(cells) != 5:
            raise UserError(f"{path}, line {number}: {len(cells)} columns; expected 5")
        rows.append(cells)
    if not rows:
        raise UserError(f"{path}: empty; expected a header and rows of 5 columns")
    # Kept as in the published files, which begin with the source's byte-order mark.
    mark = "\ufeff" if path.read_bytes().startswith(codecs.BOM_UTF8) else ""
    return mark + "\t".join(rows[0]), rows[1:]


def read_dev_ids(path: Path, known: Collection[tuple[str, str]]) -> Collection[tuple[str, ...]]:
    """Return the pairs of ids in a file of dev ids, which must be `known`."""
    pairs = {tuple(map(str.strip, cells)): number for number, cells in iterate_tsv(path)
             if cells != [""]}
    wrong = [number for pair, number in pairs.items()
             if pair not in known and (number > 1 or pair[0].isdigit())]  # or it is a header
    if wrong or pairs.keys().isdisjoint(known):
        raise UserError(f"{path}, line {min(wrong, default=1)}: expected two ids, separated by a "
                        f"tab, of a pair in {MRPC_TRAIN}")
    return pairs.keys()


# ------------------------------------------------------------------ putting it in place


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_complete(folder: str, data_dir: Path) -> bool:
    return all((data_dir / folder / name).is_file() for name in needed_files(folder))


def prepare_task(folder: str, path_to_mrpc: str, fetch: Fetch, scratch: Path) -> Path:
    """Return a folder in `scratch` with a task's files."""
    prepared = scratch / "unpacked" / folder
    if folder == MRPC:
        prepare_mrpc(path_to_mrpc, fetch, prepared)
    elif folder == DIAGNOSTIC:
        source = fetch(DIAGNOSTIC_SOURCE)
        prepared.mkdir(parents=True)
        shutil.copyfile(source, prepared / DIAGNOSTIC_FILE)
    else:
        extract_zip(fetch(ARCHIVES[folder]), scratch / "unpacked")
    for name in needed_files(folder):
        if not (prepared / name).is_file():
            raise UserError(f"{folder}: what was downloaded holds no {folder}/{name}")
    return prepared


def prepare_from_hub(
    folder: str, args: argparse.Namespace, scratch: Path
) -> tuple[Path, list[str]]:
    """Return a folder in `scratch` with a task's files, and the names of the hub's they are of."""
    config, prepared = hub_config(folder), scratch / "unpacked" / folder
    endpoint = None if args.base_url == GLUE_URL else args.base_url.rstrip("/")
    snapshot = fetch_dataset(DATASET, f"{config}/*.parquet", endpoint, **download_settings(args))
    names = [path.relative_to(snapshot).as_posix() for path in all_files(snapshot / config)]
    trusted = read_checksums(args.checksums) if args.checksums else {}
    for name in names:
        if (found := file_sha256(snapshot / name)) != trusted.get(name, found):
            raise UserError(f"{name}: SHA-256 is {found}; {args.checksums} says {trusted[name]}")
    write_glue(folder, snapshot / config, prepared)
    return prepared, names


def download_task(folder: str, args: argparse.Namespace, scratch: Path) -> None:
    """Download, prepare, check, record and move one task."""
    data_dir, sources = Path(args.data_dir), []
    trusted = read_checksums(args.checksums) if args.checksums else {}

    def fetch(name: str) -> Path:
        sources.append(name)
        published = MRPC_URL if name in (MRPC_TRAIN, MRPC_TEST) else GLUE_URL
        url = published if args.base_url == GLUE_URL else args.base_url.rstrip("/")
        return download(f"{url}/{name}", scratch / name, trusted.get(name),
                        **download_settings(args))

    if args.source == "hub":
        prepared, sources = prepare_from_hub(folder, args, scratch)
    else:
        prepared = prepare_task(folder, args.path_to_mrpc, fetch, scratch)
    moves = {path: data_dir / folder / path.relative_to(prepared) for path in all_files(prepared)}
    for path, place in moves.items():
        if place.exists() and file_sha256(place) != file_sha256(path):
            raise UserError(f"{place}: differs from what was downloaded; move it away and repeat")
    # Recorded first: a task that is there and has no sums is taken for the user's own.
    check_sums(folder, prepared, args, sources)
    for path, place in moves.items():  # train.tsv last: a task is not complete without it
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def clean(scratch: Path) -> None:
    """Remove what is there, unless a download has not ended, which a later call goes on with."""
    if not any(scratch.glob("*.part")):
        shutil.rmtree(scratch, ignore_errors=True)


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a task that is none, and for what --source hub does not go with."""
    parse_tasks(args.tasks)
    if args.source == "hub":
        import_pyarrow("--source hub")
        if args.path_to_mrpc:
            raise UserError(f"--path_to_mrpc {args.path_to_mrpc}: --source hub has MRPC's files;"
                            " expected one of the two")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    data_dir = Path(args.data_dir)
    for folder in parse_tasks(args.tasks):
        if is_complete(folder, data_dir):
            check_sums(folder, data_dir / folder, args)
            logger.info("%s: complete in %s, skipped", folder, data_dir / folder)
            continue
        # Inside the data folder, so that files only need a new name, and under a name that stays
        # the same, so that an interrupted download goes on.
        scratch = data_dir / f".{folder}.download"
        with file_lock(data_dir / CHECKSUMS_NAME):
            clean(scratch)
            try:
                if not is_complete(folder, data_dir):  # another process may have been faster
                    download_task(folder, args, scratch)
                    logger.info("%s: written to %s", folder, data_dir / folder)
            finally:
                clean(scratch)


if __name__ == "__main__":
    run_script(main, get_args_parser())
