"""How fast the program is. Each figure is divided by another, measured in turn with it.

    make bench                                      about ten minutes
    make bench OPTIONS="--accounts 10000000"        the big table ten times as big
    make bench OPTIONS="--only registrations"       one part
    make bench OPTIONS="--against ../version-2"     another version, in turn with it

Nothing else should run on the machine. It prints one table. The other version runs
beside the program: with the packages of its own .venv, and a database, a virtual host
and a consumer of its own. Both have the settings of production, but the limits on
requests are out of the way and codes live longer. The callers are wrk's; bench.lua has
them send what requests() makes.
"""

import itertools
import json
import os
import platform
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import amqp
from kombu import Connection
from nacl import pwhash
from psycopg2 import connect
from psycopg2.extras import execute_values
from servers.install import find, install_missing
from servers.postgres import Postgres
from servers.process import run, running, tree
from servers.program import HERE, Gunicorn, Home
from servers.rabbitmq import RabbitMQ
from servers.sink import Sink
from servers.system import (
    create_tables,
    digest,
    running_program,
    settings_for,
    temporary_folder,
)
from steps import (
    ACTIVATE,
    JSON,
    PASSWORD,
    REGISTER,
    basic,
    jobs,
    wait_until,
    wait_until_at_rest,
)

CORES = os.cpu_count()
CALLERS, CROWD = 8, 100
CODE = "0427"
TICK = os.sysconf("SC_CLK_TCK")         # of /proc/*/stat, a second
number = itertools.count(1)             # of an address or a client


def say(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


# -- The system ------------------------------------------------------------------------


@contextmanager
def system(against):
    """All that runs from beginning to end: the program, and the other version, if there
    is one, as its .other."""
    install_missing("PostgreSQL", "RabbitMQ", "wrk")
    with temporary_folder() as folder, ExitStack() as stack:
        servers = stack.enter_context(running(Postgres(folder), RabbitMQ(folder)))
        here = stack.enter_context(program(servers, "here", HERE))
        here.other = None
        if against:
            home = Home(against, against / ".venv/bin/python")
            here.other = stack.enter_context(program(servers, "other", home))
        yield here


def versions(here):
    return [here, here.other] if here.other else [here]


@contextmanager
def program(servers, name, home):
    """One version of the program; the servers are all that it shares with the other."""
    postgres, rabbitmq = servers
    rabbitmq.ctl("add_vhost", name)
    rabbitmq.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    folder = postgres.folder / name
    with Sink(folder) as sink:
        settings = settings_for(
            new_database(postgres, name, home.folder), rabbitmq.url_of(name),
            sink.smtp_port, CODE_LIFETIME="900",
            TRUSTED_PROXIES="1",                # each request is a client of its own
            WEB_CONCURRENCY=None)               # each version has its own default
        with running_program(folder, settings, (home, home)) as (api, consumer):
            yield SimpleNamespace(
                name=name, database=name, folder=folder, settings=settings,
                postgres=postgres, rabbitmq=rabbitmq, sink=sink, api=api,
                consumer=consumer)


def new_database(postgres, name, home):
    """The URL of a database with the tables of that version."""
    postgres.psql(f"CREATE DATABASE {name}")
    create_tables(postgres, name, home)
    return postgres.url_of(name, "registration_api")


# -- The callers -----------------------------------------------------------------------


def requests(what, emails):
    """A request for each address, as bytes; "cheap" are those that need no hash."""
    for email in emails:
        if what == "register":
            fields = {"email": email, "password": PASSWORD}
            yield as_bytes("POST", REGISTER, fields)
        elif what == "activate":
            credentials = {"Authorization": basic(email, PASSWORD)}
            yield as_bytes("PATCH", ACTIVATE, {"code": CODE}, credentials)
        else:
            yield as_bytes("PATCH", ACTIVATE, {"code": CODE})
            yield as_bytes("POST", REGISTER, {"email": "a@b"})
            yield as_bytes("GET", "/healthz", {})


def as_bytes(method, path, fields, headers=None):
    """A request of a client of its own, on a connection of its own, as nginx's are."""
    body = json.dumps(fields)
    headers = {"Host": "localhost", "Connection": "close", **JSON,
               "X-Forwarded-For": IPv4Address(next(number)),
               "Content-Length": len(body), **(headers or {})}
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", body]).encode()


def ask(version, what, seconds, callers=CALLERS, statuses=None):
    """Callers who ask again as soon as they are answered: .answers by status, .seconds,
    .p50 and .p99 of an answer. Fails if a 202 has no mail."""
    seconds, mailed = max(2, round(seconds)), mails_of(version)
    emails = [f"bench{next(number)}@example.com"
              for _ in range(400 * seconds)]    # more than can be answered
    if what == "activate":
        add_waiting(version, emails)
    file = version.folder / "requests"
    file.write_bytes(b"\0".join(requests(what, emails)))
    printed = run([find("wrk"), "-t1", "-c", str(callers), "-d", str(seconds),
                   "--timeout", "30",
                   "-s", Path(__file__).with_name("bench.lua"), version.api.url,
                   "--", file])
    found = SimpleNamespace(**json.loads(printed.splitlines()[-1]))
    allowed = statuses or {"register": ["202"], "activate": ["200"]}[what]
    assert found.answers and set(found.answers) <= set(allowed), found
    assert not found.unanswered, found
    due = mailed + found.answers.get("202", 0)
    wait_until(lambda: mails_of(version) >= due, 60)
    wait_until_at_rest(version.api)     # wrk leaves when others wait for their answer
    return found


def mails_of(version):
    """How many mails its mail server has taken."""
    return version.sink.record.read_bytes().count(b"\n")


def add_waiting(version, emails):
    """Accounts that wait for CODE: copies of the newest, with its hash."""
    with connect(version.postgres.url_of(version.database)) as db:
        execute_values(db.cursor(), """
            INSERT INTO users (email, code_digest, password_hash, expires_at)
            SELECT email, code_digest::bytea, password_hash, now() + interval '1 hour'
              FROM (VALUES %s) AS new (email, code_digest),
                   (SELECT password_hash
                      FROM users
                     WHERE email LIKE 'bench%%'
                     ORDER BY registered_at DESC
                     LIMIT 1) AS newest
            """, [(email, digest(email, CODE)) for email in emails])
    db.close()


def per_second(found, status="202"):
    return found.answers.get(status, 0) / found.seconds


# -- What is measured ------------------------------------------------------------------


def hashes(seconds):
    """(hashes a second on all cores, CPU ms of one); nothing else works."""
    with ProcessPoolExecutor(CORES) as pool:
        found = list(pool.map(hash_for, [seconds] * CORES))
    return sum(rate for rate, _ in found), 1000 * mean(cpu for _, cpu in found)


def hash_for(seconds):
    """(rate, CPU seconds of one), with the parameters of hash_password()."""
    count, began, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() < began + seconds:
        pwhash.argon2id.str(PASSWORD.encode(), 3, 12 << 20)
        count += 1
    return count / (time.monotonic() - began), (time.process_time() - cpu) / count


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
    """The memory of a server's processes, each with its share of what they share."""
    return sum(int(line.split()[1]) / 1024 for text in read_each(server, "smaps_rollup")
               for line in text.splitlines() if line.startswith("Pss:"))


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
        met = found >= least if most is None else found <= most
        met = "met" if met else "NOT MET"
    table.append([figure, limit, f"{value:.4g} {unit}".strip(), ratio, aim, met])
    say("  ".join(table[-1]))


def print_table():
    """In Markdown, for docs/measured.md, after the machine."""
    model = next((line.partition(": ")[2].strip()
                  for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    print(f"\n{CORES} cores of {model}, Linux {platform.release()}, Python "
          f"{platform.python_version()}, {run([find('postgres'), '--version'])}\n")
    for number, line in enumerate(table):
        print(f"| {' | '.join(line)} |")
        if number == 0:
            print("|---" * len(line) + "|")


# -- The parts -------------------------------------------------------------------------


def memory(here, options):
    """Memory after 1,000 and after 20,000 requests."""
    found = [grow(version, options.short) for version in versions(here)]
    before, after = found[0]
    for process, each in after.items():
        row(f"memory after 20,000 requests / 1,000: {process}", [each], "MB",
            [before[process]], most=1.05)
    if here.other:
        row("memory of the API / the other's", [after["API"]], "MB",
            [found[1][1]["API"]], most=1)


def grow(version, short):
    """({process: MB} after 1,000 requests, and after 20,000).

    Most of them need no hash: otherwise they would take longer than all the rest.
    """
    found, asked = [], 0
    for what, count in ("register", 150), ("cheap", 1000), ("register", 1150), \
            ("cheap", 2000 if short else 20_000):
        while asked < count:
            asked += sum(ask(version, what, 1, callers=32, statuses=[
                "200", "202", "401", "422", "503"]).answers.values())
        found.append({name: megabytes(server)
                      for name, server in processes(version).items()})
    return found[1], found[3]


def registrations(here, options):
    """Registrations, activations, a crowd, and hashes, in turn.

    The turns are short: the speed of a machine that others share changes in seconds.
    """
    found = defaultdict(list)       # {(figure, whose): [one a round]}
    for number in range(1 if options.short else 8):
        for figure, value in one_round(here, options.seconds / 2).items():
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
        row(f"CPU a registration beside the hash: {process}", found[process, "here"],
            "ms", here.other and found[process, "other"])


def one_round(here, seconds):
    """{(figure, whose): value}, with hashes before and after all the rest."""
    found = {}
    before = hashes(seconds / 5)
    for version in versions(here):
        rate, cost = registrations_and_cost(version, seconds)
        found["registrations", version.name] = rate
        found |= {(process, version.name): each for process, each in cost.items()}
    crowd = ask(here, "register", seconds, CROWD, statuses=["202", "503"])
    for version in versions(here):
        active = ask(version, "activate", seconds)
        found["activations", version.name] = per_second(active, "200")
    rate, cpu = map(mean, zip(before, hashes(seconds / 5)))
    found["hashes", "rate"] = rate
    for version in versions(here):
        found["API", version.name] -= cpu
        found["all", version.name] -= cpu
    return found | {("crowd", "rate"): per_second(crowd), ("crowd", "p99"): crowd.p99,
                    ("crowd", "refused"): crowd.answers.get("503", 0)}


def registrations_and_cost(version, seconds):
    """(registrations a second, {process: CPU ms of one})."""
    servers = processes(version)
    before = {process: cpu_seconds(server) for process, server in servers.items()}
    found = ask(version, "register", seconds)
    count = found.answers["202"]
    cost = {process: 1000 * (cpu_seconds(server) - before[process]) / count
            for process, server in servers.items()}
    return per_second(found), cost | {"all": sum(cost.values())}


def mails(here, options):
    """A consumer with a full queue, and registrations, in turn."""
    count, found, registered = int(250 * options.seconds), [], []
    for number in range(1 if options.short else 5):
        registered.append(per_second(ask(here, "register", options.seconds / 2)))
        here.consumer.stop()
        fill_queue(here.settings["BROKER_URL"], count, number)
        mailed = mails_of(here)
        here.consumer.start()
        wait_until(lambda due=mailed + count: mails_of(here) >= due, 120)
        arrived = [json.loads(line)["arrived"] for line in
                   here.sink.record.read_text().splitlines()[mailed:]]
        found.append(count / (arrived[-1] - arrived[0]))
        say(f"mails: {found[-1]:.0f}/s; {registered[-1]:.1f} registrations/s")
    row("mails of one consumer / registrations", found, "/s", registered, least=4)


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
    wait_until(lambda: jobs.waiting_in(broker) >= count)
    channel.connection.client.collect()


def accounts(here, options):
    """Requests one at a time, with a big table and with an empty one; and tidy()."""
    found, apis = defaultdict(list), {}
    with ExitStack() as stack:
        for name in "many", "none":
            url = new_database(here.postgres, name, HERE.folder)
            folder = here.folder / name
            api = Gunicorn(folder, here.settings | {"DATABASE_URL": url})
            apis[name] = SimpleNamespace(**vars(here) | {
                "folder": folder, "database": name, "api": stack.enter_context(api)})
        began = time.monotonic()
        here.postgres.psql(FILL.format(accounts=options.accounts), "many")
        say(f"{options.accounts:,} accounts made in {time.monotonic() - began:.0f} s")
        for turn in range(2 if options.short else 21):
            for (name, api), what in itertools.product(
                    apis.items(), ("register", "activate")):
                each = ask(api, what, options.seconds / 4, callers=1)
                if turn:        # before, it opened connections and filled caches
                    found[what, name].append(1000 * each.p50)
            say("p50: " + ", ".join(f"{' '.join(figure)} {values[-1]:.1f} ms"
                                    for figure, values in found.items() if values))
    for what in "register", "activate":
        row(f"p50 of {what}, {options.accounts:,} accounts / none", found[what, "many"],
            "ms", found[what, "none"], most=1.1)
    left = here.postgres.psql(LEFT, "many")
    row("old accounts and limits that were left", [float(left)], "")


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
LEFT = """
    SELECT (SELECT count(*) FROM users WHERE activated_at IS NULL
                                         AND registered_at < now() - interval '1 day')
         + (SELECT count(*) FROM limits WHERE expires_at < now())
"""

PARTS = {part.__name__: part for part in (memory, registrations, mails, accounts)}


def add_options(parser):
    parser.add_argument("--accounts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=8, help="of a phase")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--against", type=Path, metavar="FOLDER",
                        help="the folder of another version, with a .venv of its own")


def main(options):
    if options.short:
        options.accounts, options.seconds = 10_000, 1
    against = options.against and options.against.resolve()
    try:
        with system(against) as here:
            for name in options.only or PARTS:
                say(f"-- {name}: {PARTS[name].__doc__.partition(chr(10))[0]}")
                PARTS[name](here, options)
    finally:    # what was measured until Ctrl-C or an error, too
        print_table()
    return []
