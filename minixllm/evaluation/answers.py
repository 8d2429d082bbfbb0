"""What a free answer says: the rules by which raw text becomes a choice, or "cannot tell" (None).

The paper generates answers freely and parses them, by rules that it does not give. Ours stand in the README's table
"How free answers are read"; the words that they know in each language stand in answers.toml. They work on clauses:
every mention of a candidate (a letter, an option's text, a word for yes or no) is replaced by one of two marks, then
each clause with one mark picks it, rejects it or says nothing. A misreading is worse than an answer that is not read.
"""

import difflib
import functools
import re
import tomllib
import unicodedata
from pathlib import Path

LONGEST = 2000  # characters of an answer that are read: what a model in a loop goes on to say would take long
WORDS = tomllib.loads(Path(__file__).with_name("answers.toml").read_text(encoding="utf-8"))
FIRST, SECOND = MARKS = "\ue000\ue001"                # stand for option A or yes, and for option B or no
ONE = f"[{MARKS}]"
GAP = r"[\s!-/:-@\[-`{-~¡-¿‐-⁏。「」『』、।]*"            # punctuation and white space
# scripts written without spaces: a word of theirs may touch another letter
UNSPACED = "\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
BEFORE, AFTER = rf"(?<![^\W_{UNSPACED}])", rf"(?![^\W_{UNSPACED}])"
REASONING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL)
TURN = re.compile(r"(?:^|\n)### (?:Instruction|Input|Response):")
MARKUP = re.compile(r"\\[a-z]+(?=\{)|\\[()\[\]]|[${}`*#_]|^\s*>", re.MULTILINE)
TAG = re.compile(r"</?[\w|][^<>\n]{0,20}>")
SENTENCE = re.compile(r"([^.!?。।;\n]*)([.!?。।;\n]|$)")
# words for yes and no that also begin or fill other sentences ("no difference", "si" = if, "네" = four)
ORDINARY = {"no", "non", "si", "네", "예", "是", "否", "对", "不", "不对", "うん"}
COPULA = "(?:입니다|이에요|예요|です)"
ENDED = (rf"(?=[ \t]*(?:(?!-\w|\.[ \t]*\d)(?:[^\w\s]|_)|(?m:$)|{COPULA}|"
         r"(?:because|since|porque|ya que|parce|puisque|car)\b))")


def parse(item, raw: str, prompt: str) -> str | None:
    """What a raw answer says: the text without echoes, or the choice it picks (None: cannot tell).

    item: the benchmarks.Item that was asked; prompt: as it was asked, for models that repeat it.
    """
    answer = clean(raw, prompt)
    if not item.choices:
        return answer
    choice = (yes_no(answer, item.words, item.language) if item.words else option(answer, item.choices, item.language))
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
    text = _plain(answer)
    said = _spoken(text, code)
    meaning = {_fold(word): MARKS[choice] for choice in (1, 0) for word in words[choice]}
    longest_first = sorted(meaning, key=len, reverse=True)            # 不是 is no, though it ends in 是
    whole = [re.escape(word) + (ENDED if word in ORDINARY else "" if re.search(f"[{UNSPACED}]", word) else AFTER)
             for word in longest_first]
    yes, no = ("|".join(re.escape(word) + ("" if re.search(f"[{UNSPACED}가-힣]", word) else AFTER)
                        for word in longest_first if meaning[word] == mark) for mark in MARKS)
    if "denied" in said.lists:
        text = re.sub(said.lists["denied"].replace("YES", f"(?:{yes})"), f" {SECOND} ", text)
    # "答案是是": the copula of the answer, and its word for yes
    text = re.sub("(答案|回答|答え|結論|정답|대답|답변|답)(?:应该|应当)?(?:是|为|は|은|는)", r"\1: ", text)
    either = rf"['\"”»」]*\s*(?:/|{said['or'].pattern})\s*['\"“«「]*"
    text = re.sub(f"(?:{yes}){either}(?:{no})|(?:{no}){either}(?:{yes})|是否|是不是", " ", text)
    goes_on = f"|non?(?=\\s+{said['goes_on'].pattern})" if "goes_on" in said.lists else ""
    opening = rf"^[\s\W]*(?!{said['unsure'].pattern})({'|'.join(whole)}{goes_on})"
    text = re.sub(opening, lambda found: f" {meaning.get(found[1], SECOND)} ", text)
    text = re.sub(rf"(?<!\w)({'|'.join(whole)})(?:(?!\w)|(?={COPULA}))", lambda found: f" {meaning[found[1]]} ", text)
    text = re.sub(rf"^(\W*{ONE})(?=\s+{said['or'].pattern})", r"\1, ", text)          # "Yes and ...": two clauses
    return _vote(text, said, yes_or_no=True)


def option(answer: str, choices: tuple[str, str], code: str = "eng") -> int | None:
    """0 for an answer that picks option A, 1 for B, None for what cannot be told.

    answer: as `clean` gives it; choices: the options' texts; code: the language of the question.
    """
    text = _plain(answer, fold=False)
    said = _spoken(_fold(text), code, more=WORDS)
    text, *choices = (_fold(_mark_letters(part, said)) for part in (text, *(_plain(c, fold=False) for c in choices)))
    parts = [[re.escape(word).replace(FIRST, f"[{FIRST}a]") for word in re.split(f"{GAP[:-1]}+", choice) if word]
             for choice in choices]
    first, second = (f"(?:{GAP.join(words)}){AFTER}" if words else "(?!)" for words in parts)
    between = f"{GAP}(?:{said['answer'].pattern}{GAP})?(?:{SECOND}{GAP})?"
    text = re.sub(f"(?:{FIRST}{GAP})?{first}{between}{second}", " . ", text)   # both options, repeated
    texts = [f"(?P<t{i}>{pattern})" for i, pattern in enumerate((first, second))]
    texts.sort(key=lambda pattern: -len(pattern))                     # "He ran" in "He ran away"
    clash = False

    def mark(found):
        nonlocal clash
        meant = FIRST if found["t0"] else SECOND
        if (letter := found["letter"]) and letter != meant:
            clash |= bool(re.match(r"[\"')\]]*\s*(?:$|[.!?,;:\n。])", found.string[found.end():]))
            return f"{letter}, {meant}"
        return meant

    text = re.sub(f"(?:(?P<letter>{ONE}){GAP})?(?:{'|'.join(texts)})", mark, text)
    if clash:                                          # "A: The cat slept.", which is B's text
        return None
    return _vote(text, said) if re.search(ONE, text) else _nearest(text, choices, said)


def _nearest(text: str, choices: list[str], said: "_Patterns") -> int | None:
    """The option that the whole answer repeats but for a few letters, if the other one is far from it."""
    if len(text) > 300 or any(bool(said["not"].search(text)) != bool(said["not"].search(c)) for c in choices):
        return None
    near = [difflib.SequenceMatcher(None, text.strip(" .!。"), choice.strip(" .!。")).ratio() for choice in choices]
    return int(near[1] > near[0]) if max(near) >= 0.8 and max(near) - min(near) >= 0.3 else None


def _vote(text: str, said: "_Patterns", yes_or_no: bool = False) -> int | None:
    """Which of two candidates the clauses of a text with marks pick: 0, 1 or None."""
    final, alone, strong, weak, against, stated = (set() for _ in range(6))
    text = said["joined"].sub(" ", said["idiom"].sub(" ", re.sub(r":\s+", ": ", text)))
    for sentence, end in SENTENCE.findall(text):
        if said["doubt"].match(sentence):
            continue
        if end == "?":                                 # a question says nothing; "Yes? No." not even afterwards
            alone |= set(MARKS) if yes_or_no and re.search(ONE, sentence) else set()
            continue
        for clause in re.split(rf"[,、…]|\s[-–—]+\s|{said['split'].pattern}", sentence):
            less, better = said["less"].search(clause), said["better"].search(clause)
            clause = said["than"].sub(" ", clause)
            if len(set(re.findall(ONE, clause))) == 2:
                against |= set(re.findall(ONE, " ".join(m[0] for m in said["not_one"].finditer(clause))))
                clause = said["not_one"].sub(" ", clause)
            found, rest = set(re.findall(ONE, clause)), said["less"].sub(" ", clause)
            refused, poor = len(said["not"].findall(rest)), bool(said["poor"].search(rest))
            if said["unsure"].search(said["better"].sub(" ", clause)) or len(found) > 1:
                continue
            if not found:
                if yes_or_no and "same" in said.lists and not said["unsure"].search(sentence) and refused < 2 and (
                        re.search(said.lists["same"], clause)):
                    stated.add(MARKS[refused])
            elif less and not yes_or_no:               # the less plausible of two: the other
                strong |= set(MARKS) - found if not (refused or poor) else set()
            elif yes_or_no and refused and SECOND in found and re.match(rf"\W*{ONE}", clause):
                strong |= found                        # "No it does not"
            elif refused or poor:
                against |= found if bool(refused) != poor and ":" not in clause else set()
            elif not re.search(r"\w", clause) or re.match(rf"\W*{ONE}['\"]?[:)\]]", clause):
                alone |= found
            elif said["answer"].search(clause) or better or yes_or_no and re.match(rf"\W*{ONE}", text):
                (final if said["final"].search(clause) else strong).update(found)
            else:
                weak |= found
    picked = final | alone if final else alone | strong or weak or stated
    if len(picked) != 1 or not yes_or_no and picked <= against or stated - picked:
        return None
    return MARKS.index(picked.pop())


def _mark_letters(text: str, said: "_Patterns") -> str:
    """Marks in place of the capitals A and B where they stand for an option; "A man" has an article."""
    text = re.sub(rf"{BEFORE}B(?!\.?[A-Z]|-?[a-z0-9]){AFTER}", SECOND, text)

    def letter(found):
        follows = re.match(r" ([a-z]+)", found.string[found.end():])
        before = _fold(found.string[max(found.start() - 20, 0):found.start()])
        known = not follows or said["after"].match(found.string, found.end() + 1)
        return FIRST if known or re.search(f"{said['answer'].pattern}{GAP}$", before) else "A"

    return re.sub(rf"{BEFORE}A(?!\.?[B-Z]|-?[a-z0-9]){AFTER}", letter, text)


def _plain(text: str, fold: bool = True) -> str:
    text = REASONING.sub(" ", text[:LONGEST]).replace("’", "'")
    text = MARKUP.sub(" ", TAG.sub("\n", "".join(c for c in unicodedata.normalize("NFKC", text) if c not in MARKS)))
    return _fold(text) if fold else text


def _fold(text: str) -> str:
    """Case aside, Turkish dotted and dotless i as well."""
    return text.casefold().replace("ı", "i").replace("\u0307", "")


def _spoken(text: str, code: str, more=()) -> "_Patterns":
    """The patterns of the language of which an answer has most words: the question's, English or one of `more`."""
    text = " " + re.sub(GAP[:-1] + "+", " ", text) + " "
    said = map(_patterns, dict.fromkeys(filter(WORDS.get, (code, "eng", *more))))
    return max(said, key=lambda said: sum(word in text for word in said.plain))


_patterns = functools.cache(lambda code: _Patterns(WORDS[code]))


class _Patterns(dict):
    """{list of answers.toml: its pattern}, and patterns made of several lists, each compiled when it is asked for."""

    def __init__(self, lists: dict):
        super().__init__()
        self.lists = lists
        words = {role: text for role, text in lists.items() if role not in ("same", "denied", "goes_on")}
        self.lists = lists | {"after": ", ".join(words.values()), "final": lists["answer"].split(", ")[0]}
        plain = {word for text in words.values() for word in _fold(unicodedata.normalize("NFKC", text)).split(", ")}
        self.plain = [word if re.search(f"[{UNSPACED}]", word) else f" {word.rstrip('*')}" + " " * (word[-1] != "*")
                      for word in plain if "*" not in word[:-1]]

    def __missing__(self, role: str) -> re.Pattern:
        any_of = {name: _any(self.lists.get(name, ""))
                  for name in (role, "than", "than_after", "not", "or", "answer", "unsure")}
        before = r"['\-\s]*" + any_of["than_after"]
        behind = rf"{any_of['than']}'?{GAP}(?:the\s+)?(?:{any_of['answer']}{GAP})?"
        either = rf"[,、]?\s*{any_of['or']}\s*(?:{any_of['or']}\s*)?(?:{any_of['answer']}\s*)?"
        made = {"than": f"{behind}{ONE}|{ONE}{before}", "doubt": rf"[^\w{MARKS}]*{any_of['unsure']}",
                "not_one": f"{ONE}{GAP}{any_of['not']}" if self.lists.get("than_after")
                           else rf"{any_of['not']}{GAP}(?:[^\s{MARKS}]+\s+)?{GAP}{ONE}",
                "joined": rf"{ONE}[\s\"'()\[\]-]*(?:[/,&、]+|{either})[\s\"'(\[-]*{ONE}(?!{before})"}
        self[role] = re.compile(made.get(role, any_of[role]))
        return self[role]


def _any(words: str) -> str:
    """The pattern of any of these words, parted by commas; whole, where their script parts words by spaces."""
    groups = {}
    for word in sorted(filter(None, _fold(unicodedata.normalize("NFKC", words)).split(", ")), key=len, reverse=True):
        spaced = not re.search(f"[{UNSPACED}]", word)
        bounds = BEFORE if spaced and word[0] != "*" else "", AFTER if spaced and word[-1] != "*" else ""
        pattern = re.escape(word).replace(r"\ \*", r"\ \w+").replace(r"\*", r"[^\W_]*")
        groups.setdefault(bounds, []).append(pattern)
    patterns = [f"{before}(?:{'|'.join(group)}){after}" for (before, after), group in groups.items()]
    return f"(?:{'|'.join(patterns)})" if patterns else "(?!)"
