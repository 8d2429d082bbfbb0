"""JSON over HTTP for the services: urllib3's pools, proxies and TLS, faults told apart, and keys that never leak."""

import contextlib
import functools
import html
import json
import os
import re
import ssl
import urllib.parse
import urllib.request

from minixllm.building.replies import Failure
from minixllm.errors import UserError

LARGEST = 4 * 2**20   # bytes of an answer; a larger one is no answer to an instruction
UNCHARGED = {"requests": 1}  # what a request costs that no service worked for


class Endpoint:
    """JSON over HTTP. urllib3's pool keeps connections open, and sees when the server has closed one."""

    def __init__(self, url: str, header: str, variable: str | None, timeout: float):
        self.parts, self.timeout = address(url), timeout
        self.host, self.path = self.parts.netloc, self.parts.path.rstrip("/")
        self.query = f"?{self.parts.query}" if self.parts.query else ""
        self.variable, self.key = variable, os.environ.get(variable, "").strip() if variable else ""
        self._unescaped_key = _unescaped(self.key)
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "minixllm"}
        if self.key:
            self.headers[header] = f"Bearer {self.key}" if header == "Authorization" else self.key

    @functools.cached_property
    def _pool(self):
        return _pool(self.parts, self.timeout)

    def post(self, path: str, body: dict) -> dict:
        """The JSON object that answers `body`. Raises Failure; UserError for what no other request would escape."""
        if self.variable and not re.fullmatch("[!-~]{8,}", self.key):
            # the name that was given may be a key by mistake
            name = self.variable if self.variable in ("GOOGLE_API_KEY", "OPENAI_API_KEY") else "that '#' names"
            raise UserError(f"{self.host} needs a key in the environment variable {name}: found "
                            f"{'something that cannot be one' if self.key else 'none'}")
        pool = self._pool
        from urllib3 import exceptions
        try:
            response = pool.urlopen("POST", f"{self.path}{path}{self.query}" or "/", json.dumps(body).encode(),
                                    self.headers, retries=False, redirect=False, preload_content=False)
            raw = response.read(LARGEST + 1)
        except (exceptions.HTTPError, OSError) as error:
            if isinstance(certificate := (error.args or [None])[0], ssl.SSLCertVerificationError):
                raise UserError(f"{self.host}: its certificate is not valid: {certificate.verify_message}") from None
            late = isinstance(error, exceptions.TimeoutError) and not isinstance(error, exceptions.NewConnectionError)
            why = "no answer in time" if late else str(error.__cause__ or error) or type(error).__name__
            unsent = isinstance(error, (exceptions.ConnectTimeoutError, exceptions.ProxyError, exceptions.SSLError))
            raise self.failure(why, used=UNCHARGED if unsent else None) from None
        if len(raw) > LARGEST:
            response.close()
            raise self.failure(f"an answer of more than {LARGEST:,} bytes")
        said = raw.decode("utf-8", "replace")
        if response.status == 200:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(answer := json.loads(raw), dict):
                    return answer
            raise self.misshapen(said)
        reason = f"{response.status} {response.reason}: {said}"
        if response.status == 401:
            raise UserError(str(self.failure(reason)))
        limited = response.status == 403 and b"imit" in raw  # Google's way to say 429
        again = limited or response.status in (408, 429) or response.status >= 500
        raise self.failure(reason, again, _seconds(response.headers.get("Retry-After", "")), UNCHARGED)

    def failure(self, reason: str, *more, **named) -> Failure:
        return Failure(f"{self.host}: {self.excerpt(reason)}", *more, **named)

    def misshapen(self, answer) -> Failure:
        said = answer if isinstance(answer, str) else json.dumps(answer)
        return self.failure(f"not the JSON that was expected: {said}")

    def excerpt(self, text: str) -> str:
        return " ".join(self.clean(text)[:1000].split())[:200]

    def clean(self, text: str) -> str:
        """The text without the key, should the server have repeated it, and without halves of surrogate pairs.

        Only a text that has the key in an escaped form loses its escapes.
        """
        text = text.encode("utf-8", "replace").decode()
        if not self.key:
            return text
        text = text.replace(self.key, "***")
        if any(sign in text for sign in "\\%&"):  # one of these begins every escape
            plain = _unescaped(text)
            if self._unescaped_key in plain:
                return plain.replace(self._unescaped_key, "***")
        return text


def _unescaped(text: str) -> str:
    """The text without the escapes of JSON, logs, addresses and HTML, or of one within another."""
    for _ in range(4):
        text = re.sub(r"\\+(?:u00|x)([\da-fA-F]{2})", lambda code: chr(int(code[1], 16)), text).replace("\\", "")
        text = html.unescape(urllib.parse.unquote(text))
    return text


def address(url: str):
    """The parts of a service's address. Raises UserError."""
    # neither query, but for the version of the interface that Azure wants, nor fragment: keys are written there
    form = r"https?://(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d+)?(/[!-\"$->@-~]*)?(\?api-version=[\w.-]+)?"
    try:
        parts = urllib.parse.urlsplit(url)
        if re.fullmatch(form, url) and parts.hostname.encode("idna") and parts.port != 0:
            return parts
    except ValueError:  # of brackets, of a port, of a host's parts
        pass
    host = re.sub(r"(?s)^\w+://|.*@|[/?#].*", "", url)  # what is beside it may be secret
    raise UserError(f"{host[:80]!r}: expected the address of a service, http(s)://HOST[:PORT]/PATH in ASCII; keys and "
                    "passwords belong in the environment, not in it")


def _pool(parts, timeout: float):
    """urllib3's connections to one server. https goes through the proxy, HTTP or SOCKS, that HTTPS_PROXY (and NO_PROXY)
    or the system's settings name."""
    try:
        import urllib3
        from urllib3.contrib.socks import SOCKSProxyManager
    except ImportError:
        raise UserError("services over HTTP need the package urllib3: pip install 'minixllm[build]'") from None
    options = {"maxsize": 1000, "timeout": timeout}
    proxy = urllib.request.getproxies().get("https")
    if parts.scheme == "http" or not proxy or urllib.request.proxy_bypass(parts.hostname):
        manager = urllib3.PoolManager(**options)
    else:
        try:
            found = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
            auth, proxy = urllib.parse.unquote(found.auth or ""), found._replace(auth=None).url
            if not found.host:
                raise ValueError
            if found.scheme.startswith("socks"):
                user, _, password = auth.partition(":")
                manager = SOCKSProxyManager(proxy, user or None, password or None, **options)
            else:
                headers = urllib3.make_headers(proxy_basic_auth=auth) if auth else None
                manager = urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
        except (ValueError, urllib3.exceptions.HTTPError):
            raise UserError("HTTPS_PROXY: expected http://HOST:PORT, found something else") from None  # may be secret
    return manager.connection_from_host(parts.hostname, parts.port, parts.scheme)


def _seconds(retry_after: str) -> float | None:
    """What the header says: a number of seconds, or a date (RFC 9110, section 10.2.3)."""
    import urllib3
    with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return urllib3.Retry().parse_retry_after(retry_after) or None
    return None
