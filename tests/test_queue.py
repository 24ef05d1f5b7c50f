"""The queues, and the messages that the API puts into them."""

import json
import time

import pytest
from steps import activate, fresh_email, register, wait_until
from steps.jobs import DEAD, take, take_job, waiting_in


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
