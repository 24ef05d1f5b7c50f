"""The whole system, set up: settings, tables, servers, and the program on top of them.

    with whole_system(Sink, CODE_LIFETIME="20") as system:
        register(system.api, "ann@example.com")

conftest.py, trials/ and run.py put theirs together from what is here.
"""

import hmac
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from servers.install import install_missing
from servers.postgres import Postgres
from servers.process import TOP, running
from servers.program import HERE, Consumer, Gunicorn
from servers.rabbitmq import RabbitMQ

SENDER = "registration@example.com"

# Every setting, so that none comes from the environment or a .env of whoever runs this.
# Limits are out of the way, except where a test is about them.
SETTINGS = {
    "SECRET_KEY": "only for the tests, 32 characters and more",
    "MAIL_FROM": f"Registration <{SENDER}>",
    "SMTP_USERNAME": "", "SMTP_PASSWORD": "", "SMTP_TLS": "none",
    "CODE_LIFETIME": "60", "CODE_ATTEMPTS": "3",
    "EMAIL_LIMIT_HOUR": "1000000", "EMAIL_LIMIT_DAY": "1000000",
    "ACTIVATE_LIMIT_HOUR": "1000000", "IP_LIMIT": "1000000",
    "FAILURE_LIMIT_HOUR": "1000000",
    "TRUSTED_PROXIES": "0", "WEB_CONCURRENCY": "2", "LOG_LEVEL": "INFO"}


def digest(email, code):
    """As the service computes it: so a mail's code can be compared, unspent."""
    return hmac.digest(SETTINGS["SECRET_KEY"].encode(), f"{email} {code}".encode(),
                       "sha256")


def settings_for(database_url, broker_url, smtp_port, **changes):
    """The settings of a process of the program that uses these servers.

    A change to None takes a setting away: the program's own default counts.
    """
    settings = SETTINGS | {
        "DATABASE_URL": database_url, "BROKER_URL": broker_url,
        "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(smtp_port)} | changes
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def temporary_folder():
    """One with a short name, for sockets, that other users can get into.

    As root, PostgreSQL and nginx run as such.
    """
    with tempfile.TemporaryDirectory(prefix="reg-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def create_tables(postgres, database="registration", home=TOP):
    """Those of the program in the folder home; of older ones, the newest form."""
    scripts = [home / "sql/schema.sql"]
    if postgres.psql("SELECT to_regclass('users')", database):
        scripts = sorted(home.glob("sql/[0-9]*.sql"))
    for script in scripts:
        postgres.psql(script.read_text(), database)


@contextmanager
def running_servers(mail_server, rabbitmq=RabbitMQ):
    """PostgreSQL with the tables, RabbitMQ, and a mail server: MailDev or Sink."""
    install_missing(Postgres.name, RabbitMQ.name, mail_server.name)
    with temporary_folder() as folder, running(
            Postgres(folder), rabbitmq(folder), mail_server(folder)) as servers:
        postgres, rabbitmq, mail_server = servers
        create_tables(postgres)
        yield SimpleNamespace(folder=folder, postgres=postgres, rabbitmq=rabbitmq,
                              mail_server=mail_server)


@contextmanager
def running_program(folder, settings, homes=(HERE, HERE)):
    """An API and a consumer, with their logs in a folder: (API, consumer).

    homes: where each of the two is taken from.
    """
    processes = Gunicorn(folder, settings), Consumer(folder, settings)
    for process, home in zip(processes, homes):
        process.cwd, process.python = home
    with running(*processes):
        yield processes


@contextmanager
def whole_system(mail_server, **changes):
    """Both, with changed settings: what running_servers() gives, .api and .consumer."""
    with running_servers(mail_server) as system:
        settings = settings_for(system.postgres.api_url, system.rabbitmq.url,
                                system.mail_server.smtp_port, **changes)
        with running_program(system.folder / "program", settings) as processes:
            system.api, system.consumer = processes
            yield system
