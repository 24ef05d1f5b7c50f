"""The consumer as a client of SMTP: its sessions, its login, its TLS."""

import ssl
import subprocess

import pytest
from servers.process import free_port
from servers.smtp import SmtpServer
from servers.system import SENDER
from steps import fresh_email, wait_until
from steps.jobs import DEAD, arrived, held_up, outcomes, put, waiting_in

# -- Sessions --------------------------------------------------------------------------


def test_it_keeps_a_session_for_mails_in_a_row_and_ends_it_while_idle(
        broker, start_consumer, smtp, job):
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    for _ in range(5):
        put(broker, job | {"email": fresh_email()})

    wait_until(lambda: len(smtp.mails) == 5)
    assert len(smtp.clients) == 1
    wait_until(lambda: not smtp.sessions)


def test_it_mails_to_others_over_one_session_while_some_are_greylisted(new_mailer, job):
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
    assert len(smtp.clients) <= 2     # a slow machine may make it idle for a second


REFUSALS = [
    ("MAIL", "450 later"), ("MAIL", "550 no"),
    ("RCPT", "450 later"), ("RCPT", "550 no"),
    ("DATA", "450 later"), ("DATA", "550 no"),
    ("CONTENT", "450 later"), ("CONTENT", "550 no")]


@pytest.mark.parametrize("verb, refusal", REFUSALS)
def test_it_keeps_its_session_after_a_refusal(new_mailer, job, verb, refusal):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    refused, good = fresh_email(), fresh_email()

    with held_up(new_mailer, job) as first:
        smtp.replies[verb, SENDER if verb == "MAIL" else refused] = [refusal]
        put(broker, job | {"email": refused})
        message_id = put(broker, job | {"email": good})

    [before], [after] = arrived(smtp, first), arrived(smtp, good)
    assert after.client == before.client
    wait_until(lambda: outcomes(new_mailer, message_id) == ["sent"])


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "CONTENT"])
def test_it_begins_a_new_session_when_the_mail_server_ends_one(new_mailer, job, verb):
    smtp, broker = new_mailer.smtp, new_mailer.broker
    refused, good = fresh_email(), fresh_email()

    with held_up(new_mailer, job) as first:
        smtp.replies[verb, SENDER if verb == "MAIL" else refused] = ["421 closing"]
        put(broker, job | {"email": refused})
        message_id = put(broker, job | {"email": good})

    [before], [after] = arrived(smtp, first), arrived(smtp, good)
    assert after.client != before.client
    wait_until(lambda: outcomes(new_mailer, message_id) == ["sent"])


# -- Login and TLS ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-made certificate for localhost, with its key, as files."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


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


@pytest.mark.parametrize("settings_without_trust", [
    {"SSL_CERT_FILE": "/dev/null"}, {"SMTP_HOST": "127.0.0.1"}], ids=["issuer", "name"])
def test_it_mails_to_no_server_that_it_cannot_verify(
        broker, start_consumer, secure_smtp, job, settings_without_trust):
    start_consumer(BROKER_URL=broker, **secure_smtp.settings | settings_without_trust)

    put(broker, job)

    wait_until(lambda: len(secure_smtp.failed_handshakes) > 1)     # it tries again
    assert not secure_smtp.mails
    assert not waiting_in(broker, DEAD)


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
