import pytest

from minixllm.errors import UserError
from minixllm.languages import BENCHMARK_ONLY, FEEDBACK_LANGUAGES, LANGUAGES, find, lookup


def test_there_are_a_hundred_languages_and_thirty_of_feedback():
    assert len(LANGUAGES) == 100 and "eng" not in LANGUAGES and "zho_trad" not in LANGUAGES
    assert len(FEEDBACK_LANGUAGES) == len(set(FEEDBACK_LANGUAGES)) == 30
    assert set(FEEDBACK_LANGUAGES) <= set(LANGUAGES)
    assert not set(BENCHMARK_ONLY) & set(LANGUAGES)


def test_no_two_languages_share_a_code_tag_or_name():
    for field in ("code", "tag", "name"):
        values = [getattr(language, field).lower() for language in [*LANGUAGES.values(), *BENCHMARK_ONLY.values()]]
        assert len(set(values)) == len(values), field
        assert all(values)


def test_columns_agree_with_cldr():
    """CLDR's own name, and the script its likely subtags give, for every language it has."""
    from babel import Locale, UnknownLocaleError
    from babel.core import get_global

    likely, checked = get_global("likely_subtags"), 0
    for language in LANGUAGES.values():
        try:
            locale = Locale.parse(language.tag)
        except UnknownLocaleError:
            assert language.code == "umb"
            continue
        if language.tag in likely:
            assert likely[language.tag].split("_")[1] == language.script, language.code
            checked += 1
        ours, theirs = language.own_name.lower(), locale.display_name.lower()  # in newer CLDR "Asụsụ Igbo"
        assert theirs in ours or (ours and ours in theirs.split()) or language.code == "tgl", language.code
    assert checked > 90


@pytest.mark.parametrize("text", ["yor", "yo", "Yoruba", "YORUBA"])
def test_a_language_is_found_by_code_tag_or_name(text):
    assert find(text) is LANGUAGES["yor"]


@pytest.mark.parametrize("code, spellings", [
    ("por", "pt-BR pt_br por-PT"), ("zho_simpl", "zh-CN cmn zho chi Mandarin cmn_Hans zh-Hans-TW chinese_simplified"),
    ("zho_trad", "zh-TW zh-Hant-HK cmn_Hant zho_Hant Chinese-(Traditional) chinese_traditional zho_trad"),
    ("eng", "en-US eng_Latn English en_GB"), ("spa", "es-419 es-MX Castilian español"), ("heb", "iw he-IL"),
    ("srp", "sr-Cyrl sr-Latn-RS serbian_latin serbian_cyrillic sh cnr"), ("nob", "no nor nb-NO Norwegian-Bokmål"),
    ("tgl", "tl fil Filipino tgl_Latn fil_Latn"), ("ara", "arb arb_Arab ar-EG"), ("msa", "zsm zsm_Latn may"),
    ("lav", "lvs lvs_Latn"), ("mon", "khk khk_Cyrl"), ("est", "ekk ekk_Latn"), ("fas", "Farsi prs pes_Arab"),
    ("ory", "Oriya ori ory_Orya"), ("mya", "Myanmar bur my-MM"), ("kor", "kor_Hang ko-KR"),
    ("hat", "Haitian Haitian-Creole"),
    ("ful", "fuv_Latn Fulfulde"), ("pus", "pbt_Arab"), ("orm", "gaz_Latn"), ("uzb", "uzn_Latn uz-Cyrl"),
    ("azj", "aze azj_Latn"), ("npi", "nep ne-NP"), ("swh", "swa swh_Latn swc"), ("que", "quy_Latn"),
    ("deu", "ger Deutsch"),
])
def test_one_language_under_all_its_tags_and_names(code, spellings):
    """Regions, scripts, macro-languages, retired codes, FLORES-200's and FLORES+'s codes, and words of file names."""
    for spelling in spellings.split():
        assert find(spelling).code == find(spelling.upper()).code == code, spelling


def test_what_names_no_language():
    for text in "- und yue yue_Hant nn nno tlh no_data is_test en-x xx-US en-USA pt-1".split() + [""]:
        assert lookup(text) is None, text


def test_only_what_the_table_lacks_is_left_of_a_tag():
    assert [lookup(text)[1] for text in ("pt-BR", "zh-Hans", "zh-Hant-TW", "serbian_latin", "serbian_cyrillic")] == [
        ("br",), (), (), ("latn",), ()]


def test_cldrs_aliases_are_resolved():
    """Every code that CLDR replaces by one of our tags, with whatever region it adds."""
    from babel.core import get_global

    tags, checked = {language.tag: language for language in [*LANGUAGES.values(), *BENCHMARK_ONLY.values()]}, 0
    for alias, replacement in get_global("language_aliases").items():
        language = tags.get(replacement.split("_")[0])
        if language:
            assert find(alias) is language, alias
            checked += 1
    assert checked > 130


def test_languages_joined_by_a_comma():
    with pytest.raises(UserError, match="'deu,fra': .*parted by spaces, not commas"):
        find("deu,fra")


def test_the_nearest_language_is_suggested():
    with pytest.raises(UserError, match="'yorubaa'.*did you mean yoruba"):
        find("yorubaa")
