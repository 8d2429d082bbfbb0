"""Faults of translated and generated texts: what is seen, and what good translations may do."""

from pathlib import Path

import pytest

from minixllm.building import filters, refusals
from minixllm.data.records import Instruction
from minixllm.errors import UserError
from minixllm.languages import FEEDBACK_LANGUAGES

REFUSALS = [line.split("\t") for line in
            Path(__file__).with_name("refusals.tsv").read_text(encoding="utf-8").splitlines()]


def fault(record, made, generated, code="deu"):
    """The fault by all but the language of the texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "wrong_language", lambda text, code: None)
        return filters.fault(record, made, generated, code)


GOOD = ("Nenne 25 nahe Orte, siehe https://a.org/x und {name}.", "", "Hier sind 25 Orte in der Nähe.")


@pytest.mark.parametrize(
    "changed, generated, reason",
    [
        ({}, True, None),
        ({0: " "}, True, "empty"),
        ({2: "\n"}, True, "empty"),
        ({2: "As an AI language model, I cannot do that."}, True, "refusal"),
        ({2: "I'm sorry, but I can't help with that."}, True, "refusal"),
        ({0: "List 25 near places, see https://a.org/x and {name}."}, True, "untranslated"),
        ({0: GOOD[0].replace("{name}", "Name")}, True, "lost placeholder, URL or code"),
        ({0: GOOD[0].replace("/x", "/y")}, True, "lost placeholder, URL or code"),
        ({0: GOOD[0].replace("25", "26")}, True, "lost number"),
        ({0: GOOD[0].replace("25", "٢٥")}, True, None),
        ({2: "Hier sind Orte."}, True, None),
        ({2: "Hier sind Orte."}, False, "lost number"),
        ({0: GOOD[0] + " und so weiter" * 40}, True, "length ratio"),
        ({2: "25."}, False, "length ratio"),
        ({2: "sehr " * 12}, True, "loop"),
        ({2: "かな" * 12}, True, "loop"),
        ({2: "Ja. " + "-" * 80}, True, None),
        ({2: GOOD[0].replace(" ", "\n")}, True, "answer repeats the question"),
        ({2: GOOD[0].upper()}, True, None),   # as it may have been asked to
        ({2: GOOD[0].replace(",", "")}, True, None),
    ],
)
def test_filters(changed, generated, reason):
    record = Instruction("List 25 near places, see https://a.org/x and {name}.", "", "Here are 25 places nearby.")
    made = tuple(changed.get(i, text) for i, text in enumerate(GOOD))
    assert fault(record, made, generated) == reason


@pytest.mark.parametrize("changed, generated, reason", [
    ({}, True, None),
    ({1: " "}, True, "empty"),
    ({1: "Rom, Paris und andere im weiten Tal"}, True, "lost number"),
    ({2: "Rom, Paris und 40 andere im weiten Tal"}, True, "answer repeats the question"),
    ({2: "Rom, Paris und 40 andere im weiten Tal"}, False, None),   # as the original may
    ({2: "Nenne die Städte."}, True, None),
])
def test_filters_of_an_input(changed, generated, reason):
    record = Instruction("Name the towns.", "Rome, Paris and 40 others in the wide valley", "Rome, Paris and 40 others")
    made = ("Nenne die Städte.", "Rom, Paris und 40 andere im weiten Tal", "Rom, Paris und 40 andere")
    assert fault(record, tuple(changed.get(i, text) for i, text in enumerate(made)), generated) == reason


def test_what_the_original_has_already():
    refusal = Instruction("Open it.", "", "I'm sorry, but I can't help with that.")
    assert fault(refusal, ("Öffne es.", "", "Es tut mir leid, das kann ich nicht."), False) == "refusal"
    assert fault(refusal, ("Öffne es.", "", "Es ist offen."), True) is None   # another answer is written
    laughing = Instruction("Laugh.", "ha " * 9, "No.")
    assert fault(laughing, ("Lache.", "ho " * 9, "Nein."), True) is None


@pytest.mark.parametrize("source, target, reason", [
    ("See https://a.org/x for it.", "请看网页https://a.org/x的内容", None),
    ("See https://a.org/x.", "https://a.org/x\u0964", None),   # Hindi's full stop
    ("See https://a.org/x.", "ดูที่https://a.org/xนะ", None),
    ("See (https://a.org/x?y=1&z=2).", "（https://a.org/x?y=1&z=2）を見て。", None),
    ("See https://a.org/x.", "看https://a.org/y的内容", "lost placeholder, URL or code"),
    ("Go to www.a.org, tell me.", "去www.a.org告诉我", None),
    ("Go to www.a.org, tell me.", "去www.b.org告诉我", "lost placeholder, URL or code"),
    ("Say %s now.", "说%s已经", None),
    ("Say %s now.", "说%so已经", "lost placeholder, URL or code"),
    ("It has 1,000 towns.", "Elle a 1 000 villes.", None),
    ("It has 1,000 towns.", "Есть 1\u00a0000 городов.", None),
    ("It has 1,000,000 towns.", "इसमें १०,००,००० नगर हैं।", None),
    ("It has 1,000 towns.", "它有１０００个镇", None),
    ("It has 1,000 towns.", "Es hat 100 oder 10 000 Städte.", "lost number"),
    ("It costs 50,000 yen.", "5万円かかります。", None),
    ("It has 100,000 people and 2.4 million cars.", "有10万人和240万辆汽车。", None),
    ("Meet on 2023-01-05.", "2023年1月5日に会う。", None),
    ("It costs 50,000 yen.", "6万円かかります。", "lost number"),
    ("It costs 50,000 yen.", "Es kostet 5 Yen.", "lost number"),
    ("It has 15,300 people and 125,000 trees.", "人口は1万5300人、木は12万5000本です。", None),
    ("It has 15,300 people.", "人口は1万5200人です。", "lost number"),
    ("It earned 150 million dollars in 5 days.", "그 회사는 5일에 1억 5000만 달러를 벌었다.", None),
    ("It earned 50,000,000 won.", "5천만 원을 벌었다.", None),
    ("It earned 53,000,000 won.", "5천만 원을 벌었다.", "lost number"),
    ("Name a 20th-century painter.", "Nombra un pintor del siglo XX.", None),
    ("Compare the 18th and the 19th century.", "Compara los siglos XVIII y XIX.", None),
    ("Name the 20th president.", "Nombra al presidente.", "lost number"),
    ("Name a song of the 1980s.", "Citez une chanson des années 80.", None),
    ("Name a song of the 80s.", "1980年代の歌を一つ挙げてください。", None),
    ("Name a song of the 1980s.", "Citez une chanson des années 90.", "lost number"),
    ("Fill in: the sky is ____.", "Fülle aus: Der Himmel ist _____.", None),
    ("Fill in: the sky is ____.", "Fülle aus: Der Himmel ist blau.", "lost placeholder, URL or code"),
    ("Apple, Google, Microsoft, Amazon, Toyota", "Apple, Google, Microsoft, Amazon, Toyota", None),
    ("Who wrote the book Pride and Prejudice?", "Who wrote the book Pride and Prejudice?", "untranslated"),
    ("Day 1: Arrive in Rome. Visit the Colosseum and the Forum.",
     "Day 1: Arrive in Rome. Visit the Colosseum and the Forum.", "untranslated"),
    ("Python: `for each in numbers: print(each)`", "Python: `for each in numbers: print(each)`", None),
    ("Take 10, 20 or 30.", "取10,20或30", None),
    ("Take 10,20,30 away.", "Nimm 10, 20, 30 weg.", None),
])
def test_what_scripts_write_differently(source, target, reason):
    code = ("kor" if any("가" <= c <= "힣" for c in target) else "jpn" if any("ぁ" <= c <= "ヿ" for c in target) else
            "zho_simpl" if any("一" <= c <= "鿿" for c in target) else "deu")
    assert fault(Instruction(source, "", "y"), (target, "", "y"), True, code) == reason


@pytest.mark.parametrize("text, refuses", [
    ("I'm sorry, but I can't help with that.", True), ("Sorry, I cannot do that.", True),
    ("I am unable to view images.", True), ("I'm not able to browse the internet.", True),
    ("As an AI model trains on more data, it improves.", False),
    ("I apologize, but I am unable to say.", True), ("As an AI language model, I have no taste.", True),
    ("As an AI, I have none.", True), ("I cannot assist you there.", True), ("I'm not able to provide it.", True),
    ("As an AI language model I don't have one.", True), ("I can not help with that.", True),
    ("I'm sorry, but as an AI I have none.", True), ("I am unable to attend the meeting tomorrow.", False),
    ("I'm sorry if I snapped at you.", False), ("I'm sorry it is raining, stay in.", False),
    ("I'm sorry I'm late.", False), ("Sorry, I am busy.", False), ("I can't help falling in love with you.", False),
    ("As an AI engineer, I design networks.", False), ("I apologize, but it was late.", False),
])
def test_refusals_are_not_ordinary_regrets(text, refuses):
    assert refusals.refuses(text, "deu") == refuses


def test_what_a_translation_keeps():
    assert filters.numbers("1,234.50 or 1.234,50 or 1 7 and १२३") == {"123450", "123"}
    assert filters.VERBATIM.findall("a %s b <br> `x = 1` ```py\nprint()\n``` {0} ____ www.a.org") == [
        "%s", "<br>", "`x = 1`", "```py\nprint()\n```", "{0}", "___", "www.a.org"]
    assert filters.spaced("x  <\ny") == "x < y" != filters.spaced("x > y")


def test_no_text_takes_the_rules_long():   # a quadratic one would take hours
    for text in ("a" * 100_000, "ab " * 50_000, "```" * 30_000, "{" * 100_000, "1," * 50_000, "5" + "万" * 50_000):
        fault(Instruction("x" * 9, "", "1,000"), ("x", "", text), False)
        refusals.refuses(text, "deu"), filters.repeats(text), filters.english_part(text, "hin"), filters.copied(text, text)


def test_wrong_language():
    wrong = filters.wrong_language
    assert wrong("Dies ist ein Satz in deutscher Sprache über das Wetter.", "deu") is None
    assert wrong("Dies ist ein Satz in deutscher Sprache über das Wetter.", "fra") == "wrong language"
    assert (
        wrong("This is plainly an English sentence about the weather.", "umb") == "wrong language"
    )  # which it does not know
    assert wrong("Paris", "deu") is None  # too short to tell
    assert wrong("This is one sentence.", "deu") is None and wrong("This is one sentence.", "kor") == "wrong language"
    code = "def area(width, height):\n    return width * height  # of the whole rectangle"
    assert wrong(code, "deu") and wrong(f"```python\n{code}\n```", "deu") is None
    assert wrong(f"Diese Funktion berechnet die Fläche:\n```python\n{code * 5}\n```", "deu") is None
    assert wrong("Ovo je rečenica na hrvatskom jeziku o današnjem vremenu.", "bos") is None  # a close relative


# -- refusals in 30 languages


@pytest.mark.parametrize("code", ["eng", *FEEDBACK_LANGUAGES])
def test_refusals_of_a_language_are_seen(code):
    known = [text for each, text in REFUSALS if each == code]
    assert len(known) >= 7 and [text for text in known if not refusals.refuses(text, code)] == []
    for text in known:  # whatever the writer does with accents, points and case, and in a greeting's or quote's wake
        assert refusals.refuses(refusals.plain(text), code) and refusals.refuses(f"«{text.upper()}»", code)
        assert filters.unfit(text, code) == "refusal"


def test_refusals_in_english_count_in_every_language_and_others_only_in_their_own():
    assert all(refusals.refuses("I'm sorry, but I can't help with that.", code) for code in ("eng", "deu", "umb"))
    assert not refusals.refuses("Lo siento, pero no puedo ayudarte con eso.", "umb")
    record = Instruction("Open it.", "", "It is open.")
    assert fault(record, ("Ábrelo.", "", "Lo siento, pero no puedo ayudarte con eso."), True, "spa") == "refusal"


@pytest.mark.parametrize("code", FEEDBACK_LANGUAGES)
def test_ordinary_texts_are_no_refusals(code, data):
    folders = [(data / "ntrex" / f"{code}.txt", -1), (data / "udhr" / f"{code}.tsv", 1)]
    texts = [line.split("\t")[column] for path, column in folders if path.exists()
             for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(refusals.refuses(text, code) for text in texts) <= 0.01 * len(texts)


# -- repetition, echoes, halves


SENTENCES = {
    "deu": "Der Fluss fließt durch das Tal und am alten Haus vorbei.",
    "hin": "नदी घाटी से होकर और पुराने घर के पास से बहती है।",
    "tam": "ஆறு பள்ளத்தாக்கு வழியாகவும் பழைய வீட்டைக் கடந்தும் பாய்கிறது.",
    "yor": "Odò náà ń ṣàn gba inú àfonífojì náà kọjá lẹ́bàá ilé àtijọ́.",
    "zho_simpl": "河水流过山谷，流过那座老房子，流过那座老桥。",
    "jpn": "川は谷を流れ、古い家のそばを流れていく。",
    "tha": "แม่น้ำไหลผ่านหุบเขาและผ่านบ้านหลังเก่า",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_what_goes_round_in_a_circle(code):
    sentence = SENTENCES[code]
    phrase = " ".join(sentence.split()[:4]) if sentence.count(" ") > 3 else sentence[:7]
    for separator in (" ", "\n", "\n2. "):
        assert filters.repeats(separator.join([sentence] * 6)) and not filters.repeats(separator.join([sentence] * 3))
        assert filters.repeats(sentence + separator.join([phrase] * 12))
    every = " ".join(SENTENCES.values())
    assert not filters.repeats(every) and filters.repeats(f"{every} {' '.join([sentence] * 6)} {every}")


def test_how_often_is_too_often():
    for piece, least in (("ja ", 8), ("哈", 8), ("かな", 6), ("tick tock ", 6)):
        assert not filters.repeats(piece * (least - 1)) and filters.repeats(piece * least)
    assert filters.repeats("ha" * 20) and not filters.repeats("Ja. " + "-" * 80) and not filters.repeats("1, 2, " * 30)
    assert filters.repeats("the end of the end of the road. " * 6)   # what repeats holds a repetition of its own


@pytest.mark.parametrize("code", SENTENCES)
def test_an_answer_that_is_the_question(code):
    record, question, said = Instruction("Name it.", "", "Ok."), SENTENCES[code], "answer repeats the question"
    assert fault(record, (question, "", question), True, code) == said
    assert fault(record, (question, "", f" {question.rstrip('.。।')}\n"), True, code) == said
    assert fault(record, (question, "", question + "?" + SENTENCES["deu"]), True, code) is None
    record, data = Instruction("Name it.", "abc", "Ok."), question[::-1]
    assert fault(record, (question, data, f"{question}\n{data}"), True, code) == said


@pytest.mark.parametrize("code", SENTENCES)
def test_half_of_it_in_english(code):
    english = "The river flows through the valley and past the old house that you can see from here."
    record, halves = Instruction("Where is it?", "", english), f"{SENTENCES[code]} {english[40:]}"
    assert fault(record, ("Wo?", "", halves), False, code) == "untranslated"
    assert fault(record, ("Wo?", "", halves), True, code) == "untranslated"   # copied, though it should be written anew
    wrong = filters.wrong_language
    assert wrong(f"{SENTENCES[code]} {english}", code) and wrong(f"{english} {SENTENCES[code]}", code)
    assert wrong(f"{SENTENCES[code] * 5} {english}", code) == "partly English" and wrong(SENTENCES[code], code) is None
    assert wrong(f"{SENTENCES[code] * 3} “The Lord of the Rings”", code) is None   # a title
    assert not filters.copied("He read the Lord of the Rings and slept.", f"{SENTENCES[code]} Lord of the Rings")


@pytest.mark.parametrize("code, whole", [
    ("deu", "Der Fluss fließt durch das Tal und an dem alten Haus vorbei, das man von hier aus sieht."),
    ("zho_simpl", "河水流过山谷，流过从这里可以看到的那座老房子。"),
    ("jpn", "川は谷を流れ、ここから見える古い家のそばを通り過ぎていきます。"),
])
def test_a_translation_that_was_cut(code, whole):
    english = "The river flows through the valley and past the old house that you can see from here."
    record = Instruction("Where?", "", english)
    assert fault(record, ("Wo?", "", whole), False, code) is None
    assert fault(record, ("Wo?", "", whole[:len(whole) // 3]), False, code) == "length ratio"
    assert fault(record, ("Wo?", "", whole + english[::-1] * 3), False, code) == "length ratio"


@pytest.mark.parametrize("source, target, code, reason", [
    ("The train leaves at 17:30.", "The kereta leaves pada 5.30 pm.", "ind", None),
    ("The shop opens at 10 am.", "Der Laden öffnet um zehn.", "deu", None),
    ("Winds of 85 miles per hour, waves as high as 20 feet.", "Wind mit 137 km/h, Wellen von sechs Metern.", "deu", None),
    ("3 to 15 inches of rain are expected.", "Es werden 75 bis 380 mm Regen erwartet.", "deu", None),
    ("More than 380,000 people live there.", "Žije tam více než 380 tisíc lidí.", "ces", None),
    ("A 13-year-old boy was hurt.", "Trzynastoletni chłopiec został ranny.", "pol", None),
    ("I'm 100 percent certain of it.", "Ich bin mir da völlig sicher.", "deu", None),
    ("There are 135 species.", "Irúfẹ́ ẹ̀yà márùndínlógóje ni ó wà.", "yor", None),
    ("There are 135 species.", "Es gibt viele Arten davon.", "deu", "lost number"),
    ("More than 380,000 people live there.", "Žije tam více než 38 tisíc lidí.", "ces", "lost number"),
    ("The room is 135 metres long.", "Der Raum ist 153 Meter lang.", "deu", "lost number"),
])
def test_numbers_that_are_told_otherwise(source, target, code, reason):
    assert fault(Instruction(source, "", "y"), (target, "", "y"), True, code) == reason


@pytest.mark.parametrize("code", "mri nso nya snd ckb wol".split())
def test_languages_that_one_identifier_does_not_know(code, data):
    wrong, folder = filters.wrong_language, data / "ntrex"
    texts = {each: (folder / f"{each}.txt").read_text(encoding="utf-8").splitlines()[:60] for each in
             {code, "spa", "swh", "urd", "ind", "zul", "tur"}}
    assert sum(wrong(text, code) is not None for text in texts.pop(code)) <= 4
    for other, lines in texts.items():
        assert sum(wrong(text, code) is None for text in lines) <= 6, other


def test_a_language_that_none_knows_is_not_another_scripts():
    wrong = filters.wrong_language
    assert wrong(SENTENCES["hin"] * 3, "umb") == "wrong language" and wrong(SENTENCES["yor"], "umb") is None


def test_without_an_identifier(monkeypatch):
    monkeypatch.setattr(filters.language_id, "identifier", lambda: None)
    with pytest.raises(UserError, match="py3langid"):
        filters.identifier()


# -- what `python -m bench.filters` measures, on fewer lines


@pytest.mark.parametrize("code", ["yor", "nob", "ful", "mal", "zho_simpl"])
def test_good_translations_pass_and_spoilt_ones_do_not(code, data):
    from bench import filters as bench
    english, lines, others = ((data / "ntrex" / f"{each}.txt").read_text(encoding="utf-8").splitlines()
                              for each in ("eng", code, "tur"))
    rows = range(10, 500, 10)
    refused = [i for i in rows if filters.fault(
        Instruction(english[i], "", english[i]), (lines[i], "", lines[i]), False, code)]
    assert len(refused) <= 0.08 * len(rows)   # four of the lines: 5 % and what chance does to so few
    passed = {}
    for i in rows:
        for kind, case in bench.spoilt(english, lines, others, i).items():
            passed[kind] = passed.get(kind, 0) + (filters.fault(*case, code) is None)
    most = {"half in English, generated": 0.4, "cut to a third": 0.15}
    assert {kind: count for kind, count in passed.items() if count > most.get(kind, 0.08) * len(rows)} == {}
