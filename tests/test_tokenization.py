"""The tokenizer gives the original's tokens and refuses vocabularies that are not one."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer import tokenization
from transformer.file_utils import UserError
from transformer.tokenization import SPECIAL_TOKENS, BertTokenizer, load_vocab

GOLDEN = Path(__file__).parent / "golden"
VOCAB = GOLDEN / "bert_base_uncased_vocab.txt"


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(VOCAB)


def golden_rows(name: str) -> list[dict]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def write_vocab(path: Path, *pieces: str) -> Path:
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return path


def test_lower_cased_tokens_and_ids_are_the_originals(tokenizer):
    rows = golden_rows("tokenization.json")
    for row in rows:
        assert tokenizer.basic_tokenizer.tokenize(row["text"]) == row["basic"]
        assert tokenizer.tokenize(row["text"]) == row["tokens"]
        assert tokenizer.convert_ids_to_tokens(row["ids"]) == row["tokens"]
    texts = [row["text"] for row in rows]
    assert tokenizer.encode_batch(texts) == [row["ids"] for row in rows]
    ids, lengths = tokenizer.encode_flat(texts)
    assert ids.tolist() == [index for row in rows for index in row["ids"]]
    assert lengths.tolist() == [len(row["ids"]) for row in rows]


def test_cased_tokens_are_the_originals():
    tokenizer = BertTokenizer(VOCAB, do_lower_case=False)
    for row in golden_rows("tokenization_cased.json"):
        assert tokenizer.tokenize(row["text"]) == row["tokens"]


def test_special_tokens_are_kept_only_where_they_stand_alone(tokenizer):
    assert tokenizer.tokenize("A [MASK] [SEP]\t[CLS]") == ["a", "[MASK]", "[SEP]", "[CLS]"]
    assert tokenizer.tokenize("[MASK].")[:3] == ["[", "mask", "]"]
    assert tokenizer.tokenize("\u4e2d[MASK]") == ["\u4e2d", "[MASK]"]
    for token in SPECIAL_TOKENS:
        assert tokenizer.tokenize(token) == [token]
        assert tokenizer.encode_batch([token, "x"])[0] == [tokenizer.vocab[token]]


CASED = BertTokenizer(VOCAB, do_lower_case=False)
UNCASED = BertTokenizer(VOCAB)
AWKWARD = [
    *SPECIAL_TOKENS, "[", "]", " ", "  ", "\t", "\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e",
    "\x1f", "\x00", "\x7f", "\x85", "\u200b", "\ufeff", "\ufffd", "\u00a0", "\u2003", "\u2028",
    "\u039f\u0394\u039f\u03a3", "\u0391\u03a3.\u0392", "\u03a3", "\u4e2d\u56fd", "\u65e5", "a", "B",
    "Unaffable", "\u00c9", "e\u0301", "\u0301", "\u0130", "\u00df", "\ufb01", ".", ",", "-",
    "\u2013", "<\u0338", "\U0001d518", "\U0001f600", "x" * 99, "q" * 101, "1,000.5", "##ing",
    "\u212a",
]


def ids_of_parts(tokenizer: BertTokenizer, text: str) -> list[int]:
    """The ids of a text by the Rust tokenizer alone, special tokens apart."""
    ids = []
    for part in tokenizer.basic_tokenizer.parts(text):
        special = part in SPECIAL_TOKENS
        ids += [tokenizer.vocab[part]] if special else tokenizer.encode_with_spans(part)[0]
    return ids


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(
        st.lists(st.sampled_from(AWKWARD), max_size=12).map("".join),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    ), max_size=8),
    st.sampled_from([CASED, UNCASED]),
    st.sampled_from([1, 40, 1 << 18]),
)
def test_texts_in_blocks_give_the_ids_of_each_text_alone(texts, tokenizer, block_bytes):
    expected = [ids_of_parts(tokenizer, text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "BLOCK_BYTES", block_bytes)
        assert tokenizer.encode_batch(texts) == expected
        ids, lengths = tokenizer.encode_flat(texts)
    assert ids.tolist() == sum(expected, []) and lengths.tolist() == list(map(len, expected))
    assert ids.dtype == lengths.dtype == np.int32


def test_lines_are_texts_and_must_be_utf8(tokenizer):
    text = "A cat,\n\n\u4e2d [MASK]\nx\r\n"
    ids, lengths = tokenizer.encode_lines(text.encode())
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    assert [row.tolist() for row in rows] == tokenizer.encode_batch(text.split("\n"))
    for wrong in (b"a \xff b", b"\xff", b"\xc3", b"[MASK] \xc3", b"\xe2\x82,"):
        with pytest.raises(UnicodeDecodeError):
            tokenizer.encode_lines(wrong)
        # Nothing of it stays behind.
        assert tokenizer.encode_lines(text.encode())[0].tolist() == ids.tolist()


def test_what_is_remembered_of_earlier_texts_is_bounded(monkeypatch):
    monkeypatch.setattr(tokenization, "CACHE_BYTES", 20_000)
    tokenizer = BertTokenizer(VOCAB)
    sizes = []
    for number in range(50):
        words = [f"word{number}x{count}" for count in range(30)]
        assert tokenizer.encode_batch(words) == [ids_of_parts(tokenizer, word) for word in words]
        sizes.append(len(tokenizer.table))
    assert max(sizes) < 20_000 / 200 + 40
    assert sum(left > right for left, right in zip(sizes, sizes[1:], strict=False)) > 5


def test_empty_texts_long_words_and_the_final_sigma_are_as_in_the_original(tokenizer):
    lengths = [len(ids) for ids in tokenizer.encode_batch(["", " \t\n", "\u200b\x00", "a"])]
    assert lengths == [0, 0, 0, 1] and tokenizer.encode_batch([]) == []
    assert tokenizer.tokenize("a" * 101) == ["[UNK]"]
    assert "[UNK]" not in tokenizer.tokenize("a" * 100)
    words = tokenizer.basic_tokenizer.tokenize("\u039f\u0394\u039f\u03a3 [MASK] x")
    assert words == ["\u03bf\u03b4\u03bf\u03c2", "[MASK]", "x"]


def test_vocabulary_is_in_id_order_and_survives_pickling(tokenizer):
    assert list(tokenizer.vocab.values()) == list(range(len(tokenizer))) == list(range(30522))
    assert tokenizer.vocab["[MASK]"] == tokenizer.mask_id == 103
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.tokenize("Unaffable cats") == tokenizer.tokenize("Unaffable cats")


def test_a_vocabulary_with_windows_line_ends_reads_the_same(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_bytes("\r\n".join([*SPECIAL_TOKENS, "a", "##b", ""]).encode())
    assert load_vocab(file) == {piece: i for i, piece in enumerate([*SPECIAL_TOKENS, "a", "##b"])}


@pytest.mark.parametrize(("content", "message"), [
    ("[PAD] [UNK] [CLS] [SEP] [MASK] a  b", "line 7 is blank"),
    ("[PAD] [UNK] [CLS] [SEP] [MASK] a b a", "lines 6 and 8 are both 'a'"),
    ("[PAD] [UNK] [CLS] [SEP] a", r"lacks \[MASK\]"), ("", "lacks"), ("\udcff", "not UTF-8"),
    (None, r"vocab\.txt: no such file"),
])
def test_a_broken_vocabulary_is_refused_by_file_and_line(tmp_path, content, message):
    if content is not None:
        lines = content.replace(" ", "\n").encode(errors="surrogateescape")
        (tmp_path / "vocab.txt").write_bytes(lines)
    with pytest.raises(UserError, match=message) as error:
        BertTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_case_rule_comes_from_the_model_directory_unless_a_flag_says_otherwise(
        tmp_path, caplog):
    write_vocab(tmp_path / "vocab.txt", *SPECIAL_TOKENS, "a", "Berlin")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("Berlin berlin") == ["Berlin", "[UNK]"]  # has capitals: cased
    write_vocab(tmp_path / "vocab.txt", *SPECIAL_TOKENS, "a", "b")
    assert BertTokenizer.from_pretrained(tmp_path).do_lower_case
    normalizer = {"normalizer": {"type": "BertNormalizer", "lowercase": False}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(normalizer))
    assert not BertTokenizer.from_pretrained(tmp_path).do_lower_case
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert BertTokenizer.from_pretrained(tmp_path).do_lower_case
    with caplog.at_level(logging.WARNING):
        assert BertTokenizer.from_pretrained(tmp_path, True).do_lower_case
        assert not caplog.records
        assert not BertTokenizer.from_pretrained(tmp_path, False).do_lower_case
    assert "do_lower_case=True" in caplog.text


@pytest.mark.parametrize("lower", [True, False])
def test_a_saved_vocabulary_reads_back_here_and_in_transformers(tmp_path, tokenizer, lower):
    original = BertTokenizer(VOCAB, do_lower_case=lower)
    original.save_vocabulary(tmp_path)
    back = BertTokenizer.from_pretrained(tmp_path)
    assert back.vocab == original.vocab
    assert back.do_lower_case == lower
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(str(tmp_path))
    for row in golden_rows("tokenization.json")[:20]:
        ids = theirs(row["text"], add_special_tokens=False)["input_ids"]
        assert ids == original.encode_batch([row["text"]])[0]
