"""Settings: missing, malformed or empty ones, and .env."""

import os
import shutil

import pytest
from servers.process import TOP
from servers.program import Consumer
from steps import wait_until, workers_of
from steps.commands import API, CONSUMER, GOOD, PROGRAM, run


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
        "amqp://ann:hu#sh@broker//", "amqp://ann:hu/sh@broker//",
        "amqp://ann:hush@broker:65536//", "amqp://ann:hush@bro..ker//",
        f"amqp://ann:hush@{'b' * 64}//")],
    (API, "DATABASE_URL", "postgresql://ann:hush@db:70000/registration"),
    (API, "SECRET_KEY", "hush"), (API, "SECRET_KEY", "x" * 31),
    (API, "SECRET_KEY", "\udcff" * 32), (CONSUMER, "SMTP_USERNAME", "\udcff"),
    (CONSUMER, "MAIL_FROM", "\udcff <ann@example.com>"),
    (CONSUMER, "MAIL_FROM", "ann@example.com,bob@example.com"),
    (CONSUMER, "MAIL_FROM", "Ann <ann@example.com;>"),
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
    (CONSUMER, "SMTP_PORT", "65536"), (CONSUMER, "SMTP_HOST", "mail..example.com"),
    (CONSUMER, "SMTP_HOST", "http://mail"), (CONSUMER, "SMTP_HOST", "m" * 64),
    (CONSUMER, "SMTP_PORT", "２５"), (CONSUMER, "SMTP_TLS", "ssl"),
    (CONSUMER, "SMTP_USERNAME", "jörg"), (CONSUMER, "SMTP_PASSWORD", "schlüssel"),
    (CONSUMER, "MAIL_FROM", "registration"), (CONSUMER, "MAIL_FROM", "Registration <>"),
    (CONSUMER, "MAIL_FROM", "Registration <registration>"),
    (CONSUMER, "MAIL_FROM", "@"), (CONSUMER, "MAIL_FROM", "Ann, Bob <ann@example.com>"),
    *[(command, "LOG_LEVEL", value) for command in (API, CONSUMER)
      for value in ("verbose", "INFO,DEBUG", "10")]]


@pytest.mark.parametrize("command, name, value", MALFORMED, ids=[
    f"{command[-1]} {name}={value!a}" for command, name, value in MALFORMED])
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


def test_it_takes_the_number_of_workers_from_dotenv(copy, default_api):
    more = 2 * os.cpu_count() + 3
    write_dotenv(copy, WEB_CONCURRENCY=more)
    default_api.cwd = copy
    default_api.env["PYTHON_DOTENV_DISABLED"] = "0"

    with default_api as api:

        wait_until(lambda: len(workers_of(api)) == more)
