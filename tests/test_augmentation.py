"""Algorithm 1: candidates are the original's, and each fault of the original stays away."""

import copy
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, SHARED, error_line, make_masked_lm, random_vectors, run

import data_augmentation
from transformer.augmentation import DataAugmentor, GloveIndex
from transformer.checkpoint import load_state, save_pretrained
from transformer.file_utils import UserError
from transformer.modeling import BertConfig, BertForMaskedLM, BertModel
from transformer.table_files import read_tsv, write_tsv
from transformer.tasks import GLUE_TASKS, get_task, load_examples, original_rows
from transformer.tokenization import BertTokenizer
from transformer.words import WordFinder, english_words, is_replacement

WORD_LIST = """
cat dog bird fish tree house river road stone cloud rain snow wind fire night day moon star
green blue white black small large quick slow old new warm cold runs sleeps eats sees finds
"""
WORDS = WORD_LIST.split()
RARE = ["riverbank", "stonecold", "snowwhite"]  # several word pieces each
PIECES = ["##bank", "##cold", "##white", "[unused7]", "!", ".", ",", '"', "'", "the", "a", "is"]


def write_vectors(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A tiny BERT with random weights and a vocabulary of its own, saved with its head."""
    return make_masked_lm(tmp_path_factory.mktemp("model"), [*PIECES, *WORDS], 40)


@pytest.fixture(scope="module")
def vector_file(tmp_path_factory) -> Path:
    return random_vectors(tmp_path_factory.mktemp("vectors") / "glove.txt", [*WORDS, *RARE])


@pytest.fixture
def make_augmentor(model_dir, vector_file):
    def make(dtype: torch.dtype = torch.float32, **settings) -> DataAugmentor:
        return DataAugmentor(
            BertForMaskedLM.from_pretrained(model_dir).to(dtype),
            BertTokenizer.from_pretrained(model_dir),
            GloveIndex.load(vector_file),
            **settings,
        )

    return make


@pytest.fixture(scope="module")
def golden():
    """The golden rows and what made them: (rows, model, tokenizer, word vectors)."""
    weights = SHARED / "golden" / "augmentation_mlm.npz"
    if not weights.is_file():
        pytest.skip("augmentation_mlm.npz is too large to copy; set TINYBERT_SHARED to its project")
    facts = json.loads((GOLDEN / "augmentation_candidates.json").read_text(encoding="utf-8"))
    model = BertForMaskedLM(BertConfig.from_dict(facts["config"]))
    with np.load(weights) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    tokenizer = BertTokenizer(GOLDEN / "bert_base_uncased_vocab.txt")
    return facts, model, tokenizer, GloveIndex.load(GOLDEN / "augmentation_vectors.txt")


@pytest.fixture
def script(model_dir, vector_file, tmp_path):
    """Write a task's train.tsv and run the script on it; returns the file that it wrote."""

    def call(task: str, rows: list[list[str]], *flags: object) -> Path:
        folder = tmp_path / get_task(task).folder
        write_tsv(folder / "train.tsv", rows)
        run(data_augmentation, "--pretrained_bert_model", model_dir, "--glove_embs", vector_file,
            "--glue_dir", tmp_path, "--task_name", task, "--precision", "fp32", "--overwrite",
            *flags)
        return folder / "train_aug.tsv"

    return call


def refused(capsys, *flags: object) -> str:
    """Run the script, expect a user's mistake, and return its line."""
    return error_line(capsys, data_augmentation, *flags)


PAIR_HEADER = ["index", "sentence1", "sentence2", "label"]
PAIRS = [
    ["0", 'The "cat" sleeps.', "A small dog runs", "entailment"],
    ["1", "green house, old tree", "the river is cold", "not_entailment"],
]


# ------------------------------------------------------------------ candidates


@pytest.mark.parametrize("batch_tokens", [0, 300, 1])
def test_candidates_are_the_originals_at_every_batch_size(golden, batch_tokens):
    facts, model, tokenizer, glove = golden
    augmentor = DataAugmentor(
        model, tokenizer, glove, M=facts["M"], drop_non_words=False, batch_tokens=batch_tokens
    )
    rows = facts["rows"]
    found = augmentor.candidates([row["sentence"] for row in rows])
    for row, candidates in zip(rows, found, strict=True):
        assert {str(index): words for index, words in candidates.items()} == row["candidates"]


def test_only_words_are_proposed_and_always_M_of_them(golden):
    facts, model, tokenizer, glove = golden
    augmentor = DataAugmentor(model, tokenizer, glove, M=15)
    sentences = [row["sentence"] for row in facts["rows"]]
    lists = [words for row in augmentor.candidates(sentences) for words in row.values()]
    assert all(is_replacement(word) and word == word.lower() for row in lists for word in row)
    assert {len(words) for words in lists} == {15}


def test_specials_punctuation_and_pieces_are_no_replacements():
    assert not any(map(is_replacement, ["[UNK]", "[unused7]", "!", "##ing", "...", "\u00b2", ""]))
    assert all(map(is_replacement, ["cat", "1912", "\u4e2d", "caf\u00e9"]))


def test_stop_words_numbers_and_punctuation_are_not_varied(make_augmentor):
    found = make_augmentor().candidates(["The cat, 1912 is a riverbank."])[0]
    assert list(found) == [1, 6]  # cat, riverbank


@pytest.mark.parametrize("drop_non_words", [True, False])
def test_fewer_than_M_usable_words_give_what_there_is(make_augmentor, drop_non_words):
    augmentor = make_augmentor(M=500, drop_non_words=drop_non_words)
    masked, rare = augmentor.candidates(["cat riverbank"])[0].values()
    usable = len(WORDS) + len(["the", "a", "is"])
    assert len(masked) == usable + (0 if drop_non_words else 5 + len(PIECES) - 3 - 3)
    assert not any(word.startswith("##") for word in masked)
    assert sorted(rare) == sorted({*WORDS, *RARE} - {"riverbank"})


def test_a_rare_word_without_vector_keeps_itself_and_is_counted(make_augmentor):
    augmentor = make_augmentor()
    assert augmentor.candidates(["nightbank"]) == [{0: ["nightbank"]}]
    assert augmentor.counts["no_candidates"] == 1
    assert augmentor.augment(["nightbank"]) == [["nightbank"]]


@pytest.mark.parametrize("sentence", ["", "  ", "...", "\u200b", "[MASK] [SEP]", "\u2603 42"])
def test_a_sentence_without_words_is_returned_alone(make_augmentor, sentence):
    augmentor = make_augmentor()
    assert augmentor.candidates([sentence]) == [{}]
    assert augmentor.augment([sentence]) == [[sentence]]
    assert augmentor.augment([]) == []


@pytest.mark.parametrize("length", [18, 19, 37, 38, 39, 40, 41, 200])
def test_sentences_longer_than_the_models_positions_are_varied_to_their_end(
    make_augmentor, length
):
    words = [WORDS[number % len(WORDS)] for number in range(length)]
    found = make_augmentor(M=3).candidates([" ".join(words)])[0]
    assert list(found) == list(range(length))
    assert all(len(candidates) == 3 for candidates in found.values())


def test_a_model_without_masked_lm_head_is_refused(model_dir, vector_file, tmp_path, capsys):
    tokenizer = BertTokenizer.from_pretrained(model_dir)
    save_pretrained(BertModel.from_scratch(model_dir), tmp_path / "body", tokenizer)
    write_tsv(tmp_path / "RTE" / "train.tsv", [PAIR_HEADER, *PAIRS])
    assert "cls.predictions" in refused(
        capsys, "--pretrained_bert_model", tmp_path / "body", "--glove_embs", vector_file,
        "--glue_dir", tmp_path, "--task_name", "RTE")
    assert not (tmp_path / "RTE" / "train_aug.tsv").exists()


def test_a_vocabulary_larger_than_the_model_is_refused(model_dir, vector_file):
    model = BertForMaskedLM.from_pretrained(model_dir)
    tokenizer = BertTokenizer(GOLDEN / "bert_base_uncased_vocab.txt")
    with pytest.raises(UserError, match="30522 word pieces"):
        DataAugmentor(model, tokenizer, GloveIndex.load(vector_file))


def test_a_probability_out_of_range_is_refused(model_dir, vector_file, tmp_path, capsys):
    assert "--p 1.5: expected" in refused(
        capsys, "--pretrained_bert_model", model_dir, "--glove_embs", vector_file,
        "--glue_dir", tmp_path, "--task_name", "RTE", "--p", 1.5)


# ------------------------------------------------------------------ variations


# SHA-256 of the variations of a task's first rows, before words of other scripts were varied.
ENGLISH = [
    ("RTE", 60, "eedee4aed85db6352cf14994148f5462b358e28d9f5e8b6d497ca0fe7f6d3eea"),
    ("SST-2", 300, "2ec901384c2c8afcec76c901a6dae66431035a79ddb0a9de8bc0d8460c4b0983"),
]


@pytest.mark.parametrize(("task", "count", "expected"), ENGLISH)
def test_english_is_varied_as_it_always_was(golden, shared, task, count, expected):
    _, model, tokenizer, glove = golden
    rows = load_examples(task, shared / "data" / "glue_data" / task, "train", count)
    texts = [text for row in rows for text in (row.text_a, row.text_b) if text is not None]
    # In double precision no near-tie depends on the machine.
    varied = DataAugmentor(copy.deepcopy(model).double(), tokenizer, glove).augment(texts)
    assert hashlib.sha256(json.dumps(varied).encode()).hexdigest() == expected
    ascii_texts = [text for text in texts if text.isascii()]
    finder = WordFinder(glove.words, tokenizer.basic_tokenizer)
    assert [finder.find(text) for text in ascii_texts] == [
        english_words(text, tokenizer.basic_tokenizer) for text in ascii_texts]


def test_the_seed_decides_and_the_batching_does_not(make_augmentor):
    sentences = [" ".join(WORDS[start : start + 6]) for start in range(0, 24, 3)]
    together = make_augmentor(seed=7).augment(sentences)
    small = make_augmentor(seed=7, batch_tokens=20)
    assert together == [small.augment([sentence])[0] for sentence in sentences]
    assert together != make_augmentor(seed=8).augment(sentences)


def test_variations_are_distinct_at_most_N_and_keep_what_is_not_varied(make_augmentor):
    augmentor = make_augmentor(N=30)
    [[original, *variations]] = augmentor.augment(["The old cat is cold, the riverbank is warm"])
    assert original == "The old cat is cold, the riverbank is warm"
    assert 20 < len(variations) <= 30
    assert len(set(variations)) == len(variations)
    for variation in variations:
        tokens = variation.split()
        assert [tokens[i] for i in (0, 3, 5, 6, 8)] == ["the", "is", ",", "the", "is"]


def test_p_0_changes_nothing_and_p_1_every_word(make_augmentor):
    assert make_augmentor(p=0).augment(["Old cat runs"]) == [["Old cat runs"]]
    augmentor = make_augmentor(p=1, M=2)
    candidates = augmentor.candidates(["old cat runs"])[0]
    for variation in augmentor.augment(["old cat runs"])[0][1:]:
        words = variation.split()
        assert all(words[index] in candidates[index] for index in range(3))


def test_words_are_replaced_with_probability_p(make_augmentor):
    sentence = " ".join(WORDS[:12])
    variations = make_augmentor(N=300, p=0.4).augment([sentence])[0][1:]
    changed = [a != b for v in variations for a, b in zip(v.split(), WORDS, strict=False)]
    assert 0.33 < np.mean(changed) < 0.43  # a word may be proposed for its own place


def test_bf16_gives_the_same_kind_of_output(make_augmentor):
    augmentor = make_augmentor(dtype=torch.bfloat16)
    assert all(len(words) == 15 for words in augmentor.candidates(["old cat runs"])[0].values())


# ------------------------------------------------------------------ word vectors


def test_the_last_fields_are_the_vector_and_words_may_contain_spaces(tmp_path):
    path = write_vectors(
        tmp_path / "g.txt", "cat 1 0 0", ". . . 0 1 0", "at name@mail.com 0.9 0.1 0", "dog 0.9 0 1"
    )
    index = GloveIndex.load(path)
    assert index.words == ["cat", ". . .", "at name@mail.com", "dog"]
    assert index.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(index.vectors, axis=1), 1, rtol=1e-6)
    assert index.nearest(["cat"], 2) == [["at name@mail.com", "dog"]]
    assert index.nearest(["cat"], 2, words_only=True) == [["dog"]]


def test_a_word2vec_header_and_the_unknown_word_are_skipped(tmp_path):
    path = write_vectors(tmp_path / "g.txt", "4 2", "<unk> 0 0", "cat 1 0", "dog 1 1", "zero 0 0")
    index = GloveIndex.load(path)
    assert index.words == ["cat", "dog", "zero"]
    assert index.nearest(["cat", "zero", "bird", "cat"], 5) == [["dog"], [], [], ["dog"]]
    assert GloveIndex.load(path, vocab_size=1).words == ["cat"]


def test_neighbours_are_by_cosine_and_never_the_word_itself(tmp_path):
    path = write_vectors(tmp_path / "g.txt", "a 1 0", "far -1 0", "near 9 1", "mid 1 1")
    index = GloveIndex.load(path)
    assert index.nearest(["a"], 10) == [["near", "mid", "far"]]
    assert index.nearest(["a"], 1) == [["near"]]
    assert index.nearest(["a", "mid"], 1) == [["near"], ["near"]]  # the first from the cache


def test_neighbours_do_not_depend_on_the_words_looked_up_with_them(tmp_path):
    # Vectors so close that float32 products, whose last bits depend on how many there are, would
    # put them in another order.
    generator = np.random.default_rng(3)
    centre = generator.standard_normal(300)
    vectors = centre + 1e-4 * generator.standard_normal((400, 300))
    words = [f"w{number}" for number in range(400)]
    index = GloveIndex(words, vectors)
    together = index.nearest(words, 15)
    for size in (1, 2, 3, 7):
        fresh = GloveIndex(words, vectors)
        found = [near for start in range(0, 42, size)
                 for near in fresh.nearest(words[start : start + size], 15)]
        assert found == together[: len(found)]


def test_cased_vectors_are_found_by_lower_case_words(tmp_path):
    path = write_vectors(
        tmp_path / "g.txt", "Kidman 1 0", "KIDMAN 0.9 0.1", "Actor 1 0.1", "actor 1 0.2", "Tree 0 1"
    )
    index = GloveIndex.load(path)
    assert index.nearest(["kidman"], 3) == [[]]
    assert index.nearest(["kidman"], 3, words_only=True) == [["actor", "tree"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no such file"),
        ([], "no word vectors"),
        (["BZh9"], "a packed file; expected word vectors as text"),
        (["cat"], "line 1"),
        (["cat 1 2", "dog 1 2", "bird 1"], "line 3: 2 fields"),
        (["cat 1 2", "dog 1 x"], "line 2: 'dog 1 x'"),
        (["cat 1 2", "dog 1 2", "bird nan 2"], "line 3: 'bird nan 2'"),
    ],
)
def test_a_broken_vector_file_is_refused_by_line(tmp_path, lines, message):
    path = tmp_path / "g.txt"
    if lines is not None:
        write_vectors(path, *lines)
    with pytest.raises(UserError, match=message) as error:
        GloveIndex.load(path)
    assert str(path) in str(error.value)


def test_composed_vectors_are_the_means_of_the_word_pieces(model_dir, tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "vectors.txt"
    text.write_text("The cat sees the Riverbank.\nThe river\n")
    flags = ["--pretrained_bert_model", model_dir, "--glove_embs", output,
             "--compose_vectors", text, text]
    run(data_augmentation, *flags)
    lines = [line.split(" ") for line in output.read_text().splitlines()]
    assert [word for word, *_ in lines] == ["the", ".", "cat", "river", "riverbank", "sees"]
    table = load_state(model_dir)["bert.embeddings.word_embeddings.weight"].numpy()
    tokenizer = BertTokenizer.from_pretrained(model_dir)
    for word, *numbers in lines:
        mean = table[tokenizer.encode_batch([word])[0]].mean(axis=0)
        np.testing.assert_allclose(np.array(numbers, dtype=float), mean, atol=1e-4)
    assert GloveIndex.load(output).words == [word for word, *_ in lines]
    assert f"{output}: exists; --overwrite" in refused(capsys, *flags)
    run(data_augmentation, *flags, "--overwrite")


@pytest.mark.parametrize(("content", "message"), [
    ("\u2603\n".encode(), "text.txt: no words"), (b"one\n\xff", "text.txt, line 2: byte 0xff"),
])
def test_a_text_without_words_gives_no_vectors(model_dir, tmp_path, capsys, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    assert message in refused(
        capsys, "--pretrained_bert_model", model_dir, "--glove_embs", tmp_path / "vectors.txt",
        "--compose_vectors", tmp_path / "text.txt")
    assert not (tmp_path / "vectors.txt").exists()


# ------------------------------------------------------------------ the script


def test_while_one_sentence_is_varied_the_other_is_the_original(script):
    output = script("RTE", [PAIR_HEADER, *PAIRS], "--N", 8)
    rows = read_tsv(output)
    assert rows[0] == PAIR_HEADER
    for original in PAIRS:
        mine = [row for row in rows[1:] if row[0] == original[0]]
        assert mine[0] == original
        assert mine.count(original) == 1
        varied = [(row[1] != original[1], row[2] != original[2]) for row in mine[1:]]
        assert sorted(set(varied)) == [(False, True), (True, False)]
        assert max(varied.count(kind) for kind in set(varied)) <= 8
        assert {row[3] for row in mine} == {original[3]}
    assert len(load_examples("RTE", output.parent, "aug")) == len(rows) - 1


def test_quotes_are_written_as_they_are_read(script):
    rows = [['say "cat" now', "1"], ['"unbalanced old dog', "0"], ["it''s ,\"\" cold", "1"]]
    written = read_tsv(script("SST-2", [["sentence", "label"], *rows], "--N", 3))
    assert all(row in written for row in rows)
    assert any(row[0].startswith('" unbalanced') for row in written)
    assert not any('""' in row[0].replace(',""', "") for row in written)


@pytest.mark.parametrize("task", GLUE_TASKS.values(), ids=lambda task: task.name)
def test_every_task_of_glue_is_augmented(script, task):
    names = [name for name in (task.text_a, task.text_b, task.label) if name]
    header = list(task.columns) or ["number", *names]
    label = task.labels[0] if task.labels else "2.5"
    values = {task.text_a: "the old cat sleeps", task.text_b: "a dog runs", task.label: label}
    row = [values.get(name, "x") for name in header]
    rows = [row] if task.columns else [header, row]
    output = script(task.name.upper(), rows, "--N", 4)
    examples = load_examples(task, output.parent, "aug")
    assert len(examples) > 2
    assert examples[0].text_a == "the old cat sleeps"
    assert {example.label for example in examples} == {label}
    assert original_rows(task, output.parent) == [True, *[False] * (len(examples) - 1)]
    assert read_tsv(output)[: len(rows)] == rows


def test_the_flag_N_wins_over_the_tasks_number(script):
    rows = [["sentence", "label"], [" ".join(WORDS[:10]), "1"]]
    for flags, expected in (((), 20), (("--N", 30), 30), (("--N", 3), 3), (("--N=0",), 0)):
        assert len(read_tsv(script("sst-2", rows, *flags))) == 2 + expected


def test_the_seed_decides_and_batches_shards_and_max_train_rows_do_not(script, monkeypatch):
    def call(*flags: object) -> bytes:
        return script("RTE", [PAIR_HEADER, *PAIRS], "--N", 5, *flags).read_bytes()

    expected = call("--seed", 1)
    assert call("--seed", 1) == call("--seed", 1, "--batch_tokens", 9) == expected
    assert call("--seed", 2) != expected
    one = call("--seed", 1, "--max_train_rows", 1)
    assert expected.startswith(one) and len(one) < len(expected)
    monkeypatch.setattr(data_augmentation, "SHARD_ROWS", 1)
    assert call("--seed", 1) == expected


def test_rows_beyond_max_varied_rows_are_copied_as_they_are(script):
    rows = [PAIR_HEADER, *PAIRS]
    one = read_tsv(script("RTE", rows, "--N", 5, "--max_train_rows", 1))
    first_varied = read_tsv(script("RTE", rows, "--N", 5, "--max_varied_rows", 1))
    assert first_varied == one + [list(row) for row in PAIRS[1:]]


@pytest.mark.parametrize(("task", "rows", "message"), [
    ("RTE", [PAIR_HEADER, PAIRS[0], ["1", "only one"]], "train.tsv, line 3: 2 columns"),
    ("RTE", [PAIR_HEADER, [*PAIRS[0][:3], "maybe"]], "line 2: label 'maybe'"),
    ("SST-2", [["sentence", "label"]], "no rows"),
])
def test_bad_rows_are_named_and_nothing_is_written(script, tmp_path, capsys, task, rows, message):
    with pytest.raises(SystemExit):
        script(task, rows)
    error = capsys.readouterr().err
    assert message in error and "train.tsv" in error and error.count("\n") == 1
    assert [path.name for path in (tmp_path / task).iterdir()] == ["train.tsv"]


def test_the_closing_line_counts_rows_and_words(script, caplog):
    caplog.set_level(logging.INFO)
    output = script("RTE", [PAIR_HEADER, *PAIRS], "--N", 4)
    assert f"2 rows in, {len(read_tsv(output)) - 1} rows out" in caplog.text
    assert "0 of 19 word pieces are [UNK]" in caplog.text
    assert "[UNK]; does" not in caplog.text
    script("RTE", [PAIR_HEADER, ["0", "Zebra zebu", "zeal", "entailment"]], "--N", 4)
    assert "100 % of the word pieces are [UNK]" in caplog.text
