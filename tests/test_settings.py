"""Settings: missing, malformed or empty ones, and .env."""

import os
import shutil
import subprocess
import sys

import pytest
from servers.process import TOP
from servers.program import Consumer
from servers.system import SETTINGS
from steps import fresh_email, problem_in, register, wait_until
from steps.logs import events

API = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "service:app"]
CONSUMER = [sys.executable, "consumer.py"]

# Nothing listens there: a program that gets past its settings is not stopped by them.
GOOD = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
    "BROKER_URL": "amqp://guest:guest@127.0.0.1:1//",
    "SECRET_KEY": "only for the tests, 32 characters and more",
    "MAIL_FROM": "registration@example.com", "PYTHON_DOTENV_DISABLED": "1"}


def run(command, folder=TOP, **settings):
    """Runs a command with these settings and no others: (its exit code, its lines)."""
    environment = {"PATH": os.environ["PATH"]} | settings
    done = subprocess.run(command, check=False, cwd=folder, env=environment,
                          text=True, timeout=30, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.splitlines()


# -- Wrong settings --------------------------------------------------------------------


@pytest.mark.parametrize("command, name, how", [
    (API, "DATABASE_URL", "absent"), (API, "BROKER_URL", "empty"),
    (API, "SECRET_KEY", "absent"), (CONSUMER, "BROKER_URL", "empty"),
    (CONSUMER, "MAIL_FROM", "absent")],
    ids=lambda value: value if isinstance(value, str) else value[-1])
def test_it_stops_with_one_line_that_names_a_missing_setting(command, name, how):
    settings = GOOD | {name: ""}
    if how == "absent":
        del settings[name]

    code, lines = run(command, **settings)

    assert code != 0
    assert lines == [f"{name} is missing; see .env.example"]


NUMBER = "must be a number from"
LIMIT = f"{NUMBER} 0 to 1000000000"
LEVELS = "must be DEBUG, INFO, WARNING, ERROR or CRITICAL"
SENDERS = 'must be an address, Name <address> or "Name, Inc." <address>'
MALFORMED = [   # what is said of these values, one for each reason
    (API, "DATABASE_URL", "is no PostgreSQL URL", [
        "mysql://ann:hush@db/registration", "postgresql://ann:hu@sh@db/registration",
        "postgresql://ann:12/sh@db/x"]),
    *[(command, "BROKER_URL", "is no AMQP URL", [
        "http://ann:hush@broker//", "amqp://ann:hu#sh@broker//",
        "amqp://ann:hush@one//;redis://:hush@other"]) for command in (API, CONSUMER)],
    (API, "SECRET_KEY", "must have 32 characters or more", ["x" * 31, "\udcff" * 32]),
    (API, "CODE_LIFETIME", f"{NUMBER} 1 to 86400", ["0", "86401", "60 s"]),
    (API, "CODE_ATTEMPTS", f"{NUMBER} 1 to 9999", ["3.5"]),
    (API, "EMAIL_LIMIT_HOUR", LIMIT, ["-1"]), (API, "EMAIL_LIMIT_DAY", LIMIT, ["-1"]),
    (API, "ACTIVATE_LIMIT_HOUR", LIMIT, ["-1"]), (API, "IP_LIMIT", LIMIT, ["-1"]),
    (API, "FAILURE_LIMIT_HOUR", LIMIT, ["-1"]),
    (API, "TRUSTED_PROXIES", f"{NUMBER} 0 to 9", ["10"]),
    (API, "WEB_CONCURRENCY", f"{NUMBER} 1 to 9999", ["0"]),
    (CONSUMER, "SMTP_HOST", "is no host name", ["mail..example.com"]),
    (CONSUMER, "SMTP_PORT", f"{NUMBER} 1 to 65535", ["0", "65536", "smtp"]),
    (CONSUMER, "SMTP_TLS", "must be none, starttls or tls", ["TLS"]),
    (CONSUMER, "SMTP_USERNAME", "must be ASCII", ["jörg"]),
    (CONSUMER, "SMTP_PASSWORD", "must be ASCII", ["schlüssel"]),
    (CONSUMER, "MAIL_FROM", SENDERS, [
        "Registration <registration>", "Ann, Bob <ann@example.com>",
        "[Staging] Acme <ann@example.com>", "\udcff <ann@example.com>"]),
    (API, "LOG_LEVEL", LEVELS, ["info"]), (CONSUMER, "LOG_LEVEL", LEVELS, ["10"])]


@pytest.mark.parametrize("command, name, problem, value", [
    pytest.param(command, name, problem, value, id=f"{command[-1]} {name}={value!a}")
    for command, name, problem, values in MALFORMED for value in values])
def test_it_stops_with_one_line_that_says_what_is_wrong_and_shows_no_value(
        command, name, problem, value):
    code, lines = run(command, **GOOD | {name: value})

    assert code != 0
    assert lines == [f"{name} {problem}; see .env.example"]


@pytest.mark.parametrize("name, value", [
    ("DATABASE_URL", "postgresql://ann:hu?sh@127.0.0.1:1/x"),
    ("DATABASE_URL", "postgresql://ann:hush@127.0.0.1:70000/x"),
    ("BROKER_URL", "amqp://ann:hu@sh@127.0.0.1:1//"),
    ("BROKER_URL", "amqp://ann:hush@bro..ker//")])
def test_it_shows_no_part_of_a_password_in_an_outage_either(start_service, name, value):
    api = start_service(WEB_CONCURRENCY="1", **{name: value})

    answer = register(api, fresh_email())

    assert problem_in(answer) == 503
    assert events(api.log, event="outage")
    assert not any(part in api.log.read_text() + answer.body.decode()
                   for part in ("hu", "sh@", value))


# -- Good settings ---------------------------------------------------------------------


@pytest.mark.parametrize("database, broker", [
    ("postgresql://registration_api@%2Fvar%2Frun%2Fpostgresql/x",
     "amqps://ann:hu%2Fsh@broker/a%2Fb"),
    ("host=db user=ann password=hush", GOOD["BROKER_URL"])])
def test_it_takes_whatever_url_the_libraries_take(database, broker):
    urls = {"DATABASE_URL": database, "BROKER_URL": broker}

    assert run([*API, "--check-config"], **GOOD | urls) == (0, [])


def test_it_takes_an_empty_setting_for_one_that_is_not_set(tmp_path):
    # Not WEB_CONCURRENCY: gunicorn reads it, too, and takes no empty one.
    optional = {*SETTINGS, "SMTP_HOST", "SMTP_PORT"} - {*GOOD, "WEB_CONCURRENCY"}
    settings = GOOD | dict.fromkeys(optional, "")

    with Consumer(tmp_path, settings) as consumer:
        checked = run([*API, "--check-config"], **settings)
        wait_until(lambda: events(consumer.log, event="outage"))

    assert checked == (0, [])


# -- .env ------------------------------------------------------------------------------


def with_dotenv(folder, **settings):
    """The folder, with a copy of the program in it, and these settings in .env."""
    for name in ["service.py", "consumer.py", "gunicorn.conf.py", "openapi.yaml",
                 "common-passwords.txt"]:
        shutil.copy(TOP / name, folder)
    (folder / ".env").write_text("".join(
        f"{name}='{value}'\n" for name, value in settings.items()
        if name != "PYTHON_DOTENV_DISABLED"))
    return folder


@pytest.mark.parametrize("command, right, wrong", [
    (API, {"SECRET_KEY": GOOD["SECRET_KEY"]}, {"WEB_CONCURRENCY": "three"}),
    (CONSUMER, {"SMTP_PORT": "25"}, {"MAIL_FROM": "nobody"})], ids=["api", "consumer"])
def test_it_reads_dotenv_which_the_environment_overrides(
        tmp_path, command, right, wrong):
    folder = with_dotenv(tmp_path, **GOOD | dict.fromkeys(right, "nonsense") | wrong)

    code, lines = run(command, folder, **right)

    assert code != 0
    assert len(lines) == 1 and lines[0].split()[0] in wrong


@pytest.mark.parametrize("module, name", [
    ("service", "SECRET_KEY"), ("consumer", "SMTP_PASSWORD")])
def test_it_reads_what_is_between_single_quotes_as_it_is(tmp_path, module, name):
    value = "of $32 characters, ${HOME} and $$ # too"
    folder = with_dotenv(tmp_path, **GOOD | {name: value})

    result = run([sys.executable, "-c", f"import {module} as m; print(m.{name})"],
                 folder)

    assert result == (0, [value])
