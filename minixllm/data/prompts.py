"""What the model is shown: the Alpaca template, and the request for an answer in another language."""

import functools
from pathlib import Path

from minixllm import languages
from minixllm.errors import UserError

REQUESTS = Path(__file__).with_name("requests.tsv")

# Stanford Alpaca (Taori et al. 2023), word for word. The answer follows "### Response:" directly.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca(instruction: str, input: str = "") -> str:
    """The prompt of one instruction, with or without an input; braces in either are only text."""
    template = WITH_INPUT if input else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def request(target_language: str, instruction_language: str = "eng") -> str:
    """The sentence "Please return the results in Chinese." of the paper, in the instruction's language.

    Languages are given as `languages.find` takes them. In English any language can be asked for; in one of the 30
    feedback languages, those 30 and English. Raises UserError for any other combination.
    """
    target, source = languages.find(target_language), languages.find(instruction_language)
    if source.code == "eng":
        return f"Please return the results in {target.name}."
    sentences = requests()
    if source.code not in sentences:
        raise UserError(f"no request is written in {source.name}: expected English or one of {', '.join(sentences)}")
    sentence, names = sentences[source.code]
    if target.code not in names:
        raise UserError(f"no {source.name} request names {target.name}: expected one of {', '.join(names)}")
    return sentence.format(language=names[target.code])


def cross_lingual(instruction: str, target_language: str, instruction_language: str) -> str:
    """The instruction followed by the request for an answer in another language, unless it ends in that request, or in
    the English one, as pairs built for languages beyond the 30 do."""
    if instruction.rstrip().endswith(request(target_language)):
        return instruction
    asked = request(target_language, instruction_language)
    return instruction if instruction.rstrip().endswith(asked) else f"{instruction} {asked}"


def preference(record) -> str:
    """The prompt of a `records.Preference`: with the request where its two languages are known and differ."""
    if record.prompt is not None:
        return record.prompt
    known = [languages.lookup(name or "") for name in (record.language, record.response_language)]
    if all(known) and known[0][0] != known[1][0]:
        (source, _), (target, _) = known
        return alpaca(cross_lingual(record.instruction, target.code, source.code), record.input)
    return alpaca(record.instruction, record.input)


@functools.cache
def requests() -> dict[str, tuple[str, dict[str, str]]]:
    """For each instruction language, its sentence and the names it has for the languages that can be asked for."""
    text = REQUESTS.read_text(encoding="utf-8")
    (_, _, *targets), *rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return {code: (sentence, dict(zip(targets, names, strict=True))) for code, sentence, *names in rows}
