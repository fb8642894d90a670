"""Distil a general-purpose student from a BERT teacher that is not fine-tuned.

General distillation (paper, section 3.2) matches attention scores, hidden states and embeddings
on a large corpus; there is no prediction loss.

Example:
    python general_distill.py --pregenerated_data data/json_wiki \
        --teacher_model models/bert-base-uncased --student_model tinybert_4l_config \
        --reduce_memory --do_lower_case --train_batch_size 64 \
        --output_dir models/distilled_tinybert_4l --eval_step 10000
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from transformer.checkpoint import save_config, save_weights
from transformer.distillation import (
    Batch,
    Collate,
    check_heads,
    freeze,
    intermediate_losses,
    map_layers,
    to_device,
    train,
)
from transformer.evaluation import write_results
from transformer.file_utils import WEIGHTS_NAME, s3_address, upload_folder
from transformer.glue import batches
from transformer.modeling import BertModel, TinyBertForPreTraining
from transformer.optimization import BertAdam, param_groups
from transformer.pretraining_data import PregeneratedDataset, count_epochs, read_metrics
from transformer.runtime import (
    JsonLog,
    RunningMean,
    add_training_arguments,
    autocast,
    check_numbers,
    get_device,
    log_start,
    parameter_count,
    prepare_output_dir,
    resolve_precision,
    run_script,
    save_arguments,
    set_seed,
    training_steps,
)
from transformer.tokenization import BertTokenizer

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
    add("--student_model", default=None, type=str, required=True,
        help="folder with the student's config.json; with --continue_train or --do_eval its model")
    add("--output_dir", default=None, type=str, required=True,
        help="folder for the student, its checkpoints and logs")
    add("--max_seq_length", default=128, type=int,
        help="longest instance in word pieces; the data may hold shorter ones, not longer")
    add("--reduce_memory", action="store_true",
        help="keep an epoch's data in files in TMPDIR, not in memory; 13 GB for Wikipedia")
    add("--do_eval", action="store_true",
        help="only measure the losses of student_model on the first epoch's data")
    add("--do_lower_case", action="store_true",
        help="lower-case the text; without it the teacher's own setting holds")
    add("--train_batch_size", default=32, type=int, help="instances a step, all micro-batches")
    add("--eval_batch_size", default=8, type=int, help="instances a batch with --do_eval")
    add("--learning_rate", default=5e-5, type=float, help="peak learning rate")
    add("--weight_decay", "--wd", default=1e-4, type=float,
        help="decoupled weight decay, per unit of learning rate")
    add("--num_train_epochs", default=3.0, type=float, help="passes over the corpus")
    add("--warmup_proportion", default=0.1, type=float,
        help="share of the steps over which the learning rate rises")
    add("--no_cuda", action="store_true", help="compute on the CPU")
    add("--local_rank", type=int, default=-1, help="number of the GPU to use; -1: the first")
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--gradient_accumulation_steps", type=int, default=1,
        help="micro-batches a step; the step's result does not depend on it")
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
class GeneralDistillationLoss:
    """Eq. 7-9 on a batch: attention scores, hidden states and embeddings, summed over layers."""

    student: nn.Module
    teacher: nn.Module
    match_original: bool

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        inputs = (batch["input_ids"], batch["token_type_ids"], mask)
        with torch.no_grad():
            teacher = self.teacher(*inputs)
        student_scores, student_hidden = self.student(*inputs)
        return intermediate_losses(
            student_scores, student_hidden, teacher.attention_scores, teacher.hidden_states,
            mask, self.match_original)


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
        self, batch_size: int, generator: torch.Generator, pad_to: int | None
    ) -> Iterator[tuple[Collate, list[list[int]]]]:
        """Yield for each pass what makes batches, and the rows of each step."""
        for epoch in count():
            lengths = self.load(epoch).lengths
            yield partial(self.collate, pad_to=pad_to), batches(lengths, batch_size, generator)

    def collate(self, rows: list[int], pad_to: int | None) -> Batch:
        """Return the rows of the epoch that was loaded last."""
        return self.loaded.collate(rows, pad_to)


def load_models(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Load the frozen teacher, and the student with new or (--continue_train) given weights."""
    teacher = BertModel.from_pretrained(args.teacher_model)
    width = teacher.config.hidden_size
    if args.continue_train or args.do_eval:
        student = TinyBertForPreTraining.from_pretrained(args.student_model, fit_size=width)
    else:
        student = TinyBertForPreTraining.from_scratch(args.student_model, fit_size=width)
    map_layers(teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    check_heads(teacher.config.num_attention_heads, student.config.num_attention_heads)
    return freeze(teacher), student


def measure(losses: GeneralDistillationLoss, data: PregeneratedDataset, batch_size: int,
            device: torch.device, context) -> dict[str, float]:
    """Return the losses over all instances, each instance counting the same."""
    losses.student.eval()
    totals: dict[str, float] = {}
    for rows in tqdm(batches(data.lengths, batch_size), unit="batch", disable=None):
        with torch.no_grad(), context():
            values = losses(to_device(data.collate(rows), device))
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(rows) / len(data)
    return totals


def main(args: argparse.Namespace) -> None:
    # Settings
    check_numbers(args)
    device = get_device(args.no_cuda, args.local_rank)
    dtype = resolve_precision(args.precision, device, args.fp16)
    set_seed(args.seed)
    address = s3_address(args.data_url)

    # Models and data
    teacher, student = load_models(args)
    tokenizer = BertTokenizer.from_pretrained(args.teacher_model, args.do_lower_case or None)
    for model, source in ((teacher, args.teacher_model), (student, args.student_model)):
        model.config.check_vocabulary(len(tokenizer), args.teacher_model)
        model.config.check_length(args.max_seq_length, source)
    corpus = Corpus(args.pregenerated_data, tokenizer, args.max_seq_length, args.reduce_memory)
    corpus.load(0)  # before anything is written: it may be damaged
    training_steps(args.num_train_epochs, 1)
    total_steps = max(1, corpus.steps(args.num_train_epochs, args.train_batch_size))

    # Output
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    save_arguments(output_dir, log_start(
        args, device, dtype, rows=corpus.rows(0), steps=total_steps, batch=args.train_batch_size,
        teacher=parameter_count(teacher), student=parameter_count(student)))
    teacher.to(device)
    student.to(device)
    losses = GeneralDistillationLoss(student, teacher, args.match_original)

    def context():
        return autocast(device, dtype)

    if args.do_eval:
        values = measure(losses, corpus.load(0), args.eval_batch_size, device, context)
        write_results(output_dir, {"losses": values, "rows": corpus.rows(0)})
        logger.info("%s: %s", args.student_model, values)
        return

    # Distillation; every step_N_pytorch_model.bin is a model beside this config and vocabulary
    save_config(student, output_dir, tokenizer)
    log = JsonLog(output_dir / "log.jsonl")
    optimizer = BertAdam(param_groups(student, args.weight_decay), lr=args.learning_rate,
                         warmup=args.warmup_proportion, t_total=total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)
    passes = corpus.passes(args.train_batch_size, generator,
                           args.max_seq_length if args.match_original else None)
    steps = islice(train(student, losses, passes, optimizer, args.gradient_accumulation_steps,
                         device, context, scaler), total_steps)
    means = RunningMean()
    progress = tqdm(steps, desc="general", total=total_steps, unit="step", disable=None)
    for step, (step_losses, _) in enumerate(progress, start=1):
        means.add(step_losses)
        if step % args.eval_step == 0 or step == total_steps:
            epoch = round(corpus.passed(step, args.train_batch_size), 3)
            record = {"step": step, "epoch": epoch, "lr": optimizer.get_lr()[0], **means.read()}
            log.write(record)
            logger.info("step %d/%d  %s", step, total_steps, record)
            save_weights(student, output_dir / f"step_{step}_{WEIGHTS_NAME}")

    # Results: the next stage reads this folder as it is
    save_weights(student, output_dir / WEIGHTS_NAME)
    write_results(output_dir, {"losses": {k: v for k, v in record.items() if "loss" in k},
                               "steps": total_steps, "rows": corpus.rows(0)})
    if address:
        upload_folder(output_dir, *address)


if __name__ == "__main__":
    run_script(main, get_args_parser())
