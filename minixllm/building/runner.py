"""Asking services many thousand times: at most so many at once, again after faults, within a budget, never twice.

What a build writes is a function of its source records and of the answers to what they ask. `Runner.map` computes it
with many threads, but in the order of the source; `Runner.ask` stores each answer under a hash of its request. So what
is written depends neither on the order in which answers came nor on how often the build was killed.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import random
import sqlite3
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from minixllm.building.replies import Failure, LeftOut
from minixllm.building.services import Prompt, Translate, fingerprint
from minixllm.errors import UserError
from minixllm.files import atomic_write, write_json_lines
from minixllm.settings import setting

ATTEMPTS = 8            # over a minute in all: quotas are often by the minute
BACKOFF = 0.5           # seconds before the second attempt, doubled each time
LONGEST_WAIT = 3600.0   # seconds that one request waits in all because a server says so; then it has failed
FAILURES_IN_A_ROW = 40  # of one service, after which it is taken for dead
AHEAD = 64              # records for each thread to go on with while the first of them waits for its answers
EXAMPLES = 3            # of each reason for leaving a record out
LINE_EVERY = 60.0       # seconds between two lines of progress where no terminal shows a bar


@dataclass
class RunnerSettings:
    """What both builds can be told about asking."""

    output: str | None = setting(None, "directory of the finished files; its folder build/ has the report, the list of "
                                 "what failed, and cache.sqlite with every answer")
    concurrency: int = setting(16, "how many requests are under way at once", least=1, most=1000)
    timeout: float = setting(120.0, "seconds without a sign of life after which a request is made again", least=0.001)
    budget_requests: int | None = setting(None, "most requests of this run: it stops before there are more", least=1)
    budget_tokens: int | None = setting(None, "most tokens of chat models in this run, prompts and answers", least=1)
    budget_characters: int | None = setting(None, "most characters sent to translators in this run", least=1)
    dry_run: bool = setting(False, "ask nothing: count the requests, characters and tokens, from a sample")
    seed: int = setting(0, "of the samples and pairs drawn; passed to chat models, too", least=0, most=2**32 - 1)


class Stopped(Exception):
    """The run is ending: nothing more is asked."""


class Runner:
    """The threads, the budget and the stored answers of one run over the records of `files`.

    `with Runner(...)` ends quietly where the run is stopped; `conclude` then says why.
    """

    def __init__(self, settings: RunnerSettings, files=()):
        self.folder = Path(settings.output) / "build"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files, self._fingerprint = files, fingerprint(files)
        self.spent, self._reserved = Counter(requests=0, tokens=0, characters=0), Counter()
        self.limits = {unit: limit for unit in self.spent if (limit := getattr(settings, f"budget_{unit}")) is not None}
        self._changed = threading.Condition()  # guards what threads share; wakes who waits for room in the budget
        self._failed_in_a_row, self._resume_at = Counter(), {}  # by service and how it failed; by service
        self._asked = {}  # what came, or will come, of each request that is under way or has failed
        self._stop, self.why_stopped = threading.Event(), None
        self.failures, self.cleaned = [], 0  # what got no answer, as it is listed; answers that markup was cut out of
        self._database = self._open()
        self.ahead = AHEAD * settings.concurrency
        self._pool = ThreadPool(settings.concurrency)  # of daemons, which Python does not wait for at its end

    def _open(self) -> sqlite3.Connection:
        # WAL: a stored answer survives the death of this process at once; exclusive: two builds may not share a folder
        path = self.folder / "cache.sqlite"
        database = sqlite3.connect(path, timeout=0.1, isolation_level=None, check_same_thread=False)
        try:
            database.executescript("""
                PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
                CREATE TABLE IF NOT EXISTS replies (request BLOB PRIMARY KEY, answer TEXT, markup INTEGER,
                                                    unusable TEXT, tokens INTEGER, characters INTEGER)""")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.folder.parent}: another build is writing there" if "locked" in str(error) else
                            f"{path}: {error}") from None
        return database

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self._stop.set()
        self._pool.close()
        if kind is not KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                self._pool.join()  # for the answers that are on their way
        with self._changed:
            self._database.close()
        if self.failures or error is None or kind is Stopped:
            write_json_lines(self.folder / "failures.jsonl", self.failures)
        if kind is KeyboardInterrupt:
            print(f"stopped by a signal; asked in this run: {_amounts(self.spent)}; the answers are kept in "
                  f"{self.folder / 'cache.sqlite'}, and the same command goes on from there", file=sys.stderr)
        return kind is Stopped

    def _query(self, statement: str, *values):
        with self._changed:
            return self._database.execute(statement, values).fetchone()

    def stored(self) -> dict[str, int]:
        """What all the answers have cost that are stored in this folder, whichever run asked for them."""
        return dict(zip(self.spent, self._query("SELECT COUNT(*), TOTAL(tokens), TOTAL(characters) FROM replies")))

    def reach(self, service, max_new_tokens: int = 0) -> None:
        """Ask one short thing, so that a wrong address or key is known before much is asked. Raises UserError.

        max_new_tokens: of the requests to come, for the shortest of which the budget must have room.
        """
        request = Prompt("Say yes.", max_new_tokens=512)  # enough for a model that thinks first
        if not service.does(request):
            request = Translate("Good morning.", "eng", "spa")
        try:
            if service.does(shortest := Prompt("", max_new_tokens=max_new_tokens)):
                self._check_size(service.cost(shortest))
            self._check_size(cost := service.cost(request))
            with contextlib.suppress(LeftOut):  # it is there, and answers
                self._insist(service, request, cost, 3)
        except Failure as failure:
            raise UserError(f"{service.name} cannot be asked: {failure}") from None

    def ask(self, service, request) -> str:
        """The answer, stored or new. Raises Failure when there is none in this run, Stopped when the run is ending."""
        if not request.text.strip():
            return ""
        if self._stop.is_set():
            raise Stopped
        key = _key(service, request)
        with self._changed:  # one thread alone asks; whoever wants the same goes on from what came of it
            asked = self._asked.get(key)
            mine = self._asked.setdefault(key, concurrent.futures.Future())
        if asked:
            row = asked.result()
        else:
            try:
                row = self._stored_or_new(service, request, key)
            except BaseException as error:  # it holds for the whole run, so that no record goes on where others failed
                mine.set_exception(error)
                raise
            mine.set_result(row)
            del self._asked[key]  # from now on it is found in the table
        answer, markup, unusable = row
        if unusable is not None:
            raise LeftOut(unusable)
        with self._changed:
            self.cleaned += markup
        return answer

    def _stored_or_new(self, service, request, key: bytes) -> tuple[str | None, int, str | None]:
        """(answer, whether markup was cut out of it, why it is of no use) as the table has it."""
        if row := self._query("SELECT answer, markup, unusable FROM replies WHERE request = ?", key):
            # a stored answer parts refusals of single records, but does not tell that the service is there now
            self._failed_in_a_row[service.name, "refused"] = 0
            return row
        self._check_size(cost := service.cost(request))  # too large a request fails alone: the service may be well
        gone, refused = (service.name, "gone"), (service.name, "refused")
        unusable = None
        try:
            answer, used = self._insist(service, request, cost, ATTEMPTS)
            self._failed_in_a_row[gone] = self._failed_in_a_row[refused] = 0
        except LeftOut as out:
            if not out.lasting:
                raise
            answer, used, unusable = None, out.used or cost, str(out)
        except Failure as failure:
            self._failed_in_a_row[kind := gone if failure.again else refused] += 1
            if self._failed_in_a_row[kind] >= FAILURES_IN_A_ROW:
                self.stop(f"{FAILURES_IN_A_ROW} requests in a row failed, the last with: {failure}")
            raise
        row = answer, used.get("markup", 0), unusable
        self._query("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?)", key, *row, used.get("tokens", 0),
                    used.get("characters", 0))
        return row

    def _insist(self, service, request, cost: dict, attempts: int) -> tuple[str, dict]:
        delay, patience = BACKOFF, LONGEST_WAIT
        while True:
            # all wait until the time that the server named, at a spread: the first that is refused again moves that
            # time on for the others, so that a few are refused, and not all
            while (pause := self._resume_at.get(service.name, 0) - time.monotonic()) > 0:
                self._wait(pause * random.uniform(1, 1.25))
            try:
                return self._once(service, request, cost)
            except Failure as failure:
                attempts -= not failure.after  # to be told to come later is no failed attempt
                patience -= failure.after or 0
                if not failure.again or attempts == 0 or patience < 0:
                    raise
                if failure.after:
                    self._resume_at[service.name] = time.monotonic() + failure.after
                else:
                    self._wait(delay * random.uniform(0.5, 1.5))
                    delay *= 2

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped

    def _once(self, service, request, cost: dict) -> tuple[str, dict]:
        """Ask, with the request's highest cost taken out of the budget meanwhile."""
        self._reserve(cost)
        used = cost
        try:
            answer, used = service.ask(request)
            return answer, used
        except Failure as failure:
            used = failure.used or cost
            raise
        finally:
            with self._changed:
                self._reserved.subtract(cost)
                self.spent.update({unit: used[unit] for unit in self.spent if unit in used})
                self._changed.notify_all()

    def _check_size(self, cost: dict) -> None:
        if above := {unit: amount for unit, amount in cost.items() if amount > self.limits.get(unit, math.inf)}:
            raise Failure(f"the budget of {_amounts(self.limits)} is too small: one request may need up to "
                          f"{_amounts(above)}")

    def _reserve(self, cost: dict) -> None:
        """Wait for room in the budget, while only what is on its way stands against it."""
        with self._changed:
            while any(self.spent[unit] + self._reserved[unit] + amount > self.limits.get(unit, math.inf)
                      for unit, amount in cost.items()):
                if not self._reserved["requests"]:
                    self.stop(f"the budget of {_amounts(self.limits)} is spent")
                if self._stop.is_set():
                    raise Stopped
                self._changed.wait(0.5)
            self._reserved.update(cost)

    def stop(self, why: str) -> None:
        """Ask nothing more; the first reason is kept."""
        self.why_stopped = self.why_stopped or why
        self._stop.set()

    def _say_progress(self, bar, label: str, ended: threading.Event) -> None:
        """A line a minute, where no terminal shows the bar: a log would otherwise be silent for hours."""
        start = time.monotonic()
        while not ended.wait(LINE_EVERY):
            print(f"{label}: {bar.n:,} of {bar.total:,} records after {time.monotonic() - start:,.0f} s, "
                  f"{len(self.failures):,} failed; asked in this run: {_amounts(self.spent)}",
                  file=sys.stderr, flush=True)

    def map(self, task, items, total: int, label: str, name):
        """Yield (item, task(ask, item)) in the order of the items, while their progress is shown; many run at a time.

        Items whose task raises Failure are left out, and listed under name(item), what tells an item from others.
        Raises what reading the items raised, UserErrors of services, and Stopped.
        """
        def attempt(item):
            try:
                return task(self.ask, item)
            except (Failure, Stopped):
                raise
            except BaseException:  # a wrong key, a full disk: the others would be asked for nothing
                self._stop.set()
                raise

        asked = ((item, self._pool.apply_async(attempt, (item,))) for item in items)
        waiting = deque(itertools.islice(asked, self.ahead))
        ended = threading.Event()
        with tqdm(total=total, desc=label, unit="record", smoothing=0.05, disable=None, file=sys.stderr) as bar:
            if bar.disable:
                threading.Thread(target=self._say_progress, args=(bar, label, ended), daemon=True).start()
            try:
                while waiting:
                    item, result = waiting.popleft()
                    try:
                        yield item, result.get()
                    except Failure as failure:
                        self.failures.append({**name(item), "reason": str(failure)})
                    except Stopped:
                        continue  # of those behind it some may have failed, and are to be listed
                    bar.update()
                    bar.n += bar.disable  # a bar that is not shown does not count
                    waiting.extend(itertools.islice(asked, 1))
            finally:
                ended.set()
        if self._stop.is_set():
            raise Stopped

    def write(self, path, task, finish, items, total: int, label: str, name) -> dict:
        """Write finish(item, task(ask, item)) of every item as JSON lines; see `map`.

        Returns the counts of records written, failed, and left out by reason, these with examples. An item is left out
        where finish raises LeftOut, or its task does, for an answer that it asked for.
        """
        def attempt(ask, item):
            try:
                return task(ask, item)
            except LeftOut as out:
                return out

        written, failed, reasons, examples, cleaned = 0, len(self.failures), Counter(), {}, self.cleaned
        with atomic_write(path) as file:
            for item, made in self.map(attempt, items, total, label, name):
                try:
                    if isinstance(made, LeftOut):
                        raise made
                    record = finish(item, made)
                except LeftOut as out:
                    reasons[reason := str(out)] += 1
                    if reasons[reason] <= EXAMPLES:
                        examples.setdefault(reason, []).append({**name(item), "texts": out.example})
                else:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    written += 1
            if fingerprint(self.files) != self._fingerprint:
                self.stop("the data changed meanwhile")
                raise Stopped
        return {"records": written, "failed": len(self.failures) - failed, "left_out": dict(sorted(reasons.items())),
                "examples": dict(sorted(examples.items())), "markup": self.cleaned - cleaned}

    def conclude(self, state: str) -> bool:
        """Print how the run ended; whether it has done all it should."""
        print(f"{state}; asked in this run: {_amounts(self.spent)}")
        if self.cleaned:
            print(f"markup was cut out of {self.cleaned:,} answers")
        for reason, count in Counter(failure["reason"] for failure in self.failures).most_common(5):
            print(f"no answer for {count} records: {reason}")
        if self.why_stopped:
            print(f"stopped: {self.why_stopped}")
        if not self.failures and not self.why_stopped:
            return True
        print(f"the same command goes on with what is missing; {self.folder / 'failures.jsonl'} lists what failed")
        return False


def _amounts(amounts: dict) -> str:
    return ", ".join(f"{amount:,.0f} {unit}" for unit, amount in amounts.items())


def _key(service, request) -> bytes:
    fields = json.dumps([service.name, type(request).__name__, vars(request)], ensure_ascii=False)
    return hashlib.sha256(fields.encode()).digest()[:16]
