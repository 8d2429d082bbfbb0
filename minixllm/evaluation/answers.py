"""What a free answer says: the rules that read a choice from raw text, or None where it cannot be told.

The paper generates answers freely and parses them, by rules that it does not give. Ours stand in the README's table
"How free answers are read", their words for each language in answers.toml. First every mention of a candidate (a
letter, an option's text, a word for yes or no) is replaced by one of two marks. Then the clauses vote: each one picks
a mark, rejects it or says nothing. To misread an answer is worse than not to read it.
"""

import collections
import functools
import re
import tomllib
import unicodedata
from pathlib import Path

LONGEST = 2000  # characters of an answer that are read; a model in a loop would go on for ever
WORDS = tomllib.loads(Path(__file__).with_name("answers.toml").read_text(encoding="utf-8"))
FIRST, SECOND = MARKS = "\ue000\ue001"                # stand for option A or yes, and for option B or no
ONE = f"[{MARKS}]"
GAP = r"[\s!-/:-@\[-`{-~¡-¿‐-⁏。「」『』、।]*"            # punctuation and white space
# Scripts that are written without spaces: a word in them may touch another letter.
UNSPACED = "\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
BEFORE, AFTER = rf"(?<![^\W_{UNSPACED}])", rf"(?![^\W_{UNSPACED}])"
REASONING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL)
TURN = re.compile(r"(?:^|\n)### (?:Instruction|Input|Response):")
MARKUP = re.compile(r"\\[a-z]+(?=\{)|\\[()\[\]]|[${}`*#_]|^\s*>", re.MULTILINE)
TAG = re.compile(r"</?[\w|][^<>\n]{0,20}>")
SENTENCE = re.compile(r"([^.!?。।;\n]*)([.!?。।;\n]|$)")
# These words for yes and no also begin other sentences ("no difference", si = if, 네 = four): they count where they
# end a clause, or where a reason follows.
ORDINARY = {"no", "non", "si", "네", "예", "是", "否", "对", "不", "不对", "うん"}
COPULA = "(?:입니다|이에요|예요|です)"
ENDED = (rf"(?=[ \t]*(?:(?!-\w|\.[ \t]*\d)(?:[^\w\s]|_)|(?m:$)|{COPULA}|"
         r"(?:because|since|porque|ya que|parce|puisque|car)\b))")


def parse(item, raw: str, prompt: str) -> str | None:
    """What a raw answer says: the text without echoes, or the choice it picks (None: cannot tell).

    item: the benchmarks.Item that was asked. prompt: as it was asked, for models that repeat it.
    """
    answer = clean(raw, prompt)
    if not item.choices:
        return answer
    choice = yes_no(answer, item.words, item.language) if item.words else option(answer, item.choices, item.language)
    return None if choice is None else item.choices[choice]


def clean(raw: str, prompt: str = "") -> str:
    """The answer without a repeated prompt and without the further turns that a model may write after it."""
    if prompt and prompt in raw:
        raw = raw[raw.rindex(prompt) + len(prompt):]
    return TURN.split(raw.strip().removeprefix("### Response:").lstrip())[0].strip()


def yes_no(answer: str, words: tuple[tuple[str, ...], tuple[str, ...]], code: str = "eng") -> int | None:
    """0 for an answer that says yes, 1 for no (the place of the choice), None for what cannot be told.

    answer: as `clean` gives it. words: what is understood as yes, and as no. code: the language of the question.
    """
    text = _fold(_plain(answer))
    said = _patterns(text, (code, "eng"))
    mark_of = {_fold(word): MARKS[choice] for choice in (1, 0) for word in words[choice]}
    longest_first = sorted(mark_of, key=len, reverse=True)            # 不是 is no, though it ends in 是
    yes, no = ("|".join(re.escape(word) + "(?![a-zà-ɏ])" for word in longest_first if mark_of[word] == mark)
               for mark in MARKS)
    word = "|".join(re.escape(word) + (ENDED if word in ORDINARY else f"(?:{AFTER}|(?={COPULA}))")
                    for word in longest_first)
    text = re.sub(said("denied").pattern.replace("YES", f"(?:{yes})"), f" {SECOND} ", text)
    # "答案是是": the copula of the answer, then the word for yes
    text = re.sub("(答案|回答|答え|結論|정답|대답|답변|답)(?:应该|应当)?(?:是|为|は|은|는)", r"\1: ", text)
    between = rf"['\"”»」]*\s*(?:/|{said('or').pattern})\s*['\"“«「]*"
    text = re.sub(f"(?:{yes}){between}(?:{no})|(?:{no}){between}(?:{yes})", " ", text)
    # an answer may open with a word and go on without a comma: "No it does not", "Yes and the names agree"
    goes_on, joins = (rf"(?=\s+{said(role).pattern})" for role in ("goes_on", "or"))
    text = re.sub(rf"^[\s\W]*(?!{said('unsure').pattern})({word}|non?{goes_on})({goes_on}|{joins})?", lambda found: (
        mark_of.get(found[1], SECOND) + (" " if found[2] is None else f". {found[1]}")), text)
    text = re.sub(rf"(?<!\w)({word})(?:(?!\w)|(?={COPULA}))", lambda found: f" {mark_of[found[1]]} ", text)
    return _vote(text, said, yes_or_no=True)


def option(answer: str, choices: tuple[str, str], code: str = "eng") -> int | None:
    """0 for an answer that picks option A, 1 for B, None for what cannot be told.

    answer: as `clean` gives it. choices: the options' texts. code: the language of the question.
    """
    text = _plain(answer)
    said = _patterns(_fold(text), (code, "eng", *WORDS))
    text, *choices = (_fold(_mark_letters(part, said)) for part in (text, *map(_plain, choices)))
    parts = [[f"[a{FIRST}]" if word in ("a", FIRST) else re.escape(word)
              for word in re.split(f"{GAP[:-1]}+", choice) if word] for choice in choices]
    first, second = (f"(?:{GAP.join(words)}){AFTER}" if words else "(?!)" for words in parts)
    between = f"{GAP}(?:{said('answer').pattern}{GAP})?(?:{SECOND}{GAP})?"
    text = re.sub(f"(?:{FIRST}{GAP})?{first}{between}{second}", " . ", text)       # both options, repeated

    # the longer text first, for "He ran" stands in "He ran away"
    texts = "|".join(sorted((f"(?P<first>{first})", f"(?P<second>{second})"), key=len, reverse=True))
    mention = re.compile(f"(?:(?P<letter>{ONE}){GAP})?(?:{texts})")
    if any(found["letter"] == (SECOND if found["first"] else FIRST) for found in mention.finditer(text)):
        return None                                    # "A: The cat slept.", which is B's text
    return _vote(mention.sub(lambda found: FIRST if found["first"] else SECOND, text), said)


def _vote(text: str, said, yes_or_no: bool = False) -> int | None:
    """Which of the two marks the clauses of a text pick: 0, 1, or None where they pick none or both."""
    votes = collections.defaultdict(set)               # {what a clause says: of which marks}
    text = said("joined").sub(" ", said("idiom").sub(" ", re.sub(r":\s+", ": ", text)))
    for sentence, end in SENTENCE.findall(text):
        if end == "?":                                 # a question says nothing; "Yes? No." not even afterwards
            votes["alone"] |= set(MARKS) if yes_or_no and re.search(ONE, sentence) else set()
        elif not re.match(rf"[^\w{MARKS}]*{said('unsure').pattern}", sentence):
            for clause in re.split(rf"[,、…]|\s[-–—]+\s|{said('split').pattern}", sentence):
                what, marks = _clause(clause, said, yes_or_no)
                if what != "stated" or not said("unsure").search(sentence):
                    votes[what] |= marks
    picked = votes["alone"] | (votes["final"] or votes["strong"]) or votes["weak"] or votes["stated"]
    if len(picked) != 1 or not yes_or_no and picked <= votes["rejected"] or votes["stated"] - picked:
        return None
    return MARKS.index(picked.pop())


def _clause(clause: str, said, yes_or_no: bool) -> tuple[str, set[str]]:
    """What a clause says, and of which marks.

    "alone": a mark and nothing else. "final", "strong": a mark beside "the answer is", "more plausible" and the like.
    "weak": a mark beside other words. "stated": a sentence paraphrases the other. "rejected" and "nothing" pick none.
    """
    less, better, unsure = (said(role).search(clause) for role in ("less", "better", "unsure"))
    clause = said("than").sub(" ", clause)
    if len(set(re.findall(ONE, clause))) == 2:         # "B, not A"
        clause = said("not_one").sub(" ", clause)
    clause = said("less").sub(" ", clause)
    found, negations = set(re.findall(ONE, clause)), len(said("not").findall(clause))
    rejects = negations or said("poor").search(clause)
    if len(found) == 2 or unsure:
        return "nothing", found
    if not found:
        stated = yes_or_no and negations < 2 and said("same").search(clause)
        return ("stated", {MARKS[negations]}) if stated else ("nothing", found)
    if less and not yes_or_no:                         # the less plausible of two: the other
        return "nothing" if rejects else "strong", set(MARKS) - found
    if rejects:
        return "rejected", found
    if not re.search(r"\w", clause) or re.match(rf"\W*{ONE}['\"]?[:)\]]", clause):
        return "alone", found
    if said("answer").search(clause) or better or yes_or_no:
        return "final" if said("final").search(clause) else "strong", found
    return "weak", found


def _mark_letters(text: str, said) -> str:
    """Marks in place of the capitals A and B where they stand for an option; "A man" has an article."""
    text = re.sub(rf"{BEFORE}B(?!\.?[A-Z]|-?[a-z0-9]){AFTER}", SECOND, text)
    letter = rf"{BEFORE}A(?!\.?[B-Z]|-?[a-z0-9]){AFTER}"
    text = re.sub(rf"((?i:{said('answer').pattern}){GAP}){letter}", rf"\g<1>{FIRST}", text)
    return re.sub(rf"{letter}(?! (?!{said('after').pattern})[a-z])", FIRST, text)


def _plain(text: str) -> str:
    """The text without reasoning, markup and the characters that serve as marks."""
    text = REASONING.sub(" ", text[:LONGEST]).replace("’", "'")
    return MARKUP.sub(" ", TAG.sub("\n", re.sub(ONE, "", unicodedata.normalize("NFKC", text))))


def _fold(text: str) -> str:
    """The text in small letters, Turkish dotted and dotless i as one."""
    return text.casefold().replace("ı", "i").replace("\u0307", "")


def _patterns(text: str, codes):
    """role -> pattern (see `_pattern`), in the one of these languages of which the text has most words."""
    codes = dict.fromkeys(code for code in codes if code in WORDS)
    code = max(codes, key=lambda code: len(set(_pattern(code, "after").findall(text[:500]))))
    return functools.partial(_pattern, code)


@functools.cache
def _pattern(code: str, role: str) -> re.Pattern:
    """The pattern of a list of answers.toml in one language, or one that is made of several lists."""
    lists = WORDS[code]
    than, after, no, either, answer = (_any(lists.get(name, "")) for name in "than than_after not or answer".split())
    behind = rf"['\-\s]*{after}"
    either = rf"[,、]?\s*{either}\s*(?:{either}\s*)?(?:{answer}\s*)?"
    made = {"than": rf"{than}'?{GAP}(?:the\s+)?(?:{answer}{GAP})?{ONE}|{ONE}{behind}",
            "not_one": f"{ONE}{GAP}{no}" if "than_after" in lists else rf"{no}{GAP}(?:[^\s{MARKS}]+\s+)?{GAP}{ONE}",
            "joined": rf"{ONE}[\s\"'()\[\]-]*(?:[/,&、]+|{either})[\s\"'(\[-]*{ONE}(?!{behind})",
            "final": _any(lists["answer"].split(", ")[0]),
            "after": _any(", ".join(lists[name] for name in lists if name not in ("same", "denied", "goes_on"))),
            "same": lists.get("same", "(?!)"), "denied": lists.get("denied", "(?!)")}
    return re.compile(made.get(role) or _any(lists.get(role, "")))


def _any(words: str) -> str:
    """The pattern of any of these words, parted by commas; whole, where their script parts words by spaces."""
    groups = collections.defaultdict(list)
    for word in sorted(filter(None, _fold(unicodedata.normalize("NFKC", words)).split(", ")), key=len, reverse=True):
        spaced = not re.search(f"[{UNSPACED}]", word)
        bounds = BEFORE if spaced and word[0] != "*" else "", AFTER if spaced and word[-1] != "*" else ""
        groups[bounds].append(re.escape(word).replace(r"\ \*", r"\ \w+").replace(r"\*", r"[^\W_]*"))
    patterns = [f"{before}(?:{'|'.join(group)}){after}" for (before, after), group in groups.items()]
    return f"(?:{'|'.join(patterns)})" if patterns else "(?!)"
