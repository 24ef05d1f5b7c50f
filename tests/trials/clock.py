"""Whether the time of an answer tells who is registered.

    make clock                              about five minutes
    make clock OPTIONS="--answers 800"      longer, and more exact

Asks about new, waiting and active addresses in random order, and prints for each pair
the share of pairs of answers in which the second was slower, Mann-Whitney's U / nm: 0.5
tells nothing, and with 200 answers each chance alone gives 0.44 to 0.56 in 95 of 100.
"""

import bisect
import itertools
import random
import statistics
import threading
import time

import psycopg2
import steps
from servers.sink import Sink
from servers.system import whole_system

WRONG_PASSWORD = "not the password"
CLIENTS = 3      # in the background, when under load
STATES = "unknown", "waiting", "active"


def add_accounts(url, count):
    """So many waiting and active ones: copies of the only one, with its hash."""
    with psycopg2.connect(url) as db:
        db.cursor().execute("""
            INSERT INTO users (email, password_hash, code_digest, expires_at)
            SELECT 'waiting' || n || '@example.com', password_hash, code_digest,
                   expires_at
              FROM users, generate_series(1, %(count)s) AS n;
            INSERT INTO users (email, password_hash, code_digest, expires_at,
                               activated_at)
            SELECT 'active' || n || '@example.com', password_hash, code_digest,
                   expires_at, now()
              FROM users, generate_series(1, %(count)s) AS n
             WHERE email = 'first@example.com'
            """, {"count": count})
    db.close()


def register(service, email):
    return steps.register(service, email).status


def activate(service, email):
    return steps.activate(service, email, "1234", WRONG_PASSWORD).status


def measure(service, answers):
    """{(endpoint, state): the seconds of so many answers}, asked in random order."""
    questions = list(itertools.product((register, activate), STATES, range(answers)))
    random.shuffle(questions)
    seconds = {}
    for ask, state, number in questions:
        email = (steps.fresh_email() if state == "unknown"
                 else f"{state}{number + 1}@example.com")
        began = time.perf_counter()
        status = ask(service, email)
        elapsed = time.perf_counter() - began
        assert status == {register: 202, activate: 403}[ask], status
        seconds.setdefault((ask.__name__, state), []).append(elapsed)
    return seconds


def measure_under_load(service, answers):
    """The same while others register and activate without a pause."""
    done = threading.Event()

    def others():
        while not done.is_set():
            email = steps.fresh_email()
            register(service, email)
            activate(service, email)

    threads = [threading.Thread(target=others) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        return measure(service, answers)
    finally:
        done.set()
        for thread in threads:
            thread.join()


def share_slower(ones, others):
    """In which share of all pairs the other is slower; a tie is half a pair."""
    ones = sorted(ones)
    return sum(bisect.bisect_left(ones, other) + bisect.bisect_right(ones, other)
               for other in others) / (2 * len(ones) * len(others))


def report(when, seconds):
    """A line for each pair: its share, and both medians."""
    for endpoint in ("register", "activate"):
        for one, other in itertools.combinations(STATES, 2):
            pair = seconds[endpoint, one], seconds[endpoint, other]
            medians = [1000 * statistics.median(each) for each in pair]
            print(f"{when:10}  {endpoint}  {one:>7}, {other:7}  "
                  f"{share_slower(*pair):.2f}  ({medians[0]:.1f}, {medians[1]:.1f} ms)",
                  flush=True)


def add_options(parser):
    parser.add_argument("--answers", type=int, default=200, help="of each kind")


def main(options):
    answers = 20 if options.short else options.answers
    with whole_system(Sink, WEB_CONCURRENCY=None) as system:
        register(system.api, "first@example.com")
        add_accounts(system.postgres.url, answers)
        measure(system.api, 10)     # all of its connections are open now
        report("at rest", measure(system.api, answers))
        report("under load", measure_under_load(system.api, answers))
    return []
