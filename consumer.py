"""Takes mail jobs from RabbitMQ and hands the mails to the mail server.

    service.py --> queue "mail" --> consumer.py --> mail server
                                        +--> queue "mail.dead"

Run:    python consumer.py          as many as you like: they share the queue

What becomes of a job: the first row that fits counts, the last column settles it.

    a signal to stop has come                      leave it to others    (never)
    nothing can be made of it                      dead-letter it        reject
    this process sent it before, and then the
    connection broke, so it was delivered again    nothing more to do    ack
    its time is over, the code in it is dead       send nothing          ack
    the mail server takes the mail                                       ack
    the mail server refuses the mail for good,     dead-letter it        reject
    5xx
    any other trouble: connection, login, 4xx      from the top in 1 s   (not yet)
"""

import html
import logging
import os
import signal
import smtplib
import ssl
import sys
import time
from collections import deque
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.policy import SMTP
from email.utils import formataddr, formatdate, parseaddr

from amqp.exceptions import AMQPError
from dotenv import load_dotenv
from kombu import Connection, Consumer, Queue
from kombu.common import eventloop
from kombu.exceptions import KombuError

# -- Settings: the environment, else .env ----------------------------------------------


def setting(name, default=None):
    """An environment variable; a whole number if its default is one."""
    text = os.environ.get(name) or default
    if text is None or isinstance(default, int) and not str(text).isdecimal():
        raise SystemExit(f"{name} is missing or malformed; .env.example explains it")
    return int(text) if isinstance(default, int) else text


load_dotenv()
BROKER_URL = setting("BROKER_URL")
SMTP_HOST = setting("SMTP_HOST", "localhost")
SMTP_PORT = setting("SMTP_PORT", 1025)
SMTP_USERNAME = setting("SMTP_USERNAME", "")
SMTP_PASSWORD = setting("SMTP_PASSWORD", "")
SMTP_TLS = setting("SMTP_TLS", "none")
MAIL_FROM = formataddr(parseaddr(setting("MAIL_FROM")))   # "a@b" or "Ann <a@b>"
LOG_LEVEL = setting("LOG_LEVEL", "INFO").upper()
if SMTP_TLS not in ("none", "starttls", "tls"):
    raise SystemExit("SMTP_TLS must be none, starttls or tls")

SENDER = parseaddr(MAIL_FROM)[1]
SMTP_TIMEOUT = 4      # seconds for each answer of the mail server
RETRY_AFTER = 1       # seconds until a job is tried again, or a broken connection
PREFETCH = 1000       # unsettled jobs: so many can wait and hold up no other
STOP_WITHIN = 7       # seconds from SIGTERM to the end, whatever hangs
logging.Formatter.converter = time.gmtime
logging.basicConfig(level=LOG_LEVEL, stream=sys.stdout, datefmt="%Y-%m-%dT%H:%M:%SZ",
                    format="time=%(asctime)s level=%(levelname)s %(message)s")
log = logging.getLogger("consumer")

# -- Topology: the same lines stand in service.py --------------------------------------

DEAD_QUEUE = Queue("mail.dead", queue_arguments={
    "x-queue-type": "quorum",               # on disk, and on several nodes if there are
    "x-message-ttl": 7 * 24 * 3600 * 1000,  # milliseconds: a week to look at them
    "x-max-length": 10_000})                # then the oldest go
MAIL_QUEUE = Queue("mail", queue_arguments={
    "x-queue-type": "quorum",
    "x-max-length": 100_000, "x-overflow": "reject-publish",  # full: a nack, and a 503
    "x-delivery-limit": 1_000_000,          # a job ends by its deadline instead
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": DEAD_QUEUE.name})

# -- The three mails -------------------------------------------------------------------


def mime(subject, text):
    """A mail in both forms with its {fields} still to fill in: making one is slow."""
    paragraphs = html.escape(text).replace("\n\n", "</p>\n<p>")
    mail = MIMEMultipart("alternative", _subparts=[   # base64 would hide {fields}
        MIMEText(text, "plain", "us-ascii"),
        MIMEText(f"<p>{paragraphs}</p>", "html", "us-ascii")])
    mail["From"], mail["To"], mail["Date"] = "{sender}", "{email}", "{date}"
    mail["Subject"], mail["Message-ID"] = subject, "{message_id}"
    mail["Auto-Submitted"] = "auto-generated"   # RFC 3834: nobody's robot shall answer
    return mail.as_string(policy=SMTP)


MAILS = {
    "code": mime("Your code", """\
This is the code for your new account:

{code}

It was issued at {issued} and works for {lifetime:.0f} seconds.
If you asked more than once, only the newest code works.

You did not ask for it? Then somebody mistyped an address: please ignore this mail."""),
    "notice": mime("You already have an account", """\
Somebody, probably you, has just tried to register this address.
It has an active account already, and nothing about that account has changed."""),
    "confirmation": mime("Your account is active", """\
Welcome! This address is confirmed, and your account is active."""),
}


def build(job, message_id):
    """The mail of a job, as bytes for SMTP; raises whatever is wrong with the job.

    The Message-ID is the job's, so that a mailbox can recognise a second copy.
    """
    if not (job["email"] + message_id).isprintable():
        raise ValueError("control characters")
    return MAILS[job["template"]].format(
        **job, sender=MAIL_FROM, date=formatdate(),
        message_id=f"<{message_id}@{SENDER.rpartition('@')[2]}>",
        lifetime=job["expires_at"] - job["issued_at"], issued=time.strftime(
            "%H:%M:%S UTC on %d %B %Y", time.gmtime(job["issued_at"]))).encode("ascii")


# -- One job ---------------------------------------------------------------------------

waiting = deque()               # (when to try again, message), not settled yet
sent = deque(maxlen=PREFETCH)   # ids: no more acks can be lost with a connection
smtp = None                     # the open session: opening one takes longer than a mail


def on_message(message):
    """Settle a job, or put it aside: the table at the top."""
    global smtp
    if stopping:
        return None              # the broker delivers it to another
    message_id = message.properties.get("message_id")
    try:
        job = message.payload
        expires_at, mail = float(job["expires_at"]), build(job, message_id)
    except Exception as error:   # whatever it is: dead-lettered, it can be looked at
        log_job("unreadable", message_id, error)
        return message.reject()
    if message.delivery_info["redelivered"] and message_id in sent:
        log_job("sent-before", message_id)
        return message.ack()
    if not time.time() < expires_at:   # so that NaN counts as expired
        log_job("expired", message_id)
        return message.ack()
    try:
        smtp = smtp or connect()
        smtp.sendmail(SENDER, [job["email"]], mail)
    except OSError as error:   # as all exceptions of smtplib are
        if smtp is None:
            time.sleep(RETRY_AFTER)   # no session: one try a second, not one a job
        disconnect()
        if refused_for_good(error):
            log_job("refused", message_id, error)
            return message.reject()
        log_job("retry", message_id, error)
        return waiting.append((time.monotonic() + RETRY_AFTER, message))
    sent.append(message_id)
    log_job("sent", message_id)
    return message.ack()


def log_job(outcome, message_id, error=None):
    """One line; of an error only class and code, since replies quote the address."""
    log.info("event=job id=%s outcome=%s error=%s code=%s", message_id, outcome,
             type(error).__name__ if error else "-", getattr(error, "smtp_code", "-"))


# -- SMTP ------------------------------------------------------------------------------


def connect():
    """A session, encrypted and logged in as the settings say."""
    tls = ssl.create_default_context()   # it verifies certificates
    server = {"host": SMTP_HOST, "port": SMTP_PORT, "timeout": SMTP_TIMEOUT}
    session = (smtplib.SMTP_SSL(**server, context=tls) if SMTP_TLS == "tls"
               else smtplib.SMTP(**server))
    if SMTP_TLS == "starttls":
        session.starttls(context=tls)
    if SMTP_USERNAME:
        session.login(SMTP_USERNAME, SMTP_PASSWORD)
    return session


def disconnect():
    """End the session; without QUIT, which would wait for a server that hangs."""
    global smtp
    if smtp:
        smtp.close()
    smtp = None


REFUSALS = (smtplib.SMTPSenderRefused, smtplib.SMTPRecipientsRefused,
            smtplib.SMTPDataError)


def refused_for_good(error):
    """Whether it is a 5xx for this mail.

    One for the greeting, TLS or login is about our settings: somebody will mend them.
    """
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        [(error.smtp_code, _)] = error.recipients.values()
    return isinstance(error, REFUSALS) and error.smtp_code >= 500


# -- The loop --------------------------------------------------------------------------

stopping = False


def stop(number, frame):
    """SIGTERM or Ctrl-C: finish the mail under way. SIGALRM: it hangs, so end now."""
    global stopping
    stopping = True
    if number == signal.SIGALRM:
        raise SystemExit
    signal.alarm(STOP_WITHIN)


def consume(connection):
    """Take jobs until a signal or until the connection breaks.

    A plain loop: kombu's ConsumerMixin does not end while the broker is down, and
    sends one more mail after SIGTERM.
    """
    channel = connection.default_channel
    DEAD_QUEUE.declare(channel=channel)
    waiting.clear()   # the broker delivers them again
    Consumer(channel, [MAIL_QUEUE], on_message=on_message, accept=["json"],
             # By default kombu acks what it cannot decode, and it would be gone.
             on_decode_error=lambda message, error: message.reject(),
             prefetch_count=PREFETCH).consume()
    log.info("event=consuming queue=%s", MAIL_QUEUE.name)
    while not stopping:
        connection.heartbeat_check()
        pause = waiting[0][0] - time.monotonic() if waiting else RETRY_AFTER
        if pause <= 0:
            on_message(waiting.popleft()[1])
        taken = list(eventloop(connection, limit=1, timeout=max(0, pause),
                               ignore_timeouts=True))   # [] if nothing came
        if not taken and not waiting:
            disconnect()   # while idle, so that no session grows stale
    MAIL_QUEUE.declare(channel=channel)   # its answer tells that our acks have arrived


def main():
    """Consume until a signal, over as many connections as it takes."""
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGALRM:
        signal.signal(number, stop)
    while not stopping:
        connection = Connection(
            BROKER_URL, heartbeat=20, connect_timeout=2,
            transport_options={"read_timeout": 5, "write_timeout": 5})
        try:
            connection.ensure_connection(
                max_retries=BROKER_URL.count(";"), interval_start=0, interval_step=0)
            consume(connection)
        except (AMQPError, KombuError, OSError) as error:
            log.warning("event=outage error=%s", type(error).__name__)
            time.sleep(RETRY_AFTER)
        finally:
            connection.collect()   # close() would wait for the broker
    log.info("event=stopped")


if __name__ == "__main__":
    main()
