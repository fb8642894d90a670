"""Both sides of every stage that `run.py` measures: the yardstick, and this project as it is.

A side is a function that sets up (not timed) and returns a function from a `Load` to a `Timing`.
Ours goes through the functions that the scripts call. Each side runs in a process of its own
(`serve`), as each wants other process-wide settings and the peak memory is a process's.
"""

import contextlib
import io
import logging
import multiprocessing
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.flops import (
    TRAINING_PASSES,
    distillation_flops,
    forward_flops,
    masked_word_flops,
)
from transformer.augmentation import DataAugmentor, GloveIndex, is_plain_word
from transformer.batching import batches, padded_collate, padding_multiple
from transformer.distillation import (
    IntermediateLoss,
    IntermediateTeacher,
    PredictionLoss,
    freeze,
    show_nothing,
)
from transformer.evaluation import evaluate, predict_logits
from transformer.features import Features, load_features
from transformer.modeling import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.optimization import BertAdam, param_groups
from transformer.pretraining_data import PregeneratedDataset
from transformer.runtime import (
    compile_models,
    get_device,
    given_flags,
    resolve_precision,
    set_seed,
)
from transformer.tasks import TaskRows, TsvWriter, get_task, task_rows
from transformer.tokenization import BertTokenizer
from transformer.training import Collate, Learner, train

PREDICTION_EPOCHS = 3  # over which the teacher's logits, computed once, are spread
PREGENERATE_EPOCHS = 2
SEED = 42
STEPS = 1_000_000  # that the learning rate's schedule spans; more than are measured
MEMORY_STEPS = 20  # after which a training run has held all it will hold


class Load(NamedTuple):
    """How much a side is to do: a part of its rows, at most `length` word pieces each."""

    part: float
    length: int


class Timing(NamedTuple):
    """What it took.

    amount: rows, or megabytes of text times epochs.
    flops: the operations that the work needs at its true lengths; 0 where there are none.
    facts: other figures of this stage, by name.
    """

    amount: float
    seconds: float
    flops: float
    facts: dict[str, float]


@dataclass(frozen=True)
class Work:
    """What both sides of all stages share; the folder holds what `run.py` prepared.

    factor: scales the number of rows. teacher, students: arguments of `BertConfig`.
    vectors: number and width of the word vectors.
    """

    device: str
    folder: Path
    factor: float
    batch_size: int
    max_length: int
    teacher: dict[str, Any]
    students: tuple[dict[str, Any], ...]
    vectors: tuple[int, int]

    def teacher_config(self) -> BertConfig:
        return BertConfig.from_dict(self.teacher)

    def student_configs(self) -> list[BertConfig]:
        return [BertConfig.from_dict(student) for student in self.students]

    def tokenizer(self) -> BertTokenizer:
        return BertTokenizer.from_pretrained(self.folder / "vocabulary")

    def features(self, split: str, cache_dir: Path | None = None) -> Features:
        """Encode the SST-2 rows of a split."""
        task = get_task("sst-2")
        return load_features(task, self.folder / "glue" / task.folder, split, self.tokenizer(),
                             self.max_length, task.labels, cache_dir=cache_dir)

    def instances(self, length: int) -> PregeneratedDataset:
        """Read the instances of general distillation that were made for a length."""
        return PregeneratedDataset(
            self.folder / f"instances_{length}", 0, self.tokenizer(), length)


Run = Callable[[Load], Timing]
Side = Callable[..., Run]  # from a `Work` and the most `rows` it will be asked for


# ------------------------------------------------------------------ what both sides use


class Stopwatch:
    """Seconds inside a `with` block, the device's queued work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> "Stopwatch":
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._began


def spread(sizes: Sequence[int] | np.ndarray, rows: int, part: float) -> np.ndarray:
    """Choose `part` of `rows` rows, evenly over the sizes, so that any choice is alike.

    Where there are fewer rows than that, each serves several times.
    """
    count = max(1, round(rows * part))
    order = np.argsort(np.asarray(sizes), kind="stable")
    return order[((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)]


def sentences_of(table: TaskRows) -> list[str]:
    columns = [column for column in (table.text_a, table.text_b) if column is not None]
    return [row[column] for row in table.rows for column in columns]


def word_vectors(work: Work, table: TaskRows) -> tuple[list[str], np.ndarray]:
    """Make up vectors for the words of the rows, then of the vocabulary, then for others."""
    tokenizer = work.tokenizer()
    words = {word: None for sentence in sentences_of(table)
             for word in tokenizer.basic_tokenizer.tokenize(sentence)}
    words.update(dict.fromkeys(filter(str.isalpha, tokenizer.vocab)))
    count, width = work.vectors
    words.update(dict.fromkeys(f"word{number}" for number in range(count)))
    vectors = np.random.default_rng(SEED).standard_normal((count, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return list(words)[:count], vectors


def augmentation_rows(work: Work, name: str, rows: int, part: float) -> TaskRows:
    """Return rows of a task, evenly chosen over the lengths of their text."""
    task = get_task(name)
    table = task_rows(task, work.folder / "glue" / task.folder)
    sizes = [sum(len(row[column]) for column in (table.text_a, table.text_b)
                 if column is not None) for row in table.rows]
    return table._replace(rows=[table.rows[row] for row in spread(sizes, rows, part)])


def augmentation_flops(work: Work, table: TaskRows) -> float:
    """Count a forward pass for each masked word, and the head on that word alone."""
    tokenizer, config, lengths = work.tokenizer(), work.teacher_config(), []
    for sentence in sentences_of(table):
        words = tokenizer.basic_tokenizer.tokenize(sentence)
        pieces = tokenizer.encode_batch(words)
        masked = sum(len(ids) == 1 and is_plain_word(word)
                     for word, ids in zip(words, pieces, strict=True))
        lengths += [2 * sum(map(len, pieces)) + 3] * masked
    lengths = np.minimum(lengths, config.max_position_embeddings)
    return forward_flops(config, lengths) + masked_word_flops(config, len(lengths))


def prediction_flops(work: Work, lengths: np.ndarray) -> float:
    teacher, student = work.teacher_config(), work.student_configs()[0]
    return (forward_flops(teacher, lengths) / PREDICTION_EPOCHS
            + TRAINING_PASSES * forward_flops(student, lengths))


# ------------------------------------------------------------------ plain


def plain_batches(data: Any, work: Work, chosen: np.ndarray, length: int) -> Iterator[plain.Batch]:
    """Yield batches of rows in random order, padded to `length`."""
    device = torch.device(work.device)
    for start in range(0, len(chosen), work.batch_size):
        rows = data.collate(chosen[start : start + work.batch_size], pad_to=length)
        yield {name: values.to(device) for name, values in rows.items()}


def plain_training(
    work: Work, rows: int, read: Callable[[int], Any],
    steps: Sequence[Callable[[plain.Batch], Any]], flops: Callable[[np.ndarray], float],
) -> Run:
    """Return what trains one model after the other, `steps` being their training steps."""
    generator = np.random.default_rng(SEED)

    def run(load: Load) -> Timing:
        data = read(load.length)
        chosen = generator.permutation(spread(data.lengths, rows, load.part))
        watch = Stopwatch(torch.device(work.device))
        with watch:
            for step in steps:
                for batch in plain_batches(data, work, chosen, load.length):
                    step(batch)
        return Timing(len(chosen), watch.seconds, flops(data.lengths[chosen]), {})

    return run


def plain_general(work: Work, rows: int, students: int) -> Run:
    device, config = torch.device(work.device), work.teacher_config()
    teacher = plain.PlainBert(config).to(device)
    configs = work.student_configs()[:students]

    def step_of(student_config: BertConfig) -> Callable[[plain.Batch], Any]:
        student = plain.PlainBert(student_config, config.hidden_size).to(device)
        optimizer = plain.PlainAdam(student, rate=1e-4)
        return lambda batch: plain.general_step(student, teacher, optimizer, batch)

    return plain_training(work, rows, work.instances, [step_of(c) for c in configs],
                          lambda lengths: distillation_flops(config, configs, lengths))


def plain_task(work: Work, rows: int, prediction: bool) -> Run:
    device, config = torch.device(work.device), work.teacher_config()
    teacher = plain.PlainClassifier(config).to(device)
    student_config = work.student_configs()[0]
    student = plain.PlainClassifier(student_config, fit_size=config.hidden_size).to(device)
    optimizer = plain.PlainAdam(student, rate=5e-5)
    features = work.features("train")

    def flops(lengths: np.ndarray) -> float:
        if prediction:
            return prediction_flops(work, lengths)
        return distillation_flops(config, [student_config], lengths)

    return plain_training(
        work, rows, lambda length: features,
        [lambda batch: plain.task_step(student, teacher, optimizer, batch, prediction)], flops)


def plain_finetune(work: Work, rows: int) -> Run:
    config, features = work.teacher_config(), work.features("train")
    model = plain.PlainClassifier(config).to(work.device)
    optimizer = plain.PlainAdam(model, rate=2e-5)
    return plain_training(
        work, rows, lambda length: features,
        [lambda batch: plain.finetune_step(model, optimizer, batch)],
        lambda lengths: TRAINING_PASSES * forward_flops(config, lengths))


def plain_evaluation(work: Work, rows: int) -> Run:
    config, features = work.teacher_config(), work.features("dev")
    model = plain.PlainClassifier(config).to(work.device)

    def run(load: Load) -> Timing:
        chosen = spread(features.lengths, rows, load.part)
        watch = Stopwatch(torch.device(work.device))
        with watch:
            batch = features.collate(chosen, pad_to=load.length)
            plain.evaluate(model, {name: values.to(work.device) for name, values in batch.items()})
        return Timing(len(chosen), watch.seconds,
                      forward_flops(config, features.lengths[chosen]), {})

    return run


def plain_augmentation(work: Work, rows: int, name: str) -> Run:
    words, vectors = word_vectors(work, augmentation_rows(work, name, rows, 1.0))
    augmentor = plain.PlainAugmentor(
        plain.PlainMaskedLM(work.teacher_config()).to(work.device),
        plain.PlainTokenizer(list(work.tokenizer().vocab)), words, vectors,
        N=get_task(name).augmentation_n)

    def run(load: Load) -> Timing:
        table = augmentation_rows(work, name, rows, load.part)
        watch = Stopwatch(torch.device(work.device))
        with watch:
            for sentence in sentences_of(table):
                augmentor.augment(sentence)
        return Timing(len(table.rows), watch.seconds, augmentation_flops(work, table), {})

    return run


def plain_pregenerate(work: Work, rows: int) -> Run:
    tokenizer = plain.PlainTokenizer(list(work.tokenizer().vocab))

    def generate(corpus: Path, output_dir: Path) -> None:
        output_dir.mkdir()
        plain.pregenerate(corpus, tokenizer, output_dir, PREGENERATE_EPOCHS, work.max_length)

    return pregeneration(work, "plain", generate)


def pregeneration(work: Work, name: str, generate: Callable[[Path, Path], None]) -> Run:
    """Return what times `generate`(corpus, output folder) and weighs what it wrote."""
    output_dir = work.folder / f"output_{name}"

    def run(load: Load) -> Timing:
        shutil.rmtree(output_dir, ignore_errors=True)
        corpus = work.folder / f"corpus_{load.part}.txt"
        watch = Stopwatch(torch.device("cpu"))
        with watch:
            generate(corpus, output_dir)
        size = corpus.stat().st_size * PREGENERATE_EPOCHS
        written = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
        return Timing(size / 1e6, watch.seconds, 0.0, {"bytes_per_byte": written / size})

    return run


# ------------------------------------------------------------------ ours


class Setting(NamedTuple):
    """How the scripts set this process up: the device, and the precision to compute in."""

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def of(cls, work: Work) -> "Setting":
        device = get_device(no_cuda=work.device == "cpu")
        return cls(device, resolve_precision("auto", device))

    def learner(self, model: nn.Module, loss: nn.Module) -> Learner:
        optimizer = BertAdam(param_groups(model, 0.01), lr=5e-5, warmup=0.1, t_total=STEPS)
        return Learner(model, loss, optimizer, self.device, self.dtype)

    def collate(self, data: Any) -> Collate:
        return padded_collate(data, padding_multiple(self.device))


def train_once(
    work: Work, setting: Setting, learners: list[Learner], teach: Callable, data: Any,
    collate: Collate, chosen: np.ndarray, generator: torch.Generator,
) -> float:
    """Train on the chosen rows once; returns the seconds."""
    order = batches(data.lengths[chosen], work.batch_size, generator,
                    padding_multiple(setting.device))
    epoch = (collate, [chosen[np.asarray(batch)] for batch in order])
    watch = Stopwatch(setting.device)
    with watch:
        for _ in train(learners, teach, [epoch], len(order), 1, setting.device):
            pass
    return watch.seconds


def our_general(work: Work, rows: int, students: int) -> Run:
    setting, config = Setting.of(work), work.teacher_config()
    encoder = freeze(BertModel(config, add_pooler=False), setting.dtype, setting.device)
    configs, learners = work.student_configs()[:students], []
    for student_config in configs:
        student = TinyBertForPreTraining(student_config, fit_size=config.hidden_size)
        learners.append(setting.learner(student.to(setting.device), IntermediateLoss(student)))
    teach = IntermediateTeacher(encoder, [c.num_hidden_layers for c in configs])
    compile_models(None, setting.device, teach, *(learner.loss for learner in learners))
    generator = torch.Generator().manual_seed(SEED)

    def run(load: Load) -> Timing:
        data = work.instances(load.length)
        chosen = spread(data.lengths, rows, load.part)

        def seconds(learners: list[Learner]) -> float:
            return train_once(work, setting, learners, teach, data, setting.collate(data), chosen,
                              generator)

        together, facts = seconds(learners), {}
        if students > 1 and load.part == 1.0:
            facts["gain_of_one_pass"] = sum(seconds([one]) for one in learners) / together
        return Timing(len(chosen), together,
                      distillation_flops(config, configs, data.lengths[chosen]), facts)

    return run


def our_task_models(work: Work, setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Return the frozen teacher and the student of task distillation."""
    config = work.teacher_config()
    teacher = freeze(TinyBertForSequenceClassification(config), setting.dtype, setting.device)
    student = TinyBertForSequenceClassification(
        work.student_configs()[0], fit_size=config.hidden_size)
    return teacher, student.to(setting.device)


def our_intermediate(work: Work, rows: int) -> Run:
    setting, features = Setting.of(work), work.features("train")
    teacher, student = our_task_models(work, setting)
    learner = setting.learner(student, IntermediateLoss(student, is_student=True))
    teach = IntermediateTeacher(teacher.bert, [student.config.num_hidden_layers])
    compile_models(None, setting.device, learner.loss, teach)
    generator = torch.Generator().manual_seed(SEED)

    def run(load: Load) -> Timing:
        chosen = spread(features.lengths, rows, load.part)
        seconds = train_once(work, setting, [learner], teach, features, setting.collate(features),
                             chosen, generator)
        flops = distillation_flops(teacher.config, [student.config], features.lengths[chosen])
        return Timing(len(chosen), seconds, flops, {})

    return run


def our_prediction(work: Work, rows: int) -> Run:
    from task_distill import with_teacher_logits

    setting, features = Setting.of(work), work.features("train")
    teacher, student = our_task_models(work, setting)
    learner = setting.learner(student, PredictionLoss(student))
    compile_models(None, setting.device, learner.loss)
    generator = torch.Generator().manual_seed(SEED)

    def run(load: Load) -> Timing:
        chosen = spread(features.lengths, rows, load.part)
        subset = features.subset(chosen)
        watch = Stopwatch(setting.device)
        with watch:
            logits = predict_logits(
                teacher, subset, setting.device, work.batch_size, setting.dtype)
        collate = with_teacher_logits(setting.collate(subset), logits)
        seconds = train_once(work, setting, [learner], show_nothing, subset, collate,
                             np.arange(len(subset)), generator)
        return Timing(len(chosen), seconds + watch.seconds / PREDICTION_EPOCHS,
                      prediction_flops(work, subset.lengths),
                      {"teacher_rows_per_second": len(chosen) / watch.seconds,
                       "student_rows_per_second": len(chosen) / seconds})

    return run


def our_finetune(work: Work, rows: int) -> Run:
    from finetune_teacher import LabelLoss

    setting, features = Setting.of(work), work.features("train")
    model = TinyBertForSequenceClassification(work.teacher_config()).to(setting.device)
    learner = setting.learner(model, LabelLoss(model))
    compile_models(None, setting.device, learner.loss)
    generator = torch.Generator().manual_seed(SEED)

    def run(load: Load) -> Timing:
        chosen = spread(features.lengths, rows, load.part)
        seconds = train_once(work, setting, [learner], show_nothing, features,
                             setting.collate(features), chosen, generator)
        flops = TRAINING_PASSES * forward_flops(model.config, features.lengths[chosen])
        return Timing(len(chosen), seconds, flops, {})

    return run


def our_evaluation(work: Work, rows: int) -> Run:
    setting, features = Setting.of(work), work.features("dev")
    model = TinyBertForSequenceClassification(work.teacher_config())
    freeze(model, setting.dtype, setting.device)

    def run(load: Load) -> Timing:
        subset = features.subset(spread(features.lengths, rows, load.part))
        watch = Stopwatch(setting.device)
        with watch:
            evaluate(model, subset, "sst-2", setting.device, plain.EVAL_BATCH, setting.dtype)
        return Timing(len(subset), watch.seconds, forward_flops(model.config, subset.lengths), {})

    return run


def our_augmentation(work: Work, rows: int, name: str) -> Run:
    from data_augmentation import augmented_rows, cut

    setting, task, tokenizer = Setting.of(work), get_task(name), work.tokenizer()
    model = freeze(BertForMaskedLM(work.teacher_config()), setting.dtype, setting.device)
    words, vectors = word_vectors(work, augmentation_rows(work, name, rows, 1.0))

    def run(load: Load) -> Timing:
        table = augmentation_rows(work, name, rows, load.part)
        # New ones each time: they remember neighbours and word pieces.
        glove = GloveIndex(words, vectors)
        augmentor = DataAugmentor(model, tokenizer, glove, N=task.augmentation_n)
        watch = Stopwatch(setting.device)
        with watch:
            for part in cut(len(table.rows), len(table.rows)):
                for _ in augmented_rows(table, augmentor, part):
                    pass
        return Timing(len(table.rows), watch.seconds, augmentation_flops(work, table), {})

    return run


def our_pregenerate(work: Work, rows: int, workers: int) -> Run:
    def generate(corpus: Path, output_dir: Path) -> None:
        pregenerate(work.folder / "vocabulary", corpus, output_dir, work.max_length,
                    PREGENERATE_EPOCHS, workers)

    return pregeneration(work, f"ours_{workers}", generate)


def pregenerate(
    vocabulary: Path, corpus: Path, output_dir: Path, length: int, epochs: int, workers: int = 1
) -> None:
    """Run pregenerate_training_data.py's work in this process, silently."""
    import pregenerate_training_data as script

    parser = script.get_args_parser()
    values = {"train_corpus": corpus, "bert_model": vocabulary, "output_dir": output_dir,
              "max_seq_len": length, "epochs_to_generate": epochs, "num_workers": workers}
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        script.main(args)


def write_many_rows(work: Work, rows: int) -> None:
    """Write an augmented SST-2 file of `rows` rows: those of the sample, their words shuffled."""
    task, order = get_task("sst-2"), random.Random(SEED)
    folder = work.folder / "glue" / task.folder
    table = task_rows(task, folder)
    with TsvWriter(folder / task.files["aug"]) as writer:
        writer.write(table.header)
        for number in range(rows):
            cells = list(table.rows[number % len(table.rows)])
            words = cells[table.text_a].split()
            order.shuffle(words)
            cells[table.text_a] = " ".join(words)
            writer.write(cells)


def our_memory(work: Work, rows: int) -> Run:
    """Read many augmented rows as task_distill.py does, and start to train on them."""
    setting = Setting.of(work)
    write_many_rows(work, rows)
    teacher, student = our_task_models(work, setting)
    learner = setting.learner(student, IntermediateLoss(student, is_student=True))
    teach = IntermediateTeacher(teacher.bert, [student.config.num_hidden_layers])
    with torch.device("meta"):  # the teacher's own are no parameters any more: they are packed
        shape = TinyBertForSequenceClassification(work.teacher_config())
    weights = sum(p.numel() for p in shape.parameters()) * (setting.dtype or torch.float32).itemsize
    weights += sum(p.numel() * p.element_size() for p in student.parameters())

    def run(load: Load) -> Timing:
        watch = Stopwatch(setting.device)
        with watch:
            features = work.features("aug", cache_dir=work.folder / "cache")
        order = batches(features.lengths, work.batch_size, torch.Generator().manual_seed(SEED))
        epoch = (setting.collate(features), order)
        for _ in train([learner], teach, [epoch], MEMORY_STEPS, 1, setting.device):
            pass
        return Timing(len(features), watch.seconds, 0.0, {"weights": weights})

    return run


# ------------------------------------------------------------------ the stages


@dataclass(frozen=True)
class Stage:
    """One line of the table. The rows are those of one timed run on a CPU, with factor 1.

    `training`: works in steps, so at least one whole step is measured. `by_length`: the rate at
    shorter lengths is measured too.
    """

    title: str
    unit: str
    plain: Side
    ours: Side
    plain_rows: int
    our_rows: int
    training: bool = False
    by_length: bool = False

    def side(self, name: str, work: Work) -> Callable[[Work], Run]:
        """Return what sets up one side for its number of rows."""
        rows = round(work.factor * (self.plain_rows if name == "plain" else self.our_rows))
        return partial(getattr(self, name), rows=max(work.batch_size if self.training else 1, rows))


STAGES = {
    "general": Stage(
        "general, 4L", "rows/s", partial(plain_general, students=1),
        partial(our_general, students=1), 128, 256, training=True, by_length=True),
    "general-both": Stage(
        "general, 4L + 6L", "rows/s", partial(plain_general, students=2),
        partial(our_general, students=2), 32, 64, training=True),
    "intermediate": Stage(
        "intermediate, SST-2", "rows/s", partial(plain_task, prediction=False), our_intermediate,
        64, 1024, training=True),
    "prediction": Stage(
        "prediction, SST-2", "rows/s", partial(plain_task, prediction=True), our_prediction,
        64, 1024, training=True),
    "finetune": Stage(
        "fine-tuning, SST-2", "rows/s", plain_finetune, our_finetune, 32, 512, training=True),
    "augmentation-sst2": Stage(
        "augmentation, SST-2", "rows/s", partial(plain_augmentation, name="sst-2"),
        partial(our_augmentation, name="sst-2"), 32, 256),
    "augmentation-rte": Stage(
        "augmentation, RTE", "rows/s", partial(plain_augmentation, name="rte"),
        partial(our_augmentation, name="rte"), 6, 24),
    "evaluation": Stage(
        "evaluation, SST-2 dev", "rows/s", plain_evaluation, our_evaluation, 64, 872),
    "pregenerate-1": Stage(
        "pregenerate, 1 worker", "MB/s", plain_pregenerate, partial(our_pregenerate, workers=1),
        1, 1),
    "pregenerate-2": Stage(
        "pregenerate, 2 workers", "MB/s", plain_pregenerate, partial(our_pregenerate, workers=2),
        1, 1),
}


# ------------------------------------------------------------------ the process of one side


class Failure(NamedTuple):
    """What a side that stopped says of it."""

    text: str


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: on its GPU if it has used one."""
    if device.type == "cuda" and (held := torch.cuda.max_memory_allocated(device)):
        return held
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss where this can be had: it starts at that of the process that made this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(pipe: Connection, set_up: Callable[[Work], Run], work: Work) -> None:
    """Set one side up, then answer: a `Load` with its `Timing`, "memory" with the peak in bytes.

    None, or a parent that is gone, ends it; an error is answered with a `Failure`.
    """
    logging.getLogger().setLevel(logging.ERROR)
    multiprocessing.set_start_method(None, force=True)  # the scripts' default, not this process's
    device = torch.device(work.device)
    try:
        random.seed(SEED)
        set_seed(SEED)
        run = set_up(work)
        pipe.send("ready")
        while (message := pipe.recv()) is not None:
            pipe.send(peak_memory(device) if message == "memory" else run(message))
    except EOFError:
        return
    except Exception:
        pipe.send(Failure(traceback.format_exc()))


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Return the operations a second of the best of several square matrix products."""
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        watch = Stopwatch(device)
        with watch, torch.inference_mode():
            product: Tensor = first @ second
        best = min(best, watch.seconds)
    del product
    return 2 * size**3 / best
