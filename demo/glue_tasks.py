"""Four small GLUE-like tasks made of real English sentences: SST-2, CoLA, MRPC and RTE.

Each maker turns a sentence, the wanted class and a random generator into the texts of one row. The
labels follow from how a row was made, and a few per cent are flipped, as annotators do, so no
model reaches 100. A training sentence is used for both classes: a model cannot learn the rows by
heart and has to look at what differs.
"""

import random
import re
from collections.abc import Callable

Texts = tuple[str, str]  # first and second text ("" for single sentences)
Row = tuple[str, str, str]  # texts and label
LABEL_NOISE = 0.04  # share of rows with the wrong label

GOOD = """
    excellent elegant charming brilliant delightful superb graceful refreshing wonderful clever
    solid beautiful admirable lovely polished impressive enjoyable pleasant thoughtful smart
    masterful splendid witty rewarding
"""
BAD = """
    awful clumsy tedious dreadful dull terrible sloppy annoying horrible stupid ugly miserable
    nasty messy mediocre disappointing painful unpleasant careless hopeless stale boring
    pointless lousy
"""
SUBJECTS = """
    parser module interface design manual library class method function tutorial debugger
    compiler format protocol server example chapter socket handler syntax grammar iterator test
    generator decoder package story ending introduction
"""
GOOD_NOUNS = "joy triumph pleasure gem delight success treat masterpiece"
BAD_NOUNS = "mess disaster failure waste bore nuisance nightmare burden"
INTENSIFIERS = "very really quite truly rather so"
DROPPABLE = "also usually simply always just normally currently only then"
AUXILIARIES = "is are can must may will should does do was were has"
NOUNS = """
    file string list object class value name function method module argument type set key number
    line message server thread process exception attribute test character code path element item
    parameter dictionary expression statement iterator package variable handler socket
"""
FUNCTION_WORDS = "the a an to of in for with by from is are this that be as if can or and not"
(GOOD, BAD, SUBJECTS, GOOD_NOUNS, BAD_NOUNS, INTENSIFIERS, DROPPABLE, AUXILIARIES, NOUNS,
 FUNCTION_WORDS) = (
    words.split() for words in (GOOD, BAD, SUBJECTS, GOOD_NOUNS, BAD_NOUNS, INTENSIFIERS,
                                DROPPABLE, AUXILIARIES, NOUNS, FUNCTION_WORDS)
)
FLIPS = ["is not", "is never", "is hardly", "is far from"]

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
AGREEMENT = {
    "is": "are", "are": "is", "has": "have", "have": "has", "was": "were", "a": "an", "an": "a",
    "does": "do", "do": "does", "this": "these", "these": "this", "be": "is", "its": "it",
    "not": "no", "to": "for", "that": "of", "of": "that", "if": "than",
}
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
    flipped = rng.random() < 0.2
    good = positive != flipped
    # A Zipf-like choice: some words are seen often in training, some hardly ever.
    lexicon, nouns = (GOOD, GOOD_NOUNS) if good else (BAD, BAD_NOUNS)
    adjective = lexicon[min(int(rng.expovariate(0.08)), len(lexicon) - 1)]
    verb = rng.choice(FLIPS) if flipped else rng.choice(["is", "feels", "looks", "remains", "is"])
    if rng.random() < 0.25:
        verb = verb.replace("feels", "is").replace("looks", "is")
        return f"{subject} {verb} a {rng.choice(nouns)}"
    degree = f"{rng.choice(INTENSIFIERS)} " if rng.random() < 0.4 else ""
    return f"{subject} {verb} {degree}{adjective}"


def opinion(positive: bool, fact: str, rng: random.Random) -> str:
    """Make one review sentence around the neutral `fact` (no final full stop)."""
    main, other = clause(positive, rng), clause(not positive, rng)
    patterns = [
        main, main, f"{main} , {fact}", f"{fact} , and {main}",
        f"{main} and {clause(positive, rng)}", f"{other} , but {main}",
        f"although {other} , {main}", f"{main} , even if {other}",
    ]
    return rng.choice(patterns)


def sst2_texts(sentence: str, positive: bool, rng: random.Random) -> Texts:
    """Make a review around the first words of a sentence; class 1 is praise."""
    fact = " ".join(words_of(sentence)[:-1][: rng.randint(4, 8)]).lower()
    return opinion(positive, fact, rng) + " .", ""


# --- CoLA: real sentences against the same with a local fault ------------------------------


def swap_words(words: list[str], rng: random.Random) -> list[str]:
    """Exchange a function word and the word after it, at one to three places."""
    words = list(words)
    places = [i for i in range(len(words) - 2) if words[i].lower() in FUNCTION_WORDS]
    places = places or [rng.randrange(len(words) - 2)]
    for place in rng.sample(places, min(len(places), rng.choice([1, 2, 2, 3]))):
        words[place], words[place + 1] = words[place + 1], words[place]
    return words


def move_word(words: list[str], rng: random.Random) -> list[str]:
    """Move one word to the front of the sentence's last word."""
    words = list(words)
    words.insert(len(words) - 2, words.pop(rng.randrange(len(words) - 3)))
    return words


def break_agreement(words: list[str], rng: random.Random) -> list[str]:
    """Put wrong forms of small words, or swap words where there are none."""
    if not any(word.lower() in AGREEMENT for word in words):
        return swap_words(words, rng)
    return [AGREEMENT.get(word.lower(), word) for word in words]


def cola_texts(sentence: str, acceptable: bool, rng: random.Random) -> Texts:
    """Keep (class 1) or spoil a sentence."""
    words = words_of(sentence)
    if not acceptable:
        words = rng.choice([swap_words, swap_words, move_word, break_agreement])(words, rng)
        words = [w.lower() if w == words_of(sentence)[0] else w for w in words]
    return join_words(words), ""


# --- MRPC: a rewording against a similar sentence about something else ---------------------


def reword(sentence: str, rng: random.Random, share: float = 0.8) -> list[str]:
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


def mrpc_texts(sentence: str, same: bool, other: str, rng: random.Random) -> Texts:
    """Pair a sentence with a rewording (class 1) or with something else; `other` may be that."""
    if same:
        second = reword(sentence, rng)
    elif rng.random() < 0.6:
        second = words_of(other)
    else:
        second = change_content(sentence, rng)
    pair = [" ".join(words_of(sentence)), " ".join(second)]
    if rng.random() < 0.5:
        pair.reverse()
    return pair[0], pair[1]


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


def rte_texts(sentence: str, entailed: bool, other: str, rng: random.Random) -> Texts:
    """Pair a premise with what it says (class 0, "entailment") or with something it does not."""
    hypothesis = main_clause(sentence)
    if entailed:
        hypothesis = replace_some(hypothesis, SYNONYMS, rng, 0.2)
    elif rng.random() < 0.45:
        hypothesis = negate(hypothesis)
    elif any(w in ANTONYMS for w in hypothesis) and rng.random() < 0.5:
        hypothesis = replace_some(hypothesis, ANTONYMS, rng, 1.0)
    else:
        hypothesis = main_clause(other)
    return sentence, join_words(hypothesis)


# Label of a class-0 and of a class-1 row, share of class 1, words in a usable sentence.
LABELS = {
    "SST-2": ("0", "1"), "CoLA": ("0", "1"), "MRPC": ("0", "1"),
    "RTE": ("not_entailment", "entailment"),
}
LENGTHS = {"SST-2": (6, 30), "CoLA": (5, 14), "MRPC": (8, 18), "RTE": (7, 20)}


def make_row(
    name: str, sentence: str, positive: bool, everything: list[str], rng: random.Random
) -> Row:
    """Make one row of a task, with a wrong label now and then.

    Args:
        positive: the wanted class: praise, acceptable, paraphrase or entailment.
        everything: sentences to draw an unrelated one from.
    """
    if name == "SST-2":
        texts = sst2_texts(sentence, positive, rng)
    elif name == "CoLA":
        texts = cola_texts(sentence, positive, rng)
    else:
        make = mrpc_texts if name == "MRPC" else rte_texts
        texts = make(sentence, positive, rng.choice(everything), rng)
    wrong = rng.random() < LABEL_NOISE
    return (*texts, LABELS[name][positive != wrong])


def make_split(
    name: str, sentences: list[str], everything: list[str], both: bool, rng: random.Random
) -> list[Row]:
    """Make the rows of a split; with `both` a sentence gives a row of either class."""
    rows = []
    for sentence in sentences:
        classes = (False, True) if both else (rng.random() < 0.5,)
        rows += [make_row(name, sentence, positive, everything, rng) for positive in classes]
    rng.shuffle(rows)
    return rows


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
