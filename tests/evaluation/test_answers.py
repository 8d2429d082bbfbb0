"""The parsing of free answers: what a person would read in them, "cannot tell" included."""

import re
from pathlib import Path

import pytest

from minixllm.evaluation import answers, templates

TEMPLATES = templates.read_templates()
YES, NO, UNCLEAR = 0, 1, None


def words(code):
    own, english = TEMPLATES.get(("pawsx", code), {"yes": [], "no": []}), TEMPLATES["pawsx", "eng"]
    return tuple(tuple([*own[k], *english[k]]) for k in ("yes", "no"))


YES_NO = [
    ("eng", "Yes.", YES), ("eng", "no, because the dates differ", NO), ("eng", "YES", YES), ("eng", "**No**", NO),
    ("eng", "  \n\"Yes\"", YES), ("eng", "Yes or no", UNCLEAR), ("eng", "yes/no", UNCLEAR), ("eng", "", UNCLEAR),
    ("eng", "Both", UNCLEAR),
    ("eng", "Nobody knows.", UNCLEAR), ("eng", "I would say yes.", YES), ("eng", "The answer is no.", NO),
    ("eng", "maybe", UNCLEAR),
    ("eng", "It could be yes and it could be no", UNCLEAR), ("eng", "Please only return either yes or no.", UNCLEAR),
    ("eng", "Please only return either yes or no. No", NO), ("eng", "Yesterday", UNCLEAR), ("eng", "Know", UNCLEAR),
    ("eng", "Sentence1 paraphrases Sentence2", YES), ("eng", "- no", NO), ("eng", "yes yes yes", YES),
    ("eng", "No. Yes would be wrong.", NO),
    ("eng", "Ｙｅｓ", YES), ("eng", "### Response:", UNCLEAR), ("eng", "### Response: Yes", YES),
    ("eng", "No\n\n### Instruction:\nSay yes.", NO),
    ("eng", "Yes and no", UNCLEAR), ("eng", "Yes and no, it depends.", UNCLEAR), ("eng", "No idea.", UNCLEAR),
    ("deu", "Ja und nein", UNCLEAR), ("fra", "Oui et non.", UNCLEAR), ("spa", "Sí y no", UNCLEAR),
    ("jpn", "はいといいえ", UNCLEAR), ("kor", "네 그리고 아니요", UNCLEAR), ("zho_simpl", "是和否", UNCLEAR),
    ("spa", "No sé.", UNCLEAR), ("spa", "No lo sé", UNCLEAR), ("spa", "No estoy seguro", UNCLEAR),
    ("spa", "No se puede determinar.", UNCLEAR), ("spa", "No es posible saberlo", UNCLEAR),
    ("spa", "No, no se puede decir lo mismo", NO), ("spa", "No, sé que no", NO), ("spa", "Sí, y no lo dudo", YES),
    ("deu", "Ja, das stimmt.", YES), ("deu", "Nein", NO), ("deu", "ja oder nein", UNCLEAR),
    ("deu", "Januar", UNCLEAR), ("deu", "No.", NO),
    ("spa", "Sí.", YES), ("spa", "No, porque no es igual", NO), ("spa", "sí o no", UNCLEAR), ("spa", "Norte", UNCLEAR),
    ("fra", "Oui !", YES), ("fra", "Non, ce n'est pas le cas", NO), ("fra", "« Oui »", YES),
    ("fra", "oui ou non", UNCLEAR), ("fra", "ouïe", UNCLEAR),
    ("jpn", "はい", YES), ("jpn", "いいえ、違います。", NO), ("jpn", "「はい」", YES), ("jpn", "はいまたはいいえ", UNCLEAR),
    ("jpn", "わかりません", UNCLEAR),
    ("kor", "네, 맞습니다.", YES), ("kor", "아니요.", NO), ("kor", "예", YES), ("kor", "네 또는 아니요", UNCLEAR),
    ("kor", "동네", UNCLEAR),
    ("zho_simpl", "是的。", YES), ("zho_simpl", "不是", NO), ("zho_simpl", "否", NO), ("zho_simpl", "是或否", UNCLEAR),
    ("zho_simpl", "是否相同？", UNCLEAR),
    ("zho_simpl", "答案：是", YES), ("zho_simpl", "yes", YES), ("zho_simpl", "不知道", UNCLEAR),
    ("spa", "Si.", YES), ("spa", "Si, son iguales", YES), ("spa", "La respuesta es si", YES),
    ("spa", "Si la oración 1 cambia el orden, no es paráfrasis.", UNCLEAR), ("spa", "Depende: si cambia", UNCLEAR),
    ("jpn", "同じではいけない", UNCLEAR), ("jpn", "はいそうです", YES), ("jpn", "答えは「はい」です。", YES),
    ("kor", "네 문장은 다릅니다", UNCLEAR), ("kor", "네\n맞습니다", YES), ("kor", "예 하나", UNCLEAR), ("kor", "답: 네!", YES),
    ("zho_simpl", "两个句子的意思是不一样的。", UNCLEAR), ("zho_simpl", "句子1并非是句子2的改写。", NO),
    ("zho_simpl", "但是我不知道", UNCLEAR), ("zho_simpl", "是句子2的改写吗？", UNCLEAR), ("zho_simpl", "否定句", UNCLEAR),
    ("zho_simpl", "是，意思相同", YES), ("zho_simpl", "不是改写", NO), ("zho_simpl", "答案是：否。", NO),
    ("eng", "Yes and nothing differs.", YES), ("deu", "Ja und noch eine Anmerkung: gleich.", YES),
    ("fra", "Oui et notez que le sens est le même.", YES), ("spa", "Sí y nosotros lo confirmamos.", YES),
    ("eng", "There is no difference in meaning between the two sentences.", UNCLEAR),
    ("eng", "No difference in meaning.", UNCLEAR), ("eng", "Not", UNCLEAR), ("eng", "No. 10 Downing Street", UNCLEAR),
    ("eng", "Both sentences have the same meaning; no information is lost.", UNCLEAR),
    ("eng", "The answer is yes, no doubt about it.", YES), ("eng", "A no-brainer.", UNCLEAR),
    ("eng", "No Sentence1 does not paraphrase Sentence2", NO), ("eng", "No it does not", NO), ("eng", "no no no", NO),
    ("eng", "The answer is no because the dates differ", NO), ("eng", "So I say no", NO),
    ("spa", "No hay diferencia de significado.", UNCLEAR), ("spa", "No es una paráfrasis.", NO), ("spa", "Que no", NO),
    ("spa", "Es lo mismo, no cambia nada.", UNCLEAR), ("spa", "No lo es", NO), ("spa", "No, no hay paráfrasis", NO),
    ("eng", "No.\n1. The first sentence says so.\n2. The other not.", NO), ("eng", "No I don't think so", NO),
    ("eng", "No both sentences differ", NO), ("eng", "No there is a difference", NO),
    ("eng", "I would say no since they differ", NO), ("spa", "No tienen el mismo significado.", NO),
    ("spa", "No significan lo mismo", NO), ("spa", "No se trata de una paráfrasis", NO),
    ("spa", "No las dos oraciones difieren", NO), ("fra", "Non les deux phrases", NO),
    ("fra", "Non c'est différent", NO),
    ("fra", "Non ce n'est pas le cas", NO), ("fra", "Non seulement", UNCLEAR),
    ("eng", "No or yes", UNCLEAR), ("eng", "no/yes", UNCLEAR), ("deu", "nein oder ja", UNCLEAR),
    ("fra", "non ou oui", UNCLEAR), ("eng", "_Yes_", YES), ("eng", "__No__", NO), ("eng", "### Answer: No", NO),
    ("jpn", "「同じ」はいけません", UNCLEAR), ("deu", "Non il y a une différence", UNCLEAR),
]

PAIR = ("It was fragile.", "It was small.")
ITALIAN = ("Era delicato.", "Era piccolo.")
CHINESE = ("它很易碎。", "它很小。")
ARTICLES = ("A cat slept.", "A dog barked.")
THAI = ("เขาเห็นเสือ", "เขาเห็นเสื้อ")  # a tiger, a shirt: only the marks differ
NESTED = ("He ran.", "He ran away.")
A, B = 0, 1

OPTIONS = [
    (PAIR, "A", A), (PAIR, "-B:", B), (PAIR, "-A", A), (PAIR, "(B)", B), (PAIR, "[A]", A), (PAIR, "B.", B),
    (PAIR, "**B**", B), (PAIR, "A)", A),
    (PAIR, "A: It was fragile.", A), (PAIR, "-B: It was small.", B), (PAIR, "B It was small.", B),
    (PAIR, "A man dropped it.", UNCLEAR),
    (PAIR, "Both", UNCLEAR), (PAIR, "Neither of them", UNCLEAR), (PAIR, "A and B", UNCLEAR),
    (PAIR, "A or B", UNCLEAR), (PAIR, "A/B", UNCLEAR),
    (PAIR, "", UNCLEAR), (PAIR, "-A: It was fragile., -B: It was small.", UNCLEAR), (PAIR, "It was fragile.", A),
    (PAIR, "it was SMALL", B),
    (PAIR, "Because it was small, I think.", B), (PAIR, "The answer is B.", B),
    (PAIR, "The more plausible option is A", A), (PAIR, "Option B", B),
    (PAIR, "I would choose option A because B makes no sense.", A), (PAIR, "The correct option: (B)", B),
    (PAIR, "Choose A or B", UNCLEAR),
    (PAIR, "It was fragile. It was small. The answer is A", A), (PAIR, "Something else entirely", UNCLEAR),
    (PAIR, "C", UNCLEAR),
    (PAIR, "The more plausible one: -A.", A), (PAIR, "Ａ", A), (PAIR, "Ｂ：", B), (PAIR, "b", UNCLEAR),
    (PAIR, "\n\n-B\n", B), (PAIR, "B\nIt was small.", B),
    (PAIR, "A. Because B is not plausible.", A), (PAIR, "### Response:\nB", B),
    (PAIR, "A\n\n### Instruction:\nPick B.", A), (PAIR, "A, B", UNCLEAR),
    (PAIR, "B. It was small. The answer is a direct consequence.", B),
    (PAIR, "B is the more plausible option: a small object", B), (PAIR, "B, a small object", B),
    (PAIR, "The answer is a bit tricky, but B.", B), (PAIR, "I would pick a different one: B", B),
    (PAIR, "The correct answer is: -B", B), (PAIR, "the ANSWER IS: - B", B),
    (PAIR, "A is the better choice than B", A), (PAIR, "I pick A over B", A), (PAIR, "These are two: A, B", UNCLEAR),
    (ARTICLES, "The answer is A dog barked.", B), (ARTICLES, "Option A: A cat slept.", A),
    (ARTICLES, "A dog barked", B), (ARTICLES, "I pick A dog barked.", B),
    (ITALIAN, "Era delicato", A), (ITALIAN, "-B: Era piccolo", B), (ITALIAN, "B. Era piccolo", B),
    (ITALIAN, "A causa del vetro", UNCLEAR),
    (CHINESE, "它很易碎", A), (CHINESE, "B：它很小。", B), (CHINESE, "选A。", A), (CHINESE, "-A: 它很易碎。，-B: 它很小。", UNCLEAR),
    (CHINESE, "(A)", A),
    (PAIR, "Option A is more plausible than option B.", A), (PAIR, "B is more likely than A.", B),
    (PAIR, "I would choose option A over option B.", A), (PAIR, "Option B, not option A.", B),
    (PAIR, "I'd go with A instead of B.", A), (PAIR, "The answer is not A.", UNCLEAR),
    (PAIR, "The answer is either A or B.", UNCLEAR), (PAIR, "I cannot choose between A and B.", UNCLEAR),
    (PAIR, "Option A and option B are alike.", UNCLEAR), (PAIR, "It is (A) or (B).", UNCLEAR),
    (PAIR, '"A"', A), (PAIR, "‘B’", B), (PAIR, "`A`", A), (PAIR, "_B_", B), (PAIR, "A!", A), (PAIR, "A;", A),
    (CHINESE, "A。", A), (CHINESE, "B、它很小", B),
    (PAIR, "Help me pick the more plausible option: -A: It was fragile., -B: It was small..", UNCLEAR),
    (PAIR, "Option A is wrong.", UNCLEAR), (PAIR, "Option A is incorrect.", UNCLEAR),
    (PAIR, "Option A is less plausible.", B), (PAIR, "Option A makes no sense, so B.", B),
    (PAIR, "I would not choose A. B.", B), (PAIR, "I would not choose option A", UNCLEAR),
    (PAIR, "I wouldn't pick A.", UNCLEAR), (PAIR, "Option A isn't plausible. Option B is.", B),
    (PAIR, "The answer is B because A is less likely.", B), (PAIR, "I choose A not B", A),
    (PAIR, "Option A does not fit, option B does.", B), (PAIR, "Option A, as B is wrong", A),
    (CHINESE, "选项B更合理", B), (CHINESE, "答案是B", B), (CHINESE, "选择B。", B), (CHINESE, "答案是选项A，因为它易碎", A),
    (CHINESE, "选项A不合理", UNCLEAR), (CHINESE, "不选A，选B", B), (CHINESE, "选项A比B更合理。", A), (CHINESE, "选择A或B", UNCLEAR),
    (CHINESE, "更合理的选项：-A: 它很易碎。，-B: 它很小。", UNCLEAR), (CHINESE, "选A还是B", UNCLEAR),
    (CHINESE, "更合理的选项：-A: 它很易碎。，-B: 它很小。答案是B", B), (CHINESE, "选项A是错的", UNCLEAR),
    (PAIR, "Cevap A değildir.", UNCLEAR), (PAIR, "Seçenek A mantıklı değil", UNCLEAR), (PAIR, "Cevap: A değil, B", B),
    (PAIR, "Opsyon A pa bon, B bon", B), (PAIR, "Chaguo A si sahihi", UNCLEAR), (PAIR, "விருப்பம் A தவறு", UNCLEAR),
    (PAIR, "பதில் A அல்ல, B", B), (PAIR, "Answer: A\n\nNot much is known", A),
    (PAIR, "Answer: A) Not sure, but it seems so", UNCLEAR), (PAIR, "Lựa chọn B", B),
    (PAIR, "Đáp án là A.", A), (PAIR, "Phương án A không hợp lý", UNCLEAR),
    (PAIR, "Opsi B lebih masuk akal", B), (PAIR, "Jawabannya adalah A", A), (PAIR, "Opsi A kurang masuk akal", UNCLEAR),
    (PAIR, "Opsi A lebih masuk akal daripada opsi B", A), (PAIR, "ตัวเลือก B", B), (PAIR, "คำตอบคือ B", B),
    (PAIR, "ข้อ Bเป็นไปได้", B), (PAIR, "ไม่เลือก A", UNCLEAR), (PAIR, "ตัวเลือก A หรือ B", UNCLEAR),
    (PAIR, "Vastus on B", B), (PAIR, "Variant A on vale", UNCLEAR), (PAIR, "Opsyon B", B), (PAIR, "Jibu ni B", B),
    (PAIR, "Chaguo A", A), (PAIR, "B seçeneği daha mantıklı", B), (PAIR, "Cevap: A", A),
    (PAIR, "Seçenek A veya B", UNCLEAR), (PAIR, "விருப்பம் B", B), (PAIR, "பதில்: A", A),
    (ITALIAN, "Opzione B", B), (ITALIAN, "La risposta è A", A),
    (ITALIAN, "Opzione A non è plausibile", UNCLEAR), (ITALIAN, "B è più plausibile dell'opzione A", B),
    (ITALIAN, "L'opzione più plausibile è B", B), (ITALIAN, "L'opzione migliore è la B, perché", B),
    (PAIR, "Opsi yang lebih masuk akal adalah -A", A), (PAIR, "Opsyon ki pi posib la se A.", A),
    (PAIR, "Chaguo linalowezekana zaidi ni B", B), (PAIR, "ตัวเลือกที่เป็นไปได้มากกว่าคือ B", B),
    (PAIR, "Phương án hợp lý hơn là B", B), (PAIR, "Variant B on usutavam kui variant A", B),
    (PAIR, "A seçeneği B seçeneğinden daha olasıdır.", A), (PAIR, "A seems more plausible.", A),
    (CHINESE, "B更合理", B), (CHINESE, "我认为A更合理，因为B不合理。", A), (CHINESE, "B比A更可能", B), (CHINESE, "选B而不是A", B),
    (PAIR, "เลือก B ไม่ใช่ A", B), (PAIR, "It is A, I think.", A), (PAIR, "A is B", UNCLEAR),
    (PAIR, "The less plausible option is A", B), (ITALIAN, "L'opzione meno plausibile è A", B),
    (PAIR, "Opsi yang kurang masuk akal adalah A", UNCLEAR), (CHINESE, "更不合理的是A", B),
    (PAIR, "ตัวเลือกที่เป็นไปได้น้อยกว่าคือ A", B), (ITALIAN, "La risposta non è A", UNCLEAR),
    (NESTED, "He ran away.", B), (NESTED, "He ran.", A), (NESTED, "He ran. He ran away.", UNCLEAR),
    (NESTED[::-1], "He ran away.", A), (NESTED[::-1], "He ran.", B), (NESTED[::-1], "He ran away. He ran.", UNCLEAR),
    (THAI, "เขาเห็นเสื้อ", B), (THAI, "เขาเห็นเสือ", A), (PAIR, "A It was small.", UNCLEAR),
    (PAIR, "B, A", UNCLEAR), (PAIR, "B and A", UNCLEAR), (PAIR, "I think B is best", B),
    (PAIR, "So A is the best one.", A), (PAIR, "I'd go with [B] here", B), (CHINESE, "我想应该是那个A。", A),
    (("易碎！", "很小！"), "更合理的选项：-A: 易碎！，-B: 很小！。答案是B", B),
]


@pytest.mark.parametrize("code, raw, said", YES_NO)
def test_yes_no(code, raw, said):
    assert answers.yes_no(answers.clean(raw), words(code), code) == said


def test_words_of_a_template_may_be_capitals():
    for raw, said in (("yes", YES), ("STRASSE", YES), ("I say NO.", NO)):
        assert answers.yes_no(raw, (("Yes", "Straße"), ("No",))) == said


@pytest.mark.parametrize("code", ["eng", "deu", "spa", "fra", "jpn", "kor", "zho_simpl"])
def test_news_says_neither(data, code):
    sentences = (data / f"ntrex/{code}.txt").read_text(encoding="utf-8").splitlines()
    read = [text for text in sentences if answers.yes_no(answers.clean(text), words(code), code) is not None]
    assert len(sentences) >= 500 and len(read) <= 5, read


@pytest.mark.parametrize("choices, raw, said", OPTIONS)
def test_options(choices, raw, said):
    assert answers.option(answers.clean(raw), choices) == said   # the words tell the language


TEXTS = {"eng": ("The dog barked.", "The cat slept."), "zho_simpl": ("他关掉了电视。", "他打开了门。"),
         "ita": ("Ha spento la televisione.", "Ha aperto la porta."), "tur": ("Televizyonu kapattı.", "Kapıyı açtı."),
         "vie": ("Anh ấy tắt tivi.", "Anh ấy mở cửa."), "tha": ("เขาปิดโทรทัศน์", "เขาเปิดประตู"),
         "tam": ("அவர் தொலைக்காட்சியை அணைத்தார்.", "அவர் கதவைத் திறந்தார்."),
         "swh": ("Alizima runinga.", "Alifungua mlango."),
         "que": ("Payqa televisionta wañuchirqan.", "Payqa punkuta kicharqan."),
         "ind": ("Dia mematikan televisi.", "Dia membuka pintu."),
         "hat": ("Li fèmen televizyon an.", "Li louvri pòt la."),
         "est": ("Ta lülitas teleri välja.", "Ta avas ukse.")}


def test_no_answer_is_misread_and_nineteen_in_twenty_of_the_clear_ones_are_read():
    lines = Path(__file__).with_name("answers.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line[0] != "#"]
    wrong, unread = [], []
    for task, code, raw, said in rows:
        answer = answers.clean(re.sub(r"\\n(?!ot)", "\n", raw))
        if task == "yes_no":
            found = {None: "-", YES: "yes", NO: "no"}[answers.yes_no(answer, words(code), code)]
        else:
            found = {None: "-", A: "A", B: "B"}[answers.option(answer, TEXTS[code], code)]
        if found != said:
            (unread if found == "-" else wrong).append((code, raw, said, found))
    assert not wrong
    assert len(unread) <= sum(row[3] != "-" for row in rows) / 20, unread
    assert {row[1] for row in rows} == set(answers.WORDS) == set(TEXTS) | {"deu", "spa", "fra", "jpn", "kor"}


@pytest.mark.parametrize("text", ["A ", "-", "A,", "A or B ", "more ", "A 'A' (A) ", "\n", "the dog barked ", "是",
                                  "no ",
                                  "than ", "answer ", "*", "<think>", "not ", "A", " ", "A: ", "<", "{\\boxed"])
def test_an_answer_of_one_thing_repeated_is_read_at_once(text):
    """No rule takes time that grows faster than its text: it would not end here."""
    for code in ("eng", "zho_simpl", "tur"):
        answers.option(answers.clean(text * 2000), TEXTS["eng"], code)
        answers.yes_no(answers.clean(text * 2000), words("eng"), code)


def test_reasoning_and_markup_are_stripped():
    for raw in ("<think>B? No, A.</think>\n\nB", "<answer>B</answer>", "```\nB\n```", "> B", r"\boxed{\text{B}}"):
        assert answers.option(answers.clean(raw), TEXTS["eng"]) == B
    assert answers.option(answers.clean("<think>It is A"), TEXTS["eng"]) is None


def test_an_echoed_prompt_says_nothing():
    prompt = "Below is ...\n\n### Instruction:\nPlease only return either yes or no.\n\n### Response:"
    assert answers.clean(prompt + " No", prompt) == "No"
    assert answers.clean(prompt, prompt) == ""
    assert answers.yes_no(answers.clean(prompt, prompt), words("eng")) is None
    for headed in ("### Summary\nThe mayor resigned.", "The steps:\n\n### Step 1\nMix."):
        assert answers.clean(headed) == answers.clean(headed + "\n\n### Input:\nMore.") == headed
    assert answers.clean("plain text\nof two lines") == "plain text\nof two lines"
    assert answers.clean(f"Sure.\n{prompt} maybe\n{prompt} No", prompt) == "No"               # the last is answered
    assert answers.clean("### Instruction:\nSay yes.") == answers.clean("### Input:\nYes.") == ""


def test_an_answer_is_read_to_its_2000th_character():
    for end, said in (("yes", YES), ("no.", NO)):
        assert answers.yes_no("x " * 998 + end, words("eng")) == said
        assert answers.yes_no("x " * 1000 + end, words("eng")) is None
        assert answers.yes_no(end + " x" * 1000 + " yes no", words("eng")) == said
    for letter, said in (("A", A), ("B", B)):
        assert answers.option("x " * 990 + f"option {letter}", PAIR) == said
        assert answers.option("x " * 1000 + f"option {letter}", PAIR) is None
        assert answers.option(f"option {letter}" + " x" * 1000 + " option A option B", PAIR) == said
