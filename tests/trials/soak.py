"""An hour of load, and a fault every three minutes: does anything grow?

    make soak                               an hour, and some minutes for the balance

The load is 60 % of the capacity, which is measured first. Ends as chaos.py does, and
with a table of what was noted every ten seconds. It fails if something grew by over a
tenth between the second sixth of the time and the last. A sixth counts with its median,
but in memory with what it stayed above for nine tenths of its time: a hash in progress
takes 12 MiB, and is no growth.

Accounts are never deleted here, so the size of their table is divided by their number.
A window of the limits lasts up to a day. So once a minute, those of the addresses that
began ten minutes ago are made to end. Then the program deletes as many as come.
"""

import random
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import quantiles

import steps
from servers.process import tree

from trials import load
from trials.chaos import balance, befall, faults, under_load

SHARE = 0.6             # of the capacity
REQUESTS = 2            # of a caller, about: to register and to activate
PAUSE, SAMPLE, AGEING = 180, 10, 60     # seconds
GROWTH = 1.1            # times as much is not yet growth

END_WINDOWS = """
    UPDATE limits
       SET expires_at = now()
     WHERE expires_at > now()
       AND (name LIKE '% hour' AND expires_at < now() + interval '50 minutes' OR
            name LIKE '% day' AND expires_at < now() + interval '23 hours 50 minutes')
"""
SIZES = """
    SELECT pg_table_size('users') / greatest(1, count(*)),
           pg_indexes_size('users') / greatest(1, count(*)),
           pg_table_size('limits') / 1048576.0, pg_indexes_size('limits') / 1048576.0
      FROM users
"""


def rate(api):
    """New callers a second, from what eight callers register in ten seconds."""
    def call():
        while time.monotonic() < end:
            answers.append(steps.register(api, steps.fresh_email()).status)

    answers, end = [], time.monotonic() + 10
    steps.at_once(*[call] * 8)
    assert set(answers) == {202}, set(answers)
    load.say(f"capacity: {len(answers) / 10:.0f} registrations a second")
    return SHARE * len(answers) / 10 / REQUESTS


class Samples(threading.Thread):
    """Takes them until .ended is set: .series is {what: [(minute, value)]}."""

    def __init__(self, system):
        super().__init__(daemon=True)
        self.system, self.series, self.ended = system, {}, threading.Event()
        self.began = time.monotonic()

    def run(self):
        aged = self.began
        while not self.ended.wait(SAMPLE):
            minute = (time.monotonic() - self.began) / 60
            for what, value in self.sample():
                self.series.setdefault(what, []).append((minute, value))
            if time.monotonic() > aged + AGEING:
                with suppress(RuntimeError):    # PostgreSQL may be down
                    self.system.postgres.psql(END_WINDOWS)
                aged = time.monotonic()

    def sample(self):
        """(what, value) of all that can be had: a fault may be under way."""
        system = self.system
        for server in system.api, system.consumer, system.postgres, system.rabbitmq:
            if server.alive():
                pids = tree(server.process.pid)
                yield f"memory of {server.name}, MB", sum(map(memory_of, pids)) / 1024
                yield (f"file descriptors of {server.name}",
                       sum(map(descriptors_of, pids)))
        with suppress(RuntimeError):
            for what, size in zip(
                    ("bytes an account, table", "bytes an account, indexes",
                     "limits, MB of the table", "limits, MB of the indexes"),
                    system.postgres.psql(SIZES).split("|")):
                yield what, float(size)


def memory_of(pid):
    """A process's own memory in KiB, with its part of what it shares with a parent."""
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines
                   if line.startswith("Pss_Anon:"))
    return 0    # it has just ended


def descriptors_of(pid):
    """Files and connections."""
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def print_growth(series, minutes):
    """Prints the table of what was noted; returns a line for each thing that grew."""
    failures = []
    print(f"\n| | minutes {minutes / 6:.0f} to {minutes / 3:.0f} | "
          f"the last {minutes / 6:.0f} | ratio |\n" + "|---" * 4 + "|")
    for what, values in series.items():
        tenths = 1 if what.startswith("memory") else 5
        early, late = (quantiles([value for minute, value in values
                                  if first <= minute <= first + minutes / 6],
                                 n=10, method="inclusive")[tenths - 1]
                       for first in (minutes / 6, minutes * 5 / 6))
        print(f"| {what} | {early:.5g} | {late:.5g} | {late / (early or 1):.2f} |")
        if late > early * GROWTH:
            failures.append(f"it grew from {early:.5g} to {late:.5g}: {what}")
    return failures


def add_options(parser):
    parser.add_argument("--minutes", type=float, default=60)


def main(options):
    """Does faults, each kind once before any comes again."""
    done, failures, turn, chance = [], [], [], random.Random(options.seed)
    minutes, pause = (2, 20) if options.short else (options.minutes, PAUSE)
    with under_load(options, rate, threads=40) as system:
        samples = Samples(system)
        samples.start()
        end = time.monotonic() + 60 * minutes
        while (next_one := time.monotonic() + pause) < end:
            turn = turn or chance.sample(faults(system), len(faults(system)))
            time.sleep(next_one - time.monotonic())
            done.append(befall(system, turn.pop(), chance, failures))
        time.sleep(max(0, end - time.monotonic()))
        samples.ended.set()
        failures += balance(system, done)
        grown = print_growth(samples.series, minutes)
    return failures + ([] if options.short else grown)
