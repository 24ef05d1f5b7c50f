"""Registration by e-mail: an account is active once its owner has sent back a code.

    caller -- POST /users/register ---> service.py --> PostgreSQL: a waiting account
                                            +-------> RabbitMQ --> consumer.py --> mail
    caller -- PATCH /users/activate --> service.py --> PostgreSQL: an active account

Run:    gunicorn service:app
Read:   settings, topology, endpoints, errors, then each step in the endpoints' order
Words:  waiting   registered, the code not yet sent back
        pair      password and code of one registration: they live and die together
        place     a seat in the short queue for the cores, with its own two connections
        job       the message that asks the consumer for one mail
"""

import hmac
import ipaddress
import json
import os
import queue
import re
import secrets
import select
import threading
import time
import unicodedata
from contextlib import closing, suppress

import argon2
import psycopg2
from amqp.exceptions import AMQPError, MessageNacked
from django.contrib.auth.password_validation import CommonPasswordValidator
from dotenv import load_dotenv
from email_validator import validate_email
from flask import Flask, abort, g, request, send_file
from flask_swagger_ui import get_swaggerui_blueprint
from gunicorn.http.errors import ParseException
from kombu import Connection, Producer, Queue
from kombu.exceptions import KombuError
from psycopg2.extensions import POLL_OK, POLL_READ, set_wait_callback
from psycopg2.extras import NamedTupleCursor
from werkzeug.exceptions import HTTPException, ServiceUnavailable
from werkzeug.middleware.proxy_fix import ProxyFix

# -- Settings: the environment, else .env ----------------------------------------------


def setting(name, default=None):
    """An environment variable; a whole number if its default is one."""
    text = os.environ.get(name) or default
    if text is None or isinstance(default, int) and not str(text).isdecimal():
        raise SystemExit(f"{name} is missing or malformed; .env.example explains it")
    return int(text) if isinstance(default, int) else text


load_dotenv()
DATABASE_URL = setting("DATABASE_URL")
BROKER_URL = setting("BROKER_URL")
SECRET_KEY = setting("SECRET_KEY")
CODE_LIFETIME = setting("CODE_LIFETIME", 60)               # seconds
CODE_ATTEMPTS = setting("CODE_ATTEMPTS", 3)                # wrong ones until it is dead
EMAIL_LIMIT_HOUR = setting("EMAIL_LIMIT_HOUR", 5)          # registrations per address
EMAIL_LIMIT_DAY = setting("EMAIL_LIMIT_DAY", 20)
ACTIVATE_LIMIT_HOUR = setting("ACTIVATE_LIMIT_HOUR", 100)  # NIST SP 800-63B, 5.2.2
IP_LIMIT = setting("IP_LIMIT", 60)                         # per endpoint and 10 minutes
TRUSTED_PROXIES = setting("TRUSTED_PROXIES", 0)            # 0 ignores X-Forwarded-For
WEB_CONCURRENCY = setting("WEB_CONCURRENCY", os.cpu_count())
if len(SECRET_KEY) < 32:
    raise SystemExit("SECRET_KEY must have at least 32 characters")

MAX_BODY = 4096           # bytes
TIMEOUT = 1               # seconds for each answer of PostgreSQL and of RabbitMQ
NOTICE_LIFETIME = 3600    # seconds in which a notice or a confirmation is worth mailing
PLACES = max(1, min(10, 90 // WEB_CONCURRENCY))  # per worker; PostgreSQL takes 100

# -- Topology: the same lines stand in consumer.py -------------------------------------

DEAD_QUEUE = Queue("mail.dead", queue_arguments={
    "x-queue-type": "quorum",               # on disk, and on several nodes if there are
    "x-message-ttl": 7 * 24 * 3600 * 1000,  # milliseconds: a week to look at them
    "x-max-length": 10_000})                # then the oldest go
MAIL_QUEUE = Queue("mail", queue_arguments={
    "x-queue-type": "quorum",
    "x-max-length": 100_000, "x-overflow": "reject-publish",  # full: a nack, and a 503
    "x-delivery-limit": 1_000_000,          # a job ends by its deadline instead
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": DEAD_QUEUE.name})

# -- The app and its endpoints ---------------------------------------------------------

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1   # where werkzeug cuts a chunked body
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=TRUSTED_PROXIES, x_proto=TRUSTED_PROXIES)
app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.yaml"))


@app.post("/users/register")
def register():
    """Register an address, or register it anew, and have a code mailed to it.

        {"email": "ann@example.com", "password": "correct horse"}

    202  the same for every address; the owner of an active account gets a notice
    400  not JSON      413  over 4 KiB      415  not application/json
    422  a field is missing or not acceptable: see errors
    429  too often, this address or this client
    503  cannot be taken now; nothing was kept
    """
    email, password = read_fields(email=canonical_email, password=canonical_password)
    if names_address(password, email):
        abort(422, [{"field": "password", "detail": "must not be the address"}])
    take_place()
    count_request("register client", client(), IP_LIMIT, 600)
    count_request("register address hour", email, EMAIL_LIMIT_HOUR, 3600)
    count_request("register address day", email, EMAIL_LIMIT_DAY, 86400)
    with hashing:
        password_hash = hasher.hash(password)
    code = f"{secrets.randbelow(10_000):04}"
    with g.place.db:   # BEGIN, SQL, publisher confirm, COMMIT; ROLLBACK if one fails
        waiting = upsert_waiting(email, password_hash, digest(email, code))
        if waiting:
            publish("code", email, waiting.issued_at, CODE_LIFETIME, code=code)
        else:
            publish("notice", email, time.time(), NOTICE_LIFETIME)
    return {"message": "A mail is on its way to this address."}, 202


@app.patch("/users/activate")
def activate():
    """Activate the account of the HTTP Basic credentials with the code that was mailed.

        {"code": "0427"}

    200  the account is active; a confirmation is mailed
    400  not JSON      413  over 4 KiB      415  not application/json
    401  no, malformed or wrong credentials, or no such account
    409  the credentials are right and the account is active already
    422  not four digits: see errors; or the code is wrong, expired, superseded, used up
    429  too often, this address or this client
    503  cannot be taken now; nothing was kept
    """
    email, password = read_credentials()
    [code] = read_fields(code=four_digits)
    take_place()
    count_request("activate client", client(), IP_LIMIT, 600)
    count_request("activate address hour", email, ACTIVATE_LIMIT_HOUR, 3600)
    account = select_account(email)
    if not password_matches(account, password):
        abort(401, "The address or the password is wrong.")
    if account.activated_at:
        abort(409, "The account is active already.")
    with g.place.db:
        activated = spend_attempt(account, digest(email, code))
        if activated:
            publish("confirmation", email, time.time(), NOTICE_LIFETIME)
    # Outside of the transaction: raising in it would roll back the attempt that was
    # just counted, and all 10,000 codes could be tried.
    if not activated:
        abort(422, "The code is wrong, expired, superseded or used up.")
    return {"message": "The account is active."}


@app.get("/healthz")
def healthz():
    """200 when both servers answer, each time within a second; else 503 naming one."""
    with health_lock, closing(Place()) as place:   # one at a time: it opens connections
        place.open()
    return {"database": "ok", "broker": "ok"}


@app.get("/openapi.yaml")
def openapi():
    """The HTTP contract, which /docs/ shows."""
    return send_file("openapi.yaml", mimetype="application/yaml")


# -- Every error leaves here, as problem details (RFC 9457) ----------------------------

PROBLEMS = {400: "bad-request", 401: "wrong-credentials", 404: "not-found",
            405: "method-not-allowed", 409: "already-active", 413: "too-large",
            415: "not-json", 422: "refused-code", 429: "limit-reached",
            500: "internal-error", 503: "unavailable"}
OUTAGES = {psycopg2.Error: "database", AMQPError: "broker", MessageNacked: "broker",
           KombuError: "broker", OSError: "broker", queue.Empty: "machine",
           argon2.exceptions.Argon2Error: "machine"}   # no memory left for a hash


@app.errorhandler(HTTPException)
def problem(error):
    """The HTTPException as problem+json; a list as description is a 422's errors."""
    kind, more = PROBLEMS.get(error.code, "other"), {"detail": error.description}
    if isinstance(error.description, list):
        kind, more = "invalid-fields", {
            "detail": "Some fields are not acceptable.", "errors": error.description}
    response = error.get_response()   # it has Allow and Retry-After
    response.data = json.dumps({"type": f"urn:problem-type:registration:{kind}",
                                "title": error.name, "status": error.code} | more)
    response.content_type = "application/problem+json"
    if error.code == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="users", charset="UTF-8"'
    g.outcome = kind
    return response


def outage(error):
    """The 503 of what cannot take the request now; one log line says why."""
    server = next(OUTAGES[kind] for kind in OUTAGES if isinstance(error, kind))
    cause = error.__context__ or error   # a ROLLBACK that fails in turn would hide it
    reason = json.dumps(str(cause).partition("\n")[0])   # further lines may quote rows
    app.logger.warning("event=outage server=%s error=%s reason=%s", server,
                       type(cause).__name__, reason)
    if "place" in g:
        g.place.close()
    return problem(
        ServiceUnavailable(f"The {server} cannot take it now.", retry_after=2))


for kind in OUTAGES:
    app.register_error_handler(kind, outage)


@app.before_request
def begin():
    """What finish() will log."""
    g.began, g.outcome = time.monotonic(), "ok"


@app.after_request
def finish(response):
    """Keep the endpoints' answers out of caches; log no path, query or header."""
    if request.path.startswith("/users/"):
        response.headers["Cache-Control"] = "no-store"
    app.logger.info(
        "event=request client=%s method=%s route=%s status=%s outcome=%s ms=%.0f",
        request.remote_addr, request.method, request.url_rule or "-",
        response.status_code, g.outcome, 1000 * (time.monotonic() - g.began))
    return response


# -- Reading the request ---------------------------------------------------------------

COMMON_PASSWORDS = CommonPasswordValidator().passwords   # 8,000 of 8 characters or more


def read_fields(**checks):
    """The named text fields of the JSON body in that order, or 415, 413, 400 or 422.

    A check returns a text's canonical form or raises ValueError, as each does for "",
    which stands for what is missing or no string. Other fields are ignored.
    """
    if request.mimetype != "application/json":
        abort(415, "The body must be application/json.")
    try:
        body = request.get_data()
        if len(body) > MAX_BODY:
            abort(413)
        # int() refuses NaN and Infinity: json takes them, though they are not JSON.
        body = json.loads(body.decode(), parse_constant=int,
                          object_pairs_hook=unique_keys)
    except (ValueError, RecursionError, ParseException) as error:   # the last: chunks
        abort(400, f"The body is not JSON: {error}")
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
    """A JSON object; which of two equal keys counts is open in RFC 8259: neither."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


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


def names_address(password, email):
    """Whether it is the address, however typed, or its local part."""
    with suppress(ValueError):
        password = canonical_email(password)
    return password.lower() in (email, email.partition("@")[0])


def four_digits(text):
    """A code; isdigit() would take the digits of every script."""
    if not re.fullmatch("[0-9]{4}", text):
        raise ValueError("must be a string of four digits")
    return text


def read_credentials():
    """Address and password from HTTP Basic (RFC 7617), or the 401 of wrong ones."""
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
    return "unknown"   # a proxy that does not tell: its clients count as one


# -- Places: the short queue, and the connections to both servers ----------------------


class Place:
    """A connection to each server, for one request at a time.

    After an error nothing is tried again: what got no answer may have happened.
    """

    def __init__(self):
        self.db = None
        self.broker = Connection(
            BROKER_URL, connect_timeout=TIMEOUT, transport_options={
                "confirm_publish": True, "read_timeout": TIMEOUT,
                "write_timeout": TIMEOUT})

    def open(self):
        """Open both: after gunicorn's fork, and anew where one died while idle.

        What can be read while idle is the end, or an alarm of the broker.
        """
        if self.db and not ready(self.db) and not ready(self.broker.connection.sock):
            return
        self.close()
        self.broker.ensure_connection(   # each of its hosts once
            max_retries=BROKER_URL.count(";"), interval_start=0, interval_step=0)
        channel = self.broker.default_channel
        DEAD_QUEUE.declare(channel=channel)
        MAIL_QUEUE.declare(channel=channel)
        self.producer = Producer(channel)
        self.db = psycopg2.connect(DATABASE_URL, cursor_factory=NamedTupleCursor)
        self.db.autocommit = True   # a lone statement is one round trip
        # Otherwise a statement given up here would run on there, with its locks.
        self.db.cursor().execute(
            "SET statement_timeout = %s; SET idle_in_transaction_session_timeout = %s",
            [f"{TIMEOUT}s", f"{3 * TIMEOUT}s"])

    def close(self):
        """Forget both connections; kombu's close() would wait for the broker."""
        self.db = None
        self.broker.collect()


health_lock = threading.Lock()
places = queue.LifoQueue()
for _ in range(PLACES):
    places.put(Place())


def take_place():
    """A place for the rest of this request; if none is free, the 503 of queue.Empty."""
    g.place = places.get_nowait()
    g.place.open()


@app.teardown_request
def leave_place(error):
    """Give it back, however the request ended."""
    if "place" in g:
        places.put(g.place)


def ready(file, events=select.POLLIN, seconds=0):
    """Whether a socket is ready in time; select() takes none above 1,023."""
    poll = select.poll()
    poll.register(file, events)
    return poll.poll(1000 * seconds)


def wait_for_database(session):
    """psycopg2's wait callback: libpq itself waits for a stalled server forever."""
    while (state := session.poll()) != POLL_OK:
        events = select.POLLIN if state == POLL_READ else select.POLLOUT
        if not ready(session, events, TIMEOUT):
            raise psycopg2.OperationalError("no answer in time")


set_wait_callback(wait_for_database)

# -- Passwords and codes ---------------------------------------------------------------

# Argon2id, 12 MiB, 3 passes, 1 lane: OWASP Password Storage, ASVS 5.0. A stored hash
# names its own parameters, so that it verifies after these were changed.
hasher = argon2.PasswordHasher(time_cost=3, memory_cost=12 * 1024, parallelism=1)
NOBODYS_HASH = hasher.hash(secrets.token_urlsafe())
# Two at once in each worker, and by default a worker a core: no core is idle while the
# other worker has hashes waiting. Measured as fast as one lock a core over all workers.
hashing = threading.BoundedSemaphore(2)


def password_matches(account, password):
    """Verify it; without an account against nobody's hash, which takes as long."""
    password_hash = account.password_hash if account else NOBODYS_HASH
    with hashing, suppress(argon2.exceptions.VerifyMismatchError):
        return hasher.verify(password_hash, password)


def digest(email, code):
    """HMAC-SHA256: keyed, since all 10,000 codes can be tried on a stolen table."""
    return hmac.digest(SECRET_KEY.encode(), f"{email} {code}".encode(), "sha256")


# -- SQL, one function a statement, and the publish ------------------------------------


def execute(statement, **values):
    """The first row that a statement returns, or None."""
    cursor = g.place.db.cursor()
    cursor.execute(statement, values)
    return cursor.fetchone()


def count_request(name, subject, allowed, seconds):
    """Count a request of a subject in a window of so many seconds, or 429.

    Committed at once, so it counts whatever becomes of the request.
    """
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
    """Write a pair, or replace the waiting one; None where the account is active."""
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
    """Check a code and count the attempt in one atomic step; whether it activated.

    The condition names the hash that was verified: once the address is registered anew,
    this pair is dead and the attempt touches nothing.
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
    return row and row.activated_at


def publish(template, email, issued_at, lifetime, **fields):
    """Hand a mail job to the broker and wait for the publisher confirm.

    issued_at is in seconds since 1970; a lifetime in seconds later the mail is useless.
    If COMMIT fails after it, no harm is done: its code matches no row. Mandatory: if
    the queue is gone, that is an error and not a mail silently lost.
    """
    g.place.producer.publish(
        {"template": template, "email": email, "issued_at": issued_at,
         "expires_at": issued_at + lifetime, **fields},
        routing_key=MAIL_QUEUE.name, mandatory=True, message_id=secrets.token_hex(16),
        timeout=TIMEOUT, confirm_timeout=TIMEOUT)
