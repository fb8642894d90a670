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
    python general_distill.py --train_corpus data/sentences.txt \
        --teacher_model models/bert-base-chinese --student_model tinybert_4l_zh_config \
        --output_dir models/distilled_tinybert_4l_zh
"""

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from transformer import distributed
from transformer.batching import (
    BATCH_UNIT,
    Collate,
    Pass,
    batches,
    micro_batches,
    padded_collate,
    padding_multiple,
    pass_generator,
)
from transformer.checkpoint import save_config, weights_path
from transformer.config import BertConfig, find_config
from transformer.distillation import (
    IntermediateLoss,
    IntermediateTeacher,
    check_layers,
    describe_layers,
    map_layers,
)
from transformer.evaluation import write_results
from transformer.file_utils import WEIGHTS_NAME, UserError, has_vocabulary, read_json
from transformer.hub import fetch_model
from transformer.modeling import BertModel, TinyBertForPreTraining, freeze, scratch_config
from transformer.optimization import BertAdam, param_groups
from transformer.pregeneration import (
    INSTANCE_FLAGS,
    add_instance_arguments,
    cached_instances,
    corpus_files,
    epoch_settings,
)
from transformer.pretraining_data import PregeneratedDataset, find_epochs, read_metrics
from transformer.run import StudentOutput, TrainingRun, check_training_disk
from transformer.run_folder import ARGUMENTS_NAME, RunFolder
from transformer.runtime import (
    add_distillation_arguments,
    check_numbers,
    compile_models,
    format_values,
    get_device,
    log_start,
    parameter_count,
    per_student,
    resolve_precision,
    run_script,
    set_seed,
)
from transformer.tokenization import AnyTokenizer, load_tokenizer
from transformer.training import StudentTrainer, autocast, to_device

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "general_distill.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--pregenerated_data", type=Path,
                      help="folder that pregenerate_training_data.py wrote")
    data.add_argument("--train_corpus", "--train_file_path", type=Path, nargs="+",
                      help="text files, plain, .gz or .bz2, or folders of such, one sentence a"
                           " line: instances are made of them as --instances says and kept in"
                           " the user's cache ($TINYBERT_CACHE, else ~/.cache/tinybert) for"
                           " further calls")
    add_instance_arguments(parser, "lines")
    add("--teacher_model", default=None, type=str, required=True,
        help="teacher: folder, URL or hub id")
    add("--student_model", default=None, type=str, required=True, nargs="+",
        help="folder, URL or hub id with the student's config.json; with --continue_train or"
             " --do_eval its model; several students share the teacher's pass")
    add("--output_dir", default=None, type=str, required=True, nargs="+",
        help="folder for the student, its checkpoints and logs; one for each student")
    add("--max_seq_length", default=128, type=int,
        help="longest instance in word pieces; the data may hold shorter ones, not longer")
    add("--reduce_memory", action="store_true",
        help="map an epoch's files, load nothing; a JSON epoch takes 13 GB of TMPDIR for Wikipedia")
    add("--do_eval", action="store_true",
        help="only measure the losses of student_model on the first epoch's data")
    add("--train_batch_size", default=32, type=int, nargs="+",
        help="instances a step, all micro-batches; one for each student or one for all, each a"
             " multiple of the smallest")
    add("--learning_rate", default=5e-5, type=float, nargs="+",
        help="peak learning rate; one for each student or one for all")
    add("--num_train_epochs", default=3.0, type=float, help="passes over the corpus")
    add("--local_rank", "--local-rank", type=int, default=-1,
        help="number of the GPU to use; -1: the first; under torchrun each process has its own")
    add("--fp16", action="store_true", help="float16 with loss scaling, for GPUs without bf16")
    add("--continue_train", action="store_true",
        help="start from the weights in student_model instead of random ones")
    add("--eval_step", type=int, default=1000, help="steps between log lines and checkpoints")
    add_distillation_arguments(parser, eval_batch_size=8)
    return parser


class EpochReader:
    """The pregenerated epochs, one in memory at a time; pass after pass reads the next one.

    Args:
        folder: what pregenerate_training_data.py wrote.
        tokenizer, max_seq_length, reduce_memory: see `PregeneratedDataset`.
    """

    def __init__(self, folder: Path, tokenizer: AnyTokenizer, max_seq_length: int,
                 reduce_memory: bool) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.max_seq_length, self.reduce_memory = max_seq_length, reduce_memory
        self.epochs, _ = find_epochs(folder)
        self.loaded: PregeneratedDataset | None = None

    def rows(self, number: int) -> int:
        """Return the number of instances in the epoch that pass `number` (from 0) reads."""
        return read_metrics(self.folder, number % self.epochs).num_training_examples

    def load(self, number: int) -> PregeneratedDataset:
        """Return the data that pass `number` (from 0) reads; only one epoch is kept."""
        if self.loaded is None or self.loaded.epoch != number % self.epochs:
            self.loaded = None  # frees the old epoch's memory first
            self.loaded = PregeneratedDataset(self.folder, number, self.tokenizer,
                                              self.max_seq_length, self.reduce_memory)
        return self.loaded

    def steps_in_pass(self, number: int, batch_size: int) -> int:
        """Return the number of optimizer steps of pass `number` (from 0)."""
        return -(-self.rows(number) // batch_size)

    def steps(self, passes: float, batch_size: int) -> int:
        """Return the number of optimizer steps of `passes` passes, at least 1."""
        whole = sum(self.steps_in_pass(number, batch_size) for number in range(int(passes)))
        rest = self.steps_in_pass(int(passes), batch_size)
        return max(1, whole + round((passes - int(passes)) * rest))

    def passes(
        self, first: int, batch_size: int, accumulation: int, seed: int, multiple: int,
        pad_to: int | None,
    ) -> Iterator[Pass]:
        """Yield the passes from number `first` on."""
        # A batch of several units of rows of similar length is computed unit by unit.
        unit = batch_size if batch_size % BATCH_UNIT else BATCH_UNIT
        several = batch_size // unit
        size = -(-unit // -(-accumulation // several))  # of a micro-batch
        for number in count(first):
            data = self.load(number)
            collate = padded_collate(data, multiple, pad_to, self.max_seq_length)
            units = batches(data.lengths, unit, pass_generator(seed, number), multiple,
                            short_last=unit == BATCH_UNIT)
            del data  # so that only one epoch is held while the next is read
            yield collate, [
                [part for rows in units[begin : begin + several]
                 for part in micro_batches(rows, size)]
                for begin in range(0, len(units), several)]
            del collate, units


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for flags out of range, or that do not fit together.

    Batch sizes and rates become lists of one a student.
    """
    check_numbers(args, "num_train_epochs")
    for flag in INSTANCE_FLAGS:
        if flag in args.given and args.train_corpus is None:
            raise UserError(f"--{flag} says how instances are made of --train_corpus; expected it"
                            " with that, or as a flag of pregenerate_training_data.py")
    for flag in ("resume", "tensorboard"):
        if args.do_eval and getattr(args, flag):
            raise UserError(f"--{flag} is for training; leave it out with --do_eval")
    students = len(args.student_model)
    args.layer_map = per_student("layer_map", args.layer_map, students)
    args.learning_rate = per_student("learning_rate", args.learning_rate, students)
    sizes = per_student("train_batch_size", args.train_batch_size, students)
    args.train_batch_size, smallest = sizes, min(sizes)
    if any(size % smallest for size in sizes) or (len(set(sizes)) > 1 and smallest % BATCH_UNIT):
        raise UserError(
            f"--train_batch_size {' '.join(map(str, sizes))}: expected one size for all students,"
            f" or multiples of the smallest, which is a multiple of {BATCH_UNIT}"
        )


def teacher_tokenizer(args: argparse.Namespace) -> AnyTokenizer:
    """Return the teacher's tokenizer; that the models fit it is checked before the long work.

    Raises:
        UserError: missing files, or sizes that do not fit one another or --max_seq_length.
    """
    folder = fetch_model(args.teacher_model)
    teacher = BertConfig.from_json_file(find_config(folder))
    tokenizer = load_tokenizer(folder, args.do_lower_case or None)
    teacher.check_vocabulary(len(tokenizer), args.teacher_model)
    teacher.check_length(args.max_seq_length, args.teacher_model)
    weights_path(folder)
    for source, chosen in zip(args.student_model, args.layer_map, strict=True):
        trained = args.continue_train or args.do_eval
        folder = fetch_model(source, weights=trained)
        if trained:
            weights_path(folder)
        config = scratch_config(folder, None if trained else tokenizer)
        config.check_vocabulary(len(tokenizer), args.teacher_model, folder)
        if trained and has_vocabulary(folder) and load_tokenizer(folder).vocab != tokenizer.vocab:
            raise UserError(f"{folder}: its vocabulary has other pieces than that of"
                            f" {args.teacher_model}; expected the same")
        config.check_length(args.max_seq_length, folder)
        check_layers(teacher, config, chosen, attention=not args.no_attention_loss)
    return tokenizer


def find_data(args: argparse.Namespace, tokenizer: AnyTokenizer, folder: RunFolder) -> Path:
    """Return the folder of the instances, which are made of --train_corpus where it is given."""
    if args.train_corpus is None:
        if args.pregenerated_data.is_file():
            raise UserError(f"--pregenerated_data {args.pregenerated_data}: a file; expected what"
                            " pregenerate_training_data.py writes (--train_corpus takes text)")
        return args.pregenerated_data
    settings = epoch_settings(args, "max_seq_length")
    epochs = 1 if settings.instances == "lines" else math.ceil(args.num_train_epochs)
    begun = [path / ARGUMENTS_NAME for path in folder.paths if folder.state == "resume"]
    corpora = {read_json(path).get("corpus", "") for path in begun if path.is_file()}
    return cached_instances(corpus_files(args.train_corpus), tokenizer, settings, epochs,
                            args.num_workers, corpora - {""})


def make_trainer(
    args: argparse.Namespace, number: int, teacher: BertModel, reader: EpochReader,
    device: torch.device, dtype: torch.dtype | None,
) -> StudentTrainer:
    """Make student `number`, with new or given weights, exactly as if it were the only one."""
    set_seed(args.seed)
    trained, fit_size = args.continue_train or args.do_eval, teacher.config.hidden_size
    folder = fetch_model(args.student_model[number], weights=trained)
    if trained:
        student = TinyBertForPreTraining.from_pretrained(folder, fit_size=fit_size)
    else:
        student = TinyBertForPreTraining.from_scratch(folder, reader.tokenizer, fit_size=fit_size)
    student.to(device)
    size = args.train_batch_size[number]
    optimizer = BertAdam(
        param_groups(student, args.weight_decay), lr=args.learning_rate[number],
        warmup=args.warmup_proportion,
        t_total=reader.steps(args.num_train_epochs, size))
    layer_map = map_layers(teacher.config.num_hidden_layers, student.config.num_hidden_layers,
                           args.layer_map[number])
    loss = IntermediateLoss(student, layer_map, args.match_original,
                            attention_weight=0.0 if args.no_attention_loss else 1.0)
    return StudentTrainer(student, loss, optimizer, device, dtype,
                          accumulation=size // min(args.train_batch_size))


@torch.no_grad()
def mean_losses(trainer: StudentTrainer, teacher: IntermediateTeacher, collate: Collate,
                rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return a student's losses over batches of instances, each instance counting the same.

    Under torchrun each process computes some of the batches.
    """
    trainer.student.eval()
    totals = dict.fromkeys(trainer.loss.weights, torch.zeros((), device=trainer.device))
    own = rows[distributed.rank() :: distributed.world_size()]
    for part in tqdm(own, unit="batch", disable=None):
        batch = to_device(collate(part), trainer.device)
        teacher_outputs = teacher(batch)
        with autocast(trainer.device, trainer.dtype):
            values = trainer.loss(batch, teacher_outputs)
        for name, value in values.items():
            totals[name] = totals[name] + value * len(part)
    return {name: float(distributed.sum_over_ranks(total)) / sum(map(len, rows))
            for name, total in totals.items()}


def evaluate_only(args: argparse.Namespace, trainers: list[StudentTrainer],
                  teacher: IntermediateTeacher, reader: EpochReader, folders: list[Path]) -> None:
    """Write each student's losses on the first epoch's data."""
    data = reader.load(0)
    collate = padded_collate(data, padding_multiple(trainers[0].device),
                             args.max_seq_length if args.match_original else None,
                             args.max_seq_length)
    for trainer, folder in zip(trainers, folders, strict=True):
        losses = mean_losses(
            trainer, teacher, collate, batches(data.lengths, args.eval_batch_size))
        write_results(folder, {"losses": losses, "rows": reader.rows(0)})
        logger.info("%s: %s", folder, format_values(losses))


def main(args: argparse.Namespace) -> None:
    # Settings
    check_args(args)
    batch_size = min(args.train_batch_size)
    device = get_device(args.no_cuda, args.local_rank)
    dtype = resolve_precision(args.precision, device, args.fp16)
    folder = RunFolder.open(args, args.student_model)
    if folder.state == "finished":
        folder.upload(strict=True)
        return

    # Data, which may first be made
    tokenizer = teacher_tokenizer(args)
    data = find_data(args, tokenizer, folder)
    reader = EpochReader(data, tokenizer, args.max_seq_length, args.reduce_memory)
    reader.load(0)  # before anything is written: it may be damaged
    total_steps = reader.steps(args.num_train_epochs, batch_size)

    # Teacher and students
    encoder = BertModel.from_pretrained(fetch_model(args.teacher_model), add_pooler=False)
    teacher_size = parameter_count(encoder)
    freeze(encoder, dtype, device, pack=not args.compile)
    trainers = [make_trainer(args, number, encoder, reader, device, dtype)
                for number in range(len(args.student_model))]
    losses = [trainer.loss for trainer in trainers]
    teacher = IntermediateTeacher(
        encoder, (layer for loss in losses for layer in loss.score_layers))
    compiled = compile_models(args.compile, device, teacher, *losses)

    # Output; every step_N_pytorch_model.bin is a model beside this config and vocabulary
    if not args.do_eval:
        check_training_disk(trainers, folder.paths, 2 + total_steps // args.eval_step)
    folder.start(log_start(
        args, device, dtype, compiled=compiled, rows=reader.rows(0), steps=total_steps,
        batch=" ".join(map(str, args.train_batch_size)), teacher=teacher_size,
        students=" ".join(parameter_count(trainer.student) for trainer in trainers),
        layer_map=describe_layers(losses),
        **({"corpus": data.name} if args.train_corpus else {})))
    if args.do_eval:
        evaluate_only(args, trainers, teacher, reader, folder.paths)
        folder.upload(strict=True)
        return
    outputs = [StudentOutput(trainer, path, tokenizer, tensorboard=args.tensorboard)
               for trainer, path in zip(trainers, folder.paths, strict=True)]
    for output in outputs:
        save_config(output.trainer.student, output.folder, tokenizer)

    # Distillation
    multiple = padding_multiple(device)
    pad_to = args.max_seq_length if args.match_original else None
    run = TrainingRun(
        outputs, lambda first: reader.passes(
            first, batch_size, args.gradient_accumulation_steps, args.seed, multiple, pad_to),
        lambda number: reader.steps_in_pass(number, batch_size), total_steps,
        report_every=args.eval_step, save_steps=args.save_steps, save_minutes=args.save_minutes,
        resume=folder.state == "resume")
    for _ in run.steps(teacher, "general"):
        if run.reports():
            run.report()
            for output in outputs:
                output.save_weights(f"step_{run.step}_{WEIGHTS_NAME}")
            folder.upload()

    # Results: the next stage reads these folders as they are
    for output in outputs:
        output.save_weights(WEIGHTS_NAME)
        output.finish({"steps": total_steps, "rows": reader.rows(0)})
    run.finish()
    folder.upload(strict=True)


if __name__ == "__main__":
    run_script(main, get_args_parser())
