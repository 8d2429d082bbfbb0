"""The 100 languages of the instruction data, the 30 of the feedback data, and those that only a benchmark has.

Where each column of the table comes from:

- code: FLORES-101 (Goyal et al. 2022). Its 102 rows less English and Traditional Chinese are the 100 languages here;
  the paper names "100 languages covered in FLORES-101" and no list.
- tag: BCP-47, in the form Unicode CLDR uses (fil for Tagalog).
- English name: as FLORES-101 has it, shortened to what one would write in a sentence.
- own name: Unicode CLDR 47's name of the language in itself; for Umbundu, which CLDR lacks, the usual spelling.
- script: ISO 15924, as written in FLORES-101.
- tier: the classes of Joshi et al. 2020, "The State and Fate of Linguistic Diversity" (lang2tax): classes 5 and 4 are
  "high", 3 is "mid", 2 to 0 are "low". The paper publishes no list of its tiers.
"""

import difflib
from dataclasses import dataclass

from minixllm.errors import UserError


@dataclass(frozen=True)
class Language:
    code: str  # FLORES-101
    tag: str  # BCP-47
    name: str  # in English
    own_name: str
    script: str  # ISO 15924
    tier: str  # "high", "mid" or "low"


def _parse(table: str) -> dict[str, Language]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return {row[0]: Language(*row) for row in rows}


LANGUAGES = _parse("""
afr       | af  | Afrikaans            | Afrikaans          | Latn | mid
amh       | am  | Amharic              | አማርኛ               | Ethi | low
ara       | ar  | Arabic               | العربية            | Arab | high
hye       | hy  | Armenian             | հայերեն            | Armn | low
asm       | as  | Assamese             | অসমীয়া            | Beng | low
ast       | ast | Asturian             | asturianu          | Latn | low
azj       | az  | Azerbaijani          | azərbaycan         | Latn | low
bel       | be  | Belarusian           | беларуская         | Cyrl | mid
ben       | bn  | Bengali              | বাংলা              | Beng | mid
bos       | bs  | Bosnian              | bosanski           | Latn | mid
bul       | bg  | Bulgarian            | български          | Cyrl | mid
mya       | my  | Burmese              | မြန်မာ             | Mymr | low
cat       | ca  | Catalan              | català             | Latn | high
ceb       | ceb | Cebuano              | Cebuano            | Latn | mid
zho_simpl | zh  | Chinese              | 中文                 | Hans | high
hrv       | hr  | Croatian             | hrvatski           | Latn | high
ces       | cs  | Czech                | čeština            | Latn | high
dan       | da  | Danish               | dansk              | Latn | mid
nld       | nl  | Dutch                | Nederlands         | Latn | high
est       | et  | Estonian             | eesti              | Latn | mid
tgl       | fil | Tagalog              | Tagalog            | Latn | mid
fin       | fi  | Finnish              | suomi              | Latn | high
fra       | fr  | French               | français           | Latn | high
ful       | ff  | Fula                 | Pulaar             | Latn | low
glg       | gl  | Galician             | galego             | Latn | mid
lug       | lg  | Ganda                | Luganda            | Latn | low
kat       | ka  | Georgian             | ქართული            | Geor | mid
deu       | de  | German               | Deutsch            | Latn | high
ell       | el  | Greek                | Ελληνικά           | Grek | mid
guj       | gu  | Gujarati             | ગુજરાતી            | Gujr | low
hau       | ha  | Hausa                | Hausa              | Latn | low
heb       | he  | Hebrew               | עברית              | Hebr | mid
hin       | hi  | Hindi                | हिन्दी             | Deva | high
hun       | hu  | Hungarian            | magyar             | Latn | high
isl       | is  | Icelandic            | íslenska           | Latn | low
ibo       | ig  | Igbo                 | Igbo               | Latn | low
ind       | id  | Indonesian           | Bahasa Indonesia   | Latn | mid
gle       | ga  | Irish                | Gaeilge            | Latn | low
ita       | it  | Italian              | italiano           | Latn | high
jpn       | ja  | Japanese             | 日本語                | Jpan | high
jav       | jv  | Javanese             | Basa Jawa          | Latn | low
kea       | kea | Kabuverdianu         | kabuverdianu       | Latn | low
kam       | kam | Kamba                | Kikamba            | Latn | low
kan       | kn  | Kannada              | ಕನ್ನಡ              | Knda | low
kaz       | kk  | Kazakh               | қазақ тілі         | Cyrl | mid
khm       | km  | Khmer                | ខ្មែរ              | Khmr | low
kor       | ko  | Korean               | 한국어                | Kore | high
kir       | ky  | Kyrgyz               | кыргызча           | Cyrl | low
lao       | lo  | Lao                  | ລາວ                | Laoo | low
lav       | lv  | Latvian              | latviešu           | Latn | mid
lin       | ln  | Lingala              | lingála            | Latn | low
lit       | lt  | Lithuanian           | lietuvių           | Latn | mid
luo       | luo | Luo                  | Dholuo             | Latn | low
ltz       | lb  | Luxembourgish        | Lëtzebuergesch     | Latn | low
mkd       | mk  | Macedonian           | македонски         | Cyrl | low
msa       | ms  | Malay                | Bahasa Melayu      | Latn | mid
mal       | ml  | Malayalam            | മലയാളം             | Mlym | low
mlt       | mt  | Maltese              | Malti              | Latn | low
mri       | mi  | Maori                | Māori              | Latn | low
mar       | mr  | Marathi              | मराठी              | Deva | low
mon       | mn  | Mongolian            | монгол             | Cyrl | low
npi       | ne  | Nepali               | नेपाली             | Deva | low
nso       | nso | Northern Sotho       | Sesotho sa Leboa   | Latn | low
nob       | nb  | Norwegian            | norsk bokmål       | Latn | low
nya       | ny  | Nyanja               | Nyanja             | Latn | low
oci       | oc  | Occitan              | occitan            | Latn | low
ory       | or  | Odia                 | ଓଡ଼ିଆ              | Orya | low
orm       | om  | Oromo                | Oromoo             | Latn | low
pus       | ps  | Pashto               | پښتو               | Arab | low
fas       | fa  | Persian              | فارسی              | Arab | high
pol       | pl  | Polish               | polski             | Latn | high
por       | pt  | Portuguese           | português          | Latn | high
pan       | pa  | Punjabi              | ਪੰਜਾਬੀ             | Guru | low
ron       | ro  | Romanian             | română             | Latn | mid
rus       | ru  | Russian              | русский            | Cyrl | high
srp       | sr  | Serbian              | српски             | Cyrl | high
sna       | sn  | Shona                | chiShona           | Latn | low
snd       | sd  | Sindhi               | سنڌي               | Arab | low
slk       | sk  | Slovak               | slovenčina         | Latn | mid
slv       | sl  | Slovenian            | slovenščina        | Latn | mid
som       | so  | Somali               | Soomaali           | Latn | low
ckb       | ckb | Central Kurdish      | کوردیی ناوەندی     | Arab | low
spa       | es  | Spanish              | español            | Latn | high
swh       | sw  | Swahili              | Kiswahili          | Latn | low
swe       | sv  | Swedish              | svenska            | Latn | high
tgk       | tg  | Tajik                | тоҷикӣ             | Cyrl | low
tam       | ta  | Tamil                | தமிழ்              | Taml | mid
tel       | te  | Telugu               | తెలుగు             | Telu | low
tha       | th  | Thai                 | ไทย                | Thai | mid
tur       | tr  | Turkish              | Türkçe             | Latn | high
ukr       | uk  | Ukrainian            | українська         | Cyrl | mid
umb       | umb | Umbundu              | Umbundu            | Latn | low
urd       | ur  | Urdu                 | اردو               | Arab | mid
uzb       | uz  | Uzbek                | o‘zbek             | Latn | mid
vie       | vi  | Vietnamese           | Tiếng Việt         | Latn | high
cym       | cy  | Welsh                | Cymraeg            | Latn | low
wol       | wo  | Wolof                | Wolof              | Latn | low
xho       | xh  | Xhosa                | IsiXhosa           | Latn | low
yor       | yo  | Yoruba               | Èdè Yorùbá         | Latn | low
zul       | zu  | Zulu                 | isiZulu            | Latn | low
""")

# Met in PAWS-X, XCOPA, FLORES-101 or XL-Sum, but not among the 100.
BENCHMARK_ONLY = _parse("""
eng      | en      | English             | English          | Latn | high
zho_trad | zh-Hant | Traditional Chinese | 繁體中文         | Hant | high
hat      | ht      | Haitian Creole      | Kreyòl ayisyen   | Latn | low
que      | qu      | Quechua             | Runasimi         | Latn | low
run      | rn      | Kirundi             | Ikirundi         | Latn | low
tir      | ti      | Tigrinya            | ትግርኛ            | Ethi | low
pcm      | pcm     | Nigerian Pidgin     | Naijíriá Píjin   | Latn | low
sin      | si      | Sinhala             | සිංහල            | Sinh | low
gla      | gd      | Scottish Gaelic     | Gàidhlig         | Latn | low
""")

_KNOWN = {key.lower(): language for language in [*BENCHMARK_ONLY.values(), *LANGUAGES.values()]
          for key in (language.code, language.tag, language.name)}

# The paper does not name its 30. Ours: every language of the 100 that PAWS-X, XCOPA or Self-Instruct* scores (21), so
# that each benchmark can show what feedback changes, and nine more that bring in further scripts and families.
FEEDBACK_LANGUAGES = (
    "deu spa fra jpn kor zho_simpl "  # PAWS-X
    "est ind ita swh tam tha tur vie "  # XCOPA
    "ara ces hin hye kir yor mon "  # Self-Instruct*
    "rus por ben urd fas ell pol fin amh"
).split()


# Those of the 100 that Google Cloud Translation's neural model did not offer when it had 133 languages (the list of May
# 2022, cloud.google.com/translate/docs/languages, which stood until the paper was written; it has grown since).
# NLLB-200 has them all.
NOT_ON_GOOGLE = "ast ful kam kea luo oci umb wol".split()
_GOOGLE_CODES = {"zho_simpl": "zh-CN", "zho_trad": "zh-TW", "nob": "no"}
# Where FLORES-200's codes, which NLLB uses, are not the FLORES-101 code and the script.
_FLORES200 = {"ara": "arb", "ful": "fuv", "lav": "lvs", "msa": "zsm", "mon": "khk", "orm": "gaz", "pus": "pbt",
              "fas": "pes", "uzb": "uzn", "zho_simpl": "zho", "zho_trad": "zho", "Kore": "Hang"}


def google_code(code: str) -> str | None:
    """Google Cloud Translation's code for English or one of the 100; None where it has none."""
    return None if code in NOT_ON_GOOGLE else _GOOGLE_CODES.get(code, find(code).tag)


def nllb_code(code: str) -> str:
    """NLLB's code: zho_Hans for zho_simpl."""
    script = find(code).script
    return f"{_FLORES200.get(code, code)}_{_FLORES200.get(script, script)}"


# What py3langid takes for each other in a tenth or more of news sentences, and what it always takes for something else.
RELATIVES = ({"bos", "hrv", "srp"}, {"ind", "msa"}, {"xho", "zul"})
UNRELIABLE = {"ckb", "nso"}
# Where its labels are not our tags; it knows Wu, Cantonese, Egyptian Arabic and Biblical Hebrew as well.
_LABELS = {"no": "nob", "tl": "fil", "fuv": "ful", "ku": "ckb", "zh": "zho_simpl", "wuu": "zho_simpl",
           "yue": "zho_simpl", "arz": "ara", "hbo": "heb"}


def identifier():
    """(is_in(text, FLORES code) -> whether it is in the language, the codes it can tell, its name), by py3langid.

    A close relative of a language passes for it. None where py3langid is not installed.
    """
    try:
        import py3langid
    except ImportError:
        return None
    from importlib.metadata import version
    codes = {label: find(_LABELS.get(label, label)).code for label, _ in py3langid.rank("")
             if _LABELS.get(label, label).lower() in _KNOWN}

    def is_in(text: str, code: str) -> bool:
        found = codes.get(py3langid.classify(text)[0])
        return found == code or any({found, code} <= relatives for relatives in RELATIVES)

    return is_in, set(codes.values()) - UNRELIABLE, f"py3langid-{version('py3langid')}"


def find(text: str) -> Language:
    """The language with this FLORES-101 code, BCP-47 tag or English name (in any case), benchmark-only ones included.

    Raises UserError naming the nearest spellings when there is none.
    """
    if (language := _KNOWN.get(text.lower())) is not None:
        return language
    near = difflib.get_close_matches(text.lower(), _KNOWN, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if "," in text and all(part.strip().lower() in _KNOWN for part in text.split(",")):
        hint = "; several are parted by spaces, not commas"
    raise UserError(f"unknown language {text!r}: expected a FLORES-101 code, a BCP-47 tag or an English name{hint}")
