"""The mails: what is in them, in which headers, and to whom."""

import email.policy
import json
import re
import time
from email.utils import parsedate_to_datetime

import pytest
from servers.process import TOP
from servers.program import Consumer
from servers.system import SENDER
from steps import (
    activate,
    activated,
    fresh_email,
    mailed_to,
    register,
    registered,
    wait_until,
)
from steps.commands import CONSUMER, GOOD, run
from steps.jobs import arrived, consumers_of, next_mail_arrives, put


def test_it_mails_the_code(service):
    address, code = registered(service)

    mail = mailed_to(service, address)

    assert re.findall(r"\b\d{4}\b", mail["text"]).count(code) == 1


def test_it_mails_text_only(mailer, job):
    put(mailer.broker, job)

    [mail] = arrived(mailer.smtp, job["email"])

    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    assert parsed.get_content_type() == "text/plain"
    assert job["code"] in parsed.get_content().split()


def test_it_says_how_long_a_code_lives_and_that_only_the_newest_one_works(service):
    address, _ = registered(service)

    text = mailed_to(service, address)["text"]

    assert "60 seconds" in text
    assert "only the newest" in text


def test_it_says_when_a_code_was_issued(service, database):
    address, _ = registered(service)

    text = " ".join(mailed_to(service, address)["text"].split())

    [(issued,)] = database("""
        SELECT to_char(registered_at AT TIME ZONE 'UTC',
                       'HH24:MI:SS "UTC on" DD FMMonth YYYY')
          FROM users WHERE email = %s""", [address])
    assert f"issued at {issued}" in text


def test_it_keeps_the_code_out_of_the_headers(service):
    address, code = registered(service)

    headers = mailed_to(service, address)["headers"]

    assert headers["subject"] == "Your code"
    assert not re.search(rf"\b{code}\b", json.dumps(headers["from"] + headers["to"]))


def test_it_writes_the_headers_of_an_automatic_mail(mailer, job, settings):
    message_id = put(mailer.broker, job)

    [mail] = arrived(mailer.smtp, job["email"])

    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    assert parsed["From"] == settings["MAIL_FROM"]
    assert parsed["To"] == job["email"]
    assert parsed["Auto-Submitted"] == "auto-generated"
    assert parsed["Message-ID"] == f"<{message_id}@example.com>"
    assert abs(parsedate_to_datetime(parsed["Date"]).timestamp() - time.time()) < 60


def test_it_sends_from_the_plain_address_to_one_recipient(mailer, job):
    put(mailer.broker, job)

    [mail] = arrived(mailer.smtp, job["email"])

    assert mail.sender == SENDER
    assert mail.recipients == [job["email"]]


def test_it_never_mails_to_a_second_recipient(mailer, job):
    first, second = fresh_email(), fresh_email()

    put(mailer.broker, job | {"email": f"{first}, {second}"})

    assert next_mail_arrives(mailer, job)
    assert not mailer.smtp.tries[second]


@pytest.mark.parametrize("address, arrives_at", [
    ("o'neil.{}@example.com", "o'neil.{}@example.com"),
    ("a+tag.{}@example.com", "a+tag.{}@example.com"),
    ("ann.{}@bücher.example", "ann.{}@xn--bcher-kva.example")])
def test_it_mails_to_unusual_addresses(service, address, arrives_at):
    unique = fresh_email().partition("@")[0]

    register(service, address.format(unique))

    mail = mailed_to(service, arrives_at.format(unique))
    assert len(mail["envelope"]["to"]) == 1


def test_it_mails_a_notice_without_a_code_to_the_owner_of_an_active_account(service):
    address = activated(service)

    register(service, address)

    mail = mailed_to(service, address, 3)
    assert mail["subject"] == "You already have an account"
    assert not re.search(r"\b\d{4}\b", mail["text"])
    assert mail["headers"]["auto-submitted"] == "auto-generated"


def test_it_mails_a_confirmation(service):
    address, code = registered(service)

    activate(service, address, code)

    mail = mailed_to(service, address, 2)
    assert mail["subject"] == "Your account is active"
    assert "your account is active" in mail["text"]
    assert mail["headers"]["auto-submitted"] == "auto-generated"


ANY_LANGUAGE = {
    "Your account is active": "Ihr Konto ist eröffnet: 账户已激活 🎉",
    "Welcome!": "Grüß Gott, ようこそ, добро пожаловать 🎉!"}


@pytest.fixture
def translated_mailer(broker, settings, smtp, tmp_path):
    """A consumer with a confirmation in many languages, and a sender with a name."""
    program = (TOP / "consumer.py").read_text()
    for ours, theirs in ANY_LANGUAGE.items():
        assert ours in program
        program = program.replace(ours, theirs)
    (tmp_path / "consumer.py").write_text(program)
    mailer = Consumer(tmp_path / "log", settings | {
        "BROKER_URL": broker, "SMTP_PORT": str(smtp.port),
        "MAIL_FROM": f"Jörg von der 注册 <{SENDER}>"})
    mailer.cwd = tmp_path
    with mailer:
        wait_until(lambda: consumers_of(broker))
        yield mailer


def test_it_mails_any_unicode(translated_mailer, broker, smtp, job):
    put(broker, job | {"template": "confirmation"})

    [mail] = arrived(smtp, job["email"])

    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    subject, greeting = ANY_LANGUAGE.values()
    assert parsed["Subject"] == subject
    assert parsed["From"].addresses[0].display_name == "Jörg von der 注册"
    assert mail.sender == parsed["From"].addresses[0].addr_spec == SENDER
    assert greeting in parsed.get_content()


@pytest.mark.parametrize("sender, name", [
    (SENDER, ""), (f"Acme <{SENDER}>", "Acme"),
    (f'"[Staging] Acme" <{SENDER}>', "[Staging] Acme"),
    (f'"Acme, Inc." <{SENDER}>', "Acme, Inc.")])
def test_it_mails_from_a_sender_with_or_without_a_name(
        broker, start_consumer, smtp, job, sender, name):
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port), MAIL_FROM=sender)

    put(broker, job)

    [mail] = arrived(smtp, job["email"])
    parsed = email.message_from_bytes(mail.content, policy=email.policy.default)
    [address] = parsed["From"].addresses
    assert (address.display_name, address.addr_spec) == (name, SENDER)
    assert mail.sender == SENDER


@pytest.mark.parametrize("sender", [
    "[Staging] Acme <a@example.com>", "Acme, Inc. <a@example.com>",
    "Acme <a@example.com>, Bob <b@example.com>"])
def test_it_stops_with_one_line_when_its_sender_is_no_single_address(sender):
    code, lines = run(CONSUMER, **GOOD | {"MAIL_FROM": sender})

    assert code != 0
    assert len(lines) == 1 and "MAIL_FROM" in lines[0]
    assert sender not in lines[0]
