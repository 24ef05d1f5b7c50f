"""How fast it is, each figure against a limit measured in turn with it: make bench.

About ten minutes, on private servers, with the settings of production; only the limits
on requests are raised, and codes live longer. Prints one table, draws docs/load.svg.

    python tests/bench.py --accounts 10000000     # the big table ten times as big
    python tests/bench.py --only registrations    # one part; --help lists them
    python tests/bench.py --program /tmp/changed  # the program in another folder

Read main(), then the parts in its order. outside.py is the callers and the mail server,
bench_limit.py the route that answers are compared with, draw.py the picture.
"""

import argparse
import functools
import json
import os
import platform
import smtplib
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import amqp
import argon2
import conftest
import draw
import jobs
import servers as start
import steps
from kombu import Connection

CORES = os.cpu_count()
CLIENTS, CROWD = 8, 100
TICK = os.sysconf("SC_CLK_TCK")     # of /proc/*/stat, a second
BEGIN = time.monotonic()
# Of the capacity. Crowded around it, where the curves bend.
LOADS = 0.1, 0.3, 0.5, 0.7, 0.85, 1, 1.15, 1.5, 2, 3, 4.5, 6, 9, 12


def say(text):
    print(f"{time.monotonic() - BEGIN:5.0f} s  {text}", file=sys.stderr, flush=True)


def percentile(numbers, percent):
    numbers = sorted(numbers)
    return numbers[min(len(numbers) - 1, len(numbers) * percent // 100)]


# -- The system ------------------------------------------------------------------------


class Outside(start.Server):
    """outside.py; .do("closed", ...) has it obey a command and gives the result."""

    name = "outside"

    def launch(self):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("outside.py")], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        start.guard(self.process.pid)

    def answers(self):
        self.port = int(self.process.stdout.readline())
        return True

    def do(self, command, /, **arguments):
        self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self.process.stdin.flush()
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))


class Limit(start.Gunicorn):
    """The same gunicorn around bench_limit.py."""

    def command(self):
        return [sys.executable, "-m", "gunicorn", "bench_limit:app", "--pythonpath",
                str(Path(__file__).parent), "--bind", f"127.0.0.1:{self.port}"]

    def answers(self):
        return self.alive() and start.responds(self.port)


@contextmanager
def system():
    """All servers and the program, with .settings for more of it."""
    start.install_missing([start.Postgres, start.RabbitMQ])
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.chmod(folder, 0o755)
        folder = Path(folder)
        with start.running(start.Postgres(folder), start.RabbitMQ(folder),
                           Outside(folder)) as (postgres, rabbitmq, outside):
            postgres.psql((start.Program.cwd / "sql/schema.sql").read_text())
            settings = conftest.SETTINGS | {
                "DATABASE_URL": postgres.url, "BROKER_URL": rabbitmq.url,
                "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(outside.port),
                "CODE_LIFETIME": "900", "WEB_CONCURRENCY": str(CORES)}
            with start.running(start.Gunicorn(folder, settings),
                               start.Consumer(folder, settings)) as (api, consumer):
                yield SimpleNamespace(
                    folder=folder, settings=settings, postgres=postgres,
                    rabbitmq=rabbitmq, outside=outside, api=api, consumer=consumer)


@contextmanager
def another_api(here, kind=start.Gunicorn, **settings):
    folder = here.folder / f"api{time.monotonic_ns()}"
    with kind(folder, here.settings | settings) as api:
        yield api


def processes(here):
    return {"API": here.api, "PostgreSQL": here.postgres, "RabbitMQ": here.rabbitmq,
            "consumer": here.consumer, "callers and sink": here.outside}


def cpu_seconds(server):
    """Of a process and its living descendants, since they began."""
    total = 0
    for pid in start.tree(server.process.pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def megabytes(server):
    """The memory of each process of a server; of what they share, its share."""
    return [int(line.split()[1]) / 1024 for pid in start.tree(server.process.pid)
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith("Pss:")]


# -- The table -------------------------------------------------------------------------

rows = []


def row(figure, aim, value, met=None, limit="–", ratio="–"):
    rows.append([figure, limit, value, ratio, aim,
                 {True: "met", False: "NOT MET", None: ""}[met]])
    say("  ".join(rows[-1]))


def ratio_row(figure, aim, pairs, unit, at_most=False):
    """pairs: (value, limit) of each round, divided before the median is taken."""
    value, limit = (median(each) for each in zip(*pairs))
    ratio = median([value / limit for value, limit in pairs])
    row(figure, f"{'≤' if at_most else '≥'} {aim}", f"{value:.4g} {unit}",
        ratio <= aim if at_most else ratio >= aim, f"{limit:.4g} {unit}",
        f"{ratio:.3f}")


def print_table():
    table = [["figure", "limit", "value", "ratio", "aim", ""], *rows]
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    print()
    for line in table:
        cells = (text.ljust(width) for text, width in zip(line, widths))
        print("  ".join(cells).rstrip())


def print_machine():
    model = next((line.partition(": ")[2].strip()
                  for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    packages = ["gunicorn", "Flask", "psycopg2-binary", "kombu", "argon2-cffi"]
    postgres = start.run([start.find("postgres"), "--version"]).split()[2]
    rabbitmq = start.run(["dpkg-query", "-Wf", "${Version}", "rabbitmq-server"]) \
        if start.find("dpkg-query") else "?"
    print(f"\n{CORES} cores of {model}, {memory:.0f} GB, Linux {platform.release()}, "
          f"load average at the begin {LOAD_AVERAGE:.1f}\n"
          f"Python {platform.python_version()}, "
          f"PostgreSQL {postgres}, RabbitMQ {rabbitmq}, "
          + ", ".join(f"{name} {version(name)}" for name in packages))


# -- The limits ------------------------------------------------------------------------


def hash_limit(seconds):
    """(hashes a second on all cores, CPU seconds of one), nothing else working."""
    workers = [subprocess.Popen([sys.executable, __file__, "hash", str(seconds)],
                                stdout=subprocess.PIPE, text=True)
               for _ in range(CORES)]
    results = [json.loads(worker.communicate()[0]) for worker in workers]
    return sum(rate for rate, _ in results), mean(cpu for _, cpu in results)


def hash_for(seconds):
    hasher = argon2.PasswordHasher(time_cost=3, memory_cost=12 * 1024, parallelism=1)
    hasher.hash("warm up")
    count, begin, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() < begin + seconds:
        hasher.hash("correct horse battery")
        count += 1
    elapsed = time.monotonic() - begin
    print(json.dumps([count / elapsed, (time.process_time() - cpu) / count]))


@contextmanager
def smtp_loop(port, count, mail):
    """A loop over smtplib that sends a mail so many times."""
    with subprocess.Popen([sys.executable, __file__, "smtp", str(port), str(count)],
                          stdin=subprocess.PIPE, text=True) as loop:
        loop.stdin.write(mail)
        loop.stdin.close()
        yield


def smtp_for(port, count):
    mail = sys.stdin.buffer.read()
    with smtplib.SMTP("127.0.0.1", port) as session:
        for _ in range(count):
            session.sendmail("registration@example.com", ["ann@example.com"], mail)


# -- The parts -------------------------------------------------------------------------


def memory(here, seconds):
    """Memory, while the processes are young.

    Most requests need no hash: 20,000 that do would take longer than all the rest.
    """
    def ask(what, seconds, least):
        done = 0
        while done < least:
            done += sum(here.outside.do("closed", what=what, port=here.api.port,
                                        clients=32, seconds=seconds).all.values())
        return done

    hashed = ask("register", 0.5, 150)
    cheap = ask("cheap", 0.1, 1000 - hashed)
    before = {name: megabytes(server) for name, server in processes(here).items()}
    first = hashed + cheap
    hashed += ask("register", seconds, 600)
    cheap += ask("cheap", seconds / 2, 20_000 - hashed - cheap)
    after = {name: megabytes(server) for name, server in processes(here).items()}
    say(f"memory: after {first} and {hashed + cheap} requests, {hashed} of them "
        f"with a hash; MB: {before} {after}")
    for name in "API", "consumer":
        for number, (now, then) in enumerate(zip(after[name], before[name])):
            process = name if name == "consumer" else (
                "gunicorn" if number == 0 else f"API worker {number}")
            row(f"memory after 20,000 requests: {process}", "≤ 1.05", f"{now:.1f} MB",
                now / then <= 1.05, f"{then:.1f} MB", f"{now / then:.3f}")
    for name in "PostgreSQL", "RabbitMQ":
        now, then = sum(after[name]), sum(before[name])
        row(f"memory after 20,000 requests: {name}", "≤ 1.05", f"{now:.0f} MB",
            now / then <= 1.05, f"{then:.0f} MB", f"{now / then:.3f}")


def registrations(here, seconds, rounds=10):
    """Hashes, registrations, activations, and a crowd, in turn.

    In short turns, hashes before and after what is divided by them: how fast a machine
    is that others share, changes within seconds.
    """
    register, activate, crowd, keen, latencies = [], [], [], [], {}
    cost = {name: [] for name in processes(here)}
    ask = functools.partial(
        here.outside.do, "closed", port=here.api.port, seconds=seconds / 2)
    for number in range(rounds):
        limits = [hash_limit(seconds / 5)]
        before = {name: cpu_seconds(server) for name, server in processes(here).items()}
        eight = ask(what="register", clients=CLIENTS)
        for name, server in processes(here).items():
            cost[name].append(1000 * (cpu_seconds(server) - before[name])
                              / eight.all["202"])
        active = ask(what="activate", clients=CLIENTS)
        limits.append(hash_limit(seconds / 5))
        hashes, hash_cpu = map(mean, zip(*limits))
        cost["API"][-1] -= 1000 * hash_cpu
        hundred = ask(what="register", clients=CROWD, patient=True)
        rush = ask(what="register", clients=CROWD)
        assert set(eight.all) == {"202"} and set(active.all) == {"200"}, (eight, active)
        assert {*hundred.all, *rush.all} <= {"202", "503"}, (hundred.all, rush.all)
        assert not eight.lost + hundred.lost + rush.lost
        per_second = [len(phase.answers[status]) / phase.seconds for phase, status in (
            (eight, "202"), (active, "200"), (hundred, "202"), (rush, "202"))]
        register.append((per_second[0], hashes))
        activate.append((per_second[1], hashes))
        crowd.append((per_second[2], per_second[0]))
        keen.append((per_second[3], per_second[0]))
        for name, phase in ("", hundred), ("keen ", rush):
            for status, found in phase.answers.items():
                latencies.setdefault(name + status, []).append(percentile(found, 99))
        say(f"round {number + 1}: {hashes:.1f} hashes, "
            f"{per_second[0]:.1f} registrations, "
            f"{per_second[1]:.1f} activations/s; with {CROWD} {per_second[2]:.1f}, "
            f"no pauses {per_second[3]:.1f}; hash {1000 * hash_cpu:.1f} ms; CPU ms: "
            + ", ".join(f"{name} {found[-1]:.2f}" for name, found in cost.items()))
    ratio_row(f"registrations, {CLIENTS} clients / hashes", 0.75, register, "/s")
    ratio_row(f"activations, {CLIENTS} clients / hashes", 0.75, activate, "/s")
    ratio_row(f"goodput, {CROWD} clients / {CLIENTS} clients", 0.95, crowd, "/s")
    row("(the same, if none waits after a 503)", "–",
        f"{median([value for value, _ in keen]):.4g} /s",
        ratio=f"{median([value / limit for value, limit in keen]):.3f}")
    for status, word, most in ("202", "accepted", 1), ("503", "shed", 0.25):
        slowest = median(latencies[status])
        none_waits = median(latencies["keen " + status])
        row(f"p99 {word}, {CROWD} clients", f"≤ {most} s", f"{slowest:.3f} s",
            slowest <= most)
        row("(the same, if none waits after a 503)", "–", f"{none_waits:.3f} s")
    for name, aim in ("API", 3), ("consumer", 2), ("PostgreSQL", None), \
            ("RabbitMQ", None), ("callers and sink", None):
        value = median(cost[name])
        row(f"CPU a registration: {name}" + ", beside the hash" * (name == "API"),
            f"≤ {aim} ms" if aim else "–", f"{value:.2f} ms",
            value <= aim if aim else None)
    here.capacity = median([rate for rate, _ in register])


def limited(here, seconds, rounds=5):
    """429 against a route that does one upsert."""
    here.postgres.psql("CREATE UNLOGGED TABLE visits (name text PRIMARY KEY, "
                       "count integer) WITH (fillfactor = 50)")
    pairs, slowest, cpu = [], [], []
    with another_api(here, IP_LIMIT="60") as api, another_api(here, Limit) as limit:
        ask = functools.partial(here.outside.do, "closed", clients=CLIENTS)
        ask(what="register", port=api.port, seconds=2)      # beyond the limit
        for _ in range(rounds):
            most = ask(what="upsert", port=limit.port, seconds=seconds / 2)
            shed = ask(what="register", port=api.port, seconds=seconds / 2)
            assert set(shed.all) == {"429"} == set(most.all), (shed.all, most.all)
            pairs.append((len(shed.answers["429"]) / shed.seconds,
                          len(most.answers["429"]) / most.seconds))
            cpu.append(shed.cpu / (shed.seconds + 0.5))
            say(f"429: {pairs[-1][0]:.0f}/s, one upsert {pairs[-1][1]:.0f}/s, callers "
                f"{cpu[-1]:.2f} of a core")
        crowd = here.outside.do("closed", what="register", port=api.port, clients=CROWD,
                                seconds=seconds / 2)
        slowest = percentile(crowd.answers["429"], 99)
    ratio_row("429 to one client / a route with one upsert", 0.5, pairs, "/s")
    row(f"p99 limited, {CROWD} clients", "≤ 0.25 s", f"{slowest:.3f} s",
        slowest <= 0.25)


def mails(here, seconds, rounds=5):
    """A consumer with a full queue against a loop over smtplib."""
    count, pairs, cpu = int(250 * seconds), [], []
    here.consumer.stop()
    for number in range(rounds):
        fill_queue(here.rabbitmq.url, count, number)
        folder = here.folder / f"consumer{number}"
        with start.Consumer(folder, here.settings) as consumer:
            done = here.outside.do("count_mails", count=count)
            cpu.append(1000 * cpu_seconds(consumer) / count)
        with smtp_loop(here.outside.port, count, done.example):
            most = here.outside.do("count_mails", count=count)
        assert done.mails == most.mails == count, (done, most)
        pairs.append((count / done.seconds, count / most.seconds))
        say(f"mails: {pairs[-1][0]:.0f}/s, smtplib {pairs[-1][1]:.0f}/s; sink "
            f"{1000 * done.cpu / count:.2f} ms a mail, consumer {cpu[-1]:.2f} ms with "
            "its start")
    here.consumer.start()
    ratio_row("mails of one consumer / a loop over smtplib", 0.8, pairs, "/s")


def fill_queue(broker, count, number):
    """Jobs as service.py writes them; without a confirm for each, so in a second."""
    channel = Connection(broker).default_channel
    now = time.time()
    for each in range(count):
        job = {"template": "code", "email": f"bench{each}@example.com", "code": "0427",
               "issued_at": now, "expires_at": now + 900}
        channel.basic_publish(amqp.Message(
            json.dumps(job), content_type="application/json", content_encoding="utf-8",
            delivery_mode=2, message_id=f"{number:04x}{each:028x}"),
            routing_key=jobs.MAIL)
    steps.wait_until(lambda: jobs.waiting_in(broker) == count)
    channel.connection.client.collect()


def delays(here, seconds):
    """From the 202 to the mail server's 250, one at a time."""
    found = here.outside.do("each", port=here.api.port, count=int(20 * seconds)).delays
    for percent, aim in (50, 10), (99, 40):
        value = 1000 * percentile(found, percent)
        row(f"202 to mail accepted, p{percent}", f"≤ {aim} ms", f"{value:.1f} ms",
            value <= aim)


def accounts(here, seconds, rounds=20):
    """Registrations one at a time, with a big table and with an empty one."""
    many, pairs, urls = OPTIONS.accounts, [], {}
    for name in "none", "many":
        here.postgres.psql(f"CREATE DATABASE {name}")
        urls[name] = here.postgres.url.rpartition("/")[0] + "/" + name
        psql(urls[name], (start.Program.cwd / "sql/schema.sql").read_text())
    begin = time.monotonic()
    psql(urls["many"], FILL.format(accounts=many))
    say(f"{many:,} accounts made in {time.monotonic() - begin:.0f} s")
    with another_api(here, DATABASE_URL=urls["none"]) as none, \
            another_api(here, DATABASE_URL=urls["many"]) as some:
        for api in none, some:
            here.outside.do("each", port=api.port, count=30)       # connections, caches
        for _ in range(rounds):
            value, limit = (median(here.outside.do(
                "each", port=api.port, count=int(1.5 * seconds)).latencies)
                for api in (some, none))
            pairs.append((1000 * value, 1000 * limit))
            say(f"registration p50: {1000 * value:.1f} ms with {many:,}, "
                f"{1000 * limit:.1f} ms with none")
    ratio_row(f"registration p50, {many:,} accounts / none", 1.1, pairs, "ms",
              at_most=True)


# Nine in ten are active; of those that wait, every second one for longer than a day.
FILL = """
    INSERT INTO users (email, password_hash, code_digest, expires_at, registered_at,
                       activated_at)
    SELECT 'account' || n || '@example.com',
           '$argon2id$v=19$m=12288,t=3,p=1$' || left(md5('salt' || n), 22) || '$'
               || left(encode(sha256(n::text::bytea), 'base64'), 43),
           sha256(n::text::bytea), now() - interval '1 minute',
           now() - CASE WHEN n % 10 = 0 THEN n % 20 / 10 * interval '2 days'
                        ELSE interval '30 days' END,
           CASE WHEN n % 10 > 0 THEN now() - interval '30 days' END
      FROM generate_series(1, {accounts}) AS n;

    INSERT INTO limits (name, subject, count, expires_at)
    SELECT 'register address day', 'account' || n || '@example.com', 1,
           now() + (n % 86400 - 3600) * interval '1 second'
      FROM generate_series(1, {accounts}) AS n;

    ANALYZE;
    CHECKPOINT;
"""


def psql(url, sql):
    return start.run([start.find("psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", url],
                     input=sql)


def picture(here, seconds):
    """Goodput and p99 as the offered load grows; arrivals do not wait for answers."""
    points = []
    capacity = getattr(here, "capacity", None)
    if not capacity:
        found = here.outside.do("closed", what="register", port=here.api.port,
                                clients=CLIENTS, seconds=seconds)
        capacity = len(found.answers["202"]) / found.seconds
    for load in LOADS:
        found = here.outside.do("opened", what="register", port=here.api.port,
                                rate=load * capacity, seconds=seconds)
        assert set(found.all) <= {"202", "503"}, found.all
        good, shed = found.answers.get("202", []), found.answers.get("503", [])
        points.append((load * capacity, len(good) / found.seconds, percentile(good, 99),
                       percentile(shed, 99) if shed else None))
        say(f"{load:5.2f} x capacity: {len(good) / found.seconds:.1f}/s good, p99 "
            f"{points[-1][2]:.3f} s; {len(shed) / found.seconds:.0f}/s shed, p99 "
            f"{points[-1][3] or 0:.3f} s; callers {found.cpu / found.seconds:.2f} core")
    path = start.TOP / "docs/load.svg"
    path.write_text(draw.load(points, capacity))
    say(f"drawn: {path}")


# -- All of it -------------------------------------------------------------------------

PARTS = memory, registrations, limited, mails, delays, accounts, picture


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accounts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=8, help="of a phase")
    parser.add_argument("--only", help="some parts, of: " + ", ".join(
        part.__name__ for part in PARTS))
    parser.add_argument("--program", type=Path, default=start.TOP,
                        help="the folder of the program that is measured")
    return parser.parse_args()


def main():
    wanted = OPTIONS.only.split(",") if OPTIONS.only else [p.__name__ for p in PARTS]
    start.Program.cwd = OPTIONS.program.resolve()
    with system() as here:
        for part in PARTS:
            if part.__name__ in wanted:
                say(f"-- {part.__name__}: {part.__doc__.split(chr(10))[0]}")
                part(here, OPTIONS.seconds)
    print_machine()
    print_table()


if __name__ == "__main__":
    if sys.argv[1:2] == ["hash"]:
        hash_for(float(sys.argv[2]))
    elif sys.argv[1:2] == ["smtp"]:
        smtp_for(*map(int, sys.argv[2:]))
    else:
        LOAD_AVERAGE = os.getloadavg()[0]
        OPTIONS = options()
        main()
