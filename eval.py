"""Evaluate models on the paper's five benchmarks and print its tables.

    python eval.py                                              # what the two default trainings left, on stand-in tasks
    torchrun --nproc-per-node 8 eval.py --model meta-llama/ runs/sft/model runs/dpo/model --names base SFT SFT+DPO \\
        --benchmarks PAWS-X/x-final xcopa/data flores101/devtest XLSum self_instruct --output runs/eval

Each benchmark is a directory of its published files (minixllm/evaluation/benchmarks.py says which), from which it is
recognised. A run stopped at any moment goes on where it was. It leaves report.md, results.json,
{model}/predictions.jsonl and, with matplotlib, scores.png in --output, where other benchmarks' results join them.
"""

import dataclasses
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from minixllm import distributed
from minixllm.building import runner, services
from minixllm.errors import UserError
from minixllm.evaluation import benchmarks, language_id, predict, report, scorers, segmenters
from minixllm.generation import BATCH_TOKENS
from minixllm.settings import parse, run, setting
from minixllm.weights import adapters, hf_directory

DEFAULTS = {"max_new_tokens": 48}                    # of the embedded default: its answers are short


@dataclass
class Settings:
    model: list[str] = setting([], "Hugging Face model directories, or chat:NAME@URL of an OpenAI-compatible server, "
                                   "evaluated side by side; by default what the two default trainings left in runs/")
    names: list[str] = setting([], "what the tables call them; by default their directories' names")
    benchmarks: list[str] = setting([], "directories of benchmark files; by default small stand-in tasks, built here")
    output: str = setting("runs/eval", "directory for predictions, results and tables")
    mode: str = setting("generating", "generating: instructions in English; understanding: in the input's language",
                        choices=("generating", "understanding"))
    templates: str = setting("", "TOML file of instructions, in the form of minixllm/templates/instructions.toml")
    languages: list[str] = setting([], "only these languages (FLORES-101 codes, BCP-47 tags or English names)")
    directions: list[str] = setting(["from-english", "to-english"], "directions of translation; others are pairs such "
                                    "as deu-fra, and two tiers such as high-low: 15 pairs without English, drawn")
    limit: int | None = setting(None, "items a language or direction; by default 200 of translation, 250 of XL-Sum, "
                                "all others", least=1)
    seed: int = setting(0, "of the draw of those 15 pairs", least=0, most=2**32 - 1)
    max_new_tokens: int = setting(512, "longest answer, in tokens; XL-Sum's is 128 at most; half of the model's "
                                       "positions at most, unless --max-length is given", least=1)
    choices: str = setting("both", "how choice tasks are asked: by the likelihood of their choices (fast: nothing is "
                           "generated), by free answers, as in the paper, or both",
                           choices=("likelihood", "answers", "both"))
    choice_tokens: int = setting(predict.CHOICE_TOKENS, "longest free answer to a choice task, in tokens; the paper's "
                                 "is 512", least=1)
    max_length: int | None = setting(None, "tokens of prompt and answer together; longer prompts lose the end of their "
                                     "article, input or sentence; by default the model's max_position_embeddings, or "
                                     "2048 where its config names none (BLOOM)", least=1, most=2**24)
    batch_tokens: int = setting(BATCH_TOKENS, "tokens of all prompts and answers computed at a time; a 7B model in "
                                              "bf16 takes 0.5 MB of memory for each", least=1)
    dtype: str = setting("auto", "type to compute in; auto is bf16 where the processor has it",
                         choices=("auto", "bfloat16", "float32"))
    bleu_tokenizer: str = setting("", "13a, zh, char or the path of a SentencePiece model for BLEU in all languages; "
                                  "by default 13a, zh for Chinese, char where no spaces are written")
    segment: bool = setting(True, "ROUGE over words where no spaces are written and their package is installed (jieba, "
                            "pythainlp, fugashi; none for Burmese), not characters")


def main(argv=None) -> None:
    settings = parse(Settings, argv, DEFAULTS, needs=("benchmarks",), description=__doc__)
    if settings.max_length and settings.max_length <= settings.max_new_tokens:
        raise UserError(f"--max-length is {settings.max_length}, expected more than --max-new-tokens, "
                        f"{settings.max_new_tokens}: a prompt needs room too")
    world, start = distributed.setup(), time.perf_counter()
    models = name_models(settings.model or default_models(), settings.names)
    notes = Notes(world.first)
    if any(map(is_served, models.values())) and settings.choices != "answers":
        if settings.choices == "likelihood":
            raise UserError("--choices likelihood: found a model behind a server, expected directories: it gives text")
        settings.choices = "answers"
        notes += ["choices are read from free answers alone: a model behind a server gives no likelihoods"]
    if not settings.model:
        notes += [f"{directory} is not there" for directory in DEFAULT_MODELS if directory not in models.values()]
    items = read_items(settings, world, notes)
    output, given = Path(settings.output), dataclasses.asdict(settings)
    report.check_output(output, models, items, given)
    scoring = check_scoring(settings, items, notes)
    if world.first:
        print(f"{len(items)} items of {', '.join(dict.fromkeys(item.column for item in items))}, {settings.mode} mode")
    answered = {True: ask, False: answer}
    predictions = {name: answered[is_served(place)](name, place, items, settings, world, notes)
                   for name, place in models.items()}
    if world.first:
        print(report.write(output, report.results(predictions, **scoring), predictions, given, notes))
        for name in models:
            predict.forget(output / name)
        print(f"every language: {output}/report.md; results.json and predictions.jsonl are beside it; "
              f"{time.perf_counter() - start:.0f} s")
    distributed.close()


class Notes(list):
    """What there is to say of a run: printed at once by the first process, and kept for the report."""

    def __init__(self, printed: bool):
        self.printed = printed

    def __iadd__(self, more):
        for note in (note for note in more if self.printed):
            print(f"  {note}", flush=True)
        return super().__iadd__(more)


def check_scoring(settings, items, notes: Notes) -> dict:
    """How answers are scored, as `report.score` takes it. Raises UserError for what is missing before any is asked."""
    if settings.bleu_tokenizer:
        scorers.bleu_tokenizer(settings.bleu_tokenizer)
    if settings.segment:
        targets = sorted({item.target for item in items if report.MAIN[item.benchmark] == "rouge1"})
        notes += [f"ROUGE of {code} is over characters: words need {segmenters.PACKAGES[code]}" for code in targets
                  if code in segmenters.PACKAGES and not segmenters.word_segmenter(code)]
    if settings.choices != "likelihood" and settings.choice_tokens < 512 and any(item.choices for item in items):
        notes += [f"free answers to choices have {settings.choice_tokens} tokens at most, the paper's 512"]
    identifier = language_id.identifier() if settings.benchmarks else None
    if identifier:
        notes += identifier.notes({item.target for item in items if not item.choices})
    elif settings.benchmarks:
        notes += ["off-target rates need a language identifier: pip install 'minixllm[lid]'"]
    return {"choices": settings.choices, "bleu_tokenizer": settings.bleu_tokenizer or None,
            "segment": settings.segment, "identifier": identifier}


def answer(name: str, directory: str, items, settings, world, notes: Notes) -> list[predict.Prediction]:
    """The predictions of one model, which is loaded for them, whole on every process."""
    how = predict.How(settings.choices, settings.max_new_tokens, settings.choice_tokens, settings.max_length,
                      settings.batch_tokens)
    model, tokenizer = adapters.load(directory, distributed.compute_dtype(settings.dtype, world.device), world.device)
    longest, room = predict.limits(model.config, settings.max_new_tokens, settings.max_length)
    if longest < settings.max_new_tokens:
        notes += [f"{name}: answers of {longest} tokens at most, half of the {room} it is asked with"]
    with distributed.explain_lost_peers(f"evaluating {name}", "The same command goes on from there"):
        return predict.predict(model, tokenizer, items, world, Path(settings.output) / name, how)


def is_served(place: str) -> bool:
    return place.startswith("chat:")


def ask(name: str, place: str, items, settings, world, notes: Notes) -> list[predict.Prediction]:
    """The free answers of a model behind a server, of which the first process asks as the builders of data do.

    It gets instruction and input without a template, for the server has its own. Every answer is kept in build/ of its
    folder. An item without an answer counts as wrong, or as an empty text.
    """
    if not world.first:
        return []
    chat, how = services.service(place), predict.How(settings.choices, settings.max_new_tokens, settings.choice_tokens)
    asked = [services.Prompt(item.instruction.format(**item.fields), item.input.format(**item.fields),
                             max_new_tokens=how.answer_tokens(item)) for item in items]
    found = {}
    with runner.Runner(runner.RunnerSettings(output=str(Path(settings.output) / name))) as running:
        running.reach(chat)
        for number, said in running.map(lambda ask, number: ask(chat, asked[number]), range(len(items)), len(items),
                                        name, lambda number: {"item": number}):
            found[number] = {"answer": said}
    if running.why_stopped:
        raise UserError(f"{name}: {running.why_stopped}; {len(found)} answers are kept, the same command goes on")
    if running.failures:
        notes += [f"{name}: {len(running.failures)} items without an answer, the last: "
                  f"{running.failures[-1]['reason']}"]
    read = [predict.prediction(item, found.get(number, {}), 1) for number, item in enumerate(items)]
    return [dataclasses.replace(one, prompt=f"{prompt.text}\n\n{prompt.input}".strip())
            for one, prompt in zip(read, asked)]


def read_items(settings, world, notes: Notes) -> list[benchmarks.Item]:
    """The items of the benchmarks, or of stand-ins where none are given; what there is to say of them joins `notes`."""
    folders = settings.benchmarks
    if not folders:
        from minixllm.demo import benchmarks as stand_ins
        with world.one_by_one():
            folders, templates = stand_ins.build(Path(settings.output) / "stand-in")
        settings.templates = settings.templates or str(templates)
        notes += ["these are stand-ins made from held-out CLDR items, not the published benchmarks; a language "
                  "identifier cannot tell the language of texts so short: no off-target rates"]
    wanted = benchmarks.Wanted(settings.mode, tuple(settings.languages), tuple(settings.directions), settings.limit,
                               settings.seed, Path(settings.templates) if settings.templates else None)
    items, read = [], {}
    for folder in folders:
        found, remarks = benchmarks.read(folder, wanted)
        here = dict.fromkeys(((item.column, item.group, item.id) for item in found), folder)
        if twice := read.keys() & here.keys():                        # or one score would mix both
            raise UserError(f"{read[min(twice)]} and {folder} both have item {min(twice)[2]} of "
                            f"{' '.join(min(twice)[:2])}: expected each benchmark once")
        read |= here
        if not settings.benchmarks:
            found = [dataclasses.replace(item, column=f"{item.column} stand-in") for item in found]
        items += found
        notes += remarks
    if not items:
        raise UserError(f"nothing to evaluate: {'; '.join(notes)}")
    return items


DEFAULT_MODELS = "runs/sft/model", "runs/dpo/model"  # what the embedded default's two trainings leave


def default_models() -> list[str]:
    found = [name for name in DEFAULT_MODELS if (Path(name) / "config.json").exists()]
    if not found:
        raise UserError(f"no {' nor '.join(DEFAULT_MODELS)} here: run train_sft.py first, or give --model")
    return found


def name_models(directories: list[str], names: list[str]) -> dict[str, str]:
    """{name: directory}; runs/sft/model is "sft" unless names are given."""
    if names and len(names) != len(directories):
        raise UserError(f"--names gives {len(names)} names for {len(directories)} models")
    for directory in directories:                                    # before anything is computed
        services.service(directory) if is_served(directory) else (
            hf_directory.read_config(adapters.base_directory(directory)))
    paths = [Path(directory[5:].partition("@http")[0].split("/")[-1] if is_served(directory) else directory).resolve()
             for directory in directories]
    names = names or [path.parent.name if path.name == "model" else path.name for path in paths]
    if len(set(names)) < len(names) or any(not name.strip() or "/" in name or name.startswith(".") or
                                           Path(name).suffix in (".json", ".md", ".png") for name in names):
        raise UserError(f"the models are called {', '.join(map(repr, names))}: expected different names, not empty, "
                        "without '/' and not those of files (.json, .md, .png); give --names")
    return dict(zip(names, directories))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is kept is said
    run(main)
