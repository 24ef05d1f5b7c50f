"""The statements that carry the security, in every order that sessions can have.

upsert_waiting() writes a password and a code together, spend_attempt() counts a try and
compares, count_request() counts the failures of a client. Here, two and three sessions
take the statements of service.py step by step, in every order of their steps. BEGIN is
part of the first step: nobody else can notice it. A step that waits for a lock goes on
when it gets it.
"""

import ast
import select
from copy import copy
from itertools import combinations

import psycopg2
import pytest
from psycopg2.extensions import POLL_OK
from servers.process import TOP
from steps import fresh_email

ALLOWED = 3     # tries of a code
FAILURES = 2    # of a client
WRONG = 9       # the number of a code that nobody was mailed
QUICK = "-c synchronous_commit=off"    # what others see does not wait for the disk


def statement_of(function):
    """The SQL of a function in service.py."""
    program = ast.parse((TOP / "service.py").read_text())
    [body] = [node for node in program.body if getattr(node, "name", "") == function]
    [call] = [node for node in ast.walk(body) if isinstance(node, ast.Call)
              and getattr(node.func, "id", "") == "execute"]
    return call.args[0].value


UPSERT, SELECT, SPEND, ACTIVE, COUNT = map(statement_of, [
    "upsert_waiting", "select_account", "spend_attempt", "is_active", "count_request"])


def pair(password, code):
    """The values for a password and a code, each by the number of its registration."""
    return {"password_hash": f"password {password}", "lifetime": 60, "allowed": ALLOWED,
            "code_digest": f"code {code}".ljust(32).encode()}


# -- What a session does: each step yields a statement, and gets its row ---------------


class Register:
    """Registers with password and code of this number."""

    steps = 2

    def __init__(self, number):
        self.number = number

    def run(self):
        yield f"BEGIN; {UPSERT}", pair(self.number, self.number)
        yield "COMMIT", {}


class Activate:
    """Tries the password of one registration with the code of another."""

    steps = 2     # and one more at the end, if it did not activate

    def __init__(self, password, code):
        self.password, self.code = password, code

    def run(self):
        self.compared = self.activated = self.too_late = False
        account = yield SELECT, {}
        values = pair(self.password, self.code)
        self.authenticated = account[1] == values["password_hash"]    # otherwise 403
        if self.authenticated:
            row = yield SPEND, values
            self.compared = row is not None
            self.activated = bool(row and row[0])
            if not self.activated:
                self.too_late = (yield ACTIVE, values) is not None    # 409


class Guess(Activate):
    """The same by a client whose failures are counted, all in one transaction."""

    steps = 5

    def run(self):
        self.compared = self.activated = self.too_late = self.failed = False
        if (yield f"BEGIN; {COUNT}", more(1))[0] > FAILURES:    # as in activate(): 429
            yield "ROLLBACK", {}
            return
        yield from super().run()
        if self.too_late:
            yield "ROLLBACK", {}
            return
        if self.activated:
            yield COUNT, more(-1)
        yield "COMMIT", {}
        self.failed = not self.activated


def more(count):
    """The values that count so many more failures of a client."""
    return {"name": "activate failures", "count": count, "seconds": 3600}


class Session:
    """A connection on which somebody takes one step after another."""

    def __init__(self, url):
        self.connection = psycopg2.connect(url, async_=True, options=QUICK)
        while not self.is_free():
            pass

    def begin(self, actor, email):
        self.email, self.cursor = email, None
        self.steps, self.owed, self.ended = actor.run(), 0, False

    def is_free(self):
        return self.connection.poll() == POLL_OK

    def take_step(self):
        """Begins the next statement, if there is one; needs is_free()."""
        self.owed -= 1
        row = None
        if self.cursor and self.cursor.description:
            row = self.cursor.fetchone()
        try:
            statement, values = self.steps.send(row)
        except StopIteration:
            self.owed, self.ended = 0, True
        else:
            self.cursor = self.connection.cursor()
            self.cursor.execute(statement, values | {
                "email": self.email, "subject": self.email})


def act(order, actors, sessions, email, database):
    """Each actor, on a session of its own, takes a step when its number comes, or as
    soon as it can after that."""
    sessions = sessions[:len(actors)]

    def waits(session):     # for a lock
        return database("SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted",
                        [session.connection.get_backend_pid()])

    def take_what_is_owed():
        while ready := [each for each in sessions if each.owed > 0 and each.is_free()]:
            for session in ready:
                session.take_step()
                select.select([session.connection], [], [], 0.001)
                while not session.is_free() and not waits(session):
                    pass

    for session, actor in zip(sessions, actors):
        session.begin(actor, email)
    for number in order:
        sessions[number].owed += 1
        take_what_is_owed()
    while any(each.owed > 0 or not each.is_free() for each in sessions):
        take_what_is_owed()
    for session in sessions:
        while not session.ended:    # the end, after the row of its last statement
            session.owed = 1
            take_what_is_owed()


def orders(turns):
    """Every order of these numbers, of which some are alike."""
    if not turns:
        yield ()
    for first in sorted(set(turns)):
        others = list(turns)
        others.remove(first)
        for order in orders(others):
            yield first, *order


def orders_of(actors):
    """Every order of the steps of these actors, as their numbers.

    Of those that differ only in which of two like actors is which, one.
    """
    turns = [number for number, actor in enumerate(actors) for _ in range(actor.steps)]
    alike = [(one, other) for one, other in combinations(set(turns), 2)
             if vars(actors[one]) == vars(actors[other])]
    return [order for order in orders(turns)
            if all(order.index(one) < order.index(other) for one, other in alike)]


# -- Every order -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sessions(servers):
    three = [Session(servers.postgres.api_url) for _ in range(3)]
    yield three
    for session in three:
        session.connection.close()


# Two of a cast are there alone, too: the third can be done before or come after them.
CASTS = {
    "two registrations, the pair of one": [Register(1), Register(2), Activate(1, 1)],
    "two registrations, a mixture": [Register(1), Register(2), Activate(1, 2)],
    "a registration, both pairs": [Register(1), Activate(0, 0), Activate(1, 1)],
    "a registration, both mixtures": [Register(1), Activate(0, 1), Activate(1, 0)],
    "a registration, a wrong code, the pair": [
        Register(1), Activate(0, WRONG), Activate(0, 0)],
    "a registration, a wrong code, its pair": [
        Register(1), Activate(1, WRONG), Activate(1, 1)],
    "the pair three times": [Activate(0, 0)] * 3,
    "three wrong codes": [Activate(0, WRONG)] * 3,
    "two wrong codes, the pair": [*[Activate(0, WRONG)] * 2, Activate(0, 0)]}

BEFORE = {      # attempts, expires in seconds, active
    "a new code": (0, 60, False), "one try left": (ALLOWED - 1, 60, False),
    "no try left": (ALLOWED, 60, False), "an expired code": (0, -1, False),
    "an active account": (1, 60, True)}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("cast", CASTS)
def test_it_activates_once_one_pair_within_the_attempts_in_any_order(
        sessions, database, cast, before):
    attempts, seconds, active = BEFORE[before]
    actors = [copy(actor) for actor in CASTS[cast]]
    database("SET synchronous_commit = off")

    for order in orders_of(actors):
        email = fresh_email()
        database("""
            INSERT INTO users (email, password_hash, code_digest, attempts, expires_at,
                               activated_at)
            VALUES (%(email)s, %(password_hash)s, %(code_digest)s, %(attempts)s,
                    now() + %(seconds)s * interval '1 s',
                    CASE WHEN %(active)s THEN now() END)
            """, pair(0, 0) | {"email": email, "attempts": attempts,
                               "seconds": seconds, "active": active})

        act(order, actors, sessions, email, database)

        [(password, code, tried, activated_at)] = database("""
            SELECT password_hash, code_digest, attempts, activated_at
              FROM users WHERE email = %s""", [email])
        tries = [actor for actor in actors if isinstance(actor, Activate)]
        winners = [actor for actor in tries if actor.activated]
        number = int(password.split()[1])
        assert bytes(code) == pair(number, number)["code_digest"], order
        counted = sum(each.compared for each in tries if each.password == number)
        assert tried == counted + (attempts if number == 0 else 0), order
        assert len(winners) <= (not active), order
        assert bool(activated_at) == (active or len(winners) == 1), order
        assert all(each.password == each.code == number for each in winners), order
        assert number == 0 or not active, order     # nothing about it has changed
        if activated_at:
            assert all(each.activated or each.too_late for each in tries
                       if each.authenticated and each.password == each.code == number
                       ), order
        for each in {actor.password for actor in tries}:
            compared = sum(actor.compared for actor in tries if actor.password == each)
            assert compared <= ALLOWED - (attempts if each == 0 else 0), order


@pytest.mark.parametrize("codes", [(WRONG, WRONG), (WRONG, 0), (0, 0)],
                         ids=["two wrong codes", "a wrong code, the right one",
                              "the right code twice"])
def test_it_compares_one_code_where_a_client_has_one_failure_left_in_any_order(
        sessions, database, codes):
    guesses = [Guess(0, code) for code in codes]
    database("SET synchronous_commit = off")

    for order in orders_of(guesses):
        email = fresh_email()
        database("""
            INSERT INTO users (email, password_hash, code_digest, expires_at)
            VALUES (%(email)s, %(password_hash)s, %(code_digest)s,
                    now() + interval '1 h');
            INSERT INTO limits (name, subject, count, expires_at)
            VALUES ('activate failures', %(email)s, %(spent)s, now() + interval '1 h')
            """, pair(0, 0) | {"email": email, "spent": FAILURES - 1})

        act(order, guesses, sessions, email, database)

        [(count,)] = database("SELECT count FROM limits WHERE subject = %s", [email])
        failed = sum(guess.failed for guess in guesses)
        assert sum(guess.activated for guess in guesses) <= 1, order
        assert failed <= 1, order
        assert count == FAILURES - 1 + failed, order
        if codes == (WRONG, WRONG):
            assert sum(guess.compared for guess in guesses) == failed == 1, order
