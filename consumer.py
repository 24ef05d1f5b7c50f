"""Takes mail jobs from RabbitMQ and hands the mails to the mail server.

    service.py --> queue "mail" --> consumer.py --> mail server
                                        +--> queue "mail.dead"

Run:    python consumer.py          as many as you like, they share the queue

What becomes of a job; each one is settled once, by the last word of its row:

    it cannot be read, or makes no mail            dead-letter it       reject
    this process sent it already (redelivered)     do nothing more      ack
    its time is over: the code in it is dead       send nothing         ack
    the mail server takes the mail                                      ack
    the mail server refuses it for good, 5xx       dead-letter it       reject
    any other trouble: connection, login, 4xx      try again in 1 s     (later)
"""

import html
import logging
import os
import signal
import smtplib
import socket
import ssl
import sys
import time
from collections import deque
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, parseaddr

from amqp.exceptions import AMQPError
from dotenv import load_dotenv
from kombu import Connection, Consumer, Queue
from kombu.exceptions import KombuError

# -- Settings: the environment, else .env ----------------------------------------------


def setting(name, default=None):
    """An environment variable, of its default's type; without one it is required."""
    text = os.environ.get(name) or default
    if text is None:
        raise SystemExit(f"{name} is not set; .env.example explains it")
    try:
        return type(default or "")(text)
    except ValueError:
        raise SystemExit(f"{name} must be a whole number, not {text!r}") from None


load_dotenv()
BROKER_URL = setting("BROKER_URL")
SMTP_HOST = setting("SMTP_HOST", "localhost")
SMTP_PORT = setting("SMTP_PORT", 1025)
SMTP_USERNAME = setting("SMTP_USERNAME", "")
SMTP_PASSWORD = setting("SMTP_PASSWORD", "")
SMTP_TLS = setting("SMTP_TLS", "none")          # none, starttls or tls
MAIL_FROM = setting("MAIL_FROM")
SENDER = parseaddr(MAIL_FROM)[1]                # a@b of "Ann <a@b>"
LOG_LEVEL = setting("LOG_LEVEL", "INFO")

if SMTP_TLS not in ("none", "starttls", "tls"):
    raise SystemExit("SMTP_TLS must be none, starttls or tls")

SMTP_TIMEOUT = 4       # seconds for each answer of the mail server
RETRY_AFTER = 1        # seconds until a job is tried again, or a broken connection
PREFETCH = 50          # jobs held at once; those that wait for a retry hold up no other
STOP_AFTER = 8         # seconds after SIGTERM, whatever hangs
logging.Formatter.converter = time.gmtime
logging.basicConfig(level=LOG_LEVEL, stream=sys.stdout, datefmt="%Y-%m-%dT%H:%M:%SZ",
                    format="time=%(asctime)s level=%(levelname)s %(message)s")
log = logging.getLogger("consumer")

# -- Topology: the same lines stand in service.py --------------------------------------

DEAD_QUEUE = Queue("mail.dead", queue_arguments={
    "x-queue-type": "quorum",                 # on disk, on several nodes if there are any
    "x-message-ttl": 7 * 24 * 3600 * 1000,    # milliseconds: a week to look at them
    "x-max-length": 10_000,                   # then the oldest go
})
MAIL_QUEUE = Queue("mail", queue_arguments={
    "x-queue-type": "quorum",
    "x-max-length": 100_000, "x-overflow": "reject-publish",   # full: nack, so 503
    "x-delivery-limit": 1_000_000,            # a job ends by its deadline instead
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": DEAD_QUEUE.name,
})

# -- The three mails -------------------------------------------------------------------

MAILS = {
    "code": ("Your code", """\
Hello,

this is the code for your new account:

{code}

It was issued at {issued} and works for {seconds:.0f} seconds. If you asked more than \
once, only the newest code works.

You did not ask for it? Then somebody mistyped their address; just ignore this mail."""),
    "notice": ("You already have an account", """\
Hello,

somebody, probably you, has just tried to register with this address. It already has an \
active account, and nothing about that account has changed.

It was not you? Then there is nothing that you need to do."""),
    "confirmation": ("Your account is active", """\
Welcome!

Your address is confirmed and your account is active."""),
}


def build(job, message_id):
    """A job's mail as bytes for SMTP."""
    subject, text = MAILS[job["template"]]
    if job["template"] == "code":
        issued = time.strftime("%H:%M:%S UTC on %d %B %Y", time.gmtime(job["issued_at"]))
        text = text.format(code=job["code"], issued=issued,
                           seconds=job["expires_at"] - job["issued_at"])
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = MAIL_FROM, job["email"], subject
    mail["Date"] = formatdate()
    mail["Message-ID"] = f"<{message_id}@{SENDER.rpartition('@')[2]}>"
    mail["Auto-Submitted"] = "auto-generated"            # RFC 3834: no automatic replies
    mail.set_content(text)
    mail.add_alternative("".join(f"<p>{html.escape(part)}</p>\n"
                                 for part in text.split("\n\n")), subtype="html")
    return mail.as_bytes(policy=SMTP)


# -- One job ---------------------------------------------------------------------------

sent = deque(maxlen=1000)      # message ids; far more than acks can be lost at once
waiting = deque()              # (when to try again, message), unsettled
session = None                 # with the mail server; closed when there is nothing to do


def on_message(message):
    """Settle a job, or put it aside: the decision table at the top."""
    message_id = message.properties.get("message_id")
    try:
        job = message.payload
        address, expires_at = job["email"], float(job["expires_at"])
        mail = build(job, message_id)
    except Exception as error:        # whatever is wrong with it, the next one goes on
        log_job("unreadable", message_id, error)
        return message.reject()
    if message.delivery_info["redelivered"] and message_id in sent:
        log_job("sent-before", message_id)
        return message.ack()
    if not time.time() < expires_at:                     # nor for NaN
        log_job("expired", message_id)
        return message.ack()
    try:
        send(mail, address)
    except OSError as error:                             # smtplib's are OSErrors
        disconnect()
        if refused_for_good(error):
            log_job("refused", message_id, error)
            return message.reject()
        log_job("retry", message_id, error)
        return waiting.append((time.monotonic() + RETRY_AFTER, message))
    sent.append(message_id)
    log_job("sent", message_id)
    message.ack()


def log_job(outcome, message_id, error=None):
    """One line a job; of an error only its class and code, replies quote addresses."""
    log.info("event=job id=%s outcome=%s error=%s code=%s", message_id, outcome,
             type(error).__name__, getattr(error, "smtp_code", None))


# -- SMTP ------------------------------------------------------------------------------


def send(mail, address):
    """Send over the open session, or over a new one."""
    global session
    session = session or connect()
    session.sendmail(SENDER, [address], mail)


def connect():
    """A session with the mail server, encrypted and logged in as the settings say."""
    tls = ssl.create_default_context()                   # verifies the certificate
    if SMTP_TLS == "tls":
        smtp = smtplib.SMTP_SSL(SMTP_HOST, SMTP_PORT, timeout=SMTP_TIMEOUT, context=tls)
    else:
        smtp = smtplib.SMTP(SMTP_HOST, SMTP_PORT, timeout=SMTP_TIMEOUT)
    if SMTP_TLS == "starttls":
        smtp.starttls(context=tls)
    if SMTP_USERNAME:
        smtp.login(SMTP_USERNAME, SMTP_PASSWORD)
    return smtp


def disconnect():
    """Close the session; without a QUIT, which would wait for a server that hangs."""
    global session
    if session:
        session.close()
    session = None


def refused_for_good(error):
    """Whether the server answered 5xx to this mail, and not to the greeting or login."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        [(code, _)] = error.recipients.values()
        return code >= 500
    return (isinstance(error, (smtplib.SMTPSenderRefused, smtplib.SMTPDataError))
            and error.smtp_code >= 500)


# -- The loop --------------------------------------------------------------------------

stopping = False


def stop(signum, frame):
    """SIGTERM: finish the mail under way; SIGALRM: it took too long, another time."""
    global stopping
    stopping = True
    if signum == signal.SIGALRM:
        raise SystemExit(0)
    signal.alarm(STOP_AFTER)


def consume(connection):
    """Take jobs until SIGTERM or until the connection breaks."""
    channel = connection.default_channel
    MAIL_QUEUE(channel).declare()
    DEAD_QUEUE(channel).declare()
    waiting.clear()                                      # the broker delivers them again
    Consumer(channel, [MAIL_QUEUE], on_message=on_message, accept=["json"],
             on_decode_error=lambda message, error: message.reject(),
             prefetch_count=PREFETCH, auto_declare=False).consume()
    log.info("event=consuming queue=%s", MAIL_QUEUE.name)
    while not stopping:
        connection.heartbeat_check()
        due = waiting and waiting[0][0] <= time.monotonic()
        if due:
            on_message(waiting.popleft()[1])
        try:
            connection.drain_events(timeout=0 if due else RETRY_AFTER)
        except socket.timeout:
            if not due:
                disconnect()                             # idle, so no session grows stale


def main():
    """Consume until SIGTERM, over as many connections as it takes."""
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGALRM:
        signal.signal(number, stop)
    while not stopping:
        connection = Connection(BROKER_URL, heartbeat=60, connect_timeout=2,
                                transport_options={"read_timeout": 5, "write_timeout": 5})
        try:
            connection.ensure_connection(max_retries=BROKER_URL.count(";"),
                                         interval_start=0, interval_step=0)
            consume(connection)
        except (AMQPError, KombuError, OSError) as error:
            log.warning("event=outage error=%s", type(error).__name__)
            time.sleep(RETRY_AFTER)
        finally:
            connection.collect()                         # close() would wait for the broker
    log.info("event=stopped")


if __name__ == "__main__":
    main()
