"""An hour of load, and a fault every three minutes: does anything grow?

    make soak                               an hour, and some minutes for the balance
    make soak OPTIONS="--minutes 12"

The load is 60 % of the capacity, which is measured first. Every ten seconds, it notes
what each program and server has: memory, file descriptors, connections, tables. Ends
with account.py's table and one of what was noted, and draws docs/soak.svg. It fails as
make chaos does, and if something grew by over a tenth between the second sixth of the
time and the last. A sixth counts with its median, but in memory with what it stayed
above for nine tenths of its time: a hash in progress takes 12 MiB, and is no growth.

Accounts are never deleted here, so the size of their table is divided by their number.
A window of the limits lasts up to a day. So once a minute, those of the addresses that
began ten minutes ago are made to end. Then the program deletes as many as come.

Of the processes, only gunicorn's master and its workers live all the hour, but for one
or two workers: faults kill the others.
"""

import argparse
import random
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import quantiles

import steps
from bench import draw
from servers.process import TOP, tree
from servers.sink import Sink
from servers.system import whole_system

from chaos import load
from chaos.__main__ import HEALING, befall, faults, processes
from chaos.account import account

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


def capacity(api, seconds=10):
    """Registrations a second of eight callers, each of whom waits for the answer."""
    def call():
        while time.monotonic() < end:
            answers.append(steps.register(api, steps.fresh_email()).status)

    answers, end = [], time.monotonic() + seconds
    steps.at_once(*[call] * 8)
    assert set(answers) == {202}, set(answers)
    return len(answers) / seconds


# -- What is noted ---------------------------------------------------------------------


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
        for server, port in ((system.postgres, system.postgres.port),
                             (system.rabbitmq, system.rabbitmq.port),
                             (system.mail_server, system.mail_server.smtp_port)):
            yield f"connections to {server.name}", connections_to(port)
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
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def connections_to(port):
    """How many are established."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(each[3] == "01" and each[1].endswith(f":{port:04X}") for each in fields)


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


def picture(series, began, done, callers, minutes):
    """Draws docs/soak.svg, with a mark for each fault."""
    def lines(beginning):
        return [(what.removeprefix(beginning), values)
                for what, values in series.items() if what.startswith(beginning)]

    good = [0] * (int(minutes) + 1)
    for request in callers.requests:
        minute = int((request.ended - began) / 60)
        if request.status in (200, 202) and 0 <= minute < len(good):
            good[minute] += 1
    rate = [(minute + 0.5, count / 60) for minute, count in enumerate(good[:-1])]
    path = TOP / "docs/soak.svg"
    path.write_text(draw.soak([
        ("2xx a second", [("", rate)]),
        ("Memory, MB", [(name.removesuffix(", MB"), values)
                        for name, values in lines("memory of ")]),
        ("File descriptors", lines("file descriptors of ")),
        ("Connections", lines("connections ")),
        ("Bytes an account", lines("bytes an account, ")),
        ("Limits, MB", lines("limits, MB of the ")),
    ], minutes, [(fault.began - began) / 60 for fault in done]))


# -- The run ---------------------------------------------------------------------------


def fault_every(pause, system, callers, minutes, chance):
    """Does faults, each kind once before any comes again: (faults, failures)."""
    done, failures, turn = [], [], []
    system.processes, system.healing = processes(system), HEALING
    end = time.monotonic() + 60 * minutes
    while (next_one := time.monotonic() + pause) < end:
        turn = turn or chance.sample(faults(system), len(faults(system)))
        time.sleep(next_one - time.monotonic())
        done.append(befall(system, callers, turn.pop(), chance, failures))
    time.sleep(max(0, end - time.monotonic()))
    return done, failures


def main():
    parser = argparse.ArgumentParser("soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    options = parser.parse_args()
    load.say(f"seed {options.seed}")
    with whole_system(Sink, CODE_LIFETIME=str(load.LIFETIME), TRUSTED_PROXIES="1",
                      WEB_CONCURRENCY=None) as system:
        most = capacity(system.api)
        load.say(f"capacity: {most:.0f} registrations a second")
        callers = load.Load([system.api], system.mail_server, options.seed,
                            rate=SHARE * most / REQUESTS, threads=40)
        samples = Samples(system)
        began = time.time()
        callers.start()
        samples.start()
        try:
            done, failures = fault_every(PAUSE, system, callers, options.minutes,
                                         random.Random(options.seed))
        finally:
            samples.ended.set()
            callers.finish()
        rate = len(callers.requests) / 60 / options.minutes
        load.say(f"{rate:.1f} requests a second, {rate / most:.0%} of the capacity")
        picture(samples.series, began, done, callers, options.minutes)
        failures += account(callers, done, system.postgres.url, [system.api],
                            [system.consumer])
        failures += print_growth(samples.series, options.minutes)
    return "\n".join(failures)


if __name__ == "__main__":
    sys.exit(main() or 0)
