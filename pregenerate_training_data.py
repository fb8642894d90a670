"""Make the instances of general distillation from a text corpus.

Writes the corpus as word-piece ids, OUTPUT_DIR/corpus.bin, and for each epoch the instances as
spans of it, OUTPUT_DIR/epoch_N.bin; with --format json one JSON object an instance,
OUTPUT_DIR/epoch_N.json. OUTPUT_DIR/epoch_N_metrics.json has the counts.

A process takes at most 150 MB beside its libraries, whatever the corpus (its longest line and
document aside); pages of mapped files, which the system takes back when it needs them, are not
counted. The files are made in a hidden folder of OUTPUT_DIR and renamed when all are there, so a
call that was killed leaves nothing that passes for an output; the next one starts again.

Examples:
    python pregenerate_training_data.py --train_corpus data/wiki_for_bert.txt \
        --bert_model models/bert-base-uncased --reduce_memory --do_lower_case \
        --epochs_to_generate 3 --output_dir data/json_wiki
    python pregenerate_training_data.py --train_corpus data/reviews.txt data/more_reviews.txt.gz \
        --instances lines --bert_model models/bert-base-chinese --epochs_to_generate 1 \
        --output_dir data/json_reviews
"""

import argparse
import logging
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from transformer import distributed
from transformer.corpus import EpochSettings, Masking
from transformer.file_utils import UserError, s3_address, sync_file, upload_folder, write_json
from transformer.hub import fetch_model
from transformer.pregeneration import (
    add_instance_arguments,
    corpus_files,
    epoch_settings,
    fit_to_tokenizer,
    generate_all,
)
from transformer.pretraining_data import generated_files
from transformer.run_folder import ARGUMENTS_NAME, UNFINISHED, prepare_output_dir
from transformer.runtime import argument_values, run_script
from transformer.tokenization import FileTokenizer, load_tokenizer

logger = logging.getLogger(__name__)


def check_args(args: argparse.Namespace) -> EpochSettings:
    """Return the settings of the instances; a value that fits no corpus is a `UserError`."""
    if not 0 <= args.masked_lm_prob <= 1:
        raise UserError(f"--masked_lm_prob {args.masked_lm_prob}: expected a share from 0 to 1")
    if args.one_seq:
        if "instances" in args.given and args.instances != "packed":
            raise UserError(f"--one_seq is --instances packed; expected it alone, or"
                            f" --instances {args.instances}")
        args.instances = "packed"
    return epoch_settings(args, "max_seq_len")


def publish(folder: Path, output_dir: Path, args: argparse.Namespace) -> int:
    """Move the generated files out of `folder`, in place of earlier ones; return their bytes.

    Epoch 0 goes first and comes last, as without it none is read: files that a kill has left
    do not pass for all.
    """
    for path in generated_files(output_dir):
        path.unlink()
    (output_dir / ARGUMENTS_NAME).unlink(missing_ok=True)
    size = 0
    for path in reversed(generated_files(folder)):
        sync_file(path)
        size += path.stat().st_size
        path.replace(output_dir / path.name)
    write_json(output_dir / ARGUMENTS_NAME, {"arguments": argument_values(args)})
    return size


# ------------------------------------------------------------------ command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train_corpus", type=Path, required=True, nargs="+",
        help="text files, plain, .gz or .bz2, or folders of such: one sentence a line, a blank line"
             " between documents (see --instances)")
    add("--output_dir", type=Path, required=True, help="folder to write the epochs to")
    add("--bert_model", type=str, required=True,
        help="model whose vocabulary to use: folder, URL or hub id")
    add("--do_lower_case", action="store_true",
        help="lower-case the text whatever the model's tokenizer config says (switch)")
    add("--do_whole_word_mask", action="store_true",
        help="mask all pieces of a word or none (switch)")
    add("--reduce_memory", action="store_true",
        help="changes nothing: the tokenized documents are always on disk, in output_dir, and a "
        "process takes at most 150 MB beside its libraries, whatever the corpus (switch)")
    add("--format", choices=["binary", "json"], default="binary",
        help="binary: the corpus once and instances as spans of it; json: the original's files")
    add("--epochs_to_generate", type=int, default=3, help="number of epochs of instances")
    add("--max_seq_len", type=int, default=128,
        help="length of an instance, in tokens with the special ones")
    add_instance_arguments(parser, "pairs")
    add("--masked_lm_prob", type=float, default=0.0,
        help="share of tokens (0 to 1) to mask; 0 masks nothing")
    add("--max_predictions_per_seq", type=int, default=20,
        help="most masked tokens of an instance")
    add("--one_seq", action="store_true",
        help="the same as --instances packed (switch)")
    add("--data_url", type=str, default="",
        help="s3://bucket/folder to copy the epochs to as well; empty for none")
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--overwrite_output_dir", action="store_true",
        help="replace the epochs of an output folder that is not empty (switch)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Tokenize the corpus once, write each epoch from it, log the counts."""
    start = time.perf_counter()

    # Check everything that can be checked before the long work.
    if distributed.world_size() > 1:
        raise UserError("torchrun: one process is enough; --num_workers starts more")
    settings = check_args(args)
    files = corpus_files(args.train_corpus)
    address = s3_address(args.data_url)
    tokenizer = load_tokenizer(
        fetch_model(args.bert_model, weights=False), args.do_lower_case or None)
    if args.format == "json" and isinstance(tokenizer, FileTokenizer):
        raise UserError(f"--format json: the original's files are of a BERT's word pieces, and"
                        f" {tokenizer.file} is another tokenizer; expected --format binary")
    fit_to_tokenizer(settings, tokenizer)
    masking = Masking(
        tokenizer, args.masked_lm_prob, args.max_predictions_per_seq, args.do_whole_word_mask
    )
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir,
                                    [*args.train_corpus, args.bert_model], keep=True)
    for folder in output_dir.glob(f"{UNFINISHED}*"):  # of a killed call
        shutil.rmtree(folder)

    # All files are made in a folder of their own, so that only finished ones are left behind.
    with TemporaryDirectory(prefix=UNFINISHED, dir=output_dir) as name:
        folder = Path(name)
        rows = generate_all(folder, files, tokenizer, settings, masking, args.epochs_to_generate,
                            args.format, args.num_workers)
        size = publish(folder, output_dir, args)
    logger.info("%s: %d epochs of %s instances, %d bytes, %.1f s", output_dir, len(rows),
                ", ".join(map(str, rows)), size, time.perf_counter() - start)

    # Copy, where asked to.
    if address:
        upload_folder(output_dir, address)


if __name__ == "__main__":
    run_script(main, get_args_parser())
