"""From the queue to the mailbox: what is mailed, how often, until when, what not."""

import contextlib
import email.policy
import json
import pickle
import re
import ssl
import subprocess
import threading
import time
from email.utils import parsedate_to_datetime
from itertools import pairwise
from pathlib import Path

import pytest
from servers.faults import cut_connections
from servers.process import free_port
from servers.program import Consumer
from servers.smtp import DROP, SmtpServer
from steps import (
    activate,
    activated,
    fresh_email,
    mailed_to,
    register,
    registered,
    wait_until,
)
from steps.jobs import (
    DEAD,
    consumers_of,
    purge,
    put,
    put_raw,
    take,
    take_job,
    waiting_in,
)
from steps.logs import events

TOP = Path(__file__).parent.parent
SENDER = "registration@example.com"


@pytest.fixture(scope="module")
def mailer_of_module(servers, settings, brokers):
    smtp, broker = SmtpServer(free_port()), brokers["mailer"]
    settings = settings | {"BROKER_URL": broker, "SMTP_PORT": str(smtp.port)}
    with Consumer(Path(servers.folder) / "mailer", settings) as consumer:
        wait_until(lambda: consumers_of(broker))
        consumer.broker, consumer.smtp = broker, smtp
        yield consumer
    smtp.close()


@pytest.fixture
def mailer(mailer_of_module):
    """A consumer of the .broker, that mails through an .smtp of the tests' own."""
    purge(mailer_of_module.broker)
    return mailer_of_module


def arrived(smtp, address, count=1):
    """Waits for so many mails to an address; gives all that came."""
    wait_until(lambda: len(smtp.mails_to(address)) >= count)
    return smtp.mails_to(address)


def outcomes(mailer, message_id):
    """What the consumer's log says about a job, in order."""
    return [event["outcome"]
            for event in events(mailer.log, event="job", job=message_id)]


def next_mail_arrives(mailer, job):
    """Whether a job behind all others is mailed: then those before it are settled."""
    after = job | {"email": fresh_email()}
    put(mailer.broker, after)
    return len(arrived(mailer.smtp, after["email"])) == 1


# -- The mails -------------------------------------------------------------------------


def test_it_mails_the_code_as_text_and_as_html(service):
    address, code = registered(service)

    mail = mailed_to(service, address)

    assert re.findall(r"\b\d{4}\b", mail["text"]).count(code) == 1
    assert f">{code}<" in mail["html"]


def test_it_says_how_long_a_code_lives_and_that_only_the_newest_one_works(service):
    address, _ = registered(service)

    mail = mailed_to(service, address)

    for body in mail["text"], mail["html"]:
        assert "60 seconds" in body
        assert "only the newest" in body


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
    assert "active" in mail["text"] and "active" in mail["html"]
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
    for form in "plain", "html":
        assert greeting in parsed.get_body([form]).get_content()


# -- The queue -------------------------------------------------------------------------


def queues_of(servers, queue):
    """RabbitMQ's own words about the queues, by name."""
    rows = servers.rabbitmq.ctl("list_queues", "-p", queue.broker.rpartition("/")[2],
                                "--formatter", "json",
                                "name", "type", "durable", "arguments")
    return {row["name"]: row | {"arguments": {key: value for key, _, value in
                                              row["arguments"]}}
            for row in json.loads(rows)}


def test_it_declares_durable_quorum_queues_with_bounds(servers, queue, job):
    queues = queues_of(servers, queue)

    mail, dead = queues["mail"]["arguments"], queues["mail.dead"]["arguments"]
    assert all(each["durable"] and each["type"] == "quorum" for each in queues.values())
    assert mail["x-overflow"] == "reject-publish" and mail["x-max-length"] <= 100_000
    assert mail["x-dead-letter-routing-key"] == "mail.dead"
    assert dead["x-message-ttl"] <= 30 * 24 * 3600 * 1000   # milliseconds
    assert dead["x-max-length"] <= 100_000


def test_it_publishes_persistent_messages_with_an_id(queue):
    register(queue, fresh_email())
    register(queue, fresh_email())

    first, second = take(queue.broker), take(queue.broker)

    assert first.properties["delivery_mode"] == second.properties["delivery_mode"] == 2
    assert first.properties["message_id"] != second.properties["message_id"]


def test_it_gives_a_code_the_deadline_that_the_database_has(queue, database):
    address = fresh_email()
    register(queue, address)

    job = take_job(queue.broker)

    [(expires_at, lifetime)] = database("""
        SELECT extract(epoch FROM expires_at)::float,
               extract(epoch FROM expires_at - registered_at)::int
          FROM users WHERE email = %s""", [address])
    assert job["expires_at"] == pytest.approx(expires_at, abs=0.01)
    assert lifetime == 60


def test_it_gives_notices_and_confirmations_fifteen_minutes(queue):
    address = fresh_email()
    register(queue, address)
    code = take_job(queue.broker)["code"]

    activate(queue, address, code)
    register(queue, address)

    for message in take(queue.broker), take(queue.broker):
        job = json.loads(message.body)
        assert job["expires_at"] - job["issued_at"] == pytest.approx(900)
        assert job["issued_at"] == pytest.approx(time.time(), abs=60)
        assert message.properties["expiration"] == "900000"     # milliseconds


def test_it_leaves_no_dead_code_in_a_queue_without_a_consumer(broker, start_service):
    api = start_service(BROKER_URL=broker, CODE_LIFETIME="1")

    for _ in range(3):
        register(api, fresh_email())

    wait_until(lambda: waiting_in(broker) == 0)
    wait_until(lambda: waiting_in(broker, DEAD) == 3)


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

    message_id = put(broker, job | {"expires_at": time.time() + 7})

    wait_until(lambda: "expired" in outcomes(consumer, message_id))
    assert smtp.tries[job["email"]] > 1
    consumer.stop()
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


# -- SMTP sessions ---------------------------------------------------------------------


def test_it_keeps_a_session_for_mails_in_a_row_and_ends_it_while_idle(
        broker, start_consumer, smtp, job):
    start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))

    for _ in range(5):
        put(broker, job | {"email": fresh_email()})

    wait_until(lambda: len(smtp.mails) == 5)
    assert len(smtp.clients) == 1
    wait_until(lambda: not smtp.sessions)


@contextlib.contextmanager
def held_up(mailer, job):
    """The consumer waits for its mail server; what the block puts comes in a row."""
    first, go_on = job | {"email": fresh_email()}, threading.Event()
    mailer.smtp.replies["CONTENT", first["email"]] = [go_on]
    put(mailer.broker, first)
    wait_until(lambda: mailer.smtp.held)
    yield first["email"]
    go_on.set()


@pytest.fixture
def new_mailer(broker, start_consumer, smtp):
    """As mailer, but without a past."""
    consumer = start_consumer(BROKER_URL=broker, SMTP_PORT=str(smtp.port))
    consumer.broker, consumer.smtp = broker, smtp
    return consumer


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
    smtp.replies["CONTENT", job["email"]] = [8] * 10     # seconds until its 250

    put(new_mailer.broker, job)

    assert len(arrived(smtp, job["email"])) == 1
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


def test_it_tries_again_after_a_failed_login(broker, start_consumer, secure_smtp, job):
    secure_smtp.login = ("ann", "changed")
    start_consumer(BROKER_URL=broker, **secure_smtp.settings)
    put(broker, job)
    wait_until(lambda: secure_smtp.failed_logins)

    secure_smtp.login = ("ann", "secret")

    assert arrived(secure_smtp, job["email"])


# -- Logs ------------------------------------------------------------------------------


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

    assert take(mailer.broker, DEAD).properties["message_id"] == message_id
    wait_until(lambda: outcomes(mailer, message_id) == ["unreadable"])
    [event] = events(mailer.log, event="job", job=message_id)
    assert event["level"] == "ERROR"


def test_it_logs_no_line_that_a_malformed_id_forges(mailer, job):
    forged = "1\r\nevent=job job=2 outcome=sent"

    put(mailer.broker, job, message_id=forged)

    assert take(mailer.broker, DEAD).properties["message_id"] == forged
    wait_until(lambda: events(mailer.log, job="malformed", outcome="unreadable"))
    assert not events(mailer.log, event="job", job="2")


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


def test_it_logs_no_address_and_no_code_of_a_request(service):
    address, code = registered(service)

    activate(service, address, code)

    mailed_to(service, address, 2)
    log = service.log.read_text() + service.consumer.log.read_text()
    numbers_of_ours = r" ms=\d+|.* event=gunicorn .*"
    assert address.partition("@")[0] not in log
    assert not re.search(rf"[=\"' ]{code}\b", re.sub(numbers_of_ours, "", log))
