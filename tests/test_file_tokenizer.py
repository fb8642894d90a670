"""Tokenizers that a tokenizer.json describes: ids, frames and files as Hugging Face's library."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import transformers
from helpers import PIECES, config_folder, error_line, make_model, predicted, run, write_vocab
from huggingface_hub import constants
from relatives import published
from server import publish
from tiny_tokenizers import LINES, byte_bpe, unigram, xlm_unigram
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

import data_augmentation
import general_distill
import get_bert_models
import predict
import pregenerate_training_data
import quantize
from transformer.checkpoint import save_pretrained
from transformer.corpus import EpochSettings, Masking
from transformer.features import encode_examples, load_features
from transformer.file_utils import UserError
from transformer.hub import fetch_model
from transformer.pretraining_data import PregeneratedDataset
from transformer.tasks import Example, get_task
from transformer.tokenization import BertTokenizer, FileTokenizer, load_tokenizer

TEXTS = [
    "The film was good", " with white  space around\t", "a<mask>b <mask> </s> x</s>", "<s>x<pad>",
    "Caf\u00e9  na\u00efve\n\nx \U0001f600", "", "  ", "a [SEP] [MASK] b[CLS]", "``it''s'' 12.50",
    "x" * 200, "\u4e2d\u6587 e\u0301 \u200b", "unk <unk>",
]
NAMES = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>",
         "mask_token": "<mask>"}
# How the folders of the hub, and those that Hugging Face's library saves, describe the same file.
KINDS = {
    "roberta of old": (byte_bpe, {"model_max_length": 512}),
    "roberta without settings": (byte_bpe, None),
    "roberta": (byte_bpe, {"tokenizer_class": "RobertaTokenizer", **NAMES}),
    "roberta, general class": (byte_bpe, {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES,
                                          "model_input_names": ["input_ids", "attention_mask"]}),
    "albert of old": (unigram, None),
    "albert": (unigram, {"tokenizer_class": "AlbertTokenizer", "pad_token": "<pad>"}),
    "xlm-roberta": (xlm_unigram, {"tokenizer_class": "XLMRobertaTokenizerFast"}),
    "xlm-roberta, general class": (xlm_unigram, {"tokenizer_class": "TokenizersBackend", **NAMES}),
}


def auto(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=KINDS)
def folder(request, tmp_path) -> Path:
    make, settings = KINDS[request.param]
    return make(tmp_path / "teacher", settings)


@pytest.fixture
def roberta(tmp_path) -> Path:
    return byte_bpe(tmp_path / "roberta", {"tokenizer_class": "RobertaTokenizer"})


@pytest.fixture
def albert(tmp_path) -> Path:
    return unigram(tmp_path / "albert", {"tokenizer_class": "AlbertTokenizer"})


def change(folder: Path, **values) -> Path:
    """Set values of tokenizer.json."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}),
                    encoding="utf-8")
    return folder


def settings(folder: Path, **values) -> Path:
    """Set values of tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**before, **values}), encoding="utf-8")
    return folder


def student_of(folder: Path, **changes) -> Path:
    """Save a small BERT with the tokenizer of `folder`, as distillation does."""
    tokenizer, student = load_tokenizer(folder), folder.parent / "student"
    model = make_model(student, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_id,
                       type_vocab_size=1 + tokenizer.segments, **changes)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (student / name).unlink()
    save_pretrained(model, student, tokenizer)
    return student


def encoded(folder: Path, rows: list[tuple[str, str | None]], length: int, **options):
    """Ids and segments of rows, as features hold them."""
    examples = [Example(str(place), *row, "0") for place, row in enumerate(rows)]
    features = encode_examples(examples, load_tokenizer(folder), length, ["0"], **options)
    found = []
    for place in range(len(rows)):
        batch = features.collate([place])
        found.append((batch["input_ids"][0].tolist(), batch["token_type_ids"][0].tolist()))
    return found


# ------------------------------------------------------------------ ids


def test_ids_of_texts_and_pairs_are_those_of_autotokenizer(folder):
    ours, theirs = load_tokenizer(folder), auto(folder)
    assert isinstance(ours, FileTokenizer)
    assert ours.encode_batch(TEXTS) == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    ids, lengths = ours.encode_flat(TEXTS)
    assert ids.tolist() == sum(ours.encode_batch(TEXTS), []) and len(lengths) == len(TEXTS)
    rows = [(a, b) for a in TEXTS for b in (None, "A lovely story", *TEXTS[:4])]
    for (a, b), (row, _) in zip(rows, encoded(folder, rows, 512), strict=True):
        assert row == theirs(a, b)["input_ids"], (a, b)
    assert (ours.cls_id, ours.sep_id, ours.pad_id, ours.unk_id, ours.mask_id) == (
        theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id, theirs.unk_token_id,
        theirs.mask_token_id)
    assert len(ours) == len(theirs) and ours.vocab == theirs.get_vocab()


@pytest.mark.parametrize("length", [4, 5, 8, 9, 16])
def test_cut_texts_are_those_of_autotokenizer(folder, length):
    theirs = auto(folder)
    singles = [(text, None) for text in (*TEXTS, *LINES)]
    for (text, _), (row, _) in zip(singles, encoded(folder, singles, length), strict=True):
        assert row == theirs(text, truncation=True, max_length=length)["input_ids"]
    pairs = list(zip(LINES, LINES[1:], strict=False))
    cut = encoded(folder, pairs, length, cut=predict.cut_pair)
    for (a, b), (row, _) in zip(pairs, cut, strict=True):
        assert row == theirs(a, b, truncation=True, max_length=length)["input_ids"]


def test_a_file_with_its_own_truncation_and_padding_gives_whole_texts(roberta, albert):
    for folder in (roberta, albert):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=40, pad_id=1, pad_token="<pad>")
        tokenizer.save(str(folder / "tokenizer.json"))
        ours = load_tokenizer(folder)
        assert ours.encode_batch(LINES) == auto(folder)(
            LINES, add_special_tokens=False)["input_ids"]
        assert ours.pad_id == auto(folder).pad_token_id


def test_lines_of_a_corpus_are_texts_without_the_space_around_them(roberta):
    tokenizer = load_tokenizer(roberta)
    ids, lengths = tokenizer.encode_lines(b" The film\r\n\n \t\nwas good")
    assert lengths.tolist() == [len(each) for each in tokenizer.encode_batch(
        ["The film", "", "", "was good"])] and lengths[1] == lengths[2] == 0
    assert ids.tolist() == sum(tokenizer.encode_batch(["The film", "was good"]), [])
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode_lines(b"\xff")


def test_added_tokens_are_found_as_by_autotokenizer(roberta, tmp_path):
    theirs = auto(roberta)
    theirs.add_tokens(["good", AddedToken("<user>", lstrip=True, rstrip=True, special=True)])
    theirs.save_pretrained(tmp_path / "more")
    texts = ["a good <user> film", "goodness <user>x", *TEXTS]
    for _ in range(2):
        ours, theirs = load_tokenizer(tmp_path / "more"), auto(tmp_path / "more")
        assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
        assert len(ours) == len(theirs)
        ours.save_vocabulary(tmp_path / "more")


def test_special_tokens_that_only_the_settings_name_are_found_in_texts(tmp_path):
    """The library adds them, too: </s> in a text is the separator."""
    folder = byte_bpe(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES})
    change(folder, added_tokens=[])
    ours, theirs = load_tokenizer(folder), auto(folder)
    assert ours.encode_batch(TEXTS) == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert ours.sep_id in ours.encode_batch(["a </s> b"])[0]
    settings(folder, added_tokens_decoder={str(len(ours)): {"content": "<new>", "special": False}})
    assert load_tokenizer(folder).encode_batch(["a<new>"])[0][-1] == len(ours)
    settings(folder, added_tokens_decoder={"7000": {"content": "<new>"}})
    with pytest.raises(UserError, match=f"'<new>' has id {len(ours)}; expected 7000"):
        load_tokenizer(folder)


def test_it_survives_pickling(folder):
    tokenizer = load_tokenizer(folder)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (copy.settings, copy.separators, copy.segments) == (
        tokenizer.settings, tokenizer.separators, tokenizer.segments)


def test_spans_are_characters_of_the_text(roberta):
    text = "The caf\u00e9 was good"
    ids, spans = load_tokenizer(roberta).encode_with_spans(text)
    theirs = auto(roberta)(text, add_special_tokens=False, return_offsets_mapping=True)
    assert (ids, spans) == (theirs["input_ids"], theirs["offset_mapping"])


# ------------------------------------------------------------------ which tokenizer


def test_a_berts_files_keep_the_fast_tables(tmp_path):
    write_vocab(tmp_path / "both")
    tokenizer_json = (tmp_path / "both" / "tokenizer.json").read_bytes()
    for name, config in (("plain", None), ("general", {"tokenizer_class": "TokenizersBackend"}),
                         ("hub", {"do_lower_case": True, "model_max_length": 512}),
                         ("mobile", {"tokenizer_class": "MobileBertTokenizer"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes(tokenizer_json)
        if config is not None:
            settings(tmp_path / name, **config)
        tokenizer = load_tokenizer(tmp_path / name)
        assert isinstance(tokenizer, BertTokenizer) and list(tokenizer.vocab) == PIECES
        assert tokenizer.segments and tokenizer.separators == 1
    assert isinstance(load_tokenizer(tmp_path / "both" / "vocab.txt"), BertTokenizer)


@pytest.mark.parametrize(("part", "value"), [
    ("pre_tokenizer", pre_tokenizers.Whitespace()), ("normalizer", normalizers.NFC()),
    ("normalizer", None),
])
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", None])
def test_wordpiece_of_another_kind_is_what_its_file_says(tmp_path, part, value, name):
    write_vocab(tmp_path)
    content = None if value is None else json.loads(value.__getstate__())
    change(tmp_path, **{part: content})
    (tmp_path / "tokenizer_config.json").unlink()
    if name is not None:
        settings(tmp_path, tokenizer_class=name)
    tokenizer = load_tokenizer(tmp_path)
    rust = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert isinstance(tokenizer, FileTokenizer) and tokenizer.segments
    text = "The good.film  very_sad , [MASK]x"
    assert tokenizer.encode_batch([text])[0] == rust.encode(text, add_special_tokens=False).ids
    settings(tmp_path, tokenizer_class="BertTokenizer")  # which ignores what the file says
    with pytest.raises(UserError, match=f"tokenizer.json: {part}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model", "vocab.json"])
@pytest.mark.parametrize("place", ["folder", "address", "hub"])
def test_a_vocabulary_that_needs_conversion_is_refused_with_the_way_out(
        tmp_path, server, monkeypatch, name, place):
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"no tokenizer.json; .*AutoTokenizer makes the second of"
                                        rf" {name}: load and save it once"):
        load_tokenizer(fetched(source, place, server, tmp_path, monkeypatch, weights=False))


def fetched(source: Path, place: str, server, root: Path, monkeypatch, **options) -> Path:
    """The folder of a model that is published at a place, downloaded from there."""
    publish(server, source, "me/model")
    for file in source.iterdir():
        server.files[f"/models/{file.name}"] = file.read_bytes()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    name = {"folder": source, "address": f"{server.url}/models", "hub": "me/model"}[place]
    return fetch_model(name, root / "cache", server.url, **options)


@pytest.mark.parametrize("place", ["address", "hub"])
def test_a_relative_without_vocab_txt_and_with_safetensors_only_is_fetched(
        tmp_path, server, monkeypatch, place):
    source = their_classifier(tmp_path / "source")
    for name in ("vocab.json", "merges.txt", "spiece.model"):
        (source / name).write_text("not needed beside tokenizer.json")
    folder = fetched(source, place, server, tmp_path, monkeypatch)
    assert {path.name for path in folder.iterdir() if path.suffix != ".lock"} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(folder).encode_batch(LINES) == load_tokenizer(source).encode_batch(LINES)


@pytest.mark.parametrize(("values", "message"), [
    ({"post_processor": None}, r"two texts 'a' as \['a', 'a'\]"),
    ({"truncation": {"direction": "Left", "max_length": 9, "strategy": "LongestFirst",
                     "stride": 0}}, "truncation.direction is 'Left'; expected 'Right'"),
    ({"model": {"type": "BPE"}}, "not a tokenizer"),
    ({"model": None}, "not a tokenizer"), ({"model": "BPE"}, "not a tokenizer"),
    ({"pre_tokenizer": "ByteLevel"}, "not a tokenizer"),
])
def test_a_file_of_another_use_is_one_clear_line(roberta, values, message):
    change(roberta, **values)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(roberta)
    assert str(roberta) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("values", "message"), [
    ({"padding_side": "left"}, "padding_side is 'left'"),
    ({"truncation_side": "left"}, "truncation_side is 'left'"),
    ({"split_special_tokens": True}, "split_special_tokens is True"),
    ({"additional_special_tokens": ["<x>"]}, "'<x>' was added, but"),
    ({"add_prefix_space": True}, "add_prefix_space is True, and tokenizer.json says the contrary"),
])
def test_settings_that_change_the_ids_are_refused_by_their_name(roberta, values, message):
    settings(roberta, **values)
    with pytest.raises(UserError, match=message):
        load_tokenizer(roberta)


def test_a_file_with_another_frame_than_an_encoders_is_refused(roberta):
    for single, pair in (("$A </s>", "$A </s> $B </s>"), ("<s> $A </s>", "<s> $A <mask> $B </s>"),
                         ("<s> $A </s>", "<s>:0 $A:0 </s>:1 $B:1 </s>:1")):
        ids = {token: load_ids(roberta)[token] for token in ("<s>", "</s>", "<mask>")}
        processor = processors.TemplateProcessing(single, pair, list(ids.items()))
        copy = roberta.parent / "copy"
        copy.mkdir(exist_ok=True)
        (copy / "tokenizer.json").write_bytes((roberta / "tokenizer.json").read_bytes())
        change(copy, post_processor=json.loads(processor.__getstate__()))
        with pytest.raises(UserError, match="its post_processor frames two texts 'a' as"):
            load_tokenizer(copy)


def load_ids(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def test_a_tokenizer_without_a_token_for_padding_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"^": 0, ";": 1, "a": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("^ $A ;", "^ $A ; $B ;", [
        ("^", 0), (";", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no token for padding; expected a pad_token"):
        load_tokenizer(tmp_path)
    settings(tmp_path, pad_token="?")
    found = load_tokenizer(tmp_path)
    assert (found.pad_id, found.unk_id, found.mask_id) == (3, 3, -1)
    assert encoded(tmp_path, [("a b", None)], 9)[0][0] == [0, 2, 3, 1]
    with pytest.raises(UserError, match="no token for masks"):
        Masking(found, 0.15, 20, False)


def test_lower_casing_cannot_be_asked_of_a_file_that_keeps_the_case(roberta, albert):
    with pytest.raises(UserError, match="--do_lower_case: .*tokenizer.json keeps the case"):
        load_tokenizer(roberta, True)
    assert not load_tokenizer(roberta, False).do_lower_case
    assert load_tokenizer(albert, True).do_lower_case


# ------------------------------------------------------------------ segments


@pytest.mark.parametrize(("config", "said", "expected"), [
    ({"model_type": "bert"}, {}, True), ({"model_type": "distilbert"}, {}, False),
    ({"model_type": "bert", "type_vocab_size": 1}, {}, False),
    ({"model_type": "bert"}, {"tokenizer_class": "DistilBertTokenizer"}, False),
    ({"model_type": "bert"}, {"model_input_names": ["input_ids", "attention_mask"]}, False),
    ({"model_type": "bert"}, {"model_input_names": ["input_ids", "token_type_ids"]}, True),
    (None, {}, True),
])
def test_the_folder_says_whether_a_berts_pairs_have_segments(tmp_path, config, said, expected):
    write_vocab(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    settings(tmp_path, **said)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    [(_, segments)] = encoded(tmp_path, [("the film", "was good")], 32)
    assert segments == ([0, 0, 0, 0, 1, 1, 1] if expected else [0] * 7)
    load_tokenizer(tmp_path).save_vocabulary(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.segments == expected
    assert ("token_type_ids" in auto(tmp_path / "again")("a", "b")) == expected


def test_segments_of_the_frame_reach_the_features_and_those_of_one_segment_do_not(roberta, albert):
    [(ids, segments)] = encoded(albert, [("a film", "good")], 32)
    assert segments == auto(albert)("a film", "good", return_token_type_ids=True)["token_type_ids"]
    assert 0 < sum(segments) < len(ids)
    [(_, segments)] = encoded(roberta, [("a film", "good")], 32)
    assert not any(segments)


# ------------------------------------------------------------------ files


def test_files_are_saved_byte_for_byte_and_completed_once(folder):
    tokenizer = load_tokenizer(folder)
    (folder / "special_tokens_map.json").write_text('{"mask_token":  "<mask>"}')
    tokenizer = load_tokenizer(folder)
    tokenizer.save_vocabulary(folder.parent / "first", 64)
    load_tokenizer(folder.parent / "first").save_vocabulary(folder.parent / "second", 64)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (folder.parent / "first" / name).read_bytes() == (folder / name).read_bytes()
    for file in (folder.parent / "first").iterdir():
        assert file.read_bytes() == (folder.parent / "second" / file.name).read_bytes()
    before = folder / "tokenizer_config.json"
    before = json.loads(before.read_text()) if before.is_file() else {}
    saved = json.loads((folder.parent / "first" / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == 64 and saved["tokenizer_class"]
    assert {**saved, **before, "model_max_length": 64} == saved


def test_a_students_autotokenizer_gives_the_ids_and_segments_of_predict(folder):
    student = student_of(folder)
    ours, theirs = load_tokenizer(folder), auto(student)
    assert load_tokenizer(student).settings["tokenizer.json"] == ours.fingerprint
    rows = [*((text, None) for text in TEXTS), *zip(TEXTS, LINES, strict=False)]
    for where in (folder, student):
        for (a, b), (ids, segments) in zip(rows, encoded(where, rows, 512), strict=True):
            output = theirs(a, b)
            assert ids == output["input_ids"]
            assert segments == output.get("token_type_ids", [0] * len(ids))
    assert ("token_type_ids" in theirs("a", "b")) == ours.segments
    assert theirs.model_max_length == 128


def test_a_student_of_one_segment_is_saved_so_that_no_other_library_gives_it_two(albert):
    load_tokenizer(albert).save_vocabulary(albert.parent / "one", 32, segments=False)
    (albert.parent / "one" / "config.json").write_text('{"model_type": "bert"}')
    assert "token_type_ids" not in auto(albert.parent / "one")("a", "b")
    assert not load_tokenizer(albert.parent / "one").segments


# ------------------------------------------------------------------ features


def write_sst2(folder: Path, name: str = "train.tsv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("sentence\tlabel\n" + "".join(
        f"{line}\t{place % 2}\n" for place, line in enumerate(LINES)), encoding="utf-8")
    return folder


def cached_files(cache: Path) -> list[Path]:
    return sorted((cache / "features").glob("*.npz"))


def test_the_cache_knows_merges_segments_and_the_normalizer(roberta, albert, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYBERT_CACHE", str(tmp_path / "cache"))
    data = write_sst2(tmp_path / "data")

    def load(folder: Path) -> int:
        """Returns how many files the cache has now."""
        task = get_task("SST-2")
        for _ in range(2):
            found = load_features(task, data, "train", load_tokenizer(folder), 32, task.labels,
                                  cache=True)
            fresh = load_features(task, data, "train", load_tokenizer(folder), 32, task.labels)
            assert np.array_equal(found.ids, fresh.ids)
        return len(cached_files(tmp_path / "cache"))

    assert load(roberta) == 1
    model = json.loads((roberta / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    change(roberta, model={**model, "merges": model["merges"][:-1]})
    assert load(roberta) == 2
    assert load(albert) == 3
    change(albert, normalizer=None)
    assert load(albert) == 4
    settings(albert, model_input_names=["input_ids", "attention_mask"])
    assert load(albert) == 5


def test_a_pair_needs_room_for_its_separators(roberta):
    [(ids, _)] = encoded(roberta, [("The film", "was good")], 4)
    assert ids == [0, 2, 2, 2]
    with pytest.raises(UserError, match="sequence length 3; expected at least 4 positions"):
        encoded(roberta, [("a", "b")], 3)


def test_augmented_rows_for_a_cased_teacher_are_warned_of(roberta, albert, tmp_path, caplog):
    data, task = write_sst2(tmp_path / "data", "train_aug.tsv"), get_task("SST-2")
    with caplog.at_level(logging.WARNING):
        load_features(task, data, "aug", load_tokenizer(albert), 32, task.labels)
        assert not [record for record in caplog.records if "augmented" in record.message]
        load_features(task, data, "aug", load_tokenizer(roberta), 32, task.labels)
    assert "train_aug.tsv: augmented rows are words with spaces" in caplog.text


# ------------------------------------------------------------------ pre-training


@pytest.fixture
def corpus(tmp_path) -> Path:
    documents = "\n\n".join("\n".join(LINES[start : start + 4]) for start in range(0, 16, 4))
    (tmp_path / "corpus.txt").write_text(documents, encoding="utf-8")
    return tmp_path / "corpus.txt"


@pytest.mark.parametrize("instances", ["pairs", "packed", "lines"])
def test_pregenerated_instances_are_framed_as_the_model_was_trained(
        roberta, albert, corpus, tmp_path, instances):
    if instances == "lines":
        corpus.write_text("\n".join(["A film\tgood", *LINES]), encoding="utf-8")
    for folder in (roberta, albert):
        tokenizer = load_tokenizer(folder)
        output = tmp_path / f"out_{folder.name}"
        run(pregenerate_training_data, "--train_corpus", corpus, "--output_dir", output,
            "--bert_model", folder, "--instances", instances, "--max_seq_len", 24,
            "--epochs_to_generate", 1)
        data = PregeneratedDataset(output, 0, tokenizer, 24)
        assert data.lengths.max() <= 24
        pairs = 0
        for row in range(len(data)):
            batch = data.collate([row])
            ids, segments = batch["input_ids"][0].tolist(), batch["token_type_ids"][0].tolist()
            assert len(ids) == data.lengths[row] and ids[0] == tokenizer.cls_id
            text = [index for index in ids if index not in (tokenizer.cls_id, tokenizer.sep_id)]
            is_pair = ids.count(tokenizer.sep_id) > 1
            pairs += is_pair
            assert len(ids) - len(text) == 2 + is_pair * tokenizer.separators
            if is_pair:
                first = ids.index(tokenizer.sep_id) + tokenizer.separators
                assert {*ids[first - tokenizer.separators : first]} == {tokenizer.sep_id}
                assert segments == [int(tokenizer.segments and place >= first)
                                    for place in range(len(ids))]
            else:
                assert not any(segments)
        assert bool(pairs) == (instances != "packed")


def test_masked_instances_of_a_file_tokenizer_have_its_mask(roberta, corpus, tmp_path):
    run(pregenerate_training_data, "--train_corpus", corpus, "--output_dir", tmp_path / "out",
        "--bert_model", roberta, "--one_seq", "--masked_lm_prob", 0.3, "--max_seq_len", 32,
        "--epochs_to_generate", 1)
    tokenizer = load_tokenizer(roberta)
    data = PregeneratedDataset(tmp_path / "out", 0, tokenizer, 32)
    assert (data.collate(range(len(data)))["input_ids"] == tokenizer.mask_id).any()


@pytest.mark.parametrize(("flags", "message"), [
    (["--do_whole_word_mask"], "--do_whole_word_mask: only a BERT's vocabulary"),
    (["--format", "json"], "--format json: the original's files are of a BERT's word pieces"),
    (["--do_lower_case"], "--do_lower_case: "),
    (["--max_seq_len", 5], "instances of 5 tokens; expected at least 6"),
])
def test_pregeneration_refuses_what_only_a_bert_has_before_it_writes(
        roberta, corpus, tmp_path, capsys, flags, message):
    line = error_line(capsys, pregenerate_training_data, "--train_corpus", corpus, "--output_dir",
                      tmp_path / "out", "--bert_model", roberta, *flags)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_separators_are_part_of_the_settings_of_instances():
    assert EpochSettings(max_seq_len=20, separators=2).max_tokens == 16
    assert EpochSettings(max_seq_len=20).max_tokens == 17
    assert EpochSettings(max_seq_len=20, instances="packed", separators=2).max_tokens == 18


# ------------------------------------------------------------------ scripts


def test_augmentation_refuses_a_model_that_is_no_bert(roberta, tmp_path, capsys):
    write_sst2(tmp_path / "data")
    (tmp_path / "glove.txt").write_text("a 1 2\n")
    line = error_line(capsys, data_augmentation, "--task_name", "SST-2", "--data_dir",
                      tmp_path / "data", "--glove_embs", tmp_path / "glove.txt",
                      "--pretrained_bert_model", roberta)
    assert "its tokenizer.json is no BERT's" in line
    assert not list((tmp_path / "data").glob("train_aug*"))


def their_classifier(folder: Path, shape: str = "roberta") -> Path:
    """Write a random classifier of Hugging Face's library with the tokenizer that it saves."""
    published(folder, shape)
    auto(folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", ["roberta", "albert"])
def test_predict_answers_as_the_pipeline_of_the_same_folder(shape, tmp_path):
    folder = settings(their_classifier(tmp_path / "model", shape), model_max_length=32)
    pipeline = transformers.pipeline("text-classification", str(folder), top_k=None, device="cpu")
    rows = [*((line,) for line in LINES[:6]), ("x " * 40,), ("a </s> b<mask>",),
            *zip(LINES, LINES[1:4], strict=False), ("a " * 40, "b " * 29)]
    for row, found in zip(rows, predicted(folder, rows), strict=True):
        expected = {each["label"]: each["score"] for each in pipeline(
            dict(zip(("text", "text_pair"), row, strict=False)), truncation=True, max_length=32)}
        assert found == pytest.approx(expected, abs=1e-5), row


@pytest.mark.parametrize("of", ["roberta", "albert"])
def test_a_quantized_folder_has_the_tokenizer_and_the_frame_of_its_model(
        of, request, tmp_path):
    folder = student_of(request.getfixturevalue(of), initializer_range=0.5)
    run(quantize, "--model", folder, "--output_dir", tmp_path / "onnx", "--method", "fp32",
        "--format", "onnx")
    rows = list(zip(LINES, LINES[1:4], strict=False))
    answers = [[row["LABEL_0"] for row in predicted(model, rows)]
               for model in (folder, tmp_path / "onnx")]
    assert answers[0] == pytest.approx(answers[1], abs=1e-5) and len({*answers[0]}) == 3
    assert auto(tmp_path / "onnx")(*LINES[:2]) == auto(folder)(*LINES[:2])


def test_get_bert_models_keeps_a_relative_what_it_is(tmp_path):
    source = their_classifier(tmp_path / "source")
    task = their_classifier(tmp_path / "rte")
    for _ in range(2):  # the second call finds all there
        run(get_bert_models, "--output_dir", tmp_path / "models", "--base_model", source,
            "--base_name", "roberta", "--teachers", f"rte={task}")
    base, teacher = tmp_path / "models" / "roberta", tmp_path / "models" / "roberta-rte"
    assert (base / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    _, report = transformers.AutoModel.from_pretrained(base, output_loading_info=True)
    assert {key for key in report["missing_keys"] if "pooler" not in key} == set()
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        teacher, output_loading_info=True)
    assert type(model).__name__ == "RobertaForSequenceClassification"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert auto(teacher)("a", "b") == auto(task)("a", "b")


def test_general_distillation_with_a_relative_gives_a_student_with_its_tokenizer(corpus, tmp_path):
    teacher = their_classifier(tmp_path / "teacher")
    config_folder(tmp_path / "student", num_hidden_layers=1, hidden_size=12)
    run(general_distill, "--train_corpus", corpus, "--teacher_model", teacher,
        "--student_model", tmp_path / "student", "--output_dir", tmp_path / "out",
        "--instances", "packed", "--max_seq_length", 32, "--num_train_epochs", 1,
        "--train_batch_size", 4, "--precision", "fp32", "--no_cuda")
    theirs = auto(tmp_path / "out")
    assert theirs("A film", "good")["input_ids"] == auto(teacher)("A film", "good")["input_ids"]
    assert "token_type_ids" not in theirs("a", "b")
    model, report = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "BertModel" and not report["missing_keys"]
    assert model.config.pad_token_id == theirs.pad_token_id
