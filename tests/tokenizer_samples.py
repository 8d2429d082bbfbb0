"""Texts in many scripts that tokenizers are compared on, and byte-level BPEs of every shape that is read."""

import json

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minixllm.tokenizers import byte_bpe

SENTENCES = """The quick brown fox doesn't jump over 1,234 lazy dogs; they've seen it, haven't they?
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Größe, Äpfel und 42 Bücher.
Všichni lidé se rodí svobodní a sobě rovní. Wszyscy ludzie rodzą się wolni i równi pod względem godności.
Все люди рождаются свободными и равными в своём достоинстве и правах. Усі люди народжуються вільними.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق، وقد وهبوا عقلاً وضميرًا.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३४
মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।
மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும் சமமானவர்கள்.
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ
មនុស្សទាំងអស់កើតមកមានសេរីភាព និងសមភាពក្នុងផ្នែកសេចក្តីថ្លៃថ្នូរ
የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው። እንደ ተፈጥሮ ማስተዋልና ሕሊና ስላለው
ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.
👩‍👩‍👧‍👦 🇫🇷 🦙.cpp 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ½ ² Ⅻ x\u0301y\u0323\u0307 \u200d\u00ad\tdef f(x):\n        return x  # 3.14\r\n\r\n""".split("\n")
HARD = ["", " ", "  ", "\n", "\n\n", "\t x", " leading", "double  space", "trailing ", "🦙 𓀀 é x\u0301", "<0x41>",
        "\x00", "a\r\nb", "</s><s><unk>", "Ω≈ç√∫", "  two spaces lead",
        "a   b    c", "▁x", "a▁b", "aaaaaa", "x </s> y", " </s>", "1  234,5"]

SHAPES = ["bloom", "gpt2", "llama3", "smollm2", "qwen2"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def train(shape: str, texts, path, vocab_size: int):
    """A tokenizer.json of that model's shape, made by `tokenizers` itself; returned with the oracle's switch set."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    oracle = tokenizers.Tokenizer(models.BPE(ignore_merges=shape == "llama3"))
    oracle.pre_tokenizer = {
        "bloom": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(byte_bpe.BLOOM), "isolated"), bytes_only]),
        "gpt2": gpt2,
        "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(byte_bpe.LLAMA3), "isolated"), bytes_only]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(byte_bpe.QWEN2), "isolated"), bytes_only]),
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
    }[shape]
    oracle.decoder = decoders.ByteLevel()
    if shape == "qwen2":
        oracle.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if shape == "smollm2":  # which lacks tokens for some control characters
        alphabet = [c for c in alphabet if c not in (byte_bpe.byte_alphabet()[4], byte_bpe.byte_alphabet()[0x13])]
    oracle.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False))
    if shape == "llama3":
        oracle.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])])
    elif shape == "bloom":
        oracle.post_processor = processors.ByteLevel(trim_offsets=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    oracle.save(str(path))
    (path.parent / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": "<pad>"}))
    oracle.encode_special_tokens = True
    return oracle
