"""The program around the endpoints: settings, files, schema, workers, connections."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import psycopg2
import pytest
from common_passwords import common_passwords
from servers.program import Consumer, Gunicorn
from steps import (
    activate,
    at_once,
    fresh_email,
    problem_in,
    register,
    registered,
    send,
    wait_until,
    workers_of,
)

TOP = Path(__file__).parent.parent
PROGRAM = ["service.py", "consumer.py", "gunicorn.conf.py"]
API = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "service:app"]
CONSUMER = [sys.executable, "consumer.py"]

# Nothing listens there: a program that gets past its settings is not stopped by them.
GOOD = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
    "BROKER_URL": "amqp://guest:guest@127.0.0.1:1//",
    "SECRET_KEY": "only for the tests, 32 characters and more",
    "MAIL_FROM": "registration@example.com", "PYTHON_DOTENV_DISABLED": "1"}


def run(command, folder=TOP, **settings):
    """Runs a command with these settings alone: (its exit code, its lines)."""
    environment = {"PATH": os.environ["PATH"]} | settings
    done = subprocess.run(command, cwd=folder, env=environment, text=True, timeout=30,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.splitlines()


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


# -- Wrong settings --------------------------------------------------------------------


@pytest.mark.parametrize("command, name", [
    (API, "DATABASE_URL"), (API, "BROKER_URL"), (API, "SECRET_KEY"),
    (CONSUMER, "BROKER_URL"), (CONSUMER, "MAIL_FROM")],
    ids=lambda value: value if isinstance(value, str) else value[-1])
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_it_stops_with_one_line_that_names_a_missing_setting(command, name, how):
    code, lines = run(command, **without(name) | ({name: ""} if how == "empty" else {}))

    assert code != 0
    assert len(lines) == 1 and name in lines[0]


MALFORMED = [
    (API, "DATABASE_URL", "registration"),
    (API, "DATABASE_URL", "mysql://ann:hush@db/registration"),
    (API, "DATABASE_URL", "host=db user=ann password=hush"),
    (API, "DATABASE_URL", "postgresql://ann:hu/sh@db/registration"),
    (API, "DATABASE_URL", "postgresql://ann:hu%zzsh@db/registration"),
    *[(command, "BROKER_URL", value) for command in (API, CONSUMER) for value in (
        "localhost", "ann:hush@broker", "http://ann:hush@broker//",
        "redis://:hush@broker", "amqp://ann:hush@broker:port//",
        "amqp://ann:hu#sh@broker//", "amqp://ann:hu/sh@broker//")],
    (API, "SECRET_KEY", "hush"), (API, "SECRET_KEY", "x" * 31),
    (API, "CODE_LIFETIME", "0"), (API, "CODE_LIFETIME", "-1"),
    (API, "CODE_LIFETIME", "a minute"), (API, "CODE_LIFETIME", "60.0"),
    (API, "CODE_LIFETIME", "٦٠"), (API, "CODE_LIFETIME", "60 s"),
    (API, "CODE_ATTEMPTS", "0"), (API, "CODE_ATTEMPTS", "3.5"),
    (API, "CODE_ATTEMPTS", "３"), (API, "EMAIL_LIMIT_HOUR", "5/h"),
    (API, "EMAIL_LIMIT_DAY", "-20"), (API, "ACTIVATE_LIMIT_HOUR", "१००"),
    (API, "IP_LIMIT", "many"), (API, "IP_LIMIT", "1e3"),
    (API, "TRUSTED_PROXIES", "yes"), (API, "TRUSTED_PROXIES", "²"),
    (API, "WEB_CONCURRENCY", "0"), (API, "WEB_CONCURRENCY", "٣"),
    (CONSUMER, "SMTP_PORT", "0"), (CONSUMER, "SMTP_PORT", "smtp"),
    (CONSUMER, "SMTP_PORT", "２５"), (CONSUMER, "SMTP_TLS", "ssl"),
    (CONSUMER, "SMTP_USERNAME", "jörg"), (CONSUMER, "SMTP_PASSWORD", "schlüssel"),
    (CONSUMER, "MAIL_FROM", "registration"), (CONSUMER, "MAIL_FROM", "Registration <>"),
    (CONSUMER, "MAIL_FROM", "Registration <registration>"),
    (CONSUMER, "MAIL_FROM", "@"), (CONSUMER, "MAIL_FROM", "Ann, Bob <ann@example.com>"),
    *[(command, "LOG_LEVEL", value) for command in (API, CONSUMER)
      for value in ("verbose", "INFO,DEBUG", "10")]]


@pytest.mark.parametrize("command, name, value", MALFORMED, ids=[
    f"{command[-1]} {name}={ascii(value)}" for command, name, value in MALFORMED])
def test_it_stops_with_one_line_that_names_a_malformed_setting(command, name, value):
    code, lines = run(command, **GOOD | {name: value})

    assert code != 0
    assert len(lines) == 1 and name in lines[0]
    assert value not in lines[0] and "hu" not in lines[0]     # not a part of a secret


def test_it_accepts_the_settings_that_these_tests_call_good():
    assert run([*API, "--check-config"], **GOOD) == (0, [])


OPTIONAL = ["CODE_LIFETIME", "CODE_ATTEMPTS", "EMAIL_LIMIT_HOUR", "EMAIL_LIMIT_DAY",
            "ACTIVATE_LIMIT_HOUR", "IP_LIMIT", "TRUSTED_PROXIES", "LOG_LEVEL",
            "SMTP_HOST", "SMTP_PORT", "SMTP_USERNAME", "SMTP_PASSWORD", "SMTP_TLS"]


def test_it_takes_an_empty_setting_for_one_that_is_not_set():
    empty = dict.fromkeys(OPTIONAL, "")

    assert run([*API, "--check-config"], **GOOD | empty) == (0, [])


def test_the_consumer_takes_an_empty_setting_for_one_that_is_not_set(tmp_path):
    empty = dict.fromkeys(OPTIONAL, "")

    with Consumer(tmp_path, GOOD | empty) as consumer:

        wait_until(lambda: "event=outage" in consumer.log.read_text())


# -- .env ------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of the program in a folder of its own, without a .env."""
    for name in [*PROGRAM, "openapi.yaml", "common-passwords.txt"]:
        shutil.copy(TOP / name, tmp_path)
    return tmp_path


def write_dotenv(folder, **settings):
    (folder / ".env").write_text("".join(
        f"{name}='{value}'\n" for name, value in settings.items()
        if name != "PYTHON_DOTENV_DISABLED"))


@pytest.mark.parametrize("command", [API, CONSUMER], ids=["api", "consumer"])
def test_it_reads_dotenv(copy, command):
    wrong = {"SECRET_KEY": "short", "SMTP_TLS": "nonsense"}
    write_dotenv(copy, **GOOD | wrong)

    code, [line] = run(command, copy)

    assert code != 0
    assert line.split()[0] in wrong


def test_it_lets_the_environment_override_dotenv(copy):
    write_dotenv(copy, **GOOD | {"SECRET_KEY": "short"})

    result = run([*API, "--check-config"], copy, SECRET_KEY=GOOD["SECRET_KEY"])

    assert result == (0, [])


def test_it_lets_the_environment_override_dotenv_in_the_consumer(copy):
    write_dotenv(copy, SMTP_PORT="nonsense")

    code, lines = run(CONSUMER, copy, SMTP_PORT="25", BROKER_URL=GOOD["BROKER_URL"])

    assert code != 0
    assert "MAIL_FROM" in lines[0]     # it is the next one, and missing


def test_it_checks_the_number_of_workers_in_dotenv(copy):
    write_dotenv(copy, **GOOD | {"WEB_CONCURRENCY": "three"})

    code, lines = run(API, copy)

    assert code != 0
    assert len(lines) == 1 and "WEB_CONCURRENCY" in lines[0]


@pytest.fixture
def default(settings, tmp_path):
    """An API, not started yet, whose environment does not set WEB_CONCURRENCY."""
    api = Gunicorn(tmp_path / "log", settings)
    del api.env["WEB_CONCURRENCY"]
    return api


def test_it_takes_the_number_of_workers_from_dotenv(copy, default):
    more = 2 * os.cpu_count() + 3
    write_dotenv(copy, WEB_CONCURRENCY=more)
    default.cwd = copy
    default.env["PYTHON_DOTENV_DISABLED"] = "0"

    with default as api:

        wait_until(lambda: len(workers_of(api)) == more)


# -- The files -------------------------------------------------------------------------


def section(file, title):
    """The lines of a file between one banner and the next."""
    text = (TOP / file).read_text()
    return re.search(rf"^# -- {title}.*\n((?:(?!# -- ).*\n)*)", text, re.M)[1].strip()


def settings_of(file):
    """The names of the settings that a file reads, in its order."""
    return re.findall(r"^[^#\n]*(?:setting|environ\.get)\(\s*\"([A-Z_]+)\"",
                      (TOP / file).read_text(), re.M)


def documented_settings():
    return re.findall(r"^#?([A-Z_]+)=", (TOP / ".env.example").read_text(), re.M)


def test_it_has_the_same_topology_in_both_files():
    in_service = section("service.py", "Topology")

    assert "mail.dead" in in_service
    assert in_service == section("consumer.py", "Topology")


def test_it_explains_each_setting_in_env_example_and_no_other():
    read = {name for file in PROGRAM for name in settings_of(file)}

    assert sorted(documented_settings()) == sorted(read)


@pytest.mark.parametrize("file", PROGRAM)
def test_it_reads_the_settings_in_the_order_of_env_example(file):
    names = settings_of(file)

    assert len(names) > 1
    assert names == [name for name in documented_settings() if name in names]


def test_it_imports_no_third_module():
    code, modules = run([sys.executable, "-c", """if True:
        import sys, service, consumer
        for module in list(sys.modules.values()):
            if str(getattr(module, "__file__", "")).rpartition("/")[0] == sys.argv[1]:
                print(module.__name__)
        """, str(TOP)], **GOOD)

    assert code == 0
    assert sorted(modules) == ["consumer", "service"]
    assert sorted(file.name for file in TOP.glob("*.py")) == sorted(PROGRAM)


def test_it_has_the_common_passwords_of_django():
    listed = (TOP / "common-passwords.txt").read_text().splitlines()

    assert listed == common_passwords()


def test_its_licence_says_whose_list_of_common_passwords_it_is():
    licence = (TOP / "LICENSE").read_text()

    assert "common-passwords.txt is taken from Django" in licence
    assert "(BSD-3-Clause)" in licence
    assert "Copyright (c) Django Software Foundation" in licence


# -- The schema ------------------------------------------------------------------------

# What schema.sql contained when the first deployments were made.
VERSION_1 = """
    CREATE TABLE users (
        email          text         PRIMARY KEY,
        password_hash  text         NOT NULL,
        code_digest    bytea        NOT NULL,
        expires_at     timestamptz  NOT NULL,
        attempts       smallint     NOT NULL DEFAULT 0,
        registered_at  timestamptz  NOT NULL DEFAULT now(),
        activated_at   timestamptz  ,
        CONSTRAINT email_is_canonical
             CHECK (email = lower(email) AND length(email) <= 254),
        CONSTRAINT digest_is_sha256 CHECK (octet_length(code_digest) = 32),
        CONSTRAINT attempts_count_up CHECK (attempts >= 0)
    );
    CREATE INDEX users_waiting ON users (registered_at) WHERE activated_at IS NULL;
    CREATE UNLOGGED TABLE limits (
        name           text         NOT NULL,
        subject        text         NOT NULL,
        count          integer      NOT NULL,
        expires_at     timestamptz  NOT NULL,
        PRIMARY KEY (name, subject)
    ) WITH (fillfactor = 50);
    CREATE INDEX limits_expired ON limits (expires_at);
    CREATE FUNCTION tidy() RETURNS trigger LANGUAGE plpgsql
        SET enable_seqscan = off SET enable_sort = off AS $$
    BEGIN
        DELETE FROM limits
         WHERE (name, subject) IN (
               SELECT name, subject
                 FROM limits
                WHERE expires_at < now()
                ORDER BY expires_at
                LIMIT 8
                  FOR UPDATE SKIP LOCKED);
        DELETE FROM users
         WHERE email IN (
               SELECT email
                 FROM users
                WHERE activated_at IS NULL
                  AND registered_at < now() - interval '1 day'
                ORDER BY registered_at
                LIMIT 8
                  FOR UPDATE SKIP LOCKED);
        RETURN NULL;
    END $$;
    CREATE TRIGGER tidy AFTER INSERT OR UPDATE ON limits
        FOR EACH ROW WHEN (NEW.name LIKE '% client') EXECUTE FUNCTION tidy();
    """

CONTENTS = """
    SELECT 'column', table_name, concat_ws(' ', ordinal_position, column_name,
                                           data_type, column_default, is_nullable)
      FROM information_schema.columns WHERE table_schema = 'public'
    UNION ALL
    SELECT 'constraint', conrelid::regclass::text, pg_get_constraintdef(oid)
      FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'index', tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL
    SELECT 'table', relname, concat_ws(' ', relpersistence, reloptions)
      FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    UNION ALL
    SELECT 'function', proname, pg_get_functiondef(oid)
      FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'trigger', tgrelid::regclass::text, pg_get_triggerdef(oid)
      FROM pg_trigger WHERE NOT tgisinternal
     ORDER BY 1, 2, 3"""


@pytest.fixture
def contents_after(servers, database):
    """Runs scripts in an empty database, and lists what is in it then."""
    name = f"empty_{os.getpid()}"
    url = f"{servers.postgres.url.rpartition('/')[0]}/{name}"

    def run_them(*scripts):
        database(f"CREATE DATABASE {name}")
        with closing(psycopg2.connect(url)) as session:
            session.autocommit = True
            cursor = session.cursor()
            for script in scripts:
                cursor.execute(script)
            cursor.execute(CONTENTS)
            contents = cursor.fetchall()
        database(f"DROP DATABASE {name}")
        return contents

    yield run_them
    database(f"DROP DATABASE IF EXISTS {name}")


def test_its_schema_has_no_trigger_and_no_function(contents_after):
    contents = contents_after((TOP / "sql/schema.sql").read_text())

    assert {kind for kind, *_ in contents} == {"column", "constraint", "index", "table"}
    assert {table for _, table, _ in contents} == {"users", "limits"}


def test_its_later_scripts_turn_an_old_schema_into_the_new_one(contents_after):
    later = [path.read_text() for path in sorted((TOP / "sql").glob("[0-9]*.sql"))]

    upgraded = contents_after(VERSION_1, *later)

    assert later
    assert upgraded == contents_after((TOP / "sql/schema.sql").read_text())
    assert upgraded != contents_after(VERSION_1)


# -- Workers and their connections -----------------------------------------------------


def test_it_has_two_workers_for_each_core_and_one_more(default):
    expected = 2 * os.cpu_count() + 1

    with default as api:
        wait_until(lambda: len(workers_of(api)) >= expected)
        at_once(*[partial(register, api, fresh_email())] * 50)     # no more come

        assert len(workers_of(api)) == expected


@pytest.fixture
def connections_of(servers):
    """A worker's open connections to the servers: {(our port, the server's port)}."""
    ours = servers.postgres.port, servers.rabbitmq.port

    def list_them(worker):
        files = Path(f"/proc/{worker}/fd")
        sockets = {os.readlink(file) for file in files.iterdir() if file.is_symlink()}
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        open_here = [row for row in rows if f"socket:[{row[9]}]" in sockets]
        ports = [[int(end.partition(":")[2], 16) for end in row[1:3]]
                 for row in open_here]
        return {(port, server) for port, server in ports if server in ours}

    return list_them


def test_it_keeps_one_connection_to_each_server_in_a_worker(
        servers, start_service, connections_of):
    api = start_service(WEB_CONCURRENCY="3")
    both = sorted([servers.postgres.port, servers.rabbitmq.port])

    def ask():
        at_once(*[partial(register, api, fresh_email()),
                  partial(activate, api, fresh_email(), "0427"),
                  partial(send, api, "GET", "/healthz")] * 10)
        return workers_of(api)

    wait_until(lambda: all(connections_of(worker) for worker in ask()))
    for _ in range(5):
        workers = ask()

    servers_of = [sorted(server for _, server in connections_of(worker))
                  for worker in workers]
    assert servers_of == [both] * 3


def test_it_goes_on_over_the_same_connections_after_a_refusal(
        start_service, connections_of):
    api = start_service(WEB_CONCURRENCY="1", EMAIL_LIMIT_HOUR="1")
    [worker], (email, code) = workers_of(api), registered(api)
    before = connections_of(worker)

    refused = [register(api, email).status, register(api, "nobody").status,
               activate(api, fresh_email(), code).status]

    assert refused == [429, 422, 401]
    assert connections_of(worker) == before


def test_it_takes_new_connections_after_an_error_that_it_did_not_expect(
        servers, start_service, connections_of, database):
    api = start_service(WEB_CONCURRENCY="1")
    [worker], (email, code) = workers_of(api), registered(api)
    before = connections_of(worker)
    database("""UPDATE users SET activated_at = '10000-01-01'
                 WHERE email = %s""", [email])     # a year that Python does not know

    failed = activate(api, email, code)
    following = register(api, fresh_email())

    new = connections_of(worker) - before
    assert (problem_in(failed), following.status) == (500, 202)
    assert workers_of(api) == [worker]
    assert {server for _, server in new} == {servers.postgres.port,
                                             servers.rabbitmq.port}
    wait_until(lambda: send(api, "GET", "/healthz")
               and connections_of(worker) == new)     # the old ones are closed
