"""The system under test: real servers, started once a run and stopped at its end.

With SERVICE_URL and MAILDEV_URL set, the tests of test_flow.py run against that system
instead; the others need to kill servers, so they always have their own.
"""

import contextlib
import json
import os
import secrets
import subprocess
import threading
import uuid
from types import SimpleNamespace

import psycopg2
import pytest
from servers.faults import nothing, way_to
from servers.install import install_missing
from servers.maildev import MailDev
from servers.process import free_port
from servers.program import Consumer, Gunicorn
from servers.rabbitmq import RabbitMQ
from servers.smtp import SmtpServer
from servers.system import running_program, running_servers, settings_for
from steps import accepted, fresh_email, wait_until, wait_until_at_rest
from steps.jobs import consumers_of, delete_queues, purge, take_job
from steps.logs import events

# -- The system ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def servers(request, certificate):
    """PostgreSQL with the tables, RabbitMQ and MailDev, in a .folder.

    RabbitMQ has two addresses with TLS, too; its certificate has only 127.0.0.2. Not
    localhost, which kombu takes for 127.0.0.1.
    """
    def rabbitmq(folder):
        rabbitmq = RabbitMQ(folder)
        rabbitmq.tls_port = free_port()
        (rabbitmq.folder / "rabbitmq.conf").write_text(
            f"listeners.ssl.1 = 127.0.0.1:{rabbitmq.tls_port}\n"
            f"listeners.ssl.2 = 127.0.0.2:{rabbitmq.tls_port}\n"
            f"ssl_options.certfile = {certificate[0]}\n"
            f"ssl_options.keyfile = {certificate[1]}\n")
        return rabbitmq

    with running_servers(MailDev, rabbitmq=rabbitmq) as servers:
        request.config.folder_of_logs = servers.folder
        yield servers


@pytest.fixture(scope="session")
def settings(servers):
    """The settings of a process of the program that uses these servers."""
    return settings_for(servers.postgres.api_url, servers.rabbitmq.url,
                        servers.mail_server.smtp_port)


@pytest.fixture(scope="session")
def service(request):
    """The running API, as .url, with a consumer; .maildev_url shows the mails."""
    if "SERVICE_URL" in os.environ:
        yield SimpleNamespace(url=os.environ["SERVICE_URL"],
                              maildev_url=os.environ["MAILDEV_URL"])
        return
    servers = request.getfixturevalue("servers")
    settings = request.getfixturevalue("settings")
    with running_program(servers.folder / "service", settings) as (api, consumer):
        api.maildev_url = servers.mail_server.web_url
        api.consumer = consumer
        yield api


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Shows the last lines of each log, too, when a test has failed."""
    report, folder = (yield), getattr(item.config, "folder_of_logs", None)
    if report.failed and folder:
        for log in folder.rglob("*.log"):
            lines = log.read_text(errors="replace").splitlines()[-20:]
            report.sections.append((str(log), "\n".join(lines)))
    return report


# -- More APIs -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def running_api(settings, service, tmp_path_factory):
    """Runs one more API with settings of its own, beside the consumer that runs."""
    @contextlib.contextmanager
    def run_it(**changes):
        with Gunicorn(tmp_path_factory.mktemp("api"), settings | changes) as api:
            api.maildev_url = service.maildev_url
            yield api

    return run_it


@pytest.fixture
def start_service(running_api):
    """Starts such an API, and stops it after the test."""
    with contextlib.ExitStack() as started:
        yield lambda **changes: started.enter_context(running_api(**changes))


@pytest.fixture(scope="module")
def relayed_of_module(request, servers, settings, service):
    with (way_to(settings["DATABASE_URL"]) as database,
          way_to(settings["BROKER_URL"]) as broker,
          Gunicorn(servers.folder / f"relayed{secrets.token_hex(4)}", settings | {
              "DATABASE_URL": database.url, "BROKER_URL": broker.url,
              "WEB_CONCURRENCY": request.module.WORKERS,
              "CODE_LIFETIME": "600"}) as api):
        api.ways = {"database": database, "broker": broker}
        api.maildev_url = service.maildev_url
        yield api


@pytest.fixture
def relayed(relayed_of_module):
    """An API with the WORKERS of the test's file; relays to its servers are its .ways.
    Its connections are open."""
    for way in relayed_of_module.ways.values():
        way.seconds, way.answers, way.is_held = 0, None, nothing
        way.released.set()
        way.held, way.released = threading.Event(), threading.Event()
    wait_until_at_rest(relayed_of_module)
    return relayed_of_module


# -- Queues, consumers and their mail servers ------------------------------------------


@pytest.fixture(scope="session")
def brokers(servers):
    """Brokers apart from the others, virtual hosts in RabbitMQ; their URLs by name."""
    names = ["queue", "mailer", "spare"]
    everything = dict.fromkeys(["configure", "write", "read"], ".*")
    file = servers.folder / "definitions.json"
    file.write_text(json.dumps({
        "vhosts": [{"name": name} for name in names],
        "permissions": [{"user": "guest", "vhost": name} | everything
                        for name in names]}))
    servers.rabbitmq.ctl("import_definitions", str(file))
    return {name: servers.rabbitmq.url_of(name) for name in names}


@pytest.fixture
def broker(brokers):
    """A broker without queues, for tests that start consumers of their own."""
    delete_queues(brokers["spare"])
    return brokers["spare"]


@pytest.fixture(scope="session")
def queue(servers, settings, brokers):
    """An API whose jobs nobody takes; .broker is their broker."""
    folder = servers.folder / "queue"
    with Gunicorn(folder, settings | {"BROKER_URL": brokers["queue"]}) as api:
        api.broker = brokers["queue"]
        yield api


@pytest.fixture
def job(queue):
    """A job for a fresh address, as the API writes it, with a minute to live."""
    accepted(queue, fresh_email())
    return take_job(queue.broker)


@pytest.fixture
def smtp():
    """A mail server that answers what the test tells it."""
    with SmtpServer(free_port()) as smtp:
        yield smtp


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-made certificate for localhost and 127.0.0.2, with its key, as files."""
    install_missing("commands")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.2",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def start_consumer(settings, tmp_path):
    """Starts a consumer with settings of its own; returns when it consumes."""
    with contextlib.ExitStack() as started:
        def start_it(**changes):
            consumer = Consumer(tmp_path / f"consumer{uuid.uuid4().hex}",
                                settings | changes)
            started.callback(consumer.kill)     # stop() might take three seconds
            consumer.start()
            wait_until(lambda: events(consumer.log, event="consuming"))
            return consumer

        yield start_it


@pytest.fixture(scope="session")
def mailer_of_session(servers, settings, brokers):
    broker = brokers["mailer"]
    with SmtpServer(free_port()) as smtp, Consumer(servers.folder / "mailer", dict(
            settings, BROKER_URL=broker, SMTP_PORT=str(smtp.port))) as consumer:
        wait_until(lambda: consumers_of(broker))
        consumer.broker, consumer.smtp = broker, smtp
        yield consumer


@pytest.fixture
def mailer(mailer_of_session):
    """A consumer of a .broker whose queues are empty; it mails through its .smtp."""
    purge(mailer_of_session.broker)
    return mailer_of_session
