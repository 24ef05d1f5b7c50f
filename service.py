"""Registration by e-mail: an account becomes active once its owner sends back a code.

    caller -- POST /users/register ---> service.py --> PostgreSQL: a waiting account
                                            +-------> RabbitMQ --> consumer.py --> mail
    caller -- PATCH /users/activate --> service.py --> PostgreSQL: an active account
                                            +-------> RabbitMQ --> consumer.py --> mail

Run:    gunicorn service:app    sync workers: each handles one request at a time
Read:   settings, topology, endpoints, errors, then the steps of the endpoints
Words:  waiting   registered, but its code has not been sent back yet
        job       the message that asks the consumer to send one mail
        notice    the mail to the owner of an active account that is registered again
        confirm   RabbitMQ's answer that it has a job on disk

Registering publishes the code before COMMIT. Without the confirm, there is no COMMIT.
If the confirm is lost, COMMIT fails or the worker dies in between, a mail may go out
whose code does not work. The caller, who got no 202, tries again.

Activating publishes after COMMIT: a mail must not announce what may still fail. If the
broker fails or the worker dies in between, the account is active, and its owner gets no
confirmation. If the broker is known to be down, it answers 503 and does nothing.
"""

import errno
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import select
import socket
import sys
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import psycopg2
from amqp.exceptions import AMQPError, MessageNacked
from dotenv import load_dotenv
from email_validator import validate_email
from flask import Flask, abort, g, redirect, request, send_file
from flask_swagger_ui import get_swaggerui_blueprint
from gunicorn.http.errors import ParseException
from kombu import Connection, Producer, Queue
from kombu.exceptions import KombuError
from nacl import pwhash
from nacl._sodium import ffi
from nacl.exceptions import CryptoError, InvalidkeyError
from psycopg2.errors import QueryCanceled
from psycopg2.extensions import POLL_OK, POLL_READ, set_wait_callback
from psycopg2.extras import NamedTupleCursor
from werkzeug.exceptions import HTTPException, ServiceUnavailable

# -- Settings: environment variables; .env fills in what is not set --------------------


def setting(name, default=None, pattern=".+"):
    """The text of an environment variable. It must match the regular expression."""
    text = os.environ.get(name) or default
    if text is None or not re.fullmatch(pattern, text) or re.search(NOT_UTF8, text):
        raise SystemExit(f"{name} is missing or malformed; see .env.example")
    return text


NOT_UTF8 = "[\ud800-\udfff]"   # what Python makes of other bytes
NUMBER = "[0-9]{1,9}"
PORT = ("(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}"
        "|[1-9][0-9]{0,3})")
HOST = r"([0-9A-Za-z_-]{1,63}(\.[0-9A-Za-z_-]{1,63})*\.?)"
# user:password@host:port. In a password, / ? # @ ; and % are to be percent-encoded.
SERVER = rf"((%[0-9A-Fa-f]{{2}}|[^%/?#@;])*@)?(\[[^]]+\]|{HOST})?(:{PORT})?"
AMQP = f"amqps?://{SERVER}(/[^#@;]*)?"

load_dotenv()
DATABASE_URL = setting("DATABASE_URL", None,
                       f"postgres(ql)?://{SERVER}(,{SERVER})*([/?].+)?")
BROKER_URL = setting("BROKER_URL", None, f"{AMQP}(;{AMQP})*")   # one or several hosts
SECRET_KEY = setting("SECRET_KEY", None, ".{32,}")
CODE_LIFETIME = int(setting("CODE_LIFETIME", "60", "[1-9][0-9]{0,4}"))    # seconds
CODE_ATTEMPTS = int(setting("CODE_ATTEMPTS", "3", "[1-9][0-9]{0,3}"))     # wrong codes
# Requests per address and hour or day, and per client and endpoint.
EMAIL_LIMIT_HOUR = int(setting("EMAIL_LIMIT_HOUR", "5", NUMBER))          # register
EMAIL_LIMIT_DAY = int(setting("EMAIL_LIMIT_DAY", "20", NUMBER))           # register
ACTIVATE_LIMIT_HOUR = int(setting("ACTIVATE_LIMIT_HOUR", "100", NUMBER))  # activate
IP_LIMIT = int(setting("IP_LIMIT", "60", NUMBER))                         # in IP_WINDOW
TRUSTED_PROXIES = int(setting("TRUSTED_PROXIES", "0", "[0-9]"))   # in front of gunicorn

MAX_BODY = 4096           # bytes
TIMEOUT = 1               # seconds to wait for each answer of PostgreSQL and RabbitMQ
MAX_QUEUED = 2            # seconds that a request may wait for a worker
NOTICE_LIFETIME = 900     # seconds; then a notice or a confirmation is no longer sent
IP_WINDOW = 600           # seconds
# Seconds, sent with each 503. That request may count against IP_LIMIT. A client that
# waits this long between its tries stays within it.
RETRY_AFTER = math.ceil(IP_WINDOW / max(1, IP_LIMIT))

# -- Topology: consumer.py has the same lines ------------------------------------------

DEAD_QUEUE = Queue("mail.dead", queue_arguments={   # jobs that could not be mailed
    "x-queue-type": "quorum",               # on disk, replicated in a cluster
    "x-message-ttl": 7 * 24 * 3600 * 1000,  # milliseconds: a week to look at them
    "x-max-length": 10_000})                # drops the oldest beyond that
MAIL_QUEUE = Queue("mail", queue_arguments={
    "x-queue-type": "quorum",
    "x-max-length": 100_000, "x-overflow": "reject-publish",  # full: a nack
    "x-delivery-limit": 1_000_000,          # none, in effect: each job has a deadline
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": DEAD_QUEUE.name})

# -- The app and its endpoints ---------------------------------------------------------

app = Flask(__name__)
# Werkzeug truncates a chunked body to this length. With one byte more than we take,
# read_fields() sees that it was too long.
app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1
app.url_map.merge_slashes = False   # Werkzeug would redirect to the caller's own Host
# The edge (nginx) keeps this page for everybody. By default, the caller's Host would be
# in it.
app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.yaml", config={
    "oauth2RedirectUrl": "/docs/oauth2-redirect.html"}))


@app.post("/users/register")
def register():
    """Register an address, or register it again, and have a code mailed to it.

        {"email": "ann@example.com", "password": "correct horse"}

    202  the same for every address; the owner of an active account is sent a notice
    400  not JSON      413  over 4 KiB      415  not application/json
    422  a field is missing or not acceptable: see errors
    429  too many requests from this client or for this address
    503  a server is unavailable, or there is too much to do or no memory: try again
    """
    email, password = read_fields(email=canonical_email, password=canonical_password)
    if is_address(password, email):
        abort(422, [{"field": "password", "detail": "must not be your address"}])
    shed()
    connect()
    tidy()
    count_request("register client", client(), IP_LIMIT, IP_WINDOW)
    password_hash = hash_password(password)
    code = f"{secrets.randbelow(10_000):04}"
    # Even in autocommit mode, psycopg2 sends BEGIN here and COMMIT at the end. After an
    # exception it sends ROLLBACK, which takes back what was counted for the address.
    with db:
        count_request("register address hour", email, EMAIL_LIMIT_HOUR, 3600)
        count_request("register address day", email, EMAIL_LIMIT_DAY, 86400)
        waiting = upsert_waiting(email, password_hash, digest(email, code))
        if waiting:
            publish("code", email, waiting.issued_at, CODE_LIFETIME, code=code)
        else:
            publish("notice", email, time.time(), NOTICE_LIFETIME)
    return {"message": "A mail is on its way.", "expires_in": CODE_LIFETIME}, 202


@app.patch("/users/activate")
def activate():
    """Activate the account of the HTTP Basic credentials with the code that was mailed.

        {"code": "0427"}

    200  the account is active; a confirmation is mailed
    400  not JSON      413  over 4 KiB      415  not application/json
    401  no, malformed or wrong credentials, or no such account
    409  the credentials are right and the account is already active
    422  not four digits: see errors; or the code is wrong, expired, superseded, used up
    429  too many requests from this client or for this address
    503  as above: try again; a 409 then means that the first request activated it
    """
    email, password = read_credentials()
    [code] = read_fields(code=four_digits)
    shed()
    connect()
    tidy()
    count_request("activate client", client(), IP_LIMIT, IP_WINDOW)
    count_request("activate address hour", email, ACTIVATE_LIMIT_HOUR, 3600)
    account = select_account(email)
    if not password_matches(account, password):
        abort(401, "The address or the password is wrong.")
    if account.activated_at:
        abort(409, "The account is already active.")
    # Not in `with db:`, so the attempt is committed before abort() raises. A ROLLBACK
    # would forget it, and CODE_ATTEMPTS would limit nothing.
    if not spend_attempt(account, digest(email, code)):
        abort(422, "The code is wrong, expired, superseded or used up.")
    mail_confirmation(email)
    return {"message": "The account is active."}


@app.get("/healthz")
def healthz():
    """200 if both servers answer, else 503 naming the one that does not."""
    connect()
    execute("SELECT 1")
    MAIL_QUEUE.declare(channel=producer.channel)   # a round trip to the broker
    return {"database": "ok", "broker": "ok"}


@app.get("/openapi.yaml")
def openapi():
    """The HTTP contract, which /docs/ shows."""
    return send_file("openapi.yaml", mimetype="application/yaml")


@app.get("/docs")
def docs():
    """To the page, which the blueprint serves."""
    return redirect("/docs/", 308)


# -- Every error of the app leaves here, as problem details (RFC 9457) -----------------


@app.errorhandler(HTTPException)
def problem(error):
    """The HTTPException as problem+json. A list as its description becomes errors."""
    if error.code == 500:
        disconnect()   # a bug: the state of the connections is unknown
    body = {"title": error.name, "status": error.code, "detail": error.description}
    if isinstance(error.description, list):
        body["detail"] = "Some fields are not acceptable."
        body["errors"] = error.description
    response = error.get_response()   # it carries Allow and Retry-After
    response.data = json.dumps(body) + "\n"
    response.content_type = "application/problem+json"
    if error.code == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="users", charset="UTF-8"'
    return response


@app.before_request
def begin():
    """Record the start time, for the log and for log_outage()."""
    g.began = time.monotonic()


@app.after_request
def finish(response):
    """Keep answers out of caches. Log the request without path, query and headers."""
    if request.path.startswith("/users/"):
        response.headers["Cache-Control"] = "no-store"
    app.logger.info(
        "event=request client=%s method=%s route=%s status=%s job=%s ms=%.0f",
        caller() or "unknown", request.method, request.url_rule or "-",
        response.status_code, g.get("job", "-"), 1000 * (time.monotonic() - g.began))
    return response


# -- Reading the request ---------------------------------------------------------------

# Django's list, as `make common-passwords` writes it; LICENSE has its licence.
COMMON_PASSWORDS = frozenset(
    Path(__file__).with_name("common-passwords.txt").read_text().splitlines())


def read_fields(**checks):
    """The named text fields of the JSON body in that order, or 415, 413, 400 or 422.

    A check returns a text's canonical form or raises ValueError. All fields are needed:
    what is missing or not a string is checked as "". Others are ignored.
    """
    if request.mimetype != "application/json":
        abort(415, "The body must be application/json.")
    try:
        content = request.get_data()
        if len(content) > MAX_BODY:
            abort(413)
        body = json.loads(content.decode(), object_pairs_hook=unique_keys,
                          parse_constant=no_constant)
    except (ValueError, RecursionError, ParseException) as error:
        # gunicorn raises ParseException for a malformed chunk.
        abort(400, f"The body cannot be read as JSON: {error}")
    values, errors = [], []
    for field, check in checks.items():
        text = body.get(field) if isinstance(body, dict) else None
        try:
            values.append(check(text if isinstance(text, str) else ""))
        except ValueError as error:
            errors.append({"field": field, "detail": str(error)})
    if errors:
        abort(422, errors)
    return values


def unique_keys(pairs):
    """A JSON object. RFC 8259 leaves duplicate keys undefined, so they are refused."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def no_constant(name):
    """Refuse NaN and Infinity, which JSON does not have but Python's json reads."""
    raise ValueError(name)


def canonical_email(text):
    """The one form in which an address is stored: ASCII, lower case, IDNA domain.

    At most 254 characters (RFC 5321). No DNS look-up: the mail is the proof.
    """
    return validate_email(text, check_deliverability=False,
                          allow_smtputf8=False).ascii_email.lower()


def canonical_password(text):
    """NFC (RFC 8265), 8 to 128 code points, none that HTTP Basic forbids (RFC 7617).

    No composition rules; common passwords are refused: NIST SP 800-63B, 5.1.1.2.
    """
    text = unicodedata.normalize("NFC", text)
    if not 8 <= len(text) <= 128:
        raise ValueError("must be a string of 8 to 128 characters")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ValueError("must not have control characters or lone surrogates")
    if text.lower() in COMMON_PASSWORDS:
        raise ValueError("is among the most common passwords")
    return text


def is_address(password, email):
    """Whether the password is the address, however typed, or its local part."""
    with suppress(ValueError):
        password = canonical_email(password)
    return password.lower() in (email, email.partition("@")[0])


def four_digits(text):
    """A code. isdigit() would also take the digits of every other script."""
    if not re.fullmatch("[0-9]{4}", text):
        raise ValueError("must be a string of four digits")
    return text


def read_credentials():
    """Address and password from HTTP Basic (RFC 7617), or 401."""
    with suppress(ValueError):
        basic = request.authorization
        if basic and basic.type == "basic":
            return canonical_email(basic.username), canonical_password(basic.password)
    abort(401, "The address or the password is wrong.")


def caller():
    """The caller's IP address, or None if what our proxies say is not one.

    Each proxy appends the address that it sees to X-Forwarded-For. If there are fewer
    than TRUSTED_PROXIES, it is the address of the last one. Werkzeug's ProxyFix would
    not do: it finds no address after a quotation mark, which a caller may send.
    """
    forwarded = request.headers.get("X-Forwarded-For")
    hops = forwarded.split(",") if forwarded else []
    trusted = 0 < TRUSTED_PROXIES <= len(hops)
    hop = hops[-TRUSTED_PROXIES] if trusted else request.remote_addr
    with suppress(ValueError):
        # Without the zone of an IPv6 address, which may be any text.
        address = ipaddress.ip_address(hop.strip().partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address


def client():
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 address."""
    if not (address := caller()):
        return "unknown"   # such clients share a limit
    prefix = 64 if address.version == 6 else 32
    return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))


# -- The worker's two connections ------------------------------------------------------

db = producer = None             # connect() opens both, disconnect() drops both
# After a server has timed out, log_outage() sets its name here, and the instant of
# time.monotonic() until which connect() answers 503.
stalled_server, refuse_until = "", 0
broker = Connection(BROKER_URL, connect_timeout=TIMEOUT, transport_options={
    "confirm_publish": True, "read_timeout": TIMEOUT, "write_timeout": TIMEOUT})


def connect():
    """Open both connections if one is missing or broken. 503 just after a stall."""
    global db, producer
    if time.monotonic() < refuse_until:
        raise unavailable(stalled_server)
    if db:
        # An idle server sends nothing (we ask for no heartbeats), unless it closes the
        # connection. RabbitMQ also announces alarms. Anything to read: reconnect.
        unusable, _, _ = select.select([db, broker.connection.sock], [], [], 0)
        if not unusable:
            return
    disconnect()
    other_hosts = BROKER_URL.count(";")   # kombu counts the tries after the first
    broker.ensure_connection(
        max_retries=other_hosts, interval_start=0, interval_step=0)
    channel = broker.default_channel
    DEAD_QUEUE.declare(channel=channel)
    MAIL_QUEUE.declare(channel=channel)
    producer = Producer(channel)
    session = psycopg2.connect(DATABASE_URL, cursor_factory=NamedTupleCursor)
    session.autocommit = True   # a statement outside of `with db:` commits by itself
    # PostgreSQL gives up a little sooner than wait_for_database(). Otherwise, a
    # statement for which nobody waits would keep its locks. A transaction may idle for
    # three seconds: publish() may wait TIMEOUT two or three times. Every statement
    # can use an index: the planner is to do so even before it has statistics.
    session.cursor().execute("""
        SET statement_timeout = '900ms';
        SET idle_in_transaction_session_timeout = '3s';
        SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off
        """)
    db = session   # last: it says that both are open


def disconnect():
    """Close both connections, without kombu's close(): it would wait for the broker."""
    global db, producer
    if db:
        db.close()
    db = producer = None
    broker.collect()


def wait_for_database(session):
    """psycopg2 calls this to wait for an answer: libpq has no timeout for that."""
    while (state := session.poll()) != POLL_OK:
        reading, writing = ([session], []) if state == POLL_READ else ([], [session])
        if not any(select.select(reading, writing, [], TIMEOUT)):
            raise psycopg2.OperationalError("no answer in time")


set_wait_callback(wait_for_database)

# -- When a server is slow or fails ----------------------------------------------------


def shed():
    """503 if the request has waited for over MAX_QUEUED since its last byte came.

    Otherwise, while servers answer slowly, the workers would only handle requests whose
    callers have given up.
    """
    with suppress(OSError, KeyError):   # a Unix socket, or not gunicorn
        info = request.environ["gunicorn.socket"].getsockopt(
            socket.IPPROTO_TCP, socket.TCP_INFO, 56)
        waited = int.from_bytes(info[52:], sys.byteorder)   # tcpi_last_data_recv, in ms
        if waited > 1000 * MAX_QUEUED:
            raise unavailable("service")


BROKER_ERRORS = AMQPError, MessageNacked, KombuError, OSError   # OSError: sockets
FAILURES = psycopg2.Error, *BROKER_ERRORS, CryptoError   # CryptoError: no memory


def log_outage(error):
    """Log which server failed and why. Return the server's name.

    Nothing is tried again here: a statement without an answer may have taken effect.

    A request that took 0.9 seconds or longer has probably run into a timeout, ours or
    PostgreSQL's statement_timeout. Its worker refuses the next ones for a second.
    Otherwise, every queued request would wait a second as well.
    """
    global stalled_server, refuse_until
    # If the connection breaks inside `with db:`, its ROLLBACK raises InterfaceError.
    # What broke it is the cause.
    cause = error.__context__
    if isinstance(error, psycopg2.InterfaceError) and isinstance(cause, FAILURES):
        error = cause
    server = ("database" if isinstance(error, psycopg2.Error) else
              "broker" if isinstance(error, BROKER_ERRORS) else "service")
    if time.monotonic() - g.began >= 0.9:
        stalled_server, refuse_until = server, time.monotonic() + TIMEOUT
    reason = json.dumps(str(error).partition("\n")[0])   # further lines may quote rows
    app.logger.warning("event=outage server=%s error=%s reason=%s job=%s", server,
                       type(error).__name__, reason, g.get("job", "-"))
    return server


def unavailable(server):
    """A 503 that names the server."""
    return ServiceUnavailable(f"The {server} is temporarily unavailable.",
                              retry_after=RETRY_AFTER)


def answer_outage(error):
    """The 503 after one of FAILURES. The state of the connections is unknown."""
    disconnect()
    return problem(unavailable(log_outage(error)))


for kind in FAILURES:
    app.register_error_handler(kind, answer_outage)

# -- Passwords and codes ---------------------------------------------------------------


def hash_password(password):
    """Argon2id at 12 MiB, 3 passes, 1 lane: OWASP Password Storage, ASVS 5.0."""
    return pwhash.argon2id.str(password.encode(), 3, 12 << 20).decode()


DUMMY_HASH = hash_password(secrets.token_urlsafe())


def password_matches(account, password):
    """Whether it is the account's. Without an account, it checks a dummy hash, so that
    the answer takes as long."""
    password_hash = account.password_hash if account else DUMMY_HASH
    try:
        return pwhash.verify(password_hash.encode(), password.encode())
    except InvalidkeyError:
        # PyNaCl raises it for lack of memory, too. libsodium sets EINVAL on a mismatch.
        if ffi.errno != errno.EINVAL:
            raise
        return False


def digest(email, code):
    """HMAC-SHA256. Without a key, all codes could be tried on a stolen table."""
    return hmac.digest(SECRET_KEY.encode(), f"{email} {code}".encode(), "sha256")


# -- SQL, one function per statement ---------------------------------------------------


def execute(statement, **values):
    """Execute a statement with its %(named)s values, and return the cursor."""
    cursor = db.cursor()
    cursor.execute(statement, values)
    return cursor


# Each deletion goes on where this worker's last one ended. While a backup runs, deleted
# rows stay in the index, and a scan from its start would pass over all of them.
limits_deleted_to = users_deleted_to = "epoch"   # 1970, in PostgreSQL


def tidy():
    """In one of 30 requests, delete up to 300 expired limits; in another one, users.

    That is more than the requests add, so no cron job is needed.
    """
    global limits_deleted_to, users_deleted_to
    turn = secrets.randbelow(30)
    # Seldom from the beginning, for what came in behind us: a backup was restored, or
    # the database's clock was set back.
    anew = secrets.randbelow(100) == 0
    with suppress(QueryCanceled):   # during a backup, the beginning may take too long
        if turn == 0:
            limits_deleted_to = delete_limits("epoch" if anew else limits_deleted_to)
        elif turn == 1:
            users_deleted_to = delete_users("epoch" if anew else users_deleted_to)


def delete_limits(start):
    """Delete windows that are over, from start on. Return the end of the last one."""
    deleted = execute("""
        DELETE FROM limits
         WHERE (name, subject) IN (
               SELECT name, subject
                 FROM limits
                WHERE expires_at BETWEEN %(start)s AND now()
                ORDER BY expires_at
                LIMIT 300
                  FOR UPDATE SKIP LOCKED)   -- a locked row is in use
        RETURNING expires_at
        """, start=start)
    return max((row.expires_at for row in deleted), default=start)


def delete_users(start):
    """Delete accounts that have waited for a day, likewise."""
    deleted = execute("""
        DELETE FROM users
         WHERE email IN (
               SELECT email
                 FROM users
                WHERE activated_at IS NULL
                  AND expires_at < now()   -- CODE_LIFETIME may be longer than a day
                  AND registered_at BETWEEN %(start)s AND now() - interval '1 day'
                ORDER BY registered_at
                LIMIT 300
                  FOR UPDATE SKIP LOCKED)
        RETURNING registered_at
        """, start=start)
    return max((row.registered_at for row in deleted), default=start)


def count_request(name, subject, allowed, seconds):
    """Count a request of a client or an address in a fixed window, or 429.

    allowed is the number of requests in a window, which lasts so many seconds.
    """
    limit = execute("""
        INSERT INTO limits AS old (name, subject, count, expires_at)
        VALUES (%(name)s, %(subject)s, 1, now() + %(seconds)s * interval '1 second')
            ON CONFLICT (name, subject) DO UPDATE
           SET count = CASE WHEN old.expires_at > now() THEN old.count + 1 ELSE 1 END,
               expires_at = CASE WHEN old.expires_at > now() THEN old.expires_at
                                 ELSE excluded.expires_at END
        RETURNING count, ceil(extract(epoch FROM expires_at - now()))::int AS wait
        """, name=name, subject=subject, seconds=seconds).fetchone()
    if limit.count > allowed:
        abort(429, "Too many requests for this address or from this client.",
              retry_after=limit.wait)


def upsert_waiting(email, password_hash, code_digest):
    """Write password and code together. Return None if the account is active."""
    return execute("""
        INSERT INTO users AS old (email, password_hash, code_digest, expires_at)
        VALUES (%(email)s, %(password_hash)s, %(code_digest)s,
                now() + %(lifetime)s * interval '1 second')
            ON CONFLICT (email) DO UPDATE
           SET password_hash = excluded.password_hash,
               code_digest   = excluded.code_digest,
               expires_at    = excluded.expires_at,
               registered_at = now(),
               attempts      = 0
         WHERE old.activated_at IS NULL
        RETURNING extract(epoch FROM registered_at)::float AS issued_at
        """, email=email, password_hash=password_hash, code_digest=code_digest,
        lifetime=CODE_LIFETIME).fetchone()


def select_account(email):
    """The account of an address, or None."""
    return execute("""
        SELECT email, password_hash, activated_at
          FROM users
         WHERE email = %(email)s
        """, email=email).fetchone()


def spend_attempt(account, code_digest):
    """Count an attempt and compare its code in one atomic step: True if it activated.

    The condition names the hash that was verified. If the address has been registered
    again since, this password and its code are void, and no row is touched.
    """
    row = execute("""
        UPDATE users
           SET attempts     = attempts + 1,
               activated_at = CASE WHEN code_digest = %(code_digest)s THEN now() END
         WHERE email = %(email)s
           AND password_hash = %(password_hash)s
           AND activated_at IS NULL
           AND expires_at > now()
           AND attempts < %(allowed)s
        RETURNING activated_at
        """, email=account.email, password_hash=account.password_hash,
        code_digest=code_digest, allowed=CODE_ATTEMPTS).fetchone()
    return bool(row and row.activated_at)


# -- Publishing ------------------------------------------------------------------------


def publish(template, email, issued_at, lifetime, **fields):
    """Hand a mail job to the broker and wait for the publisher confirm.

    issued_at is in seconds since 1970, lifetime in seconds. Past it, the consumer that
    holds the job drops it. If none does, the broker moves it to mail.dead.
    Mandatory: if the queue is missing, publishing fails instead of losing the job.
    """
    g.job = secrets.token_hex(16)
    producer.publish(
        {"template": template, "email": email, "issued_at": issued_at,
         "expires_at": issued_at + lifetime, **fields},
        routing_key=MAIL_QUEUE.name, message_id=g.job, expiration=lifetime,
        mandatory=True, timeout=TIMEOUT, confirm_timeout=TIMEOUT)


def mail_confirmation(email):
    """Publish the confirmation, or log that it failed: the account is active anyway."""
    try:
        publish("confirmation", email, time.time(), NOTICE_LIFETIME)
    except BROKER_ERRORS as error:
        log_outage(error)
        disconnect()
