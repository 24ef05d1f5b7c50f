"""The program as files: its settings, and what is in which file."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import servers as start
from steps import wait_until

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


@pytest.mark.parametrize("command, name, value", [
    (API, "SECRET_KEY", "x" * 31), (API, "CODE_LIFETIME", "a minute"),
    (API, "CODE_ATTEMPTS", "3.5"), (API, "IP_LIMIT", "many"),
    (API, "EMAIL_LIMIT_HOUR", "5/h"), (API, "TRUSTED_PROXIES", "yes"),
    (CONSUMER, "SMTP_PORT", "smtp"), (CONSUMER, "SMTP_TLS", "ssl")],
    ids=lambda value: value if isinstance(value, str) else value[-1])
def test_it_stops_with_one_line_that_names_a_wrong_setting(command, name, value):
    code, lines = run(command, **GOOD | {name: value})

    assert code != 0
    assert len(lines) == 1 and name in lines[0]


def test_it_accepts_the_settings_that_these_tests_call_good():
    assert run([*API, "--check-config"], **GOOD) == (0, [])


@pytest.mark.parametrize("name", ["DATABASE_URL", "BROKER_URL"])
def test_it_does_not_show_a_secret_in_the_line(name):
    code, lines = run(API, **GOOD | {name: "amqp://ann:hush@db", "SECRET_KEY": "hush"})

    assert code != 0
    assert not any("hush" in line for line in lines)


# -- .env ------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of the program in a folder of its own, without a .env."""
    for name in [*PROGRAM, "openapi.yaml"]:
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


def test_it_takes_the_number_of_workers_from_dotenv(copy, settings, tmp_path):
    write_dotenv(copy, WEB_CONCURRENCY="3")
    environment = {name: value for name, value in settings.items()
                   if name != "WEB_CONCURRENCY"}
    api = start.Gunicorn(tmp_path / "log", environment)
    api.cwd, api.env = copy, api.env | {"PYTHON_DOTENV_DISABLED": "0"}

    with api:

        wait_until(lambda: len(start.tree(api.process.pid)) == 1 + 3)


# -- The files -------------------------------------------------------------------------


def section(file, title):
    """The lines of a file between one banner and the next."""
    text = (TOP / file).read_text()
    return re.search(rf"^# -- {title}.*\n((?:(?!# -- ).*\n)*)", text, re.M)[1].strip()


def settings_of(file):
    """The names of the settings that a file reads, in its order."""
    return re.findall(r"^[^#\n]*(?:setting|environ\.get)\(\"([A-Z_]+)\"",
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


@pytest.mark.parametrize("file", ["service.py", "consumer.py"])
def test_it_reads_the_settings_in_the_order_of_env_example(file):
    names = settings_of(file)

    assert len(names) > 5
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


# -- Connections -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4, 9, 10, 16, 30, 45, 64])
def test_it_needs_no_more_connections_than_postgresql_has_by_default(workers):
    code, [places] = run([sys.executable, "-c", """if True:
        import gc, service
        print(sum(type(each) is service.Place for each in gc.get_objects()))
        """], **GOOD | {"WEB_CONCURRENCY": str(workers)})

    assert code == 0
    assert workers <= workers * int(places) <= 97    # three are kept for superusers
