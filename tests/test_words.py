"""Words of any script: which may be varied, where they stand, and which recur in a corpus."""

import csv

import pytest
from helpers import SHARED

from transformer.tokenization import BasicTokenizer
from transformer.words import (
    IDEOGRAPHS,
    Sentence,
    WordFinder,
    english_words,
    frequent_ngrams,
    is_replacement,
    may_vary,
)

LEXICON = ["电影", "电影院", "很快", "好吃", "没有", "不错", "我们", "但是", "东京", "ラーメン",
           "Paris", "привет", "été", "не", "한국어"]


def find(text: str, lexicon: list[str] = LEXICON, lower: bool = True) -> Sentence:
    return WordFinder(lexicon, BasicTokenizer(lower)).find(text)


def varied(text: str, **settings) -> list[str]:
    """The words of a text that may be varied, as the text has them."""
    sentence = find(text, **settings)
    return [sentence.parts[word.part] for word in sentence.words]


def test_ideographs_are_cut_into_the_longest_words_of_the_lexicon():
    assert varied("去电影院看电影") == ["去", "电影院", "看", "电影"]
    assert varied("去电影院看电影", lexicon=[]) == list("去电影院看电影")
    assert varied("很 快") == ["快"]  # no word reaches over white space


def test_function_words_of_chinese_are_not_varied():
    assert varied("我们的，但是在了") == []
    assert varied("我吃过的好吃") == ["吃", "好吃"]
    assert not may_vary("因为") and may_vary("为难")


@pytest.mark.parametrize("character", "不没沒無无未別别非莫勿")
def test_no_word_with_a_negation_is_varied(character):
    assert not may_vary(character) and not may_vary(f"{character}错")
    assert varied(f"他{character}来") == ["来"]
    assert varied("味道不错没有毛病") == list("味道毛病")


def test_text_with_ideographs_is_its_parts_without_spaces():
    texts = ["我们在电影院看iPhone 12，very Good!", "\u3000东京\tラーメン 42%", "ABC公司的Café",
             "𠀀好吃[SEP]很快", "很快\u200b好吃\x00 e\u0301te\u0301", "好"]
    for text in texts:
        sentence = find(text)
        assert sentence.separator == "" and "".join(sentence.parts) == text
        assert sentence.words


def test_special_tokens_are_no_words():
    sentence = find("看好[SEP]在吗 [MASK]sep")
    assert [sentence.parts[word.part] for word in sentence.words] == ["看", "好", "sep"]
    assert sentence.tokens.count("[SEP]") == sentence.tokens.count("[MASK]") == 1


def test_words_of_letters_keep_to_letters_among_ideographs():
    sentence = find("看Paris和tokyo在Paris2")
    words = [(word.text, word.among) for word in sentence.words]
    assert words == [("看", 1), ("paris", "letters"), ("tokyo", "letters")]
    assert sentence.tokens[sentence.words[1].token] == "Paris"


def test_japanese_endings_are_kept_and_words_in_katakana_need_a_vector():
    assert varied("東京でラーメンを食べない", lexicon=["東京", "ラーメン"]) == ["東京", "食"]
    assert varied("東京、ラーメン", lexicon=["東京", "ラーメン"]) == ["東京", "ラーメン"]
    assert varied("東京、ラーメン", lexicon=["東京"]) == ["東京"]


def test_words_of_other_alphabets_need_a_vector_and_are_no_negation():
    assert varied("Привет, мир не 한국어 été") == ["привет", "한국어", "été"]
    assert varied("Été", lexicon=[]) == ["été"]  # to the tokenizer the English word "ete"
    assert varied("Été", lexicon=[], lower=False) == []
    assert find("Привет — мир").separator == " "


@pytest.mark.parametrize("text", [
    "It's a Cat, in [MASK] space.", "", "tab\there", "“Quotes” — and dashes…", "a\x00b can't 42 $",
])
def test_english_has_the_words_that_it_always_had(text):
    basic = BasicTokenizer()
    assert find(text) == english_words(text, basic)


def test_specials_punctuation_and_pieces_are_no_replacements():
    assert not any(map(is_replacement, ["[UNK]", "[unused7]", "!", "##ing", "...", "\u00b2", ""]))
    assert all(map(is_replacement, ["cat", "1912", "\u4e2d", "caf\u00e9"]))


def test_what_recurs_as_a_unit_is_a_word():
    words = ["米饭", "牛肉", "豆腐", "米粉", "牛奶", "豆浆", "咖啡", "饺子", "餐厅", "服务员"]
    runs = [f"{first}的{second}" for step in (1, 2, 3)
            for first, second in zip(words, words[step:] + words[:step], strict=True)] * 2
    assert set(frequent_ngrams(runs)) == set(words)
    assert frequent_ngrams(runs)["米饭"] == 12
    assert frequent_ngrams(["米饭"] * 4) == {}


def test_the_words_of_real_reviews_are_found():
    path = SHARED / "data" / "chinese" / "waimai_10k.csv"
    if not path.is_file():
        pytest.skip("needs ../shared/data/chinese/waimai_10k.csv")
    with path.open(encoding="utf-8", newline="") as file:
        reviews = [row["review"] for row in csv.DictReader(file)]
    words = frequent_ngrams([run for review in reviews for run in IDEOGRAPHS.findall(review)])
    assert {"味道", "速度", "外卖", "态度", "服务", "百度", "快递", "米饭", "不错"} <= words.keys()
    assert not {"味道很", "都凉了", "的时候", "送餐员态"} & words.keys()
