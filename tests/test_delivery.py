"""From the queue to the mailbox: until when, how often, and what never arrives."""

import contextlib
import pickle
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers.faults import cut_connections, paused
from servers.process import free_port
from servers.rabbitmq import RabbitMQ
from servers.smtp import DROP, SmtpServer
from servers.system import SENDER
from steps import fresh_email, register, wait_until
from steps.jobs import (
    DEAD,
    arrived,
    held_up,
    next_mail_arrives,
    outcomes,
    put,
    put_raw,
    take,
    waiting_in,
)
from steps.logs import events

# -- Until the deadline, and not after it ----------------------------------------------


def test_it_sends_nothing_after_the_deadline(mailer, job):
    expired = job | {"email": fresh_email(), "expires_at": time.time() - 1}

    put(mailer.broker, expired)

    assert next_mail_arrives(mailer, job)
    assert not mailer.smtp.tries[expired["email"]]
    assert not waiting_in(mailer.broker, DEAD)


def test_it_sends_nothing_that_expired_while_no_consumer_ran(
        broker, start_service, start_consumer, smtp, job):
    api = start_service(BROKER_URL=broker, CODE_LIFETIME="1")
    late = fresh_email()
    register(api, late)
    expired = time.time() + 1.1
    wait_until(lambda: time.time() > expired)

    mailer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    mailer.broker, mailer.smtp = broker, smtp
    assert next_mail_arrives(mailer, job)
    assert not smtp.tries[late]


@pytest.mark.parametrize("what", ["greeting", "EHLO"])
def test_it_sends_nothing_if_the_deadline_passed_until_the_mail_server_was_ready(
        broker, start_consumer, smtp, job, what):
    smtp.pauses[what] = ready = threading.Event()
    mailer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    late, expires_at = fresh_email(), time.time() + 5

    late_id = put(broker, job | {"email": late, "expires_at": expires_at})
    wait_until(lambda: smtp.clients)
    wait_until(lambda: time.time() > expires_at)
    ready.set()

    mailer.broker, mailer.smtp = broker, smtp
    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, late_id) == ["expired"]
    assert not smtp.tries[late]


@pytest.mark.parametrize("verb, trouble", [
    ("MAIL", "451 try again"), ("MAIL", "550 not this sender"), ("MAIL", "421 closing"),
    ("RCPT", "450 greylisted"), ("RCPT", "421 closing"), ("RCPT", DROP),
    ("DATA", "451 try again"), ("DATA", DROP),
    ("CONTENT", "452 disk full"), ("CONTENT", DROP)])
def test_it_tries_again_after_trouble_that_may_pass(mailer, job, verb, trouble):
    whom = SENDER if verb == "MAIL" else job["email"]
    mailer.smtp.replies[verb, whom] = [trouble]

    message_id = put(mailer.broker, job)

    assert len(arrived(mailer.smtp, job["email"])) == 1
    assert not mailer.smtp.replies[verb, whom]
    assert not waiting_in(mailer.broker, DEAD)
    wait_until(lambda: outcomes(mailer, message_id) == ["retry", "sent"])


@pytest.mark.parametrize("greeting", ["421 too busy", "554 not today"])
def test_it_tries_again_after_a_greeting_that_refuses_everybody(
        broker, start_consumer, smtp, job, greeting):
    smtp.greetings = [greeting]

    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    put(broker, job)

    assert len(arrived(smtp, job["email"])) == 1


@pytest.mark.parametrize("trouble", ["450 greylisted", DROP])
def test_it_gives_up_at_the_deadline(broker, start_consumer, smtp, job, trouble):
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    smtp.replies["RCPT", job["email"]] = [trouble] * 1000

    message_id = put(broker, job | {"expires_at": time.time() + 7})    # two retries

    wait_until(lambda: "expired" in outcomes(consumer, message_id))
    assert smtp.tries[job["email"]] > 1
    consumer.stop()     # what it had not settled would go back to the queue
    assert waiting_in(broker) == waiting_in(broker, DEAD) == 0


def test_it_tries_a_mail_server_that_is_away_once_a_second_and_not_once_a_job(
        broker, start_consumer, job):
    mailer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(free_port()))

    ends = time.time() + 4
    for _ in range(20):
        put(broker, job | {"email": fresh_email(), "expires_at": ends})

    wait_until(lambda: len(events(mailer.log, event="job", outcome="expired")) == 20)
    assert 0 < len(events(mailer.log, event="job", outcome="retry")) < 20


def test_it_gives_up_when_the_mail_server_stays_away_for_the_lifetime(
        broker, start_service, start_consumer, job):
    port = free_port()
    api = start_service(BROKER_URL=broker, CODE_LIFETIME="2")
    mailer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(port))
    late = fresh_email()
    register(api, late)
    expired = time.time() + 2.1
    wait_until(lambda: time.time() > expired)

    with contextlib.closing(SmtpServer(port)) as mailer.smtp:

        mailer.broker = broker
        assert next_mail_arrives(mailer, job)
        assert not mailer.smtp.tries[late]


def test_it_does_not_hold_up_others_for_many_that_are_greylisted(mailer, job):
    addresses = [fresh_email() for _ in range(100)]
    for address in addresses:
        mailer.smtp.replies["RCPT", address] = ["450 greylisted"] * 1000
        put(mailer.broker, job | {"email": address})
    wait_until(lambda: all(mailer.smtp.tries[address] for address in addresses))

    assert next_mail_arrives(mailer, job)
    assert not any(mailer.smtp.mails_to(address) for address in addresses)
    for address in addresses:
        mailer.smtp.replies["RCPT", address].clear()
    assert all(arrived(mailer.smtp, address) for address in addresses)


def test_it_tries_a_refused_mail_again_every_few_seconds(mailer, job):
    mailer.smtp.replies["RCPT", job["email"]] = ["450 greylisted"] * 3

    put(mailer.broker, job)

    assert arrived(mailer.smtp, job["email"])
    times = mailer.smtp.tried_at[job["email"]]
    assert all(after - before > 2 for before, after in pairwise(times))


# -- What can never work ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["RCPT", "DATA", "CONTENT"])
def test_it_dead_letters_what_the_mail_server_refuses_for_good(mailer, job, verb):
    mailer.smtp.replies[verb, job["email"]] = ["550 no"]

    message_id = put(mailer.broker, job)

    assert take(mailer.broker, DEAD).properties["message_id"] == message_id
    assert next_mail_arrives(mailer, job)
    assert mailer.smtp.tries[job["email"]] <= 1


@pytest.mark.parametrize("verb", ["RCPT", "DATA", "CONTENT"])
def test_it_dead_letters_what_a_mail_server_refuses_for_good_before_it_hangs_up(
        new_mailer, job, verb):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    refused, good = fresh_email(), fresh_email()

    with held_up(new_mailer, job):
        smtp.replies[verb, refused] = ["550 no, goodbye"]
        refused_id = put(broker, job | {"email": refused})
        good_id = put(broker, job | {"email": good})

    assert arrived(smtp, good)
    wait_until(lambda: outcomes(new_mailer, good_id) == ["sent"])
    assert outcomes(new_mailer, refused_id) == ["refused"]


NO_JOBS = {
    "nothing": b"", "not JSON": b"{", "not UTF-8": b'{"email": "\xff"}',
    "null": b"null", "a list": b"[]", "a number": b"7", "a string": b'"email"',
    "no keys": b"{}", "NaN": b"NaN", "nested deeply": b"[" * 100_000}


@pytest.mark.parametrize("body", NO_JOBS.values(), ids=NO_JOBS.keys())
def test_it_dead_letters_what_is_no_job(mailer, job, body):
    message_id = put_raw(mailer.broker, body)

    assert take(mailer.broker, DEAD).properties["message_id"] == message_id
    assert next_mail_arrives(mailer, job)


@pytest.mark.parametrize("changes", [
    {"template": "other"}, {"template": None}, {"template": ["code"]},
    {"email": None}, {"email": 7}, {"email": ""}, {"email": {}},
    {"email": "ann@example.com\r\nBcc: eve@example.com"},
    {"email": "\ud800@example.com"}, {"email": "ann\0@example.com"},
    {"expires_at": None}, {"expires_at": "soon"},
    {"expires_at": []}, {"expires_at": {}}, {"issued_at": "now"}, {"issued_at": None}])
def test_it_dead_letters_a_job_with_a_value_that_makes_no_mail(mailer, job, changes):
    message_id = put(mailer.broker, job | changes)

    assert take(mailer.broker, DEAD).properties["message_id"] == message_id
    assert next_mail_arrives(mailer, job)


@pytest.mark.parametrize("key", [
    "template", "email", "expires_at", "code", "issued_at"])
def test_it_dead_letters_a_job_without_one_of_its_keys(mailer, job, key):
    message_id = put(mailer.broker, {name: job[name] for name in job if name != key})

    assert take(mailer.broker, DEAD).properties["message_id"] == message_id
    assert next_mail_arrives(mailer, job)


@pytest.mark.parametrize("properties", [
    {"application_headers": {"compression": "application/x-gzip"}},
    {"application_headers": {"compression": "unheard of"}},
    {"application_headers": {"compression": 7}},
    {"content_type": "application/x-yaml"}, {"content_type": "text/plain"},
    {"message_id": "1\r\nBcc: eve@example.com"}], ids=str)
def test_it_dead_letters_a_job_in_a_form_that_nobody_wrote(mailer, job, properties):
    message_id = put(mailer.broker, job, **properties)

    assert take(mailer.broker, DEAD).properties["message_id"] == message_id
    assert next_mail_arrives(mailer, job)


def test_it_dead_letters_a_job_without_an_id(mailer, job):
    put(mailer.broker, job, message_id=None)

    assert "message_id" not in take(mailer.broker, DEAD).properties
    assert next_mail_arrives(mailer, job)


def test_it_unpickles_nothing(mailer, job):
    message_id = put_raw(mailer.broker, pickle.dumps(job), content_encoding="binary",
                         content_type="application/x-python-serialize")

    assert take(mailer.broker, DEAD).properties["message_id"] == message_id
    assert not mailer.smtp.tries[job["email"]]


# -- Once, and by whom -----------------------------------------------------------------


def test_it_mails_once_over_a_relay_that_takes_its_time(new_mailer, job):
    smtp = new_mailer.smtp
    smtp.replies["CONTENT", job["email"]] = [20] * 10    # s; RabbitMQ waits for 15

    put(new_mailer.broker, job)

    wait_until(lambda: smtp.mails_to(job["email"]), 60)
    assert next_mail_arrives(new_mailer, job)
    assert smtp.tries[job["email"]] == 1
    assert not events(new_mailer.log, event="outage")


def test_it_does_not_mail_twice_when_its_ack_was_lost(
        servers, broker, start_consumer, smtp, job):
    mailer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    answer = threading.Event()
    smtp.replies["CONTENT", job["email"]] = [answer]
    put(broker, job)
    wait_until(lambda: smtp.held)

    cut_connections(servers.rabbitmq, "spare")
    answer.set()

    mailer.broker, mailer.smtp = broker, smtp
    assert next_mail_arrives(mailer, job)
    assert smtp.tries[job["email"]] == 1
    assert not waiting_in(broker)


@pytest.mark.parametrize("verb, trouble", [
    ("RCPT", ["450 greylisted"] * 4), ("CONTENT", [15])])     # retries after 3 s; 15 s
def test_it_mails_once_what_it_holds_for_longer_than_rabbitmq_lets_it(
        impatient, start_consumer, smtp, job, verb, trouble):
    mailer = start_consumer(BROKER_URL=impatient.url, SMTP_PORT=str(smtp.port))
    mailer.broker, mailer.smtp = impatient.url, smtp
    smtp.replies[verb, job["email"]] = trouble

    put(impatient.url, job)

    wait_until(lambda: events(mailer.log, event="outage", server="broker"), 40)
    assert len(arrived(smtp, job["email"])) == 1
    assert next_mail_arrives(mailer, job)
    assert len(smtp.mails_to(job["email"])) == 1
    assert not waiting_in(impatient.url)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """A RabbitMQ that lets a consumer hold a job for 5 seconds, and not 30 minutes."""
    rabbitmq = RabbitMQ(tmp_path_factory.mktemp("impatient"))
    (rabbitmq.folder / "advanced.config").write_text(     # milliseconds
        "[{rabbit, [{consumer_timeout, 5000}, {channel_tick_interval, 1000}]}].")
    with rabbitmq:
        yield rabbitmq


def test_another_one_mails_the_jobs_of_a_consumer_that_fell_silent(
        broker, start_consumer, smtp, job):
    silent = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    with paused(silent):
        put(broker, job)
        wait_until(lambda: not waiting_in(broker))     # the silent one has it
        start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

        wait_until(lambda: smtp.mails_to(job["email"]), 40)


def test_its_kernel_asks_every_second_whether_the_other_machines_are_there(
        broker, new_mailer, job):
    smtp = new_mailer.smtp
    smtp.replies["CONTENT", job["email"]] = [threading.Event()]
    put(broker, job)
    wait_until(lambda: smtp.held)

    for port in urlsplit(broker).port, smtp.port:
        wait_until(lambda port=port: asks_within_a_second(new_mailer, port))


def asks_within_a_second(consumer, port):
    """Whether the kernel's keepalive timer of its connection to a port ends by then."""
    process = Path(f"/proc/{consumer.process.pid}")
    sockets = {file.readlink().name for file in (process / "fd").iterdir()}
    [line] = [line for line in map(str.split, (process / "net/tcp").open())
              if line[2].endswith(f":{port:04X}") and f"socket:[{line[9]}]" in sockets]
    timer, centiseconds = line[5].split(":")
    return timer == "02" and int(centiseconds, 16) <= 100     # 02: keepalive


def test_it_tries_again_when_a_connection_to_the_mail_server_is_not_accepted(
        broker, start_consumer, job):
    with contextlib.ExitStack() as sockets:
        deaf = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):      # of a full queue, the kernel drops what else comes
            queued = sockets.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(deaf.getsockname())
        mailer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(deaf.getsockname()[1]))

        message_id = put(broker, job)

        wait_until(lambda: outcomes(mailer, message_id) == ["retry"], 40)


def test_it_leaves_a_job_in_the_queue_until_the_mail_server_has_taken_the_mail(
        broker, start_consumer, smtp, job):
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    smtp.replies["CONTENT", job["email"]] = [threading.Event()]
    put(broker, job)
    wait_until(lambda: smtp.held)

    consumer.kill()

    wait_until(lambda: waiting_in(broker) == 1)


def test_it_shares_the_work_among_consumers(broker, start_consumer, smtp, job):
    for _ in range(2):
        start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    addresses = [fresh_email() for _ in range(30)]

    for address in addresses:
        put(broker, job | {"email": address})

    assert all(len(arrived(smtp, address)) == 1 for address in addresses)
    assert len({mail.client for mail in smtp.mails}) >= 2
    assert len(smtp.mails) == 30
