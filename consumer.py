"""Takes mail jobs from RabbitMQ and hands the mails to the mail server.

    service.py --> queue "mail" --> consumer.py --> mail server
                                        +--> queue "mail.dead"

Run:    python consumer.py          as many as you like: they share the queue

What becomes of a job. The first match wins; the last column says how it is settled:
ack deletes it from the queue, reject moves it to mail.dead.

    unreadable    it cannot be turned into a mail                  reject
    sent-before   this process has sent it, but the connection
                  broke before the broker had the ack              ack
    expired       its deadline has passed: nothing is sent         ack
    sent          the mail server has accepted the mail            ack
    refused       the mail server refuses it for good: 5xx for
                  the recipient or the content                     reject
    retry         any other trouble: connection, login, 4xx, or
                  5xx for the sender: tried again in seconds       not yet

A job whose deadline passes while no consumer holds it is moved to mail.dead by the
broker. If a consumer dies or loses the broker before the ack, or the mail server's
answer is lost, a mail may be sent again, with the same Message-ID.
"""

import html
import logging
import os
import re
import signal
import smtplib
import socket
import ssl
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.utils import formataddr, formatdate, parseaddr

from amqp.exceptions import AMQPError
from dotenv import load_dotenv
from kombu import Connection, Consumer, Queue
from kombu.exceptions import KombuError

# -- Settings: environment variables; .env fills in what is not set --------------------


def setting(name, default=None, pattern=".+"):
    """The text of an environment variable. It must match the regular expression."""
    text = os.environ.get(name) or default
    if text is None or not re.fullmatch(pattern, text) or re.search(NOT_UTF8, text):
        raise SystemExit(f"{name} is missing or malformed; see .env.example")
    return text


NOT_UTF8 = "[\ud800-\udfff]"   # what Python makes of other bytes
ADDRESS = "[0-9A-Za-z.!#$%&'*+/=?^_`{|}~-]+@[0-9A-Za-z._-]+"   # RFC 5322, unquoted
JOB_ID = "[0-9A-Za-z-]+"
PORT = ("(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}"
        "|[1-9][0-9]{0,3})")
HOST = r"([0-9A-Za-z_-]{1,63}(\.[0-9A-Za-z_-]{1,63})*\.?)"
# user:password@host:port. In a password, / ? # @ ; and % are to be percent-encoded.
SERVER = rf"((%[0-9A-Fa-f]{{2}}|[^%/?#@;])*@)?(\[[^]]+\]|{HOST})?(:{PORT})?"
AMQP = f"amqps?://{SERVER}(/[^#@;]*)?"

load_dotenv()
BROKER_URL = setting("BROKER_URL", None, f"{AMQP}(;{AMQP})*")
SMTP_HOST = setting("SMTP_HOST", "localhost", f"{HOST}|[0-9A-Fa-f:.]+")   # or IPv6
SMTP_PORT = int(setting("SMTP_PORT", "1025", PORT))
SMTP_USERNAME = setting("SMTP_USERNAME", "", "[ -~]*")   # ASCII, as smtplib asks
SMTP_PASSWORD = setting("SMTP_PASSWORD", "", "[ -~]*")
SMTP_TLS = setting("SMTP_TLS", "none", "none|starttls|tls")
MAIL_FROM = setting("MAIL_FROM", None,   # Ann <ann@example.com>, or without the name
                    f'{ADDRESS}|("[^"]*"|[^",;:<>@]*) <{ADDRESS}>')
LOG_LEVEL = setting(
    "LOG_LEVEL", "INFO", "(?i)debug|info|warning|error|critical").upper()

NAME, SENDER = parseaddr(MAIL_FROM)
SMTP_GREETING = 20    # seconds for the connection and the mail server's greeting
SMTP_TIMEOUT = 90     # seconds for each answer: a relay may take a minute to reply 250
HEARTBEAT = 5         # seconds; a consumer that misses two loses its jobs to others
RETRY_DELAY = 3       # seconds until a job is tried again, at the earliest
PREFETCH = 1000       # unsettled jobs, including those that wait for a retry
logging.Formatter.converter = time.gmtime
logging.basicConfig(level=LOG_LEVEL, stream=sys.stdout, datefmt="%Y-%m-%dT%H:%M:%SZ",
                    format="time=%(asctime)s level=%(levelname)s %(message)s")
log = logging.getLogger("consumer")

# -- Topology: service.py has the same lines -------------------------------------------

DEAD_QUEUE = Queue("mail.dead", queue_arguments={   # jobs that could not be mailed
    "x-queue-type": "quorum",               # on disk, replicated in a cluster
    "x-message-ttl": 7 * 24 * 3600 * 1000,  # milliseconds: a week to look at them
    "x-max-length": 10_000})                # drops the oldest beyond that
MAIL_QUEUE = Queue("mail", queue_arguments={
    "x-queue-type": "quorum",
    "x-max-length": 100_000, "x-overflow": "reject-publish",  # full: a nack
    "x-delivery-limit": 1_000_000,          # none, in effect: each job has a deadline
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": DEAD_QUEUE.name})

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


def build(job, message_id):
    """The mail of a job, as text and HTML, or any exception if the job is malformed.

    The Message-ID is the job's, so that a mailbox can recognise a second copy.
    """
    if not re.fullmatch(ADDRESS, job["email"]):
        raise ValueError("the address is malformed")
    if not re.fullmatch(JOB_ID, message_id):
        raise ValueError("the id is malformed")
    subject, text = MAILS[job["template"]]
    issued = time.strftime("%H:%M:%S UTC on %d %B %Y", time.gmtime(job["issued_at"]))
    text = text.format(
        **job, issued=issued, lifetime=job["expires_at"] - job["issued_at"])
    paragraphs = html.escape(text).replace("\n\n", "</p>\n<p>")
    mail = MIMEMultipart("alternative", boundary=message_id, _subparts=[
        MIMEText(text), MIMEText(f"<p>{paragraphs}</p>", "html")])
    mail["From"], mail["To"] = formataddr((NAME, SENDER)), job["email"]
    mail["Subject"], mail["Date"] = subject, formatdate()
    mail["Message-ID"] = f"<{message_id}@{SENDER.rpartition('@')[2]}>"
    mail["Auto-Submitted"] = "auto-generated"   # RFC 3834: auto-responders keep quiet
    return mail.as_string()   # a third of the time that EmailMessage takes


# -- One job ---------------------------------------------------------------------------

retries = deque()               # (when, message), not settled yet
sent = deque(maxlen=PREFETCH)   # ids of the last mails; at most PREFETCH acks are lost
stopping = False                # set by a signal


def on_message(message):
    """Try a job, and settle it as the table at the top says."""
    if not stopping:   # otherwise, the broker delivers it again later
        outcome, error = process(message)
        settle(message, outcome, error)


def process(message):
    """Try to send the mail of a job: (its outcome, the error behind it or None)."""
    message_id = message.properties.get("message_id")
    try:
        job = message.payload
        expires_at, mail = float(job["expires_at"]), build(job, message_id)
    except Exception as error:   # whatever it is: in mail.dead, somebody can look at it
        return "unreadable", error
    if message.delivery_info["redelivered"] and message_id in sent:
        return "sent-before", None
    if not time.time() < expires_at:   # NaN counts as expired
        return "expired", None
    try:
        with heartbeats(message.channel.connection):
            open_session()
            if not time.time() < expires_at:   # the mail server took its time
                return "expired", None
            send(job["email"], mail)
    except (smtplib.SMTPRecipientsRefused, smtplib.SMTPDataError) as error:
        return ("refused" if reply_code(error) >= 500 else "retry"), error
    except (OSError, ValueError) as error:   # OSError: every exception of smtplib.
        return "retry", error                # ValueError: an answer that is no Base64
    sent.append(message_id)
    return "sent", None


LEVELS = {"unreadable": logging.ERROR, "refused": logging.ERROR,
          "expired": logging.WARNING, "retry": logging.WARNING,
          "sent": logging.INFO, "sent-before": logging.INFO}


def settle(message, outcome, error=None):
    """Log the outcome; then ack or reject the job, or keep it for a retry.

    Of an error, only class and code are logged: mail servers' replies quote addresses.
    """
    job = message.properties.get("message_id") or "-"
    log.log(LEVELS[outcome], "event=job job=%s outcome=%s error=%s code=%s",
            job if re.fullmatch(JOB_ID, job) else "malformed", outcome,
            type(error).__name__ if error else "-", reply_code(error) or "-")
    if outcome in ("unreadable", "refused"):
        message.reject()
    elif outcome == "retry":
        retries.append((time.monotonic() + RETRY_DELAY, message))
    else:
        message.ack()


# -- SMTP ------------------------------------------------------------------------------

smtp = None   # the open session: opening one takes longer than sending a mail


def send(email, mail):
    """Send a mail over the open session. A refusal leaves it open."""
    try:
        smtp.sendmail(SENDER, [email], mail)
    except OSError:
        reset_session()
        raise


def reset_session():
    """After an error, keep the session if the server still answers, else close it."""
    try:
        smtp.rset()
    except OSError:
        close_session()


def open_session():
    """Open a session if none is: encrypted and logged in as the settings say."""
    global smtp
    if smtp:
        return
    tls = ssl.create_default_context()   # verifies certificates
    server = {"host": SMTP_HOST, "port": SMTP_PORT, "timeout": SMTP_GREETING}
    try:
        session = (smtplib.SMTP_SSL(**server, context=tls) if SMTP_TLS == "tls"
                   else smtplib.SMTP(**server))
        session.sock.settimeout(SMTP_TIMEOUT)
        watch(session.sock)
        if SMTP_TLS == "starttls":
            session.starttls(context=tls)
        if SMTP_USERNAME:
            session.login(SMTP_USERNAME, SMTP_PASSWORD)
        session.ehlo_or_helo_if_needed()
        smtp = session
    except (OSError, ValueError):
        time.sleep(1)   # however many jobs wait, at most one try a second
        raise


def close_session():
    """Close the session without QUIT, which would wait for a server that hangs."""
    global smtp
    if smtp:
        smtp.close()
    smtp = None


def reply_code(error):
    """The reply code that an exception of smtplib carries, or None."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        [(code, _)] = error.recipients.values()   # each mail has one recipient
        return code
    return getattr(error, "smtp_code", None)


# -- Keeping a connection, and giving up a lost one ------------------------------------


@contextmanager
def heartbeats(connection):
    """Send heartbeats to RabbitMQ in the block, which may take minutes.

    Otherwise, RabbitMQ would give the job to another consumer, and that would mail it,
    too.
    """
    beating = False

    def beat(number, frame):   # the block itself writes nothing to RabbitMQ
        nonlocal beating
        if beating:   # the last one is still at it: it holds a lock
            return
        beating = True
        with suppress(OSError):
            connection.send_heartbeat()
        beating = False

    signal.signal(signal.SIGALRM, beat)
    signal.setitimer(signal.ITIMER_REAL, 2, 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def watch(sock):
    """Have the kernel break a connection if the other machine is silent for 4 seconds.

    It asks every second. A server that takes its time has a kernel that answers. Where
    the network has lost the connection, nobody does.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1),
                          (socket.TCP_USER_TIMEOUT, 4000)):   # s, s, ms
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


# -- The loop --------------------------------------------------------------------------


def stop(number, frame):
    """SIGTERM or Ctrl-C: finish the mail in progress, then end."""
    global stopping
    stopping = True


def consume(connection):
    """Take jobs until a signal comes or the connection breaks.

    kombu's ConsumerMixin would not end while the broker is down, and it would send one
    more mail after SIGTERM.
    """
    channel = connection.default_channel
    DEAD_QUEUE.declare(channel=channel)   # Consumer declares the other one
    retries.clear()   # the broker delivers them again
    consumer = Consumer(
        channel, [MAIL_QUEUE], on_message=on_message, accept=["json"],
        # A job that kombu cannot decompress does not reach on_message. Without this,
        # kombu would raise, and the job would come back again and again.
        on_decode_error=lambda message, error: settle(message, "unreadable", error),
        prefetch_count=PREFETCH)
    consumer.consume()
    log.info("event=consuming queue=%s", MAIL_QUEUE.name)
    while not stopping:
        wait(connection)
    consumer.cancel()   # when this round trip returns, the broker has our acks


def wait(connection):
    """Retry the first job if it is due. Then wait up to a second for the broker."""
    seconds = 1
    if retries and retries[0][0] <= time.monotonic():
        on_message(retries.popleft()[1])
        seconds = 0   # the next one may be due, too
    try:
        connection.drain_events(timeout=seconds)   # calls on_message for a new job
    except TimeoutError:
        if seconds:
            close_session()   # idle: it would grow stale
    connection.heartbeat_check()


def main():
    """Consume until a signal comes. Reconnect whenever the connection breaks."""
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping:
        connection = Connection(
            BROKER_URL, heartbeat=HEARTBEAT, connect_timeout=2,
            transport_options={"read_timeout": 5, "write_timeout": 5})
        try:
            other_hosts = BROKER_URL.count(";")
            connection.ensure_connection(
                max_retries=other_hosts, interval_start=0, interval_step=0)
            watch(connection.connection.sock)
            consume(connection)
        except (AMQPError, KombuError, OSError) as error:
            log.warning("event=outage server=broker error=%s", type(error).__name__)
            time.sleep(1)
        finally:
            connection.collect()   # a proper close() would wait for the broker
    log.info("event=stopped")


if __name__ == "__main__":
    main()
