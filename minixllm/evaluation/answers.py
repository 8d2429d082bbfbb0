"""What a free answer says: the rules by which raw text becomes a choice, or "cannot tell" (None).

The paper generates answers freely and parses them, by rules it does not give. These are ours, tried in order on the
answer in NFKC form, without a repeated prompt and without anything from a further "### Instruction:" on:

yes / no (the words of the instruction's language, the item's, and English)
  1. the question's own "yes or no", repeated, says nothing and is passed over, and so do "yes and no" and "no sé";
  2. the answer begins with a word for yes or for no: that one ("No, because ...", "**Yes.**", "是的", "不是改写");
  3. words for one of the two occur as whole words, with no letter on either side in any script, for the other do not:
     that one ("I would say yes").
  A word that begins or fills other sentences too ("no", "si", "네", "是", ...) counts only before punctuation, the end
  of a line or "because"; "no" at the start also before what goes on with an answer ("no it", "no es", not "no hay").

options A, B with their texts, in English and XCOPA's other languages. Only a capital is a letter, as in the question
("a" is a word), and not if it begins an option's text ("A dog barked"). An option is passed over behind "than", "over",
"instead of", "not" or "the less plausible is" and before "is wrong", "is less" or "makes no", as are both where the
question is repeated.
  1. "A and B", "A or B", "both", "neither" at the start: cannot tell;
  2. "answer is B", "option B", "choose B", "B is more plausible", "选项B", "B更合理", naming one letter: that; both:
     cannot tell;
  3. the texts of both options occur: cannot tell (the options were repeated);
  4. the answer is one letter, or begins with one followed by punctuation or its option's text ("-B:", "(A)", "B. He");
  5. one letter occurs between brackets, before a colon or full stop, or before a comma or at the end after a colon or
     "is" ("... is plausible: -A.", "L'opzione più plausibile è B"): that one; if the other stands anywhere as a word:
     cannot tell;
  6. the text of one option occurs, the other's does not, case and punctuation aside: that one.

Of a longer answer only what these rules find is read. The share of answers that cannot be told is reported.
"""

import re
import unicodedata

LONGEST = 2000  # characters of an answer that are read: what a model in a loop goes on to say would take long

# scripts written without spaces: next to their letters a word has no boundary to ask for
_SCRIPTS = "\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = re.compile(f"[{_SCRIPTS}]")
_BEFORE, _AFTER = rf"(?<![^\W{_SCRIPTS}])", rf"(?![^\W{_SCRIPTS}])"


def _any(words: str) -> str:
    """The pattern of any of these words, parted by commas, in any case; whole, where its script parts words."""
    words = sorted(unicodedata.normalize("NFKC", words).split(", "), key=len, reverse=True)
    return f"(?i:{'|'.join(w if _UNSPACED.search(w) else f'{_BEFORE}{w}{_AFTER}' for w in words)})"


# also "no difference", "not only", "if", "four" or "your", "example", "is", "not" (of a prefix)
_ORDINARY = {"no", "non", "si", "네", "예", "是", "否"}
_ENDED = r"(?=[ \t]*(?:(?!-\w|\.[ \t]*\d)(?:[^\w\s]|_)|(?m:$)|(?:because|since|porque|ya que|parce|puisque|car)\b))"
_GOES_ON = r"non?(?=\s+" + _any(
    "no, its?, they, i, we, you, that, this, these, the, there, both, sentences?\\d?, is, since, as, "
    "se, las?, los?, lo son, el, es, son, estas?, ambas, tienen, significan, expresan, coinciden, oración, "
    "les?, la, ces?, cette, c, cela, il, elles?, phrase, par[aá]ph?f?ras\\w*") + ")"
_OPENING = r"""^[\s\-–—*_#>"'“”„«»‘’`(\[「『【:.]*"""
_QUOTES = r"""[("'*\[]{0,9}"""

# of XCOPA's languages: en, et, ht, id, it, sw, tr, vi, ta, th, zh
_OPTION = _any("answer, option, choice, choose, pick, select, variant, valik, vastus, opsyon, repons, opsi, pilihan, "
               "jawaban(?:nya)?, memilih, opzione, risposta, scelta, scelgo, chaguo, jibu, seçenek, cevap, yanıt, "
               "chọn, phương án, đáp án, câu trả lời, விருப்பம், பதில், விடை, ตัวเลือก, เลือก, คำตอบ, ข้อ, 选项, 选择?, 答案")
_IS = _any("is, was, seems, looks, does, do, would, can, could, on, se, adalah, è(?: la)?, ni, là, คือ, 是, 为")
_AND = "(?:[/&、,]|" + _any("and, or, või, ja, oswa, ak, atau, dan, o, e, au, na, veya, ve, ya da, hoặc, hay, và, "
                           "அல்லது, หรือ, 和, 或者?, 还是") + ")"
_THAN = _any("than, over, instead of, kui, pase, daripada, kuliko, hơn, กว่า, 比, 而非, dell")
_NOT = _any(r"\w*n't, not, non, pa, bukan, tidak, si[oy]?o?, hali?na, hai?na, không, ei, அல்ல, இல்லை, ไม่(?:ใช่)?+, "
            "不(?:是|会)?+, 没")
_POOR = _any("wrong, incorrect, false, less, least, unlikely, implausible, makes? no, vale, vähem, kurang, salah, "
             "meno, sbagliat[ao], yanlış, mantıksız, daha az, değil\\w*, ít, sai, தவறு, குறைவு, ผิด, น้อยกว่า, 错, 较小")
_ONE = rf"(?:{_OPTION}\s{{0,9}})?{_QUOTES}{_BEFORE}[AB]{_AFTER}"
# at once or after two words: A is wrong, A is clearly wrong, A显然是错误的; but not: A not B, A because B is wrong
_DOUBTED = rf"(?:[^\s,.;，。；]{{0,16}}|(?:[ \t]+(?![AB]\b)\w+){{0,2}}[ \t]+)(?:{_NOT}|{_POOR})(?!\s{{0,9}}{_ONE})"
_NAMED = re.compile(
    rf"{_OPTION}\s{{0,9}}(?:{_IS}\s{{0,9}})?(?:{_OPTION}\s{{0,9}})?[\s:\-]{{0,9}}{_QUOTES}([AB]){_AFTER}"
    rf"(?!\s{{0,9}}{_AND}\s{{0,9}}-?[AB]{_AFTER})"
    rf"|{_BEFORE}([AB])\s*(?:更|\bseçeneği\b|\b(?:is|seems|sounds|looks|would\s+be)\s+(?:the\s+)?"
    r"(?:better|best|correct|right|(?:more|most)\s+(?:plausible|likely))\b)")
# the less plausible option is A, 更不合理的是A
_LESSER = rf"(?:{_POOR}|不)(?:[^\s,.;，。；]{{0,16}}?|(?:[ \t]+\w+){{0,3}}[ \t]+){_IS}\s{{0,9}}{_ONE}"
_PASSED_OVER = re.compile(rf"(?:{_THAN}['’]?|{_NOT}(?:\s+\w+){{0,2}})\s{{0,9}}{_ONE}|{_LESSER}|{_ONE}{_DOUBTED}")
_TURN = re.compile(r"(?:^|\n)### (?:Instruction|Input|Response):")
_BOTH = re.compile(_OPENING + r"(?:(?i:both|neither)\b|A\s*(?:and|or|[/&,])\s*-?B\b|B\s*(?:and|or|[/&,])\s*-?A\b)")
_OR = (r"""["'“”„«»「」]*\s*(?:/|\b(?:or|oder|ou|o|and|und|et|y)\b|또는|または|か|或者|或|그리고|と|和)\s*"""
       r"""["'“”„«»「」]*""")
_UNKNOWING = r"\bno (?:(?:lo )?sé|se puede|es posible|estoy segur[oa]|idea)\b"
_MARKED = re.compile(
    rf"""{_BEFORE}(?:\(([AB])\)|\[([AB])\]|([AB])(?=\s*[:.)。])|(?:{_IS}|(?<=:))[\s\-"'*]*([AB])(?=[,，]|\W*$))""")


def parse(item, raw: str, prompt: str) -> str | None:
    """What a raw answer says: the text without echoes, or the choice it picks (None: cannot tell).

    item: the benchmarks.Item that was asked."""
    answer = clean(raw, prompt)
    if not item.choices:
        return answer
    choice = yes_no(answer, item.words) if item.benchmark == "pawsx" else option(answer, item.choices)
    return None if choice is None else item.choices[choice]


def clean(raw: str, prompt: str = "") -> str:
    """The answer without a repeated prompt and without the further turns that a model may write after it."""
    if prompt and prompt in raw:
        raw = raw[raw.rindex(prompt) + len(prompt):]
    return _TURN.split(raw.strip().removeprefix("### Response:").lstrip())[0].strip()


def yes_no(answer: str, words: tuple[tuple[str, ...], tuple[str, ...]]) -> int | None:
    """0 for an answer that says yes, 1 for no (the place of the choice), None for what cannot be told.

    answer: as `clean` gives it. words: what is understood as yes, and as no.
    """
    answer = _normal(answer[:LONGEST])
    meaning = {_normal(word): choice for choice in (1, 0) for word in words[choice]}
    longest_first = sorted(meaning, key=len, reverse=True)            # 不是 is no, though it ends in 是
    word = "|".join(re.escape(word) + _ENDED if word in _ORDINARY else _whole(word) for word in longest_first)
    yes, no = ("|".join(_whole(word) for word in longest_first if meaning[word] == choice) for choice in (0, 1))
    answer = re.sub(f"(?:{yes}){_OR}(?:{no})|(?:{no}){_OR}(?:{yes})|是否|{_UNKNOWING}", " ", answer)
    if first := re.match(f"{_OPENING}({word}|{_GOES_ON})", answer):
        return meaning.get(first[1])
    said = {meaning[found[1]] for found in re.finditer(rf"(?<!\w)({word})(?!\w)", answer)}
    return said.pop() if len(said) == 1 else None


def option(answer: str, choices: tuple[str, str]) -> int | None:
    """0 for an answer that picks option A, 1 for B, None for what cannot be told. answer: as `clean` gives it."""
    answer = unicodedata.normalize("NFKC", answer[:LONGEST])
    if _BOTH.match(answer):
        return None
    repeated = r"\W*B\W*".join(re.escape(unicodedata.normalize("NFKC", choice)) for choice in choices)
    chosen = _PASSED_OVER.sub(" ", re.sub(rf"A\W*{repeated}", " ", answer))
    plain = _plain(answer)
    first, second = (_plain(choice) for choice in choices)
    named = {found[found.lastindex] for found in _NAMED.finditer(chosen)
             if not _plain(chosen[found.start(found.lastindex):]).startswith((first, second))}
    if named:
        return "AB".index(named.pop()) if len(named) == 1 else None
    if first in second or second in first:               # "He ran" in "He ran away": the longer is looked for first
        longer, shorter = sorted((first, second), key=len, reverse=True)
        without = plain.replace(longer, " ")
        occurs = {longer: longer in plain, shorter: shorter in without}
    else:
        occurs = {text: text in plain for text in (first, second)}
    if occurs[first] and occurs[second]:
        return None
    if begins := re.match(_OPENING + r"([AB])(?![^\W_])", answer):
        letter = "AB".index(begins[1])
        rest = answer[begins.end(1):]
        if re.match(r"[\W_]*$|\s*[*_]*[.:)\],\-–*。、\n]", rest) or _plain(rest).startswith((first, second)[letter]):
            return letter
    if marked := {"".join(groups) for groups in _MARKED.findall(chosen)}:
        alone = marked | set(re.findall(f"{_BEFORE}[AB]{_AFTER}", chosen))
        return "AB".index(marked.pop()) if len(alone) == 1 else None
    return 0 if occurs[first] else 1 if occurs[second] else None


def _whole(word: str) -> str:
    """The pattern of a word with no letter behind it, in scripts that part words."""
    return re.escape(word) + ("" if _UNSPACED.search(word) else r"(?![^\W_])")


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _plain(text: str) -> str:
    """Letters, digits and marks, one space where anything else stands."""
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in _normal(text)).split())
