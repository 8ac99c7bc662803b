"""The enlarged word tasks hold by rules that are written here anew: inflections, numbers, what comes next, letters."""

from __future__ import annotations

import calendar
import json
import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks

DATA = Path(__file__).resolve().parents[1] / "src" / "headcount" / "tasks" / "data" / "icl"
VOWELS = "aeiou"


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


IRREGULAR_PLURALS = pairs(
    "man:men woman:women child:children foot:feet tooth:teeth goose:geese mouse:mice louse:lice ox:oxen person:people "
    "leaf:leaves wolf:wolves knife:knives life:lives wife:wives half:halves calf:calves loaf:loaves shelf:shelves "
    "thief:thieves elf:elves midwife:midwives tomato:tomatoes potato:potatoes hero:heroes echo:echoes snowman:snowmen "
    "policeman:policemen fireman:firemen grandchild:grandchildren")
IRREGULAR_PASTS = pairs(
    "go:went do:did have:had say:said see:saw eat:ate give:gave take:took shake:shook fall:fell rise:rose drive:drove "
    "ride:rode write:wrote speak:spoke steal:stole break:broke freeze:froze choose:chose wear:wore tear:tore "
    "swear:swore blow:blew grow:grew know:knew throw:threw fly:flew draw:drew hide:hid bite:bit slide:slid "
    "forget:forgot forgive:forgave come:came become:became run:ran swim:swam sing:sang drink:drank begin:began sit:sat "
    "win:won dig:dug stick:stuck strike:struck sting:stung swing:swung cling:clung spin:spun hear:heard pay:paid "
    "lay:laid make:made build:built send:sent spend:spent lend:lent bend:bent lose:lost shoot:shot sleep:slept "
    "keep:kept sweep:swept creep:crept weep:wept leave:left feel:felt deal:dealt mean:meant meet:met feed:fed lead:led "
    "bleed:bled flee:fled buy:bought bring:brought think:thought teach:taught catch:caught fight:fought seek:sought "
    "sell:sold tell:told find:found grind:ground hold:held stand:stood understand:understood")
# Their past is the verb itself, so that no option can be one.
LIKE_THE_VERB = ("read", "cut", "put", "hit", "set")
# Verbs of which two pasts are in use, American or British; none of them may be asked for.
TWO_PASTS = words(
    "burn dream lean leap learn light kneel smell spell spill spoil sneak dive hang shine plead weave wake bet wed "
    "quit fit knit sweat spit thrive strive tread shear prove speed saw sew show mow swell cleave clothe dwell get "
    "sink shrink spring stink ring beat bid lie travel cancel label model signal level focus benefit worship kidnap "
    "program")
# Stressed on their last syllable, which has one vowel: the consonant doubles, as in words of one syllable.
STRESSED_AT_THE_END = ("admit", "prefer", "begin", "forget")
IRREGULAR_DEGREES = {"good": ("better", "best"), "bad": ("worse", "worst")}
IRREGULAR_ADVERBS = {"true": "truly", "full": "fully", "public": "publicly", "shy": "shyly"}

READ = {word: n for n, word in enumerate(words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"))}
READ |= {word: 10 * n for n, word in enumerate(
    words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
FROM_ORDINAL = {"first": "one", "second": "two", "third": "three", "fifth": "five", "eighth": "eight", "ninth": "nine",
                "twelfth": "twelve"}


def doubled(word: str) -> str:
    """A word as it stands before -ed, -ing or -er: its last consonant twice after one short, stressed vowel."""
    one_syllable = re.fullmatch(r"(?:qu|[^aeiou])*[aeiou][^aeiouwxy]", word) is not None
    return word + word[-1] if one_syllable or word in STRESSED_AT_THE_END else word


def after_i(word: str, ending: str) -> str:
    """A word with an ending before which a y after a consonant becomes i, and a silent e falls."""
    if word[-1] == "y" and word[-2] not in VOWELS:
        return word[:-1] + "i" + ending
    return (word[:-1] if word[-1] == "e" else doubled(word)) + ending


def with_s(word: str) -> str:
    """The plural of a noun, or the third person of a verb, by rule."""
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def plural(noun: str) -> str:
    return IRREGULAR_PLURALS.get(noun) or with_s(noun)


def past(verb: str) -> str:
    return IRREGULAR_PASTS.get(verb) or (verb if verb in LIKE_THE_VERB else after_i(verb, "ed"))


def third_person(verb: str) -> str:
    return {"have": "has", "do": "does", "go": "goes"}.get(verb) or with_s(verb)


def gerund(verb: str) -> str:
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    return (verb[:-1] if re.search(r"[^eoy]e$", verb) else doubled(verb)) + "ing"


def comparative(adjective: str) -> str:
    return IRREGULAR_DEGREES[adjective][0] if adjective in IRREGULAR_DEGREES else after_i(adjective, "er")


def superlative(adjective: str) -> str:
    return IRREGULAR_DEGREES[adjective][1] if adjective in IRREGULAR_DEGREES else after_i(adjective, "est")


def adverb(adjective: str) -> str:
    if adjective in IRREGULAR_ADVERBS:
        return IRREGULAR_ADVERBS[adjective]
    for pattern, ending in ((r"(?<=[^aeiou])le$", "ly"), (r"y$", "ily"), (r"ic$", "ically"), (r"$", "ly")):
        if re.search(pattern, adjective):
            return re.sub(pattern, ending, adjective, count=1)
    raise AssertionError(adjective)


def number(text: str) -> int:
    """Reads a number in words, as one adds it up aloud; or in digits."""
    if text.isdigit():
        return int(text)
    total = part = 0
    for word in re.split(r"[ -]", text):
        if word not in SCALES:
            part += READ[word]
        elif word == "hundred":
            part *= 100
        else:
            total, part = total + part * SCALES[word], 0
    return total + part


def place(text: str) -> int | None:
    """Reads an ordinal, "twenty-first" or "21st"; None if it is no ordinal."""
    digits = re.fullmatch(r"(\d+)(st|nd|rd|th)", text)
    if digits:
        n, ending = int(digits[1]), digits[2]
        teens = n % 100 in (11, 12, 13)
        return n if ending == ("th" if teens or not 1 <= n % 10 <= 3 else ("st", "nd", "rd")[n % 10 - 1]) else None
    *before, last = text.split("-")
    if last not in FROM_ORDINAL and not last.endswith("th"):
        return None
    cardinal = FROM_ORDINAL.get(last) or re.sub(r"ie$", "y", last.removesuffix("th"))
    return number("-".join([*before, cardinal]))


def follows(query: str, answer: str) -> bool:
    """Whether the answer comes right after the query among letters, months, days, ordinals or numbers."""
    for circle in (list(calendar.month_name)[1:], list(calendar.day_name)):
        if query in circle:
            return answer == circle[(circle.index(query) + 1) % len(circle)]
    if query in string.ascii_uppercase:
        return answer in string.ascii_uppercase and ord(answer) == ord(query) + 1
    if query.split("-")[-1] in READ or query.isdigit():
        return query.isdigit() == answer.isdigit() and number(answer) == number(query) + 1
    before, after = place(query), place(answer)
    return query[0].isdigit() == answer[0].isdigit() and None not in (before, after) and after == before + 1


def says(query: str, answer: str) -> bool:
    """Whether the answer, if it is in words, is the number; no "and" is said, and tens and ones have a hyphen."""
    if not re.fullmatch(r"[a-z -]+", answer):
        return False
    in_form = re.fullmatch(r"[a-z]+(ty-[a-z]+)?( hundred)?( thousand| million)?", answer)
    return in_form is not None and number(answer) == int(query)


def continues(query: str, answer: str) -> bool:
    """Whether a query is its shortest period, two times, and the answer begins the third."""
    seen = query.split()
    period = next(n for n in range(1, len(seen) + 1) if seen == seen[:n] * (len(seen) // n))
    return period > 1 and len(seen) == 2 * period and answer == seen[0]


RULES: dict[str, Callable[[str, str], bool]] = {
    "icl_adverb": lambda query, answer: answer == adverb(query),
    "icl_comparative": lambda query, answer: answer == comparative(query),
    "icl_first_letter": lambda query, answer: answer == query[0] and query.isalpha() and query.islower(),
    "icl_gerund": lambda query, answer: answer == gerund(query),
    "icl_number_word": says,
    "icl_past_tense": lambda query, answer: answer == past(query),
    "icl_pattern": continues,
    "icl_plural": lambda query, answer: answer == plural(query),
    "icl_successor": follows,
}


def documents(task: str) -> list[tuple[str, str, list[str]]]:
    """Query, right option and wrong options of all documents of both splits."""
    found = []
    for split in ("train", "validation"):
        for line in (DATA / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            answer = document["choices"].pop(document["gold"])
            found.append((document["query"], answer, document["choices"]))
    return found


@pytest.mark.parametrize("task", RULES)
def test_the_right_option_is_right_by_rule_and_no_other_is(task: str) -> None:
    for query, answer, wrong in documents(task):
        assert RULES[task](query, answer), (query, answer)
        assert not any(RULES[task](query, option) for option in wrong), (query, wrong)


@pytest.mark.parametrize(("task", "mistakes"), [
    ("icl_adverb", "easy:easyly basic:basicly public:publically gentle:gentlely true:truely final:finaly shy:shily"),
    ("icl_comparative", "big:biger happy:happyer slow:slowwer cool:cooller good:gooder"),
    ("icl_first_letter", "bread:r bread:B"),
    ("icl_gerund", "tie:tieing see:seing run:runing open:openning make:makeing mix:mixxing"),
    ("icl_number_word", "21:thirty-one 21000:twenty-one-million 700:seven 99:ninety-nine-hundred"),
    ("icl_past_tense", "stop:stoped visit:visitted play:plaied prefer:prefered try:tryed go:goed"),
    ("icl_pattern", "a_b_a_b:b a_b_a:a a_a_a_a:a a_b_a_b_a_b:a"),
    ("icl_plural", "city:citys leaf:leafs day:daies box:boxs hero:heros"),
    ("icl_successor", "B:D December:February 1st:2th twenty-ninth:thirty first:two nine:10 9th:tenth"),
])
def test_the_rules_refuse_mistakes(task: str, mistakes: str) -> None:
    for query, answer in (pair.split(":") for pair in mistakes.split()):
        assert not RULES[task](query.replace("_", " "), answer), (query, answer)


def test_verbs_have_one_past() -> None:
    assert not {query for query, _, _ in documents("icl_past_tense")} & {*TWO_PASTS, *LIKE_THE_VERB}


@pytest.mark.parametrize(("task", "forms"), [
    ("icl_past_tense", (gerund, third_person)), ("icl_gerund", (past, third_person)),
    ("icl_comparative", (superlative,)), ("icl_plural", (lambda noun: f"{noun}'s",)),
])
def test_tempting_options_are_forms_of_the_query(task: str, forms: tuple[Callable[[str], str], ...]) -> None:
    for query, _, wrong in documents(task):
        assert {form(query) for form in forms} - {query} <= set(wrong), (query, wrong)


def test_enlarged_documents_stand_for_themselves() -> None:
    # Short queries are no passage: each counts as one document where intervals are computed.
    for name, task in get_tasks(list(RULES)).items():
        for shots in (0, 5):
            prompts = task.prompts("evaluation", FewShot(shots, shared=True))
            assert len(set(task.passages("evaluation", prompts).tolist())) == len(prompts) == 200, name
