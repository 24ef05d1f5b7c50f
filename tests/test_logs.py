"""What the logs of the API and of the consumer say, and what they never say."""

import re
import secrets
import time

import pytest
from steps import (
    ACTIVATE,
    JSON,
    REGISTER,
    activate,
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
from steps.jobs import next_mail_arrives, outcomes, put, put_raw
from steps.logs import events

LOGFMT = re.compile(r'time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ level=[A-Z]+'
                    r'( [a-z_]+=("([^"\\]|\\.)*"|[^\s"]*))+')


def told_by(path, offset=0):
    """What a log has told since it was so long, without times, which are digits too."""
    return re.sub(r"\b(time|ms)=\S*", r"\1=", path.read_text()[offset:])


def logged_by(service, before):
    """The (method, route, status, job) of each request that it has logged since."""
    return re.findall(
        r"event=request client=127\.0\.0\.1 method=(\S+) route=(\S+) status=(\d+)"
        r" job=(\S+) ms=\d+$", service.log.read_text()[before:], re.MULTILINE)


# -- Requests --------------------------------------------------------------------------


def test_it_logs_each_request_in_a_line(service):
    before = len(service.log.read_text())

    activate(service, fresh_email(), "1234", "wrong password")
    register(service, "no address")
    send(service, "GET", "/nowhere")
    send(service, "GET", "/healthz")

    assert wait_until(lambda: len(logged_by(service, before)) == 4
                      and logged_by(service, before)) == [
        ("PATCH", ACTIVATE, "403", "-"), ("POST", REGISTER, "422", "-"),
        ("GET", "-", "404", "-"), ("GET", "/healthz", "200", "-")]


def test_it_logs_nothing_that_is_secret_or_personal(service):
    email, password = fresh_email(), "a passphrase of its own"
    offsets = {log: len(log.read_text()) for log in (service.log, service.consumer.log)}
    register(service, email, password)
    code = code_mailed_to(service, email)
    activate(service, email, wrong(code), password)
    activate(service, email, code, password)
    register(service, email, password)
    mailed_to(service, email, 3)

    def logs():
        return "".join(told_by(log, offset) for log, offset in offsets.items())

    # The last job is logged only after its mail has arrived.
    wait_until(lambda: logs().count("event=request") >= 4
               and logs().count("event=job") >= 3)
    personal = [email, email.partition("@")[0], password,
                basic(email, password).split()[1]]
    assert not [each for each in personal if each in logs()]
    assert not {code, wrong(code)} & set(re.findall(r"\w+", logs()))


def test_it_logs_nothing_of_what_a_stranger_sends(strict):
    word, before = secrets.token_hex(8), len(strict.log.read_text())

    send(strict, "GET", f"/{word}?{word}",
         headers={"Referer": word, "User-Agent": word})
    send(strict, "POST", REGISTER, word.encode(), JSON | {"X-Request-Id": word})
    register(strict, f"{word}@", word)
    activate(strict, word, word, word, Cookie=word)
    for client in f'{word} "', f"{word} status=200", f"fe80::1%{word} status=200":
        register(strict, fresh_email(), **{"X-Forwarded-For": client})

    wait_until(lambda: strict.log.read_text()[before:].count(" route=/users/") == 6)
    assert word not in strict.log.read_text()


def test_it_logs_an_error_that_it_did_not_expect_in_one_line(start_service, database):
    api = start_service()
    email, code = registered(api)
    database("""UPDATE users SET activated_at = '10000-01-01'
                 WHERE email = %s""", [email])     # a year that Python does not know
    before = len(api.log.read_text())

    failed = activate(api, email, code)

    def lines():    # a worker may still be starting
        return [line for line in api.log.read_text()[before:].splitlines()
                if "Booting worker" not in line]

    assert problem_in(failed) == 500
    wait_until(lambda: any("event=request" in line for line in lines()))
    assert [line for line in lines() if not LOGFMT.fullmatch(line)] == []
    assert [line.split()[1] for line in lines()] == ["level=ERROR", "level=INFO"]
    assert "ValueError" in lines()[0]
    assert not {email, code} & set(re.findall(r"[\w@.]+", "".join(lines())))


def test_it_logs_in_logfmt_and_utc_whatever_came(service):
    for line in (b'GET /"quoted" HTTP/9.9', b'"GET" / level=INFO',
                 b"GET / HTTP/1.1\r\na b"):
        send_raw(service, line + b"\r\n\r\n")

    lines = [line for log in (service.log, service.consumer.log)
             for line in log.read_text().splitlines()]

    assert [line for line in lines if not LOGFMT.fullmatch(line)] == []


def test_it_logs_the_same_id_for_a_request_and_for_its_mail(service):
    address, code = registered(service)
    activate(service, address, code)
    register(service, address)

    mails = [mailed_to(service, address, count) for count in (1, 2, 3)]

    ids = [mail["headers"]["message-id"].strip("<>").partition("@")[0]
           for mail in mails]
    requests = [events(service.log, event="request", job=job) for job in ids]
    assert [request["route"] for [request] in requests] == [
        "/users/register", "/users/activate", "/users/register"]
    wait_until(lambda: all(events(service.consumer.log, job=job, outcome="sent")
                           for job in ids))


# -- Jobs ------------------------------------------------------------------------------


@pytest.mark.parametrize("replies, lines", [
    ([], [("INFO", "sent")]),
    (["450 {}: later"], [("WARNING", "retry"), ("INFO", "sent")]),
    (["550 {}: no"], [("ERROR", "refused")])], ids=["sent", "retry", "refused"])
def test_it_logs_what_becomes_of_a_job_without_address_and_code(
        mailer, job, replies, lines):
    mailer.smtp.replies["RCPT", job["email"]] = [
        reply.format(job["email"]) for reply in replies]

    message_id = put(mailer.broker, job)

    def about_it():
        return events(mailer.log, event="job", job=message_id)

    wait_until(lambda: len(about_it()) == len(lines))
    assert [(event["level"], event["outcome"]) for event in about_it()] == lines
    log = mailer.log.read_text()
    assert job["email"].partition("@")[0] not in log
    lines_about_it = "".join(line.replace(message_id, "") for line in log.splitlines()
                             if message_id in line)
    assert not re.search(rf"\b{job['code']}\b", lines_about_it)


def test_it_logs_a_warning_for_a_job_that_expired(mailer, job):
    message_id = put(mailer.broker, job | {"expires_at": time.time() - 1})

    wait_until(lambda: outcomes(mailer, message_id) == ["expired"])
    [event] = events(mailer.log, event="job", job=message_id)
    assert event["level"] == "WARNING"


@pytest.mark.parametrize("body, properties", [
    (b"{", {}), (b"{}", {"content_type": "text/plain"}),
    (b"{}", {"application_headers": {"compression": "unheard of"}})],
    ids=["not JSON", "wrong content type", "bad compression header"])
def test_it_logs_an_error_for_a_job_that_it_cannot_read(mailer, body, properties):
    message_id = put_raw(mailer.broker, body, **properties)

    wait_until(lambda: outcomes(mailer, message_id) == ["unreadable"])
    [event] = events(mailer.log, event="job", job=message_id)
    assert event["level"] == "ERROR"


def test_it_logs_no_line_that_a_malformed_id_forges(mailer, job):
    forged = "1\r\nevent=job job=2 outcome=sent"

    put(mailer.broker, job, message_id=forged)

    assert next_mail_arrives(mailer, job)
    assert not events(mailer.log, event="job", job="2")
