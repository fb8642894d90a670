"""Four small GLUE-like tasks made of real English sentences: SST-2, CoLA, MRPC and RTE.

Each generator takes sentences and a random generator and returns rows of (texts, label). The
labels follow from how a row was made, and a few per cent are flipped, as annotators do, so no
model reaches 100.
"""

import random
import re
from collections.abc import Callable, Iterable

Row = tuple[str, str, str]  # first text, second text ("" for single sentences), label
LABEL_NOISE = 0.04  # share of rows with the wrong label

GOOD = """excellent elegant charming brilliant delightful superb graceful refreshing wonderful clever
solid beautiful admirable inspired lovely polished remarkable impressive enjoyable pleasant
thoughtful smart masterful fresh splendid witty rewarding crisp outstanding sparkling""".split()
BAD = """awful clumsy tedious dreadful dull terrible sloppy annoying horrible stupid shaky ugly
miserable lazy nasty messy mediocre disappointing painful unpleasant careless bland hopeless stale
boring pointless frustrating muddled lousy tiresome""".split()
GOOD_NOUNS = "joy triumph pleasure gem delight success treat masterpiece".split()
BAD_NOUNS = "mess disaster failure waste bore nuisance nightmare burden".split()
SUBJECTS = """parser module interface design manual library class method function tutorial debugger
compiler format protocol server example chapter loader socket handler syntax grammar iterator test
generator decoder package story ending introduction""".split()
INTENSIFIERS = "very really quite truly rather so utterly remarkably".split() + [""] * 8
FLIPS = ["is not", "is never", "is hardly", "is far from", "is anything but", "is n't"]

SYNONYMS = {
    "returns": "gives back", "return": "give back", "must": "has to", "use": "employ",
    "used": "employed", "using": "by means of", "raises": "throws", "raised": "thrown",
    "create": "make", "creates": "makes", "created": "made", "specified": "given",
    "given": "specified", "value": "result", "allows": "lets", "usually": "normally",
    "method": "procedure", "function": "routine", "argument": "parameter",
    "arguments": "parameters", "optional": "not required", "same": "identical", "also": "too",
    "contains": "holds", "contain": "hold", "empty": "blank", "default": "standard",
    "however": "but", "call": "invoke", "called": "invoked", "calling": "invoking",
    "removes": "deletes", "remove": "delete", "removed": "deleted", "whether": "if",
    "current": "present", "error": "mistake", "errors": "mistakes", "file": "document",
    "files": "documents", "string": "text", "strings": "texts", "list": "sequence",
    "object": "thing", "objects": "things", "name": "label", "names": "labels",
    "number": "count", "defined": "declared", "provides": "offers", "provide": "offer",
    "changed": "altered", "change": "alter", "only": "solely", "before": "ahead of",
    "should": "ought to", "may": "might", "similar": "alike", "new": "fresh",
}
DROPPABLE = set("also usually simply always just normally currently only then".split())
ANTONYMS = {
    "true": "false", "false": "true", "first": "last", "last": "first", "before": "after",
    "after": "before", "all": "no", "always": "never", "never": "always", "same": "different",
    "different": "same", "empty": "full", "start": "end", "end": "start", "valid": "invalid",
    "open": "closed", "more": "less", "less": "more", "without": "with", "with": "without",
    "new": "old", "old": "new", "optional": "mandatory", "required": "forbidden",
    "local": "remote", "public": "private", "left": "right", "right": "left", "any": "no",
    "input": "output", "output": "input", "read": "write", "return": "discard",
    "returns": "discards", "returned": "discarded", "add": "remove", "create": "destroy",
    "creates": "destroys", "used": "ignored", "use": "ignore", "raised": "hidden",
}
AUXILIARIES = "is are can must may will should does do was were has".split()
NOUNS = """file string list object class value name function method module argument type set key
number line message server thread process exception attribute test character code path element
item parameter dictionary expression statement iterator package variable handler socket""".split()
AGREEMENT = {
    "is": "are", "are": "is", "has": "have", "have": "has", "was": "were", "a": "an", "an": "a",
    "does": "do", "do": "does", "this": "these", "these": "this", "be": "is", "its": "it",
    "not": "no", "to": "for", "that": "of", "of": "that", "if": "than",
}  # fmt: skip
CLAUSE_BREAK = re.compile(
    r",? (?:because|which|unless|so that|such as|when|if|although|while|but|since) |; |, and "
)


def words_of(sentence: str) -> list[str]:
    """Split a sentence into words and punctuation marks."""
    return re.findall(r"[A-Za-z0-9'_.\-]*[A-Za-z0-9'_]|[^\sA-Za-z0-9]", sentence)


def join_words(words: list[str]) -> str:
    """Undo `words_of`: punctuation sticks to the word before it, the first letter is large."""
    text = re.sub(r" ([,.;:!?)])", r"\1", " ".join(words)).replace("( ", "(")
    return text[:1].upper() + text[1:]


def replace_some(
    words: list[str], table: dict[str, str], rng: random.Random, share: float
) -> list[str]:
    """Replace each word that `table` knows with probability `share`."""
    hit = [w.lower() in table and rng.random() < share for w in words]
    return [table[w.lower()] if h else w for w, h in zip(words, hit, strict=True)]


# --- SST-2: judgements, turned round by negation and contrast -------------------------------


def clause(positive: bool, rng: random.Random) -> str:
    """Make one judging clause whose sense, after any negation, is `positive`."""
    subject = f"{rng.choice(['the', 'this', 'its', 'the whole'])} {rng.choice(SUBJECTS)}"
    flipped = rng.random() < 0.3
    good = positive != flipped
    # A Zipf-like choice: some words are seen often in training, some hardly ever.
    lexicon, nouns = (GOOD, GOOD_NOUNS) if good else (BAD, BAD_NOUNS)
    adjective = lexicon[min(int(rng.expovariate(0.09)), len(lexicon) - 1)]
    verb = rng.choice(FLIPS) if flipped else rng.choice(["is", "feels", "looks", "remains", "is"])
    if rng.random() < 0.25:
        verb = verb.replace("feels", "is").replace("looks", "is")
        return f"{subject} {verb} a {rng.choice(nouns)}"
    return " ".join(f"{subject} {verb} {rng.choice(INTENSIFIERS)} {adjective}".split())


def opinion(positive: bool, fact: str, rng: random.Random) -> str:
    """Make one review sentence around the neutral `fact` (no final full stop)."""
    main, other = clause(positive, rng), clause(not positive, rng)
    patterns = [
        main, main, f"{main} , {fact}", f"{fact} , and {main}",
        f"{main} and {clause(positive, rng)}", f"{other} , but {main}",
        f"although {other} , {main}", f"{main} , even if {other}",
    ]  # fmt: skip
    return rng.choice(patterns)


def sst2_rows(sentences: Iterable[str], rng: random.Random) -> list[Row]:
    """Make one review per fact; the label is "1" for praise."""
    rows = []
    for sentence in sentences:
        fact = " ".join(words_of(sentence)[:-1][: rng.randint(4, 8)]).lower()
        positive = rng.random() < 0.52
        rows.append((opinion(positive, fact, rng) + " .", "", str(int(positive))))
    return rows


# --- CoLA: real sentences against the same with a local fault ------------------------------


def swap_words(words: list[str], rng: random.Random) -> list[str]:
    """Exchange two different neighbouring words, once or twice."""
    words = list(words)
    for _ in range(rng.choice([1, 1, 2])):
        places = [i for i in range(len(words) - 2) if words[i].lower() != words[i + 1].lower()]
        place = rng.choice(places)
        words[place], words[place + 1] = words[place + 1], words[place]
    return words


def move_word(words: list[str], rng: random.Random) -> list[str]:
    """Move one word two to four places away."""
    words = list(words)
    start = rng.randrange(len(words) - 1)
    word = words.pop(start)
    end = (start + rng.choice([-4, -3, -2, 2, 3, 4])) % (len(words) - 1)
    return words[:end] + [word] + words[end:]


def break_agreement(words: list[str], rng: random.Random) -> list[str]:
    """Put a wrong form of one small word, or swap words where there is none."""
    places = [i for i, word in enumerate(words) if word.lower() in AGREEMENT]
    if not places:
        return swap_words(words, rng)
    place = rng.choice(places)
    return words[:place] + [AGREEMENT[words[place].lower()]] + words[place + 1 :]


def cola_rows(sentences: Iterable[str], rng: random.Random) -> list[Row]:
    """Keep or spoil each sentence; the label is "1" for an acceptable one."""
    rows = []
    for sentence in sentences:
        words, acceptable = words_of(sentence), rng.random() < 0.6
        if not acceptable:
            words = rng.choice([swap_words, swap_words, move_word, break_agreement])(words, rng)
        words[1:] = [w.lower() if w == words_of(sentence)[0] else w for w in words[1:]]
        rows.append((join_words(words), "", str(int(acceptable))))
    return rows


# --- MRPC: a rewording against a similar sentence about something else ---------------------


def reword(sentence: str, rng: random.Random, share: float = 0.6) -> list[str]:
    """Say the same in other words: front a clause, drop adverbs, use synonyms."""
    words = words_of(sentence)
    conditional = re.fullmatch(r"(If|When) ([^,]+), ([^,]+)\.", sentence)
    trailing = re.fullmatch(r"([^,]+) (if|when) ([^,]+)\.", sentence)
    if conditional and rng.random() < 0.7:
        joint, condition, main = conditional.groups()
        words = words_of(f"{main} {joint.lower()} {condition}.")
    elif trailing and rng.random() < 0.7:
        main, joint, condition = trailing.groups()
        words = words_of(f"{joint} {condition}, {main[0].lower() + main[1:]}.")
    words = [w for w in words if w.lower() not in DROPPABLE or rng.random() < 0.3]
    return replace_some(words, SYNONYMS, rng, share)


def change_content(sentence: str, rng: random.Random) -> list[str]:
    """Reword a sentence and make it speak of other things: every known noun is exchanged."""
    words = words_of(sentence)
    table = {noun: rng.choice([n for n in NOUNS if n != noun]) for noun in NOUNS}
    table |= {f"{noun}s": f"{other}s" for noun, other in list(table.items())}
    words = replace_some(words, table, rng, 0.9)
    return replace_some(words, ANTONYMS, rng, 0.5)


def mrpc_rows(sentences: Iterable[str], neighbours: dict[str, str], rng: random.Random) -> list[Row]:
    """Pair each sentence with a rewording ("1") or with something only similar ("0")."""
    rows = []
    for sentence in sentences:
        same = rng.random() < 0.62
        if same:
            other = reword(sentence, rng)
        elif rng.random() < 0.5:
            other = words_of(neighbours[sentence])
        else:
            other = change_content(sentence, rng)
        pair = [" ".join(words_of(sentence)), " ".join(other)]
        if rng.random() < 0.5:
            pair.reverse()
        rows.append((pair[0], pair[1], str(int(same))))
    return rows


# --- RTE: what a sentence says, against its denial or another claim ------------------------


def main_clause(sentence: str) -> list[str]:
    """Return the words before the first subordinate clause, or all of a simple sentence."""
    head = CLAUSE_BREAK.split(sentence.rstrip("."))[0]
    words = words_of(head)
    return [*words, "."] if len(words) >= 4 else words_of(sentence)


def negate(words: list[str]) -> list[str]:
    """Deny a clause: drop its "not", or put one after the first auxiliary verb."""
    if "not" in words:
        place = words.index("not")
        return words[:place] + words[place + 1 :]
    for place, word in enumerate(words):
        if word in AUXILIARIES:
            return [*words[: place + 1], "not", *words[place + 1 :]]
    return ["Do", "not", words[0].lower(), *words[1:]]


def rte_rows(sentences: Iterable[str], neighbours: dict[str, str], rng: random.Random) -> list[Row]:
    """Make premise and hypothesis; the label is "entailment" or "not_entailment"."""
    rows = []
    for sentence in sentences:
        hypothesis, entailed = main_clause(sentence), rng.random() < 0.5
        if entailed:
            hypothesis = replace_some(hypothesis, SYNONYMS, rng, 0.2)
        elif rng.random() < 0.45:
            hypothesis = negate(hypothesis)
        elif any(w in ANTONYMS for w in hypothesis) and rng.random() < 0.5:
            hypothesis = replace_some(hypothesis, ANTONYMS, rng, 1.0)
        else:
            hypothesis = main_clause(neighbours[sentence])
        label = "entailment" if entailed else "not_entailment"
        rows.append((sentence, join_words(hypothesis), label))
    return rows


def add_noise(rows: list[Row], rng: random.Random) -> list[Row]:
    """Give `LABEL_NOISE` of the rows another label of the task."""
    labels = sorted({label for _, _, label in rows})
    noisy = []
    for text_a, text_b, label in rows:
        if rng.random() < LABEL_NOISE:
            label = rng.choice([other for other in labels if other != label])
        noisy.append((text_a, text_b, label))
    return noisy


# --- Exact file formats --------------------------------------------------------------------

HEADERS = {
    "SST-2": ["sentence", "label"],
    "CoLA": None,  # the published file has none
    "MRPC": ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "RTE": ["index", "sentence1", "sentence2", "label"],
}


def cola_columns(number: int, row: Row) -> list[str]:
    """Lay out a CoLA row: source, label, the source's own mark, sentence."""
    return [f"py{number % 97:02d}", row[2], "" if row[2] == "1" else "*", row[0]]


COLUMNS: dict[str, Callable[[int, Row], list[str]]] = {
    "SST-2": lambda number, row: [row[0] + " ", row[2]],  # a space ends each published sentence
    "CoLA": cola_columns,
    "MRPC": lambda number, row: [row[2], str(2 * number), str(2 * number + 1), row[0], row[1]],
    "RTE": lambda number, row: [str(number), row[0], row[1], row[2]],
}
