"""download_glue.py against a mirror and a hub on this machine, and MRPC's split as published."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import REPO, SHARED, error_line, make_glue, make_rows
from huggingface_hub import constants
from server import COMMIT, FileServer, publish

import download_glue
from transformer.file_utils import UserError
from transformer.table_files import read_tsv
from transformer.tasks import GLUE_TASKS, Task, get_task, load_examples

PUBLISHED_MRPC = SHARED / "data" / "glue_data" / "MRPC"
# Rows of the source that the published training file in SHARED lacks, though dev lacks them too.
LOST_PAIRS = {("2750203", "2750153")}


def tsv(task: Task, rows: int = 5) -> bytes:
    return "".join("\t".join(row) + "\n" for row in make_rows(task, rows, seed=0)).encode()


def zipped(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def mrpc_source(first: int, rows: int, end: str = "\n") -> bytes:
    lines = ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for row in range(first, first + rows):
        lines.append(f'{row % 2}\t{row}\t{row + 1000}\t" one {row}\ttwo {row} .')
    return "".join(line + end for line in lines).encode()


@pytest.fixture
def mirror(server: FileServer) -> FileServer:
    """A server that has all files of the benchmark, small ones."""
    server.files = {
        "/AX.tsv": b"index\tsentence1\tsentence2\n0\ta\tb\n",
        "/msr_paraphrase_train.txt": mrpc_source(0, 10),
        "/msr_paraphrase_test.txt": mrpc_source(100, 4),
        "/mrpc_dev_ids.tsv": b"3\t1003\n8\t1008\n",
    }
    for folder, archive in download_glue.ARCHIVES.items():
        task = get_task(folder)
        names = ["train.tsv", "test.tsv", *task.dev_files.values()]
        members = {f"{folder}/{name}": tsv(task) for name in names}
        server.files[f"/{archive}"] = zipped({**members, f"__MACOSX/{folder}/._train.tsv": b"?"})
    return server


def run(data_dir: Path, mirror: FileServer | None = None, **flags) -> None:
    argv = ["--data_dir", str(data_dir), "--retry_delay", "0.01", "--attempts", "3"]
    if mirror is not None:
        argv += ["--base_url", mirror.url]
    for name, value in flags.items():
        argv += [f"--{name}", str(value)]
    download_glue.main(download_glue.get_args_parser().parse_args(argv))


def tree(folder: Path) -> list[str]:
    """The names of the files below `folder`, save those of locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.is_file() and path.suffix != ".lock")


def test_all_tasks_land_in_the_folders_that_the_pipeline_reads(mirror, tmp_path):
    run(tmp_path / "glue", mirror)
    for task in GLUE_TASKS.values():
        folder = tmp_path / "glue" / task.folder
        assert (folder / "test.tsv").is_file()
        for split in ("train", *task.dev_files):
            assert load_examples(task, folder, split)
    assert (tmp_path / "glue" / "diagnostic" / "diagnostic.tsv").is_file()
    names = {name.partition("/")[0] for name in tree(tmp_path / "glue")}
    assert names == {*download_glue.FOLDERS, "SHA256SUMS"}


def test_sums_are_recorded_and_later_calls_are_held_to_them_without_a_request(
    mirror, tmp_path, caplog
):
    glue, record = tmp_path / "glue", ["RTE/dev.tsv", "RTE/test.tsv", "RTE/train.tsv"]
    run(glue, mirror, tasks="rte")
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=glue, check=True)
    lines = (glue / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == record
    (glue / "RTE" / "train_aug.tsv").write_text("made later\n")
    mirror.requests.clear()
    with caplog.at_level("INFO"):
        run(glue, mirror, tasks="RTE")
    assert mirror.requests == [] and "RTE: complete" in caplog.text
    train = glue / "RTE" / "train.tsv"
    train.write_bytes(train.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"RTE/train.tsv: SHA-256 is .*SHA256SUMS says .*delete"):
        run(glue, mirror, tasks="rte")
    train.unlink()
    mirror.files["/RTE.zip"] = zipped({name: b"something else\n" for name in record})
    with pytest.raises(UserError, match="RTE/dev.tsv: differs from what was downloaded"):
        run(glue, mirror, tasks="rte")
    (glue / "RTE" / "dev.tsv").unlink()
    (glue / "RTE" / "test.tsv").unlink()
    with pytest.raises(UserError, match=r"RTE/\w+.tsv: SHA-256 is .*SHA256SUMS says"):
        run(glue, mirror, tasks="rte")
    assert tree(glue) == ["RTE/train_aug.tsv", "SHA256SUMS"]


def test_data_that_came_from_elsewhere_is_skipped_and_left_alone(tmp_path):
    make_glue(tmp_path / "glue" / "RTE", "rte")
    run(tmp_path / "glue", tasks="rte")
    assert tree(tmp_path / "glue") == ["RTE/dev.tsv", "RTE/train.tsv"]


@pytest.mark.parametrize("by", ["archive", "file"])
def test_given_checksums_are_enforced_and_must_name_the_task(mirror, tmp_path, by):
    digest = hashlib.sha256(tsv(get_task("rte"))).hexdigest()
    lines = {
        "archive": [f"{hashlib.sha256(mirror.files['/RTE.zip']).hexdigest()}  RTE.zip"],
        "file": [f"{digest}  RTE/train.tsv", f"{digest} *./RTE/dev.tsv"],
    }[by]
    sums = tmp_path / "sums"
    wrong = {
        r"SHA-256 is [0-9a-f]{64}": ["0" * 64 + line[64:] for line in lines],
        "names neither the files of RTE .*RTE/dev.tsv": ["0" * 64 + "  unrelated.zip"],
        "sums, line 1: expected 64": ["abc  RTE.zip"],
    }
    for message, bad_lines in wrong.items():
        sums.write_text("\n".join(bad_lines))
        with pytest.raises(UserError, match=message):
            run(tmp_path / "glue", mirror, tasks="rte", checksums=sums)
        assert tree(tmp_path) == ["sums"]
    sums.write_text("\n".join(lines))
    for _ in range(2):
        run(tmp_path / "glue", mirror, tasks="rte", checksums=sums)


def test_a_failed_download_names_the_address_and_an_interrupted_one_goes_on(mirror, tmp_path):
    members = {f"RTE/{name}.tsv": tsv(get_task("rte")) for name in ("train", "dev")}
    mirror.files["/RTE.zip"] = zipped({**members, "RTE/notes": os.urandom(500_000)})
    mirror.troubles["/RTE.zip"] = [{"sent": 300_000}, *[{"sent": 0}] * 3]
    with pytest.raises(UserError, match=f"{mirror.url}/RTE.zip: no complete response"):
        run(tmp_path / "glue", mirror, tasks="rte")
    run(tmp_path / "glue", mirror, tasks="rte")
    assert int(mirror.ranges()[-1].strip("bytes=-")) > 200_000
    assert tree(tmp_path / "glue") == ["RTE/dev.tsv", "RTE/notes", "RTE/train.tsv", "SHA256SUMS"]


@pytest.mark.parametrize("content", ["hostile", "cut", "other", "incomplete"])
def test_a_bad_archive_leaves_nothing_and_a_good_one_then_works(mirror, tmp_path, content):
    good = mirror.files["/RTE.zip"]
    mirror.files["/RTE.zip"] = {
        "hostile": zipped({"RTE/train.tsv": b"x", "../../../escaped.txt": b"x"}),
        "cut": good[: len(good) // 2],
        "other": zipped({"SST-2/train.tsv": b"x"}),
        "incomplete": zipped({"RTE/train.tsv": b"x"}),
    }[content]
    with pytest.raises(UserError, match="RTE"):
        run(tmp_path / "work" / "glue", mirror, tasks="rte")
    assert tree(tmp_path) == []
    mirror.files["/RTE.zip"] = good
    run(tmp_path / "work" / "glue", mirror, tasks="rte")
    assert (tmp_path / "work" / "glue" / "RTE" / "train.tsv").is_file()


def test_task_names_are_taken_in_any_case_and_an_unknown_one_lists_them():
    assert download_glue.parse_tasks("ALL") == list(download_glue.FOLDERS)
    assert download_glue.parse_tasks("sst2, STS-b,mnli,SST") == ["SST-2", "STS-B", "MNLI"]
    assert download_glue.parse_tasks("AX,Diagnostic") == ["diagnostic"]
    for folder in download_glue.FOLDERS:
        assert download_glue.parse_tasks(folder.lower()) == [folder]
    for text in ("rte,snli", "", ","):
        with pytest.raises(UserError, match="unknown task .*expected one of cola, sst-2, mrpc"):
            download_glue.parse_tasks(text)


# ------------------------------------------------------------------ MRPC


def mrpc_folder(path: Path, end: str = "\n", ids: bytes | None = b"3\t1003\n8\t1008\n") -> Path:
    path.mkdir()
    (path / "msr_paraphrase_train.txt").write_bytes(mrpc_source(0, 10, end))
    (path / "msr_paraphrase_test.txt").write_bytes(mrpc_source(100, 4, end))
    if ids is not None:
        (path / "mrpc_dev_ids.tsv").write_bytes(ids)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\r\n"])  # blank rows, too
def test_mrpc_is_split_by_the_dev_ids_without_a_network(tmp_path, end):
    source = mrpc_folder(tmp_path / "source", end)
    run(tmp_path / "glue", tasks="mrpc", path_to_mrpc=source)
    folder = tmp_path / "glue" / "MRPC"
    lines = mrpc_source(0, 10).decode().splitlines(keepends=True)
    assert (folder / "dev.tsv").read_bytes().decode() == "".join([lines[0], lines[4], lines[9]])
    rest = [line for line in lines if line not in (lines[4], lines[9])]
    assert (folder / "train.tsv").read_bytes().decode() == "".join(rest)
    test = (folder / "test.tsv").read_text().splitlines()
    assert test[0] == "index\t#1 ID\t#2 ID\t#1 String\t#2 String"
    assert test[2] == '1\t101\t1101\t" one 101\ttwo 101 .'


def test_mrpc_sources_may_lie_in_the_folder_of_the_task_and_lack_the_dev_ids(mirror, tmp_path):
    (tmp_path / "glue").mkdir()
    source = mrpc_folder(tmp_path / "glue" / "MRPC", ids=None)
    run(tmp_path / "glue", mirror, tasks="mrpc", path_to_mrpc=source)
    assert mirror.paths() == ["/mrpc_dev_ids.tsv"]
    assert len(load_examples("mrpc", source, "dev")) == 2
    assert (source / "msr_paraphrase_train.txt").is_file()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("mrpc_dev_ids.tsv", b"3\t1003\n4\t4\n", "mrpc_dev_ids.tsv, line 2: expected two ids"),
    ("mrpc_dev_ids.tsv", b"3\t1003\nx\n", "mrpc_dev_ids.tsv, line 2: expected two ids"),
    ("mrpc_dev_ids.tsv", b"", "mrpc_dev_ids.tsv, line 1: expected two ids"),
    ("msr_paraphrase_train.txt", None, "msr_paraphrase_train.txt: no such file"),
    ("msr_paraphrase_train.txt", b"", "msr_paraphrase_train.txt: empty"),
    ("msr_paraphrase_train.txt", b"a\tb\tc\td\te\n1\t2\n", "train.txt, line 2: 2 columns")])
def test_bad_mrpc_sources_name_file_and_line(tmp_path, name, content, message):
    source = mrpc_folder(tmp_path / "source")
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "glue", tasks="mrpc", path_to_mrpc=source)
    assert tree(tmp_path / "glue") == []


def test_the_mrpc_split_is_the_published_one_byte_for_byte(tmp_path):
    if not (PUBLISHED_MRPC / "msr_paraphrase_train.txt").is_file():
        pytest.skip(f"needs the published MRPC files in {PUBLISHED_MRPC}; set TINYBERT_SHARED")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        (source / name).write_bytes((PUBLISHED_MRPC / name).read_bytes())
    dev_rows = (PUBLISHED_MRPC / "dev.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
    ids = ["\t".join(row.split("\t")[1:3]) for row in dev_rows]
    (source / "mrpc_dev_ids.tsv").write_text("".join(f"{pair}\n" for pair in ids))
    run(tmp_path / "glue", tasks="mrpc", path_to_mrpc=source)
    folder = tmp_path / "glue" / "MRPC"
    assert (folder / "dev.tsv").read_bytes() == (PUBLISHED_MRPC / "dev.tsv").read_bytes()
    made = (folder / "train.tsv").read_bytes().splitlines(keepends=True)
    published = (PUBLISHED_MRPC / "train.tsv").read_bytes().splitlines(keepends=True)
    # 4076 pairs of the source = 408 of dev + 3668; this copy of train.tsv has 3667 of them.
    assert len(made) - 1 == 4076 - 408
    lost = [row for row in made if tuple(row.decode().split("\t")[1:3]) in LOST_PAIRS]
    assert [row for row in made if row not in lost] == published


# ------------------------------------------------------------------ the hub

DATASET = "nyu-mll/glue"
# The names of the hub's classes, in its order, and of its texts, where they are not GLUE's.
HUB_CLASSES = {"cola": ["unacceptable", "acceptable"], "sst-2": ["negative", "positive"],
               "mrpc": ["not_equivalent", "equivalent"], "qqp": ["not_duplicate", "duplicate"],
               "mnli": ["entailment", "neutral", "contradiction"],
               "wnli": ["not_entailment", "entailment"]}
HUB_TEXTS = {"mnli": ["premise", "hypothesis"], "mrpc": ["sentence1", "sentence2"]}
HUB_SPLITS = {"train": "train", "dev": "validation"}
MNLI_SPLITS = {"train": "train", "dev": "validation_matched", "dev_mm": "validation_mismatched"}


def write_split(path: Path, columns: dict[str, list], classes: list[str] | None) -> None:
    """Write a split as `datasets` does, with the class names in the schema; None: without."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({**columns, "idx": [*range(len(columns["label"]))]})
    if classes:
        feature = {"names": classes, "_type": "ClassLabel"}
        info = json.dumps({"info": {"features": {"label": feature}}})
        table = table.replace_schema_metadata({"huggingface": info})
    elif columns["label"] and isinstance(columns["label"][0], float):
        place = table.schema.get_field_index("label")
        table = table.set_column(place, "label", table["label"].cast(pyarrow.float32()))
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def write_hub_task(hub: Path, task: Task, glue: Path, named: bool = True) -> None:
    """Write the files in `glue` of a task as nyu-mll/glue has them."""
    names = HUB_TEXTS.get(task.name) or [name for name in (task.text_a, task.text_b) if name]
    classes = HUB_CLASSES.get(task.name) or [*task.labels]
    numbers = {name: number for number, name in enumerate(classes)}
    spelled = {label: name for name, label in task.spellings.items() if name in numbers}
    folder = hub / task.name.replace("-", "")
    splits = MNLI_SPLITS if task.name == "mnli" else HUB_SPLITS
    for split, stem in splits.items():
        rows = load_examples(task, glue, split)
        columns = {name: [(row.text_a, row.text_b)[place] for row in rows]
                   for place, name in enumerate(names)}
        labels = [float(row.label) if task.is_regression else numbers[spelled[row.label]]
                  for row in rows]
        write_split(folder / f"{stem}-00000-of-00001.parquet", {**columns, "label": labels},
                    classes if named and not task.is_regression else None)
    test = {**{name: [f"{name} of test"] for name in names}, "label": [-1]}
    for stem in ("test_matched", "test_mismatched") if task.name == "mnli" else ("test",):
        write_split(folder / f"{stem}-00000-of-00001.parquet", test, classes)


@pytest.fixture
def glue_hub(server, tmp_path, monkeypatch) -> FileServer:
    """A stand-in of the hub with GLUE's tasks, whose TSV files are in `published`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub = tmp_path / "hub"
    for task in GLUE_TASKS.values():
        published = make_glue(tmp_path / "published" / task.folder, task.name, rows=6, dev_rows=4)
        write_hub_task(hub, task, published)
    write_split(hub / "ax" / "test-00000-of-00001.parquet",
                {"premise": ["a"], "hypothesis": ["b"], "label": [-1]}, None)
    publish(server, hub, DATASET, kind="datasets")
    return server


def labelled(task: Task, folder: Path, split: str) -> list[tuple]:
    """The texts and labels of a split, scores as numbers."""
    return [(row.text_a, row.text_b, float(row.label) if task.is_regression else row.label)
            for row in load_examples(task, folder, split)]


def test_the_hub_gives_the_same_rows_in_the_same_layout(glue_hub, tmp_path):
    run(tmp_path / "glue", glue_hub, source="hub")
    for task in GLUE_TASKS.values():
        folder = tmp_path / "glue" / task.folder
        for split in ("train", *task.dev_files):
            assert labelled(task, folder, split) == labelled(
                task, tmp_path / "published" / task.folder, split)
        for name in ("test_matched.tsv", "test_mismatched.tsv") if task.name == "mnli" \
                else ("test.tsv",):
            header, row = read_tsv(folder / name)
            assert header[0] == "index" or (task.name == "qqp" and header[0] == "id")
            assert row[0] == "0" and len(row) == len(header) and task.label not in header
            texts = HUB_TEXTS.get(task.name) or [task.text_a, *filter(None, [task.text_b])]
            assert row[-len(texts):] == [f"{name} of test" for name in texts]
    assert read_tsv(tmp_path / "glue" / "RTE" / "dev.tsv")[0] == [
        "index", "sentence1", "sentence2", "label"]
    header = read_tsv(tmp_path / "glue" / "MNLI" / "dev_matched.tsv")[0]
    assert len(header) == 16 and header[8:11] == ["sentence1", "sentence2", "label1"]
    assert read_tsv(tmp_path / "glue" / "diagnostic" / "diagnostic.tsv") == [
        ["index", "sentence1", "sentence2"], ["0", "a", "b"]]
    assert len(read_tsv(tmp_path / "glue" / "CoLA" / "train.tsv")) == 6  # no header
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "glue", check=True)
    glue_hub.requests.clear()
    run(tmp_path / "glue", glue_hub, source="hub")
    assert glue_hub.requests == []


@pytest.mark.parametrize("name", ["mnli", "rte", "wnli"])
def test_label_numbers_without_names_follow_the_hubs_own_order(glue_hub, tmp_path, name):
    task = get_task(name)
    published = tmp_path / "published" / task.folder
    write_hub_task(tmp_path / "other", task, published, named=False)
    publish(glue_hub, tmp_path / "other", DATASET, kind="datasets")
    run(tmp_path / "glue", glue_hub, source="hub", tasks=name)
    assert labelled(task, tmp_path / "glue" / task.folder, "train") == labelled(
        task, published, "train")


def test_what_a_tsv_file_cannot_hold_becomes_a_space_and_unlabelled_rows_are_left_out(
    glue_hub, tmp_path, caplog
):
    rows = {"sentence1": ["one\ttwo", "three\r\nfour\n", "five", "six\u2028seven "],
            "sentence2": ['"a"', "b", "c", "d\r"], "label": [0, 1, -1, 1]}
    write_split(tmp_path / "hub" / "rte" / "train-00000-of-00001.parquet", rows,
                ["entailment", "not_entailment"])
    publish(glue_hub, tmp_path / "hub", DATASET, kind="datasets")
    with caplog.at_level("INFO"):
        run(tmp_path / "glue", glue_hub, source="hub", tasks="rte")
    assert read_tsv(tmp_path / "glue" / "RTE" / "train.tsv")[1:] == [
        ["0", "one two", '"a"', "entailment"], ["1", "three four ", "b", "not_entailment"],
        ["2", "six\u2028seven ", "d ", "not_entailment"]]
    assert "train.tsv: a tab or line end became a space in the texts of 3 rows" in caplog.text
    assert "passed over 1 rows with the label '-1'" in caplog.text


def test_the_hub_is_asked_as_its_variables_say_and_its_cache_serves_offline(glue_hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": glue_hub.url, "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "download_glue.py", "--source", "hub", "--tasks", "mrpc",
               "--data_dir"]
    subprocess.run([*command, tmp_path / "glue"], env=environment, cwd=REPO, check=True)
    path = f"/datasets/{DATASET}/resolve/{COMMIT}/mrpc/train-00000-of-00001.parquet"
    sent = [headers for place, headers in glue_hub.requests if place == path]
    assert len(sent) == 1 and sent[0]["authorization"] == "Bearer hf_secret"
    assert not any("/rte/" in place for place in glue_hub.paths())
    glue_hub.requests.clear()
    subprocess.run([*command, tmp_path / "again"], env={**environment, "HF_HUB_OFFLINE": "1"},
                   cwd=REPO, check=True)
    assert glue_hub.requests == []
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        assert (tmp_path / "glue" / "MRPC" / name).read_bytes() == (
            tmp_path / "again" / "MRPC" / name).read_bytes()


def test_files_of_the_hub_are_held_to_given_checksums(glue_hub, tmp_path):
    files = sorted((tmp_path / "hub" / "rte").iterdir())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  rte/{path.name}" for path in files]
    sums = tmp_path / "sums"
    sums.write_text("\n".join(["0" * 64 + lines[0][64:], *lines[1:]]))
    with pytest.raises(UserError, match=r"rte/test-.*: SHA-256 is .*sums says 0000"):
        run(tmp_path / "glue", glue_hub, source="hub", tasks="rte", checksums=sums)
    assert tree(tmp_path / "glue") == []
    sums.write_text("\n".join(lines))
    run(tmp_path / "glue", glue_hub, source="hub", tasks="rte", checksums=sums)
    assert len(tree(tmp_path / "glue")) == 4


def test_a_hub_that_does_not_answer_or_lacks_the_task_is_one_line(
    glue_hub, tmp_path, capsys, monkeypatch
):
    flags = ["--data_dir", tmp_path / "glue", "--source", "hub", "--tasks", "rte", "--attempts",
             "2", "--retry_delay", "0.01", "--base_url", glue_hub.url]
    message = error_line(capsys, download_glue, *flags, "--path_to_mrpc", tmp_path)
    assert "--path_to_mrpc" in message and "--source hub has MRPC's files" in message
    glue_hub.troubles[f"/api/datasets/{DATASET}/revision/main"] = [{"status": 503}] * 2
    message = error_line(capsys, download_glue, *flags)
    assert f"{DATASET} on the Hugging Face hub: cannot be reached" in message
    assert "folder" not in message
    publish(glue_hub, tmp_path / "hub" / "ax", DATASET, kind="datasets")
    assert "no train-*.parquet; expected nyu-mll/glue's files of RTE" in error_line(
        capsys, download_glue, *flags)
    assert tree(tmp_path / "glue") == []
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "--source hub: Parquet and Arrow files need the package pyarrow: pip install" \
        in error_line(capsys, download_glue, *flags)
