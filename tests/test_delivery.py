"""From the queue to the mailbox: until when, how often, and what never arrives."""

import json
import pickle
import socket
import ssl
import threading
import time
from email import message_from_bytes
from itertools import pairwise

import pytest
from servers.faults import cut_connections, killed, paused
from servers.process import free_port
from servers.program import Consumer
from servers.smtp import DROP, SmtpServer
from servers.system import SENDER
from steps import (
    accepted,
    activate,
    fresh_email,
    problem_in,
    register,
    wait_until,
    wait_until_at_rest,
)
from steps.jobs import (
    MAIL,
    RETRY,
    arrived,
    held_up,
    next_mail_arrives,
    outcomes,
    put,
    take_job,
    waiting_in,
)
from steps.logs import events


def gaps(times):
    return [after - before for before, after in pairwise(times)]


# -- What the API puts into the queue --------------------------------------------------


def test_it_gives_notices_and_confirmations_fifteen_minutes(queue):
    address = fresh_email()
    accepted(queue, address)
    code = take_job(queue.broker)["code"]
    wait_until_at_rest(queue)     # or the confirmation may have no time to connect

    activate(queue, address, code)
    accepted(queue, address)

    for job in take_job(queue.broker), take_job(queue.broker):
        assert job["expires_at"] - job["issued_at"] == pytest.approx(900)
        assert job["issued_at"] == pytest.approx(time.time(), abs=60)


def test_it_declares_durable_quorum_queues_and_bounds_the_first(servers, mailer):
    rows = json.loads(servers.rabbitmq.ctl(
        "list_queues", "-p", "mailer", "--formatter", "json",
        "name", "type", "durable", "arguments"))

    assert {(row["name"], row["type"], row["durable"]) for row in rows} == {
        (MAIL, "quorum", True), (RETRY, "quorum", True)}
    [limits] = [[value for key, _, value in row["arguments"] if key == "x-max-length"]
                for row in rows if row["name"] == MAIL]
    assert limits == [100_000]


# -- Until the deadline, and not after it ----------------------------------------------


def test_it_sends_nothing_after_the_deadline_not_even_if_a_session_takes_that_long(
        mailer, job):
    expired, late = [
        job | {"email": fresh_email(), "expires_at": time.time() + seconds}
        for seconds in (-1, 3)]
    wait_until(lambda: not mailer.smtp.sessions)     # so that it opens another
    mailer.smtp.replies["EHLO", "example.com"] = [ready := threading.Event()]

    ids = [put(mailer.broker, each) for each in (expired, late)]
    wait_until(lambda: mailer.smtp.sessions)
    wait_until(lambda: time.time() > late["expires_at"])
    ready.set()

    assert next_mail_arrives(mailer, job)
    assert [outcomes(mailer, each) for each in ids] == [["expired"], ["expired"]]
    assert not any(mailer.smtp.tries[each["email"]] for each in (expired, late))


# -- Trouble that may pass -------------------------------------------------------------

# The mail server's replies. Those to MAIL are for whatever job comes next.
TROUBLE = [
    ("MAIL", ["451 try again", "250 fine"]), ("MAIL", ["421 closing", "250 fine"]),
    ("MAIL", ["550 not this sender", "250 fine"]),
    ("RCPT", ["450 greylisted"]), ("RCPT", ["421 closing"]), ("RCPT", [DROP]),
    ("DATA", ["451 try again"]), ("DATA", ["421 closing"]), ("DATA", [DROP]),
    ("CONTENT", ["452 disk full"]), ("CONTENT", ["421 closing"]), ("CONTENT", [DROP]),
    ("CONTENT", ["no SMTP"])]


def test_it_tries_again_after_trouble_that_may_pass_behind_others_in_a_new_session(
        mailer, job):
    smtp, ids = mailer.smtp, {}
    addresses = [(fresh_email(), fresh_email()) for _ in TROUBLE]

    with held_up(mailer, job) as first:
        for (verb, replies), (troubled, good) in zip(TROUBLE, addresses):
            whom = SENDER if verb == "MAIL" else troubled
            smtp.replies.setdefault((verb, whom), []).extend(replies)
            ids[verb, replies[0]] = put(mailer.broker, job | {"email": troubled})
            put(mailer.broker, job | {"email": good})

    clients = [arrived(smtp, address)[0].client
               for address in [first, *[good for _, good in addresses]]]
    assert len(set(clients)) == len(clients)
    wait_until(lambda: all("sent" in outcomes(mailer, each) for each in ids.values()))
    assert [trouble for trouble, each in ids.items()
            if outcomes(mailer, each) != ["retry", "sent"]] == []
    tries = [smtp.tries[troubled] for troubled, _ in addresses]
    assert all(gap > 2 for times in tries for gap in gaps(times))
    last_of_others = max(smtp.tries[good][0] for _, good in addresses)
    assert all(again > last_of_others for _, *more in tries for again in more)


def test_it_neither_loses_nor_doubles_a_job_however_often_it_comes_back(mailer, job):
    smtp, broker = mailer.smtp, mailer.broker
    often, late, refused = [job | {"email": fresh_email()} for _ in range(3)]
    smtp.replies["RCPT", often["email"]] = ["450 greylisted"] * 2
    smtp.replies["RCPT", late["email"]] = ["450 greylisted"] * 9
    smtp.replies["RCPT", refused["email"]] = ["550 no"]

    ids = [put(broker, often), put(broker, late | {"expires_at": time.time() + 3}),
           put(broker, refused), put(broker, b"{")]
    wait_until(lambda: waiting_in(broker, RETRY))     # there, and not in our hands

    wait_until(lambda: outcomes(mailer, ids[0])[2:])
    assert [outcomes(mailer, each) for each in ids] == [
        ["retry", "retry", "sent"], ["retry", "expired"], ["refused"], ["unreadable"]]
    assert all(gap > 2 for gap in gaps(smtp.tries[often["email"]]))
    wait_until(lambda: waiting_in(broker) == waiting_in(broker, RETRY) == 0)
    assert len(smtp.mails_to(often["email"])) == 1


def test_it_does_not_hold_up_others_for_many_that_are_refused(mailer, job):
    """The mail server answers slowly in a session that has ten errors in a row."""
    with held_up(mailer, job):
        for address in [fresh_email() for _ in range(40)]:
            mailer.smtp.replies["RCPT", address] = ["550 unknown"]
            put(mailer.broker, job | {"email": address})

    assert next_mail_arrives(mailer, job)


def test_it_waits_ten_seconds_for_a_greeting_and_longer_for_an_answer(
        mailer, broker, start_consumer, job):
    mailer.smtp.replies["CONTENT", job["email"]] = [11]     # seconds
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        other = start_consumer(BROKER_URL=broker, SMTP_PORT=str(port))

        slow_id, silent_id = put(mailer.broker, job), put(broker, job)

        wait_until(lambda: outcomes(other, silent_id) == ["retry"], 40)
    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, slow_id) == ["sent"]
    assert len(mailer.smtp.tries[job["email"]]) == 1


# -- What can never work ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["RCPT", "DATA", "CONTENT"])
def test_it_drops_what_the_mail_server_refuses_for_good(mailer, job, verb):
    mailer.smtp.replies[verb, job["email"]] = ["550 no"]

    message_id = put(mailer.broker, job)

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, message_id) == ["refused"]


NO_JOBS = [b"", b"{", b'{"email": "\xff"}', b"null", b"[]", b"[" * 100_000]
NO_ADDRESSES = [None, 7, "", "ann@example.com, bob@example.com", "ann\0@example.com",
                "ann@example.com\r\nBcc: eve@example.com", "\ud800@example.com"]
FORMS = [{"application_headers": {"compression": "application/x-gzip"}},
         {"application_headers": {"compression": "unheard of"}},
         {"content_type": "text/plain"}]     # nobody wrote a job like that


def test_it_drops_what_is_no_job_or_makes_no_mail_and_unpickles_nothing(mailer, job):
    incomplete = [{name: job[name] for name in job if name != key} for key in job]
    changes = [{"template": "other"}, {"template": ["code"]}, {"issued_at": "now"},
               {"expires_at": "soon"}, *[{"email": each} for each in NO_ADDRESSES]]
    changed = [job | change for change in changes]

    ids = [*[put(mailer.broker, each) for each in [*NO_JOBS, *incomplete, *changed]],
           *[put(mailer.broker, job, **form) for form in FORMS],
           put(mailer.broker, pickle.dumps(job), content_encoding="binary",
               content_type="application/x-python-serialize")]

    assert next_mail_arrives(mailer, job)
    assert [outcomes(mailer, each) for each in ids] == [["unreadable"]] * len(ids)
    assert not mailer.smtp.tries[job["email"]]


def test_it_drops_a_job_whose_id_fits_no_header_and_logs_no_line_that_it_forges(
        mailer, job):
    for message_id in None, "1\r\nBcc: eve@example.com\r\nevent=job job=2 outcome=sent":
        put(mailer.broker, job, message_id=message_id)

    assert next_mail_arrives(mailer, job)
    assert outcomes(mailer, "-") == ["unreadable", "unreadable"]
    assert not events(mailer.log, event="job", job="2")
    assert not mailer.smtp.tries[job["email"]]


# -- Crashes, and by whom --------------------------------------------------------------


def test_it_mails_twice_at_most_and_with_one_message_id_when_its_ack_was_lost(
        servers, mailer, job):
    smtp, broker, answer = mailer.smtp, mailer.broker, threading.Event()
    smtp.replies["CONTENT", job["email"]] = replies = [answer]
    message_id = put(broker, job)
    wait_until(lambda: not replies)     # the mail server has the mail

    cut_connections(servers.rabbitmq, "mailer")
    answer.set()

    assert next_mail_arrives(mailer, job)
    mails = smtp.mails_to(job["email"])
    assert len(mails) <= 2
    assert {message_from_bytes(mail.content)["Message-ID"] for mail in mails} == {
        f"<{message_id}@example.com>"}
    wait_until(lambda: waiting_in(broker) == waiting_in(broker, RETRY) == 0)


def test_a_consumer_that_is_added_late_takes_all_but_the_one_job_in_the_firsts_hands(
        mailer, start_consumer, smtp, job):
    addresses = [fresh_email() for _ in range(5)]

    with held_up(mailer, job) as first:
        for address in addresses:
            put(mailer.broker, job | {"email": address})
        start_consumer(BROKER_URL=mailer.broker, SMTP_PORT=str(smtp.port))

        assert all(len(arrived(smtp, address)) == 1 for address in addresses)

    assert len(arrived(mailer.smtp, first)) == 1


def test_another_one_mails_the_job_of_a_consumer_that_fell_silent(
        servers, broker, start_consumer, smtp, job):
    def start(heartbeat):     # seconds; by default, RabbitMQ asks for one in 60
        servers.rabbitmq.ctl(
            "eval", f"application:set_env(rabbit, heartbeat, {heartbeat}).")
        return start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    with paused(start(heartbeat=2)):
        put(broker, job)
        wait_until(lambda: not waiting_in(broker))     # the silent one has it
        start(heartbeat=60)

        wait_until(lambda: smtp.mails_to(job["email"]), 40)


def test_it_mails_what_waited_for_a_retry_while_the_broker_was_killed(
        servers, mailer, job):
    smtp, broker = mailer.smtp, mailer.broker
    smtp.replies["RCPT", job["email"]] = ["450 greylisted"] * 2
    message_id = put(broker, job)
    wait_until(lambda: outcomes(mailer, message_id) == ["retry", "retry"])
    wait_until(lambda: waiting_in(broker, RETRY) == 1)

    with killed(servers.rabbitmq):
        pass

    wait_until(lambda: smtp.mails_to(job["email"]), 40)
    assert next_mail_arrives(mailer, job)
    assert len(smtp.mails_to(job["email"])) == 1


# -- Sessions --------------------------------------------------------------------------


def test_it_sends_nine_mails_over_one_session_and_ends_one_that_is_idle(mailer, job):
    smtp, addresses = mailer.smtp, [fresh_email() for _ in range(9)]
    wait_until(lambda: not smtp.sessions)     # so that it opens another

    with held_up(mailer, job) as first:
        for address in addresses:
            put(mailer.broker, job | {"email": address})

    *nine, tenth = [mail.client for address in [first, *addresses]
                    for mail in arrived(smtp, address)]
    assert len(nine) == 9 and set(nine) == {nine[0]} != {tenth}
    wait_until(lambda: not smtp.sessions)


# -- Login and TLS at the mail server --------------------------------------------------


@pytest.fixture
def secure_smtp(certificate):
    """A mail server that wants a login and encryption, and a consumer's settings."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    with SmtpServer(free_port(), tls, login=("ann", "secret")) as smtp:
        smtp.settings = {
            "SMTP_HOST": "localhost", "SMTP_PORT": str(smtp.port),
            "SMTP_TLS": "starttls", "SMTP_USERNAME": "ann",
            "SMTP_PASSWORD": "secret", "SSL_CERT_FILE": str(certificate[0])}
        yield smtp


@pytest.mark.parametrize("mode", ["starttls", "tls"])
def test_it_encrypts_and_logs_in(broker, start_consumer, secure_smtp, job, mode):
    secure_smtp.implicit_tls = mode == "tls"
    start_consumer(BROKER_URL=broker, **secure_smtp.settings | {"SMTP_TLS": mode})

    put(broker, job)

    [mail] = arrived(secure_smtp, job["email"])
    assert mail.encrypted and mail.user == "ann"


@pytest.mark.parametrize("mode, settings_without_trust, reason", [
    ("starttls", {"SSL_CERT_FILE": "/dev/null"}, "self-signed certificate"),
    ("tls", {"SMTP_HOST": "127.0.0.1"}, "IP address mismatch")], ids=["issuer", "name"])
def test_it_mails_to_no_server_that_it_cannot_verify_and_says_why(
        broker, start_consumer, secure_smtp, job, mode, settings_without_trust, reason):
    secure_smtp.implicit_tls = mode == "tls"
    mailer = start_consumer(BROKER_URL=broker, **secure_smtp.settings | {
        "SMTP_TLS": mode} | settings_without_trust)

    message_id = put(broker, job)

    [event] = wait_until(lambda: events(mailer.log, event="job", job=message_id))
    assert (event["outcome"], event["code"]) == ("retry", "-")
    assert reason in event["reason"]
    assert secure_smtp.failed_handshakes and not secure_smtp.mails
    assert job["email"] not in mailer.log.read_text()


def test_it_tries_every_few_seconds_and_not_once_a_job_while_it_cannot_log_in(
        broker, start_consumer, secure_smtp, job):
    secure_smtp.replies["AUTH", "ann"] = ["334 Login:"]     # it is to be Base64
    secure_smtp.login = ("ann", "changed")
    mailer = start_consumer(BROKER_URL=broker, **secure_smtp.settings)

    for address in [job["email"], *[fresh_email() for _ in range(4)]]:
        put(broker, job | {"email": address})
    wait_until(lambda: len(secure_smtp.logins) >= 3)
    secure_smtp.login = ("ann", "secret")

    assert arrived(secure_smtp, job["email"])
    assert all(gap >= 3 for gap in gaps(secure_smtp.logins[:3]))
    assert not events(mailer.log, event="outage")


# -- TLS at the broker -----------------------------------------------------------------


@pytest.fixture
def over_tls(servers, broker, certificate):
    """The settings of a process that uses the broker over TLS, at one of its hosts."""
    url = f"amqps://guest:guest@{{}}:{servers.rabbitmq.tls_port}/spare"
    return lambda host: {
        "BROKER_URL": url.format(host), "SSL_CERT_FILE": str(certificate[0])}


def test_it_mails_over_a_broker_that_it_can_verify(
        over_tls, start_service, start_consumer, smtp):
    verified, email = over_tls("127.0.0.2"), fresh_email()
    api = start_service(**verified, WEB_CONCURRENCY="1")
    start_consumer(**verified, SMTP_PORT=str(smtp.port))

    assert accepted(api, email).status == 202
    assert arrived(smtp, email)


@pytest.mark.parametrize("host, changes, reason", [
    ("127.0.0.1", {}, "IP address mismatch"),
    ("127.0.0.2", {"SSL_CERT_FILE": "/dev/null"}, "self-signed certificate")],
    ids=["name", "issuer"])
def test_it_talks_to_no_broker_that_it_cannot_verify_and_says_why(
        settings, over_tls, start_service, tmp_path, host, changes, reason):
    unverified = over_tls(host) | changes
    api = start_service(**unverified, WEB_CONCURRENCY="1")
    with Consumer(tmp_path, settings | unverified) as consumer:

        answer = register(api, fresh_email())

        assert problem_in(answer) == 503
        wait_until(lambda: events(consumer.log, event="outage"))
    assert not events(consumer.log, event="consuming")
    for log in api.log, consumer.log:
        assert reason in events(log, event="outage")[0]["reason"]
        assert "guest" not in log.read_text()


# -- Several hosts ---------------------------------------------------------------------


def test_it_uses_another_host_where_the_first_is_away(
        settings, broker, start_service, start_consumer, smtp):
    several = {"BROKER_URL": f"amqp://guest:guest@127.0.0.1:1//;{broker}"}
    api = start_service(**several, DATABASE_URL=settings["DATABASE_URL"].replace(
        "@", "@127.0.0.1:1,") + "?target_session_attrs=read-write")
    start_consumer(**several, SMTP_PORT=str(smtp.port))

    accepted(api, email := fresh_email())

    assert arrived(smtp, email)
