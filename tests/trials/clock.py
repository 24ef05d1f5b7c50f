"""Whether the time of an answer tells who is registered.

    make clock                              about three minutes
    make clock OPTIONS="--answers 800"      longer, and more exact

Asks about unknown, waiting and active addresses in random order, and prints for each
two kinds the share of pairs of answers in which the second was slower (Mann-Whitney's
U / nm). 0.5 tells nothing; fails if one is over four standard deviations from it.
"""

import bisect
import itertools
import math
import random
import statistics
import time

import psycopg2
import steps
from servers.sink import Sink
from servers.system import whole_system

KINDS = "unknown", "waiting", "active"
SIGMAS = 4


def add_accounts(url, count):
    """So many waiting and active ones: copies of the only one, with its hash."""
    with psycopg2.connect(url) as db:
        db.cursor().execute("""
            INSERT INTO users (email, password_hash, code_digest, expires_at,
                               activated_at)
            SELECT kind || n || '@example.com', password_hash, code_digest, expires_at,
                   CASE kind WHEN 'active' THEN now() END
              FROM users, generate_series(1, %(count)s) AS n,
                   (VALUES ('waiting'), ('active')) AS kinds (kind)
            """, {"count": count})
    db.close()


def register(service, email):
    assert steps.register(service, email).status == 202


def activate(service, email):
    answer = steps.activate(service, email, "1234", "not the password")
    assert answer.status == 403


def measure(service, answers):
    """{(endpoint, kind): the seconds of so many answers}, asked in random order."""
    questions = list(itertools.product((register, activate), KINDS, range(answers)))
    random.shuffle(questions)
    seconds = {}
    for ask, kind, number in questions:
        email = (steps.fresh_email() if kind == "unknown"
                 else f"{kind}{number + 1}@example.com")
        began = time.perf_counter()
        ask(service, email)
        seconds.setdefault((ask.__name__, kind), []).append(time.perf_counter() - began)
    return seconds


def share_slower(ones, others):
    """In which share of all pairs the other is slower; a tie is half a pair."""
    ones = sorted(ones)
    return sum(bisect.bisect_left(ones, other) + bisect.bisect_right(ones, other)
               for other in others) / (2 * len(ones) * len(others))


def report(seconds, answers):
    """Prints a line for each two kinds; gives one for each that can be told apart."""
    failures, chance = [], SIGMAS / math.sqrt(6 * answers)
    for endpoint in "register", "activate":
        for one, other in itertools.combinations(KINDS, 2):
            pair = seconds[endpoint, one], seconds[endpoint, other]
            share = share_slower(*pair)
            medians = ", ".join(f"{1e3 * statistics.median(each):.1f}" for each in pair)
            line = f"{endpoint}  {one:>7}, {other:7}  {share:.2f}  ({medians} ms)"
            print(line, flush=True)
            if abs(share - 0.5) > chance:
                failures.append(f"can be told apart: {line}")
    return failures


def add_options(parser):
    parser.add_argument("--answers", type=int, default=200, help="of each kind")


def main(options):
    answers = 20 if options.short else options.answers
    with whole_system(Sink, WEB_CONCURRENCY=None) as system:
        register(system.api, "first@example.com")
        add_accounts(system.postgres.url, answers)
        measure(system.api, 10)     # all of its connections are open now
        return report(measure(system.api, answers), answers)
