"""Steady load on the whole system, while chaos.py harms it.

Load is the callers: they note each request and its answer, and what was mailed to them.
Fault notes what was done and when. account.py draws the balance.
"""

import heapq
import http.client
import itertools
import json
import random
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from secrets import token_hex
from types import SimpleNamespace

import steps

LIFETIME = 20       # seconds a code lives: most outages are shorter
PATIENCE = 5        # seconds within which everything has to be answered
THREADS = 12        # of callers


def say(text):
    print(time.strftime("%H:%M:%S"), text, flush=True)


# -- The callers -----------------------------------------------------------------------


@dataclass
class Request:
    action: str           # register or activate
    email: str
    password: str
    code: str | None      # what was sent to activate
    began: float          # seconds since 1970, like all times here
    ended: float
    status: int | None    # None: no answer at all

    def caused(self, instant):
        """Whether a change of this instant, now() of its transaction, is this one's."""
        return instant is not None and self.began <= instant <= self.ended

    @property
    def seconds(self):
        return self.ended - self.began


class Load:
    """Callers who register, activate and err; rate: so many new ones a second.

    Each sends X-Forwarded-For with an address of its own, as a proxy would.
    """

    def __init__(self, service, sink, seed, rate):
        self.service, self.sink, self.rate = service, sink, rate
        self.random = random.Random(seed)
        self.requests = []                  # a list takes append() from any thread
        self.mails = defaultdict(list)      # of an address, in the order of arrival
        self.codes = []                     # those of them that have one
        self.number = itertools.count()
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.call) for _ in range(THREADS)]
        self.reader = threading.Thread(target=self.read_mails, daemon=True)

    def start(self):
        for thread in [self.reader, *self.threads]:
            thread.start()

    def finish(self):
        """No new callers; returns when the last has done what it wanted."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        time.sleep(10)    # a mail that failed is tried again after six

    def read_mails(self):
        line = ""
        with open(self.sink.record) as file:
            while True:
                for piece in iter(file.readline, ""):   # seldom, half a line is there
                    line += piece
                    if line.endswith("\n"):
                        mail = SimpleNamespace(**json.loads(line))
                        self.mails[mail.to].append(mail)
                        if mail.code:
                            self.codes.append(mail)
                        line = ""
                time.sleep(0.05)

    def call(self):
        """A thread of callers: each goes on when its pause is over, and others come."""
        agenda, new = [], time.time() + self.random.random()
        while agenda or not self.stopping.is_set():
            now = time.time()
            if now > new and not self.stopping.is_set():
                heapq.heappush(agenda, (now, next(self.number), self.story()))
                new = now + self.random.expovariate(self.rate / len(self.threads))
            elif agenda and now > agenda[0][0]:
                story = heapq.heappop(agenda)[2]
                with suppress(StopIteration):
                    pause = next(story)
                    when = time.time() + pause
                    heapq.heappush(agenda, (when, next(self.number), story))
            else:
                time.sleep(0.02)

    def story(self):
        """What one caller does; yields its pauses in seconds."""
        chance, email = self.random.random, steps.fresh_email()
        if chance() < 0.03:
            return self.register(email, "short")        # 422
        registration = yield from self.insist(self.register, email, token_hex(8))
        if registration and chance() < 0.05:            # the older pair is dead now
            yield 2
            registration = yield from self.insist(self.register, email, token_hex(8))
        if not registration:
            return
        while not (mail := self.mail_of(registration)):
            if time.time() > registration.ended + LIFETIME:
                return
            yield 0.2
        if chance() < 0.1:                              # it stays waiting
            return
        password, code = registration.password, mail.code
        if chance() < 0.05:
            self.activate(email, password, steps.wrong(code))    # 403
        if chance() < 0.05:
            self.activate(email, token_hex(8), code)           # 403
        if (yield from self.insist(self.activate, email, password, code)):
            if chance() < 0.05:
                self.activate(email, password, code)             # 409
            if chance() < 0.05:
                self.register(email, token_hex(8))             # 202, and a notice

    def insist(self, act, *arguments):
        """Repeats what got 503 or no answer, or gives up.

        Returns the request that ended well, or None.
        """
        while (request := act(*arguments)).status in (503, None):
            if self.random.random() < 0.5:
                return
            yield 2
        return request if request.status in (200, 202, 409) else None

    def register(self, email, password):
        return self.ask("register", email, password, None, lambda: steps.register(
            self.service, email, password, **client_of(email)))

    def activate(self, email, password, code):
        return self.ask("activate", email, password, code, lambda: steps.activate(
            self.service, email, code, password, **client_of(email)))

    def ask(self, action, email, password, code, send):
        began, status = time.time(), None
        with suppress(OSError, http.client.HTTPException):
            status = send().status
        request = Request(action, email, password, code, began, time.time(), status)
        self.requests.append(request)
        return request

    def mail_of(self, request):
        """The mail of a registration, or None; a mail names whole seconds only."""
        return next((mail for mail in self.mails[request.email] if mail.code
                     and int(request.began) <= mail.issued <= request.ended), None)

    def works_since(self, instant):
        """When it had registered after it, and when all had worked; None: not yet."""
        first = bisect_left(self.requests, instant, key=lambda request: request.ended)
        good = [request for request in self.requests[first:]
                if request.began >= instant and request.status in (200, 202)]
        registered, activated = (
            min((request.ended for request in good if request.action == action),
                default=None) for action in ("register", "activate"))
        first = bisect_left(self.codes, instant, key=lambda mail: mail.arrived)
        mailed = next((mail.arrived for mail in self.codes[first:]
                       if mail.issued > instant), None)   # whole seconds, rounded down
        every = registered, activated, mailed
        return registered, None if None in every else max(every)


def client_of(email):
    """The header of a caller's own network."""
    return {"X-Forwarded-For": f"2001:db8:{email[:4]}:{email[4:8]}::1"}


# -- Faults ----------------------------------------------------------------------------


@dataclass
class Fault:
    name: str
    of_database: bool     # so the answer to a COMMIT may be lost
    began: float = 0
    ended: float = 0      # the servers answer again
    served: float = 0     # so does the API, with a 202
    healed: float = 0     # so does the whole system

    @contextmanager
    def under(self, load, patience=240):
        """Takes the times of a fault that is done and undone in the block."""
        self.began = time.time()
        yield
        self.ended = time.time()
        while not self.healed:
            if time.time() > self.ended + patience:
                raise RuntimeError(f"{self.name}: not healed after {patience} s")
            time.sleep(0.1)
            self.served, self.healed = load.works_since(self.ended)
        say(f"{self.name}: {self.ended - self.began:.1f} s, registrations healed "
            f"{self.served - self.ended:.1f} s later, all "
            f"{self.healed - self.ended:.1f} s")
