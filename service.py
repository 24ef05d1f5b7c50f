"""Registration by e-mail: an account becomes active once its owner sends back a code.

    client -- POST /users/register ---> service.py --> PostgreSQL: a waiting account
                                            +-------> RabbitMQ --> consumer.py --> mail
    client -- PATCH /users/activate --> service.py --> PostgreSQL: an active account
                                            +-------> RabbitMQ --> consumer.py --> mail

Run:    gunicorn service:app    each worker handles one request at a time
Read:   the endpoints first; what they call stands below them
Words:  waiting   registered, but its code has not been sent back yet
        job       the message that asks the consumer to send one mail
        notice    the mail to the owner of an active account that is registered again

Registering publishes the job before it commits: no account waits for a code that
RabbitMQ does not have. Activating commits before it publishes: no mail announces what
may still fail. If a server fails, this is left:

    registering: what failed    account      mail                        answer
      before publishing         unchanged    none                        503
      publishing                unchanged    perhaps a code of no use    503
      COMMIT                    unchanged    a code of no use            503
      the answer to COMMIT      waiting      a code that works           503

    activating: what failed     account      mail                        answer
      COMMIT, or before it      unchanged    none                        503
      the answer to COMMIT      active       none                        503, later 409
      publishing                active       perhaps none                200, see log

If the worker dies, the same is left, without an answer or a log line. In each case the
client may try again.
"""

import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import select
import time
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
from dotenv import load_dotenv
from email_validator import validate_email
from flask import Flask, abort, g, redirect, request, send_file
from flask_swagger_ui import get_swaggerui_blueprint
from gunicorn.http.errors import ParseException
from kombu import Connection, Producer, Queue
from kombu.exceptions import KombuError
from kombu.utils.url import parse_url
from nacl import pwhash
from nacl.exceptions import InvalidkeyError
from psycopg2.errors import QueryCanceled
from psycopg2.extensions import POLL_OK, POLL_READ, parse_dsn, set_wait_callback
from psycopg2.extras import NamedTupleCursor
from werkzeug.exceptions import HTTPException, ServiceUnavailable

# -- Settings: environment variables; .env fills in what is not set --------------------


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


def postgresql_url(text):
    """Whether libpq can use it. In user:p@ss@host it takes ss@host for the host, and
    its errors would show that. So there may be no "@" outside of user and password."""
    return "@" not in str(parse_dsn(text) | {"user": "", "password": ""})


def amqp_urls(text):
    """Whether it is one AMQP URL, or several with ";" between them."""
    schemes = {parse_url(url)["transport"] for url in text.split(";")}
    return schemes <= {"amqp", "amqps"}


load_dotenv(interpolate=False)
DATABASE_URL = setting("DATABASE_URL", postgresql_url, "is no PostgreSQL URL")
BROKER_URL = setting("BROKER_URL", amqp_urls, "is no AMQP URL")
SECRET_KEY = setting("SECRET_KEY", lambda text: len(text.encode()) >= 32,
                     "must have 32 characters or more")
CODE_LIFETIME = number("CODE_LIFETIME", "60", 1, 86400)                # seconds
CODE_ATTEMPTS = number("CODE_ATTEMPTS", "3", 1, 9999)                  # wrong codes
# Requests for an address, in an hour or a day. 0 allows none.
EMAIL_LIMIT_HOUR = number("EMAIL_LIMIT_HOUR", "5", 0, 10**9)           # register
EMAIL_LIMIT_DAY = number("EMAIL_LIMIT_DAY", "20", 0, 10**9)            # register
ACTIVATE_LIMIT_HOUR = number("ACTIVATE_LIMIT_HOUR", "100", 0, 10**9)   # activate
# Per client: requests to each endpoint in IP_WINDOW, and failed activations an hour.
IP_LIMIT = number("IP_LIMIT", "60", 0, 10**9)
FAILURE_LIMIT_HOUR = number("FAILURE_LIMIT_HOUR", "20", 0, 10**9)
TRUSTED_PROXIES = number("TRUSTED_PROXIES", "0", 0, 9)                 # in front of us
LOG_LEVEL = setting("LOG_LEVEL", logging.getLevelNamesMapping().get,
                    "must be DEBUG, INFO, WARNING, ERROR or CRITICAL", "INFO")

MAX_BODY = 4096           # bytes
REQUEST_TIMEOUT = 2       # seconds that a request waits; then COMMIT may take as many
BROKER_TIMEOUT = 0.7      # seconds for each answer while we connect to RabbitMQ
NOTICE_LIFETIME = 900     # seconds; then a notice or a confirmation is no longer sent
IP_WINDOW = 600           # seconds
RETRY_AFTER = 10          # seconds, sent with each 503

# -- The queue: consumer.py repeats these lines, and adds the queue for retries --------

# On disk, and replicated. If it is full, publishing fails. A job that the consumer
# rejects stays here until it is in registration.retry. After 20 deliveries, RabbitMQ 4
# would give it up; a job may need one every few seconds, until its deadline.
MAIL_QUEUE = Queue("registration.mail", queue_arguments={
    "x-queue-type": "quorum", "x-delivery-limit": 1_000_000,
    "x-max-length": 100_000, "x-overflow": "reject-publish",
    "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "registration.retry",
    "x-dead-letter-strategy": "at-least-once"})

# -- The app and its endpoints ---------------------------------------------------------

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
# A client can forge the Host header. Werkzeug would redirect a path with // to it, and
# Swagger's page would link to it, which the edge keeps for others.
app.url_map.merge_slashes = False
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
    503  a server does not answer, or there is too much to do: try again
    """
    email, password = read_fields(email=canonical_email, password=acceptable_password)
    if is_address(password, email):
        abort(422, [{"field": "password", "detail": "must not be your address"}])
    refuse_if_slow("database", "broker")
    open_database()
    open_broker()
    tidy()
    # The hash costs most, so the client's limit comes before it. The connection is in
    # autocommit, so this count is committed at once, and stays after a 503.
    count_request("register client", client(), IP_LIMIT, IP_WINDOW)
    password_hash = hash_password(password)
    code = f"{secrets.randbelow(10_000):04}"
    # `with db:` is a transaction, though the connection is in autocommit. An exception
    # rolls back what is counted in it. Until its end the address's rows are locked, so
    # the hash was computed before.
    with db:
        count_request("register address hour", email, EMAIL_LIMIT_HOUR, 3600)
        count_request("register address day", email, EMAIL_LIMIT_DAY, 86400)
        issued_at = upsert_waiting(email, password_hash, digest(email, code))
        if issued_at:
            publish("code", email, issued_at, CODE_LIFETIME, code=code)
        else:   # the account is active
            publish("notice", email, time.time(), NOTICE_LIFETIME)
    return {"message": "A mail is on its way.", "expires_in": CODE_LIFETIME}, 202


@app.patch("/users/activate")
def activate():
    """Activate the account of the HTTP Basic credentials with the code that was mailed.

        {"code": "0427"}

    200  the account is active; a confirmation is mailed
    400  not JSON      413  over 4 KiB      415  not application/json
    401  no credentials, or malformed ones
    403  one answer for all of these: there is no such account, the password or the code
         is wrong, or the code is expired, superseded or used up
    409  the credentials are right and the account is already active
    422  the code is not four digits: see errors
    429  too many requests or failures of this client, or requests for this address
    503  as above: try again; a 409 then may mean that the first request activated it
    """
    email, password = read_credentials()
    [code] = read_fields(code=four_digits)
    refuse_if_slow("database")
    open_database()
    tidy()
    count_request("activate client", client(), IP_LIMIT, IP_WINDOW)
    count_request("activate address hour", email, ACTIVATE_LIMIT_HOUR, 3600)
    # Count a failure first; a success takes it back. This locks the client's row, so
    # that of many guesses at once none exceeds the limit. An abort() in the block rolls
    # back, and the 409 is not counted. The 403 comes after COMMIT, and is.
    with db:
        count_request("activate failures", client(), FAILURE_LIMIT_HOUR, 3600)
        account = select_account(email)
        authenticated = password_matches(account, password)
        activated = authenticated and spend_attempt(account, digest(email, code))
        if activated:
            count_request("activate failures", client(), FAILURE_LIMIT_HOUR, 3600, -1)
        elif authenticated and is_active(account):
            abort(409, "The account is already active.")
    if not activated:
        abort(403, "The address, the password or the code is wrong, "
                   "or the code no longer works.")
    publish_confirmation(email)
    return {"message": "The account is active."}


@app.get("/healthz")
def healthz():
    """200 if both servers answer, else 503 naming the one that does not."""
    refuse_if_slow("database", "broker")
    open_database()
    tidy()   # so that old rows go even if nobody registers
    execute("SELECT 1")
    open_broker()
    with broker_errors():
        MAIL_QUEUE.declare(channel=producer.channel)   # a round trip
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
    body = {"title": error.name, "status": error.code, "detail": error.description}
    if isinstance(error.description, list):
        body["detail"] = "Some fields are invalid."
        body["errors"] = error.description
    response = error.get_response()   # it carries Allow and Retry-After
    response.data = json.dumps(body) + "\n"
    response.content_type = "application/problem+json"
    if error.code == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="users", charset="UTF-8"'
    return response


@app.errorhandler(psycopg2.Error)
@app.errorhandler(KombuError)
def outage(error):
    """A 503. We try nothing again: the first try may have worked, though unanswered."""
    server = "broker" if isinstance(error, KombuError) else "database"
    if isinstance(error, psycopg2.InterfaceError):   # ROLLBACK on a closed connection:
        error = error.__context__ or error           # the error before it says why
    log_outage(server, error)
    return problem(unavailable(server))


def unavailable(server):
    return ServiceUnavailable(f"The {server} is temporarily unavailable.",
                              retry_after=RETRY_AFTER)


def log_outage(server, error):
    """One line. Of the error's text only the first line: the others may quote a row."""
    app.logger.warning(
        "event=outage server=%s error=%s reason=%s job=%s", server,
        type(error).__name__, json.dumps(str(error).partition("\n")[0]),
        g.get("job", "-"))


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
        body = json.loads(request.get_data().decode())   # UTF-8, by RFC 8259
    except (ValueError, RecursionError, ParseException):
        # Not JSON; too deeply nested; a malformed chunk, which gunicorn finds only now.
        abort(400, "The body cannot be read as JSON.")
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


def canonical_email(text):
    """The one form in which an address is stored: ASCII, lower case, IDNA domain.

    At most 254 characters (RFC 5321). No DNS look-up: the mail is the proof.
    """
    return validate_email(text, check_deliverability=False,
                          allow_smtputf8=False).ascii_email.lower()


def canonical_password(text):
    """The one form in which a password is hashed, however it is typed (RFC 8265)."""
    return unicodedata.normalize("NFC", text)


def acceptable_password(text):
    """Canonical, 8 to 128 code points, none that HTTP Basic forbids (RFC 7617).

    No composition rules; common passwords are refused: NIST SP 800-63B, 5.1.1.2.
    """
    text = canonical_password(text)
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
    basic = None
    with suppress(ValueError):   # Werkzeug raises it if the header is not ASCII
        basic = request.authorization
    if not (basic and basic.type == "basic" and basic.username and basic.password):
        abort(401, "Send the address and the password as HTTP Basic.")
    try:
        email = canonical_email(basic.username)
    except ValueError:
        email = ""   # no account has it; this is counted as a failure like all others
    return email, canonical_password(basic.password)


def client():
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 address.

    Each proxy appends the address that it sees to X-Forwarded-For, some with the port:
    203.0.113.7:50123 or [2001:db8::1]:443. With two proxies in front, we get "whatever
    the client sent, client, first proxy" from the second one: the client is hops[-3].
    """
    forwarded = request.headers.get("X-Forwarded-For", "")
    hops = [*forwarded.split(","), request.remote_addr]
    try:
        hop = hops[-1 - TRUSTED_PROXIES].strip()
        if "[" in hop or hop.count(":") == 1:
            hop = urlsplit(f"//{hop}").hostname   # without brackets and port
        address = ipaddress.ip_address(hop)
    except (IndexError, ValueError):
        return "unknown"   # such clients share their limits
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((int(address), 64), strict=False))


# -- Time-outs: how long a request waits for a server, and when it does not try --------

SLOW = {"database": 1, "broker": 0.3}       # seconds of waiting in one request
slow_until = {"database": 0, "broker": 0}   # this worker's, by time.monotonic()


@app.before_request
def begin():
    """Start the clocks of the request."""
    g.began = time.monotonic()
    g.deadline = g.began + REQUEST_TIMEOUT
    g.waited = {"database": 0, "broker": 0}   # seconds


def time_left():
    """Seconds to wait for an answer: at least 0.1, for ROLLBACK after the deadline."""
    return max(0.1, g.deadline - time.monotonic())


@contextmanager
def waiting_for(server):
    """Add up how long the request waits for the server, answered or not."""
    began = time.monotonic()
    try:
        yield
    finally:
        now = time.monotonic()
        g.waited[server] += now - began
        if g.waited[server] > SLOW[server]:
            slow_until[server] = now + 1


def refuse_if_slow(*servers):
    """503 for a second after a request of this worker that waited longer than SLOW.

    Otherwise ten requests that queue for the worker would wait for a silent server one
    after another, ten times as long.
    """
    for server in servers:
        if is_slow(server):
            raise unavailable(server)


def is_slow(server):
    return time.monotonic() < slow_until[server]


@app.after_request
def finish(response):
    """Keep answers out of caches. Log the request, without path, query and headers."""
    if request.path.startswith("/users/"):
        response.headers["Cache-Control"] = "no-store"
    app.logger.info(
        "event=request client=%s method=%s route=%s status=%s job=%s ms=%.0f",
        client(), request.method, request.url_rule or "-", response.status_code,
        g.get("job", "-"), 1000 * (time.monotonic() - g.began))
    return response


# -- PostgreSQL: the worker's connection -----------------------------------------------

db = None   # opened by the worker, after gunicorn has forked it


def open_database():
    """Open the connection if there is none, or if it is broken."""
    global db
    if db and not db.closed and not is_broken(db):
        return
    # Keepalives, in seconds: they notice that the network has forgotten an idle
    # connection. The time-outs of a session are set in schema.sql, for the role.
    db = psycopg2.connect(DATABASE_URL, cursor_factory=NamedTupleCursor,
                          keepalives_idle=30, keepalives_interval=5, keepalives_count=2)
    db.autocommit = True   # but `with db:` is a transaction, since psycopg2 2.9


def is_broken(connection):
    """Whether there is something to read on an idle connection, of either server:
    nearly always that it has been closed."""
    return bool(select.select([connection], [], [], 0)[0])


def wait_for_database(conn):
    """psycopg2 calls this to wait for an answer: libpq has no time-out for that. If it
    raises an error, psycopg2 closes the connection."""
    while (state := conn.poll()) != POLL_OK:
        reading, writing = ([conn], []) if state == POLL_READ else ([], [conn])
        with waiting_for("database"):
            if not any(select.select(reading, writing, [], time_left())):
                raise psycopg2.OperationalError("no answer in time")


set_wait_callback(wait_for_database)

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


def tidy():
    """In one of 30 requests, delete up to 300 expired limits and as many old accounts.

    That is more than the requests add, so no cron job is needed. While a backup runs,
    VACUUM cannot remove what was deleted, so each DELETE reads ever more dead rows. It
    gives up after 50 ms; requests after the backup catch up.
    """
    if secrets.randbelow(30):
        return
    for delete in delete_expired_limits, delete_old_accounts:
        with suppress(QueryCanceled), db:
            execute("SET LOCAL statement_timeout = '50ms'")
            delete()


def delete_expired_limits():
    # Not WHERE ... IN (SELECT): PostgreSQL might run that SELECT once for every row.
    execute("""
        DELETE FROM limits
         WHERE ctid = ANY (ARRAY (
               SELECT ctid
                 FROM limits
                WHERE expires_at < now()
                ORDER BY expires_at
                LIMIT 300
                  FOR UPDATE SKIP LOCKED))   -- a locked row is in use
        """)


def delete_old_accounts():
    execute("""
        DELETE FROM users
         WHERE ctid = ANY (ARRAY (
               SELECT ctid
                 FROM users
                WHERE activated_at IS NULL
                  AND registered_at < now() - interval '1 day'
                ORDER BY registered_at
                LIMIT 300
                  FOR UPDATE SKIP LOCKED))
        """)


def count_request(name, subject, allowed, seconds, count=1):
    """Count a request of a client or for an address. If there are too many, 429.

    The window begins with the first request and lasts so many seconds. A count of -1
    takes a request back.
    """
    limit = execute("""
        INSERT INTO limits AS old (name, subject, count, expires_at)
        VALUES (%(name)s, %(subject)s, %(count)s,
                now() + %(seconds)s * interval '1 second')
            ON CONFLICT (name, subject) DO UPDATE
           SET count = CASE WHEN old.expires_at > now() THEN old.count ELSE 0 END
                       + excluded.count,
               expires_at = CASE WHEN old.expires_at > now() THEN old.expires_at
                                 ELSE excluded.expires_at END
        RETURNING count, ceil(extract(epoch FROM expires_at - now()))::int AS wait
        """, name=name, subject=subject, count=count, seconds=seconds).fetchone()
    if limit.count > allowed:
        abort(429, "Too many requests for this address or from this client.",
              retry_after=limit.wait)


def upsert_waiting(email, password_hash, code_digest):
    """Write password and code together. Return when, in seconds since 1970.

    If the account is active, WHERE keeps its row as it is, and None is returned.
    """
    row = execute("""
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
    return row and row.issued_at


def select_account(email):
    """The account of an address, or None."""
    return execute("""
        SELECT email, password_hash
          FROM users
         WHERE email = %(email)s
        """, email=email).fetchone()


def spend_attempt(account, code_digest):
    """Count an attempt and compare its code in one atomic step: True if it activated.

    The condition names the hash that was verified. If the address has been registered
    again since, that password and its code no longer count, and no row is touched.
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


def is_active(account):
    """Whether it is active, with the hash that was verified.

    spend_attempt() has waited for the lock of another activation, so this sees it.
    """
    return execute("""
        SELECT activated_at
          FROM users
         WHERE email = %(email)s
           AND password_hash = %(password_hash)s
           AND activated_at IS NOT NULL
        """, email=account.email, password_hash=account.password_hash).fetchone()


# -- RabbitMQ: the worker's connection, and publishing ---------------------------------

broker = Connection(
    BROKER_URL, connect_timeout=BROKER_TIMEOUT,
    # With None, kombu fills in the host's name, and the certificate must have it.
    ssl=BROKER_URL.startswith("amqps:") and {"server_hostname": None},
    transport_options={"confirm_publish": True, "read_timeout": BROKER_TIMEOUT,
                       "write_timeout": BROKER_TIMEOUT})
producer = None   # set while the connection is open


def open_broker():
    """Open the connection if there is none, or if it is broken."""
    global producer
    with broker_errors():
        if producer and not is_broken(broker.connection.sock):
            return
        broker.collect()
        other_hosts = BROKER_URL.count(";")   # each is tried once
        broker.ensure_connection(
            max_retries=other_hosts, interval_start=0, interval_step=0)
        MAIL_QUEUE.declare(channel=broker.default_channel)
        producer = Producer(broker.default_channel)


@contextmanager
def broker_errors():
    """Whatever goes wrong in the block becomes a KombuError. The connection is dropped:
    a late answer would be taken for the answer to the next job."""
    global producer
    try:
        with waiting_for("broker"):
            yield
    except Exception as error:   # kombu and amqp have no class for all of theirs
        broker.collect()   # close() would wait for RabbitMQ
        producer = None
        raise KombuError(f"{type(error).__name__}: {error}") from error


def publish(template, email, issued_at, lifetime, **fields):
    """Hand a mail job to RabbitMQ, and wait until it has the job on disk.

    issued_at is in seconds since 1970, lifetime in seconds; after it, no mail is sent.
    Mandatory: if the queue is missing, publishing fails.
    """
    g.job = secrets.token_hex(16)
    with broker_errors():
        producer.publish(
            {"template": template, "email": email, "issued_at": issued_at,
             "expires_at": issued_at + lifetime, **fields},
            routing_key=MAIL_QUEUE.name, message_id=g.job, mandatory=True,
            # However long connecting took, RabbitMQ gets this time to answer.
            confirm_timeout=max(BROKER_TIMEOUT, time_left()))
    g.deadline = time.monotonic() + REQUEST_TIMEOUT   # COMMIT has time of its own


def publish_confirmation(email):
    """Publish the confirmation, or log that none may come: the account is active."""
    g.deadline = time.monotonic() + 1   # an activation waits a second for RabbitMQ
    try:
        if is_slow("broker") and not producer:   # connecting would take long again
            raise KombuError("it did not answer less than a second ago")
        open_broker()
        publish("confirmation", email, time.time(), NOTICE_LIFETIME)
    except KombuError as error:
        log_outage("broker", error)
