"""What the tests do with jobs, as verbs: from the queue to the mailbox.

A broker is given as its URL. A mailer is a consumer of the tests' own, with its .broker
and its mail server, a servers.smtp.SmtpServer, as .smtp.
"""

import json
import threading
import uuid
from contextlib import contextmanager

import amqp
from kombu import Connection

from steps import fresh_email, wait_until
from steps.logs import events

MAIL, RETRY = "registration.mail", "registration.retry"


# -- The queues ------------------------------------------------------------------------


@contextmanager
def channel_to(broker):
    connection = Connection(broker, connect_timeout=20,
                            transport_options={"confirm_publish": True})
    try:
        yield connection.default_channel
    finally:
        connection.collect()


def put(broker, job, **properties):
    """Puts a job, or any bytes, into the queue, as service.py does; its message id."""
    body = job if isinstance(job, bytes) else json.dumps(job).encode()
    properties = {"content_type": "application/json", "content_encoding": "utf-8",
                  "delivery_mode": 2, "message_id": uuid.uuid4().hex} | properties
    with channel_to(broker) as channel:
        channel.basic_publish(amqp.Message(body, **properties), routing_key=MAIL,
                              mandatory=True, confirm_timeout=10)
    return properties["message_id"]


def take_job(broker):
    """Waits for a job and takes it out of the queue."""
    with channel_to(broker) as channel:
        return json.loads(
            wait_until(lambda: channel.basic_get(MAIL, no_ack=True)).body)


def waiting_in(broker, queue=MAIL):
    """How many messages a queue has, without those that a consumer has in hand."""
    with channel_to(broker) as channel:
        return channel.queue_declare(queue, passive=True).message_count


def consumers_of(broker):
    """How many consumers the queue has; 0 where there is no queue."""
    try:
        with channel_to(broker) as channel:
            return channel.queue_declare(MAIL, passive=True).consumer_count
    except amqp.NotFound:
        return 0


def purge(broker):
    with channel_to(broker) as channel:
        for queue in MAIL, RETRY:
            channel.queue_purge(queue)


def delete_queues(broker):
    with channel_to(broker) as channel:
        for queue in MAIL, RETRY:
            channel.queue_delete(queue)


# -- The mailer ------------------------------------------------------------------------


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


@contextmanager
def held_up(mailer, job):
    """The consumer waits for its mail server; what the block puts comes in a row."""
    first, go_on = job | {"email": fresh_email()}, threading.Event()
    mailer.smtp.replies["CONTENT", first["email"]] = [go_on]
    put(mailer.broker, first)
    wait_until(lambda: not mailer.smtp.replies["CONTENT", first["email"]])
    try:
        yield first["email"]
    finally:
        go_on.set()
