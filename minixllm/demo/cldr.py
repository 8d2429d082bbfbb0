"""The embedded default: instructions in 99 languages whose right answers Unicode CLDR gives exactly.

Three separate steps, each a pure function, so that other data sets can be built from the same held-out material:

- *content*, what is said, in no language: ("date", 2031, 3, 5), ("when", -5, "day"), ("list", "Anna", "Ben"), ...;
  `draw` samples one, `split` says which of train, valid and test it belongs to, in every language and every kind;
- *rendering*, how language L says it: `render(content, tag)`, through the `babel` package (Unicode CLDR 47);
- *instruction*, what is asked in English: `record` puts the three together.

A locale that lacks an entry falls back to CLDR's root, which is no language ("+5 d"), or repeats English:
`speaks(tag, subject)` finds these, and they are left out of that task.
"""

import datetime
import functools
import hashlib
import itertools
import json
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from minixllm import languages
from minixllm.data import prompts
from minixllm.errors import UserError
from minixllm.files import write_json_lines
from minixllm.languages import FEEDBACK_LANGUAGES, LANGUAGES
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.weights.hf_directory import ARCHITECTURES

# The settings that make a small model learn most in five minutes on two cores (in place of the scripts' defaults).
# Many small steps on short prompts: a row is one record, of about 18 tokens.
SETTINGS = {
    "steps": 2200, "batch_size": 64, "micro_batch_size": 64, "max_length": 128, "packing": False,
    "learning_rate": 3e-3, "warmup_steps": 100, "weight_decay": 0.05, "beta2": 0.98,
    "eval_every": 1100, "save_every": 1100, "max_new_tokens": 32,
}

# kind of task -> (what its content is about, the instruction)
KINDS = {
    "date": ("date", "Write this date in full."),
    "when": ("when", "Say when this is."),
    "quantity": ("quantity", "Write this quantity in full."),
    "money": ("money", "Write this amount in full."),
    "list": ("list", "Join these names."),
    "read": ("date", "Write this date as YYYY-MM-DD."),
    "language": ("date", "Name the language of this text."),
}
SHARES = {"date": 2, "when": 2, "quantity": 2, "money": 2, "list": 1, "read": 1.5, "language": 1.5}  # of the records
ASKED = ("date", "list", "money", "quantity")  # what is asked about in the 30 feedback languages themselves
# What the 30 feedback languages get besides, and preference optimisation starts from:
OWN = 40  # records a subject in which one asks for itself
NAMED = 4  # records in which one names another, of each ordered pair
TRANSLATED = ("date", "when", "quantity", "money", "list")  # answered in the language the request names
PERIODS = ("day", "week", "month", "year")
UNITS = ("length-kilometer", "length-meter", "length-centimeter", "area-square-meter", "mass-kilogram", "volume-liter")
CURRENCIES = ("USD", "GBP", "JPY", "CNY", "INR", "CHF")
# No name begins with an I sound: Spanish "y" and Italian "e" would change before it, which CLDR's pattern cannot say.
NAMES = ("Adam Anna Boris Carla Clara David Diana Fatima Felix Gita Hana Hugo Jana John Jonas Julia Karim Laura Leila "
         "Lena Linda Lucas Maria Marta Max Mei Mona Nadia Nina Noah Omar Paula Peter Rosa Ruth Samir Sara Sofia Tara "
         "Thomas Vera Victor").split()


def _cldr():
    try:
        import babel.dates
        import babel.lists
        import babel.localedata
        import babel.numbers
        import babel.units
    except ImportError:
        raise UserError(
            "the embedded data set needs the package babel, which is not installed: pip install 'minixllm[demo]', "
            "or give your own records with --data"
        ) from None
    return babel


# -- content: what is said ------------------------------------------------------------------------------------------


def draw(subject: str, rng: random.Random) -> tuple:
    """One content, (subject, ...). Numbers and years stay in bounded ranges: a small model can then copy them whole."""
    if subject == "date":
        day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36524))  # up to the end of 2049
        return ("date", day.year, day.month, day.day)
    if subject == "list":
        return ("list", *rng.sample(NAMES, rng.choice((2, 3))))
    number = rng.randrange(2, 100)
    if subject == "when":
        return ("when", number * rng.choice((-1, 1)), rng.choice(PERIODS))
    return (subject, number, rng.choice(UNITS if subject == "quantity" else CURRENCIES))


def split(content: tuple) -> str:
    """"train", "valid" or "test", from the content alone: the same in every language, kind, seed and data set."""
    bucket = zlib.crc32(repr(content).encode()) % 20
    return "test" if bucket < 2 else "valid" if bucket == 2 else "train"


# -- rendering: how a language says it ------------------------------------------------------------------------------


@functools.cache
def _locale(tag: str):
    return _cldr().Locale.parse(tag)


def render(content: tuple, tag: str) -> str:
    """`content` in the language of the BCP-47 `tag`, as CLDR writes it (with digits 0-9 and the Gregorian calendar)."""
    babel, locale = _cldr(), _locale(tag)
    subject, *rest = content
    if subject == "date":
        return babel.dates.format_date(datetime.date(*rest), "long", locale)
    if subject == "when":
        number, period = rest
        forms = locale._data["date_fields"][period]["future" if number > 0 else "past"]
        form = locale.plural_form(abs(number))
        return forms.get(form, forms["other"]).replace("{0}", str(abs(number)))
    if subject == "quantity":
        return babel.units.format_unit(rest[0], rest[1], "long", locale=locale)
    if subject == "money":
        return babel.numbers.format_currency(
            *rest, format="#,##0", locale=locale, currency_digits=False, format_type="name"
        )
    return babel.lists.format_list(rest, locale=locale)


@functools.cache
def speaks(tag: str, subject: str) -> bool:
    """Whether CLDR has `subject` in this language itself, not by falling back to root nor by repeating English."""
    babel = _cldr()
    if not babel.localedata.exists(tag.replace("-", "_")):
        return False
    own, root, english = (babel.localedata.load(name) for name in (tag.replace("-", "_"), "root", "en"))

    def differs(*path) -> bool:
        """Whether the entry at `path` is the locale's own."""
        entries = []
        for data in (own, root, english):
            for key in path:
                data = data.get(key) if hasattr(data, "get") else None
                data = data[1] if isinstance(data, tuple) else data  # (what it inherits, what is its own)
            entries.append(None if isinstance(data, babel.localedata.Alias) else data)
        return entries[0] is not None and entries[0] not in entries[1:]

    if subject == "date":
        return differs("months", "format", "wide")
    if subject == "when":
        signs = any(render(("when", 2, period), tag)[0] == "+" for period in PERIODS)  # root's pattern with a word
        return not signs and all(differs("date_fields", period, way)
                                 for period in PERIODS for way in ("past", "future"))
    if subject == "quantity":
        # where there is no long form, babel answers with the short one or the unit's identifier, "5 length-meter"
        return all(differs("unit_patterns", unit, "long", "other") for unit in UNITS)
    if subject == "money":
        return all(differs("currency_names", code) for code in CURRENCIES)
    return differs("list_patterns", "standard")


# -- records: what is asked -----------------------------------------------------------------------------------------


_request = functools.cache(prompts.request)


def record(kind: str, content: tuple, code: str) -> dict | None:
    """One record of the task `kind` about `content` in the language with this FLORES-101 code.

    None where CLDR has no answer of that language's own, or where the question has more than one right answer (the
    same text in two languages).
    """
    language = LANGUAGES[code]
    subject, instruction = KINDS[kind]
    if not speaks(language.tag, subject):
        return None
    text = render(content, language.tag)
    if kind in TRANSLATED:
        instruction += " " + _request(language.name)
        given = datetime.date(*content[1:]).isoformat() if subject == "date" else render(content, "en")
        if subject == "list":
            given = ", ".join(content[1:])
        answer = text
    else:
        given = text
        answer = datetime.date(*content[1:]).isoformat() if kind == "read" else language.name
        if kind == "language" and _dates(content[2])[render(("date", 2031, content[2], 15), language.tag)] > 1:
            return None
    return {"instruction": instruction, "input": given, "output": answer, "language": code, "kind": kind}


@functools.cache
def _dates(month: int) -> Counter:
    """How many languages write a date of this month as each text; the day and year are the same digits in all."""
    return Counter(render(("date", 2031, month, 15), language.tag) for language in LANGUAGES.values()
                   if speaks(language.tag, "date"))


def feedback_record(subject: str, content: tuple, asked: str, answered: str) -> dict | None:
    """A question put in the feedback language `asked`, to be answered in `answered`, the same or another of the 30.

    CLDR has no sentence such as "Write this date in full" in those languages, so the request is the whole instruction.
    None where CLDR has no answer of the language's own.
    """
    source, target = LANGUAGES[asked], LANGUAGES[answered]
    if not (speaks(source.tag, subject) and speaks(target.tag, subject)):
        return None
    if subject == "date":
        given = datetime.date(*content[1:]).isoformat()
    elif subject == "list":
        given = ", ".join(content[1:])
    elif subject == "money":
        given = f"{content[2]} {content[1]}"
    else:
        given = _cldr().units.format_unit(*content[1:], "short", locale=_locale(source.tag))
    return {"instruction": _request(answered, asked), "input": given, "output": render(content, target.tag),
            "language": asked, "response_language": answered, "kind": f"own {subject}"}


def named(made: dict, code: str) -> dict:
    """A record of the kind "language", answered in the feedback language `code` instead of English."""
    _, names = prompts.requests()[code]
    return made | {"instruction": f"{made['instruction']} {_request(LANGUAGES[code].name)}", "kind": "own language",
                   "output": names[made["language"]], "response_language": code}


# -- the data set ---------------------------------------------------------------------------------------------------


def folder(cache) -> Path:
    """Where below `cache` the data set is kept: another place when what makes it has changed."""
    sources = [Path(file) for file in (__file__, languages.TABLE, prompts.__file__, prompts.REQUESTS)]
    made_of = [*(path.read_bytes() for path in sources), _cldr().__version__.encode()]
    return Path(cache) / f"demo-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}"


def build(directory, seed: int = 0, records_per_language: int = 600):
    """Write train.jsonl, valid.jsonl, test.jsonl and the tokenizer of train.jsonl into `directory`: the same bytes for
    the same seed.

    train: about records_per_language records a language, its kinds in the proportions of SHARES; valid: 2 and test: 10
    a language and kind. Nothing that one file says is said in another, in whatever language.
    Raises UserError when babel is not installed.
    """
    rng = random.Random(seed)
    for name, each in (("train", None), ("valid", 2), ("test", 10)):
        records = []
        for code, language in LANGUAGES.items():
            kinds = [kind for kind, (subject, _) in KINDS.items() if speaks(language.tag, subject)]
            total = sum(SHARES[kind] for kind in kinds)
            for kind in kinds:
                records += _sample(kind, code, name, each or round(records_per_language * SHARES[kind] / total), rng)
        for code in FEEDBACK_LANGUAGES if name == "train" else ():  # the 30 also ask and answer in themselves
            for subject in ASKED:
                contents = (content for content in iter(lambda: draw(subject, rng), None) if split(content) == name)
                made = (feedback_record(subject, content, code, code) for content in contents)
                records += filter(None, itertools.islice(made, OWN))
            for other in FEEDBACK_LANGUAGES:
                records += [named(made, code) for made in _sample("language", other, name, NAMED, rng)]
        rng.shuffle(records)
        write_json_lines(Path(directory) / f"{name}.jsonl", records)
    folder = Path(directory)
    train_sentencepiece(texts(folder / "train.jsonl"), folder / "tokenizer.model", VOCABULARY, **TOKENIZER)


def _sample(kind: str, code: str, name: str, wanted: int, rng: random.Random) -> list[dict]:
    """`wanted` different records of one kind, language and split, or as many as 400 times as many draws find."""
    found: dict[tuple, dict] = {}
    for _ in range(400 * wanted):
        if len(found) == wanted:
            break
        content = draw(KINDS[kind][0], rng)
        if content not in found and split(content) == name and (made := record(kind, content, code)) is not None:
            found[content] = made
    return list(found.values())


# -- its tokenizer --------------------------------------------------------------------------------------------------

# Settings of SentencePiece under which each part of a record that recurs, a whole sentence of the template, a number,
# a month with its prepositions, can become one piece: what lets a small model read short prompts and copy numbers.
BOUNDARY = "\x01"
VOCABULARY = 11000
TOKENIZER = {
    "split_by_whitespace": False, "split_by_unicode_script": False, "split_by_number": False, "split_digits": False,
    "add_dummy_prefix": False, "max_sentencepiece_length": 256, "character_coverage": 1.0,
    "pretokenization_delimiter": BOUNDARY,
}


def texts(path) -> Iterator[str]:
    """What to train the tokenizer on: the parts that the records of the file consist of, each about as often as the
    square root of its count, from 2 to 50 times, so that rare words get into the vocabulary too. And the requests of
    the 30 feedback languages for one another, which come with preference optimisation.
    """
    with open(path, encoding="utf-8") as file:
        counts = Counter(part for line in file for part in _parts(json.loads(line)))
    for sentence, names in prompts.requests().values():
        counts.update({part: 900 for part in sentence.split("{language}") if part})
        counts.update(dict.fromkeys(names.values(), 144))
    for part, count in counts.items():
        for _ in range(min(50, max(2, math.isqrt(count)))):
            yield part + BOUNDARY


def _parts(made: dict) -> Iterable[str]:
    """A record cut into template, sentences, the name in the request, numbers and names, and what is between them."""
    template = prompts.alpaca("\0", "\0").split("\0")
    language = LANGUAGES[made.get("response_language", made["language"])].name
    instruction = re.split(rf"(?<=\.)(?= )|( {language})(?=\.$)", made["instruction"])
    if made["kind"].startswith("own ") and made["kind"] != "own language":
        instruction = ()  # a request, counted apart
    cut = r"(\d+|,|(?: ?[A-Z][a-z]+))" if made["kind"].endswith("list") else r"(\d+)"
    values = re.split(cut, made["input"] + BOUNDARY + made["output"])
    return (part for text in (*template, *instruction, *values) if text for part in text.split(BOUNDARY) if part)


# -- its model ------------------------------------------------------------------------------------------------------


def config(architecture: str, tokenizer):
    """The configuration of the small model of "llama" or "bloom" that is trained from scratch."""
    size = {"vocab_size": tokenizer.vocab_size, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "tie_word_embeddings": True, "initializer_range": 0.08,
            "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if architecture == "llama":
        size |= {"intermediate_size": 344, "max_position_embeddings": 512}
    return ARCHITECTURES[architecture].config_class(**size)
