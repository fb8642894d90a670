"""Measure one side of one stage in this process: the plain baseline, or this project as it is.

`run.py` calls it, a process for each turn: the sides want different process-wide settings, and the
peak memory is a process's. A side is a function that sets up models and data (not timed) and
returns a `Job` to time; ours goes through the functions that the scripts call. The first run does
not count. Prints one line of JSON: amount, seconds, operations and peak memory.

Example (`run.py` makes the folder):
    python benchmarks/stages.py ours general FOLDER
"""

import argparse
import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks import flops, plain
from benchmarks.measure import peak_memory, seconds_of
from transformer.augmentation import DataAugmentor, GloveIndex
from transformer.batching import Collate, batches, padded_collate, padding_multiple
from transformer.distillation import (
    IntermediateLoss,
    IntermediateTeacher,
    PredictionLoss,
    map_layers,
    no_teacher,
)
from transformer.evaluation import evaluate, predict_logits
from transformer.features import Features, load_features
from transformer.file_utils import read_json
from transformer.modeling import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
    freeze,
)
from transformer.optimization import BertAdam, param_groups
from transformer.pretraining_data import PregeneratedDataset
from transformer.runtime import (
    compile_models,
    get_device,
    resolve_precision,
    run_script,
    set_seed,
)
from transformer.tasks import TaskRows, get_task, task_rows
from transformer.tokenization import BertTokenizer
from transformer.training import StudentTrainer, train
from transformer.words import is_plain_word

CHINESE_CHARACTERS = 8000
PREDICTION_EPOCHS = 3  # over which the teacher's logits, computed once, are spread
PREGENERATE_EPOCHS = 2
RUNS = 2  # of which the first does not count
SEED = 42
SCHEDULE_STEPS = 1_000_000  # that the learning rate's schedule spans; more than are measured


class Job(NamedTuple):
    """What is timed.

    amount: rows, or megabytes of text (times epochs, of pregenerate).
    lengths: word pieces of each row that goes through the models, for the count of operations.
    """

    amount: float
    lengths: np.ndarray
    run: Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """What both sides of all stages share; the folder holds the inputs that `run.py` prepared.

    scale: multiplies the number of rows. teacher, students: arguments of `BertConfig`.
    vectors: number and width of the word vectors.
    """

    folder: Path
    device: str
    scale: float
    batch_size: int
    max_length: int
    teacher: dict[str, Any]
    students: list[dict[str, Any]]
    vectors: list[int]

    def teacher_config(self) -> BertConfig:
        return BertConfig.from_dict(self.teacher)

    def student_configs(self, count: int = 1) -> list[BertConfig]:
        return [BertConfig.from_dict(student) for student in self.students[:count]]

    def tokenizer(self) -> BertTokenizer:
        return BertTokenizer.from_pretrained(self.folder / "vocabulary")

    def features(self, split: str) -> Features:
        """Encode the SST-2 rows of a split."""
        task = get_task("sst-2")
        return load_features(task, self.folder / "glue" / task.folder, split, self.tokenizer(),
                             self.max_length, task.labels)

    def instances(self) -> PregeneratedDataset:
        """Read the instances of general distillation."""
        return PregeneratedDataset(
            self.folder / "instances", 0, self.tokenizer(), self.max_length)


Side = Callable[[Setup, int], Job]  # for a number of rows


# ------------------------------------------------------------------ what both sides use


def spread(sizes: Sequence[int] | np.ndarray, rows: int) -> np.ndarray:
    """Choose `rows` rows evenly over the sizes, so that any number of them is alike.

    Where there are fewer rows than that, each serves several times.
    """
    order = np.argsort(np.asarray(sizes), kind="stable")
    return order[((np.arange(rows) + 0.5) * len(order) / rows).astype(np.int64)]


def sentences_of(table: TaskRows) -> list[str]:
    """Return the one or two sentences of each row, one after the other."""
    columns = [column for column in (table.text_a, table.text_b) if column is not None]
    return [row[column] for row in table.rows for column in columns]


def word_vectors(setup: Setup, table: TaskRows) -> tuple[list[str], np.ndarray]:
    """Make random vectors for the words of the rows, then of the vocabulary, then for others."""
    tokenizer = setup.tokenizer()
    words = {word: None for sentence in sentences_of(table)
             for word in tokenizer.basic_tokenizer.tokenize(sentence)}
    words.update(dict.fromkeys(filter(str.isalpha, tokenizer.vocab)))
    count, width = setup.vectors
    words.update(dict.fromkeys(f"word{index}" for index in range(count)))
    vectors = np.random.default_rng(SEED).standard_normal((count, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return list(words)[:count], vectors


def augmentation_rows(setup: Setup, rows: int, name: str) -> TaskRows:
    """Return rows of a task, evenly chosen over the lengths of their text."""
    task = get_task(name)
    table = task_rows(task, setup.folder / "glue" / task.folder)
    sizes = [sum(len(row[column]) for column in (table.text_a, table.text_b)
                 if column is not None) for row in table.rows]
    return table._replace(rows=[table.rows[index] for index in spread(sizes, rows)])


def masked_lengths(setup: Setup, table: TaskRows) -> np.ndarray:
    """Return the input length for each word that augmentation masks."""
    tokenizer, lengths = setup.tokenizer(), []
    for sentence in sentences_of(table):
        words = tokenizer.basic_tokenizer.tokenize(sentence)
        pieces = tokenizer.encode_batch(words)
        masked = sum(len(ids) == 1 and is_plain_word(word)
                     for word, ids in zip(words, pieces, strict=True))
        lengths += [2 * sum(map(len, pieces)) + 3] * masked
    return np.minimum(lengths, setup.teacher_config().max_position_embeddings)


def chinese_vocab(setup: Setup) -> dict[str, int]:
    """Make a vocabulary of ideographs, and of what setup's has beside them, by id."""
    ideographs = map(chr, range(0x4E00, 0x4E00 + CHINESE_CHARACTERS))
    pieces = dict.fromkeys([*setup.tokenizer().vocab, *ideographs, *"\uff0c\u3002\uff01"])
    return dict(zip(pieces, range(len(pieces)), strict=True))


def chinese_lines(setup: Setup, count: int, seed: int) -> list[str]:
    """Make lines of 1 to 5 clauses of ideographs, by Zipf's law, with English words and numbers."""
    rng = random.Random(seed)
    ranks = np.random.default_rng(seed).zipf(1.2, 64 * count) % CHINESE_CHARACTERS
    ideographs = (0x4E00 + ranks).astype("<u2").tobytes().decode("utf-16-le")
    words = [word for word in setup.tokenizer().vocab if word.isascii() and word.isalpha()]
    lines, start = [], 0
    for _ in range(count):
        line = ""
        for _ in range(rng.randint(1, 5)):
            end = start + rng.randint(2, 15)
            insert = rng.choice([*[""] * 8, rng.choice(words), str(rng.randrange(1000))])
            line += ideographs[start:end] + insert + rng.choice("\uff0c\u3002\uff01\uff0c,")
            start = end % (len(ideographs) - 15)
        lines.append(line)
    return lines


def tokenize_job(setup: Setup, rows: int, tokenize: Callable[[list[str]], object]) -> Job:
    """Tokenize Chinese lines, new ones in each run."""
    texts = [chinese_lines(setup, rows, SEED + run) for run in range(RUNS)]
    size = len("".join(texts[0]).encode())
    return Job(size / 1e6, np.zeros(0), lambda: tokenize(texts.pop()))


# ------------------------------------------------------------------ operations of a stage


def student_flops(setup: Setup, lengths: np.ndarray, students: int = 1) -> float:
    return flops.distillation_flops(
        setup.teacher_config(), setup.student_configs(students), lengths)


def prediction_flops(setup: Setup, lengths: np.ndarray) -> float:
    [student] = setup.student_configs()
    return (flops.forward_flops(setup.teacher_config(), lengths) / PREDICTION_EPOCHS
            + flops.TRAINING_PASSES * flops.forward_flops(student, lengths))


def teacher_flops(setup: Setup, lengths: np.ndarray, passes: int = 1) -> float:
    return passes * flops.forward_flops(setup.teacher_config(), lengths)


def augmentation_flops(setup: Setup, lengths: np.ndarray) -> float:
    """Count a forward pass for each masked word, and the head on that word alone."""
    config = setup.teacher_config()
    return flops.forward_flops(config, lengths) + flops.masked_word_flops(config, len(lengths))


# ------------------------------------------------------------------ plain


def plain_training(
    setup: Setup, rows: int, data: Any, steps: Sequence[Callable[[plain.Batch], Any]]
) -> Job:
    """Train one model after the other, `steps` being their training steps."""
    generator = np.random.default_rng(SEED)
    chosen = spread(data.lengths, rows)

    def run() -> None:
        shuffled = generator.permutation(chosen)
        for step in steps:
            for start in range(0, rows, setup.batch_size):
                batch = data.collate(shuffled[start : start + setup.batch_size],
                                     pad_to=setup.max_length)
                step({name: values.to(setup.device) for name, values in batch.items()})

    return Job(rows, data.lengths[chosen], run)


def plain_general(setup: Setup, rows: int, students: int) -> Job:
    width = setup.teacher_config().hidden_size
    teacher = plain.PlainBert(setup.teacher_config()).to(setup.device)

    def step_of(config: BertConfig) -> Callable[[plain.Batch], Any]:
        student = plain.PlainBert(config, width).to(setup.device)
        optimizer = plain.PlainAdam(student, rate=1e-4)
        return lambda batch: plain.general_step(student, teacher, optimizer, batch)

    return plain_training(setup, rows, setup.instances(),
                          [step_of(config) for config in setup.student_configs(students)])


def plain_task(setup: Setup, rows: int, prediction: bool) -> Job:
    config, [student_config] = setup.teacher_config(), setup.student_configs()
    teacher = plain.PlainClassifier(config).to(setup.device)
    student = plain.PlainClassifier(student_config, fit_size=config.hidden_size).to(setup.device)
    optimizer = plain.PlainAdam(student, rate=5e-5)
    return plain_training(
        setup, rows, setup.features("train"),
        [lambda batch: plain.task_step(student, teacher, optimizer, batch, prediction)])


def plain_finetune(setup: Setup, rows: int) -> Job:
    model = plain.PlainClassifier(setup.teacher_config()).to(setup.device)
    optimizer = plain.PlainAdam(model, rate=2e-5)
    return plain_training(setup, rows, setup.features("train"),
                          [lambda batch: plain.finetune_step(model, optimizer, batch)])


def plain_evaluation(setup: Setup, rows: int) -> Job:
    features = setup.features("dev")
    model = plain.PlainClassifier(setup.teacher_config()).to(setup.device)
    chosen = spread(features.lengths, rows)

    def run() -> None:
        batch = features.collate(chosen, pad_to=setup.max_length)
        plain.evaluate(model, {name: values.to(setup.device) for name, values in batch.items()})

    return Job(rows, features.lengths[chosen], run)


def plain_tokenize(setup: Setup, rows: int) -> Job:
    vocab = chinese_vocab(setup)
    return tokenize_job(setup, rows, lambda lines: [plain.tokenize(line, vocab) for line in lines])


# ------------------------------------------------------------------ ours


def device_and_dtype(setup: Setup) -> tuple[torch.device, torch.dtype | None]:
    """Set this process up as the scripts do; returns the device, and the dtype to compute in."""
    device = get_device(no_cuda=setup.device == "cpu")
    return device, resolve_precision("auto", device)


def make_trainer(setup: Setup, model: nn.Module, loss: nn.Module) -> StudentTrainer:
    device, dtype = device_and_dtype(setup)
    optimizer = BertAdam(
        param_groups(model, 0.01), lr=5e-5, warmup=0.1, t_total=SCHEDULE_STEPS)
    return StudentTrainer(model.to(device), loss, optimizer, device, dtype)


def task_models(setup: Setup) -> tuple[nn.Module, nn.Module]:
    """Return the frozen teacher and the student of task distillation."""
    device, dtype = device_and_dtype(setup)
    config, [student_config] = setup.teacher_config(), setup.student_configs()
    teacher = freeze(TinyBertForSequenceClassification(config), dtype, device)
    return teacher, TinyBertForSequenceClassification(student_config, fit_size=config.hidden_size)


def our_training(
    setup: Setup, data: Any, rows: np.ndarray, trainers: list[StudentTrainer], teacher: Callable,
    collate: Collate | None = None,
) -> Callable[[], None]:
    """Return what trains students side by side on one pass of the teacher, once over the rows."""
    device = trainers[0].device
    multiple = padding_multiple(device)
    collate = collate or padded_collate(data, multiple)
    generator = torch.Generator().manual_seed(SEED)
    modules = [teacher, *(trainer.loss for trainer in trainers)]
    compile_models(None, device, *(m for m in modules if isinstance(m, nn.Module)))

    def run() -> None:
        order = batches(data.lengths[rows], setup.batch_size, generator, multiple)
        epoch = (collate, [[rows[np.asarray(batch)]] for batch in order])
        for _ in train(trainers, teacher, [epoch], len(order), device):
            pass

    return run


def training_job(
    setup: Setup, rows: int, trainers: list[StudentTrainer], teacher: Callable, data: Any
) -> Job:
    chosen = spread(data.lengths, rows)
    return Job(rows, data.lengths[chosen], our_training(setup, data, chosen, trainers, teacher))


def our_general(setup: Setup, rows: int, students: int) -> Job:
    device, dtype = device_and_dtype(setup)
    config, configs = setup.teacher_config(), setup.student_configs(students)
    trainers = []
    for student_config in configs:
        student = TinyBertForPreTraining(student_config, fit_size=config.hidden_size)
        layer_map = map_layers(config.num_hidden_layers, student_config.num_hidden_layers)
        trainers.append(make_trainer(setup, student, IntermediateLoss(student, layer_map)))
    encoder = freeze(BertModel(config, add_pooler=False), dtype, device)
    teacher = IntermediateTeacher(
        encoder, (layer for trainer in trainers for layer in trainer.loss.score_layers))
    return training_job(setup, rows, trainers, teacher, setup.instances())


def our_intermediate(setup: Setup, rows: int) -> Job:
    classifier, student = task_models(setup)
    layer_map = map_layers(classifier.config.num_hidden_layers, student.config.num_hidden_layers)
    trainer = make_trainer(setup, student, IntermediateLoss(student, layer_map, is_student=True))
    teacher = IntermediateTeacher(classifier.bert, layer_map[0])
    return training_job(setup, rows, [trainer], teacher, setup.features("train"))


def our_prediction(setup: Setup, rows: int) -> Job:
    """Compute the teacher's logits once, and train on them for some epochs."""
    (device, dtype), features = device_and_dtype(setup), setup.features("train")
    teacher, student = task_models(setup)
    subset = features.subset(spread(features.lengths, rows))
    collate, logits = padded_collate(subset, padding_multiple(device)), torch.zeros(rows, 2)
    train_epoch = our_training(
        setup, subset, np.arange(rows), [make_trainer(setup, student, PredictionLoss(student))],
        no_teacher, lambda batch: collate(batch) | {"teacher_logits": logits[batch]})

    def run() -> None:
        logits.copy_(predict_logits(teacher, subset, device, setup.batch_size, dtype))
        for _ in range(PREDICTION_EPOCHS):
            train_epoch()

    return Job(PREDICTION_EPOCHS * rows, np.tile(subset.lengths, PREDICTION_EPOCHS), run)


def our_finetune(setup: Setup, rows: int) -> Job:
    from finetune_teacher import LabelLoss

    model = TinyBertForSequenceClassification(setup.teacher_config())
    trainer = make_trainer(setup, model, LabelLoss(model))
    return training_job(setup, rows, [trainer], no_teacher, setup.features("train"))


def our_evaluation(setup: Setup, rows: int) -> Job:
    (device, dtype), features = device_and_dtype(setup), setup.features("dev")
    model = freeze(TinyBertForSequenceClassification(setup.teacher_config()), dtype, device)
    subset = features.subset(spread(features.lengths, rows))
    return Job(rows, subset.lengths, lambda: evaluate(
        model, subset, "sst-2", device, plain.EVAL_BATCH, dtype))


def our_augmentation(setup: Setup, rows: int, name: str) -> Job:
    (device, dtype), tokenizer = device_and_dtype(setup), setup.tokenizer()
    model = freeze(BertForMaskedLM(setup.teacher_config()), dtype, device)
    table = augmentation_rows(setup, rows, name)
    words, vectors = word_vectors(setup, table)
    # One for each run, as it remembers neighbours and word pieces.
    augmentors = [DataAugmentor(model, tokenizer, GloveIndex(words, vectors),
                                N=get_task(name).augmentation_n) for _ in range(RUNS)]
    return Job(rows, masked_lengths(setup, table),
               lambda: augmentors.pop().augment(sentences_of(table)))


def our_tokenize(setup: Setup, rows: int) -> Job:
    return tokenize_job(setup, rows, BertTokenizer(chinese_vocab(setup)).encode_flat)


def our_pregenerate(setup: Setup, rows: int, workers: int) -> Job:
    size = (setup.folder / "corpus.txt").stat().st_size * PREGENERATE_EPOCHS
    return Job(size / 1e6, np.zeros(0), lambda: pregenerate(
        setup.folder, Path(mkdtemp(dir=setup.folder)) / "output", setup.max_length,
        PREGENERATE_EPOCHS, workers))


def pregenerate(
    folder: Path, output_dir: Path, length: int, epochs: int, workers: int = 1
) -> None:
    """Run pregenerate_training_data.py in this process."""
    import pregenerate_training_data as script

    values = {"train_corpus": folder / "corpus.txt", "bert_model": folder / "vocabulary",
              "output_dir": output_dir, "max_seq_len": length, "epochs_to_generate": epochs,
              "num_workers": workers}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    run_script(script.main, script.get_args_parser(), words)


# ------------------------------------------------------------------ the stages


@dataclass(frozen=True)
class Stage:
    """One line of the table: a rate in rows a second, of text in megabytes.

    plain_rows, our_rows: of one timed run on a CPU, with scale 1. flops: the operations that the
    work needs at its true lengths. training: works in steps, so one whole step at least is timed.
    """

    plain: Side | None
    ours: Side
    plain_rows: int
    our_rows: int
    flops: Callable[[Setup, np.ndarray], float] | None = None
    training: bool = False

    def set_up(self, side: str, setup: Setup) -> Job:
        """Set one side up for its number of rows."""
        rows = round(setup.scale * (self.plain_rows if side == "plain" else self.our_rows))
        return getattr(self, side)(setup, max(setup.batch_size if self.training else 1, rows))


STAGES = {
    "general": Stage(
        partial(plain_general, students=1), partial(our_general, students=1), 128, 256,
        student_flops, training=True),
    "general-both": Stage(
        partial(plain_general, students=2), partial(our_general, students=2), 32, 64,
        partial(student_flops, students=2), training=True),
    "intermediate": Stage(
        partial(plain_task, prediction=False), our_intermediate, 64, 1024, student_flops,
        training=True),
    "prediction": Stage(
        partial(plain_task, prediction=True), our_prediction, 64, 1024, prediction_flops,
        training=True),
    "finetune": Stage(
        plain_finetune, our_finetune, 32, 512,
        partial(teacher_flops, passes=flops.TRAINING_PASSES), training=True),
    "augmentation-sst2": Stage(
        None, partial(our_augmentation, name="sst-2"), 32, 256, augmentation_flops),
    "augmentation-rte": Stage(
        None, partial(our_augmentation, name="rte"), 6, 24, augmentation_flops),
    "evaluation": Stage(plain_evaluation, our_evaluation, 64, 872, teacher_flops),
    "tokenize-chinese": Stage(plain_tokenize, our_tokenize, 5_000, 50_000),
    "pregenerate-1": Stage(None, partial(our_pregenerate, workers=1), 1, 1),
    "pregenerate-2": Stage(None, partial(our_pregenerate, workers=2), 1, 1),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks/stages.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("side", choices=["plain", "ours"], help="which implementation to measure")
    add("stage", choices=STAGES, metavar="STAGE", help=f"what to measure: {', '.join(STAGES)}")
    add("folder", type=Path, help="folder with the inputs and the setup.json that run.py wrote")
    return parser


def main(args: argparse.Namespace) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    setup, stage = Setup(args.folder, **read_json(args.folder / "setup.json")), STAGES[args.stage]
    random.seed(SEED)
    set_seed(SEED)
    job, device = stage.set_up(args.side, setup), torch.device(setup.device)
    job.run()
    seconds = seconds_of(job.run, device)
    print(json.dumps({
        "amount": job.amount, "seconds": seconds, "peak_memory": peak_memory(device),
        "flops": stage.flops(setup, job.lengths) if stage.flops else 0}))


if __name__ == "__main__":
    run_script(main, get_args_parser())
