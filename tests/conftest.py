"""The system under test: real servers, started once a run and stopped at its end.

With SERVICE_URL and MAILDEV_URL set, the tests of test_flow.py run against that system
instead; the others need to kill servers, so they always have their own.
"""

import contextlib
import os
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace

import psycopg2
import pytest
import servers as start
from smtp import SmtpServer

TOP = Path(__file__).parent.parent

# Every setting, so that none comes from the environment or a .env of whoever runs this.
# Limits are out of the way, except where a test is about them.
SETTINGS = {
    "SECRET_KEY": "only for the tests, 32 characters and more",
    "MAIL_FROM": "Registration <registration@example.com>",
    "SMTP_USERNAME": "", "SMTP_PASSWORD": "", "SMTP_TLS": "none",
    "CODE_LIFETIME": "60", "CODE_ATTEMPTS": "3",
    "EMAIL_LIMIT_HOUR": "1000000", "EMAIL_LIMIT_DAY": "1000000",
    "ACTIVATE_LIMIT_HOUR": "1000000", "IP_LIMIT": "1000000",
    "TRUSTED_PROXIES": "0", "WEB_CONCURRENCY": "2", "LOG_LEVEL": "INFO"}


@pytest.fixture(scope="session")
def servers():
    """PostgreSQL with the schema, RabbitMQ and MailDev."""
    start.install_missing()
    # Short names, for sockets, and not pytest's own folder: another user must get in.
    with tempfile.TemporaryDirectory(prefix="reg-") as folder:
        os.chmod(folder, 0o755)
        with start.running(
                start.Postgres(folder), start.RabbitMQ(folder), start.MailDev(folder)
        ) as (postgres, rabbitmq, maildev):
            postgres.psql((TOP / "sql/schema.sql").read_text())
            yield SimpleNamespace(folder=folder, postgres=postgres, rabbitmq=rabbitmq,
                                  maildev=maildev)


@pytest.fixture(scope="session")
def settings(servers):
    """The settings of a process of the program that uses these servers."""
    return SETTINGS | {
        "DATABASE_URL": servers.postgres.url, "BROKER_URL": servers.rabbitmq.url,
        "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(servers.maildev.smtp_port)}


@pytest.fixture(scope="session")
def service(request):
    """The running API, as .url, with a consumer; .maildev_url shows the mails."""
    if "SERVICE_URL" in os.environ:
        yield SimpleNamespace(url=os.environ["SERVICE_URL"],
                              maildev_url=os.environ["MAILDEV_URL"])
        return
    servers = request.getfixturevalue("servers")
    settings = request.getfixturevalue("settings")
    folder = Path(servers.folder)
    with start.running(start.Gunicorn(folder / "api", settings),
                       start.Consumer(folder / "consumer", settings)) as (api, consumer):
        api.maildev_url = f"http://127.0.0.1:{servers.maildev.web_port}"
        api.consumer = consumer
        yield api


@pytest.fixture
def start_service(servers, settings, service, tmp_path):
    """Starts one more API with settings of its own, beside the consumer that runs."""
    started = []

    def start_it(**changes):
        api = start.Gunicorn(tmp_path / f"api{len(started)}", settings | changes)
        api.start()
        started.append(api)
        api.maildev_url = service.maildev_url
        return api

    yield start_it
    for api in started:
        api.stop()


@pytest.fixture(scope="session")
def new_broker(servers):
    """Makes brokers apart from the others, virtual hosts in RabbitMQ; gives the URL."""
    def make(name):
        servers.rabbitmq.ctl("add_vhost", name)
        servers.rabbitmq.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        return servers.rabbitmq.url.removesuffix("/") + name

    return make


@pytest.fixture
def start_consumer(settings, tmp_path):
    """Starts a consumer with settings of its own."""
    with contextlib.ExitStack() as started:
        def start_it(**changes):
            folder = tmp_path / f"consumer{uuid.uuid4().hex}"
            return started.enter_context(start.Consumer(folder, settings | changes))

        yield start_it


@pytest.fixture
def smtp():
    """A mail server that answers what the test tells it."""
    server = SmtpServer(start.free_port())
    yield server
    server.close()


@pytest.fixture
def database(servers):
    """Executes a statement: database("SELECT ...", values) gives its rows, if any."""
    connection = psycopg2.connect(servers.postgres.url)
    connection.autocommit = True

    def execute(statement, values=()):
        with connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    yield execute
    connection.close()
