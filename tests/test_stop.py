"""Processes that begin and end: SIGTERM, and the workers and their connections.

After SIGTERM, the requests and the mail under way finish, and the process exits 0
within 10 seconds, whether the broker can be reached or not.
"""

import os
import signal
import socket
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path

import pytest
from servers.faults import (
    crowded,
    cut_connections,
    cut_sessions,
    down,
    paused,
    row_locked,
    statements_waiting,
)
from servers.program import Gunicorn
from steps import (
    activate,
    fresh_email,
    mailed_to,
    problem_in,
    register,
    registered,
    wait_until,
    workers_of,
)
from steps.jobs import put, waiting_in


def stops(program):
    """The exit code after SIGTERM, which has to come within 10 seconds."""
    program.process.send_signal(signal.SIGTERM)
    return program.process.wait(10)


# -- Stopping the API ------------------------------------------------------------------


def test_it_answers_the_request_under_way_before_it_stops_while_a_client_stalls(
        servers, start_service):
    api, email = start_service(), fresh_email()
    register(api, email)
    with (ThreadPoolExecutor() as threads,
          socket.create_connection(("127.0.0.1", api.port)) as client):
        client.sendall(b"POST /users/register HTTP/1.1\r\nHost: localhost\r\n"
                       b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):     # no answer: it waits for the rest
            client.recv(1)

        with row_locked(servers.postgres, email):
            under_way = threads.submit(register, api, email, "another fine password")
            wait_until(lambda: statements_waiting(servers.postgres) == 1)
            api.process.send_signal(signal.SIGTERM)

        assert under_way.result().status == 202
        assert api.process.wait(10) == 0


@pytest.mark.parametrize("outage", [
    nullcontext, lambda servers: paused(servers.rabbitmq),
    lambda servers: paused(servers.postgres)],
    ids=["all is well", "broker paused", "database paused"])
def test_it_stops_under_load(servers, start_service, outage):
    api = start_service()
    register(api, fresh_email())

    with outage(servers), ThreadPoolExecutor(16) as threads:
        requests = [threads.submit(register, api, fresh_email()) for _ in range(64)]
        wait(requests, timeout=0.5, return_when=FIRST_COMPLETED)

        assert stops(api) == 0

    failures = [request.exception() for request in requests if request.exception()]
    assert all(isinstance(failure, OSError) for failure in failures)     # no answer
    assert {request.result().status for request in requests
            if not request.exception()} <= {202, 503}


# -- Stopping the consumer -------------------------------------------------------------


@pytest.fixture
def busy(broker, start_consumer, smtp):
    """A consumer of ten jobs. The mail server holds the third back until .answer."""
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    consumer.answer = threading.Event()
    consumer.addresses = [fresh_email() for _ in range(10)]
    smtp.replies["CONTENT", consumer.addresses[2]] = [consumer.answer]
    for address in consumer.addresses:
        put(broker, {"template": "notice", "email": address,
                     "issued_at": time.time(), "expires_at": time.time() + 600})
    wait_until(lambda: smtp.held)
    return consumer


def recipients(smtp):
    return [address for mail in smtp.mails for address in mail.recipients]


def test_it_finishes_the_mail_under_way_takes_no_more_and_loses_and_repeats_nothing(
        broker, smtp, busy):
    busy.process.send_signal(signal.SIGTERM)
    busy.answer.set()

    assert busy.process.wait(10) == 0
    assert recipients(smtp) == busy.addresses[:3]
    wait_until(lambda: waiting_in(broker) == 7)     # 8: its ack was lost on the way
    busy.start()
    wait_until(lambda: len(smtp.mails) == 10)
    assert sorted(recipients(smtp)) == sorted(busy.addresses)
    assert stops(busy) == 0     # though it is idle


def test_it_loses_and_repeats_nothing_when_it_is_killed_because_the_mail_server_hangs(
        smtp, busy):
    busy.process.send_signal(signal.SIGTERM)
    busy.kill()

    busy.start()
    wait_until(lambda: len(smtp.mails) == 10)
    assert sorted(recipients(smtp)) == sorted(busy.addresses)


@pytest.mark.parametrize("outage", [paused, down])
def test_it_stops_while_the_broker_is_away(servers, broker, start_consumer, outage):
    consumer = start_consumer(BROKER_URL=broker)

    with outage(servers.rabbitmq):
        assert stops(consumer) == 0


# -- The API's workers, and the connections that each of them has ----------------------


@pytest.mark.parametrize("during, reason, changes", [
    (crowded, "too many connections for role", {}),
    (nullcontext, "Connection refused", {"BROKER_URL": "amqp://127.0.0.1:1//"})])
def test_two_workers_for_each_core_and_one_more_say_at_once_if_they_cannot_connect(
        servers, settings, tmp_path, during, reason, changes):
    expected = min(2 * os.cpu_count() + 1, 40)
    api = Gunicorn(tmp_path, settings | changes)
    del api.env["WEB_CONCURRENCY"]

    with during(servers.postgres):
        api.launch()     # and nobody asks it for anything
        try:
            wait_until(lambda: api.log.read_text().count(reason) >= expected)
            assert len(workers_of(api)) == expected
        finally:
            api.stop()


@pytest.fixture(scope="module")
def lone(servers, settings, service):
    """An API with one worker that takes one registration of an address."""
    with Gunicorn(servers.folder / "lone", settings | {
            "WEB_CONCURRENCY": "1", "EMAIL_LIMIT_HOUR": "1"}) as api:
        api.maildev_url = service.maildev_url
        yield api


def sockets_of(worker):
    """Its open sockets."""
    links = [os.readlink(file) for file in Path(f"/proc/{worker}/fd").iterdir()
             if file.is_symlink()]
    return {link for link in links if link.startswith("socket:")}


def test_it_goes_on_over_one_connection_to_each_server_after_errors(lone, database):
    (first, code), (second, another_code) = registered(lone), registered(lone)
    [worker] = workers_of(lone)
    before = sockets_of(worker)
    assert len(before) == 3     # gunicorn's, and one to each server
    database("""UPDATE users SET activated_at = '10000-01-01'
                 WHERE email = %s""", [second])     # a year that Python does not know

    errors = [register(lone, first), register(lone, "nobody"),
              activate(lone, fresh_email(), code), activate(lone, second, another_code)]

    assert [problem_in(error) for error in errors] == [429, 422, 403, 500]
    assert register(lone, fresh_email()).status == 202
    assert workers_of(lone) == [worker]
    wait_until(lambda: sockets_of(worker) == before)     # the caller's is closed


@pytest.mark.parametrize("name, cut", [
    ("postgres", cut_sessions), ("rabbitmq", cut_connections)])
def test_it_opens_only_the_connection_anew_that_was_cut_and_no_caller_notices(
        servers, lone, name, cut):
    (email, code), [worker] = registered(lone), workers_of(lone)
    before = sockets_of(worker)
    cut(getattr(servers, name))

    answers = [activate(lone, email, code).status,
               register(lone, fresh_email()).status]

    assert answers == [200, 202]
    wait_until(lambda: len(sockets_of(worker) - before) == 1)
    assert mailed_to(lone, email, 2)["subject"] == "Your account is active"
