"""Instructions in 100 languages out of an English Alpaca file (paper, section on multilingual instruction data).

Instruction and input are translated. The answer is translated too where the language's translations are poor, and
written by a chat model in the language where they are good: which, is told by translating a sample of instructions into
the language and back and scoring it against the original. What is visibly broken is left out.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minixllm import languages
from minixllm.building import estimate, reports, services
from minixllm.building.filters import copied, fault, identifier, spaced
from minixllm.building.replies import LeftOut
from minixllm.building.runner import Runner, RunnerSettings, Stopped
from minixllm.building.services import Prompt, Translate
from minixllm.data.records import Instruction, place, read_instructions
from minixllm.errors import UserError, check_text, found
from minixllm.evaluation import scorers
from minixllm.files import read_json
from minixllm.languages import LANGUAGES
from minixllm.settings import setting


@dataclass
class InstructionSettings(RunnerSettings):
    data: list[str] = setting([], "English files (JSON or JSONL) of instruction, input, output and optionally an id")
    languages: list[str] = setting([], "languages to build, by code, tag or name; none: all 100")
    translator: list[str] = setting(["google", "nllb:nllb"], "translation services: a language is translated by the "
                                    "first that knows it; Google, then NLLB (in a directory called nllb), as the paper")
    generator: str = setting("chat:gpt-4o-mini@https://api.openai.com/v1",
                             "the service that writes answers in the language itself")
    quality_sample: int = setting(100, "instructions translated into a language and back, to judge its translations",
                                  least=1)
    min_bleu: float = setting(30.0, "the BLEU that these must reach for a language's answers to be generated; below it "
                              "they are translated", least=0)
    max_new_tokens: int = setting(1024, "tokens of the longest generated answer; what is longer is left out", least=1)
    temperature: float = setting(0.7, "sampling temperature of the generated answers", least=0)


@dataclass(frozen=True)
class Plan:
    """How the records of one language are made."""

    code: str
    translator: object
    generator: object | None  # None: answers are translated
    prompt: dict              # of generated answers: max_new_tokens, temperature, seed


def build_instructions(settings: InstructionSettings) -> bool:
    """Write {code}.jsonl for each language that has records left, and build/failures.jsonl, report.json and report.md,
    into settings.output.

    Whether everything was asked and answered; where not, running it again goes on.
    """
    codes = chosen_languages(settings.languages)
    if not (settings.data and settings.output):
        raise UserError("expected --data FILE, an English file in Alpaca's format, and --output DIRECTORY")
    total = check_source(settings.data)
    generator = services.writer(settings.generator, settings.timeout)
    translators = []
    for word in settings.translator:  # opened as long as a language needs one
        if not all(first_able(translators, code) for code in codes):
            translators.append(services.service(word, settings.timeout))
    prompt = dict(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=settings.seed)
    plans = [Plan(code, first_able(translators, code), generator, prompt) for code in codes]
    if unknown := [plan.code for plan in plans if plan.translator is None]:
        named = " ".join(settings.translator)
        raise UserError(f"{named}: no translator for {', '.join(unknown)}: expected --translator {named} nllb:DIR, or "
                        "--languages without these")
    if settings.dry_run:
        print(dry_run(settings, total, plans))
        return True

    sample = estimate.sampled(sources(settings.data), total, settings.quality_sample, settings.seed)
    identifier()  # which must be installed before anything is asked
    finished = 0
    with Runner(settings, settings.data) as runner:
        report = earlier_report(runner.folder)
        for service in dict.fromkeys((*(plan.translator for plan in plans), *[generator] * (settings.min_bleu <= 100))):
            runner.reach(service, settings.max_new_tokens * (service is generator))
        for number, plan in enumerate(plans, start=1):
            label = f"{plan.code} {number}/{len(plans)}"
            report[plan.code] = entry = write_language(runner, settings, plan, sample, total, label)
            report = {code: report[code] for code in LANGUAGES if code in report}
            reports.write(runner.folder, report, reports.instructions_report(report, settings.min_bleu))
            finished += 1
            print(f"{label}: {entry['records']:,} records, {sum(entry['left_out'].values()):,} left out, "
                  f"{entry['failed']:,} failed" + ", so no file" * (not entry["records"]), flush=True)
    return runner.conclude(f"{finished} of {len(plans)} languages are finished")


def write_language(runner: Runner, settings, plan: Plan, sample: list, total: int, label: str) -> dict:
    """Write the language's file; its entry in the report."""
    scores = quality(runner, sample, plan, label)
    if scores["bleu"] < settings.min_bleu:
        plan = dataclasses.replace(plan, generator=None)
    path, seen = Path(settings.output) / f"{plan.code}.jsonl", set()
    generator = plan.generator.name if plan.generator else None
    how = {"translator": plan.translator.name, "generator": generator, "bleu": scores["bleu"], "chrf": scores["chrf"]}
    counts = runner.write(path, lambda ask, item: make(ask, item[1], plan),
                          lambda item, made: finish(item, made, plan, seen) | how, sources(settings.data), total, label,
                          lambda item: {"language": plan.code, "id": item[0]})
    if not counts["records"]:
        path.unlink()  # trainings, and the build of feedback, refuse files without records
    return {**scores, "translator": plan.translator.name, "answers": generator or "translated", **counts}


def chosen_languages(words: list[str], default=tuple(LANGUAGES)) -> list[str]:
    """FLORES codes, without doubles, in the table's order; the default for none. Raises UserError."""
    chosen = {languages.find(word).code for word in words}
    if outside := chosen - LANGUAGES.keys():
        raise UserError(f"--languages: {', '.join(sorted(outside))} is none of the 100")
    return [code for code in LANGUAGES if code in chosen] or list(default)


def sources(paths) -> Iterator[tuple[str, Instruction]]:
    """(id, record) of the English records, in order."""
    records = itertools.chain.from_iterable(map(read_instructions, paths))
    return ((identity(number, record), record) for number, record in enumerate(records))


def identity(number: int, record: Instruction) -> str:
    """A record's own id, or else its number."""
    return str(number if record.extra.get("id") in (None, "") else record.extra["id"])


def check_source(paths) -> int:
    """How many records there are. Raises UserError for a broken one, or two with one id."""
    seen = {}  # {id: where}
    for path in paths:
        for record in read_instructions(path):
            own, here = identity(len(seen), record), (path, record.line)
            check_text(own, f"{path}, {place(record.line)}: id")
            if seen.setdefault(own, here) is not here:
                first, line = seen[own]
                raise UserError(f"{path}, {place(record.line)}: id {found(own)} again, first in {first}, {place(line)}"
                                "; expected every record to have its own, where it has none its number, from 0")
    return len(seen)


def make(ask, record: Instruction, plan: Plan) -> tuple[str, str, str]:
    """Instruction, input and output in the plan's language; everything comes through ask(service, request)."""
    instruction = ask(plan.translator, Translate(record.instruction, "eng", plan.code))
    input = ask(plan.translator, Translate(record.input, "eng", plan.code))
    if plan.generator is None:
        return instruction, input, ask(plan.translator, Translate(record.output, "eng", plan.code))
    system = f"You are a helpful assistant. Whatever you are asked, you answer in {LANGUAGES[plan.code].name}."
    return instruction, input, ask(plan.generator, Prompt(instruction, input, system, **plan.prompt))


def finish(item, made: tuple[str, str, str], plan: Plan, seen: set) -> dict:
    """The record as it is written. seen: digests of the questions before it. Raises LeftOut."""
    question = hashlib.sha256("\n".join(map(spaced, made[:2])).encode()).digest()[:16]
    if reason := fault(item[1], made, plan.generator is not None, plan.code) or "duplicate" * (question in seen):
        raise LeftOut(reason, *made)
    seen.add(question)
    return {**dict(zip(("instruction", "input", "output"), made)), "language": plan.code, "id": item[0]}


def first_able(translators: list, code: str):
    """The first that translates there and back; None if none does."""
    both = Translate("", "eng", code), Translate("", code, "eng")
    return next((each for each in translators if all(map(each.does, both))), None)


def quality(runner: Runner, sample: list, plan: Plan, label: str) -> dict:
    """BLEU and chrF of the sampled instructions, translated there and back (back-translation)."""
    def back(ask, item):
        try:
            there = ask(plan.translator, Translate(item[1].instruction, "eng", plan.code))
            # what was not translated would come back as it was, for a perfect score
            return "" if copied(item[1].instruction, there) else ask(plan.translator,
                                                                     Translate(there, plan.code, "eng"))
        except LeftOut:
            return ""  # it counts as badly translated

    pairs = [(text, item[1].instruction) for item, text in runner.map(
        back, sample, len(sample), f"{label} quality", lambda item: {"language": plan.code, "sampled": item[0]})]
    if 2 * len(pairs) < len(sample):
        runner.stop(f"{plan.code}: of {len(sample)} sampled instructions only {len(pairs)} could be translated")
        raise Stopped
    scores = {"bleu": scorers.bleu(*zip(*pairs)), "chrf": scorers.chrf(*zip(*pairs))}
    return {name: round(score.value, 2) for name, score in scores.items()} | {
        "signatures": [score.signature for score in scores.values()], "sampled": len(pairs)}


def earlier_report(folder: Path) -> dict:
    """The rows of languages built into the same directory before. Raises UserError for what is no such report."""
    report = read_json(path := folder / "report.json")
    try:
        reports.instructions_report(report, 0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        raise UserError(f"{path}: found no report of built languages, expected one, or none: remove it, or choose "
                        "another --output") from None
    return report


def dry_run(settings, total: int, plans: list[Plan]) -> str:
    """What the build would ask, if all answers were translated, and if all were generated."""
    records = [record for _, record in estimate.sampled(sources(settings.data), total, estimate.SAMPLE, settings.seed)]
    sample, bounds = min(settings.quality_sample, total), []
    for generated in (False, True):
        counter = estimate.Estimate(sum(len(record.output) for record in records) // len(records))
        for plan in plans:
            plan = plan if generated else dataclasses.replace(plan, generator=None)
            for record in records:
                counter.times = total / len(records)
                make(counter.ask, record, plan)
                counter.times = sample / len(records)
                counter.ask(plan.translator, Translate(record.instruction, plan.code, "eng"))
        bounds.append(counter.counts)
    return "\n".join([f"{total:,} records, {len(plans)} languages, counted on {len(records)} records; from all answers "
                      "translated to all generated:", *estimate.amounts(*bounds)])
