"""The queues, the messages that the API puts into them, and TLS on the way there."""

import json
import time

import pytest
from servers.process import free_port
from servers.program import Consumer
from servers.rabbitmq import RabbitMQ
from steps import activate, fresh_email, problem_in, register, wait_until
from steps.jobs import MAIL, RETRY, consumers_of, take, take_job, waiting_in
from steps.logs import events


def queues_of(servers, broker):
    """RabbitMQ's own words about the queues, by name."""
    rows = servers.rabbitmq.ctl("list_queues", "-p", broker.rpartition("/")[2],
                                "--formatter", "json",
                                "name", "type", "durable", "arguments")
    return {row["name"]: row | {"arguments": {key: value for key, _, value in
                                              row["arguments"]}}
            for row in json.loads(rows)}


def test_it_declares_durable_quorum_queues_with_bounds(servers, mailer):
    queues = queues_of(servers, mailer.broker)

    mail, retry = queues[MAIL]["arguments"], queues[RETRY]["arguments"]
    assert set(queues) == {MAIL, RETRY}
    assert all(each["durable"] and each["type"] == "quorum" for each in queues.values())
    assert mail["x-overflow"] == "reject-publish" and mail["x-max-length"] <= 100_000
    assert mail["x-dead-letter-routing-key"] == RETRY
    assert retry["x-dead-letter-routing-key"] == MAIL
    assert retry["x-message-ttl"] == 3000     # milliseconds


def test_the_api_declares_the_queue_as_the_consumer_does(servers, queue, job, mailer):
    [ours, theirs] = [queues_of(servers, each.broker)[MAIL] for each in (queue, mailer)]

    assert ours == theirs


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


# -- TLS -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure_rabbitmq(tmp_path_factory, certificate):
    """A RabbitMQ with two addresses for TLS; its certificate has only 127.0.0.2.

    Not localhost, which kombu takes for 127.0.0.1.
    """
    rabbitmq, port = RabbitMQ(tmp_path_factory.mktemp("secure")), free_port()
    (rabbitmq.folder / "rabbitmq.conf").write_text(
        f"listeners.ssl.1 = 127.0.0.1:{port}\n"
        f"listeners.ssl.2 = 127.0.0.2:{port}\n"
        f"ssl_options.certfile = {certificate[0]}\n"
        f"ssl_options.keyfile = {certificate[1]}\n")
    rabbitmq.right, rabbitmq.wrong = [
        f"amqps://guest:guest@{host}:{port}//" for host in ("127.0.0.2", "127.0.0.1")]
    with rabbitmq:
        yield rabbitmq


@pytest.fixture
def trusting(settings, certificate):
    """The settings of a process that trusts the certificate."""
    return settings | {"SSL_CERT_FILE": str(certificate[0])}


UNVERIFIED = [
    ("wrong", {}, "IP address mismatch"),
    ("right", {"SSL_CERT_FILE": "/dev/null"}, "self-signed certificate")]


def test_the_consumer_talks_to_a_broker_that_it_can_verify(
        secure_rabbitmq, trusting, tmp_path):
    changes = {"BROKER_URL": secure_rabbitmq.right}

    with Consumer(tmp_path, trusting | changes):

        wait_until(lambda: consumers_of(secure_rabbitmq.url) == 1)


@pytest.mark.parametrize("host, changes, reason", UNVERIFIED, ids=["name", "issuer"])
def test_the_consumer_talks_to_no_broker_that_it_cannot_verify_and_says_why(
        secure_rabbitmq, trusting, tmp_path, host, changes, reason):
    broker = getattr(secure_rabbitmq, host)

    with Consumer(tmp_path, trusting | changes | {"BROKER_URL": broker}) as consumer:

        outages = wait_until(lambda: events(consumer.log, event="outage")[1:])
        assert all(reason in event["reason"] for event in outages)
        assert not events(consumer.log, event="consuming")
        assert "guest" not in consumer.log.read_text()


def test_the_api_publishes_to_a_broker_that_it_can_verify(
        secure_rabbitmq, trusting, start_service):
    api = start_service(**trusting | {"BROKER_URL": secure_rabbitmq.right})

    answer = register(api, fresh_email())

    assert answer.status == 202
    assert waiting_in(secure_rabbitmq.url) == 1


@pytest.mark.parametrize("host, changes, reason", UNVERIFIED, ids=["name", "issuer"])
def test_the_api_publishes_to_no_broker_that_it_cannot_verify_and_says_why(
        secure_rabbitmq, trusting, start_service, host, changes, reason):
    broker = getattr(secure_rabbitmq, host)
    api = start_service(**trusting | changes | {"BROKER_URL": broker})

    answer = register(api, fresh_email())

    assert problem_in(answer) == 503
    wait_until(lambda: any(
        reason in event["reason"] for event in events(api.log, event="outage")))
    assert "guest" not in api.log.read_text()
