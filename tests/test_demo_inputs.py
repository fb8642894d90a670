"""The demo's inputs: exact formats, repeatable bytes, and the programs that train on them."""

import bz2
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, SPECIAL, same_weights

import pretrain_bert
from demo import glue_tasks
from demo.english import is_prose, load_documents
from demo.make_inputs import CORPUS_NAME, DUMP_NAME, ROWS, VECTORS_NAME
from transformer.checkpoint import load_state
from transformer.file_utils import UserError
from transformer.modeling import BertConfig, BertForMaskedLM
from transformer.tasks import GLUE_TASKS, load_examples
from transformer.tokenization import BertTokenizer


def start_script(name: str, *flags: object, hash_seed: str = "0") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"demo/{name}", *map(str, flags)]
    return subprocess.Popen(command, cwd=REPO, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two runs of make_inputs.py with different hash seeds."""
    folders = [tmp_path_factory.mktemp("inputs") / name for name in "ab"]
    runs = [start_script("make_inputs.py", "--output_dir", folder, hash_seed=str(i))
            for i, folder in enumerate(folders)]
    for run in runs:
        finish(run)
    return folders


@pytest.fixture(scope="module")
def inputs(two_runs):
    return two_runs[0]


def test_two_runs_give_the_same_bytes(two_runs):
    first, second = two_runs
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert len(names) == 13
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("folder", ROWS)
def test_tasks_load_with_the_reader_of_published_files(inputs, folder):
    task = next(t for t in GLUE_TASKS.values() if t.folder == folder)
    for split, rows in zip(("train", "dev"), ROWS[folder], strict=True):
        examples = load_examples(task, inputs / "glue_data" / folder, split)
        assert len(examples) == rows
        counts = Counter(example.label for example in examples)
        assert set(counts) == set(task.labels)
        assert max(counts.values()) < 0.6 * rows  # no class is an easy guess
        assert all(example.text_a.strip() for example in examples)


def test_files_look_as_published(inputs):
    def first_bytes(name: str) -> bytes:
        return (inputs / "glue_data" / name).read_bytes().split(b"\n")[0]

    assert first_bytes("MRPC/train.tsv").startswith(b"\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String")
    assert first_bytes("SST-2/dev.tsv") == b"sentence\tlabel"
    assert first_bytes("RTE/train.tsv") == b"index\tsentence1\tsentence2\tlabel"
    source, label, mark, sentence = first_bytes("CoLA/train.tsv").split(b"\t")
    assert source.startswith(b"py")
    assert (label, mark) in [(b"1", b""), (b"0", b"*"), (b"0", b""), (b"1", b"*")]
    assert sentence


@pytest.mark.parametrize("folder", ["CoLA", "MRPC", "RTE"])
def test_dev_sentences_are_not_in_train(inputs, folder):
    task = next(t for t in GLUE_TASKS.values() if t.folder == folder)
    seen, dev = (
        {example.text_a for example in load_examples(task, inputs / "glue_data" / folder, split)}
        for split in ("train", "dev")
    )
    assert len(dev & seen) <= 0.02 * len(dev)


def test_wikiextractor_extracts_the_dump(inputs, tmp_path):
    pytest.importorskip("wikiextractor")
    command = [sys.executable, "-m", "wikiextractor.WikiExtractor", str(inputs / DUMP_NAME),
               "--json", "-q", "--processes", "1", "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    files = sorted(path for path in tmp_path.rglob("wiki_*"))
    articles = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    texts = [article["text"] for article in articles if article["text"].strip()]
    assert len(texts) > 200
    everything = "\n".join(texts)
    assert len(everything) > 500_000
    for markup in ("[[", "{{", "<ref", "''", "wikitable", "thumb|"):
        assert markup not in everything, markup


def test_dump_has_the_parts_of_a_real_one(inputs):
    dump = bz2.decompress((inputs / DUMP_NAME).read_bytes()).decode("utf-8")
    for part in ("<siteinfo>", "<namespace key=\"10\"", "<redirect title=", "[[Category:",
                 "{{Infobox", "&lt;ref name=", "== References ==", "<ns>1</ns>"):
        assert part in dump, part


def test_vocabulary_starts_with_the_special_tokens_and_spells_the_text(inputs):
    tokenizer = BertTokenizer.from_pretrained(inputs / "bert_config")
    assert list(tokenizer.vocab)[:5] == SPECIAL
    config = BertConfig.from_json_file(inputs / "bert_config" / "config.json")
    assert len(tokenizer) == config.vocab_size
    for student in ("tinybert_4l_config", "tinybert_6l_config"):
        shape = BertConfig.from_json_file(REPO / "demo" / student / "config.json")
        assert shape.vocab_size == config.vocab_size
        assert shape.num_attention_heads == config.num_attention_heads
        assert config.num_hidden_layers % shape.num_hidden_layers == 0
    lines = (inputs / CORPUS_NAME).read_text().split("\n")
    ids = [i for row in tokenizer.encode_batch(lines) for i in row]
    assert ids.count(tokenizer.unk_id) < 0.001 * len(ids)


def test_word_vectors_are_in_the_format_of_glove_and_mean_something(inputs):
    lines = (inputs / VECTORS_NAME).read_text().splitlines()
    words = [line.split(" ")[0] for line in lines]
    vectors = np.array([line.split(" ")[1:] for line in lines], dtype=float)
    assert vectors.shape[1] == 50
    assert len(set(words)) == len(words) > 2000
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = vectors @ vectors[words.index("awful")]
    place = {word: rank for rank, word in enumerate(np.array(words)[np.argsort(-similar)])}
    assert np.median([place[word] for word in glue_tasks.BAD]) < 200


def test_text_is_prose():
    documents = load_documents()
    assert len(documents) > 150
    sentences = [sentence for document in documents for sentence in document.sentences]
    assert len(sentences) == len(set(sentences)) > 7000
    assert all(is_prose(sentence) for sentence in sentences)
    assert not is_prose("x = [1, 2, 3] is what f(x) returns.")
    assert not is_prose("returns a value")


TINY = BertConfig(vocab_size=4000, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                  intermediate_size=32, max_position_embeddings=40)


@pytest.fixture(scope="module")
def tiny_text(inputs, tmp_path_factory):
    """A configuration folder and a short corpus."""
    folder = tmp_path_factory.mktemp("tiny")
    BertTokenizer.from_pretrained(inputs / "bert_config").save_vocabulary(folder)
    (folder / "config.json").write_text(json.dumps(TINY.to_dict()))
    blocks = (inputs / CORPUS_NAME).read_text().split("\n\n")[:60]
    (folder / "corpus.txt").write_text("\n\n".join(block[:2000] for block in blocks))
    return folder


def pretrain(tiny_text: Path, output: Path, *flags: object) -> None:
    parser = pretrain_bert.get_args_parser()
    common = ["--train_corpus", tiny_text / "corpus.txt", "--output_dir", output,
              "--max_seq_length", 40, "--train_batch_size", 8, "--precision", "fp32"]
    pretrain_bert.main(parser.parse_args([str(flag) for flag in [*common, *flags]]))


def test_pretraining_lowers_the_held_out_loss_and_saves_the_head(tiny_text, tmp_path):
    pretrain(tiny_text, tmp_path / "m", "--config", tiny_text, "--steps", 30,
             "--shallow_layers", 2, "--shallow_steps", 30)
    result = json.loads((tmp_path / "m" / "args.json").read_text())["masked_lm"]
    assert result["loss"] < result["loss_before"] - 0.5
    model = BertForMaskedLM.from_pretrained(tmp_path / "m")  # strict: the head is there
    assert len(model.bert.encoder.layer) == 4


def test_pretraining_repeats_with_its_seed(tiny_text, tmp_path):
    for name in "ab":
        pretrain(tiny_text, tmp_path / name, "--config", tiny_text, "--steps", 3)
    assert same_weights(*(load_state(tmp_path / name) for name in "ab"))


def test_head_only_leaves_every_other_weight_as_it_was(tiny_text, tmp_path):
    pretrain(tiny_text, tmp_path / "base", "--config", tiny_text, "--steps", 2)
    pretrain(tiny_text, tmp_path / "head", "--bert_model", tmp_path / "base", "--head_only",
             "--steps", 5)
    before, after = load_state(tmp_path / "base"), load_state(tmp_path / "head")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("cls.predictions.")
                       and not key.endswith("decoder.weight")}


def test_stacking_copies_the_trained_layers():
    model = BertForMaskedLM(TINY)
    shallow = pretrain_bert.shallow_model(model, 2)
    assert len(shallow.bert.encoder.layer) == 2
    assert len(model.bert.encoder.layer) == 4
    assert shallow.bert.encoder.layer[1] is model.bert.encoder.layer[1]
    pretrain_bert.stack_layers(model, 2)
    for low, high in ((0, 2), (1, 3)):
        pairs = zip(model.bert.encoder.layer[low].parameters(),
                    model.bert.encoder.layer[high].parameters(), strict=True)
        assert all(torch.equal(a, b) and a is not b for a, b in pairs)


def test_masking_hides_only_real_words(inputs):
    tokenizer = BertTokenizer.from_pretrained(inputs / "bert_config")
    document = tokenizer.encode_batch(["The parser reads a file.", "It returns a list of names."])
    rng = np.random.default_rng(0)
    rows = list(pretrain_bert.pack(document * 8, tokenizer, 40, rng))
    batch = pretrain_bert.mask_rows(rows, tokenizer, 0.15, rng)
    drawn = batch["labels"] != pretrain_bert.IGNORED
    assert drawn.any(dim=1).all()
    special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]
    assert not torch.isin(batch["labels"][drawn], torch.tensor(special)).any()
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row.ids) for row in rows]
    original = torch.where(drawn, batch["labels"], batch["input_ids"])
    assert original[0][: len(rows[0].ids)].tolist() == rows[0].ids
    assert {0, 1} == set(batch["token_type_ids"].flatten().tolist())


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--config"),
    (["--config", "{tiny}", "--head_only"], "--bert_model"),
    (["--config", "{tiny}", "--max_seq_length", "64"], "40 positions"),
    (["--config", "{tiny}", "--shallow_layers", "4", "--shallow_steps", "1"], "fewer than"),
    (["--config", "{tiny}", "--shallow_layers", "2"], "belong together"),
    (["--config", "{tiny}", "--vocab_size", "99"], "at least 100"),
    (["--config", "{tiny}", "--vocab_size", "500", "--vocab", "{tiny}"], "without --vocab"),
])
def test_mistakes_of_the_user_are_named(tiny_text, tmp_path, flags, message):
    flags = [flag.format(tiny=tiny_text) for flag in flags]
    with pytest.raises(UserError, match=message):
        pretrain(tiny_text, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
