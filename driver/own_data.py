"""Say what reproduction.sh has to know of a user's own data and models, as bash assignments.

All that is wrong with them is one line on stderr here, before anything is planned. A teacher that
has a classifier for the labels is taken as it is (TEACHER_EPOCHS=0); another BERT gets a new one.
"""

import argparse
import hashlib
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from driver.copy_task import task_files
from transformer.file_utils import UserError, read_json
from transformer.own_tasks import TASK_NAME, find_files, find_task
from transformer.runtime import run_script
from transformer.tasks import GLUE_TASKS, Task, label_order, plain_name

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
    return parser


# ------------------------------------------------------------------ data


def slug_of(task: Task) -> str:
    """Return the task's name for folders and settings: a-z, 0-9 and _, a letter first."""
    if task.is_glue:
        return plain_name(task.name)
    slug = re.sub("[^a-z0-9]+", "_", task.name.lower()).strip("_")
    return slug if slug[:1].isalpha() else f"task_{slug}".rstrip("_")


def content(task: Task, source: Path) -> str:
    """Return a hash of the files of a task's splits and of its description."""
    digest = hashlib.sha256(repr(task).encode())
    for path, place in task_files(task, source):
        with path.open("rb") as file:
            digest.update(f"{place}\0{hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:16]


def missing_shares(source: Path, shares: dict[str, float]) -> dict[str, float]:
    """Return the shares of the splits that have no file, by their flags' names, and say so."""
    description = (source.parent if source.is_file() else source) / TASK_NAME
    settings = read_json(description) if description.is_file() else {}
    if not source.exists() or plain_name(source.resolve().name) in map(plain_name, GLUE_TASKS):
        return {}
    files = settings.get("files") or find_files(source)
    missing = {f"{split}_share": share for split, share in shares.items()
               if share and split not in files and f"{split}_share" not in settings}
    for name, share in missing.items():
        logger.info("no %s file: %g of the training rows, by a hash of their texts (%s)",
                    name.removesuffix("_share"), share, name.upper())
    return missing


def describe_tasks(sources: list[str],
                   shares: dict[str, float]) -> Iterator[tuple[str, str, Task]]:
    """Yield (variable, value, task) for each task; names that clash are a `UserError`."""
    taken = {plain_name(name): f"GLUE's {task.folder}" for name, task in GLUE_TASKS.items()}
    for source in sources:
        missing = missing_shares(Path(source), shares)
        task = find_task(None, source, **missing)
        slug = slug_of(task)
        if slug in taken and not task.is_glue:
            raise UserError(f"TASKS: {source} is called {slug}, as is {taken[slug]}; expected"
                            ' another "name" in its task.json')
        taken[slug] = source
        key = task.folder if task.is_glue else slug
        splits = [*task.dev_files, "test"] if "test" in task.splits else []
        for name, value in {
            "SLUG": slug, "SOURCE": source,
            "SHARES": " ".join(f"--{name} {share:g}" for name, share in missing.items()),
            "AUG_FILE": task.files["aug"], "EVAL_SPLITS": " ".join(splits),
            "CONTENT": content(task, Path(source)),
        }.items():
            yield f"{name}[{key}]", value, task
        yield "OWN+", f"({key})", task


# ------------------------------------------------------------------ models


def describe_models(args: argparse.Namespace, task: Task) -> Iterator[tuple[str, str]]:
    """Yield (variable, value) on the teacher and the student, whose shapes must fit the task."""
    from transformer.checkpoint import WEIGHT_FORMS, weights_record  # here: torch takes seconds
    from transformer.config import BertConfig, find_config
    from transformer.distillation import check_layer_heads
    from transformer.hub import fetch_model
    from transformer.tokenization import BertTokenizer

    def read(model: str) -> tuple[Path, BertConfig, str]:
        """Return a model's folder and configuration, and a hash of what can change in them."""
        folder = fetch_model(model, weights=False, attempts=2)
        config = BertConfig.from_json_file(find_config(folder))
        try:
            config.check_length(length, model)
        except UserError as error:
            raise UserError(f"{error}; MAX_SEQ_LENGTH={config.max_position_embeddings}"
                            " fits") from error
        parts = [find_config(folder).read_text(encoding="utf-8")]
        if has_weights(Path(model)):
            parts.append(weights_record(model)["source_sha256"])
        return folder, config, hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def has_weights(folder: Path) -> bool:
        return any((folder / name).is_file() for name in WEIGHT_FORMS)

    # Teacher
    length = args.max_seq_length or task.max_seq_length
    folder, teacher, teacher_content = read(args.teacher)
    if Path(args.teacher).is_dir() and not has_weights(Path(args.teacher)):
        raise UserError(f"--teacher {args.teacher}: no weights there; expected a BERT")
    pieces = len(BertTokenizer.from_pretrained(folder))
    teacher.check_vocabulary(pieces, args.teacher)
    kept = keeps_classifier(args, task, folder, teacher)
    if kept:
        yield "TEACHER_EPOCHS", "0"
        logger.info("teacher: %s as it is, its classifier has the labels %s", args.teacher,
                    ", ".join(label_order(task, teacher.id2label)) or "of a score")
    else:
        logger.info("teacher: %s gets a new classifier and is fine-tuned", args.teacher)
    yield "NEW_CLASSIFIER", "no" if kept else "yes"
    yield "TEACHER_CONTENT", teacher_content
    yield "LENGTH", str(length)

    # Student
    if not args.student:
        depth = teacher.num_hidden_layers
        layers = args.num_layers or max(
            (n for n in range(1, depth // 2 + 1) if depth % n == 0), default=1)
        yield from {"STUDENT_START": "copied", "STUDENT_LAYERS": str(layers)}.items()
        if layers > depth or depth % layers:
            raise UserError(f"STUDENT_LAYERS={layers}: expected a number that divides the"
                            f" teacher's {depth} layers")
        logger.info("student: %d of the teacher's %d layers", layers, depth)
        return
    _, student, student_content = read(args.student)
    try:
        check_layer_heads(teacher, student)
    except UserError as error:
        raise UserError(f"--student {args.student}: {error}") from error
    random = Path(args.student).is_dir() and not has_weights(Path(args.student))
    if not random:
        student.check_vocabulary(pieces, args.student)
    yield from {"STUDENT_START": "random" if random else "given",
                "STUDENT_CONTENT": student_content}.items()
    logger.info("student: %s%s", args.student, ", random weights" if random else "")


def keeps_classifier(args: argparse.Namespace, task: Task, folder: Path, teacher: object) -> bool:
    """Say whether a teacher has the task's classifier; one for other labels is a `UserError`."""
    kinds = str(read_json(folder / "config.json").get("architectures") or "")
    if args.masked_lm == "yes" and kinds and not re.search("MaskedLM|PreTraining", kinds):
        raise UserError(f"--vectors: {args.teacher} has no masked-LM head ({kinds}); expected"
                        " AUGMENTATION_MODEL=FOLDER_OR_HUB_ID, a BERT that has one")
    if "SequenceClassification" not in kinds or args.new_classifier == "yes":
        return False
    try:
        teacher.check_task(args.teacher)
        label_order(task, teacher.id2label)
        if teacher.num_labels != task.num_labels:
            raise UserError(f"it has {teacher.num_labels} outputs, the task {task.num_labels}")
    except UserError as error:
        raise UserError(f"--teacher {args.teacher}: {error} (NEW_CLASSIFIER=yes trains a new"
                        " classifier)") from error
    return True


def main(args: argparse.Namespace) -> None:
    task = None
    for variable, value, described in describe_tasks(
            args.tasks, {"dev": args.dev_share, "test": args.test_share}):
        task = task or described
        print(f"{variable}={value if variable == 'OWN+' else shlex.quote(value)}")
    if args.teacher:
        for variable, value in describe_models(args, task):
            print(f"{variable}={shlex.quote(value)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_script(main, get_args_parser())
