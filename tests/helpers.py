"""Tiny models, vocabularies, GLUE folders and corpora that the tests of the scripts share."""

import fcntl
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

import finetune_teacher  # noqa: E402
import general_distill  # noqa: E402
import predict  # noqa: E402
import task_distill  # noqa: E402
from transformer.checkpoint import save_pretrained  # noqa: E402
from transformer.modeling import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.runtime import run_script  # noqa: E402
from transformer.table_files import write_tsv  # noqa: E402
from transformer.tasks import GLUE_TASKS, Task, get_task  # noqa: E402
from transformer.tokenization import BertTokenizer  # noqa: E402

SHARED = Path(os.environ.get("TINYBERT_SHARED", REPO.parent / "shared"))
GOLDEN = Path(__file__).parent / "golden"

GOOD = ["good", "great", "lovely", "fine", "happy"]
BAD = ["bad", "awful", "ugly", "poor", "sad"]
NEUTRAL = ["the", "a", "film", "was", "book", "story", "and", "very", "we", "saw", "it", "of"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, *GOOD, *BAD, *NEUTRAL, "##s", "##ly", ".", ","]


# ------------------------------------------------------------------ models


def write_vocab(folder: Path, pieces: list[str] = PIECES, lower: bool = True) -> BertTokenizer:
    """Write a vocabulary into `folder` and return its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{p}\n" for p in pieces), encoding="utf-8")
    tokenizer = BertTokenizer(folder / "vocab.txt", lower)
    tokenizer.save_vocabulary(folder)
    return tokenizer


def tiny_config(**changes) -> BertConfig:
    """A BERT of 4 layers, 16 wide, without dropout unless `changes` say so."""
    values = {
        "vocab_size": len(PIECES), "hidden_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        # Wide weights, so that a random model's outputs differ from row to row.
        "initializer_range": 0.25,
    }
    return BertConfig.from_dict({**values, **changes})


def make_model(folder: Path, model_class=TinyBertForSequenceClassification, seed: int = 0,
               labels: tuple[str, ...] | None = None, model_arguments: dict | None = None,
               **changes):
    """Save a random model with vocabulary in `folder`; returns it, in eval mode."""
    torch.manual_seed(seed)
    if labels is not None:
        changes["id2label"] = dict(enumerate(labels))
    config = tiny_config(**changes)
    model = model_class(config, **(model_arguments or {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fit_dense" not in name and parameter.dim() == 1:
                # Biases and LayerNorms at 0 and 1 would hide that they were not loaded.
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_pretrained(model, folder, write_vocab(folder), finished=model_arguments is None)
    return model.eval()


def make_masked_lm(folder: Path, pieces: list[str], positions: int) -> Path:
    """Save a BERT of two layers with these word pieces, whose random head proposes any of them."""
    tokenizer = write_vocab(folder, [*SPECIAL, *pieces])
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=positions, initializer_range=0.5,
    )
    save_pretrained(BertForMaskedLM(config), folder, tokenizer)
    return folder


def random_vectors(path: Path, words: list[str]) -> Path:
    """Write word vectors of six random numbers each."""
    generator = np.random.default_rng(0)
    path.write_text("".join(
        f"{word} {' '.join(f'{x:.4f}' for x in generator.standard_normal(6))}\n"
        for word in words), encoding="utf-8")
    return path


def config_folder(folder: Path, **changes) -> Path:
    """Write only a config.json, as `tinybert_4l_config` has it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tiny_config(**changes).to_dict())
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def random_batch(rows: int = 3, length: int = 9, vocab: int = len(PIECES), seed: int = 0):
    """Random (input_ids, token_type_ids, attention_mask), padded at the end of each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    segments = (torch.arange(length) >= lengths[:, None] // 2).long() * mask
    return ids * mask, segments, mask


# ------------------------------------------------------------------ GLUE


def sentence(rng: random.Random, mood: list[str]) -> str:
    words = rng.choices(NEUTRAL, k=rng.randint(1, 5)) + rng.choices(mood, k=rng.randint(1, 2))
    rng.shuffle(words)
    return " ".join(words) + " ."


def make_rows(task: Task, count: int, seed: int) -> list[list[str]]:
    """Rows in the task's own columns; the label can be seen from the words."""
    rng = random.Random(seed)
    columns = task.columns or ["id", *filter(None, (task.text_a, task.text_b)), task.label]
    if task.is_regression:
        labels = [f"{rng.uniform(0, 5):.2f}" for _ in range(count)]
    else:
        labels = [task.labels[row % len(task.labels)] for row in range(count)]
        rng.shuffle(labels)
    rows = [] if task.columns else [columns]
    for label in labels:
        place = 0 if task.is_regression else task.labels.index(label)
        cells = dict.fromkeys(columns, "x")
        cells[task.text_a] = sentence(rng, (BAD, GOOD, NEUTRAL)[place])
        if task.text_b is not None:
            cells[task.text_b] = sentence(rng, NEUTRAL)
        cells[task.label] = label
        rows.append(list(cells.values()))
    return rows


def make_glue(folder: Path, name: str = "SST-2", rows: int = 24, dev_rows: int = 12,
              seed: int = 0, augmented: int = 0) -> Path:
    """Write the files of one task into `folder`; returns it.

    Every second one of the `augmented` rows, at most `rows`, is train's own.
    """
    task = get_task(name)
    write_tsv(folder / "train.tsv", train := make_rows(task, rows, seed))
    for place, file in enumerate(task.dev_files.values(), start=1):
        write_tsv(folder / file, make_rows(task, dev_rows, seed + place))
    if augmented:
        others = make_rows(task, augmented, seed + 10)
        others[1::2] = train[1 : len(others) : 2]
        write_tsv(folder / "train_aug.tsv", others)
    return folder


# ------------------------------------------------------------------ pregenerated corpus


def make_pregenerated(folder: Path, rows: int = 10, epochs: int = 1, max_length: int = 16,
                      seed: int = 0) -> Path:
    """Write epochs in the format of pregenerate_training_data.py."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(epochs):
        lines = []
        for _ in range(rows):
            first = rng.choices(NEUTRAL, k=rng.randint(1, 5))
            second = rng.choices(GOOD + BAD, k=rng.randint(1, max_length - 3 - len(first)))
            lines.append(json.dumps({
                "tokens": ["[CLS]", *first, "[SEP]", *second, "[SEP]"],
                "segment_ids": [0] * (len(first) + 2) + [1] * (len(second) + 1),
                "is_random_next": rng.random() < 0.5,
                "masked_lm_positions": [], "masked_lm_labels": [],
            }))
        (folder / f"epoch_{epoch}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"epoch_{epoch}_metrics.json").write_text(
            json.dumps({"num_training_examples": rows, "max_seq_len": max_length}),
            encoding="utf-8")
    return folder


# ------------------------------------------------------------------ scripts


def run(module, *arguments) -> None:
    """Run a script in this process, as its command line would."""
    run_script(module.main, module.get_args_parser(), [str(a) for a in arguments])


def predicted(folder: Path, rows: list[tuple[str, ...]]) -> list[dict[str, float]]:
    """What predict.py says of each row of one text or two: probabilities by label, or the score."""
    texts = [dict(zip(("text", "text_pair"), row, strict=False)) for row in rows]
    path = folder.parent / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in texts), encoding="utf-8")
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as printed:
        run(predict, "--model", folder, "--input_file", path, "--format", "jsonl", "--no_cuda",
            "--precision", "fp32")
        printed.seek(0)
        answers = [json.loads(line) for line in printed]
    return [answer.get("probabilities", {"LABEL_0": answer.get("score")}) for answer in answers]


def kprune_script() -> ModuleType:
    """Import K-prune's main.py; its other modules can be imported from then on."""
    sys.path.insert(0, str(REPO / "K-prune" / "src"))
    return importlib.import_module("main")


def run_process(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(REPO / script), *map(str, arguments)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def error_line(capsys, module, *arguments) -> str:
    """Run a script that must fail as a user's mistake; returns its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(module, *arguments)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message.startswith(f"{module.get_args_parser().prog}: error: "), message
    assert message.endswith("\n") and message.count("\n") == 1, message
    assert "Traceback" not in message
    return message.strip()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, as another run that writes into it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
    os.close(descriptor)


class ScriptSetup:
    """What a script reads, in the folder `root`; `arguments(output, *more)` is its command line.

    trained: the model that training starts from.
    """

    script: ModuleType
    root: Path
    trained: Path

    def run(self, output: str, *more) -> Path:
        """Run the script; returns the folder it wrote."""
        run(self.script, *self.arguments(output, *more))
        return self.root / output

    def expect_error(self, capsys, *more, contains=()) -> None:
        """The run fails with one line that has `contains`, and writes nothing."""
        message = error_line(capsys, self.script, *self.arguments("out", *more))
        for text in contains:
            assert text in message
        assert not (self.root / "out").exists()


class TaskSetup(ScriptSetup):
    """A GLUE folder, a teacher of four layers and a general student of two, narrower."""

    script = task_distill

    def __init__(self, root, name="SST-2", **glue):
        self.root, self.task = root, get_task(name)
        self.data = make_glue(root / "data", name, **glue)
        self.teacher = root / "teacher"
        self.student = self.trained = root / "student"
        make_model(self.teacher, labels=self.task.labels or ("LABEL_0",))
        make_model(self.student, TinyBertForPreTraining, seed=1, num_hidden_layers=2,
                   hidden_size=12, model_arguments={"fit_size": 16})

    def arguments(self, output, *more):
        return ["--teacher_model", self.teacher, "--student_model", self.student,
                "--data_dir", self.data, "--task_name", self.task.name,
                "--output_dir", self.root / output, "--train_batch_size", 8,
                "--precision", "fp32", "--no_cuda", *more]


class GeneralSetup(ScriptSetup):
    """A pregenerated corpus, a teacher of four layers and the config of a narrower student."""

    script = general_distill

    def __init__(self, root, **corpus):
        self.root = root
        self.corpus = make_pregenerated(root / "corpus", **corpus)
        self.teacher, self.student = root / "teacher", root / "student"
        make_model(self.teacher, BertForMaskedLM)
        self.trained = self.student
        config_folder(self.student, num_hidden_layers=2, hidden_size=12)

    def arguments(self, output, *more):
        return ["--pregenerated_data", self.corpus, "--teacher_model", self.teacher,
                "--student_model", self.student, "--output_dir", self.root / output,
                "--train_batch_size", 4, "--precision", "fp32", "--no_cuda", *more]


class FinetuneSetup(ScriptSetup):
    """A GLUE folder and a classifier with random weights."""

    script = finetune_teacher

    def __init__(self, root, name="SST-2", **glue):
        self.root, self.task = root, get_task(name)
        self.data = make_glue(root / self.task.folder, name, **glue)
        self.model = self.trained = root / "model"
        make_model(self.model, labels=self.task.labels or ("LABEL_0",), num_hidden_layers=2)

    def arguments(self, output, *more):
        return ["--task_name", self.task.name, "--data_dir", self.data, "--bert_model",
                self.model, "--output_dir", self.root / output, "--train_batch_size", 8,
                "--precision", "fp32", "--no_cuda", *more]


def read_json(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_log(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items())


ALL_TASKS = list(GLUE_TASKS)
