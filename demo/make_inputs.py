"""Makes the inputs of the offline demo, in the real formats and without any download.

Writes a bz2-compressed MediaWiki dump, GLUE folders for RTE, SST-2, CoLA and MRPC, the text of
the dump one sentence a line, a WordPiece vocabulary, word vectors in GloVe's format and the
configuration of a narrow 12-layer BERT. The same Python version and seed give the same bytes.

Example:
    python demo/make_inputs.py --output_dir data/demo --seed 42
"""

import argparse
import logging
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import glue_tasks, wiki_dump
from demo.english import Document, Section, load_documents, odd_words
from demo.word_vectors import cooccurrence_vectors
from transformer.augmentation import write_vectors
from transformer.file_utils import VOCAB_NAME, UserError, write_json, write_text
from transformer.run_folder import prepare_output_dir
from transformer.runtime import run_script
from transformer.tokenizer_files import train_vocabulary

logger = logging.getLogger(__name__)

DUMP_NAME = "enwiki-demo-pages-articles.xml.bz2"
CORPUS_NAME = "corpus.txt"
VECTORS_NAME = "glove.demo.50d.txt"
# Rows of train and dev; the dev sets are as large as GLUE's smaller ones.
ROWS = {"RTE": (3000, 300), "SST-2": (4000, 400), "CoLA": (4000, 400), "MRPC": (3600, 400)}
VOCABULARY_SIZE = 4000
REVIEWS = 12  # review sentences in a document's section "Reception"
BASE_CONFIG = {
    "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4,
    "intermediate_size": 256, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128, "type_vocab_size": 2,
    "initializer_range": 0.05, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}


def plain_sentences(document: Document) -> list[str]:
    """Return the sentences of words alone: no code, numbers, quotes or brackets."""
    return [s for s in document.sentences
            if odd_words(s) == 0 and not re.search(r"[\"()]|'\w+'", s)]


def add_reception(documents: list[Document], rng: random.Random) -> list[Document]:
    """Give half of the documents a section with opinions, so that the text knows their words."""
    extended = []
    for document in documents:
        sections = list(document.sections)
        facts = plain_sentences(document)
        if facts and rng.random() < 0.5:
            chosen = [rng.choice(facts) for _ in range(REVIEWS)]
            texts = [glue_tasks.sst2_texts(fact, rng.random() < 0.5, rng)[0] for fact in chosen]
            reviews = [glue_tasks.join_words(text.split()) for text in texts]
            sections.append(Section("Reception", [reviews[:6], reviews[6:]]))
        extended.append(Document(document.title, sections))
    return extended


def make_rows(name: str, documents: list[Document], seed: int) -> dict[str, list]:
    """Make the train and dev rows of a task; no sentence is used in both."""
    rng = random.Random(f"{seed} {name}")
    shortest, longest = glue_tasks.LENGTHS[name]
    plain = [s for document in documents for s in plain_sentences(document)
             if shortest <= len(s.split()) <= longest]
    rng.shuffle(plain)
    train_rows, dev_rows = ROWS[name]
    train, dev = plain[: train_rows // 2], plain[train_rows // 2 :][:dev_rows]
    if len(dev) < dev_rows:
        raise UserError(f"this Python's documentation: {len(plain)} sentences for {name}; "
                        f"expected at least {train_rows // 2 + dev_rows}")
    return {"train": glue_tasks.make_split(name, train, train, True, rng),
            "dev": glue_tasks.make_split(name, dev, dev, False, rng)}


def write_task(folder: Path, name: str, rows: dict[str, list]) -> None:
    """Write train.tsv and dev.tsv exactly as the published task lays them out."""
    header = glue_tasks.HEADERS[name]
    for split, split_rows in rows.items():
        lines = [glue_tasks.COLUMNS[name](number, row) for number, row in enumerate(split_rows)]
        lines = ([header] if header else []) + lines
        text = "".join("\t".join(cells) + "\n" for cells in lines)
        write_text(folder / name / f"{split}.tsv", text)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    parser.add_argument("--overwrite_output_dir", action="store_true",
                        help="write into a folder that is not empty")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make every input of the demo."""
    output_dir = prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, keep=True)
    plain_documents = load_documents()
    documents = add_reception(plain_documents, random.Random(f"{args.seed} reception"))
    lines = [sentence for document in documents for sentence in document.sentences]

    # Wikipedia dump, and its sentences with a blank line between documents
    wiki_dump.write_dump(output_dir / DUMP_NAME, documents, random.Random(f"{args.seed} markup"))
    blocks = ["\n".join(document.sentences) + "\n" for document in documents]
    write_text(output_dir / CORPUS_NAME, "\n".join(blocks))

    # GLUE
    for name in ROWS:
        rows = make_rows(name, plain_documents, args.seed)
        write_task(output_dir / "glue_data", name, rows)

    # Vocabulary, word vectors, configuration
    vocabulary = train_vocabulary(lines, VOCABULARY_SIZE)
    if len(vocabulary) != VOCABULARY_SIZE:
        raise UserError(f"this Python's documentation: {len(vocabulary)} word pieces; expected "
                        f"{VOCABULARY_SIZE}, more text")
    base = output_dir / "bert_config"
    write_text(base / VOCAB_NAME, "\n".join(vocabulary) + "\n")
    write_json(base / "config.json", BASE_CONFIG)
    words, vectors = cooccurrence_vectors(lines)
    write_vectors(output_dir / VECTORS_NAME, words, vectors)
    logger.info("%d documents, %d sentences, %d tasks, %d word pieces, %d word vectors in %s",
                len(documents), len(lines), len(ROWS), len(vocabulary), len(words),
                output_dir)


if __name__ == "__main__":
    run_script(main, get_args_parser())
