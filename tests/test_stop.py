"""SIGTERM: the requests and the mail under way finish, and the process exits 0.

Within 10 seconds, whether the broker can be reached or not.
"""

import signal
import socket
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import pytest
from servers.faults import paused, row_locked, statements_waiting
from servers.program import Consumer
from servers.smtp import HANG
from steps import fresh_email, register, wait_until
from steps.jobs import put, waiting_in
from steps.logs import events


def stops(program):
    """The exit code after SIGTERM, which has to come within 10 seconds."""
    program.process.send_signal(signal.SIGTERM)
    return program.process.wait(10)


def test_it_stops_when_idle(start_service, start_consumer, broker):
    api, consumer = start_service(), start_consumer(BROKER_URL=broker)

    assert stops(api) == 0
    assert stops(consumer) == 0


# -- The API ---------------------------------------------------------------------------


def test_it_answers_the_request_under_way_before_it_stops(servers, start_service):
    api, email = start_service(), fresh_email()
    register(api, email)

    with ThreadPoolExecutor() as threads, row_locked(servers.postgres, email):
        under_way = threads.submit(register, api, email, "another fine password")
        wait_until(lambda: statements_waiting(servers.postgres) == 1)
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


@pytest.mark.parametrize("server", ["rabbitmq", "postgres"])
def test_it_stops_while_a_server_is_paused(servers, start_service, server):
    api = start_service()
    register(api, fresh_email())

    with paused(getattr(servers, server)), ThreadPoolExecutor() as threads:
        under_way = threads.submit(register, api, fresh_email())
        assert stops(api) == 0

    outcome = under_way.exception() or under_way.result().status
    assert outcome == 503 or isinstance(outcome, OSError)


# -- The consumer ----------------------------------------------------------------------


def test_it_finishes_the_mail_under_way_and_takes_no_more(
        broker, start_consumer, smtp, job):
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    answer = threading.Event()
    smtp.replies["CONTENT", job["email"]] = [answer]
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


def test_it_loses_nothing_when_it_is_killed_because_the_mail_server_hangs(
        broker, start_consumer, smtp, job):
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    smtp.replies["CONTENT", job["email"]] = [HANG]
    put(broker, job)
    wait_until(lambda: smtp.tries[job["email"]])

    consumer.process.send_signal(signal.SIGTERM)
    consumer.kill()

    wait_until(lambda: waiting_in(broker) == 1)
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    wait_until(lambda: len(smtp.mails_to(job["email"])) == 1)


def test_it_stops_while_the_broker_is_paused(servers, broker, start_consumer):
    consumer = start_consumer(BROKER_URL=broker)

    with paused(servers.rabbitmq):
        assert stops(consumer) == 0


def test_it_stops_while_there_is_no_broker(settings, tmp_path):
    nowhere = settings | {"BROKER_URL": "amqp://guest:guest@127.0.0.1:1//"}
    with Consumer(tmp_path, nowhere) as consumer:
        wait_until(lambda: events(consumer.log, event="outage"))

        assert stops(consumer) == 0
