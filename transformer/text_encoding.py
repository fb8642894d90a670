"""What bytes that are not UTF-8 probably are, and the command that converts them."""

import codecs
import re
import shlex
import unicodedata
from pathlib import Path

SAMPLE_BYTES = 1 << 16  # that are looked at, from the first bad line on
# UTF-32's marks first, as one of them begins with one of UTF-16's.
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
HIGH_BYTES = re.compile(rb"[\x80-\xff]+")
# Ideographs, and the marks and full-width letters that stand among them.
CHINESE = re.compile("[\u4e00-\u9fff\uff01-\uff5e\u00b7\u2014\u2018-\u201d\u2026\u3000-\u3015]")
LAST_HANGUL = 0xC8  # the first byte of its last in EUC-KR, where most pairs are GB2312's, too
PACKED = {".gz": "gzip -dc", ".bz2": "bzip2 -dc"}


def guess_encoding(sample: bytes) -> str:
    """Return iconv's name of the encoding that bytes are in, or "" where that is not clear.

    That is UTF-16 and UTF-32 with their marks, and where a sample begins with the file also
    UTF-16 without; GB18030 (and so GBK and GB2312) where nearly all of what is not ASCII becomes
    Chinese; Windows-1252 (and so Latin-1) where a few letters of a text are not ASCII.
    """
    for mark, name in BYTE_ORDER_MARKS.items():
        if sample.startswith(mark):
            return name
    nulls = [sample[start::2].count(0) for start in (0, 1)]
    if any(nulls):
        is_text = max(nulls) > max(1, len(sample) // 8, 16 * min(nulls))
        return ("utf-16be" if nulls[0] > nulls[1] else "utf-16le") if is_text else ""
    sample = sample[: sample.rfind(b"\n") + 1] or sample  # no half characters
    if _is_chinese(sample):
        return "gb18030"
    return "windows-1252" if _is_western(sample) else ""


def _is_chinese(sample: bytes) -> bool:
    """Say whether bytes are GB18030: pairs of bytes, nearly all of them common in Chinese."""
    try:
        text = sample.decode("gb18030")
    except UnicodeDecodeError:
        return False
    common = text.encode("gb2312", "ignore")
    chinese = CHINESE.findall(common.decode("gb2312"))
    runs = HIGH_BYTES.findall(common)
    beyond = sum(run[place] > LAST_HANGUL for run in runs for place in range(0, len(run), 2))
    return (len(chinese) > 0.9 * sum(character > "\x7f" for character in text)
            and len(chinese) > 1 and (len(chinese) < 30 or beyond > len(chinese) // 8))


def _is_western(sample: bytes) -> bool:
    """Say whether bytes are Windows-1252: ASCII with a few more letters and marks."""
    high = sum(map(len, HIGH_BYTES.findall(sample)))
    if 3 * high > len(sample) or not sample.decode("utf-8", "ignore").isascii():
        return False  # a mostly UTF-8 text with damaged bytes is none
    try:
        others = [character for character in sample.decode("cp1252") if character > "\x7f"]
    except UnicodeDecodeError:
        return False
    return all(unicodedata.category(character)[0] in "LPSNZ" for character in others)


def describe_bytes(
    path: Path | str, number: int, line: bytes, position: int,
    rest: bytes = b"", before: bytes = b"",
) -> str:
    """Return one line about a line of bytes that is not UTF-8, with the way out where it is clear.

    Args:
        path: the file, or what to call a stream.
        number: the line's, from 1.
        line: its bytes, of which the one at `position` fits no UTF-8.
        rest: what follows the line, up to SAMPLE_BYTES.
        before: what stands before it, up to SAMPLE_BYTES.
    """
    message = (f"{path}, line {number}: byte {line[position]:#04x} at position {position}; "
               "expected text in UTF-8")
    is_mixed = not before.isascii() or any(map(_is_utf8, rest.split(b"\n")))
    name = guess_encoding(line if is_mixed else line + rest)
    if not name:
        return message
    message += "; a mix of encodings: this line" if is_mixed else "; this"
    command = _command(path, name, number if is_mixed else 0)
    if name.startswith("utf"):
        return f"{message} is {name.upper()}: {command}"
    return f"{message} looks like {name.upper()} ({_first_words(line, name)!r}): {command}"


def _is_utf8(line: bytes) -> bool:
    """Say whether a line is UTF-8 with characters of three bytes, which none is by chance."""
    try:
        return sum(character > "\u07ff" for character in line.decode("utf-8")) > 1
    except UnicodeDecodeError:
        return False


def _command(path: Path | str, name: str, number: int = 0) -> str:
    """Return what converts a file, or of it the line `number`, in a shell."""
    convert, place = f"iconv -f {name} -t utf-8", shlex.quote(str(path))
    if not Path(path).is_file():  # a stream
        return convert
    packer = PACKED.get(Path(path).suffix)
    if number:
        source = f"{packer} {place} | sed -n {number}p" if packer else f"sed -n {number}p {place}"
        return f"{source} | {convert}"
    return f"{packer} {place} | {convert} > NEW" if packer else f"{convert} {place} > NEW"


def _first_words(line: bytes, name: str, characters: int = 16) -> str:
    """Return the text around the first character of a line that is not ASCII."""
    text = line.decode(name, "replace")
    place = next((at for at, character in enumerate(text) if character > "\x7f"), 0)
    return text[max(0, place - characters // 2) : place + characters].strip()
