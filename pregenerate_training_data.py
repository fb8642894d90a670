"""Make the next-sentence instances of general distillation from a text corpus.

Writes the corpus as word-piece ids, OUTPUT_DIR/corpus.bin, and for each epoch the instances as
spans of it, OUTPUT_DIR/epoch_N.bin; with --format json one JSON object an instance,
OUTPUT_DIR/epoch_N.json. OUTPUT_DIR/epoch_N_metrics.json has the counts.

A process takes at most 150 MB beside its libraries, whatever the corpus (its longest line and
document aside); pages of mapped files, which the system takes back when it needs them, are not
counted. The files are made in a hidden folder of OUTPUT_DIR and renamed when all are there, so a
call that was killed leaves nothing that passes for an output; the next one starts again.

Example:
    python pregenerate_training_data.py --train_corpus data/wiki_for_bert.txt \
        --bert_model models/bert-base-uncased --reduce_memory --do_lower_case \
        --epochs_to_generate 3 --output_dir data/json_wiki
"""

import argparse
import logging
import os
import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from transformer import distributed
from transformer.corpus import (
    CORPUS_IDS_NAME,
    SENTENCES_PER_BLOCK,
    Corpus,
    EpochSettings,
    Masking,
    document_blocks,
    line_blocks,
    tokenize_block,
    write_corpus,
)
from transformer.file_utils import UserError, s3_address, upload_folder, write_json
from transformer.hub import fetch_model
from transformer.pretraining_data import (
    CORPUS_INFO_NAME,
    METRICS_SUFFIX,
    EpochWriter,
    epoch_path,
    generated_files,
)
from transformer.run_folder import ARGUMENTS_NAME, UNFINISHED, prepare_output_dir
from transformer.runtime import argument_values, check_disk, run_script
from transformer.shards import progress, worker_pool
from transformer.tokenization import BLOCK_BYTES, BertTokenizer

logger = logging.getLogger(__name__)

LONGEST_INSTANCE = 2**16 - 1  # what a record's 16 bits can count


# ------------------------------------------------------------------ checks


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a value that fits no corpus."""
    for name in ("short_seq_prob", "masked_lm_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected a share from 0 to 1")
    shortest = 4 if args.one_seq else 5
    if not shortest <= args.max_seq_len <= LONGEST_INSTANCE:
        raise UserError(
            f"--max_seq_len {args.max_seq_len}: expected at least {shortest} tokens, two of text "
            f"and the special ones, and at most {LONGEST_INSTANCE}"
        )


def check_corpus(corpus: Corpus, unknown: int, source: Path, one_seq: bool) -> None:
    """Raise a `UserError` for a corpus that no instances can be made from; warn of many [UNK]."""
    if not corpus.documents:
        raise UserError(
            f"{source}: 0 documents; expected one sentence a line and a blank line between "
            "documents (prepare_data.py writes it so)"
        )
    if corpus.documents == 1 and not one_seq:
        raise UserError(
            f"{source}: 1 document, so there is no other to take random next sentences from; "
            "expected a blank line between documents, or --one_seq"
        )
    share = unknown / len(corpus.token_ids)
    if share > 0.1:
        logger.warning(
            "%s: %.0f %% of the word pieces are [UNK]; does the vocabulary fit the language "
            "and the case (--do_lower_case)?", source, 100 * share,
        )
    logger.info("%s: %d documents, %d sentences, %d word pieces", source, corpus.documents,
                corpus.sentences, len(corpus.token_ids))


# ------------------------------------------------------------------ stages


def tokenize(folder: Path, source: Path, tokenizer: BertTokenizer, workers: int) -> int:
    """Write the files of the tokenized corpus; return how many word pieces are [UNK]."""
    blocks = list(line_blocks(source, BLOCK_BYTES))
    sizes = [end - start for start, end in blocks]
    with worker_pool(partial(tokenize_block, source, tokenizer), workers) as run:
        return write_corpus(folder, progress(run(blocks), sizes, "B", "tokenize"))


def generate(
    folder: Path, corpus: Corpus, writer: EpochWriter, epoch: int, workers: int
) -> int:
    """Write the data files of an epoch and its counts; return its number of instances."""
    blocks, rows = document_blocks(corpus, SENTENCES_PER_BLOCK), 0
    sizes = [end - begin for begin, end in blocks]
    with ExitStack() as stack:
        run = stack.enter_context(worker_pool(partial(writer.encode, epoch), workers))
        files = [stack.enter_context(epoch_path(folder, epoch, suffix).open("wb"))
                 for suffix in writer.suffixes]
        for count, contents in progress(run(blocks), sizes, "sentence", f"epoch {epoch}"):
            for file, content in zip(files, contents, strict=True):
                file.write(content)
            rows += count
    writer.write_metrics(epoch_path(folder, epoch, METRICS_SUFFIX), rows)
    return rows


def generate_all(
    folder: Path, corpus: Corpus, writer: EpochWriter, epochs: int, workers: int
) -> list[int]:
    """Write all epochs, and what describes their corpus; return the instances of each."""
    rows = [generate(folder, corpus, writer, 0, workers)]
    # The other epochs are as large as the first.
    size = sum(path.stat().st_size for path in folder.glob("epoch_0*"))
    check_disk("pregeneration", folder, (epochs - 1) * size)
    rows += [generate(folder, corpus, writer, epoch, workers) for epoch in range(1, epochs)]
    if writer.format == "binary":
        writer.write_info(folder / CORPUS_INFO_NAME)
    else:
        (folder / CORPUS_IDS_NAME).unlink()
    return rows


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
        with path.open("rb") as file:
            os.fsync(file.fileno())
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
    add("--train_corpus", type=Path, required=True,
        help="text file: one sentence a line, a blank line between documents")
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
    add("--num_workers", type=int, default=1,
        help="number of processes to tokenize and generate in; the output is the same")
    add("--format", choices=["binary", "json"], default="binary",
        help="binary: the corpus once and instances as spans of it; json: the original's files")
    add("--epochs_to_generate", type=int, default=3, help="number of epochs of instances")
    add("--max_seq_len", type=int, default=128,
        help="length of an instance, in tokens with the special ones")
    add("--short_seq_prob", type=float, default=0.1,
        help="share of documents (0 to 1) cut into instances of a random shorter length")
    add("--masked_lm_prob", type=float, default=0.0,
        help="share of tokens (0 to 1) to mask; 0 masks nothing")
    add("--max_predictions_per_seq", type=int, default=20,
        help="most masked tokens of an instance")
    add("--one_seq", action="store_true",
        help="one segment an instance, no next sentence (switch)")
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
    check_args(args)
    if not args.train_corpus.is_file():
        raise UserError(
            f"--train_corpus {args.train_corpus}: no such file; expected a text file, one "
            "sentence a line and a blank line between documents"
        )
    address = s3_address(args.data_url)
    tokenizer = BertTokenizer.from_pretrained(
        fetch_model(args.bert_model, weights=False), args.do_lower_case or None)
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir,
                                    [args.train_corpus, args.bert_model], keep=True)
    for folder in output_dir.glob(f"{UNFINISHED}*"):  # of a killed call
        shutil.rmtree(folder)
    masking = Masking(
        tokenizer, args.masked_lm_prob, args.max_predictions_per_seq, args.do_whole_word_mask
    )
    settings = EpochSettings(args.seed, args.max_seq_len, args.short_seq_prob, args.one_seq)

    # All files are made in a folder of their own, so that only finished ones are left behind.
    with TemporaryDirectory(prefix=UNFINISHED, dir=output_dir) as name:
        folder = Path(name)
        unknown = tokenize(folder, args.train_corpus, tokenizer, args.num_workers)
        corpus = Corpus.open(folder, len(tokenizer))
        check_corpus(corpus, unknown, args.train_corpus, args.one_seq)
        writer = EpochWriter(folder, tokenizer, settings, masking, args.format)
        rows = generate_all(folder, corpus, writer, args.epochs_to_generate, args.num_workers)
        size = publish(folder, output_dir, args)
    logger.info("%s: %d epochs of %s instances, %d bytes, %.1f s", output_dir, len(rows),
                ", ".join(map(str, rows)), size, time.perf_counter() - start)

    # Copy, where asked to.
    if address:
        upload_folder(output_dir, address)


if __name__ == "__main__":
    run_script(main, get_args_parser())
