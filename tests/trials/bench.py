"""How fast the program is. Each figure is divided by another, measured in turn with it.

    make bench                                      about ten minutes
    make bench OPTIONS="--accounts 10000000"        the big table ten times as big
    make bench OPTIONS="--only registrations"       one part
    make bench OPTIONS="--against ../version-2"     another version, in turn with it

Nothing else should run on the machine. It prints one table. The other version has the
packages of its own .venv, and a database, a virtual host and a consumer of its own.
Both have the settings of production, but limits are out of the way and codes live long.

The callers are wrk with bench.lua, on this machine. Each makes a connection for each
request, as nginx does, and asks again as soon as it is answered. What is under way at
the end of a phase is waited for, but not counted. Latencies count from the sending of a
request; wrk adds those of the requests that a slow answer kept a caller from making.
"""

import json
import os
import platform
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import psycopg2
import steps
from nacl import pwhash
from psycopg2.extras import execute_values
from servers.install import find, install_missing
from servers.postgres import Postgres
from servers.process import free_port, run, running, tree
from servers.program import HERE, Gunicorn, Home
from servers.rabbitmq import RabbitMQ
from servers.smtp import SmtpServer
from servers.system import (
    create_tables,
    digest,
    running_program,
    settings_for,
    temporary_folder,
)
from steps import PASSWORD, wait_until
from steps.logs import events

from trials.load import say

CORES = os.cpu_count()
CALLERS, CROWD = 8, 100

# -- The system ------------------------------------------------------------------------


@contextmanager
def system(against):
    """All that runs from beginning to end. Its .versions are the program, and the
    other version if there is one. Sink would be slower than a consumer."""
    install_missing("PostgreSQL", "RabbitMQ", "wrk")
    homes = {"here": HERE}
    if against:
        homes["other"] = Home(against, against / ".venv/bin/python")
    with temporary_folder() as folder, ExitStack() as stack:
        postgres, rabbitmq = stack.enter_context(
            running(Postgres(folder), RabbitMQ(folder)))
        smtp, versions = SmtpServer(free_port()), []
        for name, home in homes.items():
            rabbitmq.ctl("add_vhost", name)
            rabbitmq.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
            settings = settings_for(
                new_database(postgres, name, home.folder), rabbitmq.url_of(name),
                smtp.port, CODE_LIFETIME="900",
                TRUSTED_PROXIES="1",            # each request is a client of its own
                WEB_CONCURRENCY=None)           # each version has its own default
            api, consumer = stack.enter_context(
                running_program(folder / name, settings, (home, home)))
            versions.append(SimpleNamespace(
                name=name, api=api, consumer=consumer, processes={
                    "API": api, "PostgreSQL": postgres, "RabbitMQ": rabbitmq,
                    "consumer": consumer}))
        yield SimpleNamespace(postgres=postgres, versions=versions)


def new_database(postgres, name, home):
    """The URL of a database with the tables of that version."""
    postgres.psql(f"CREATE DATABASE {name}")
    create_tables(postgres, name, home)
    return postgres.url_of(name, "registration_api")


# -- The requests ----------------------------------------------------------------------


def request(method, path, fields=None, **headers):
    """As text, from a client of its own."""
    body = json.dumps(fields)
    headers |= steps.JSON | steps.fresh_client() | {
        "Host": "localhost", "Connection": "close", "Content-Length": len(body)}
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", body])


CODE = "0427"
GOOD = {"register": "202", "activate": "200", "mixed": "202"}
CHEAP = {   # by the answer: these need no hash
    "200": request("GET", "/healthz"), "404": request("GET", "/nowhere"),
    "401": request("PATCH", steps.ACTIVATE, {"code": CODE}),
    "422": request("POST", steps.REGISTER, {"email": "a@b", "password": "short"})}


def requests(what, count, database):
    """So many, each for another address; mixed: with cheap ones between them."""
    emails = [steps.fresh_email() for _ in range(count)]
    if what == "activate":
        insert_waiting(database, emails)
        return [request("PATCH", steps.ACTIVATE, {"code": CODE},
                        Authorization=steps.basic(email, PASSWORD)) for email in emails]
    cheap = [*CHEAP.values()] * 2 if what == "mixed" else []
    return [each for email in emails for each in [request(
        "POST", steps.REGISTER, {"email": email, "password": PASSWORD}), *cheap]]


def insert_waiting(database, emails):
    password_hash = hash_password(PASSWORD)
    with psycopg2.connect(database) as db:
        execute_values(db.cursor(), """
            INSERT INTO users (email, password_hash, code_digest, expires_at) VALUES %s
            """, [(email, password_hash, digest(email, CODE)) for email in emails],
            "(%s, %s, %s, now() + interval '15 minutes')")
    db.close()


# -- What is measured ------------------------------------------------------------------


def ask(version, what, seconds, callers=CALLERS, others=()):
    """What callers find: .rate of the good answers, .cpu of one (ms), .p50, ...

    Fails if a status is neither the good one nor among the others, or if a good answer
    comes without its mail.
    """
    api, consumer, good = version.api, version.consumer, GOOD[what]
    os.truncate(api.log, 0)
    os.truncate(consumer.log, 0)
    file = api.folder / "requests"
    file.write_text("\0".join(requests(what, 200 * CORES * (seconds + 1),
                                       api.env["DATABASE_URL"])), newline="")
    before = measured(version, cpu_seconds)
    output = run([find("wrk"), "-t1", f"-c{callers}", f"-d{seconds}s", "--timeout=30s",
                  "-s", Path(__file__).with_suffix(".lua"), api.url, file])
    found = SimpleNamespace(**json.loads(output.splitlines()[-1]))
    assert found.statuses.keys() <= {good, *others} and not found.errors, found
    wait_until(lambda: len(events(api.log, event="request")) >= found.made, 60)
    mailed = {each["job"] for each in events(api.log, event="request", status=good)}
    assert len(mailed) >= found.statuses.get(good, 0), (len(mailed), found)
    wait_until(lambda: mailed <= {
        each["job"] for each in events(consumer.log, outcome="sent")}, 60)
    found.rate = found.statuses.get(good, 0) / found.seconds
    found.cpu = {process: 1000 * (after - before[process]) / found.made
                 for process, after in measured(version, cpu_seconds).items()}
    return found


def hashes(count):
    """(hashes a second on all cores, CPU ms of one); nothing else works."""
    begin, cpu = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(CORES) as threads:     # PyNaCl lets them run side by side
        list(threads.map(hash_password, [PASSWORD] * count))
    return (count / (time.monotonic() - begin),
            1000 * (time.process_time() - cpu) / count)


def hash_password(password):
    """With the program's parameters: 12 MiB, 3 passes, 1 lane."""
    return pwhash.argon2id.str(password.encode(), 3, 12 << 20).decode()


def measured(version, measure):
    """{process: its figure}, without the callers and the mail server."""
    return {name: measure(server) for name, server in version.processes.items()}


def cpu_seconds(server):
    """Of a process and its living descendants, since they began."""
    fields = [text.rpartition(")")[2].split() for text in read_each(server, "stat")]
    return sum(int(each[11]) + int(each[12])
               for each in fields) / os.sysconf("SC_CLK_TCK")


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
        good = found >= least if most is None else found <= most
        met = "met" if good else "NOT MET"
    table.append([figure, limit, f"{value:.4g} {unit}".strip(), ratio, aim, met])
    say("  ".join(table[-1]))


def print_table():
    """In Markdown, for docs/measured.md, after the machine."""
    print(f"\n{CORES} cores, Linux {platform.release()}, Python "
          f"{platform.python_version()}, {run([find('postgres'), '--version'])}\n")
    for line in table[0], ["---"] * len(table[0]), *table[1:]:
        print(f"| {' | '.join(line)} |")


# -- The parts -------------------------------------------------------------------------


def memory(system, options):
    """Memory after 1,000 and after 20,000 requests."""
    few, many = 1000, 2000 if options.short else 20_000
    (before, after), *others = [[grown(version, few), grown(version, many - few)]
                                for version in system.versions]
    for process, value in after.items():
        row(f"memory after {many:,} requests / {few:,}: {process}", [value], "MB",
            [before[process]], most=1.05)
    for _, other in others:
        row("memory of the API / the other's", [after["API"]], "MB", [other["API"]],
            most=1)


def grown(version, count):
    """{process: MB} after so many more requests, most of them cheap: otherwise they
    would take longer than all the rest. On a busy machine, some may be refused."""
    while count > 0:
        count -= ask(version, "mixed", 1, others=[*CHEAP, "503"]).made
    return measured(version, megabytes)


def registrations(system, options):
    """Registrations, hashes, activations and a crowd, in turn.

    The turns are short: the speed of a machine that others share changes in seconds.
    """
    here, found = system.versions[0], defaultdict(list)     # one a round
    for version in system.versions:
        ask(version, "register", 1)     # opens connections and fills caches
    for _ in range(1 if options.short else 8):
        answers = [(version, ask(version, "register", options.seconds))
                   for version in system.versions]
        rate, hash_cpu = hashes(20 * CORES * options.seconds)
        found["hashes"].append(rate)
        for version, answer in answers:
            answer.cpu["API"] -= hash_cpu
            answer.cpu["all"] = sum(answer.cpu.values())
            for process, cpu in answer.cpu.items():
                found[process, version.name].append(cpu)
            found["registrations", version.name].append(answer.rate)
            found["activations", version.name].append(
                ask(version, "activate", options.seconds).rate)
        crowd = ask(here, "register", options.seconds, CROWD, ["503"])
        found["crowd"].append(crowd.rate)
        found["p99"].append(crowd.p99)
        found["refused"].append(crowd.statuses.get("503", 0))
        say(", ".join(f"{figure}: {each[-1]:.4g}" for figure, each in found.items()))
    for what in "registrations", "activations":
        row(f"{what}, {CALLERS} callers / hashes", found[what, "here"], "/s",
            found["hashes"], least=0.62)
        if options.against:
            row(f"{what}, {CALLERS} callers / the other's", found[what, "here"], "/s",
                found[what, "other"])
    row(f"registrations, {CROWD} callers / {CALLERS} callers", found["crowd"], "/s",
        found["registrations", "here"], least=0.97)
    row(f"p99, {CROWD} callers", found["p99"], "s", most=1)
    row(f"refused, {CROWD} callers", [sum(found["refused"])], "", most=0)
    for process in [*here.processes, "all"]:
        row(f"CPU a registration beside the hash: {process}", found[process, "here"],
            "ms", found[process, "other"])


def accounts(system, options):
    """Requests one at a time, with a big table and with an empty one; and tidy()."""
    here, found, versions = system.versions[0], defaultdict(list), {}
    for name in "many", "none":
        url = new_database(system.postgres, name, HERE.folder)
        api = Gunicorn(here.api.folder / name, here.api.env | {"DATABASE_URL": url})
        versions[name] = SimpleNamespace(**vars(here) | {"api": api})
    system.postgres.psql(FILL.format(
        accounts=options.accounts, password_hash=hash_password(PASSWORD)), "many")
    with running(*[version.api for version in versions.values()]):
        for _ in range(2 if options.short else 21):
            for name, version in versions.items():
                for what in "register", "activate":
                    found[what, name].append(1000 * ask(version, what, 1, 1).p50)
    for what in "register", "activate":     # the first ones opened connections
        row(f"p50 of {what}, {options.accounts:,} accounts / none",
            found[what, "many"][1:], "ms", found[what, "none"][1:], most=1.1)
    left = system.postgres.psql(LEFT, "many")
    row("old accounts and limits that were left", [float(left)], "")


# Nine in ten are active; of those that wait, every second one for longer than a day.
FILL = """
    INSERT INTO users (email, password_hash, code_digest, expires_at, registered_at,
                       activated_at)
    SELECT 'account' || n || '@example.com', '{password_hash}', sha256(n::text::bytea),
           now() - interval '1 minute',
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

PARTS = {part.__name__: part for part in (memory, registrations, accounts)}


def add_options(parser):
    parser.add_argument("--accounts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=4, help="of a phase")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--against", type=Path, metavar="FOLDER",
                        help="the folder of another version, with a .venv of its own")


def main(options):
    if options.short:
        options.accounts, options.seconds = 10_000, 1
    against = options.against and options.against.resolve()
    try:
        with system(against) as everything:
            for name in options.only or PARTS:
                say(f"-- {name}: {PARTS[name].__doc__.partition(chr(10))[0]}")
                PARTS[name](everything, options)
    finally:    # what was measured until Ctrl-C or an error, too
        print_table()
    return []
