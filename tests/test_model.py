"""The real service beside a model of it, step by step, in an order that nobody planned.

The steps: registrations, activations with right, wrong, old and expired codes and other
passwords, limits that are reached, servers that are paused, a consumer that is killed.
After each of them, the answer, the tables and the inbox must be what the model says. On
a failure, pytest shows what was printed: the steps of the story.

MODEL_STEPS=200000 takes more steps than the 500 of an ordinary run.
"""

import ipaddress
import os
import random
import re
from types import SimpleNamespace

from servers.system import digest, running_program
from steps import (
    activate,
    fresh_client,
    fresh_email,
    register,
    wait_until,
    wait_until_at_rest,
)
from steps.jobs import consumers_of
from steps.logs import fields_of

COUNT = int(os.environ.get("MODEL_STEPS") or "500")
ALLOWED, EMAIL_LIMIT, ACTIVATE_LIMIT, FAILURE_LIMIT = 3, 6, 20, 12
PASSWORDS = ["the first password", "the second password"]
STEPS = [     # each as often as it is to be taken
    *[("register", PASSWORDS[0]), ("register", PASSWORDS[1])] * 12,
    *[("activate", "newest")] * 12, *[("activate", "wrong"), ("activate", "older")] * 6,
    *[("intrude", "newest"), ("intrude", "wrong"), ("intrude", "older")] * 4,
    *[("expire", "code"), ("expire", "limits"), ("expire", "client's limits")] * 4,
    ("stop", "postgres"), ("stop", "rabbitmq"), ("stop", "consumer")]


class Model:
    """What the service should know of one address, and what it should answer."""

    def __init__(self):
        self.exists = self.active = self.live = False
        self.password = self.newest = None      # newest: the job of the newest code
        self.attempts = self.registrations = self.activations = 0

    def register(self, password, job):
        """The status; job: the id that a 202 would have."""
        if self.registrations == EMAIL_LIMIT:
            return 429
        self.registrations += 1
        if not self.active:
            self.exists = self.live = True
            self.password, self.newest, self.attempts = password, job, 0
        return 202

    def activate(self, password, is_newest, failures):
        """The status; is_newest: of the code; failures: of the client, until now."""
        self.activations += 1
        if self.activations > ACTIVATE_LIMIT or failures == FAILURE_LIMIT:
            return 429
        if self.exists and password == self.password:
            if self.active:
                return 409
            if self.live and self.attempts < ALLOWED:
                self.attempts += 1
                self.active = is_newest
                if is_newest:
                    return 200
        return 403


class Story:
    """Fifty steps with three addresses. A stopped server makes some answers a 503."""

    def __init__(self, system):
        self.system = system
        system.smtp.mails.clear()   # of other stories
        self.models = {fresh_email(): Model() for _ in range(3)}
        self.headers, self.failures = fresh_client(), 0
        [address] = self.headers.values()
        self.network = str(ipaddress.ip_network(f"{address}/64"))    # of the client
        self.due = {email: set() for email in self.models}     # jobs to be mailed
        self.stray = set()      # jobs that may be mailed: their request got a 503, or a
        self.paused = None      # 200 while RabbitMQ was paused
        self.consuming = True

    def goes_on(self):
        stopped = self.paused or not self.consuming
        email = random.choice([*self.models])
        verb, what = random.choice(STEPS + [("heal", "all")] * 40 * bool(stopped))
        print(verb, what, email)
        getattr(self, verb)(email, what)
        self.is_as_the_model_says()

    # -- Steps

    def register(self, email, password):
        status, job = self.ask(lambda: register(
            self.system, email, password, **self.headers))

        if self.paused and status == 503:
            self.stray.add(job)
            return
        assert not (self.paused and status == 202)
        assert status == self.models[email].register(password, job)
        if status == 202:
            self.due[email].add(job)

    def activate(self, email, which, intruder=False):
        model, mails = self.models[email], self.mails(email)
        password = next((each for each in PASSWORDS
                         if (each == model.password) != intruder), PASSWORDS[0])
        newest = mails.get(model.newest)
        if model.exists and newest is None:
            return      # it is not mailed yet, so any code might be it
        older = [code for job, code in mails.items() if code and job != model.newest]
        unused = next(code for code in map("{:04}".format, range(100))
                      if code not in mails.values())
        code = {"newest": newest, "older": older and older[-1]}.get(which) or unused

        status, job = self.ask(lambda: activate(
            self.system, email, code, password, **self.headers))

        if self.paused and status == 503:
            return
        assert self.paused != "postgres"
        assert status == model.activate(password, code == newest, self.failures)
        self.failures += status == 403
        if status == 200:
            (self.stray if self.paused else self.due[email]).add(job)

    def intrude(self, email, which):
        self.activate(email, which, intruder=True)

    def expire(self, email, what):
        if self.paused == "postgres":
            return
        subject = self.network if what == "client's limits" else email
        table, key = ("users", "email") if what == "code" else ("limits", "subject")
        self.system.database(
            f"UPDATE {table} SET expires_at = now() WHERE {key} = %s", [subject])
        if what == "code":
            self.models[email].live = False
        elif what == "limits":
            self.models[email].registrations = self.models[email].activations = 0
        else:
            self.failures = 0

    def stop(self, _, what):
        if what == "consumer":
            self.system.consumer.kill()
            self.consuming = False
        elif not self.paused:
            getattr(self.system, what).pause()
            self.paused = what

    def heal(self, *_):
        if self.paused:
            getattr(self.system, self.paused).resume()
            self.paused = None
            wait_until_at_rest(self.system)
        if not self.consuming:
            self.system.consumer.start()
            self.consuming = True
            wait_until(lambda: consumers_of(self.system.broker))

    # -- After each of them

    def is_as_the_model_says(self):
        if self.paused != "postgres":
            self.tables_are_as_the_model_says()
        if self.consuming and not self.paused:
            self.inbox_is_as_the_model_says()

    def tables_are_as_the_model_says(self):
        rows = {row[0]: row[1:] for row in self.system.database("""
            SELECT email, code_digest, attempts, activated_at IS NOT NULL
              FROM users WHERE email = ANY(%s)""", [[*self.models]])}
        counts = {row[:2]: row[2] for row in self.system.database("""
            SELECT name, subject, count
              FROM limits WHERE subject = ANY(%s) AND expires_at > now()""",
            [[*self.models, self.network]])}
        assert counts.get(("activate failures", self.network), 0) == self.failures
        for email, model in self.models.items():
            assert (email in rows) == model.exists
            if model.exists:
                code_digest, attempts, active = rows[email]
                assert (attempts, active) == (model.attempts, model.active)
                if code := self.mails(email).get(model.newest):
                    assert bytes(code_digest) == digest(email, code)
            for limit, count in [("register address hour", model.registrations),
                                 ("activate address hour", model.activations)]:
                assert counts.get((limit, email), 0) == count

    def inbox_is_as_the_model_says(self):
        for email in self.models:
            wait_until(lambda email=email: self.due[email] <= self.mails(email).keys())
            assert self.mails(email).keys() <= self.due[email] | self.stray

    # -- What they need

    def ask(self, call):
        """A request: its status, and the id of its job from the API's log. Like any
        client, it repeats a 503: a busy machine may have slowed a server down."""
        def answer():
            status = call().status
            line = wait_until(lambda: next(self.system.requests))
            assert line["status"] == str(status)
            if status == 503 and not self.paused:
                self.stray.add(line["job"])
                return None
            return status, line["job"]

        return wait_until(answer)

    def mails(self, email):
        """The codes that were mailed to an address, or None, by the ids of the jobs."""
        found = {}
        for mail in self.system.smtp.mails_to(email):
            text = mail.content.decode().replace("\r", "")
            job = re.search("^Message-ID: <(.*)@", text, re.MULTILINE)[1]
            code = re.search("^[0-9]{4}$", text, re.MULTILINE)
            found[job] = code and code[0]
        return found


def requests_in(log):
    """The requests of a log, as dicts, one after another; None if there is none yet."""
    with log.open() as file:
        while True:
            found = fields_of(line) if (line := file.readline()) else None
            if not line or found.get("route", "").startswith("/users/"):
                yield found


# -- The test --------------------------------------------------------------------------


def test_it_does_what_the_model_does(
        servers, settings, broker, smtp, database, tmp_path):
    with running_program(tmp_path, settings | {
            "BROKER_URL": broker, "SMTP_PORT": str(smtp.port), "TRUSTED_PROXIES": "1",
            "CODE_LIFETIME": "900", "CODE_ATTEMPTS": str(ALLOWED),
            "EMAIL_LIMIT_HOUR": str(EMAIL_LIMIT),
            "ACTIVATE_LIMIT_HOUR": str(ACTIVATE_LIMIT),
            "FAILURE_LIMIT_HOUR": str(FAILURE_LIMIT)}) as (api, consumer):
        wait_until(lambda: consumers_of(broker))
        system = SimpleNamespace(
            url=api.url, consumer=consumer, broker=broker, database=database,
            postgres=servers.postgres, rabbitmq=servers.rabbitmq, smtp=smtp,
            requests=requests_in(api.log))

        for _ in range(COUNT // 50):
            story = Story(system)
            try:
                for _ in range(50):
                    story.goes_on()
            finally:
                story.heal()
            story.is_as_the_model_says()
