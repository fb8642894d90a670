"""Augmentation of a user's own tasks: Chinese by words, other alphabets, every format of train."""

import csv
import json
import logging
import random
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED, error_line, make_masked_lm, random_vectors, run
from kill import Process, run_with_kills, script, torchrun

import data_augmentation
from transformer.augmentation import DataAugmentor, GloveIndex, compose_vectors
from transformer.file_utils import UserError
from transformer.modeling import BertForMaskedLM
from transformer.own_tasks import find_task
from transformer.table_files import iterate_table, write_tsv
from transformer.tasks import Task, load_examples, original_rows
from transformer.tokenization import BertTokenizer
from transformer.words import IDEOGRAPHS, NEGATION_CHARACTERS, WordFinder, is_ideographic

GOOD = ["好吃", "新鲜", "热情", "干净", "便宜", "满意", "美味可口"]
BAD = ["难吃", "冰冷", "冷淡", "肮脏", "昂贵", "失望", "难以下咽"]
THINGS = ["味道", "服务", "餐厅", "米饭", "牛肉", "包装", "速度", "外卖小哥", "电影院"]
NEGATED = ["不错", "没有", "无聊", "特别", "不好吃"]
WORDS = [*GOOD, *BAD, *THINGS, *NEGATED, "我们", "因为", "iphone", "kfc", "привет", "мир"]
LATIN = ["iphone", "kfc", "app", "the", "good", "при", "##вет", "мир", "не"]
MARKS = ["，", "。", "！", ",", ".", "a", "b", "##b"]
CHARACTERS = sorted({character for word in WORDS for character in word
                     if is_ideographic(character)} | {*"的了是很在吃喝看甜咸辣快慢"})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A tiny Chinese BERT with random weights."""
    return make_masked_lm(tmp_path_factory.mktemp("model"), [*MARKS, *LATIN, *CHARACTERS], 64)


@pytest.fixture(scope="module")
def vector_file(tmp_path_factory) -> Path:
    return random_vectors(tmp_path_factory.mktemp("vectors") / "vectors.txt", WORDS)


@pytest.fixture
def make_augmentor(model_dir, vector_file):
    def make(**settings) -> DataAugmentor:
        glove, tokenizer = GloveIndex.load(vector_file), BertTokenizer.from_pretrained(model_dir)
        return DataAugmentor(
            BertForMaskedLM.from_pretrained(model_dir), tokenizer,
            glove, find_words=WordFinder(glove.words, tokenizer.basic_tokenizer).find, **settings)

    return make


def make_reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) of reviews that are all different."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = rng.choice("01")
        words = rng.choices(GOOD if label == "1" else BAD, k=2)
        rows[f"{rng.choice(THINGS)}很{words[0]}，{rng.choice(THINGS)}{words[1]}。"] = label
    return list(rows.items())


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def flags(model_dir, vector_file) -> list:
    return ["--pretrained_bert_model", model_dir, "--glove_embs", vector_file,
            "--precision", "fp32", "--no_cuda", "--N", 4]


def expect_originals(task: Task, folder: Path) -> None:
    """Fail unless exactly those augmented rows count as train's that stand there."""
    train, augmented = ([example[1:] for example in load_examples(task, folder, split)]
                        for split in ("train", "aug"))
    found = original_rows(task, folder)
    assert found == [row in train for row in augmented]
    assert len(train) <= sum(found) < len(found)
    assert original_rows(task, folder, max_rows=5) == found[:5]


def cells(path: Path, form: str) -> list[list[str]]:
    return [row for _, row in iterate_table(path, form)]


# ------------------------------------------------------------------ Chinese


TEXT = "我们在电影院，牛肉不错 iPhone的味道很好吃!没有甜 42"


def test_chinese_words_are_replaced_by_words_and_characters_by_characters(make_augmentor):
    augmentor = make_augmentor(p=1.0, M=6)
    [found] = augmentor.candidates([TEXT])
    assert len(found) == 6  # 电影院 牛肉 iPhone 味道 好吃 甜
    long, beef, phone, taste, tasty, sweet = found.values()
    assert {len(word) for word in long} <= {2, 3, 4} and "电影院" not in long
    assert {len(word) for word in [*beef, *taste, *tasty]} <= {2, 3}
    assert {len(word) for word in sweet} == {1} and all(map(is_ideographic, sweet))
    assert phone and not any(IDEOGRAPHS.search(word) for word in phone)
    assert [len(words) for words in found.values()] == [6] * 6 or len(phone) < 6


def test_what_is_not_varied_stays_byte_for_byte(make_augmentor):
    [[original, *variations]] = make_augmentor(N=40, p=1.0).augment([TEXT])
    assert original == TEXT and len(variations) > 30
    for variation in variations:
        assert variation.startswith("我们在") and variation.endswith(" 42")
        for kept in ("，", "不错 ", "的", "很", "!没有"):
            assert kept in variation


def test_no_variation_has_more_or_fewer_negations(make_augmentor):
    texts = [f"{word}{thing}很{mood}不{mood}" for word in NEGATED for thing in THINGS
             for mood in [*GOOD, *BAD, "甜", "没"]]
    for text, *variations in make_augmentor(N=20, p=0.8).augment(texts):
        negations = [character for character in text if character in NEGATION_CHARACTERS]
        for variation in variations:
            assert negations == [
                character for character in variation if character in NEGATION_CHARACTERS]


def test_words_of_other_alphabets_are_varied_and_joined_by_spaces(make_augmentor):
    [[_, *variations]] = make_augmentor(N=30, p=0.8).augment(["Привет, мир не"])
    assert variations
    for variation in variations:
        words = variation.split(" ")
        assert words[1] == "," and words[3] == "не"
        assert "не" not in (words[0], words[2])
        assert not IDEOGRAPHS.search(variation)


def test_chinese_is_varied_alike_however_it_is_batched(make_augmentor):
    texts = [text for text, _ in make_reviews(20)]
    together = make_augmentor(seed=7).augment(texts)
    small = make_augmentor(seed=7, batch_tokens=20)
    assert together == [small.augment([text])[0] for text in texts]
    assert together != make_augmentor(seed=8).augment(texts)


# ------------------------------------------------------------------ own tasks


def test_a_csv_is_augmented_in_its_format_with_its_other_columns(tmp_path, flags):
    rows = [["id", "label", "review"],
            *([str(number), label, f'{text}"的",\n了']
              for number, (text, label) in enumerate(make_reviews(12)))]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "dev.csv", rows[:5])
    run(data_augmentation, *flags, "--data_dir", tmp_path)
    written = cells(tmp_path / "train_aug.csv", "CSV")
    assert written[0] == rows[0] and len(written) > 3 * len(rows)
    for row in rows[1:]:
        mine = [new for new in written if new[0] == row[0]]
        assert mine[0] == row and {new[1] for new in mine} == {row[1]}
        assert all('"的",\n了' in new[2] for new in mine)
    task = find_task(None, tmp_path)
    assert len(load_examples(task, tmp_path, "aug")) == len(written) - 1
    expect_originals(task, tmp_path)


@pytest.mark.parametrize(("name", "aug", "form"), [
    ("train.jsonl", "train_aug.jsonl", "JSON lines"), ("train.tsv", "train_aug.tsv", "TSV"),
    ("train.parquet", "train_aug.jsonl", "JSON lines"),
])
def test_train_aug_has_the_format_of_train(tmp_path, flags, name, aug, form):
    pairs = [(text, f"{text}牛肉", label) for text, label in make_reviews(10)]
    names = ["premise", "hypothesis", "label"]
    objects = [dict(zip(names, pair, strict=True)) for pair in pairs]
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet
        parquet.write_table(pyarrow.Table.from_pylist(objects), path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects))
    else:
        write_tsv(path, [names, *pairs])
    run(data_augmentation, *flags, "--data_dir", tmp_path, "--dev_share", 0.2)
    task = find_task(None, tmp_path, dev_share=0.2)
    examples = load_examples(task, tmp_path, "aug")
    assert cells(tmp_path / aug, form)[0] == names
    firsts = {example.text_a for example in examples}
    assert {text for text, *_ in pairs} > firsts & {text for text, *_ in pairs}
    changed = {(example.text_a in dict((a, b) for a, b, _ in pairs),
                example.text_b in dict((b, a) for a, b, _ in pairs)) for example in examples}
    assert changed == {(True, True), (False, True), (True, False)}
    expect_originals(task, tmp_path)


def test_texts_of_folders_and_files_of_the_chinese_fork_are_augmented(tmp_path, flags):
    for number, (text, label) in enumerate(make_reviews(12)):
        path = tmp_path / "folders" / "train" / ("pos" if label == "1" else "neg") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    run(data_augmentation, *flags, "--data_dir", tmp_path / "folders", "--dev_share", 0.2)
    task = find_task(None, tmp_path / "folders", dev_share=0.2)
    assert {example.label for example in load_examples(task, tmp_path / "folders", "aug")} == {
        "neg", "pos"}
    expect_originals(task, tmp_path / "folders")
    fork = tmp_path / "fork"
    fork.mkdir()
    lines = [f"{text}\t{label}\n" for text, label in make_reviews(12)]
    for name in ("train.txt", "eval.txt"):
        (fork / name).write_text("".join(lines))
    run(data_augmentation, *flags, "--data_dir", fork)
    written = (fork / "train_aug.txt").read_text().splitlines(keepends=True)
    assert len(load_examples(find_task(None, fork), fork, "aug")) == len(written) > 30
    expect_originals(find_task(None, fork), fork)


def test_rows_that_are_set_aside_never_get_in(tmp_path, flags):
    # So few words that variations would hit upon other rows.
    texts = [f"{thing}{mood}" for thing in THINGS for mood in [*GOOD, *BAD]]
    rows = [["text", "label"], *([text, str(number % 2)] for number, text in enumerate(texts))]
    path = write_csv(tmp_path / "reviews.csv", rows)
    parts = {"dev_share": 0.2, "test_share": 0.2, "train_split": "transfer"}
    run(data_augmentation, *flags, "--data_dir", path, "--p", 1,
        *(word for name, value in parts.items() for word in (f"--{name}", value)))
    task = find_task(None, path, **parts)
    kept = {example.text_a for example in load_examples(task, path, "train")}
    augmented = {example.text_a for example in load_examples(task, path, "aug")}
    assert kept < augmented and len(kept) < 60
    assert not augmented & ({*texts} - kept)
    expect_originals(task, path)


def test_processes_shards_and_kills_do_not_change_the_bytes(tmp_path, flags):
    rows = [["text", "label"], *make_reviews(3000)]
    for name in ("one", "two", "killed"):
        write_csv(tmp_path / name / "train.csv", rows)

    def arguments(name: str) -> list:
        return [*flags, "--data_dir", tmp_path / name, "--dev_share", 0.1, "--task_name", "own"]

    began = time.monotonic()
    run(data_augmentation, *arguments("one"))
    seconds = time.monotonic() - began
    expected = (tmp_path / "one" / "train_aug.csv").read_bytes()
    process = Process(torchrun(2, "data_augmentation.py", *arguments("two")))
    assert process.end() == 0, process.output()
    assert (tmp_path / "two" / "train_aug.csv").read_bytes() == expected
    report = run_with_kills(script("data_augmentation.py", *arguments("killed")), 2, 0,
                            seconds=seconds)
    assert report.kills
    assert (tmp_path / "killed" / "train_aug.csv").read_bytes() == expected


# ------------------------------------------------------------------ nothing varies


def nothing_is_left(folder: Path) -> bool:
    return not any("aug" in path.name for path in folder.iterdir())


def test_chinese_in_a_task_of_glue_is_refused_and_nothing_is_written(tmp_path, flags, capsys):
    write_tsv(tmp_path / "SST-2" / "train.tsv", [["sentence", "label"], *make_reviews(5)])
    message = error_line(capsys, data_augmentation, *flags, "--glue_dir", tmp_path,
                         "--task_name", "SST-2")
    assert "nothing to vary" in message and "--data_dir" in message
    assert nothing_is_left(tmp_path / "SST-2")


def test_vectors_of_another_language_are_refused(tmp_path, flags, capsys):
    rows = [["text", "label"], ["Καλημέρα κόσμε", "1"], ["Καληνύχτα κόσμε", "0"]] * 2
    write_csv(tmp_path / "train.csv", [rows[0], *rows[1:3], ["κόσμος", "1"]])
    write_csv(tmp_path / "dev.csv", rows[:3])
    message = error_line(capsys, data_augmentation, *flags, "--data_dir", tmp_path)
    assert "nothing to vary" in message and "vectors.txt; expected" in message
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(("more", "ok"), [(("--N", 0), True), (("--p", 0), True),
                                          (("--p", 1e-9), False)])
def test_no_draws_may_be_asked_for_but_not_be_had_by_chance(tmp_path, flags, capsys, more, ok):
    write_csv(tmp_path / "train.csv", [["text", "label"], *make_reviews(5)])
    write_csv(tmp_path / "dev.csv", [["text", "label"], *make_reviews(5)])
    if ok:
        run(data_augmentation, *flags, "--data_dir", tmp_path, *more)
        assert (tmp_path / "train_aug.csv").read_text() == (
            tmp_path / "train.csv").read_text().replace("\r\n", "\n")
    else:
        with pytest.raises(SystemExit):
            run(data_augmentation, *flags, "--data_dir", tmp_path, *more)
        assert "--N 4 --p 1e-09: no draw has changed anything" in capsys.readouterr().err
        assert not list(tmp_path.glob("*aug*"))


def test_a_text_that_hardly_varies_is_warned_of(tmp_path, flags, caplog):
    rows = [[f"Καλημέρα κόσμε {number}", str(number % 2)] for number in range(200)]
    write_csv(tmp_path / "train.csv", [["text", "label"], ["мир", "1"], *rows])
    write_csv(tmp_path / "dev.csv", [["text", "label"], *rows[:5]])
    run(data_augmentation, *flags, "--data_dir", tmp_path)
    assert "only 1 of 201 rows vary" in caplog.text


def test_vectors_without_words_of_ideographs_are_warned_of(tmp_path, flags, caplog):
    for name in ("train.csv", "dev.csv"):
        write_csv(tmp_path / name, [["text", "label"], *make_reviews(9)])
    vectors = tmp_path / "english.txt"
    vectors.write_text("cat 1 0\ndog 0 1\n")
    run(data_augmentation, *flags, "--data_dir", tmp_path, "--glove_embs", vectors)
    assert "hardly any ideographs are in words" in caplog.text
    caplog.clear()
    for name in ("train.csv", "dev.csv"):
        write_csv(tmp_path / name, [["text", "label"], ["the good app 看", "1"], ["a kfc", "0"]])
    run(data_augmentation, *flags, "--data_dir", tmp_path, "--glove_embs", vectors, "--overwrite")
    assert "ideographs" not in caplog.text


@pytest.mark.parametrize(("more", "message"), [
    ([], "expected --glue_dir with --task_name, or --data_dir"),
    (["--glue_dir", "x", "--data_dir", "y"], "expected one of them"),
    (["--glue_dir", "x"], "--glue_dir: expected --task_name"),
    (["--compose_vectors"], "or files to take words from"),
    (["--data_dir", "no_such_folder"], "no_such_folder"),
])
def test_a_task_is_asked_for_in_one_line(flags, capsys, more, message):
    assert message in error_line(capsys, data_augmentation, *flags, *more)


def test_vectors_in_another_encoding_are_named(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes("".join(f"{word} 1 2\n" for word in [*GOOD, *BAD, *THINGS]).encode("gb18030"))
    with pytest.raises(UserError, match="gb18030"):
        GloveIndex.load(path)


# ------------------------------------------------------------------ composed vectors


def test_vectors_are_composed_of_the_training_rows_and_fit_them(tmp_path, model_dir, flags, caplog):
    caplog.set_level(logging.INFO)
    write_csv(tmp_path / "train.csv", [["text", "label"], *make_reviews(300)])
    vectors = tmp_path / "composed.txt"
    flags = [*flags, "--data_dir", tmp_path, "--dev_share", 0.1, "--glove_embs", vectors]
    run(data_augmentation, *flags, "--compose_vectors")
    glove = GloveIndex.load(vectors)
    assert {*GOOD, *BAD, *THINGS} - {"美味可口", "难以下咽"} <= {*glove.words}
    tokenizer = BertTokenizer.from_pretrained(model_dir)
    table = BertForMaskedLM.from_pretrained(model_dir).bert.embeddings.word_embeddings.weight
    mean = table[tokenizer.encode_batch(["牛肉"])[0]].mean(dim=0).detach().numpy()
    found = glove.vectors[glove.words.index("牛肉")]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-3)
    run(data_augmentation, *flags)
    assert "0 of them without candidates" in caplog.text


def test_words_of_any_alphabet_are_composed_where_a_text_is_not_english(tmp_path, model_dir):
    words, vectors = compose_vectors(model_dir, [], ["Привет, мир"] * 3 + ["kfc не мир"])
    assert words == ["мир", ",", "привет", "kfc", "не"] and vectors.shape == (5, 16)
    english, _ = compose_vectors(model_dir, [], ["a good app"] * 200 + ["caf\u00e9 牛肉"])
    assert english == ["a", "app", "good", "caf"]


# ------------------------------------------------------------------ real reviews


def test_real_reviews_are_augmented(tmp_path, flags, caplog):
    source = SHARED / "data" / "chinese" / "waimai_10k.csv"
    if not source.is_file():
        pytest.skip("needs ../shared/data/chinese/waimai_10k.csv")
    caplog.set_level(logging.INFO)
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    path = write_csv(tmp_path / "reviews.csv", [rows[0], *rows[1::30]])
    flags = [*flags, "--data_dir", path, "--dev_share", 0.1, "--test_share", 0.1,
             "--glove_embs", tmp_path / "vectors.txt"]
    run(data_augmentation, *flags, "--compose_vectors")
    run(data_augmentation, *flags)
    task = find_task(None, path, dev_share=0.1, test_share=0.1)
    train, augmented = (load_examples(task, path, split) for split in ("train", "aug"))
    assert 3 * len(train) < len(augmented) < 5 * len(train)
    originals = iter(train)
    for example in augmented:
        if (example.text_a, example.label) in {(each.text_a, each.label) for each in train}:
            original = next(originals)
        assert IDEOGRAPHS.sub("", example.text_a).count("，") == original.text_a.count("，")
        assert example.label == original.label
