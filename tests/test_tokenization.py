"""The tokenizer gives the original's tokens and refuses vocabularies that are not one."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from transformer import piece_tables, tokenization
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
    "\u212a", *"\uff0c\u3002\u3001\u2026\u2014\u201c\u2019\u3000\uff21\uff11\u304b\u304c\uac00",
    "\u3007", "\u3099", "\ufe0f", "\uf900", "\u3400", "\u9fff", "\U00020000", "\U0002f800",
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


def by_rust(vocab: dict[str, int], *settings: bool | None) -> Tokenizer:
    """The Rust tokenizer alone, as Hugging Face's library makes it."""
    lower, strip_accents, ideographs = settings
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer(
        lowercase=lower, strip_accents=strip_accents, handle_chinese_chars=ideographs)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


EVERY_CHARACTER = [chr(code) for code in (
    *range(0xD800), *range(0xE000, 0x10000), *range(0x1F600, 0x1F650), *range(0x20000, 0x20020),
    *range(0x2A6D0, 0x2A6F0), *range(0x2F800, 0x2F820)) if code not in (0x0A, 0x03A3)]


@pytest.mark.parametrize(("settings", "step"), [
    ((True, None, True), 1), ((False, None, True), 5), ((True, False, True), 7),
    ((False, True, True), 7), ((True, None, False), 7), ((False, False, False), 7)])
def test_every_character_alone_and_beside_others_gives_the_ids_of_the_rust_tokenizer(
        settings, step):
    characters = EVERY_CHARACTER[::step]
    pieces = [*SPECIAL_TOKENS, *EVERY_CHARACTER, *(f"##{each}" for each in EVERY_CHARACTER)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    texts = [f"{c} {c}{c} a{c}b \u4e2d{c}\u56fd\u3099{c}\u3099\uff0c{c}\u3002" for c in characters]
    expected = [each.ids for each in by_rust(vocab, *settings).encode_batch_fast(texts)]
    got = BertTokenizer(vocab, *settings).encode_batch(texts)
    wrong = [hex(ord(c)) for c, ours, rust in zip(characters, got, expected, strict=True)
             if ours != rust]
    assert wrong == []


CHINESE = st.one_of(
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.sampled_from("\u7684\u4e00\u662f\uff0c\u3002\uff01\u201c\u201d\u3001\u2026"),
    st.characters(min_codepoint=0x2000, max_codepoint=0xFFFF, exclude_categories=["Cs"]),
    st.sampled_from("aB1. \u00e9\u03a9\t[]\u00b7"))


TOKENIZERS = [(BertTokenizer(UNCASED.vocab, *each), by_rust(UNCASED.vocab, *each))
              for each in ((True, None, True), (False, None, True), (True, False, False))]


@given(st.lists(st.text(CHINESE, max_size=40), max_size=5), st.sampled_from(TOKENIZERS))
@settings(max_examples=200, deadline=None)
def test_chinese_text_gives_the_ids_of_the_rust_tokenizer(texts, tokenizers):
    ours, rust = tokenizers
    assert ours.encode_batch(texts) == [each.ids for each in rust.encode_batch_fast(texts)]


def test_special_tokens_are_kept_between_ideographs_but_not_beside_punctuation(tokenizer):
    for text, start in {
        "\u4e2d[MASK]\u56fd\uff0c[SEP]": "\u4e2d [MASK] \u56fd \uff0c [ sep ]",
        "\u4e2d [SEP] \u56fd\u3002\u4e00": "\u4e2d [SEP] \u56fd \u3002 \u4e00",
        "\u3000[CLS]\u4e00": "[CLS] \u4e00", "\u4e00": "\u4e00",
    }.items():
        assert " ".join(tokenizer.tokenize(text)) == start
        assert tokenizer.encode_batch([text]) == [ids_of_parts(tokenizer, text)]


def test_lines_are_texts_and_must_be_utf8(tokenizer):
    text = "A cat,\n\n\u4e2d [MASK]\nx\r\n"
    ids, lengths = tokenizer.encode_lines(text.encode())
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    assert [row.tolist() for row in rows] == tokenizer.encode_batch(text.split("\n"))
    for wrong in (b"a \xff b", b"\xff", b"\xc3", b"[MASK] \xc3", b"\xe2\x82,", b"\xe4", b"\xe4\xb8",
                  b"\xed\xa0\x80", b"\xfe", b"a \xf8 \xe4\xb8\xad"):
        with pytest.raises(UnicodeDecodeError):
            tokenizer.encode_lines(wrong)
        # Nothing of it stays behind.
        assert tokenizer.encode_lines(text.encode())[0].tolist() == ids.tolist()


def test_what_is_remembered_of_earlier_texts_is_bounded(monkeypatch):
    monkeypatch.setattr(piece_tables, "CACHE_BYTES", 20_000)
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
    ("[PAD] [UNK] [CLS] [SEP] a", r"lacks \[MASK\]"), ("", "lacks"), ("\udcff", "line 1: byte"),
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
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert BertTokenizer.from_pretrained(tmp_path).do_lower_case
    with caplog.at_level(logging.WARNING):
        assert BertTokenizer.from_pretrained(tmp_path, True).do_lower_case
        assert not caplog.records
        assert not BertTokenizer.from_pretrained(tmp_path, False).do_lower_case
    assert "do_lower_case=True" in caplog.text


CHINESE_PIECES = (
    "[PAD] [unused1] [UNK] [CLS] [SEP] [MASK] <S> <T> abc iphone cafe x \u4e2d \u516c \u53f8 \u7684"
    " \uff0c ##s \u3042 \u304b \u1112 ##\u1161 ##\u11ab").split(" ")
SYLLABLES = [*CHINESE_PIECES, "\u304c", "\ud55c"]
CASE_TEXTS = ["ABC\u516c\u53f8\u7684iPhones\uff0cXs", "Caf\u00e9 caf\u00e9s", "\u304c \ud55c",
              "\u304b <S> x [SEP] \u00c9"]


def write_model(folder: Path, pieces: list[str], config: dict | None, fast: bool = False) -> Path:
    """Write the tokenizer of a published model; tokenizer.json says what the config says."""
    write_vocab(folder / "vocab.txt", *pieces)
    if fast:
        BertTokenizer(folder / "vocab.txt", config["do_lower_case"]).save_vocabulary(folder)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("fast", [True, False])
def test_bert_base_chinese_is_lower_cased_although_its_files_say_cased(tmp_path, caplog, fast):
    saved = {"do_lower_case": False, "model_max_length": 512}  # as the hub has it
    folder = write_model(tmp_path, CHINESE_PIECES, saved, fast)
    tokenizer = BertTokenizer.from_pretrained(folder)
    [record] = caplog.records
    assert f"{folder}: do_lower_case is false, but no word piece has a capital" in record.message
    assert tokenizer.tokenize(CASE_TEXTS[0]) == (
        "abc \u516c \u53f8 \u7684 iphone ##s \uff0c x ##s".split())
    assert tokenizer.tokenize("Caf\u00e9 \u304c \ud55c") == (
        "cafe \u304b \u1112 ##\u1161 ##\u11ab".split())  # its pieces were made without accents
    caplog.clear()
    asked = BertTokenizer.from_pretrained(folder, True)
    assert asked.settings == tokenizer.settings
    assert not BertTokenizer.from_pretrained(folder, False).do_lower_case
    assert not caplog.records


def test_pieces_in_brackets_do_not_make_a_vocabulary_cased(tmp_path, caplog):
    """As the Chinese models of HFL are published: no tokenizer_config.json, and <S> and <T>."""
    write_model(tmp_path, CHINESE_PIECES, None)
    (tmp_path / "added_tokens.json").write_text("{}")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert tokenizer.do_lower_case and tokenizer.tokenize("ABC\u516c")[0] == "abc"
    assert not caplog.records


@pytest.mark.parametrize(("pieces", "saved", "settings"), [
    (CHINESE_PIECES, {}, (True, True)),
    (SYLLABLES, {}, (True, False)),  # stripping accents would lose Hangul and kana
    (SYLLABLES, {"strip_accents": True}, (True, True)),
    (CHINESE_PIECES, {"strip_accents": False}, (True, False)),
    ([*CHINESE_PIECES, "iPhone"], {}, (False, False)),
    ([piece for piece in SYLLABLES if not piece.islower()], {}, (False, False)),
])
def test_what_a_cased_model_without_capitals_does_is_what_it_writes(
        tmp_path, caplog, pieces, saved, settings):
    write_model(tmp_path, pieces, {"do_lower_case": False, **saved})
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    asked = tokenizer.settings
    assert (asked["do_lower_case"], asked["strip_accents"]) == settings
    assert len(caplog.records) == settings[0]
    before = BertTokenizer(tmp_path / "vocab.txt", False, saved.get("strip_accents"))
    for word in " ".join(CASE_TEXTS).split():
        if before.tokenize(word) != tokenizer.tokenize(word):
            assert "[UNK]" in before.tokenize(word)
    tokenizer.save_vocabulary(tmp_path / "again")
    caplog.clear()
    assert BertTokenizer.from_pretrained(tmp_path / "again").settings == asked
    assert not caplog.records
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "again")
    ids = theirs(CASE_TEXTS, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_batch(CASE_TEXTS) == ids


def test_an_added_token_with_capitals_keeps_a_model_cased(tmp_path):
    token = {"content": "Hello", "special": False}
    write_model(tmp_path, CHINESE_PIECES, {"do_lower_case": False, "added_tokens_decoder": {
        str(len(CHINESE_PIECES)): token}})
    assert not BertTokenizer.from_pretrained(tmp_path).do_lower_case


# ------------------------------------------------------------------ Hugging Face's files

PIECES = ("[PAD] [UNK] [CLS] [SEP] [MASK] good Film cafe caf\u00e9 ##s a ##b \u4e2d \u6587"
          " \u4e2d\u6587 hello [ ] e1 \u2028 \u00a0").split(" ")
FOREIGN_TEXTS = ["Caf\u00e9 \u4e2d\u6587 good", "good[E1]film Hello hello", "a<user> ,  ab",
                 "[E1] [E1]", "HELLO caf\u00e9s", "x [MASK] y", "Goods good", ""]


@pytest.fixture
def foreign(tmp_path):
    """Makes a folder as Hugging Face's library saves a BERT tokenizer, tokens added."""
    transformers = pytest.importorskip("transformers")
    write_vocab(tmp_path / "vocab.txt", *PIECES[:-1])

    def make(*added, **settings) -> Path:
        theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), **settings)
        theirs.add_tokens([*added])
        theirs.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return make


@pytest.mark.parametrize("added", [
    (), ("[E1]", "Hello"), (AddedToken("good", single_word=True),),
    (AddedToken("<user>", lstrip=True, rstrip=True, normalized=False, special=True), "[E1]")])
@pytest.mark.parametrize("settings", [
    {}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False},
    {"do_lower_case": False, "strip_accents": True}])
def test_a_tokenizer_of_hugging_face_gives_its_ids_here_and_when_saved_again(
        foreign, tmp_path, added, settings):
    auto = pytest.importorskip("transformers").AutoTokenizer
    folder = foreign(*added, **settings)
    for _ in range(2):
        ours, theirs = BertTokenizer.from_pretrained(folder), auto.from_pretrained(folder)
        assert len(ours) == len(theirs)
        assert ours.encode_batch(FOREIGN_TEXTS) == theirs(
            FOREIGN_TEXTS, add_special_tokens=False)["input_ids"]
        folder = tmp_path / "again"
        ours.save_vocabulary(folder, model_max_length=16)
    again = auto.from_pretrained(folder)
    assert again.model_max_length == 16
    assert again("a " * 30, "b", truncation=True)["input_ids"][-2:] == [ours.unk_id, ours.sep_id]
    assert ours.settings == BertTokenizer.from_pretrained(folder).settings


def test_pieces_that_look_blank_are_pieces(tmp_path):
    write_vocab(tmp_path / "vocab.txt", *PIECES)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    tokenizer.save_vocabulary(tmp_path / "again")
    assert list(BertTokenizer.from_pretrained(tmp_path / "again").vocab) == PIECES


@pytest.mark.parametrize(("file", "place", "value", "message"), [
    ("tokenizer.json", "normalizer.type", "NFC", "normalizer.type is 'NFC'; expected 'BertNorm"),
    ("tokenizer.json", "normalizer.clean_text", False, "clean_text is False; expected True"),
    ("tokenizer.json", "normalizer", None, "normalizer is None; expected that of BERT"),
    ("tokenizer.json", "normalizer.lowercase", True, "another file of the folder says the contr"),
    ("tokenizer.json", "pre_tokenizer.type", "Whitespace", "pre_tokenizer.type is 'Whitespace'"),
    ("tokenizer.json", "model.type", "BPE", "model.type is 'BPE'; expected 'WordPiece'"),
    ("tokenizer.json", "model.max_input_chars_per_word", 5, "max_input_chars_per_word is 5"),
    ("tokenizer.json", "model.continuing_subword_prefix", "@", "prefix is '@'; expected '##'"),
    ("tokenizer.json", "model.vocab.good", 6, "word pieces with the ids 0, 1, "),
    ("vocab.txt", "good", "bad", "hold different vocabularies"),
    ("tokenizer.json", "truncation", {"direction": "Left"}, "truncation.direction is 'Left'"),
    ("tokenizer_config.json", "added_tokens_decoder", {"x": {}}, "its added tokens cannot be read"),
    ("tokenizer.json", "post_processor", None, r"as \[\] in segments \[\]; expected \[CLS\]"),
    ("tokenizer_config.json", "tokenizer_class", "RobertaTokenizer", "is 'RobertaTokenizer'"),
    ("tokenizer_config.json", "do_basic_tokenize", False, "do_basic_tokenize is False"),
    ("tokenizer_config.json", "never_split", ["good"], "never_split is"),
    ("tokenizer_config.json", "truncation_side", "left", "truncation_side is 'left'"),
    ("tokenizer_config.json", "split_special_tokens", True, "split_special_tokens is True"),
    ("tokenizer.json", "normalizer.strip_accents", False, "another file of the folder says the"),
    ("tokenizer_config.json", "strip_accents", "no", "strip_accents is 'no'; expected true"),
    ("special_tokens_map.json", "unk_token", {"content": "<unk>"}, "unk_token is '<unk>'"),
    ("special_tokens_map.json", "additional_special_tokens", ["<x>"], "'<x>' was added, but"),
    ("added_tokens.json", "<y>", 21, "'<y>' was added, but"),
])
def test_what_is_not_supported_of_a_tokenizer_is_refused_by_its_name(
        tmp_path, file, place, value, message):
    write_vocab(tmp_path / "vocab.txt", *PIECES)
    BertTokenizer.from_pretrained(tmp_path).save_vocabulary(tmp_path)
    if file == "vocab.txt":
        write_vocab(tmp_path / file, *(value if piece == place else piece for piece in PIECES))
    is_json = file != "vocab.txt" and (tmp_path / file).is_file()
    values = json.loads((tmp_path / file).read_text()) if is_json else {}
    *parents, name = place.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    if file != "vocab.txt":
        (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        BertTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("lower", [True, False])
def test_a_saved_vocabulary_reads_back_here_and_in_transformers(tmp_path, tokenizer, lower):
    pieces = [*tokenizer.vocab, "Berlin"]  # with capitals, as a cased model's are
    original = BertTokenizer(dict(zip(pieces, range(len(pieces)), strict=True)), lower)
    original.save_vocabulary(tmp_path)
    back = BertTokenizer.from_pretrained(tmp_path)
    assert back.vocab == original.vocab
    assert back.do_lower_case == lower
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(str(tmp_path))
    for row in golden_rows("tokenization.json")[:20]:
        ids = theirs(row["text"], add_special_tokens=False)["input_ids"]
        assert ids == original.encode_batch([row["text"]])[0]
