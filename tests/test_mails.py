"""What the three mails say, to whom, and what the logs of API and consumer say."""

import email
import email.policy
import re
import time
from email.utils import parsedate_to_datetime

import pytest
from servers.system import SENDER
from steps import (
    ACTIVATE,
    JSON,
    REGISTER,
    activate,
    activated,
    basic,
    code_mailed_to,
    fresh_email,
    mailed_to,
    problem_in,
    register,
    registered,
    send,
    send_raw,
    wait_until,
    wrong,
)
from steps.jobs import arrived, put
from steps.logs import events


def parsed(mail):
    return email.message_from_bytes(mail.content, policy=email.policy.default)


# -- The three mails -------------------------------------------------------------------


def test_it_mails_a_code_with_its_lifetime_and_when_it_was_issued(service, database):
    address, code = registered(service)

    mail = mailed_to(service, address)

    text = mail["text"]
    [(issued,)] = database("""
        SELECT to_char(registered_at AT TIME ZONE 'UTC',
                       'HH24:MI:SS "UTC on" DD FMMonth YYYY')
          FROM users WHERE email = %s""", [address])
    assert text.splitlines().count(code) == 1
    assert f"issued at {issued} and works for 60 seconds" in " ".join(text.split())
    assert "only the newest" in text
    assert mail["subject"] == "Your code"


def test_it_mails_a_confirmation_and_later_a_notice_without_a_code(service):
    address = activated(service)

    register(service, address)

    confirmation, notice = [mailed_to(service, address, count) for count in (2, 3)]
    assert confirmation["subject"] == "Your account is active"
    assert "your account is active" in confirmation["text"]
    assert notice["subject"] == "You already have an account"
    assert not re.search(r"\b\d{4}\b", notice["text"])


# -- Headers, sender and recipient -----------------------------------------------------


def test_it_mails_text_only_with_the_headers_of_an_automatic_mail(
        mailer, job, settings):
    message_id = put(mailer.broker, job)

    [mail] = arrived(mailer.smtp, job["email"])

    headers = parsed(mail)
    assert headers.get_content_type() == "text/plain"
    assert job["code"] in headers.get_content().split()
    assert mail.sender == SENDER
    sent = parsedate_to_datetime(headers["Date"]).timestamp()
    assert headers["From"] == settings["MAIL_FROM"]
    assert headers["To"] == job["email"]
    assert headers["Auto-Submitted"] == "auto-generated"
    assert headers["Message-ID"] == f"<{message_id}@example.com>"
    assert sent == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("sender, name", [
    ("ann@mail.example.org", ""),
    ("Jörg von der 注册 <ann@mail.example.org>", "Jörg von der 注册"),
    ('"[Staging] Acme, Inc." <ann@mail.example.org>', "[Staging] Acme, Inc.")])
def test_it_mails_from_a_sender_with_or_without_a_name_and_says_its_domain(
        broker, start_consumer, smtp, job, sender, name):
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port), MAIL_FROM=sender)

    message_id = put(broker, job)

    [mail] = arrived(smtp, job["email"])
    [address] = parsed(mail)["From"].addresses
    assert address.display_name == name
    assert mail.sender == address.addr_spec == "ann@mail.example.org"
    assert smtp.names == ["mail.example.org"]
    assert parsed(mail)["Message-ID"] == f"<{message_id}@mail.example.org>"


# -- The log of the API ----------------------------------------------------------------

LOGFMT = re.compile(r'time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ level=[A-Z]+'
                    r'( [a-z_]+=("([^"\\]|\\.)*"|[^\s"]*))+')


def test_it_logs_each_request_in_a_line(service):
    before = len(service.log.read_text())

    activate(service, fresh_email(), "1234", "wrong password")
    register(service, "no address")
    send(service, "GET", "/nowhere")
    send(service, "GET", "/healthz")

    def logged():
        return re.findall(
            r"event=request client=127\.0\.0\.1 method=(\S+) route=(\S+) status=(\d+)"
            r" job=- ms=\d+$", service.log.read_text()[before:], re.MULTILINE)

    wait_until(lambda: len(logged()) == 4)
    assert logged() == [
        ("PATCH", ACTIVATE, "403"), ("POST", REGISTER, "422"),
        ("GET", "-", "404"), ("GET", "/healthz", "200")]


def test_it_logs_nothing_that_is_secret_or_personal(service):
    email, password = fresh_email(), "a passphrase of its own"
    offsets = {log: len(log.read_text()) for log in (service.log, service.consumer.log)}

    register(service, email, password)
    code = code_mailed_to(service, email)
    activate(service, email, wrong(code), password)
    activate(service, email, code, password)
    register(service, email, password)
    mailed_to(service, email, 3)

    def logs():     # without times, which are digits too
        return re.sub(r"\b(time|ms)=\S*", "", "".join(
            log.read_text()[offset:] for log, offset in offsets.items()))

    # The last job is logged only after its mail has arrived.
    wait_until(lambda: logs().count("event=request") >= 4
               and logs().count("event=job") >= 3)
    personal = [email, email.partition("@")[0], password,
                basic(email, password).split()[1]]
    assert not [each for each in personal if each in logs()]
    assert not {code, wrong(code)} & set(re.findall(r"\w+", logs()))


def test_it_logs_nothing_of_what_a_stranger_sends(start_service):
    api, word = start_service(TRUSTED_PROXIES="1", WEB_CONCURRENCY="1"), "7d1f93ab20c5"

    send(api, "GET", f"/{word}?{word}", headers={"Referer": word, "User-Agent": word})
    send(api, "POST", REGISTER, word.encode(), JSON | {"X-Request-Id": word})
    register(api, f"{word}@", word)
    activate(api, word, word, word, Cookie=word)
    for client in f'{word} "', f"{word} status=200", f"fe80::1%{word} status=200":
        register(api, fresh_email(), **{"X-Forwarded-For": client})

    wait_until(lambda: api.log.read_text().count(" route=/users/") == 6)
    assert word not in api.log.read_text()


def test_it_logs_an_error_that_it_did_not_expect_in_one_line(start_service, database):
    api = start_service(WEB_CONCURRENCY="1")
    email, code = registered(api)
    database("""UPDATE users SET activated_at = '10000-01-01'
                 WHERE email = %s""", [email])     # a year that Python does not know
    before = len(api.log.read_text())

    failed = activate(api, email, code)

    assert problem_in(failed) == 500
    wait_until(lambda: "event=request" in api.log.read_text()[before:])
    lines = api.log.read_text()[before:].splitlines()
    assert [line for line in lines if not LOGFMT.fullmatch(line)] == []
    assert [line.split()[1] for line in lines] == ["level=ERROR", "level=INFO"]
    assert "ValueError" in lines[0]
    assert not {email, code} & set(re.findall(r"[\w@.]+", "".join(lines)))


def test_it_logs_in_logfmt_and_utc_whatever_came(service):
    for line in (b'GET /"quoted" HTTP/9.9', b'"GET" / level=INFO',
                 b"GET / HTTP/1.1\r\na b"):
        send_raw(service, line + b"\r\n\r\n")

    lines = [line for log in (service.log, service.consumer.log)
             for line in log.read_text().splitlines()]

    assert [line for line in lines if not LOGFMT.fullmatch(line)] == []


def test_it_logs_the_same_id_for_a_request_and_for_its_mail(service):
    address = activated(service)
    register(service, address)

    mails = [mailed_to(service, address, count) for count in (1, 2, 3)]

    ids = [mail["headers"]["message-id"][1:].partition("@")[0] for mail in mails]
    requests = [events(service.log, event="request", job=job) for job in ids]
    assert [each["route"] for [each] in requests] == [REGISTER, ACTIVATE, REGISTER]
    wait_until(lambda: all(events(service.consumer.log, job=job, outcome="sent")
                           for job in ids))


# -- The log of the consumer -----------------------------------------------------------


@pytest.mark.parametrize("outcome, level, reply, changes", [
    ("sent", "INFO", "250 {}: fine", {}), ("retry", "WARNING", "450 {}: later", {}),
    ("refused", "ERROR", "550 {}: no", {}),
    ("expired", "WARNING", "", {"expires_at": 0}),
    ("unreadable", "ERROR", "", {"template": "other"})])
def test_it_logs_what_becomes_of_a_job_without_address_and_code(
        mailer, job, outcome, level, reply, changes):
    local_part = job["email"].partition("@")[0]
    ends = {"expires_at": time.time() + 3}     # so that it is not tried again
    mailer.smtp.replies["RCPT", job["email"]] = [reply.format(job["email"])]

    message_id = put(mailer.broker, job | ends | changes)

    [event] = wait_until(lambda: events(mailer.log, event="job", job=message_id))
    assert (event["outcome"], event["level"]) == (outcome, level)
    log = mailer.log.read_text()
    assert local_part not in log
    about_it = [line.replace(message_id, "") for line in log.splitlines()
                if message_id in line]
    assert not re.search(rf"\b{job['code']}\b", "".join(about_it))
