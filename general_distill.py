"""Distil a general-purpose student from a BERT teacher that is not fine-tuned.

General distillation (paper, section 3.2) matches attention scores, hidden states and embeddings
on a large corpus; there is no prediction loss. Several students share the teacher's forward pass.

Examples:
    python general_distill.py --pregenerated_data data/json_wiki \
        --teacher_model models/bert-base-uncased --student_model tinybert_4l_config \
        --reduce_memory --do_lower_case --train_batch_size 64 \
        --output_dir models/distilled_tinybert_4l --eval_step 10000
    python general_distill.py --pregenerated_data data/json_wiki \
        --teacher_model models/bert-base-uncased --reduce_memory --do_lower_case \
        --student_model tinybert_4l_config tinybert_6l_config \
        --output_dir models/distilled_tinybert_4l models/distilled_tinybert_6l \
        --learning_rate 1e-4 5e-5 --train_batch_size 64 --eval_step 10000
"""

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from transformer.checkpoint import save_config, save_weights
from transformer.distillation import (
    IntermediateLoss,
    IntermediateTeacher,
    check_heads,
    freeze,
    map_layers,
)
from transformer.evaluation import write_results
from transformer.file_utils import WEIGHTS_NAME, UserError, s3_address
from transformer.glue import BATCH_UNIT, batches, padded_collate, padding_multiple
from transformer.modeling import BertModel, TinyBertForPreTraining
from transformer.optimization import BertAdam, param_groups
from transformer.pretraining_data import PregeneratedDataset, count_epochs, read_metrics
from transformer.runtime import (
    JsonLog,
    Pace,
    RunningMean,
    add_training_arguments,
    check_numbers,
    check_output_dirs,
    compile_models,
    get_device,
    log_start,
    one_each,
    parameter_count,
    prepare_output_dir,
    resolve_precision,
    run_script,
    save_arguments,
    set_seed,
    training_steps,
    upload_outputs,
)
from transformer.tokenization import BertTokenizer
from transformer.training import Collate, Learner, autocast, to_device, train

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "general_distill.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--pregenerated_data", type=Path, required=True,
        help="folder that pregenerate_training_data.py wrote")
    add("--teacher_model", default=None, type=str, required=True, help="teacher's model folder")
    add("--student_model", default=None, type=str, required=True, nargs="+",
        help="folder with the student's config.json; with --continue_train or --do_eval its model;"
             " several students share the teacher's pass")
    add("--output_dir", default=None, type=str, required=True, nargs="+",
        help="folder for the student, its checkpoints and logs; one for each student")
    add("--max_seq_length", default=128, type=int,
        help="longest instance in word pieces; the data may hold shorter ones, not longer")
    add("--reduce_memory", action="store_true",
        help="map an epoch's files, load nothing; a JSON epoch takes 13 GB of TMPDIR for Wikipedia")
    add("--do_eval", action="store_true",
        help="only measure the losses of student_model on the first epoch's data")
    add("--do_lower_case", action="store_true",
        help="lower-case the text; without it the teacher's own setting holds")
    add("--train_batch_size", default=32, type=int, nargs="+",
        help="instances a step, all micro-batches; one for each student or one for all, each a"
             " multiple of the smallest")
    add("--eval_batch_size", default=8, type=int, help="instances a batch with --do_eval")
    add("--learning_rate", default=5e-5, type=float, nargs="+",
        help="peak learning rate; one for each student or one for all")
    add("--weight_decay", "--wd", default=1e-4, type=float,
        help="decoupled weight decay, per unit of learning rate")
    add("--num_train_epochs", default=3.0, type=float, help="passes over the corpus")
    add("--warmup_proportion", default=0.1, type=float,
        help="share of the steps over which the learning rate rises")
    add("--no_cuda", action="store_true", help="compute on the CPU")
    add("--local_rank", type=int, default=-1, help="number of the GPU to use; -1: the first")
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--gradient_accumulation_steps", type=int, default=1,
        help="micro-batches a step (of the smallest batch size); the step's result does not depend"
             " on it")
    add("--fp16", action="store_true", help="float16 with loss scaling, for GPUs without bf16")
    add("--continue_train", action="store_true",
        help="start from the weights in student_model instead of random ones")
    add("--eval_step", type=int, default=1000, help="steps between log lines and checkpoints")
    add("--data_url", type=str, default="", help="s3://bucket/prefix to upload output_dir to")
    add("--match_original", action="store_true",
        help="the original's losses: padding counts, batches padded to max_seq_length")
    add_training_arguments(parser)
    return parser


@dataclass
class Corpus:
    """The pregenerated epochs, loaded one at a time; a training pass reads the next one."""

    folder: Path
    tokenizer: BertTokenizer
    max_seq_length: int
    reduce_memory: bool
    loaded: PregeneratedDataset | None = None

    def rows(self, epoch: int) -> int:
        """Return the number of instances in the epoch that pass `epoch` (from 0) reads."""
        return read_metrics(self.folder, epoch % count_epochs(self.folder)).num_training_examples

    def load(self, epoch: int) -> PregeneratedDataset:
        """Return the data that pass `epoch` (from 0) reads; only one epoch is kept."""
        number = epoch % count_epochs(self.folder)
        if self.loaded is None or self.loaded.epoch != number:
            self.loaded = None  # frees the old epoch's memory first
            self.loaded = PregeneratedDataset(self.folder, epoch, self.tokenizer,
                                              self.max_seq_length, self.reduce_memory)
        return self.loaded

    def steps(self, epochs: float, batch_size: int) -> int:
        """Return the number of optimizer steps of `epochs` passes."""
        whole = sum(-(-self.rows(epoch) // batch_size) for epoch in range(int(epochs)))
        rest = -(-self.rows(int(epochs)) // batch_size)
        return whole + round((epochs - int(epochs)) * rest)

    def passed(self, step: int, batch_size: int) -> float:
        """Return how many passes `step` optimizer steps are."""
        passes = 0
        while step >= (size := -(-self.rows(passes) // batch_size)):
            step, passes = step - size, passes + 1
        return passes + step / size

    def passes(
        self, epochs: float, batch_size: int, generator: torch.Generator, multiple: int,
        pad_to: int | None,
    ) -> Iterator[tuple[Collate, Sequence[Sequence[int]]]]:
        """Yield for each pass what makes batches, and the rows of each step."""
        for epoch in range(max(1, math.ceil(epochs))):
            data = self.load(epoch)
            collate = padded_collate(data, multiple, pad_to, self.max_seq_length)
            rows = batches(data.lengths, batch_size, generator, multiple, in_units=True)
            del data  # so that only one epoch is held while the next is read
            yield collate, rows
            del collate, rows


def load_student(args: argparse.Namespace, folder: str, teacher: BertModel) -> nn.Module:
    """Make a student with new or (--continue_train, --do_eval) given weights."""
    start = (TinyBertForPreTraining.from_pretrained if args.continue_train or args.do_eval
             else TinyBertForPreTraining.from_scratch)
    student = start(folder, fit_size=teacher.config.hidden_size)
    map_layers(teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    check_heads(teacher.config.num_attention_heads, student.config.num_attention_heads)
    return student


def check_batch_sizes(sizes: list[int]) -> None:
    """Raise a `UserError` unless larger batches are made of whole smaller ones."""
    least = min(sizes)
    if any(size % least for size in sizes) or (len(set(sizes)) > 1 and least % BATCH_UNIT):
        raise UserError(
            f"--train_batch_size {' '.join(map(str, sizes))}: expected one size for all students,"
            f" or multiples of the smallest, which is a multiple of {BATCH_UNIT}"
        )


def make_learner(
    args: argparse.Namespace, number: int, teacher: BertModel, corpus: Corpus,
    device: torch.device, dtype: torch.dtype | None,
) -> Learner:
    """Make student `number` exactly as if it were the only one."""
    set_seed(args.seed)
    folder = args.student_model[number]
    student = load_student(args, folder, teacher)
    student.config.check_vocabulary(len(corpus.tokenizer), args.teacher_model)
    student.config.check_length(args.max_seq_length, folder)
    student.to(device)
    size = args.train_batch_size[number]
    optimizer = BertAdam(
        param_groups(student, args.weight_decay), lr=args.learning_rate[number],
        warmup=args.warmup_proportion,
        t_total=max(1, corpus.steps(args.num_train_epochs, size)))
    return Learner(student, IntermediateLoss(student, args.match_original), optimizer, device,
                   dtype, span=size // min(args.train_batch_size))


@dataclass
class Output:
    """Where one student's checkpoints and log go."""

    learner: Learner
    folder: Path
    log: JsonLog
    means: RunningMean = field(default_factory=RunningMean)

    def record(self, step: int, facts: dict[str, float]) -> None:
        """Log what is known at a step and save the student."""
        record = {"step": step, "lr": self.learner.optimizer.get_lr()[0], **facts}
        self.log.write(record)
        logger.info("%s: %s", self.folder.name, record)
        save_weights(self.learner.student, self.folder / f"step_{step}_{WEIGHTS_NAME}")


@torch.no_grad()
def measure(learner: Learner, teacher: IntermediateTeacher, collate: Collate,
            rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return a student's losses over batches of instances, each instance counting the same."""
    learner.student.eval()
    totals: dict[str, Tensor] = {}
    for part in tqdm(rows, unit="batch", disable=None):
        batch = to_device(collate(part), learner.device)
        shown = teacher(batch)
        with autocast(learner.device, learner.dtype):
            values = learner.loss(batch, shown)
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value * len(part)
    return {name: float(total) / sum(map(len, rows)) for name, total in totals.items()}


def main(args: argparse.Namespace) -> None:
    # Settings
    check_numbers(args)
    students = len(args.student_model)
    args.learning_rate = one_each("learning_rate", args.learning_rate, students)
    args.train_batch_size = one_each("train_batch_size", args.train_batch_size, students)
    check_batch_sizes(args.train_batch_size)
    batch_size = min(args.train_batch_size)
    check_output_dirs(args.output_dir, students, args.overwrite_output_dir)
    device = get_device(args.no_cuda, args.local_rank)
    dtype = resolve_precision(args.precision, device, args.fp16)
    address = s3_address(args.data_url)

    # Teacher, data and students
    set_seed(args.seed)
    encoder = BertModel.from_pretrained(args.teacher_model, add_pooler=False)
    teacher_size = parameter_count(encoder)
    freeze(encoder, dtype, device, pack=not args.compile)
    tokenizer = BertTokenizer.from_pretrained(args.teacher_model, args.do_lower_case or None)
    encoder.config.check_vocabulary(len(tokenizer), args.teacher_model)
    encoder.config.check_length(args.max_seq_length, args.teacher_model)
    corpus = Corpus(args.pregenerated_data, tokenizer, args.max_seq_length, args.reduce_memory)
    corpus.load(0)  # before anything is written: it may be damaged
    training_steps(args.num_train_epochs, 1)
    total_steps = max(1, corpus.steps(args.num_train_epochs, batch_size))
    learners = [make_learner(args, number, encoder, corpus, device, dtype)
                for number in range(students)]
    teacher = IntermediateTeacher(
        encoder, [learner.student.config.num_hidden_layers for learner in learners])
    compiled = compile_models(args.compile, device, teacher, *(x.loss for x in learners))

    # Output
    folders = [prepare_output_dir(path, args.overwrite_output_dir) for path in args.output_dir]
    start = log_start(
        args, device, dtype, compiled=compiled, rows=corpus.rows(0), steps=total_steps,
        batch=" ".join(map(str, args.train_batch_size)), teacher=teacher_size,
        students=" ".join(parameter_count(learner.student) for learner in learners))
    for folder, source in zip(folders, args.student_model, strict=True):
        save_arguments(folder, {**start, "student": source})
    multiple = padding_multiple(device)
    pad_to = args.max_seq_length if args.match_original else None
    if args.do_eval:
        data = corpus.load(0)
        collate = padded_collate(data, multiple, pad_to, args.max_seq_length)
        for learner, folder in zip(learners, folders, strict=True):
            values = measure(
                learner, teacher, collate, batches(data.lengths, args.eval_batch_size))
            write_results(folder, {"losses": values, "rows": corpus.rows(0)})
            logger.info("%s: %s", folder, values)
        return

    # Distillation; every step_N_pytorch_model.bin is a model beside this config and vocabulary
    outputs = [Output(learner, folder, JsonLog(folder / "log.jsonl"))
               for learner, folder in zip(learners, folders, strict=True)]
    for output in outputs:
        save_config(output.learner.student, output.folder, tokenizer)
    passes = corpus.passes(args.num_train_epochs, batch_size,
                           torch.Generator().manual_seed(args.seed), multiple, pad_to)
    # A batch of several units (glue.batches) is computed unit by unit, each of its own length.
    accumulation = max(args.gradient_accumulation_steps, -(-batch_size // BATCH_UNIT))
    steps = train(learners, teacher, passes, total_steps, accumulation, device)
    pace = Pace()
    progress = tqdm(steps, desc="general", total=total_steps, unit="step", disable=None)
    for number, step in enumerate(progress, start=1):
        pace.add(step.rows, step.waited)
        for output, losses in zip(outputs, step.losses, strict=True):
            if losses is not None:
                output.means.add(losses)
        if number % args.eval_step == 0 or number == total_steps:
            means = [output.means.read() for output in outputs]
            facts = {"epoch": round(corpus.passed(number, batch_size), 3), **pace.read()}
            for output, losses in zip(outputs, means, strict=True):
                output.record(number, {**facts, **losses})
            pace.restart()

    # Results: the next stage reads these folders as they are
    for output, losses in zip(outputs, means, strict=True):
        save_weights(output.learner.student, output.folder / WEIGHTS_NAME)
        write_results(output.folder, {"losses": losses, "steps": total_steps,
                                      "rows": corpus.rows(0)})
    upload_outputs(address, folders)


if __name__ == "__main__":
    run_script(main, get_args_parser())
