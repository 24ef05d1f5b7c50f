"""What the tests do, as verbs."""

import base64
import http.client
import json
import re
import secrets
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

from servers.process import tree

PASSWORD = "correct horse battery"
REGISTER, ACTIVATE = "/users/register", "/users/activate"
JSON = {"Content-Type": "application/json"}


def fresh_email():
    """An address that no other test uses, which stands in for cleaning up."""
    return f"{uuid.uuid4().hex[:12]}@example.com"


def fresh_client():
    """The header of a client, behind a proxy, that no other test is."""
    network = f"{secrets.randbits(16):x}:{secrets.randbits(16):x}"
    return {"X-Forwarded-For": f"2001:db8:{network}::0"}


def send(service, method, path, body=b"", headers=None):
    """One request on a connection of its own: .status, .headers, .body, .json."""
    host = urlsplit(service.url).netloc
    connection = http.client.HTTPConnection(host, timeout=15)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    is_json = "json" in (response.headers["Content-Type"] or "")
    return SimpleNamespace(
        status=response.status, headers=response.headers, body=content,
        json=json.loads(content) if is_json and content else None)


def send_json(service, method, path, fields, headers=None):
    """The same with a JSON body."""
    return send(service, method, path, json.dumps(fields).encode(),
                JSON | (headers or {}))


def send_raw(service, request):
    """Any bytes at all; the status of the answer."""
    with connect(service) as connection:
        connection.sendall(request)
        return int(connection.makefile("rb").readline().split()[1])


def connect(service, receive=None):
    """A TCP connection to the service; receive: bytes that may wait on our side."""
    url, connection = urlsplit(service.url), socket.socket()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(10)
    connection.connect((url.hostname, url.port))
    return connection


def register(service, email, password=PASSWORD, **headers):
    """POST /users/register."""
    return send_json(service, "POST", REGISTER,
                     {"email": email, "password": password}, headers)


def activate(service, email, code, password=PASSWORD, **headers):
    """PATCH /users/activate."""
    return send_json(service, "PATCH", ACTIVATE, {"code": code},
                     {"Authorization": basic(email, password)} | headers)


def basic(email, password):
    """The value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{email}:{password}".encode()).decode()


def problem_in(answer):
    """The status of an error. Fails unless its problem details are complete."""
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["status"] == answer.status
    assert answer.json["title"] and answer.json["detail"]
    assert "type" not in answer.json     # RFC 9457: then it is about:blank
    return answer.status


def shown(answer):
    """All that a caller sees of an answer, but its Date."""
    headers = sorted(pair for pair in answer.headers.items() if pair[0] != "Date")
    return answer.status, headers, answer.body


def timed(call):
    """The answer of a call, with the .seconds that it took."""
    started = time.monotonic()
    answer = call()
    answer.seconds = time.monotonic() - started
    return answer


def refused_in_time(answer, seconds=5):
    """Whether it is the 503 of an outage, with Retry-After, within so many seconds."""
    return (problem_in(answer) == 503 and int(answer.headers["Retry-After"]) > 0
            and answer.seconds < seconds)


def at_once(*calls):
    """Calls functions without arguments at the same time; their results in order."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda call: call(), calls))


def wait_until(condition, seconds=20):
    """Polls until the condition is true, and returns what it gave; else fails."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return result


def wait_until_at_rest(service, seconds=20):
    """Until nobody in a crowd is refused, as some are for a second after a stall."""
    def healthy():
        return send(service, "GET", "/healthz").status == 200

    wait_until(lambda: all(at_once(*[healthy] * 16)), seconds)


def mails_to(service, email):
    """All mails that MailDev has for an address, as its dicts, the oldest first."""
    maildev = SimpleNamespace(url=service.maildev_url)
    return send(maildev, "GET", f"/email?headers.to={quote(email)}").json


def mailed_to(service, email, count=1):
    """Waits for so many mails to an address and returns the last of them."""
    return wait_until(lambda: mails_to(service, email)[count - 1:count])[0]


def code_mailed_to(service, email, count=1):
    """The code in the count-th mail to an address; waits for it."""
    text = mailed_to(service, email, count)["text"]
    return re.search(r"^[0-9]{4}$", text, re.MULTILINE)[0]


def wrong(code):
    """A code that is not this one."""
    return f"{(int(code) + 1) % 10_000:04}"


def accepted(service, email, **headers):
    """Registers an address; the 202. Like a client, it asks again after a 503: others
    on this machine may have slowed a server down."""
    def ask():
        answer = timed(lambda: register(service, email, **headers))
        assert answer.status in (202, 503)
        return answer if answer.status == 202 else None

    return wait_until(ask)


def registered(service, **headers):
    """A fresh address that waits: (email, the code that was mailed)."""
    accepted(service, email := fresh_email(), **headers)
    return email, code_mailed_to(service, email)


def registered_anew(service, email, code, password=PASSWORD):
    """Registers a waiting address again, until its newest code is another; the code."""
    count = len(mails_to(service, email))
    while (newest := code_mailed_to(service, email, count)) == code:
        assert register(service, email, password).status == 202
        count += 1
    return newest


def activated(service):
    """A fresh address with an active account; its first two mails are here."""
    email, code = registered(service)
    assert activate(service, email, code).status == 200
    mailed_to(service, email, 2)
    return email


def rows_of(database, email, columns="*"):
    """What the table of users has of an address: one row in a list, or none."""
    return database(f"SELECT {columns} FROM users WHERE email = %s", [email])


def workers_of(api):
    """The process ids of an API's workers."""
    return tree(api.process.pid)[1:]
