"""Write the tables of the word tasks whose answers follow from their queries by a definition.

Number words, successors, first letters and repeated patterns need no hand to write each row. What a hand writes here
are the words; `tests/test_icl_data.py` works the answers out anew, by other code. The tables of all other relations,
inflections included, are written by hand row by row.
"""

from __future__ import annotations

import itertools
import random
import string
import sys
from collections.abc import Iterator, Sequence

from build_icl import COLUMNS, SOURCE, read_items

# A row's query, its answer, its confusers and its group.
Row = tuple[str, str, tuple[str, ...], str]

def words(text: str) -> tuple[str, ...]:
    """Reads a list of words from a line."""
    return tuple(text.split())


SMALL = words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
              "seventeen eighteen nineteen")
TENS = words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
                 "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth")
MONTHS = words("January February March April May June July August September October November December")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ROMAN = ((90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
VOCABULARY = words(
    "ball bell bird blue book box bus cake car cat cup dog door egg fire fish fork gold hat hill key king leaf milk "
    "moon pen queen rain red rice ring road salt shoe snow star sun tea tree wall apple baby boat bread chair clock "
    "cloud coat duck farm frog grass hand horse house knife lake lamp ship soap spoon table train")
PATTERNS = 280


def in_words(number: int) -> str:
    """Writes 1 to 99 the American way."""
    if number < len(SMALL):
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{SMALL[ones]}" if ones else "")


def in_roman(number: int) -> str:
    """Writes 1 to 99 in Roman numerals."""
    text = ""
    for value, sign in ROMAN:
        text += number // value * sign
        number %= value
    return text


def number_words() -> Iterator[Row]:
    """Numbers up to 50 million that are said without "and", so that no two readings are right."""
    for n in range(1, 100):
        yield str(n), in_words(n), (in_roman(n), str(n + 1)), "small"
    large = [(n * 100, f"{in_words(n)} hundred") for n in range(1, 10)]
    large += [(n * 1000, f"{in_words(n)} thousand") for n in range(1, 100)]
    large += [(n * 100_000, f"{in_words(n)} hundred thousand") for n in range(1, 10)]
    large += [(n * 1_000_000, f"{in_words(n)} million") for n in range(1, 51)]
    for n, said in large:
        yield str(n), said, (str(n + 1), str(n // 10)), "large"


def successors() -> Iterator[Row]:
    """What comes next; the tempting options are what came before and what comes after next."""
    thirties = [f"{tens}-{ones}" for tens in ("twenty", "thirty") for ones in ORDINALS[:9]]
    ordinals = [*ORDINALS, *thirties[:9], "thirtieth", *thirties[9:]]
    nth = [f"{n}{'th' if 10 < n < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}" for n in range(1, 34)]
    for group, chain in {
        "letter": list(string.ascii_uppercase), "ordinal": ordinals[:33], "nth": nth,
        "word": [in_words(n) for n in range(1, 64)], "number": [str(n) for n in range(1, 104)],
    }.items():
        for place, (query, answer) in enumerate(itertools.pairwise(chain)):
            before = chain[max(place - 2, 0):place][::-1]
            yield query, answer, tuple([*before[:1], *chain[place + 2:place + 4], *before[1:]][:2]), group
    for group, circle in {"month": MONTHS, "day": DAYS}.items():
        for place, query in enumerate(circle):
            answer, after = (circle[(place + step) % len(circle)] for step in (1, 2))
            yield query, answer, (circle[place - 1], after), group


def first_letters(queries: Sequence[str]) -> Iterator[Row]:
    """Words and their first letters; the tempting options are the last and the second."""
    for word in queries:
        confusers = dict.fromkeys(letter for letter in (word[-1], word[1]) if letter != word[0])
        yield word, word[0], tuple(confusers), ""


def patterns() -> Iterator[Row]:
    """A period of two or three words, said twice, and the word that begins it."""
    rng = random.Random("icl_pattern")
    periods: dict[tuple[str, ...], None] = {}
    while len(periods) < PATTERNS:
        a, b, c = rng.sample(VOCABULARY, 3)
        periods[((a, b, c), (a, b, b), (a, b))[len(periods) % 3]] = None
    for period in periods:
        yield " ".join(period * 2), period[0], tuple(dict.fromkeys(period[1:])), ""


def main() -> None:
    """Writes the four tables."""
    queries = [item.query for item in read_items(SOURCE / "icl_first_letter.tsv")]
    tables = {"number_word": number_words(), "successor": successors(), "first_letter": first_letters(queries),
              "pattern": patterns()}
    for relation, rows in tables.items():
        lines = ["\t".join(COLUMNS)]
        lines += ["\t".join((query, answer, "|".join(wrong), "", group)) for query, answer, wrong, group in rows]
        (SOURCE / f"icl_{relation}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        sys.stdout.write(f"{relation}: {len(lines) - 1} rows\n")


if __name__ == "__main__":
    main()
