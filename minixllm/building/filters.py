"""What is visibly wrong with a text that a service wrote: why a record that was built is left out.

There are few rules. Each reads a text alone or beside its English original, and none asks a model. What they refuse of
good translations and what they let through of planted faults is measured by `python -m bench.filters`.
"""

import math
import re
import unicodedata

from minixllm import languages
from minixllm.building.refusals import refuses
from minixllm.data.records import Instruction
from minixllm.errors import UserError
from minixllm.evaluation import language_id
from minixllm.languages import LANGUAGES

WORD = re.compile(r"[^\W\d_]+")
words = WORD.findall
# What a translation must keep as it is. Addresses are ASCII, for some scripts go on behind them without a space. Of a
# blank to fill in only the end, for its length may change.
VERBATIM = re.compile(r"(?:https?://|www\.)(?a:[\w./?=&%#~:+@!$,;*-]*[\w/])|```.*?```|`[^`\n]+`|\{\{?\w*\}?\}|"
                      r"%[sd](?![A-Za-z])|</?[A-Za-z_][\w-]*>|_{3}(?!_)", re.DOTALL)
# Characters of a good translation for one of English, measured on NTREX, where it is not about 1.07.
LENGTHS = {"zho_simpl": 0.36, "jpn": 0.42, "kor": 0.53, "amh": 0.7, "heb": 0.8, "snd": 0.85, "mal": 1.25, "mya": 1.3,
           "yor": 1.3}
NUMBERS_IN_WORDS = {"yor"}  # good translations into it write a third of all numbers as words
# Numbers that a good translation may tell otherwise: the 20th century (siglo XX), the 1980s (the 80s), a 20-year-old
# and 100 per cent (in words), times of day (5.30 pm, 17:30) and measures of the United States (85 mph, 137 km/h).
RETOLD = re.compile(
    r"\b\d+(?:st|nd|rd|th)\b(?=[^.!?\n]{0,25}\bcentur)|\b19(?=[1-9]0['’]?s\b)|"
    r"\b\d+(?=-year-old)|\b100(?= ?(?:%|per ?cent))|"
    r"\b\d{1,2}(?:[:.]\d\d)?\s?[ap]\.?m\b|\b\d{1,2}:\d\d\b|"
    r"\d[\d,.]*(?:[\s-]to[\s-]\d[\d,.]*)?[\s-]?"
    r"(?:miles?|mph|feet|foot|ft|inch(?:es)?|yards?|pounds?|lbs?|ounces?|gallons?|acres?|degrees?|°\s?F|fahrenheit)\b",
    re.IGNORECASE)
NUMBER = re.compile(r"\d+(?:[.,'’\u00a0\u202f\u066b\u066c]\d+)*")
UNITS = {unit: 10**power for power, units in ((2, "百백"), (3, "千천"), (4, "万萬만"), (8, "亿億억")) for unit in units}
MYRIADS = re.compile(rf"(?:\d[\d,.]{{0,20}}\s?[{''.join(UNITS)}]{{1,3}}\s?)+(?:\d,?\d{{0,3}})?")
MYRIAD = re.compile(rf"(\d+(?:\.\d+)?)([{''.join(UNITS)}]*)")  # a part of it: figures and their units
# Small words that make up a third of an English text, and far less of one in another language.
ENGLISH = frozenset(
    """the of and to that with which were this from have has their would not are who been they its it by but than his
    her she you your can could should will what when where there these those into about because after before more most
    other some such an is was be for on at as or if how also while we our he had do does did""".split())


def fault(record: Instruction, made: tuple[str, str, str], generated: bool, code: str) -> str | None:
    """Why a record is left out; None if no fault is seen.

    record: the English original. made: instruction, input and output in the language `code`. generated: the output was
    not translated but written in that language.
    """
    instruction, input, output = made
    if not instruction.strip() or not output.strip() or record.input.strip() and not input.strip():
        return "empty"
    if refuses(output, code) or not generated and refuses(record.output, "eng"):
        return "refusal"
    for source, target in zip((record.instruction, record.input, "" if generated else record.output), made):
        if reason := mistranslated(source, target, code) if source else None:
            return reason
        if repeats(target) and not repeats(source):
            return "loop"
    if generated and copied(record.output, output):
        return "untranslated"
    if generated and echoes(output, instruction, input, code):
        return "answer repeats the question"
    return wrong_language(output, code) or wrong_language(instruction, code)


def unfit(answer: str, code: str) -> str | None:
    """Why an answer is no good, whatever was asked; None if no fault is seen."""
    if refuses(answer, code):
        return "refusal"
    return "loop" if repeats(answer) else wrong_language(answer, code)


def repeats(text: str) -> bool:
    """Whether a sequence of words comes more than five times in a row, or one word eight times.

    Letters take the place of words in Chinese and Japanese and in what is longer than 20: a script without spaces, or a
    model that stutters.
    """
    tokens = [token for word in words(text.casefold())
              for token in (word if len(word) > 20 or word[0] >= "\u3040" else [word])]
    threes = list(zip(tokens, tokens[1:], tokens[2:]))
    if len(threes) - len(set(threes)) < 5:
        return False
    last, period, length = {}, 0, 0  # where three words stood last; how long each has been the one `period` before
    for i, three in enumerate(threes):
        if period and tokens[i] == tokens[i - period]:
            length += 1
        else:
            period, length = i - last.get(three, i), 0
        last[three] = i
        if period and length + period + 3 >= max(8, 5 * period + 1):
            return True
    return False


def echoes(output: str, instruction: str, input: str, code: str) -> bool:
    """Whether the answer is the question again. Capitals and commas count: they may be what was asked for."""
    given, asked, data = ("".join(text.split()) for text in (output, instruction, input))
    same = given in (data, asked + data) or re.sub(r"^\W+|\W+$", "", given) == re.sub(r"^\W+|\W+$", "", asked)
    return same and size(output, code) >= 15


def mistranslated(source: str, target: str, code: str) -> str | None:
    """What a translation into the language `code` lost of its English source, or did not translate."""
    if copied(source, target):
        return "untranslated"
    if not set(VERBATIM.findall(source)) <= set(VERBATIM.findall(target)):
        return "lost placeholder, URL or code"
    if code not in NUMBERS_IN_WORDS and not kept_numbers(source, target):
        return "lost number"
    usual = LENGTHS.get(code, 1.07)  # names and code stay as long as they are in English: the upper limit leaves room
    if len(source) >= 20 and not usual / 2 <= len(target) / len(source) <= 2.5 * max(usual, 1):
        return "length ratio"
    return None


def copied(source: str, target: str) -> bool:
    """Whether a quarter of the target or more is English that was not translated.

    That are words that follow each other as in the source. Names rightly stay the same.
    """
    if len(set(words(source)).intersection(words(target))) < 4:
        return False
    source, target = (words(VERBATIM.sub(" ", text)) for text in (source, target))
    follow, run, english = set(zip(source, source[1:])), [], 0
    for before, word in zip(target, [*target[1:], ""]):
        run.append(before)
        if (before, word) not in follow:
            if len(run) > 1 and running(run):
                english += sum(map(len, run))
            run = []
    return english > 0 and 4 * english >= sum(map(len, target))


def running(words: list[str]) -> bool:
    """Whether English words are running text, with four in small letters, and not a name or a title."""
    return sum(word[0].islower() for word in words) >= 4


def kept_numbers(source: str, target: str) -> bool:
    """Whether all numbers are there, in any digits, with any separators, thousands perhaps as a word (25 tys.).

    In Chinese, Japanese and Korean 50,000 is 5万, 15,300 1万5300 and 2.4 million 240万: there zeros at the end do not
    count.
    """
    found, zeros = possible_numbers(target), "0+$" if MYRIADS.search(target) else "(000)+$"
    found |= {number[2:] for number in found if re.fullmatch("19[1-9]0", number)}
    wanted = numbers(RETOLD.sub(" ", source))
    return {re.sub(zeros, "", number) for number in wanted} <= {re.sub(zeros, "", number) for number in found}


def numbers(text: str) -> set[str]:
    """The numbers of two or more digits, in ASCII digits and without separators: these differ between languages, and
    small numbers are written as words."""
    return {number for number in map(digits, NUMBER.findall(text)) if len(number) >= 2}


def possible_numbers(text: str) -> set[str]:
    """All that may be meant: what one language writes 1,000 is 1 000 or 1.000 in others, or two numbers."""
    runs = (re.findall(r"\d+", run) for run in re.findall(r"\d+(?:\W{1,2}\d+)*", text))
    found = {digits("".join(run[i:i + count])) for run in runs for i in range(len(run)) for count in range(1, 6)}
    for number in MYRIADS.findall(text):  # 1万5300 is 15300, 2억 5천만 250000000
        parts = MYRIAD.findall(re.sub(r"[\s,]", "", number))
        found.add(str(round(sum(float(figures) * math.prod(map(UNITS.get, units)) for figures, units in parts))))
    return found


def digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(c, "")) for c in text).lstrip("0")


def identifier() -> language_id.Identifier:
    """What tells languages apart. Raises UserError where none is installed."""
    if (found := language_id.identifier()) is None:
        raise UserError("to know in what language answers are takes the package py3langid: pip install 'minixllm[lid]'")
    return found


def wrong_language(text: str, code: str) -> str | None:
    """Whether a text in the language `code` is in another one, or in part in English; None for what is too short."""
    text, found = VERBATIM.sub(" ", text), identifier()  # code is in no language
    if size(text, code) < 25:
        return None
    if code in found.known:
        right = found.is_in(text, code)
    else:  # it is taken for some other language, but hardly for English or for one of another script
        taken = languages.find(found.classify(text) or code)
        right = taken.code != "eng" and taken.script == LANGUAGES[code].script
    if not right:
        return "wrong language"
    part = english_part(text, code)
    return "partly English" if part and code != "eng" and found.is_in(part, "eng") else None


def english_part(text: str, code: str) -> str | None:
    """The most English stretch of a text, where that is running text and a tenth of the whole or more.

    Each small word of English counts 1 there, in a language of another script each word in small Latin letters, and
    every other word -0.15; the stretch is the one with the largest sum (Kadane's algorithm).
    """
    latin = languages.find(code).script == "Latn"
    if latin and len(ENGLISH.intersection(words(text.lower()))) < 2:
        return None
    best, total, part = 0.0, 0.0, ""
    for word in WORD.finditer(text):
        if not total:
            start = word.start()
        english = word[0].lower() in ENGLISH or not latin and word[0].isascii() and word[0].islower()
        total = max(total + (1 if english else -0.15), 0.0)
        if total > best:
            best, part = total, text[start:word.end()]
    return part if best >= 1.4 and running(words(part)) and 10 * size(part) >= size(text) else None


def size(text: str, code: str = "eng") -> float:
    """Letters; one of Chinese, Japanese or Korean says as much as 2.5 of an alphabet."""
    return sum(map(len, words(text))) * (2.5 if code in ("zho_simpl", "jpn", "kor") else 1)


def spaced(text: str) -> str:
    """The text for comparisons where signs count, as in 2 + 3 and 2 - 3: only width and white space aside."""
    return " ".join(unicodedata.normalize("NFKC", text).split())
