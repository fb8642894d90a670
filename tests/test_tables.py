"""Tables for the terminal and for Markdown, in any script."""

import pytest

from transformer.tables import display_width, markdown_table, pad, text_table, wrap


@pytest.mark.parametrize(("text", "width"), [
    ("label", 5), ("好评", 4), ("ＡＢ", 4), ("ｶﾅ", 2), ("cafe\u0301", 4), ("한국어", 6), ("", 0),
    ("a\u200db", 2), ("中a。", 5), ("\U0001f600", 2)])
def test_a_width_is_counted_in_cells_of_a_terminal(text, width):
    assert display_width(text) == width
    assert display_width(pad(text, 9)) == display_width(pad(text, 9, right=True)) == 9
    assert pad(text, 0) == text


def test_columns_of_chinese_text_are_aligned():
    rows = [["学生，蒸馏", "91.0", "9.5"], ["bert", "1.0", "88"]]
    table = text_table(["模型", "好评 f1", "acc"], rows)
    assert table.splitlines() == [
        "模型        好评 f1  acc",
        "学生，蒸馏     91.0  9.5",
        "bert            1.0   88"]


def test_a_table_for_the_terminal_keeps_within_80_columns():
    for name in ("a student with quite a long name, labels only, copied layers", "很长的名字" * 9):
        rows = [[name, *["40.1/39.0"] * 7]]
        lines = text_table(["dev", *(f"task-{i} spearmanr" for i in range(7))], rows).splitlines()
        assert max(map(display_width, lines)) <= 80
        assert sum(line.count("40.1/39.0") for line in lines) == 7
        assert all(f"task-{i}" in "\n".join(lines) for i in range(7))


def test_long_texts_are_broken_by_width_and_nothing_is_lost():
    text = "今天天气很好，我们去看了一部电影 and then wrote a review of it"
    lines = wrap(text, 20)
    assert max(map(display_width, lines)) <= 20
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert wrap("", 20) == [""]


def test_a_bar_in_a_cell_does_not_end_it_in_markdown():
    assert markdown_table(["label", "rows"], [["a|b", "3"]]).splitlines() == [
        "| label | rows |", "| --- | ---: |", "| a\\|b | 3 |"]
