"""From the queue to the mailbox: until when, how often, and what never arrives."""

import contextlib
import pickle
import socket
import threading
import time
from email import message_from_bytes
from itertools import pairwise

import pytest
from servers.faults import cut_connections, killed, paused
from servers.process import free_port
from servers.rabbitmq import RabbitMQ
from servers.smtp import DROP, GARBLED, LOST, SmtpServer
from servers.system import SENDER
from steps import fresh_email, register, wait_until
from steps.jobs import (
    RETRY,
    arrived,
    held_up,
    next_mail_arrives,
    outcomes,
    put,
    put_raw,
    waiting_in,
)
from steps.logs import events

# -- Until the deadline, and not after it ----------------------------------------------


def test_it_sends_nothing_after_the_deadline(mailer, job):
    expired = job | {"email": fresh_email(), "expires_at": time.time() - 1}

    message_id = put(mailer.broker, expired)

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["expired"]
    assert not mailer.smtp.tries[expired["email"]]


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
    assert waiting_in(broker) == waiting_in(broker, RETRY) == 0


def test_it_tries_a_mail_server_that_is_away_every_few_seconds_and_not_once_a_job(
        broker, start_consumer, job):
    mailer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(free_port()))

    ends = time.time() + 4
    for _ in range(20):
        put(broker, job | {"email": fresh_email(), "expires_at": ends})

    wait_until(lambda: len(events(mailer.log, event="job", outcome="expired")) == 20)
    assert 0 < len(events(mailer.log, event="job", outcome="retry")) <= 2


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


def test_it_leaves_a_job_to_rabbitmq_until_its_retry(new_mailer, job):
    new_mailer.smtp.replies["RCPT", job["email"]] = ["450 greylisted"] * 1000

    message_id = put(new_mailer.broker, job)

    wait_until(lambda: outcomes(new_mailer, message_id))
    wait_until(lambda: waiting_in(new_mailer.broker, RETRY) == 1)


def test_it_neither_loses_nor_doubles_a_job_that_is_refused_again_and_again(
        new_mailer, job):
    smtp, broker, rounds = new_mailer.smtp, new_mailer.broker, 9
    smtp.replies["RCPT", job["email"]] = ["450 greylisted"] * rounds

    message_id = put(broker, job | {"expires_at": time.time() + 600})

    wait_until(lambda: smtp.mails_to(job["email"]), 20 * rounds)
    wait_until(lambda: "sent" in outcomes(new_mailer, message_id))
    assert outcomes(new_mailer, message_id) == ["retry"] * rounds + ["sent"]
    assert smtp.tries[job["email"]] == rounds + 1
    assert waiting_in(broker) == waiting_in(broker, RETRY) == 0


@pytest.mark.parametrize("answer", [LOST, GARBLED])
def test_it_mails_to_others_before_it_repeats_a_mail_whose_answer_was_lost(
        new_mailer, job, answer):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    address, others = fresh_email(), [fresh_email() for _ in range(5)]

    with held_up(new_mailer, job):
        smtp.replies["CONTENT", address] = [answer] * 2
        message_id = put(broker, job | {"email": address})
        ids = [put(broker, job | {"email": other}) for other in others]

    wait_until(lambda: "sent" in outcomes(new_mailer, message_id))
    times = smtp.tried_at[address]
    assert outcomes(new_mailer, message_id) == ["retry", "retry", "sent"]
    assert all(after - before > 2 for before, after in pairwise(times))
    assert all(smtp.tried_at[other][0] < times[1] for other in others)
    assert [outcomes(new_mailer, each) for each in ids] == [["sent"]] * 5


# -- What can never work ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["RCPT", "DATA", "CONTENT"])
def test_it_drops_what_the_mail_server_refuses_for_good(mailer, job, verb):
    refused = fresh_email()
    mailer.smtp.replies[verb, refused] = ["550 no"]

    message_id = put(mailer.broker, job | {"email": refused})

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["refused"]
    assert mailer.smtp.tries[refused] <= 1


@pytest.mark.parametrize("verb", ["RCPT", "DATA", "CONTENT"])
def test_it_drops_what_a_mail_server_refuses_for_good_before_it_hangs_up(
        new_mailer, job, verb):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    refused, good = fresh_email(), fresh_email()

    with held_up(new_mailer, job):
        smtp.replies[verb, refused] = ["550 no, goodbye"]
        refused_id = put(broker, job | {"email": refused})
        good_id = put(broker, job | {"email": good})

    assert len(arrived(smtp, good)) == 1
    wait_until(lambda: outcomes(new_mailer, good_id)[-1:] == ["sent"])
    assert outcomes(new_mailer, refused_id) == ["refused"]


def test_it_never_sees_again_what_it_dropped(new_mailer, job):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    refused, comes_back = fresh_email(), fresh_email()
    smtp.replies["RCPT", refused] = ["550 no"]
    smtp.replies["RCPT", comes_back] = ["450 later"]

    ids = [put_raw(broker, b"{"), put(broker, job | {"email": refused})]
    put(broker, job | {"email": comes_back})

    assert arrived(smtp, comes_back)     # so would have they
    assert [outcomes(new_mailer, each) for each in ids] == [["unreadable"], ["refused"]]
    assert waiting_in(broker) == waiting_in(broker, RETRY) == 0


NO_JOBS = {
    "nothing": b"", "not JSON": b"{", "not UTF-8": b'{"email": "\xff"}',
    "null": b"null", "a list": b"[]", "a number": b"7", "a string": b'"email"',
    "no keys": b"{}", "NaN": b"NaN", "nested deeply": b"[" * 100_000}


@pytest.mark.parametrize("body", NO_JOBS.values(), ids=NO_JOBS.keys())
def test_it_drops_what_is_no_job(mailer, job, body):
    message_id = put_raw(mailer.broker, body)

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["unreadable"]


@pytest.mark.parametrize("changes", [
    {"template": "other"}, {"template": None}, {"template": ["code"]},
    {"email": 7}, {"email": ""}, {"email": {}},
    {"email": "ann@example.com\r\nBcc: eve@example.com"},
    {"email": "\ud800@example.com"}, {"email": "ann\0@example.com"},
    {"expires_at": None}, {"expires_at": "soon"},
    {"expires_at": []}, {"expires_at": {}}, {"issued_at": "now"}, {"issued_at": None}])
def test_it_drops_a_job_with_a_value_that_makes_no_mail(mailer, job, changes):
    message_id = put(mailer.broker, job | changes)

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["unreadable"]


def test_it_drops_a_job_whose_address_is_null(new_mailer, job):
    message_id = put(new_mailer.broker, job | {"email": None})

    assert next_mail_arrives(new_mailer, job)
    assert outcomes(new_mailer, message_id) == ["unreadable"]


@pytest.mark.parametrize("key", [
    "template", "email", "expires_at", "code", "issued_at"])
def test_it_drops_a_job_without_one_of_its_keys(mailer, job, key):
    message_id = put(mailer.broker, {name: job[name] for name in job if name != key})

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["unreadable"]


@pytest.mark.parametrize("properties", [
    {"application_headers": {"compression": "application/x-gzip"}},
    {"application_headers": {"compression": "unheard of"}},
    {"application_headers": {"compression": 7}},
    {"content_type": "application/x-yaml"}, {"content_type": "text/plain"}], ids=str)
def test_it_drops_a_job_in_a_form_that_nobody_wrote(mailer, job, properties):
    message_id = put(mailer.broker, job, **properties)

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["unreadable"]


@pytest.mark.parametrize("message_id", [None, "1\r\nBcc: eve@example.com"])
def test_it_drops_a_job_without_an_id_that_fits_a_header(new_mailer, job, message_id):
    put(new_mailer.broker, job, message_id=message_id)

    assert next_mail_arrives(new_mailer, job)
    assert outcomes(new_mailer, "-") == ["unreadable"]
    assert not new_mailer.smtp.tries[job["email"]]


def test_it_unpickles_nothing(mailer, job):
    message_id = put_raw(mailer.broker, pickle.dumps(job), content_encoding="binary",
                         content_type="application/x-python-serialize")

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["unreadable"]
    assert not mailer.smtp.tries[job["email"]]


# -- Once, and by whom -----------------------------------------------------------------


def test_it_mails_once_over_a_relay_that_takes_its_time(new_mailer, job):
    smtp = new_mailer.smtp
    smtp.replies["CONTENT", job["email"]] = [20] * 10    # seconds

    put(new_mailer.broker, job)

    wait_until(lambda: smtp.mails_to(job["email"]), 60)
    assert next_mail_arrives(new_mailer, job)
    assert smtp.tries[job["email"]] == 1
    assert not events(new_mailer.log, event="outage")


def test_it_mails_twice_at_most_and_with_one_message_id_when_its_ack_was_lost(
        servers, broker, new_mailer, job):
    smtp, answer = new_mailer.smtp, threading.Event()
    smtp.replies["CONTENT", job["email"]] = [answer]
    message_id = put(broker, job)
    wait_until(lambda: smtp.held)

    cut_connections(servers.rabbitmq, "spare")
    answer.set()

    assert next_mail_arrives(new_mailer, job)
    assert len(smtp.mails_to(job["email"])) <= 2
    assert {message_from_bytes(mail.content)["Message-ID"]
            for mail in smtp.mails_to(job["email"])} == {f"<{message_id}@example.com>"}
    assert waiting_in(broker) == waiting_in(broker, RETRY) == 0


@pytest.fixture(scope="module")
def own_rabbitmq(tmp_path_factory):
    """A RabbitMQ that can be killed. It wants a heartbeat every 2 seconds, not 60."""
    rabbitmq = RabbitMQ(tmp_path_factory.mktemp("own"))
    (rabbitmq.folder / "rabbitmq.conf").write_text("heartbeat = 2\n")
    with rabbitmq:
        yield rabbitmq


def test_another_one_mails_the_job_of_a_consumer_that_fell_silent(
        own_rabbitmq, start_consumer, smtp, job):
    broker, port = own_rabbitmq.url, str(smtp.port)
    silent = start_consumer(BROKER_URL=broker, SMTP_PORT=port)

    with paused(silent):
        put(broker, job)
        wait_until(lambda: not waiting_in(broker))     # the silent one has it
        start_consumer(BROKER_URL=broker, SMTP_PORT=port)

        wait_until(lambda: smtp.mails_to(job["email"]), 40)


def test_a_consumer_that_fell_silent_delays_one_mail(broker, start_consumer, smtp, job):
    silent = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    with paused(silent):
        for _ in range(10):
            put(broker, job | {"email": fresh_email()})
        start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

        wait_until(lambda: len(smtp.mails) == 9)


def test_it_mails_what_waited_for_a_retry_while_the_broker_was_killed(
        own_rabbitmq, start_consumer, smtp, job):
    mailer = start_consumer(BROKER_URL=own_rabbitmq.url, SMTP_PORT=str(smtp.port))
    smtp.replies["RCPT", job["email"]] = ["450 greylisted"] * 2
    message_id = put(own_rabbitmq.url, job)
    wait_until(lambda: outcomes(mailer, message_id) == ["retry", "retry"])
    wait_until(lambda: waiting_in(own_rabbitmq.url, RETRY) == 1)

    with killed(own_rabbitmq):
        pass

    wait_until(lambda: smtp.mails_to(job["email"]), 40)
    mailer.broker, mailer.smtp = own_rabbitmq.url, smtp
    assert next_mail_arrives(mailer, job)
    assert len(smtp.mails_to(job["email"])) == 1


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
    port = str(smtp.port)
    pair = [start_consumer(BROKER_URL=broker, SMTP_PORT=port) for _ in range(2)]
    addresses = [fresh_email() for _ in range(30)]

    for address in addresses:
        put(broker, job | {"email": address})

    assert all(len(arrived(smtp, address)) == 1 for address in addresses)
    assert len(smtp.mails) == 30
    assert all(events(each.log, event="job", outcome="sent") for each in pair)


def test_a_consumer_that_is_added_late_takes_its_share(
        broker, new_mailer, start_consumer, job):
    slow, addresses = new_mailer.smtp, [fresh_email() for _ in range(20)]
    for address in addresses:
        slow.replies["CONTENT", address] = [1]     # second
        put(broker, job | {"email": address})
    wait_until(lambda: slow.mails)

    with contextlib.closing(SmtpServer(free_port())) as quick:
        start_consumer(BROKER_URL=broker, SMTP_PORT=str(quick.port))

        wait_until(lambda: len(slow.mails) + len(quick.mails) == 20, 40)
        assert len(quick.mails) > 10
