"""Takes mail jobs from RabbitMQ and hands the mails to the mail server.

    service.py --> registration.mail --> consumer.py --> mail server
                          ^                   |
                          +-------------------+
                 registration.retry, for three seconds

Run:    python consumer.py    as many as you like: they share the queue

What becomes of a job, and how it is settled: ack deletes it, reject moves it to
registration.retry, which gives it back.

    unreadable    it cannot be turned into a mail                  ack
    expired       its deadline has passed: nothing is sent         ack
    sent          the mail server has accepted the mail            ack
    refused       the mail server refuses it for good: 5xx for
                  the recipient or the content                     ack
    retry         any other trouble: connection, login, 4xx, or
                  5xx for the sender, which we can mend            reject

If a consumer dies or loses RabbitMQ before the ack, or the mail server's answer is
lost, the mail may be sent again, with the same Message-ID.
"""

import json
import logging
import os
import signal
import smtplib
import ssl
import sys
import time
from contextlib import suppress
from email.headerregistry import Address
from email.mime.text import MIMEText
from email.utils import formataddr, formatdate, getaddresses

from dotenv import load_dotenv
from kombu import Connection, Consumer, Queue
from kombu.utils.url import parse_url

# -- Settings, read as in service.py ---------------------------------------------------


def setting(name, accept, fault, default=None):
    """The text of an environment variable. An empty one counts as not set.

    The program ends if accept(text) raises an error or returns something false.
    """
    text = os.environ.get(name) or default
    if text is None:
        raise SystemExit(f"{name} is missing; see .env.example")
    try:
        good = accept(text)
    except Exception:   # its message may quote a password, so nobody gets to see it
        good = False
    if not good:
        raise SystemExit(f"{name} {fault}; see .env.example")
    return text


def number(name, default, least, most):
    """The whole number in an environment variable, from least to most."""
    return int(setting(name, lambda text: least <= int(text) <= most,
                       f"must be a number from {least} to {most}", default))


def one_address(text):
    """The text as a header, if it is one address, or Name <address>; else an error."""
    [(name, address)] = getaddresses([text])
    return formataddr((name, str(Address(addr_spec=address))))


def amqp_urls(text):
    """Whether it is one AMQP URL, or several with ";" between them."""
    schemes = {parse_url(url)["transport"] for url in text.split(";")}
    return schemes <= {"amqp", "amqps"}


load_dotenv(interpolate=False)
BROKER_URL = setting("BROKER_URL", amqp_urls, "is no AMQP URL")
SMTP_HOST = setting("SMTP_HOST", lambda text: text.encode("idna"), "is no host name",
                    "localhost")
SMTP_PORT = number("SMTP_PORT", "1025", 1, 65535)
SMTP_USERNAME = setting("SMTP_USERNAME", str.isascii, "must be ASCII", "")
SMTP_PASSWORD = setting("SMTP_PASSWORD", str.isascii, "must be ASCII", "")
SMTP_TLS = setting("SMTP_TLS", lambda text: text in ("none", "starttls", "tls"),
                   "must be none, starttls or tls", "none")
MAIL_FROM = setting("MAIL_FROM", one_address,
                    'must be an address, Name <address> or "Name, Inc." <address>')
LOG_LEVEL = setting("LOG_LEVEL", logging.getLevelNamesMapping().get,
                    "must be DEBUG, INFO, WARNING, ERROR or CRITICAL", "INFO")

[(NAME, SENDER)] = getaddresses([MAIL_FROM])
DOMAIN = SENDER.rpartition("@")[2]
SMTP_GREETING = 10    # seconds to connect and be greeted, for each address of SMTP_HOST
SMTP_TIMEOUT = 90     # seconds for each other answer: a relay may take a minute
RETRY_DELAY = 3       # seconds
SESSION_MAILS = 9     # then a new session: Exim does not deliver the 11th at once
HEARTBEAT = 60        # seconds; a consumer silent for two or three loses its job
logging.Formatter.converter = time.gmtime
logging.basicConfig(level=LOG_LEVEL, stream=sys.stdout, datefmt="%Y-%m-%dT%H:%M:%SZ",
                    format="time=%(asctime)s level=%(levelname)s %(message)s")
log = logging.getLogger("consumer")

# -- The queues: service.py has the same lines for the first one -----------------------

# On disk, and replicated. If it is full, publishing fails. A job that the consumer
# rejects stays here until it is in registration.retry. After 20 deliveries, RabbitMQ 4
# would give it up; a job may need one every few seconds, until its deadline.
MAIL_QUEUE = Queue("registration.mail", queue_arguments={
    "x-queue-type": "quorum", "x-delivery-limit": 1_000_000,
    "x-max-length": 100_000, "x-overflow": "reject-publish",
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "registration.retry",
    "x-dead-letter-strategy": "at-least-once"})

# After the time to live, in milliseconds, RabbitMQ moves a job back to the first queue.
# It drops what only expires in a circle; our jobs are rejected once a round.
RETRY_QUEUE = Queue("registration.retry", queue_arguments={
    "x-queue-type": "quorum", "x-message-ttl": 1000 * RETRY_DELAY,
    "x-overflow": "reject-publish",   # at-least-once works with no other
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "registration.mail",
    "x-dead-letter-strategy": "at-least-once"})

# -- The three mails -------------------------------------------------------------------

MAILS = {   # template: (subject, text)
    "code": ("Your code", """\
This is the code for your new account:

{code}

It was issued at {issued} and works for {lifetime:.0f} seconds.
If you asked more than once, only the newest code works.

You did not ask for it? Somebody probably mistyped an address. Please ignore this mail.\
"""),
    "notice": ("You already have an account", """\
Somebody, probably you, has just tried to register this address.
It already has an active account, and nothing about that account has changed."""),
    "confirmation": ("Your account is active", """\
Welcome! This address is confirmed, and your account is active."""),
}


def build(job, job_id):
    """The mail of a job, or any exception if the job is malformed.

    The Message-ID is the job's, so that a mailbox can recognise a second copy.
    """
    subject, text = MAILS[job["template"]]
    issued = time.strftime("%H:%M:%S UTC on %d %B %Y", time.gmtime(job["issued_at"]))
    mail = MIMEText(text.format(   # a third of the time that EmailMessage takes
        **job, issued=issued, lifetime=job["expires_at"] - job["issued_at"]))
    mail["From"] = formataddr((NAME, SENDER))
    mail["To"] = one_address(job["email"])
    mail["Subject"], mail["Date"] = subject, formatdate()
    mail["Message-ID"] = f"<{job_id}@{DOMAIN}>"
    mail["Auto-Submitted"] = "auto-generated"   # RFC 3834: auto-responders keep quiet
    return mail.as_string()


# -- One job ---------------------------------------------------------------------------

stopping = False   # set by a signal


def on_message(message):
    """Try a job, and settle it."""
    if not stopping:   # else it stays unsettled, and RabbitMQ gives it to another
        settle(message, *attempt(message))


def attempt(message):
    """Try a job, and return its outcome, as in the table at the top, and the error."""
    try:
        job = message.payload
        expires_at = float(job["expires_at"])
        mail = build(job, message.properties["message_id"])
    except Exception as error:   # a malformed job stays malformed
        return "unreadable", error
    if time.time() >= expires_at:
        return "expired", None
    try:
        open_session()
        if time.time() >= expires_at:   # the mail server took its time
            return "expired", None
        smtp.sendmail(SENDER, [job["email"]], mail)
    # All errors of smtplib are OSErrors; at login, bad Base64 is a ValueError.
    except (OSError, ValueError) as error:
        close_session()   # many mail servers slow down a session with errors
        of_mail = smtplib.SMTPRecipientsRefused, smtplib.SMTPDataError
        refused = isinstance(error, of_mail) and reply_code(error) >= 500
        return "refused" if refused else "retry", error
    return "sent", None


LEVELS = {"unreadable": logging.ERROR, "expired": logging.WARNING, "sent": logging.INFO,
          "refused": logging.ERROR, "retry": logging.WARNING}


def settle(message, outcome, error):
    """Log the outcome, then ack or reject the job.

    Of a mail server's reply, only the code is logged: the text may quote an address.
    Errors without a code, such as a wrong certificate, have a reason.
    """
    job_id, code = message.properties.get("message_id", ""), reply_code(error)
    reason = str(error) if isinstance(error, OSError) and not code else "-"
    log.log(LEVELS[outcome], "event=job job=%s outcome=%s error=%s code=%s reason=%s",
            job_id if job_id.isalnum() else "-", outcome,
            type(error).__name__ if error else "-", code or "-", json.dumps(reason))
    if outcome == "retry":
        message.reject()
    else:
        message.ack()


def reply_code(error):
    """The mail server's reply code in an exception of smtplib, or None."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        [(code, _)] = error.recipients.values()   # each mail has one recipient
        return code
    return getattr(error, "smtp_code", None)


# -- SMTP ------------------------------------------------------------------------------

TLS = ssl.create_default_context()   # it verifies certificates
smtp = None   # the open session: opening one may take longer than sending a mail
mails = 0     # in this session


def open_session():
    """Open a session, encrypted and logged in as the settings say, unless the open one
    takes one more mail."""
    global smtp, mails
    mails += 1
    if smtp and mails <= SESSION_MAILS:
        return
    close_session()
    options = {"host": SMTP_HOST, "port": SMTP_PORT, "timeout": SMTP_GREETING,
               "local_hostname": DOMAIN}   # in EHLO: relays distrust a container's name
    try:
        session = (smtplib.SMTP_SSL(**options, context=TLS) if SMTP_TLS == "tls"
                   else smtplib.SMTP(**options))
        session.sock.settimeout(SMTP_TIMEOUT)
        if SMTP_TLS == "starttls":
            session.starttls(context=TLS)
        if SMTP_USERNAME:
            session.login(SMTP_USERNAME, SMTP_PASSWORD)
        session.ehlo_or_helo_if_needed()   # else sendmail() would, past the deadline
    except (OSError, ValueError):
        time.sleep(RETRY_DELAY)   # a wrong password is tried at most 20 times a minute
        raise
    smtp, mails = session, 1


def close_session():
    """Say QUIT and close the session. The answer may not come: do not wait for it."""
    global smtp
    if smtp:
        with suppress(OSError):   # the mail server may have hung up
            smtp.putcmd("quit")
        smtp.close()
    smtp = None


# -- The loop --------------------------------------------------------------------------


def stop(signal_number, frame):
    """SIGTERM or Ctrl-C: finish the mail in progress, then end."""
    global stopping
    stopping = True


def consume(connection):
    """Take jobs until a signal comes or the connection breaks.

    kombu's ConsumerMixin does not stop while RabbitMQ is down, and after SIGTERM it
    sends one more mail.
    """
    channel = connection.default_channel
    RETRY_QUEUE.declare(channel=channel)   # Consumer declares the other one
    consumer = Consumer(
        channel, [MAIL_QUEUE], on_message=on_message, accept=["json"],
        # Without this, a job that kombu cannot decompress would come again and again.
        on_decode_error=lambda message, error: settle(message, "unreadable", error),
        prefetch_count=1)   # one job at a time: leave the rest to others
    consumer.consume()
    log.info("event=consuming queue=%s", MAIL_QUEUE.name)
    while not stopping:
        try:
            connection.drain_events(timeout=1)   # calls on_message for a new job
        except TimeoutError:
            close_session()   # idle, and the mail server may not like that
        connection.heartbeat_check()
    consumer.cancel()   # when this round trip returns, RabbitMQ has our acks


def main():
    """Consume until a signal comes. Reconnect whenever the connection breaks."""
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping:
        connection = Connection(
            BROKER_URL, heartbeat=HEARTBEAT, connect_timeout=2,
            # With TLS, kombu fills in the host's name: the certificate must have it.
            ssl=BROKER_URL.startswith("amqps:") and {"server_hostname": None},
            transport_options={"read_timeout": 5, "write_timeout": 5})
        try:
            other_hosts = BROKER_URL.count(";")   # each is tried once
            connection.ensure_connection(
                max_retries=other_hosts, interval_start=0, interval_step=0)
            consume(connection)
        except Exception as error:   # kombu and amqp have no class for all of theirs
            log.warning("event=outage server=broker error=%s reason=%s",
                        type(error).__name__, json.dumps(str(error)))
            time.sleep(1)
        finally:
            connection.collect()   # close() would wait for RabbitMQ
    log.info("event=stopped")


if __name__ == "__main__":
    main()
