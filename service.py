"""Registration by e-mail: an account becomes active once its owner sends back a code.

    caller -- POST /users/register ---> service.py --> PostgreSQL: a waiting account
                                            +-------> RabbitMQ --> consumer.py --> mail
    caller -- PATCH /users/activate --> service.py --> PostgreSQL: an active account
                                            +-------> RabbitMQ --> consumer.py --> mail

Run:    gunicorn service:app    sync workers: each handles one request at a time
Read:   settings, topology, endpoints, errors, then the steps in the endpoints' order
Words:  waiting   registered, but its code has not been sent back yet
        job       the message that asks the consumer for one mail

Registering publishes the job before COMMIT: no confirm, no commit. A crash between the
two leaves a mail whose code matches no account, and a caller without an answer, who
repeats. Activating publishes after COMMIT, because its mail must not announce what may
still fail. A crash between the two leaves an active account without a confirmation.
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
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import psycopg2
from amqp.exceptions import AMQPError, MessageNacked
from dotenv import load_dotenv
from email_validator import validate_email
from flask import Flask, abort, g, request, send_file
from flask_swagger_ui import get_swaggerui_blueprint
from gunicorn.http.errors import ParseException
from kombu import Connection, Producer, Queue
from kombu.exceptions import KombuError
from nacl import pwhash
from nacl._sodium import ffi
from nacl.exceptions import CryptoError, InvalidkeyError
from psycopg2.extensions import POLL_OK, POLL_READ, set_wait_callback
from psycopg2.extras import NamedTupleCursor
from werkzeug.exceptions import HTTPException, ServiceUnavailable
from werkzeug.middleware.proxy_fix import ProxyFix

# -- Settings: environment variables; .env fills in what is not set --------------------


def setting(name, default=None, pattern=".+"):
    """The text of an environment variable. It must match the regular expression."""
    text = os.environ.get(name) or default
    if text is None or not re.fullmatch(pattern, text):
        raise SystemExit(f"{name} is missing or malformed; see .env.example")
    return text


WHOLE = "[0-9]{1,9}"            # a whole number
POSITIVE = "[1-9][0-9]{0,5}"    # one from 1 to 999,999

load_dotenv()
DATABASE_URL = setting("DATABASE_URL", None, "postgres(ql)?://.+")
BROKER_URL = setting("BROKER_URL", None, "amqps?://.+")
SECRET_KEY = setting("SECRET_KEY", None, ".{32,}")
CODE_LIFETIME = int(setting("CODE_LIFETIME", "60", POSITIVE))            # seconds
CODE_ATTEMPTS = int(setting("CODE_ATTEMPTS", "3", POSITIVE))             # wrong codes
EMAIL_LIMIT_HOUR = int(setting("EMAIL_LIMIT_HOUR", "5", WHOLE))          # per address
EMAIL_LIMIT_DAY = int(setting("EMAIL_LIMIT_DAY", "20", WHOLE))
ACTIVATE_LIMIT_HOUR = int(setting("ACTIVATE_LIMIT_HOUR", "100", WHOLE))  # NIST 800-63B
IP_LIMIT = int(setting("IP_LIMIT", "60", WHOLE))                         # in 10 minutes
TRUSTED_PROXIES = int(setting("TRUSTED_PROXIES", "0", "[0-9]"))          # in front

MAX_BODY = 4096           # bytes
TIMEOUT = 1               # seconds to wait for each answer of PostgreSQL and RabbitMQ
NOTICE_LIFETIME = 900     # seconds in which a notice or a confirmation is worth mailing
# A client that repeats a 503 this many seconds later never exceeds IP_LIMIT.
RETRY_AFTER = math.ceil(600 / max(1, IP_LIMIT))

# -- Topology: consumer.py has the same lines ------------------------------------------

DEAD_QUEUE = Queue("mail.dead", queue_arguments={
    "x-queue-type": "quorum",               # on disk, replicated in a cluster
    "x-message-ttl": 7 * 24 * 3600 * 1000,  # milliseconds: a week to look at them
    "x-max-length": 10_000})                # drops the oldest beyond that
MAIL_QUEUE = Queue("mail", queue_arguments={
    "x-queue-type": "quorum",
    "x-max-length": 100_000, "x-overflow": "reject-publish",  # full: a nack, so a 503
    "x-delivery-limit": 1_000_000,          # a job ends by its deadline instead
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": DEAD_QUEUE.name})

# -- The app and its endpoints ---------------------------------------------------------

app = Flask(__name__)
# Werkzeug cuts a chunked body off at this length, silently: hence one byte more.
app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=TRUSTED_PROXIES, x_proto=TRUSTED_PROXIES)
app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.yaml"))


@app.post("/users/register")
def register():
    """Register an address, or register it again, and have a code mailed to it.

        {"email": "ann@example.com", "password": "correct horse"}

    202  the same for every address; the owner of an active account gets a notice
    400  not JSON      413  over 4 KiB      415  not application/json
    422  a field is missing or not acceptable: see errors
    429  too many requests from this client or for this address
    503  the database or the broker does not answer; nothing was kept
    """
    email, password = read_fields(email=canonical_email, password=canonical_password)
    if is_address(password, email):
        abort(422, [{"field": "password", "detail": "must not be the address"}])
    connect()
    tidy()
    count_request("register client", client(), IP_LIMIT, 600)
    password_hash = hash_password(password)
    code = f"{secrets.randbelow(10_000):04}"
    with db:   # BEGIN and COMMIT; ROLLBACK after any exception, a 429 included
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
    503  the database or the broker does not answer; repeating is safe
    """
    email, password = read_credentials()
    [code] = read_fields(code=four_digits)
    connect()
    tidy()
    count_request("activate client", client(), IP_LIMIT, 600)
    count_request("activate address hour", email, ACTIVATE_LIMIT_HOUR, 3600)
    account = select_account(email)
    if not password_matches(account, password):
        abort(401, "The address or the password is wrong.")
    if account.activated_at:
        abort(409, "The account is already active.")
    # Committed before anything is raised: a ROLLBACK would also forget the attempt, and
    # a caller could try all 10,000 codes.
    if not spend_attempt(account, digest(email, code)):
        abort(422, "The code is wrong, expired, superseded or used up.")
    mail_confirmation(email)
    return {"message": "The account is active."}


@app.get("/healthz")
def healthz():
    """200 when both servers answer within a second, else 503 naming the other."""
    connect()
    execute("SELECT 1")
    MAIL_QUEUE.declare(channel=producer.channel)
    return {"database": "ok", "broker": "ok"}


@app.get("/openapi.yaml")
def openapi():
    """The HTTP contract, which /docs/ shows."""
    return send_file("openapi.yaml", mimetype="application/yaml")


# -- Every error leaves here, as problem details (RFC 9457) ----------------------------

BROKER_ERRORS = AMQPError, MessageNacked, KombuError, OSError   # sockets raise the last


@app.errorhandler(HTTPException)
def problem(error):
    """The HTTPException as problem+json; a list as description is a 422's errors."""
    if error.code >= 500:
        disconnect()   # in which state the connections are, nobody knows
    body = {"title": error.name, "status": error.code, "detail": error.description}
    if isinstance(error.description, list):
        body["detail"] = "Some fields are not acceptable."
        body["errors"] = error.description
    response = error.get_response()   # it has Allow and Retry-After
    response.data = json.dumps(body)
    response.content_type = "application/problem+json"
    if error.code == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="users", charset="UTF-8"'
    return response


def outage(error):
    """Log which server failed and why, and return the 503 that tells the caller.

    Nothing is retried: a statement without an answer may have taken effect.
    """
    global stalled, stalled_until
    if isinstance(error, psycopg2.InterfaceError):
        error = error.__context__ or error   # ROLLBACK failed, too: log what came first
    server = ("database" if isinstance(error, psycopg2.Error) else
              "broker" if isinstance(error, BROKER_ERRORS) else "service")
    if time.monotonic() - g.began >= TIMEOUT:
        stalled, stalled_until = server, time.monotonic() + TIMEOUT   # see connect()
    reason = json.dumps(str(error).partition("\n")[0])   # further lines may quote rows
    app.logger.warning("event=outage server=%s error=%s reason=%s job=%s", server,
                       type(error).__name__, reason, g.get("job", "-"))
    return unavailable(server)


for kind in psycopg2.Error, *BROKER_ERRORS, CryptoError:   # the last: no memory to hash
    app.register_error_handler(kind, lambda error: problem(outage(error)))


def unavailable(server):
    """The 503 of a server that fails."""
    return ServiceUnavailable(f"The {server} is temporarily unavailable.",
                              retry_after=RETRY_AFTER)


@app.before_request
def begin():
    """Take the time for the log."""
    g.began = time.monotonic()


@app.after_request
def finish(response):
    """Keep answers out of caches. Log the request without path, query and headers."""
    if request.path.startswith("/users/"):
        response.headers["Cache-Control"] = "no-store"
    app.logger.info(
        "event=request client=%s method=%s route=%s status=%s job=%s ms=%.0f",
        request.remote_addr, request.method, request.url_rule or "-",
        response.status_code, g.get("job", "-"), 1000 * (time.monotonic() - g.began))
    return response


# -- Reading the request ---------------------------------------------------------------

# Django's list, as `make common-passwords` writes it; LICENSE has its licence.
COMMON_PASSWORDS = frozenset(
    Path(__file__).with_name("common-passwords.txt").read_text().splitlines())


def read_fields(**checks):
    """The named text fields of the JSON body in that order, or 415, 413, 400 or 422.

    A check returns a text's canonical form or raises ValueError. What is missing or not
    a string is checked as "". Other fields are ignored.
    """
    if request.mimetype != "application/json":
        abort(415, "The body must be application/json.")
    try:
        content = request.get_data()
        if len(content) > MAX_BODY:
            abort(413)
        body = json.loads(content.decode(), object_pairs_hook=unique_keys,
                          parse_constant=no_constant)
    except (ValueError, RecursionError, ParseException) as error:   # the last: chunks
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

    At most 254 characters (RFC 5321). Nothing is looked up: the mail is the proof.
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


def client():
    """Whom IP_LIMIT counts: an IPv4 address, or the /64 that one IPv6 client has."""
    with suppress(ValueError):
        address = ipaddress.ip_address(request.remote_addr)
        address = getattr(address, "ipv4_mapped", None) or address
        prefix = 64 if address.version == 6 else 32
        return str(ipaddress.ip_network((address.packed, prefix), strict=False))
    return "unknown"   # the proxy sent no address: such clients share one limit


# -- The worker's two connections ------------------------------------------------------

db = producer = None             # connect() opens both, disconnect() drops both
stalled, stalled_until = "", 0   # the server that did not answer in time; monotonic()
broker = Connection(BROKER_URL, connect_timeout=TIMEOUT, transport_options={
    "confirm_publish": True, "read_timeout": TIMEOUT, "write_timeout": TIMEOUT})


def connect():
    """Open both connections, unless they are open and healthy.

    A request that has waited a second in vain makes its worker refuse the next ones for
    a second. Otherwise, each of the queued requests would wait its second, too.
    """
    global db, producer
    if time.monotonic() < stalled_until:
        raise unavailable(stalled)
    if db:
        # Data on an idle connection means that the server has closed it or that
        # RabbitMQ has raised an alarm.
        unusable, _, _ = select.select([db, broker.connection.sock], [], [], 0)
        if not unusable:
            return
    disconnect()
    broker.ensure_connection(   # tries each host once
        max_retries=BROKER_URL.count(";"), interval_start=0, interval_step=0)
    channel = broker.default_channel
    DEAD_QUEUE.declare(channel=channel)
    MAIL_QUEUE.declare(channel=channel)
    producer = Producer(channel)
    session = psycopg2.connect(DATABASE_URL, cursor_factory=NamedTupleCursor)
    session.autocommit = True   # outside `with db:`, each statement commits by itself
    # Or a statement that this worker has given up would go on, and keep its locks.
    session.cursor().execute(
        "SET statement_timeout = %s; SET idle_in_transaction_session_timeout = %s",
        [f"{TIMEOUT}s", f"{3 * TIMEOUT}s"])
    db = session


def disconnect():
    """Drop both connections. A proper close() would wait for a server that stalls."""
    global db, producer
    db = producer = None
    broker.collect()


def wait_for_database(session):
    """psycopg2's wait callback, with a timeout, because libpq has none for reading."""
    while (state := session.poll()) != POLL_OK:
        reading, writing = ([session], []) if state == POLL_READ else ([], [session])
        if not any(select.select(reading, writing, [], TIMEOUT)):
            raise psycopg2.OperationalError("no answer in time")


set_wait_callback(wait_for_database)

# -- Passwords and codes ---------------------------------------------------------------


def hash_password(password):
    """Argon2id at 12 MiB, 3 passes, 1 lane: OWASP Password Storage, ASVS 5.0."""
    return pwhash.argon2id.str(password.encode(), 3, 12 << 20).decode()


NOBODYS_HASH = hash_password(secrets.token_urlsafe())


def password_matches(account, password):
    """Verify it. Without an account, verify nobody's hash, which takes as long."""
    password_hash = account.password_hash if account else NOBODYS_HASH
    try:
        return pwhash.verify(password_hash.encode(), password.encode())
    except InvalidkeyError:
        # PyNaCl raises it for lack of memory, too. libsodium sets EINVAL on a mismatch.
        if ffi.errno != errno.EINVAL:
            raise
        return False


def digest(email, code):
    """HMAC-SHA256: keyed, since all 10,000 codes can be tried on a stolen table."""
    return hmac.digest(SECRET_KEY.encode(), f"{email} {code}".encode(), "sha256")


# -- SQL, one function per statement ---------------------------------------------------


def execute(statement, **values):
    """The first row that a statement returns, or None."""
    cursor = db.cursor()
    cursor.execute(statement, values)
    return cursor.fetchone()


# How far this worker has deleted. While a backup holds an old snapshot, deleted rows
# stay in the indexes: starting at their beginning would take longer each time.
deleted_to = {"limits": "epoch", "users": "epoch"}


def tidy():
    """Once in 30 requests, delete up to 300 expired limits, and up to 300 users who did
    not activate within a day. 30 requests add fewer, so no cron job is needed.

    Rows in use are skipped, so it never waits.
    """
    if secrets.randbelow(30):
        return
    last = execute("""
        WITH old_limits AS (
             DELETE FROM limits
              WHERE (name, subject) IN (
                    SELECT name, subject
                      FROM limits
                     WHERE expires_at BETWEEN %(limits)s AND now()
                     ORDER BY expires_at
                     LIMIT 300
                       FOR UPDATE SKIP LOCKED)
             RETURNING expires_at),
             old_users AS (
             DELETE FROM users
              WHERE email IN (
                    SELECT email
                      FROM users
                     WHERE activated_at IS NULL
                       AND registered_at BETWEEN %(users)s AND now() - interval '1 day'
                     ORDER BY registered_at
                     LIMIT 300
                       FOR UPDATE SKIP LOCKED)
             RETURNING registered_at)
        SELECT (SELECT max(expires_at) FROM old_limits) AS limits,
               (SELECT max(registered_at) FROM old_users) AS users
        """, **deleted_to)
    for table, instant in last._asdict().items():
        deleted_to[table] = instant or deleted_to[table]


def count_request(name, subject, allowed, seconds):
    """Count a request of a subject in a window of so many seconds, or 429."""
    limit = execute("""
        INSERT INTO limits AS old (name, subject, count, expires_at)
        VALUES (%(name)s, %(subject)s, 1, now() + %(seconds)s * interval '1 second')
            ON CONFLICT (name, subject) DO UPDATE
           SET count = CASE WHEN old.expires_at > now() THEN old.count + 1 ELSE 1 END,
               expires_at = CASE WHEN old.expires_at > now() THEN old.expires_at
                                 ELSE excluded.expires_at END
        RETURNING count, ceil(extract(epoch FROM expires_at - now()))::int AS wait
        """, name=name, subject=subject, seconds=seconds)
    if limit.count > allowed:
        abort(429, "Too many requests for this address or from this client.",
              retry_after=limit.wait)


def upsert_waiting(email, password_hash, code_digest):
    """Write password and code together, or None where the account is active."""
    return execute("""
        INSERT INTO users AS old (email, password_hash, code_digest, expires_at)
        VALUES (%(email)s, %(password_hash)s, %(code_digest)s,
                now() + %(lifetime)s * interval '1 second')
            ON CONFLICT (email) DO UPDATE
           SET password_hash = excluded.password_hash,
               code_digest   = excluded.code_digest,
               expires_at    = excluded.expires_at,
               registered_at = excluded.registered_at,
               attempts      = 0
         WHERE old.activated_at IS NULL
        RETURNING extract(epoch FROM registered_at)::float AS issued_at
        """, email=email, password_hash=password_hash, code_digest=code_digest,
        lifetime=CODE_LIFETIME)


def select_account(email):
    """The account of an address, or None."""
    return execute("""
        SELECT email, password_hash, activated_at
          FROM users
         WHERE email = %(email)s
        """, email=email)


def spend_attempt(account, code_digest):
    """Count an attempt and compare its code in one atomic step: True if it activated.

    The condition names the hash that was verified. If the address has been registered
    again since, this password and its code are dead, and no row is touched.
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
        code_digest=code_digest, allowed=CODE_ATTEMPTS)
    return bool(row and row.activated_at)


# -- Publishing ------------------------------------------------------------------------


def publish(template, email, issued_at, lifetime, **fields):
    """Hand a mail job to the broker and wait for the publisher confirm.

    issued_at is in seconds since 1970. After a lifetime in seconds the mail is useless:
    the consumer does not send it, and the broker does not keep it in the queue.
    Mandatory: without its queue, a job is an error and not silently lost.
    """
    g.job = secrets.token_hex(16)
    producer.publish(
        {"template": template, "email": email, "issued_at": issued_at,
         "expires_at": issued_at + lifetime, **fields},
        routing_key=MAIL_QUEUE.name, message_id=g.job, expiration=lifetime,
        mandatory=True, timeout=TIMEOUT, confirm_timeout=TIMEOUT)


def mail_confirmation(email):
    """Publish the confirmation, or log that it is missing: the account is active."""
    try:
        publish("confirmation", email, time.time(), NOTICE_LIFETIME)
    except BROKER_ERRORS as error:
        outage(error)
        disconnect()
