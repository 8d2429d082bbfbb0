import pytest

from minixllm.errors import UserError
from minixllm.languages import BENCHMARK_ONLY, FEEDBACK_LANGUAGES, LANGUAGES, find


def test_there_are_a_hundred_languages_and_thirty_of_feedback():
    assert len(LANGUAGES) == 100 and "eng" not in LANGUAGES and "zho_trad" not in LANGUAGES
    assert len(FEEDBACK_LANGUAGES) == len(set(FEEDBACK_LANGUAGES)) == 30
    assert set(FEEDBACK_LANGUAGES) <= set(LANGUAGES)
    assert not set(BENCHMARK_ONLY) & set(LANGUAGES)


def test_no_two_languages_share_a_code_tag_or_name():
    for field in ("code", "tag", "name"):
        values = [getattr(language, field) for language in [*LANGUAGES.values(), *BENCHMARK_ONLY.values()]]
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


def test_languages_joined_by_a_comma():
    with pytest.raises(UserError, match="'deu,fra': .*parted by spaces, not commas"):
        find("deu,fra")


def test_the_nearest_language_is_suggested():
    with pytest.raises(UserError, match="'yorubaa'.*did you mean yoruba"):
        find("yorubaa")
