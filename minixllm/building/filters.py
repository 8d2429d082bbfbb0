"""What is visibly wrong with a text that a service wrote: why a built record is left out."""

import math
import re
import unicodedata

from minixllm.data.records import Instruction
from minixllm.errors import UserError
from minixllm.evaluation import language_id
from minixllm.languages import LANGUAGES

CANNOT, UNABLE = "i can(?: ?not|['’]t)", "i(?: am|['’]m) (?:unable|not able)"
REFUSALS = re.compile(r"\W*(?:" + "|".join((
    r"as an ai(?: (?:language )?(?:model|assistant))?(?:\s*,| i\b)", "as a(?: large)? language model",
    rf"(?:(?:i['’]?m |i am )?sorry|i apologi[sz]e),? (?:but )?(?:{CANNOT}|{UNABLE}|as an ai\b)",
    rf"{CANNOT} (?:help (?:you|with)|assist|fulfil|provide)",
    rf"{UNABLE} to (?:access|answer|assist|browse|complete|comply|create|determine|discuss|engage|fulfil|generate|give|"
    "help|offer|open|perform|process|produce|provide|respond|see|translate|view|write)")) + ")", re.IGNORECASE)
# what a translation must keep as it is; addresses are ASCII, for some scripts go on behind them without a space; of a
# blank to fill in only the end, for its length may change
VERBATIM = re.compile(r"(?:https?://|www\.)(?a:[\w./?=&%#~:+@!$,;*-]*[\w/])|```.*?```|`[^`\n]+`|\{\{?\w*\}?\}|"
                      r"%[sd](?![A-Za-z])|</?[A-Za-z_][\w-]*>|_{3}(?!_)", re.DOTALL)
# not all that is no \w: the vowel signs of Indic scripts are not, either
PUNCTUATION = re.compile(r"[\s!-/:-@\[-`{-~\u00a1-\u00bf\u060c\u061b\u061f\u06d4\u0964\u0965"
                         r"\u2000-\u206f\u3000-\u303f]+")
NUMBER = re.compile(r"\d+(?:[.,'’\u00a0\u202f\u066b\u066c]\d+)*")
UNITS = {unit: 10**power for power, units in ((2, "百백"), (3, "千천"), (4, "万萬만"), (8, "亿億억")) for unit in units}
MYRIADS = re.compile(rf"(?:\d[\d,.]{{0,20}}\s?[{''.join(UNITS)}]{{1,3}}\s?)+(?:\d,?\d{{0,3}})?")
MYRIAD = re.compile(rf"(\d+(?:\.\d+)?)([{''.join(UNITS)}]*)")  # a part of it: figures and their units
# one word eight times, or one piece of up to twelve characters, with a letter in it, ten times
LOOP = re.compile(r"(?<!\S)(?=\S{0,39}[^\W\d_])(\S{1,40})(?:\s+\1){7}(?!\S)|([^\W\d_]\S{0,11}?)\2{9}")


def fault(record: Instruction, made: tuple[str, str, str], generated: bool) -> str | None:
    """Why a record in another language is no good, by its texts alone; None if nothing is to be seen."""
    instruction, input, output = made
    if not instruction.strip() or not output.strip() or record.input.strip() and not input.strip():
        return "empty"
    if REFUSALS.match(output) or REFUSALS.match(record.output) and not generated:
        return "refusal"
    translated = [(record.instruction, instruction), (record.input, input)]
    if not generated:
        translated.append((record.output, output))
    for source, target in translated:
        if copied(source, target):
            return "untranslated"
        if not set(VERBATIM.findall(source)) <= set(VERBATIM.findall(target)):
            return "lost placeholder, URL or code"
        if not kept_numbers(source, target):
            return "lost number"
        if len(source) >= 20 and not 0.15 <= len(target) / len(source) <= 5:
            return "length ratio"
    if any(LOOP.search(target) and not LOOP.search(source) for source, target in (*translated, ("", output))):
        return "loop"
    # exactly: it may have been asked for capitals or for commas
    if generated and len(words(output)) >= 5 and output.split() in (instruction.split(), input.split()):
        return "answer repeats the question"
    return None


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def copied(source: str, target: str) -> bool:
    """Whether English was not translated; names, whose words begin in capitals, rightly stay the same."""
    small = [word[0].islower() for word in words(VERBATIM.sub(" ", source))]
    return sum(small) >= 4 and normal(source) == normal(target)


def kept_numbers(source: str, target: str) -> bool:
    """Whether all numbers are there, but for what good translations write otherwise: centuries in Roman figures, the
    1980s as the 80s, 50,000 as 5万, 15,300 as 1万5300 and 2.4 million as 240万, where zeros at the end tell nothing."""
    source = re.sub(r"(?i)\b\d+(?:st|nd|rd|th)\b(?=[^.!?\n]{0,25}\bcentur)|\b19(?=[1-9]0['’]?s\b)", "", source)
    found, zeros = possible_numbers(target), "0" if MYRIADS.search(target) else ""
    found |= {number[2:] for number in found if re.fullmatch("19[1-9]0", number)}
    return {number.rstrip(zeros) for number in numbers(source)} <= {number.rstrip(zeros) for number in found}


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


def normal(text: str) -> str:
    """The text for comparisons: case, width, punctuation and white space aside."""
    return PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def spaced(text: str) -> str:
    """The text for comparisons where signs count, as in 2 + 3 and 2 - 3: only width and white space aside."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def identifier():
    """(text, code) -> "wrong language" or None; about languages that are not identified, only whether the text is
    English. Raises UserError where no identifier is installed."""
    if (found := language_id.identifier()) is None:
        raise UserError("to know in what language answers are takes the package py3langid: pip install 'minixllm[lid]'")

    def wrong_language(text: str, code: str) -> str | None:
        text = VERBATIM.sub(" ", text)  # code is in no language
        if sum(map(len, words(text))) < (10 if LANGUAGES[code].script in ("Hans", "Jpan", "Kore") else 25):
            return None  # too short to tell
        right = found.is_in(text, code) if code in found.known else not found.is_in(text, "eng")
        return None if right else "wrong language"

    return wrong_language
