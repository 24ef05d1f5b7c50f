"""nginx as nginx.conf configures it, before two real APIs."""

import json
import re
import secrets
from functools import partial
from types import SimpleNamespace

import psycopg2
import pytest
from servers.edge import Edge
from servers.install import install_missing
from servers.process import running
from servers.program import Gunicorn
from steps import (
    ACTIVATE,
    JSON,
    PASSWORD,
    REGISTER,
    activate,
    at_once,
    code_mailed_to,
    connect,
    fresh_email,
    mails_to,
    problem_in,
    register,
    send,
    shown,
    wait_until,
)
from steps.logs import FIELD, events

POST = (b"POST /users/register HTTP/1.1\r\nHost: a\r\n"
        b"Content-Type: application/json\r\n")
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
HIDDEN = b"DELETE /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
STOPPED = SimpleNamespace(port=1)    # nothing listens there


@pytest.fixture(scope="module")
def edge(servers, settings, service):
    """The edge; .api is its first API; .spare is the other, for two proxies."""
    install_missing("nginx")
    folder = servers.folder / "edge"     # as root, nginx works as somebody else
    apis = [Gunicorn(folder / proxies, settings | {
        "TRUSTED_PROXIES": proxies, "WEB_CONCURRENCY": "1"}) for proxies in ("1", "2")]
    with running(*apis, Edge(folder, *apis)) as (api, spare, edge):
        edge.api, edge.spare, edge.maildev_url = api, spare, service.maildev_url
        yield edge


def answer_to(edge, request):
    """Sends bytes and reads until the edge closes; it gives up who closes first."""
    with connect(edge) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# -- The way through it ----------------------------------------------------------------


def test_the_whole_flow_works_through_it_with_the_cookies_of_a_site_with_many(edge):
    email, cookies = fresh_email(), "a=" + "a" * 8192

    accepted = register(edge, email, Cookie=cookies)
    done = activate(edge, email, code_mailed_to(edge, email), Cookie=cookies)

    assert (accepted.status, done.status) == (202, 200)


@pytest.mark.parametrize("call", [
    partial(register, email="nobody"), partial(activate, email="", code="1"),
    partial(send, method="DELETE", path=REGISTER),
    partial(send, method="GET", path="/docs"),     # it leads to /docs/, on any host
    partial(send, method="POST", path=REGISTER, body=b" " * 9000, headers=JSON)],
    ids=["422", "401", "405", "308", "413"])
def test_it_changes_nothing_of_an_answer(edge, call):
    answers = [call(server) for server in (edge, edge.api)]

    for answer in answers:
        del answer.headers["Server"], answer.headers["Connection"]
    assert shown(answers[0]) == shown(answers[1])


def test_it_passes_on_which_client_a_tls_proxy_in_front_of_it_has(edge):
    with Edge(edge.folder / "behind", edge.spare) as behind_a_proxy:
        send(behind_a_proxy, "GET", "/docs", headers={"X-Forwarded-For": "203.0.113.9"})

    assert events(edge.spare.log, event="request", client="203.0.113.9")


def test_it_takes_its_client_for_its_client_whatever_that_claims_to_be(edge):
    register(edge, fresh_email(), **dict.fromkeys([
        "X-Forwarded-For", "X_Forwarded_For", "Forwarded", "X-Real-IP", "Client-IP"],
        "203.0.113.9"))

    assert events(edge.api.log, event="request")[-1]["client"] == "127.0.0.1"


def test_it_does_not_pass_health_checks_on(edge):
    assert problem_in(send(edge, "GET", "/healthz")) == 404


# -- Slow clients ----------------------------------------------------------------------


def test_it_answers_others_while_200_connections_trickle(edge):
    """Each sends or reads one more byte for each of the others' requests."""
    head = b"GET /edge HTTP/1.1\r\nConnection: close\r\nHost: abcdefghi\r\n\r\n"
    body = POST + b"Connection: close\r\nContent-Length: 20\r\n\r\n" + b" " * 20
    senders = [(connect(edge), request) for request in [head, body] * 80]
    readers = [connect(edge, receive=4096) for _ in range(40)]
    for connection, request in senders:
        connection.sendall(request[:-12])
    for reader in readers:
        reader.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.0\r\n\r\n")

    statuses = []
    for count in range(-12, -9):
        for connection, request in senders:
            connection.sendall(request[count:count + 1])
        assert all(reader.recv(1) for reader in readers)
        statuses.append(register(edge, fresh_email()).status)

    assert statuses == [202] * 3
    for connection, request in senders:     # they were open all the time
        connection.sendall(request[-9:])
        status = connection.makefile("rb").readline().split()[1]
        assert status == (b"204" if request == head else b"400")
    assert all(len(reader.makefile("rb").read()) > 1_000_000 for reader in readers)


# -- Its own errors --------------------------------------------------------------------


@pytest.mark.parametrize("request_, status", [
    (b"garbage\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", 400),
    (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    (b"GET /docs/?" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    (POST + b"Content-Length: 20000\r\n\r\n" + b"a" * 20000, 413),
    (CHUNKED + b"\r\n5000\r\n" + b"a" * 0x5000, 413),
    (POST + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    (b"GET /docs/ HTTP/1.0\r\nHost: a\r\nIf-Match: \"a\"\r\n\r\n", 412),
    (b"GET /openapi.yaml HTTP/1.0\r\nHost: a\r\nRange: bytes=9999999-\r\n\r\n", 416),
    (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505)])
def test_its_own_errors_are_problems_too(edge, request_, status):
    head, _, body = answer_to(edge, request_).partition(b"\r\n\r\n")

    first, *lines = head.decode().split("\r\n")
    answer = SimpleNamespace(status=int(first.split()[1]), json=json.loads(body),
                             headers=dict(line.split(": ") for line in lines))
    assert problem_in(answer) == status
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", [REGISTER, ACTIVATE, "/docs/"])
def test_it_names_the_same_methods_as_the_api_when_it_refuses_trace(edge, path):
    answers = [send(server, "TRACE", path) for server in (edge, edge.api)]

    allowed = [sorted(answer.headers["Allow"].split(", ")) for answer in answers]
    assert [problem_in(answer) for answer in answers] == [405, 405]
    assert allowed[0] == allowed[1]


def test_it_answers_503_with_retry_after_while_no_api_runs(edge):
    with Edge(edge.folder / "alone", STOPPED, STOPPED) as alone:
        refused = register(alone, fresh_email())

    assert problem_in(refused) == 503
    assert refused.headers["Retry-After"] == "2"
    assert events(alone.log, event="edge", method="POST", status="503")


# -- An API that stops -----------------------------------------------------------------


def test_it_asks_another_api_where_one_is_stopped(edge):
    with Edge(edge.folder / "other", STOPPED, edge.api) as other:
        statuses = [register(other, fresh_email()).status for _ in range(3)]

    assert statuses == [202] * 3


def test_it_sends_a_request_once_even_if_the_api_dies(edge, servers, database):
    email, holder = fresh_email(), psycopg2.connect(servers.postgres.url)
    holder.cursor().execute("""
        INSERT INTO users (email, password_hash, code_digest, expires_at)
        VALUES (%s, '', sha256(''), now())""", [email])     # the API's waits for it

    def kill_when_under_way():
        wait_until(lambda: database("""
            SELECT 1 FROM pg_stat_activity
             WHERE wait_event_type = 'Lock' AND strpos(query, 'INTO users') > 0"""))
        edge.api.kill()
        holder.close()

    answer, _ = at_once(partial(register, edge, email), kill_when_under_way)
    edge.api.start()
    healed = register(edge, fresh_email())

    assert problem_in(answer) == 503
    assert not database("SELECT 1 FROM users WHERE email = %s", [email])
    assert not mails_to(edge, email)
    assert healed.status == 202


# -- Smuggling -------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [
    CHUNKED + b"Content-Length: 6\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    CHUNKED + b"\r\n0x0\r\n\r\n" + HIDDEN,
    CHUNKED + b"Connection: close\r\n\r\n24\r\n" + HIDDEN + b"\r\n0\r\n\r\n",
    POST + b"Connection: close\r\nContent-Length: 36\r\n\r\n" + HIDDEN,
    CHUNKED.replace(b"1.1", b"1.0") + b"\r\n0\r\n\r\n" + HIDDEN,
    POST + b"A: b\r\r" + HIDDEN, POST + b"A: b\0\r\n\r\n" + HIDDEN,
    b"GET /%0d%0a%0d%0aDELETE%20/ HTTP/1.0\r\n\r\n",
    b"GET /docs/?%0d%0a%0d%0aDELETE%20/ HTTP/1.0\r\n\r\n"])
def test_no_request_reaches_the_api_inside_of_another(edge, request_):
    before = len(edge.api.log.read_text())

    answer = answer_to(edge, request_)
    send(edge, "OPTIONS", "/")

    told = wait_until(lambda: re.search(
        "(?s).*method=OPTIONS", edge.api.log.read_text()[before:]))[0]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert "method=DELETE" not in told


# -- Its log ---------------------------------------------------------------------------


def test_it_logs_nothing_of_what_a_stranger_sends(edge):
    word = secrets.token_hex(8)

    # nginx reports that it cannot reach the first API, if its error log lets it.
    with Edge(edge.folder / "log", STOPPED, edge.api) as logged:
        send(logged, "GET", f"/{word}?{word}",
             headers={"Referer": word, "Cookie": word})
        register(logged, f"{word}@example.com", PASSWORD, X_Y=word)
        answer_to(logged, f"GET /{word} HTTP/9.9\r\n{word}\r\n\r\n".encode())
        answer_to(logged, f"{word} / HTTP/1.1\r\n{word}: x\r\n\r\n".encode())
        wait_until(lambda: logged.log.read_text().count("event=edge") == 4)

    assert word not in logged.log.read_text()
    lines = logged.log.read_text().splitlines()
    assert all(re.fullmatch(f"({FIELD.pattern}( |$))+", line)
               for line in lines if "event=edge" in line)     # logfmt
