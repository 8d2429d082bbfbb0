"""What the reply of a chat endpoint is worth: why it ended, its text, and the markup that models leave in it.

Replies become training data. A model that learns from half an answer learns to stop in mid-sentence, and one that
learns from stray markup writes it. So what is whole is cut out, and what is not leaves the record out.
"""

import re


class Failure(Exception):
    """A request got no answer. again: it may get one later, not before `after` seconds where the server said so.

    used: what it cost. None: perhaps all that it could, for the service may have worked for it.
    """

    def __init__(self, reason: str, again: bool = True, after: float | None = None, used: dict | None = None):
        super().__init__(reason)
        self.again, self.after, self.used = again, after, used


class LeftOut(Failure):
    """There is nothing to learn from. The reason says why, in words that can be counted; `example` holds such texts.

    lasting: the service would answer the same again. A refusal may be decided otherwise another day.
    """

    def __init__(self, reason: str, *example: str, lasting: bool = True, used: dict | None = None):
        super().__init__(reason, again=False, used=used)
        self.example, self.lasting = [text[:200] for text in example], lasting


# The only reasons with which an answer is whole; some servers give none. In lower case, for Gemini says STOP.
FINISHED = "stop", "eos", "end_turn", ""
# The server, or the way to the model behind it, broke off; DeepSeek's word for overload is in it.
BROKEN = re.compile("(?:.*_)?error|abort(?:ed)?|.*(?:network|time_?out|cancel|unavailable|overload|system_resource).*")


def read(reply: dict, asked: str) -> tuple[str, bool]:
    """(the text of a chat completion, whether markup was cut out of it).

    asked: the prompt, whose own markup may be spoken of. Raises Failure for what broke off, LeftOut for what is not
    whole, and KeyError, TypeError, IndexError or AttributeError for what is no chat completion.
    """
    choice = {"message": {}} if reply.get("error") else reply["choices"][0]
    message = choice["message"]
    error = reply.get("error") or choice.get("error") or message.get("error")
    reason = choice.get("finish_reason") or ""
    if error or BROKEN.fullmatch(reason.lower()):
        raise Failure(f"the server broke off: {error or reason}")
    if reason.lower() not in FINISHED:
        raise LeftOut(f"finish reason {reason}", lasting=reason in ("length", "max_tokens", "MAX_TOKENS"))
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):  # of parts: thoughts, text, a refusal
        refusal = refusal or any(part.get("type") == "refusal" for part in content)
        content = "".join(part["text"] for part in content if part.get("type", "text") in ("text", "output_text"))
    if refusal:
        raise LeftOut("refused by the service", lasting=False)
    return without_markup((content or "").strip(), asked)  # null: it answered nothing


# What opens and closes a model's thoughts, in the spellings of DeepSeek, Mistral, Kimi, Seed, Cohere, Gemma and others.
_NAME = r"(?i:(?:\w{1,9}:)?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad))"
_CAPITALS = "(?:THINK|THINKING|THOUGHT|REASONING)"
_OPENING = rf"(?<!`)(?:<{_NAME}>|\[{_CAPITALS}\]|◁{_NAME}▷|<\|(?i:begin_of_|start_)?{_NAME}\|>|<\|channel>\w*)"
_CLOSING = rf"(?<!`)(?:</{_NAME}>|\[/{_CAPITALS}\]|◁/{_NAME}▷|<\|(?:/|(?i:end_of_|end_)){_NAME}\|>|<channel\|>)"
OPENING, CLOSING = re.compile(_OPENING), re.compile(_CLOSING)
# gpt-oss speaks on channels; some servers drop the control tokens around their names and leave the names.
FINAL = re.compile(r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)"
                   r"(?=<\|(?:end|return|start|channel)\|>|\Z)"
                   r"|\A(?:analysis|commentary)(?=\W|[A-Z]).*?assistantfinal(.*)", re.DOTALL)
CHANNELS = re.compile(r"<\|channel\|>|\A(?:analysis|commentary)(?=[A-Z])|assistantfinal")
# The control tokens of chat templates: <|eot_id|>, <|im_end|>, <end_of_turn>, </s>, [/INST] and their like.
CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</?s>|<(?:start|end)_of_turn>|<[be]os>|\[/?INST\]|<</?SYS>>")
SPEAKER = re.compile(r"(?:assistant|model)(?=\n|<)")  # behind a control token at the start


def without_markup(text: str, asked: str) -> tuple[str, bool]:
    """(the text without its thoughts and without control tokens at its ends, whether there were any).

    Raises LeftOut where thoughts do not end, or a control token stands in the middle: there somebody else speaks.
    """
    # Most answers have none of this, and the expressions above are slow: 1 ms for 4,000 characters.
    if not any(sign in text for sign in ("<", "[", "◁", "assistantfinal")) and not CHANNELS.match(text):
        return text, False
    plain = _without_control_tokens(_without_thoughts(_final_channel(text), asked), asked)
    if text and not plain:
        raise LeftOut("nothing but thoughts and markup")
    return plain, plain != text


def _final_channel(text: str) -> str:
    if not CHANNELS.search(text):
        return text
    finals = [first or second for first, second in FINAL.findall(text)]
    if len(finals) != 1:
        raise LeftOut("channels without one final answer")
    return finals[0].strip()


def _without_thoughts(text: str, asked: str) -> str:
    while start := OPENING.match(text):  # at the start these are no words of the answer, whatever was asked
        if not (end := CLOSING.search(text, start.end())):
            raise LeftOut("thoughts without an end")
        text = text[end.end():].strip()
    if OPENING.search(asked) or CLOSING.search(asked):
        return text
    pieces, position = [], 0
    while start := OPENING.search(text, position):
        if not (end := CLOSING.search(text, start.end())):
            raise LeftOut("thoughts without an end")
        pieces.append(text[position:start.start()])
        position = end.end()
    text = "".join([*pieces, text[position:]])
    before, *behind = CLOSING.split(text)
    if len(behind) > 1:
        raise LeftOut("thoughts without a start")
    return (behind or [before])[0].strip()  # the template itself may have opened the thoughts


def _without_control_tokens(text: str, asked: str) -> str:
    def control(match) -> bool:
        if not match or match[0] in asked:
            return False
        # HTML strikes out between <s> and </s>
        return match[0] not in ("<s>", "</s>") or text.startswith("<s>") or text.count("</s>") > text.count("<s>")

    while control(last := re.search(rf"(?:{CONTROL.pattern})\Z", text)):
        text = text[:last.start()].rstrip()
    while control(first := CONTROL.match(text)):
        text = text[first.end():]
        text = (text[speaker.end():] if (speaker := SPEAKER.match(text)) else text).lstrip()
    if any(map(control, CONTROL.finditer(text))):
        raise LeftOut("a control token in the answer")
    return text
