"""Settings: missing, malformed or empty ones, and .env."""

import os
import shutil
import sys

import pytest
from servers.process import TOP
from servers.program import Consumer
from steps import fresh_email, problem_in, register, wait_until, workers_of
from steps.commands import API, CONSUMER, GOOD, PROGRAM, run
from steps.logs import events


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
    assert lines == [f"{name} is missing; see .env.example"]


LEVELS = "must be DEBUG, INFO, WARNING, ERROR or CRITICAL"
SENDERS = 'must be an address, Name <address> or "Name, Inc." <address>'
MALFORMED = [   # what is said of these values
    (API, "DATABASE_URL", "is no PostgreSQL URL", [
        "registration", "mysql://ann:hush@db/registration",
        "postgresql://ann:hu/sh@db/registration", "postgresql://ann:12/sh@db/x",
        "postgresql://ann:hu@sh@db/registration", "postgresql://ann:hu/sh?x@db/x",
        "postgresql://ann:hu%zzsh@db/registration", "host=db password=hu sh",
        "postgresql://ann:hush@db/registration?sslmod=require"]),
    *[(command, "BROKER_URL", "is no AMQP URL", [
        "localhost", "ann:hush@broker", "http://ann:hush@broker//",
        "redis://:hush@broker", "amqp://ann:hush@broker:port//",
        "amqp://ann:hush@broker:65536//", "amqp://ann:hu#sh@broker//",
        "amqp://ann:hu/sh@broker//", "amqp://ann:hu?sh@broker//",
        "amqp://ann:hush@one//;redis://:hush@other"]) for command in (API, CONSUMER)],
    (API, "SECRET_KEY", "must have 32 characters or more", [
        "hush", "x" * 31, "\udcff" * 32]),
    (API, "CODE_LIFETIME", "must be a number from 1 to 86400", [
        "0", "-1", "86401", "a minute", "60.0", "60 s"]),
    (API, "CODE_ATTEMPTS", "must be a number from 1 to 9999", ["0", "3.5", "10000"]),
    *[(API, name, "must be a number from 0 to 1000000000", ["-1", "5/h", "1e3"])
      for name in ("EMAIL_LIMIT_HOUR", "EMAIL_LIMIT_DAY", "ACTIVATE_LIMIT_HOUR",
                   "IP_LIMIT", "FAILURE_LIMIT_HOUR")],
    (API, "TRUSTED_PROXIES", "must be a number from 0 to 9", ["yes", "10", "²"]),
    (API, "WEB_CONCURRENCY", "must be a number from 1 to 9999", ["0", "10000"]),
    (CONSUMER, "SMTP_HOST", "is no host name", ["mail..example.com", "m" * 64]),
    (CONSUMER, "SMTP_PORT", "must be a number from 1 to 65535", ["0", "smtp", "65536"]),
    (CONSUMER, "SMTP_TLS", "must be none, starttls or tls", ["ssl", "TLS"]),
    (CONSUMER, "SMTP_USERNAME", "must be ASCII", ["jörg", "\udcff"]),
    (CONSUMER, "SMTP_PASSWORD", "must be ASCII", ["schlüssel"]),
    (CONSUMER, "MAIL_FROM", SENDERS, [
        "registration", "Registration <>", "Registration <registration>", "@",
        "[Staging] Acme <ann@example.com>", "Ann, Bob <ann@example.com>",
        "ann@example.com,bob@example.com", "Ann <ann@example.com;>",
        "\udcff <ann@example.com>"]),
    *[(command, "LOG_LEVEL", LEVELS, ["verbose", "info", "INFO,DEBUG", "10"])
      for command in (API, CONSUMER)]]


@pytest.mark.parametrize("command, name, problem, value", [
    pytest.param(command, name, problem, value, id=f"{command[-1]} {name}={value!a}")
    for command, name, problem, values in MALFORMED for value in values])
def test_it_stops_with_one_line_that_says_what_is_wrong_and_shows_no_value(
        command, name, problem, value):
    code, lines = run(command, **GOOD | {name: value})

    assert code != 0
    assert lines == [f"{name} {problem}; see .env.example"]


@pytest.mark.parametrize("name, value", [
    ("DATABASE_URL", "postgresql://registration_api@%2Fvar%2Frun%2Fpostgresql/x"),
    ("DATABASE_URL", "postgresql://ann@one,two:5433/x?target_session_attrs=read-write"),
    ("DATABASE_URL", "host=db user=ann password=hush"),
    ("DATABASE_URL", "postgresql:///x?host=/var/run/postgresql"),
    ("BROKER_URL", "amqp://ann:hush@one//;amqp://ann:hush@two:5673//"),
    ("BROKER_URL", "amqps://ann:hu%2Fsh@broker/a%2Fb")])
def test_it_takes_whatever_url_the_libraries_take(name, value):
    assert run([*API, "--check-config"], **GOOD | {name: value}) == (0, [])


@pytest.mark.parametrize("name, value", [
    ("DATABASE_URL", "postgresql://ann:hu#sh@127.0.0.1:1/x"),
    ("DATABASE_URL", "postgresql://ann:hu?sh@127.0.0.1:1/x"),
    ("DATABASE_URL", "postgresql://ann:hush@127.0.0.1:70000/x"),
    ("DATABASE_URL", "host=127.0.0.1 port=1 user=ann password=hush"),
    ("BROKER_URL", "amqp://ann:hu@sh@127.0.0.1:1//"),
    ("BROKER_URL", "amqp://127.0.0.1:1/hush@broker//"),
    ("BROKER_URL", "amqp://ann:hush@bro..ker//"),
    ("BROKER_URL", f"amqp://ann:hush@{'b' * 64}//")])
def test_it_shows_no_part_of_a_password_in_an_outage_either(start_service, name, value):
    api = start_service(**{name: value})

    answer = register(api, fresh_email())

    assert problem_in(answer) == 503
    assert events(api.log, event="outage")
    assert not any(part in api.log.read_text() + answer.body.decode()
                   for part in ("hu", "sh@", value))


def test_it_accepts_the_settings_that_these_tests_call_good():
    assert run([*API, "--check-config"], **GOOD) == (0, [])


OPTIONAL = ["CODE_LIFETIME", "CODE_ATTEMPTS", "EMAIL_LIMIT_HOUR", "EMAIL_LIMIT_DAY",
            "ACTIVATE_LIMIT_HOUR", "IP_LIMIT", "FAILURE_LIMIT_HOUR", "TRUSTED_PROXIES",
            "LOG_LEVEL", "SMTP_HOST", "SMTP_PORT", "SMTP_USERNAME", "SMTP_PASSWORD",
            "SMTP_TLS"]


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


@pytest.mark.parametrize("module, name", [
    ("service", "SECRET_KEY"), ("consumer", "SMTP_PASSWORD")])
def test_it_reads_what_is_between_single_quotes_as_it_is(copy, module, name):
    value = "of $32 characters, ${HOME} and $$ # too"
    write_dotenv(copy, **GOOD | {name: value})

    result = run([sys.executable, "-c", f"import {module} as m; print(m.{name})"], copy)

    assert result == (0, [value])


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


def test_it_takes_the_number_of_workers_from_dotenv(copy, default_api):
    more = 2 * os.cpu_count() + 3
    write_dotenv(copy, WEB_CONCURRENCY=more)
    default_api.cwd = copy
    default_api.env["PYTHON_DOTENV_DISABLED"] = "0"

    with default_api as api:

        wait_until(lambda: len(workers_of(api)) == more)
