"""The real service beside a model of it, step by step, in an order that nobody planned.

Hypothesis chooses the steps: registrations, activations with right, wrong, old and
expired codes and other passwords, limits that are reached, servers that are paused, a
consumer that is killed. After each of them, the answer, the tables and the inbox must
be what the model says. On a failure it prints the steps.

MODEL_STEPS=200000 takes more steps than the 2,000 of an ordinary run.
"""

import ipaddress
import os
import re
from collections import defaultdict
from email import message_from_bytes
from email.policy import default
from types import SimpleNamespace

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from servers.process import free_port
from servers.smtp import SmtpServer
from servers.system import digest, running_program
from steps import (
    activate,
    at_once,
    fresh_client,
    fresh_email,
    register,
    send,
    wait_until,
)
from steps.jobs import consumers_of, delete_queues
from steps.logs import fields_of

ALLOWED, EMAIL_LIMIT, ACTIVATE_LIMIT, FAILURE_LIMIT = 3, 6, 20, 12
PASSWORDS = ["the first password", "the second password"]
NUMBERS = strategies.integers(0, 2)     # of an address
STEPS = int(os.environ.get("MODEL_STEPS") or "2000")


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

    def activate(self, password, is_newest, client):
        """The status; is_newest: whether the code is the newest one."""
        self.activations += 1
        if self.activations > ACTIVATE_LIMIT or client.failures == FAILURE_LIMIT:
            return 429
        if self.exists and password == self.password:
            if self.active:
                return 409
            if self.live and self.attempts < ALLOWED:
                self.attempts += 1
                self.active = is_newest
                if is_newest:
                    return 200
        client.failures += 1
        return 403


def seldom(*values):
    """One of these in one of five cases, else None: such a step takes seconds."""
    return strategies.sampled_from([None] * 4 * len(values) + list(values))


class Steps(RuleBasedStateMachine):
    """The steps that Hypothesis takes. A stopped server makes some of them a 503."""

    system = None       # set by the test

    def __init__(self):
        super().__init__()
        self.emails = [fresh_email() for _ in range(3)]
        self.models = {email: Model() for email in self.emails}
        self.client = SimpleNamespace(headers=fresh_client(), failures=0)
        self.due = {email: set() for email in self.emails}     # jobs to be mailed
        self.stray = set()      # jobs that may be mailed: their request got a 503, or a
        self.paused = None      # 200 while RabbitMQ was paused
        self.consuming = True

    # -- Steps

    @rule(number=NUMBERS, password=strategies.sampled_from(PASSWORDS))
    def register(self, number, password):
        email = self.emails[number]

        status, job = self.ask(lambda: register(
            self.system, email, password, **self.client.headers))

        if self.paused and status == 503:
            self.stray.add(job)
            return
        assert not (self.paused and status == 202)
        assert status == self.models[email].register(password, job)
        if status == 202:
            self.due[email].add(job)

    @rule(number=NUMBERS)
    def activate(self, number):
        email = self.emails[number]
        self.try_code(email, self.models[email].password or PASSWORDS[0], "newest")

    @rule(number=NUMBERS, which=strategies.sampled_from(["wrong", "older"]))
    def guess(self, number, which):
        email = self.emails[number]
        self.try_code(email, self.models[email].password or PASSWORDS[0], which)

    @rule(number=NUMBERS, which=strategies.sampled_from(["newest", "wrong", "older"]))
    def intrude(self, number, which):
        email = self.emails[number]
        self.try_code(email, next(password for password in PASSWORDS
                                  if password != self.models[email].password), which)

    def try_code(self, email, password, which):
        newest, code = self.newest_code(email), self.code(email, which)
        if self.models[email].exists and newest is None:
            return      # it is not mailed yet, so this code might be it

        status, job = self.ask(lambda: activate(
            self.system, email, code, password, **self.client.headers))

        if self.paused and status == 503:
            return
        assert self.paused != "postgres"
        assert status == self.models[email].activate(password, code == newest,
                                                     self.client)
        if status == 200:
            (self.stray if self.paused else self.due[email]).add(job)

    @precondition(lambda self: not self.paused)
    @rule(number=NUMBERS)
    def let_the_code_expire(self, number):
        email = self.emails[number]
        self.system.database("""
            UPDATE users SET expires_at = now() WHERE email = %s""", [email])
        self.models[email].live = False

    @precondition(lambda self: not self.paused)
    @rule(number=NUMBERS)
    def let_the_hour_pass(self, number):
        email = self.emails[number]
        self.system.database("""
            UPDATE limits SET expires_at = now() WHERE subject = %s""", [email])
        self.models[email].registrations = self.models[email].activations = 0

    @precondition(lambda self: not self.paused)
    @rule(passes=seldom(True))
    def let_the_hour_of_the_client_pass(self, passes):
        if passes:
            self.system.database("""
                UPDATE limits SET expires_at = now() WHERE subject = %s""",
                [network_of(self.client)])
            self.client.failures = 0

    @precondition(lambda self: not self.paused)
    @rule(server=seldom("postgres", "rabbitmq"))
    def pause(self, server):
        if server:
            self.paused = server
            getattr(self.system, server).pause()

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self):
        getattr(self.system, self.paused).resume()
        self.paused = None
        wait_until(lambda: all(at_once(*[self.is_healthy] * 8)))

    @precondition(lambda self: self.consuming and not self.paused)
    @rule(kill=seldom(True))
    def kill_the_consumer(self, kill):
        if kill:
            self.system.consumer.kill()
            self.consuming = False

    @precondition(lambda self: not self.consuming and not self.paused)
    @rule()
    def start_the_consumer(self):
        self.system.consumer.start()
        self.consuming = True
        wait_until(lambda: consumers_of(self.system.broker))

    def teardown(self):
        if self.paused:
            self.resume()
        if not self.consuming:
            self.start_the_consumer()
        self.tables_are_as_the_model_says()
        self.inbox_is_as_the_model_says()

    # -- After each step

    @precondition(lambda self: self.paused != "postgres")
    @invariant()
    def tables_are_as_the_model_says(self):
        rows = {row[0]: row[1:] for row in self.system.database("""
            SELECT email, code_digest, attempts, activated_at IS NOT NULL
              FROM users WHERE email = ANY(%s)""", [self.emails])}
        counts = {row[:2]: row[2] for row in self.system.database("""
            SELECT name, subject, count
              FROM limits WHERE subject = ANY(%s) AND expires_at > now()""",
            [[*self.emails, network_of(self.client)]])}
        assert (counts.get(("activate failures", network_of(self.client)), 0)
                == self.client.failures)
        for email, model in self.models.items():
            assert (email in rows) == model.exists
            if model.exists:
                code_digest, attempts, active = rows[email]
                assert (attempts, active) == (model.attempts, model.active)
                if code := self.newest_code(email):
                    assert bytes(code_digest) == digest(email, code)
            for limit, count in [("register address hour", model.registrations),
                                 ("activate address hour", model.activations)]:
                assert counts.get((limit, email), 0) == count

    @precondition(lambda self: not self.paused and self.consuming)
    @invariant()
    def inbox_is_as_the_model_says(self):
        for email in self.emails:
            wait_until(lambda email=email: self.due[email] <= self.mails(email).keys())
            assert self.mails(email).keys() <= self.due[email] | self.stray

    # -- What they need

    def ask(self, call):
        """A request: its status, and the id of its job from the API's log."""
        status = call().status
        line = wait_until(self.system.log.next_request)
        assert line["status"] == str(status)
        return status, line["job"]

    def is_healthy(self):
        return send(self.system, "GET", "/healthz").status == 200

    def mails(self, email):
        """The codes that were mailed to an address, by the ids of their jobs."""
        return self.system.inbox.of(email)

    def newest_code(self, email):
        """The newest code, or None if it was not mailed yet."""
        return self.mails(email).get(self.models[email].newest)

    def code(self, email, which):
        """The newest or an older code that was mailed; else one that never was."""
        newest = self.models[email].newest
        codes = {job: code for job, code in self.mails(email).items() if code}
        if which == "newest" and newest in codes:
            return codes[newest]
        older = [code for job, code in codes.items() if job != newest]
        if which == "older" and older:
            return older[-1]
        return next(code for code in map("{:04}".format, range(100))
                    if code not in codes.values())


def network_of(client):
    """The subject of its limits."""
    return str(ipaddress.ip_network(f"{client.headers['X-Forwarded-For']}/64"))


class Log:
    """The requests of a log, one after another."""

    def __init__(self, path):
        self.file = path.open()

    def next_request(self):
        """The next one as a dict, or None if there is none yet."""
        while line := self.file.readline():
            found = fields_of(line)
            if found.get("route", "").startswith("/users/"):
                return found


class Inbox:
    """The mails that a mail server took: the codes, or None, by address and job."""

    def __init__(self, smtp):
        self.smtp, self.read, self.found = smtp, 0, defaultdict(dict)

    def of(self, email):
        while self.read < len(self.smtp.mails):
            mail = self.smtp.mails[self.read]
            self.read += 1
            message = message_from_bytes(mail.content, policy=default)
            text = message.get_body(["plain"]).get_content()
            job = message["Message-ID"].strip("<>").partition("@")[0]
            code = re.search(r"^[0-9]{4}\r?$", text, re.MULTILINE)
            self.found[mail.recipients[0]][job] = code and code[0].strip()
        return self.found[email]


# -- The test --------------------------------------------------------------------------


@pytest.fixture
def system(servers, settings, brokers, database):
    """A service of its own, whose limits are soon reached."""
    smtp = SmtpServer(free_port())
    delete_queues(brokers["spare"])
    changed = settings | {
        "BROKER_URL": brokers["spare"], "SMTP_PORT": str(smtp.port),
        "CODE_LIFETIME": "900", "CODE_ATTEMPTS": str(ALLOWED),
        "EMAIL_LIMIT_HOUR": str(EMAIL_LIMIT),
        "ACTIVATE_LIMIT_HOUR": str(ACTIVATE_LIMIT),
        "FAILURE_LIMIT_HOUR": str(FAILURE_LIMIT), "TRUSTED_PROXIES": "1"}
    with running_program(servers.folder / "model", changed) as (api, consumer):
        wait_until(lambda: consumers_of(brokers["spare"]))
        yield SimpleNamespace(
            url=api.url, consumer=consumer, broker=brokers["spare"], database=database,
            postgres=servers.postgres, rabbitmq=servers.rabbitmq, inbox=Inbox(smtp),
            log=Log(api.log))
    smtp.close()


def test_it_does_what_the_model_does(system):
    class StepsHere(Steps):
        pass

    StepsHere.system = system
    run_state_machine_as_test(StepsHere, settings=hypothesis.settings(
        max_examples=STEPS // 50, stateful_step_count=50, deadline=None, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck)))
