"""How fast the program is, each figure against a limit measured in turn with it.

    make bench                                      about a quarter of an hour
    make bench OPTIONS="--accounts 10000000"        the big table ten times as big
    make bench OPTIONS="--only registrations"       one part; --help lists them
    make bench OPTIONS="--huge-pages"               with and without; needs root
    make bench OPTIONS="--program /tmp/changed"     the program in another folder
    make bench OPTIONS="--against ../version-2"    another version, in turn with it

It prints one table and draws docs/load.svg. It starts servers of its own, and the other
version beside the program: with the packages of its .venv, and a database, a virtual
host, a consumer and callers of its own. Both run with the settings of production, but
the limits on requests are out of the way and codes live longer.

Read main(), then the parts in its order. outside.py has the callers and the mail
server, limit.py the limits, draw.py the picture; servers/edge.py is nginx.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import amqp
import steps
from kombu import Connection
from servers.edge import Edge
from servers.install import find, install_missing
from servers.postgres import Postgres
from servers.process import (
    TOP,
    Server,
    guard,
    interrupt,
    responds,
    run,
    running,
    tree,
)
from servers.program import Gunicorn, Home, Program
from servers.rabbitmq import RabbitMQ
from servers.system import (
    create_tables,
    running_program,
    settings_for,
    temporary_folder,
)
from steps import jobs

from bench import draw

CORES = os.cpu_count()
CALLERS, CROWD, TRICKLING = 8, 100, 1000
# Multiples of the capacity: for the picture, denser where the curves bend, and those
# whose goodput has an aim.
LOADS = 0.1, 0.2, 0.4, 0.7, 0.85, 1, 1.15, 1.5, 2, 3, 4, 6, 8, 12
GOODPUT = {2: 0.9, 4: 0.9, 8: 0.85}
LIMITS = Path(__file__).with_name("limit.py")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TICK = os.sysconf("SC_CLK_TCK")     # of /proc/*/stat, a second
BEGIN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGIN:5.0f} s  {text}", file=sys.stderr, flush=True)


# -- The system ------------------------------------------------------------------------


class Helper(Server):
    """A Python process that obeys us: a line of JSON each way."""

    def launch(self):
        self.process = subprocess.Popen(
            [sys.executable, *self.command()], text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        guard(self.process.pid)

    def answers(self):
        return self.alive()

    def tell(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def hear(self):
        return json.loads(self.process.stdout.readline())


class Outside(Helper):
    """The callers and the mail server."""

    name = "outside"

    def command(self):
        return [Path(__file__).with_name("outside.py")]

    def answers(self):
        self.smtp_port = int(self.process.stdout.readline())
        return True

    def do(self, command, /, **arguments):
        self.tell(do=command, **arguments)
        return SimpleNamespace(**self.hear())


class Hasher(Helper):
    """Hashes on one core."""

    name = "hasher"

    def command(self):
        return [LIMITS, "hash"]


class Limit(Gunicorn):
    """The same gunicorn around limit.py."""

    def command(self):
        return [sys.executable, "-m", "gunicorn", "bench.limit:app", "--pythonpath",
                str(TOP / "tests"), "--bind", f"127.0.0.1:{self.port}"]

    def answers(self):
        return self.alive() and responds(self.port)


@contextmanager
def system():
    """All that runs from beginning to end: the program, with .hashers, and the other
    version, if there is one, as its .other."""
    install_missing("PostgreSQL", "RabbitMQ", "nginx")
    with temporary_folder() as folder, ExitStack() as stack:
        servers = Postgres(folder), RabbitMQ(folder)
        hashers = [Hasher(folder) for _ in range(CORES)]
        stack.enter_context(running(*servers, *hashers))
        here = stack.enter_context(
            program(servers, "here", Home(OPTIONS.program, sys.executable)))
        here.hashers, here.other = hashers, None
        if OPTIONS.against:
            home = Home(OPTIONS.against, OPTIONS.against / ".venv/bin/python")
            here.other = stack.enter_context(program(servers, "other", home))
        yield here


def versions(here):
    return [here, here.other] if here.other else [here]


@contextmanager
def program(servers, name, home):
    """One version of the program; the servers are all that it shares with the other."""
    postgres, rabbitmq = servers
    folder = postgres.folder / name
    rabbitmq.ctl("add_vhost", name)
    rabbitmq.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    with Outside(folder) as outside:
        settings = settings_for(
            new_database(postgres, name, home.folder), rabbitmq.url_of(name),
            outside.smtp_port, CODE_LIFETIME="900",
            TRUSTED_PROXIES="1",                # each request is a client of its own
            WEB_CONCURRENCY=None)               # each version has its own default
        with running_program(folder, settings, (home, home)) as (api, consumer):
            yield SimpleNamespace(
                name=name, folder=folder, settings=settings, postgres=postgres,
                rabbitmq=rabbitmq, outside=outside, api=api, consumer=consumer)


def new_database(postgres, name, home):
    """The URL of a database with the tables of that version."""
    postgres.psql(f"CREATE DATABASE {name}")
    create_tables(postgres, name, home)
    return postgres.url_of(name, "registration_api")


@contextmanager
def another_api(here, kind=Gunicorn, **settings):
    """One more process of the program, or of another kind, with changed settings."""
    folder = here.folder / f"api{time.monotonic_ns()}"
    with kind(folder, here.settings | settings) as api:
        yield api


@contextmanager
def behind_the_edge(here):
    """(an API, nginx in front of it), as in docker-compose.yml."""
    with another_api(here, TRUSTED_PROXIES="1") as api, \
            Edge(api.folder / "edge", api) as edge:
        yield api, edge


# -- What is measured ------------------------------------------------------------------


def ask(version, what, seconds, clients=CALLERS, port=None, statuses=None):
    """Callers who ask again as soon as they are answered."""
    found = version.outside.do("closed", what=what, port=port or version.api.port,
                               clients=clients, seconds=seconds)
    return checked(found, statuses or {"register": ["202"], "activate": ["200"]}[what])


def checked(found, statuses):
    """The same, if every caller had one of these answers, and every 202 its mail."""
    assert set(found.all) <= set(statuses), found.all
    assert not found.unanswered and not found.lost, (found.unanswered, found.lost)
    return found


def per_second(found, status="202"):
    return found.answers.get(status, 0) / found.seconds


def p99(found, status="202"):
    return percentile(found.latencies.get(status, [0]), 99)


def percentile(numbers, percent):
    numbers = sorted(numbers)
    return numbers[min(len(numbers) - 1, len(numbers) * percent // 100)]


def hashes(here, seconds):
    """(hashes a second on all cores, CPU ms of one); nothing else works."""
    for each in here.hashers:
        each.tell(seconds=seconds)
    rates, cpu = zip(*[each.hear() for each in here.hashers])
    return sum(rates), 1000 * mean(cpu)


def processes(version):
    """All that has to do with its requests, but the callers."""
    return {"API": version.api, "PostgreSQL": version.postgres,
            "RabbitMQ": version.rabbitmq, "consumer": version.consumer}


def cpu_seconds(server):
    """Of a process and its living descendants, since they began."""
    total = 0
    for text in read_each(server, "stat"):
        fields = text.rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def megabytes(server):
    """The memory of each process of a server, with its share of what they share."""
    return [int(line.split()[1]) / 1024 for text in read_each(server, "smaps_rollup")
            for line in text.splitlines() if line.startswith("Pss:")]


def read_each(server, name):
    """This file in /proc of each process of a server that does not end meanwhile."""
    for pid in tree(server.process.pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield Path(f"/proc/{pid}/{name}").read_text()


# -- The table -------------------------------------------------------------------------

table = [["figure", "divided by", "value", "ratio", "aim", ""]]


def row(figure, values, unit, limits=None, least=None, most=None):
    """values and limits: one a round; the table has the medians.

    The aim (least or most) is one for the ratio, if there is one, else for the value.
    """
    value, limit, ratio, aim, met = median(values), "–", "–", "–", ""
    found = value
    if limits:
        found = median([value / limit for value, limit in zip(values, limits)])
        limit, ratio = f"{median(limits):.4g} {unit}", f"{found:.3f}"
    if least is not None or most is not None:
        aim = f"≥ {least}" if most is None else f"≤ {most}"
        aim += "" if limits or not unit else f" {unit}"
        reached = found >= least if most is None else found <= most
        met = "met" if reached else "NOT MET"
    table.append([figure, limit, f"{value:.4g} {unit}".strip(), ratio, aim, met])
    say("  ".join(table[-1]))


def print_table():
    """In Markdown, for docs/measured.md."""
    print()
    for number, line in enumerate(table):
        print(f"| {' | '.join(line)} |")
        if number == 0:
            print("|---" * len(line) + "|")


def print_machine():
    model = next((line.partition(": ")[2].strip()
                  for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    packages = "gunicorn", "Flask", "psycopg2-binary", "kombu", "PyNaCl"
    postgres = run([find("postgres"), "--version"]).split()[2]
    print(f"\n{CORES} cores of {model}, {memory:.0f} GB, Linux {platform.release()}, "
          f"transparent huge pages on {huge_pages_are()}, load average at the begin "
          f"{LOAD_AVERAGE:.1f}\n"
          f"Python {platform.python_version()}, PostgreSQL {postgres}, "
          f"RabbitMQ {debian('rabbitmq-server')}, nginx {debian('nginx')}, "
          + ", ".join(f"{name} {metadata.version(name)}" for name in packages))


def debian(package):
    """The version of a package of Debian."""
    with suppress(OSError, RuntimeError):
        return run(["dpkg-query", "-Wf", "${Version}", package])
    return "?"


def huge_pages_are():
    """always, madvise or never."""
    with suppress(OSError):
        return re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())[1]
    return "never"


# -- The parts -------------------------------------------------------------------------


def memory(here, _):
    """Memory after 1,000 and after 20,000 requests."""
    grown = [grow(version) for version in versions(here)]
    before, after = grown[0]
    for process in after:
        row(f"memory after 20,000 requests / 1,000: {process}", [after[process]], "MB",
            [before[process]], most=1.05)
    in_all = [sum(each for process, each in found.items() if process.startswith("API"))
              for _, found in grown]
    row("memory of the API in all", in_all[:1], "MB")
    if here.other:
        row("memory of the API in all / the other's", in_all[:1], "MB", in_all[1:])


def grow(version):
    """({process: MB} after 1,000 requests, and after 20,000).

    Most of them need no hash: otherwise they would take longer than all the rest.
    """
    found = []
    for what, count in ("register", 150), ("cheap", 850), ("register", 850), \
            ("cheap", 18_150):
        version.outside.do("closed", what=what, port=version.api.port, clients=32,
                           seconds=600, count=count)
        found.append(memory_of(version))
    say(f"{version.name}: MB after 1,000 and after 20,000: {found[1]} {found[3]}")
    return found[1], found[3]


def memory_of(version):
    master, *workers = megabytes(version.api)
    found = {"API master": master} | {
        f"API worker {number}": each for number, each in enumerate(workers, 1)}
    for server in version.consumer, version.postgres, version.rabbitmq:
        found[server.name] = sum(megabytes(server))
    return {process: round(each, 1) for process, each in found.items()}


def registrations(here, seconds, rounds=8):
    """Registrations, activations, a crowd, and hashes, in turn.

    The turns are short: the speed of a machine that others share changes in seconds.
    """
    found = defaultdict(list)       # {(figure, whose): [one a round]}
    for number in range(rounds):
        for figure, value in one_round(here, seconds / 2).items():
            found[figure].append(value)
        say(f"round {number + 1}: " + ", ".join(
            f"{' '.join(figure)} {values[-1]:.4g}" for figure, values in found.items()))
    for what in "registrations", "activations":
        row(f"{what}, {CALLERS} callers / hashes", found[what, "here"], "/s",
            found["hashes", "rate"], least=0.62)
        if here.other:
            row(f"{what}, {CALLERS} callers / the other's", found[what, "here"], "/s",
                found[what, "other"])
    row(f"registrations, {CROWD} callers / {CALLERS} callers", found["crowd", "rate"],
        "/s", found["registrations", "here"], least=0.97)
    row(f"p99, {CROWD} callers", found["crowd", "p99"], "s", most=1)
    row(f"refused, {CROWD} callers", [sum(found["crowd", "refused"])], "", most=0)
    for process in [*processes(here), "all"]:
        figure, costs = f"CPU a registration beside the hash: {process}", found[
            process, "here"]
        if here.other:
            row(f"{figure} / the other's", costs, "ms", found[process, "other"])
        row(figure, costs, "ms", most=5.5 if process == "all" else None)


def one_round(here, seconds):
    """{(figure, whose): value}, with hashes before and after all the rest."""
    found = {}
    before = hashes(here, seconds / 5)
    for version in versions(here):
        rate, cost = registrations_and_cost(version, seconds)
        found["registrations", version.name] = rate
        found |= {(process, version.name): each for process, each in cost.items()}
    crowd = ask(here, "register", seconds, CROWD, statuses=["202", "503"])
    for version in versions(here):
        active = ask(version, "activate", seconds)
        found["activations", version.name] = per_second(active, "200")
    after = hashes(here, seconds / 5)

    rate, cpu = map(mean, zip(before, after))
    found["hashes", "rate"] = rate
    for version in versions(here):
        found["API", version.name] -= cpu
        found["all", version.name] -= cpu
    return found | {("crowd", "rate"): per_second(crowd), ("crowd", "p99"): p99(crowd),
                    ("crowd", "refused"): crowd.all.get("503", 0)}


def registrations_and_cost(version, seconds):
    """(registrations a second, {process: CPU ms of one})."""
    def spent():
        return {process: cpu_seconds(server) for process, server in servers.items()}

    servers = processes(version)
    before = spent()
    found = ask(version, "register", seconds)
    cost = {process: 1000 * (now - before[process]) / found.all["202"]
            for process, now in spent().items()}
    return per_second(found), cost | {"all": sum(cost.values())}


def overload(here, seconds):
    """Callers who wait for nobody's answer, through the edge; docs/load.svg.

    The capacity is what eight callers register directly, before and after each load.
    """
    found = defaultdict(list)   # {load: [(goodput, capacity, p99 accepted, refused)]}
    with behind_the_edge(here) as (api, edge):
        before = per_second(ask(here, "register", seconds / 2, port=api.port))
        for load in [*LOADS, *4 * list(GOODPUT)]:
            opened = checked(here.outside.do(
                "opened", what="register", port=edge.port, rate=load * before,
                seconds=seconds / 2), ["202", "503"])
            after = per_second(ask(here, "register", seconds / 2, port=api.port))
            found[load].append((per_second(opened), (before + after) / 2,
                                p99(opened), p99(opened, "503")))
            before = after
            say("{:g} times the capacity: {:.1f} of {:.1f}/s, p99 {:.3f} s, refused "
                "{:.3f} s".format(load, *found[load][-1]))
    for load, least in GOODPUT.items():
        goodput, capacity, _, _ = zip(*found[load])
        row(f"goodput at {load} times the capacity / {CALLERS} callers", goodput, "/s",
            capacity, least=least)
    _, _, accepted, refused = zip(*found[8])
    row("p99 accepted, 8 times the capacity", accepted, "s", most=1)
    row("p99 refused, 8 times the capacity", refused, "s", most=0.3)
    picture(found)


def picture(found):
    """Draw the medians of each load."""
    capacity = median([each[1] for rounds in found.values() for each in rounds])
    points = []
    for load, rounds in sorted(found.items()):
        share = median([goodput / most for goodput, most, _, _ in rounds])
        accepted, refused = (median([each[n] for each in rounds]) for n in (2, 3))
        points.append((load, share * capacity, accepted, refused))
    path = TOP / "docs/load.svg"
    path.write_text(draw.load(points, capacity))
    say(f"drawn: {path.relative_to(TOP)}")


def limited(here, seconds, rounds=5):
    """429 against a route that does one upsert."""
    here.postgres.psql("CREATE UNLOGGED TABLE visits (name text PRIMARY KEY, count "
                       "integer) WITH (fillfactor = 50);"
                       "GRANT ALL ON visits TO registration_api", here.name)
    refused, upserts = [], []
    with another_api(here, IP_LIMIT="60", TRUSTED_PROXIES="0") as api, \
            another_api(here, Limit) as limit:
        checked(here.outside.do("closed", what="register", port=api.port, seconds=60,
                                clients=CALLERS, count=80), ["202", "429"])
        for _ in range(rounds):
            for found, what, port in ((upserts, "upsert", limit.port),
                                      (refused, "register", api.port)):
                each = ask(here, what, seconds / 2, port=port, statuses=["429"])
                found.append(per_second(each, "429"))
            say(f"429: {refused[-1]:.0f}/s, one upsert {upserts[-1]:.0f}/s")
        crowd = ask(here, "register", seconds / 2, CROWD, api.port, ["429"])
    row("429 to one client / a route with one upsert", refused, "/s", upserts,
        least=0.5)
    row(f"p99 of a 429, {CROWD} callers", [p99(crowd, "429")], "s", most=0.25)


def trickling(here, seconds, rounds=8):
    """Registrations through the edge, with and without clients that trickle."""
    found, percents = defaultdict(list), (50, 99)
    with behind_the_edge(here) as (_, edge):
        for _ in range(rounds):
            for count in 0, TRICKLING:
                half = count // 2       # of them send a head, the others a body
                trickle = here.outside.do("trickle", port=edge.port, heads=half,
                                          bodies=half)
                assert trickle.under_way > 0.9 * count or not count, trickle.under_way
                latencies = one_by_one(here, edge.port, int(20 * seconds)).latencies
                for percent in percents:
                    found[percent, count].append(
                        1000 * percentile(latencies, percent))
            say("p50 and p99, without and with trickling clients: " + ", ".join(
                f"{values[-1]:.1f} ms" for values in found.values()))
        here.outside.do("trickle", port=edge.port, heads=0, bodies=0)
    for percent in percents:
        row(f"registration p{percent}, {TRICKLING:,} clients trickle / none",
            found[percent, TRICKLING], "ms", found[percent, 0], most=1.1)


def one_by_one(here, port, count):
    """Registrations, one at a time; all of them are accepted."""
    found = here.outside.do("each", port=port, count=count)
    assert found.statuses == ["202"], found.statuses
    return found


def mails(here, seconds, rounds=5):
    """A consumer with a full queue, a loop over smtplib, and registrations, in turn."""
    count, found, loop, registered = int(250 * seconds), [], [], []
    for number in range(rounds):
        registered.append(per_second(ask(here, "register", seconds / 2)))
        here.consumer.stop()
        fill_queue(here.settings["BROKER_URL"], count, number)
        here.consumer.start()
        done = here.outside.do("count_mails", count=count)
        with smtp_loop(here.outside.smtp_port, count, done.example):
            most = here.outside.do("count_mails", count=count)
        assert done.mails == most.mails == count, (done.mails, most.mails)
        found.append(count / done.seconds)
        loop.append(count / most.seconds)
        say(f"mails: {found[-1]:.0f}/s, smtplib {loop[-1]:.0f}/s; "
            f"{registered[-1]:.1f} registrations/s")
    row("mails of one consumer / registrations", found, "/s", registered, least=4)
    row("mails of one consumer / a loop over smtplib", found, "/s", loop)


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


@contextmanager
def smtp_loop(port, count, mail):
    """A loop over smtplib sends a mail so many times, meanwhile."""
    with subprocess.Popen([sys.executable, LIMITS, "smtp", str(port), str(count)],
                          stdin=subprocess.PIPE, text=True,
                          start_new_session=True) as loop:
        loop.stdin.write(mail)
        loop.stdin.close()
        yield


def delays(here, seconds):
    """From the 202 to the mail server's 250, one at a time."""
    found = one_by_one(here, here.api.port, int(20 * seconds)).delays
    for percent, most in (50, 10), (99, 40):
        row(f"202 to mail accepted, p{percent}", [1000 * percentile(found, percent)],
            "ms", most=most)


def accounts(here, seconds, rounds=20):
    """Registrations one at a time, with a big table and with an empty one."""
    urls = {name: new_database(here.postgres, name, OPTIONS.program)
            for name in ("many", "none")}
    begin = time.monotonic()
    here.postgres.psql(FILL.format(accounts=OPTIONS.accounts), "many")
    say(f"{OPTIONS.accounts:,} accounts made in {time.monotonic() - begin:.0f} s")
    found = {"many": [], "none": []}
    with another_api(here, DATABASE_URL=urls["many"]) as many, \
            another_api(here, DATABASE_URL=urls["none"]) as none:
        apis = {"many": many, "none": none}
        for api in apis.values():
            here.outside.do("each", port=api.port, count=30)       # connections, caches
        for _ in range(rounds):
            for name, api in apis.items():
                latencies = one_by_one(here, api.port, int(1.5 * seconds)).latencies
                found[name].append(1000 * median(latencies))
            say("p50: " + ", ".join(
                f"{values[-1]:.1f} ms with {name}" for name, values in found.items()))
    row(f"registration p50, {OPTIONS.accounts:,} accounts / none", found["many"], "ms",
        found["none"], most=1.1)


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


def huge_pages(here, seconds, rounds=5):
    """The host's transparent huge pages on always and on madvise, in turn."""
    before, found = huge_pages_are(), defaultdict(list)
    try:
        for _ in range(rounds):
            for setting in "always", "madvise":
                HUGE_PAGES.write_text(setting)
                found["hashes", setting].append(hashes(here, seconds / 10)[0])
                found[f"registrations, {CALLERS} callers", setting].append(
                    per_second(ask(here, "register", seconds / 2)))
    finally:
        HUGE_PAGES.write_text(before)
    for what in dict.fromkeys(what for what, _ in found):
        row(f"{what}: huge pages on always / on madvise", found[what, "always"], "/s",
            found[what, "madvise"])


# -- All of it -------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (
    memory, registrations, overload, limited, trickling, mails, delays, accounts,
    huge_pages)}


def options():
    parser = argparse.ArgumentParser("bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--accounts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=8, help="of a phase")
    parser.add_argument("--only", help="some parts, of: " + ",".join(PARTS))
    parser.add_argument("--huge-pages", action="store_true", help="that part, too: it "
                        "switches the machine's setting to and fro, then back")
    parser.add_argument("--program", type=Path, default=TOP,
                        help="the folder of the program that is measured")
    parser.add_argument("--against", type=Path, metavar="FOLDER",
                        help="the folder of another version, with a .venv of its own")
    found = parser.parse_args()
    found.parts = found.only.split(",") if found.only else [*PARTS][:-1]
    if found.huge_pages and "huge_pages" not in found.parts:
        found.parts.append("huge_pages")
    if wrong := set(found.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(wrong)}")
    if "huge_pages" in found.parts and not os.access(HUGE_PAGES, os.W_OK):
        parser.error(f"we may not write to {HUGE_PAGES}")
    found.program = found.program.resolve()
    found.against = found.against and found.against.resolve()
    return found


def main():
    Program.cwd = OPTIONS.program
    try:
        with system() as here:
            for name in OPTIONS.parts:
                say(f"-- {name}: {PARTS[name].__doc__.partition(chr(10))[0]}")
                PARTS[name](here, OPTIONS.seconds)
    finally:    # what was measured until Ctrl-C or an error, too
        if len(table) > 1:
            print_machine()
            print_table()


if __name__ == "__main__":
    LOAD_AVERAGE = os.getloadavg()[0]
    OPTIONS = options()
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, interrupt)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
