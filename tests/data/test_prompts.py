"""The Alpaca template word for word, and the request for a language in 31 languages."""

import pytest

from minixllm.data import prompts
from minixllm.data.records import Preference
from minixllm.errors import UserError
from minixllm.languages import FEEDBACK_LANGUAGES, LANGUAGES, find


def test_alpaca_word_for_word():
    assert prompts.alpaca("Add.", "1 and 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:")
    assert prompts.alpaca("Add {instruction} {0}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {instruction} {0}.\n\n### Response:")


def test_english_requests_name_every_language():
    assert prompts.request("zho_simpl") == "Please return the results in Chinese."
    assert prompts.request("Swahili", "English") == prompts.request("sw") == "Please return the results in Swahili."
    assert len({prompts.request(code) for code in LANGUAGES}) == 100


# names that other versions of CLDR than ours, babel 2.16 to 2.19, write differently
OTHER_NAMES = """
zho_simpl kir 吉尔吉斯语|tam jpn ஜாப்பனீஸ்|vie ita Tiếng Ý|hin ben बांग्ला|por hin hindi|ben kor কোরীয়|ben ita ইতালীয়
ben tur তুর্কি|ben kir কিরগিজ|ben mon মোঙ্গোলীয়|ben por পর্তুগিজ|ben fas ফারসি|amh pol ፖሊሽኛ|kor tur 터키어|ind est Esti
ind ces Cheska|yor ara Èdè Árábìkì|yor hye Èdè Ile Armenia|amh hin ሒንዱኛ|amh hye አርመናዊ|amh fin ፊኒሽ
yor zho_simpl Edè Ṣáínà
""".strip().replace("\n", "|").split("|")         # the last has lost an accent


def test_all_870_pairs_are_distinct_and_in_the_instructions_language():
    babel = pytest.importorskip("babel")
    for source in FEEDBACK_LANGUAGES:
        names = babel.Locale.parse(LANGUAGES[source].tag).languages
        requests = {target: prompts.request(target, source) for target in ["eng", *FEEDBACK_LANGUAGES]}
        assert len(set(requests.values())) == 31
        for target, request in requests.items():
            name = names[find(target).tag]
            assert name.casefold() in request.casefold() or f"{source} {target} {name}" in OTHER_NAMES
            assert "{" not in request and request == request.strip()


def test_requests_nobody_wrote():
    with pytest.raises(UserError, match="no request is written in Wolof"):
        prompts.request("deu", "wol")
    with pytest.raises(UserError, match="no German request names Wolof"):
        prompts.request("wol", "deu")
    with pytest.raises(UserError, match="unknown language 'Germann'.*german"):
        prompts.request("Germann")


def test_the_request_is_put_into_the_prompt_once():
    asked = "Nenne drei Farben. Bitte gib die Ergebnisse auf Chinesisch zurück."
    assert prompts.cross_lingual("Nenne drei Farben.", "zho_simpl", "deu") == asked
    assert prompts.cross_lingual(asked, "zho_simpl", "deu") == asked
    assert prompts.cross_lingual(f"{asked}\n", "zho_simpl", "deu") == f"{asked}\n"
    more = f"{asked} Das war ein Zitat."   # it asks for nothing
    assert prompts.cross_lingual(more, "zho_simpl", "deu") == f"{more} {asked[19:]}"


def test_braces_are_only_text():
    prompt = prompts.alpaca("Use {input}.", "{instruction}")
    assert "### Instruction:\nUse {input}.\n\n### Input:\n{instruction}\n\n" in prompt


def test_preference_prompts():
    def of(**fields):
        defaults = {"instruction": "Nenne.", "input": "x", "chosen": "", "rejected": ""}
        return prompts.preference(Preference(**defaults | fields))

    plain = prompts.alpaca("Nenne.", "x")
    assert of() == of(language="deu") == of(response_language="deu") == plain
    assert of(language="deu", response_language="de") == plain
    crossed = of(language="deu", response_language="fra")
    assert crossed == prompts.alpaca("Nenne. Bitte gib die Ergebnisse auf Französisch zurück.", "x")
    assert of(prompt="as it stands", language="deu", response_language="fra") == "as it stands"
