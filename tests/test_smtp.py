"""The consumer as a client of SMTP: its sessions, its login, its TLS."""

import ssl
import time
from itertools import pairwise

import pytest
from servers.process import free_port
from servers.smtp import LOST, SmtpServer
from servers.system import SENDER
from steps import fresh_email, wait_until
from steps.jobs import arrived, held_up, outcomes, put
from steps.logs import events

# -- Sessions --------------------------------------------------------------------------


def test_it_keeps_a_session_for_mails_in_a_row_and_ends_it_while_idle(
        broker, start_consumer, smtp, job):
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    for _ in range(5):
        put(broker, job | {"email": fresh_email()})

    wait_until(lambda: len(smtp.mails) == 5)
    assert len(smtp.clients) == 1
    wait_until(lambda: not smtp.sessions)


def test_it_mails_to_others_while_some_are_greylisted(new_mailer, job):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    addresses = [fresh_email() for _ in range(40)]
    greylisted, good = addresses[::4], set(addresses) - set(addresses[::4])
    for address in greylisted:
        smtp.replies["RCPT", address] = ["450 greylisted"] * 1000

    with held_up(new_mailer, job):
        for address in addresses:
            put(broker, job | {"email": address})

    assert all(arrived(smtp, address) for address in good)
    assert all(smtp.tries[address] for address in greylisted)


def test_it_sends_nine_mails_over_one_session_and_the_tenth_over_another(
        new_mailer, job):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    addresses = [fresh_email() for _ in range(9)]

    with held_up(new_mailer, job):     # the first mail of the session
        for address in addresses:
            put(broker, job | {"email": address})

    clients = [mail.client for address in addresses for mail in arrived(smtp, address)]
    assert clients == [smtp.clients[0]] * 8 + [smtp.clients[1]]


@pytest.mark.parametrize("count, refusal", [
    (40, "550 unknown"), (20, "450 greylisted")])
def test_it_does_not_hold_up_others_when_the_mail_server_punishes_refusals(
        new_mailer, job, count, refusal):
    smtp, broker, good = new_mailer.smtp, new_mailer.broker, fresh_email()
    smtp.punishes = True

    with held_up(new_mailer, job):
        for address in [fresh_email() for _ in range(count)]:
            smtp.replies["RCPT", address] = [refusal] * 1000
            put(broker, job | {"email": address})
        message_id = put(broker, job | {"email": good})

    assert arrived(smtp, good)
    wait_until(lambda: outcomes(new_mailer, message_id) == ["sent"])


@pytest.mark.parametrize("verb, trouble", [
    ("RCPT", "421 closing"), ("DATA", "421 closing"), ("CONTENT", LOST),
    ("DATA", "550 no, goodbye")])
def test_it_does_not_hold_up_others_when_the_mail_server_hangs_up_on_some(
        new_mailer, job, verb, trouble):
    smtp, broker, good = new_mailer.smtp, new_mailer.broker, fresh_email()

    with held_up(new_mailer, job):
        for address in [fresh_email() for _ in range(9)]:
            smtp.replies[verb, address] = [trouble] * 1000
            put(broker, job | {"email": address})
        put(broker, job | {"email": good})

    assert arrived(smtp, good)


@pytest.mark.parametrize("verb, trouble", [
    ("MAIL", "421 closing"), ("RCPT", "421 closing"), ("DATA", "421 closing"),
    ("CONTENT", "421 closing"), ("MAIL", "450 later"), ("MAIL", "550 no"),
    ("RCPT", "450 later"), ("DATA", "450 later"), ("CONTENT", "450 later"),
    ("RCPT", "550 no"), ("DATA", "550 no"), ("CONTENT", "550 no")])
def test_it_begins_a_new_session_after_trouble(new_mailer, job, verb, trouble):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    troubled, good = fresh_email(), fresh_email()

    with held_up(new_mailer, job) as first:
        smtp.replies[verb, SENDER if verb == "MAIL" else troubled] = [trouble]
        put(broker, job | {"email": troubled})
        message_id = put(broker, job | {"email": good})

    [before], [after] = arrived(smtp, first), arrived(smtp, good)
    assert after.client != before.client
    wait_until(lambda: outcomes(new_mailer, message_id)[-1:] == ["sent"])


def test_it_says_the_domain_of_its_sender(broker, start_consumer, smtp, job):
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port),
                   MAIL_FROM="Ann <ann@mail.example.org>")

    message_id = put(broker, job)

    [mail] = arrived(smtp, job["email"])
    assert smtp.names == ["mail.example.org"]
    assert f"Message-ID: <{message_id}@mail.example.org>" in mail.content.decode()


# -- Login and TLS ---------------------------------------------------------------------


@pytest.fixture(params=["starttls", "tls"])
def secure_smtp(request, certificate):
    """A mail server that wants encryption, one way or the other, and a login."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    smtp = SmtpServer(free_port(), tls, implicit_tls=request.param == "tls",
                      login=("ann", "secret"))
    smtp.settings = {
        "SMTP_HOST": "localhost", "SMTP_PORT": str(smtp.port),
        "SMTP_TLS": request.param, "SMTP_USERNAME": "ann",
        "SMTP_PASSWORD": "secret", "SSL_CERT_FILE": str(certificate[0])}
    yield smtp
    smtp.close()


def test_it_encrypts_and_logs_in(broker, start_consumer, secure_smtp, job):
    start_consumer(BROKER_URL=broker, **secure_smtp.settings)

    put(broker, job)

    [mail] = arrived(secure_smtp, job["email"])
    assert mail.encrypted and mail.user == "ann"


@pytest.mark.parametrize("settings_without_trust, reason", [
    ({"SSL_CERT_FILE": "/dev/null"}, "self-signed certificate"),
    ({"SMTP_HOST": "127.0.0.1"}, "IP address mismatch")], ids=["issuer", "name"])
def test_it_mails_to_no_server_that_it_cannot_verify_and_says_why(
        broker, start_consumer, secure_smtp, job, settings_without_trust, reason):
    mailer = start_consumer(
        BROKER_URL=broker, **secure_smtp.settings | settings_without_trust)

    message_id = put(broker, job)

    wait_until(lambda: len(secure_smtp.failed_handshakes) > 1)     # it tries again
    assert not secure_smtp.mails
    [event, *_] = events(mailer.log, event="job", job=message_id)
    assert (event["outcome"], event["code"]) == ("retry", "-")
    assert reason in event["reason"]
    assert job["email"] not in mailer.log.read_text()


def test_it_tries_again_after_an_answer_that_is_no_smtp(
        broker, start_consumer, secure_smtp, job):
    secure_smtp.replies["AUTH", "ann"] = ["334 Login:"]     # it is to be Base64
    mailer = start_consumer(BROKER_URL=broker, **secure_smtp.settings)

    message_id = put(broker, job)

    assert arrived(secure_smtp, job["email"])
    wait_until(lambda: outcomes(mailer, message_id) == ["retry", "sent"])


def test_it_tries_again_after_a_failed_login(broker, start_consumer, secure_smtp, job):
    secure_smtp.login = ("ann", "changed")
    start_consumer(BROKER_URL=broker, **secure_smtp.settings)
    put(broker, job)
    wait_until(lambda: secure_smtp.failed_logins)

    secure_smtp.login = ("ann", "secret")

    assert arrived(secure_smtp, job["email"])


def test_it_tries_a_wrong_password_every_few_seconds_and_not_once_a_job(
        broker, start_consumer, secure_smtp, job):
    mailer = start_consumer(
        BROKER_URL=broker, **secure_smtp.settings | {"SMTP_PASSWORD": "wrong"})

    ends = time.time() + 7
    for _ in range(10):
        put(broker, job | {"email": fresh_email(), "expires_at": ends})

    wait_until(lambda: len(events(mailer.log, event="job", outcome="expired")) == 10)
    tries = secure_smtp.failed_logins
    assert 2 <= len(tries) <= 3
    assert all(after - before >= 3 for before, after in pairwise(tries))
