"""Servers that are down, stuck, full or cut off; and processes that are ended.

Each fault is real. While it lasts, the API answers 503 within 5 seconds and keeps
nothing; when it is over, everything works again by itself, with the same processes.
"""

import contextlib
import os
import re
import resource
import signal
import socket
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psycopg2
import pytest
import servers as start
from jobs import delete_queues, purge, put, take_job, waiting_in
from smtp import HANG
from steps import (activate, at_once, code_mailed_to, fresh_email, mails_to, problem_in,
                   register, registered, send, wait_until)

ANOTHER = "another fine password"


@pytest.fixture(scope="module")
def system(servers, settings, brokers):
    """An API and a consumer with a broker of their own; codes live ten minutes."""
    changed = settings | {"BROKER_URL": brokers["faults"], "CODE_LIFETIME": "600"}
    folder = Path(servers.folder) / "faults"
    with start.running(start.Gunicorn(folder, changed),
                       start.Consumer(folder, changed)) as (api, consumer):
        yield SimpleNamespace(
            api=api, consumer=consumer, broker=brokers["faults"], url=api.url,
            maildev_url=servers.maildev.web_url)


def processes(system):
    return start.tree(system.api.process.pid) + start.tree(system.consumer.process.pid)


def timed(call):
    """The answer of a call, with the .seconds that it took."""
    started = time.monotonic()
    answer = call()
    answer.seconds = time.monotonic() - started
    return answer


def refused_in_time(answer):
    """Whether it is the 503 of the contract."""
    return (answer.status == 503 and problem_in(answer) == "unavailable"
            and int(answer.headers["Retry-After"]) > 0 and answer.seconds < 5)


def heals(system, email, code):
    """Whether the right pair comes to activate its account, and the mail is sent."""
    before = len(mails_to(system, email))
    wait_until(lambda: activate(system, email, code).status == 200)
    return wait_until(lambda: len(mails_to(system, email)) > before)


# -- The faults ------------------------------------------------------------------------


@contextlib.contextmanager
def server_down(server):
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def server_paused(server):
    server.pause()
    try:
        yield
    finally:
        server.resume()


@contextlib.contextmanager
def broker_alarmed(rabbitmq):
    """Out of memory, so it says: it reads nothing more from publishers."""
    rabbitmq.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        yield
    finally:
        rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")


@contextlib.contextmanager
def database_read_only(postgres):
    """As a standby is, or a server whose disk is full."""
    postgres.psql("ALTER SYSTEM SET default_transaction_read_only = on")
    postgres.psql("SELECT pg_reload_conf()")
    wait_until(lambda: postgres.psql("SHOW default_transaction_read_only") == "on")
    try:
        yield
    finally:
        postgres.psql("SET default_transaction_read_only = off; "
                      "ALTER SYSTEM RESET default_transaction_read_only")
        postgres.psql("SELECT pg_reload_conf()")


OUTAGES = {
    "broker down": lambda servers: server_down(servers.rabbitmq),
    "broker paused": lambda servers: server_paused(servers.rabbitmq),
    "broker alarmed": lambda servers: broker_alarmed(servers.rabbitmq),
    "database down": lambda servers: server_down(servers.postgres),
    "database paused": lambda servers: server_paused(servers.postgres),
    "database read-only": lambda servers: database_read_only(servers.postgres)}


# -- Outages of the database and the broker --------------------------------------------


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES.keys())
def test_it_answers_503_in_time_keeps_nothing_and_heals(servers, system, outage):
    email, code = registered(system)
    other, other_code = registered(system)
    new, before = fresh_email(), processes(system)

    with outage(servers):
        answers = at_once(
            lambda: timed(lambda: register(system, new)),
            lambda: timed(lambda: register(system, email, ANOTHER)),
            lambda: timed(lambda: activate(system, other, other_code)))

    assert all(refused_in_time(answer) for answer in answers)
    assert heals(system, email, code) and heals(system, other, other_code)
    assert rows_of(servers, new) == 0
    assert processes(system) == before


def test_it_counts_nothing_against_an_address_while_the_broker_is_down(
        servers, system, start_service):
    api, email = start_service(EMAIL_LIMIT_HOUR="1"), fresh_email()

    with server_down(servers.rabbitmq):
        refused = [register(api, email).status for _ in range(3)]

    assert refused == [503, 503, 503]
    wait_until(lambda: register(api, email).status == 202)


def rows_of(servers, email):
    return int(servers.postgres.psql(
        f"SELECT count(*) FROM users WHERE email = '{email}'"))


def test_it_mails_no_live_code_for_a_registration_that_it_refused(
        system, start_service):
    email = fresh_email()
    with slow_way_to(system.broker) as way:
        api = start_service(BROKER_URL=way.url, WEB_CONCURRENCY="1")
        register(api, fresh_email())     # the connection is open, and used again
        way.seconds = 1.5

        assert register(api, email).status == 503

    late_code = code_mailed_to(system, email)     # the broker has it: it had confirmed
    assert activate(system, email, late_code).status == 401


@pytest.mark.parametrize("server, outage", [
    ("broker", "broker paused"), ("database", "database paused"),
    ("database", "database down")])
def test_it_names_in_healthz_the_server_that_does_not_answer(
        servers, system, server, outage):
    with OUTAGES[outage](servers):
        sick = timed(lambda: send(system, "GET", "/healthz"))

    assert refused_in_time(sick)
    assert re.findall("broker|database", sick.json["detail"]) == [server]
    wait_until(lambda: send(system, "GET", "/healthz").status == 200)


def test_it_leaves_no_connection_of_a_health_check_open(start_service):
    api = start_service(WEB_CONCURRENCY="1")
    before = sockets_of(api)

    healthy = [send(api, "GET", "/healthz").status for _ in range(20)]

    assert healthy == [200] * 20
    wait_until(lambda: sockets_of(api) <= before)


def sockets_of(api):
    [worker] = workers_of(api)
    return sum(os.readlink(file).startswith("socket:")
               for file in Path(f"/proc/{worker}/fd").iterdir()
               if file.is_symlink())


def test_it_does_not_notice_that_its_idle_broker_connections_were_cut(servers, system):
    registered(system)

    servers.rabbitmq.ctl("close_all_connections", "-p", "faults", "cut")

    answers = [register(system, fresh_email()).status for _ in range(10)]
    assert answers == [202] * 10


def test_it_does_not_notice_that_its_idle_sessions_were_cut(servers, system):
    registered(system)

    wait_until(lambda: servers.postgres.psql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()") == "")

    answers = [register(system, fresh_email()).status for _ in range(10)]
    assert answers == [202] * 10


def test_it_keeps_what_it_says_however_slow_lock_and_broker_were(
        servers, system, start_service):
    email, _ = registered(system)

    with slow_way_to(servers.rabbitmq.url) as way, ThreadPoolExecutor() as threads:
        api = start_service(BROKER_URL=way.url)
        way.seconds = 0.3     # eight answers until the confirm
        with row_locked(servers, email):
            under_way = threads.submit(lambda: register(api, email, ANOTHER))
            wait_until(lambda: statements_waiting(servers))
        accepted = under_way.result()

    assert accepted.status == 202
    assert activate(system, email, code_mailed_to(system, email, 2), ANOTHER).status == 200


@contextlib.contextmanager
def slow_way_to(broker):
    """A way, .url, on which each answer of the broker takes .seconds longer."""
    def relay(source, target, slowly):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(way.seconds if slowly else 0)
                target.sendall(data)

    def accept():
        with contextlib.suppress(OSError):     # the listener was closed
            while True:
                caller = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", port))
                for ends in (caller, server, False), (server, caller, True):
                    threading.Thread(target=relay, args=ends, daemon=True).start()

    port, free = urlsplit(broker).port, start.free_port()
    way = SimpleNamespace(url=broker.replace(str(port), str(free)), seconds=0)
    with socket.create_server(("127.0.0.1", free)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield way
        listener.shutdown(socket.SHUT_RDWR)


def test_it_answers_503_while_there_is_no_memory_for_a_hash(servers, start_service):
    api, email = start_service(WEB_CONCURRENCY="1"), fresh_email()
    at_once(*[lambda: send(api, "GET", "/openapi.yaml")] * 64)     # its threads begin

    with little_memory_for(*workers_of(api)):
        refused = timed(lambda: register(api, email))

    assert refused_in_time(refused)
    assert rows_of(servers, email) == 0
    assert register(api, email).status == 202


@contextlib.contextmanager
def little_memory_for(process):
    """It gets 8 MiB more than it has: too little for Argon2's 12."""
    status = Path(f"/proc/{process}/status").read_text()
    size = 1024 * int(re.search(r"VmSize:\s+(\d+)", status)[1])
    _, hard = limits = resource.prlimit(process, resource.RLIMIT_AS)
    resource.prlimit(process, resource.RLIMIT_AS, (size + (8 << 20), hard))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_AS, limits)


def test_it_answers_503_while_its_queue_is_full(servers, queue):
    with queue_of_one(servers, queue):
        wait_until(lambda: register(queue, fresh_email()).status == 503)
        email, jobs = fresh_email(), waiting_in(queue.broker)
        refused = timed(lambda: register(queue, email))

        assert refused_in_time(refused)
        assert rows_of(servers, email) == 0
        assert waiting_in(queue.broker) == jobs

    wait_until(lambda: register(queue, email).status == 202)


@contextlib.contextmanager
def queue_of_one(servers, queue):
    """The queue takes one job, and whatever the broker took before it noticed."""
    servers.rabbitmq.ctl(
        "set_policy", "-p", "queue", "full", "^mail$", '{"max-length": 1}')
    try:
        yield
    finally:
        servers.rabbitmq.ctl("clear_policy", "-p", "queue", "full")
        purge(queue.broker)


def test_it_loses_no_mail_when_its_queue_was_deleted(start_service, broker):
    api = start_service(BROKER_URL=broker, WEB_CONCURRENCY="1")
    email = fresh_email()
    register(api, fresh_email())
    delete_queues(broker)

    refused = register(api, email)
    accepted = register(api, email)

    assert [refused.status, accepted.status] == [503, 202]
    assert take_job(broker)["email"] == email


def test_it_waits_for_no_lock_longer_than_a_caller_would(servers, system):
    email, code = registered(system)

    with row_locked(servers, email):
        answers = at_once(lambda: timed(lambda: register(system, email, ANOTHER)),
                          lambda: timed(lambda: activate(system, email, code)))
        unlocked = register(system, fresh_email())

    assert all(refused_in_time(answer) for answer in answers)
    assert unlocked.status == 202
    assert heals(system, email, code)


def test_it_logs_what_happened_and_not_the_rollback_that_failed_in_turn(
        servers, system):
    email, _ = registered(system)
    before = len(system.api.log.read_text())

    with ThreadPoolExecutor() as threads, row_locked(servers, email):
        under_way = threads.submit(register, system, email, ANOTHER)
        wait_until(lambda: statements_waiting(servers))
        with server_paused(servers.postgres):
            under_way.result()

    [outage] = [line for line in system.api.log.read_text()[before:].splitlines()
                if "event=outage" in line]
    assert "server=database" in outage and "InterfaceError" not in outage


def test_it_leaves_no_statement_waiting_that_it_gave_up(servers, system):
    email, _ = registered(system)

    with row_locked(servers, email):
        assert register(system, email, ANOTHER).status == 503

        wait_until(lambda: statements_waiting(servers) == 0, seconds=5)


def statements_waiting(servers):
    return int(servers.postgres.psql("SELECT count(*) FROM pg_locks WHERE NOT granted"))


@contextlib.contextmanager
def row_locked(servers, email):
    """Somebody else's transaction holds the row."""
    with contextlib.closing(psycopg2.connect(servers.postgres.url)) as session:
        session.cursor().execute(
            "SELECT FROM users WHERE email = %s FOR UPDATE", [email])
        yield


# -- COMMIT fails after the publish ----------------------------------------------------


@pytest.fixture
def at_commit(servers):
    """Has the database do something at the COMMIT of a change of one address."""
    with contextlib.ExitStack() as cleanup:
        def prepare(email, action):
            name = f"at_commit_{email.partition('@')[0]}"
            cleanup.callback(servers.postgres.psql, f"DROP FUNCTION {name} CASCADE")
            servers.postgres.psql(f"""
                CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS
                       $$ BEGIN {action}; RETURN NULL; END $$;
                CREATE CONSTRAINT TRIGGER {name} AFTER INSERT OR UPDATE ON users
                       DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
                  WHEN (NEW.email = '{email}') EXECUTE FUNCTION {name}()""")

        prepare.undo = cleanup.close
        yield prepare


@pytest.mark.parametrize("action", [
    "RAISE 'no'", "PERFORM pg_terminate_backend(pg_backend_pid())"],
    ids=["refused", "connection lost"])
def test_it_mails_a_code_of_no_use_when_commit_fails(system, at_commit, action):
    email = fresh_email()
    at_commit(email, action)

    refused = timed(lambda: register(system, email))

    assert refused_in_time(refused)
    dead_code = code_mailed_to(system, email)
    assert activate(system, email, dead_code).status == 401
    at_commit.undo()
    assert register(system, email).status == 202
    assert activate(system, email, code_mailed_to(system, email, 2)).status == 200


def test_it_can_be_asked_again_when_the_answer_to_commit_is_lost(
        servers, system, at_commit):
    email = fresh_email()
    at_commit(email, "PERFORM pg_sleep(6)")

    refused = timed(lambda: register(system, email))

    assert refused_in_time(refused)
    wait_until(lambda: rows_of(servers, email) == 1)     # it was kept after all
    at_commit.undo()
    assert register(system, email, ANOTHER).status == 202
    code = code_mailed_to(system, email, 2)
    assert activate(system, email, code, ANOTHER).status == 200


def test_it_counts_no_activation_whose_commit_failed(system, at_commit):
    email, code = registered(system)
    at_commit(email, "RAISE 'no'")

    refused = activate(system, email, code)

    assert refused.status == 503
    at_commit.undo()
    assert activate(system, email, code).status == 200


# -- Trouble with the mail server ------------------------------------------------------


@pytest.mark.parametrize("outage", [server_down, server_paused], ids=["down", "paused"])
def test_it_mails_once_the_mail_server_is_back(servers, system, outage):
    email, before = fresh_email(), processes(system)

    with outage(servers.maildev):
        accepted = timed(lambda: register(system, email))
        wait_until(lambda: waiting_in(system.broker) == 0)

    assert accepted.status == 202 and accepted.seconds < 5
    assert activate(system, email, code_mailed_to(system, email)).status == 200
    assert processes(system) == before


# -- Power cuts ------------------------------------------------------------------------


def test_it_keeps_waiting_jobs_and_registrations_through_power_cuts(servers, system):
    system.consumer.pause()
    try:
        email = fresh_email()
        accepted = register(system, email)
        for server in servers.rabbitmq, servers.postgres:
            server.kill()
            server.start()
    finally:
        system.consumer.resume()

    assert accepted.status == 202
    assert heals(system, email, code_mailed_to(system, email))


def test_it_loses_no_job_when_a_consumer_is_killed(broker, start_consumer, smtp, job):
    first = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    addresses = [fresh_email() for _ in range(5)]
    smtp.replies["DATA", addresses[0]] = [threading.Event()]
    for address in addresses:
        put(broker, job | {"email": address})
    wait_until(lambda: smtp.held)

    first.kill()
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    wait_until(lambda: all(smtp.mails_to(address) for address in addresses))
    assert len(smtp.mails) == 5


def test_it_goes_on_when_a_worker_is_killed(start_service):
    api = start_service()
    register(api, fresh_email())

    os.kill(workers_of(api)[0], signal.SIGKILL)

    answers = [register(api, fresh_email()).status for _ in range(10)]
    assert answers == [202] * 10
    wait_until(lambda: len(workers_of(api)) == 2)


def test_it_hashes_on_when_workers_are_killed_in_a_hash(start_service):
    api = start_service()
    with ThreadPoolExecutor(16) as threads:
        requests = [threads.submit(register, api, fresh_email()) for _ in range(16)]
        wait(requests, return_when=FIRST_COMPLETED)
        for worker in workers_of(api):
            os.kill(worker, signal.SIGKILL)

    wait_until(lambda: len(workers_of(api)) == 2)

    answers = at_once(*[lambda: timed(lambda: register(api, fresh_email()))] * 4)
    assert [answer.status for answer in answers] == [202] * 4
    assert all(answer.seconds < 5 for answer in answers)


def workers_of(api):
    return start.tree(api.process.pid)[1:]


# -- SIGTERM ---------------------------------------------------------------------------


def stops(program):
    """The exit code after SIGTERM, which has to come within 10 seconds."""
    program.process.send_signal(signal.SIGTERM)
    return program.process.wait(10)


def test_it_stops_when_idle(start_service, start_consumer, broker):
    api, consumer = start_service(), start_consumer(BROKER_URL=broker)

    assert stops(api) == 0
    assert stops(consumer) == 0


def test_it_answers_the_request_under_way_before_it_stops(servers, start_service):
    api, email = start_service(), fresh_email()
    register(api, email)

    with ThreadPoolExecutor() as threads, row_locked(servers, email):
        under_way = threads.submit(register, api, email, ANOTHER)
        wait_until(lambda: statements_waiting(servers) == 1)
        api.process.send_signal(signal.SIGTERM)

    assert under_way.result().status == 202
    assert api.process.wait(10) == 0


def test_it_stops_under_load(start_service):
    api = start_service()
    with ThreadPoolExecutor(16) as threads:
        requests = [threads.submit(register, api, fresh_email()) for _ in range(64)]
        wait(requests, return_when=FIRST_COMPLETED)

        assert stops(api) == 0

    outcomes = [request.exception() or request.result().status for request in requests]
    assert all(outcome in (202, 503) or isinstance(outcome, OSError)
               for outcome in outcomes)


def test_it_stops_while_a_client_stalls(start_service):
    api = start_service()
    with socket.create_connection(("127.0.0.1", api.port)) as client:
        client.sendall(b"POST /users/register HTTP/1.1\r\nHost: localhost\r\n"
                       b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):     # no answer: it waits for the rest
            client.recv(1)

        assert stops(api) == 0


@pytest.mark.parametrize("outage", ["broker paused", "database paused"])
def test_it_stops_while_a_server_is_stuck(servers, start_service, outage):
    api = start_service()
    register(api, fresh_email())

    with OUTAGES[outage](servers), ThreadPoolExecutor() as threads:
        under_way = threads.submit(register, api, fresh_email())
        assert stops(api) == 0

    outcome = under_way.exception() or under_way.result().status
    assert outcome == 503 or isinstance(outcome, OSError)


def test_it_finishes_the_mail_under_way_and_takes_no_more(
        broker, start_consumer, smtp, job):
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    answer = threading.Event()
    smtp.replies["DATA", job["email"]] = [answer]
    put(broker, job)
    for _ in range(60):
        put(broker, job | {"email": fresh_email()})
    wait_until(lambda: smtp.held)

    consumer.process.send_signal(signal.SIGTERM)
    answer.set()

    assert consumer.process.wait(10) == 0
    assert [mail.recipients for mail in smtp.mails] == [[job["email"]]]
    wait_until(lambda: waiting_in(broker) == 60)     # 61: its ack was lost on the way


def test_it_loses_and_repeats_nothing_when_it_stops_under_load(
        broker, start_consumer, smtp, job):
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    for _ in range(100):
        put(broker, job | {"email": fresh_email()})

    wait_until(lambda: smtp.mails)
    assert stops(consumer) == 0

    wait_until(lambda: waiting_in(broker) + len(smtp.mails) == 100)
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    wait_until(lambda: len(smtp.mails) == 100)
    assert len({mail.recipients[0] for mail in smtp.mails}) == 100


@pytest.mark.parametrize("how", ["silent", "endless"])
def test_it_stops_while_the_mail_server_hangs(broker, start_consumer, smtp, job, how):
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    reply = HANG if how == "silent" else threading.Event()
    smtp.replies["DATA", job["email"]] = [reply]
    put(broker, job)
    wait_until(lambda: smtp.tries[job["email"]])

    assert stops(consumer) == 0

    wait_until(lambda: waiting_in(broker) == 1)


def test_it_stops_while_the_broker_is_stuck(servers, broker, start_consumer):
    consumer = start_consumer(BROKER_URL=broker)

    with OUTAGES["broker paused"](servers):
        assert stops(consumer) == 0


def test_it_stops_while_there_is_no_broker(settings, tmp_path):
    nowhere = settings | {"BROKER_URL": "amqp://guest:guest@127.0.0.1:1//"}
    with start.Consumer(tmp_path, nowhere) as consumer:
        wait_until(lambda: "event=outage" in consumer.log.read_text())

        assert stops(consumer) == 0
