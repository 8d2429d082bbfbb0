"""A server of Google's translation and of OpenAI's chat: it answers at once, always the same, or misbehaves on purpose.

As a translator it turns the letters of each word around, so that translating back restores the text. As a chat model it
answers an instruction with words made from it and the seed; as a judge it prefers the longer answer.
"""

import asyncio
import dataclasses
import hashlib
import json
import re
import ssl
import sys
import threading
import urllib.parse

from minixllm.evaluation import language_id

POOR = ("ny",)  # Google codes of languages it translates badly
IDENTIFIER = language_id.identifier


def identifier() -> language_id.Identifier:
    """The real one, but for the two languages of most tests here, in which this server's words are nonsense."""
    found = IDENTIFIER()
    return dataclasses.replace(found, known=found.known - {"mri", "nya"})


def turned(text: str) -> str:
    return re.sub(r"(?<![\w/{`])[^\W\d_]+(?![\w/}`])", lambda word: word[0][::-1], text)


def translated(body: dict) -> str:
    text = turned(body["q"])
    return " ".join(reversed(text.split())) if body["source"] in POOR else text


def chat(body: dict) -> str:
    prompt = body["messages"][-1]["content"]
    if judged := re.search(r'{"id": "(\w+)"', prompt):
        tag = judged[1]
        first, second = (
            re.search(rf"\[{tag}\] {side} answer\n(.*?)\n\[{tag}\]", prompt, re.S)[1] for side in ("first", "second")
        )
        better, worse = dict.fromkeys(("helpfulness", "correctness", "language"), 9), dict.fromkeys(
            ("helpfulness", "correctness", "language"), 3
        )
        return json.dumps({"id": tag, "first": better if len(first) > len(second) else worse,
                           "second": better if len(second) > len(first) else worse})
    if marked := re.search(r"two lines (\w{16}) .*?\n\1\n(.*)\n\1", prompt, re.S):
        return turned(marked[2])
    digest = hashlib.sha256(f"{body.get('seed')}{prompt}".encode()).hexdigest()
    return "Ondoka " + " ".join(re.findall("[0-9]+", digest)[:3 + int(digest[:4], 16) % 9])


def repeated(head: bytes) -> str:
    """The key of a request as it is, and as JSON and addresses escape it."""
    key = re.search(rb"(?:Bearer|X-goog-api-key:) (\S+)|$", head)[1] or b""
    key = key.decode()
    return " ".join((key, key.replace("/", r"\/"), key.replace("+", r"\u002b"), urllib.parse.quote(key, safe="")))


class Server:
    """`with Server(fault) as server:` serves on server.port of 127.0.0.1, in a thread.

    fault: (request number, body) -> None, or "silence", "cut", "text", "shape", "huge", "talk", a status such as "429",
    which asks to wait for `retry_after`, "temperature", which is 400 in OpenAI's words, or "closed" after a good
    answer.
    `asked` holds the bodies of all requests, `answered` of those answered well, `all_headers` the heads.
    """

    def __init__(self, fault=lambda number, body: None, port: int = 0, tls: ssl.SSLContext | None = None, keep=True):
        self.fault, self.port, self.tls, self.keep = fault, port, tls, keep
        self.asked, self.answered, self.all_headers, self.number = [], [], [], 0
        self.echo = False  # repeat the request's headers in answers
        self.retry_after = "1"

    def __enter__(self):
        started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve(started)), daemon=True)
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.done.set)
        self.thread.join(5)

    async def serve(self, started=None):
        self.loop, self.done = asyncio.get_running_loop(), asyncio.Event()
        server = await self.loop.create_server(
            lambda: Connection(self), "127.0.0.1", self.port, ssl=self.tls, backlog=512
        )
        self.port = server.sockets[0].getsockname()[1]
        if started:
            started.set()
        await self.done.wait()
        server.close()

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"


class Connection(asyncio.Protocol):
    def __init__(self, server: Server):
        self.server, self.buffer = server, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data: bytes):
        self.buffer += data
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1]) if end else 0
        if not end or len(rest) < length:
            return
        self.buffer = rest[length:]
        server, body = self.server, json.loads(rest[:length])
        server.number += 1
        fault = server.fault(server.number, body)
        if server.keep:
            server.asked.append(body)
            server.all_headers.append(head)
            if not fault:
                server.answered.append(body)
        if b"/chat/completions" in head.split(b"\r\n")[0]:
            answer = {"choices": [{"message": {"role": "assistant", "content": chat(body)}, "finish_reason": "stop"}],
                      "usage": {"total_tokens": 50}}
        else:
            answer = {"data": {"translations": [{"translatedText": translated(body)}]}}
        answer = json.dumps(answer).encode()
        if server.echo:
            answer = answer.replace(
                b'": "Ondoka', b'": "' + head.split(b"Bearer ")[-1][:60].split(b"\r\n")[0] + b" Ondoka"
            )
        if fault == "silence":
            return
        if fault == "cut":
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer[: len(answer) // 2]
            )
            self.transport.close()
            return
        status, extra = "200 OK", ""
        if fault == "text":
            answer = b"<html>upstream is busy</html>"
        elif fault == "talk":
            answer = b'{"choices": [{"message": {"content": "Well, the first one."}}]}'
        elif fault == "shape":
            answer = b'{"choices": [], "data": {"translations": 7}}'
        elif fault == "huge":
            answer = b'{"filler": "' + b"x" * 10_000_000 + b'"}'
        elif fault == "temperature":
            status = "400 Bad Request"
            answer = json.dumps({"error": {"message": f"Unsupported value: 'temperature' does not support "
                                 f"{body['temperature']} with this model. Only the default (1) value is supported."}})
            answer = answer.encode()
        elif fault and fault != "closed":
            status = f"{fault} Something {repeated(head)}"
            extra = f"Retry-After: {server.retry_after}\r\n" if fault == "429" else ""
            answer = f'{{"error": {{"message": "you sent {repeated(head)}"}}}}'.encode()
        self.transport.write(f"HTTP/1.1 {status}\r\n{extra}Content-Length: {len(answer)}\r\n\r\n".encode() + answer)
        if fault == "closed":
            self.transport.close()


if __name__ == "__main__":
    asyncio.run(Server(port=int(sys.argv[1]), keep=False).serve())
