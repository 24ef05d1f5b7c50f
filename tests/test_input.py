"""Requests that no honest client sends: both endpoints refuse them, each with a 4xx."""

import base64
import json
import socket
from functools import partial

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as some
from steps import (
    ACTIVATE,
    JSON,
    PASSWORD,
    REGISTER,
    activate,
    activated,
    basic,
    connect,
    fresh_email,
    problem_in,
    register,
    registered,
    send,
    wait_until,
)

endpoints = pytest.mark.parametrize("method, path", [
    ("POST", REGISTER), ("PATCH", ACTIVATE)], ids=["register", "activate"])


def ask(service, method, path, body, content_type="application/json"):
    """Sends a body as it is, with credentials that nobody has."""
    headers = {"Authorization": basic(fresh_email(), PASSWORD)}
    if content_type is not None:
        headers["Content-Type"] = content_type
    return send(service, method, path, body, headers)


def good_body(**changes):
    """What register takes, and activate answers 403 to."""
    return json.dumps({"email": fresh_email(), "password": PASSWORD,
                       "code": "0427"} | changes).encode()


def named_by(answer):
    """The fields that an answer names. Fails unless it is a 422."""
    assert (problem_in(answer), answer.json["detail"]) == (
        422, "Some fields are invalid.")
    assert all(error["detail"] for error in answer.json["errors"])
    return [error["field"] for error in answer.json["errors"]]


# -- 404, 405, 413, 415 and the headers ------------------------------------------------


@pytest.mark.parametrize("path", [
    "/", "/users/", "/users/register/", "/users/nobody", "/%00", "/users/%ff", "//"])
def test_it_answers_404_to_other_paths(service, path):
    answer = send(service, "GET", path)

    assert problem_in(answer) == 404


@endpoints
def test_it_answers_405_to_other_methods_and_names_the_right_one(service, method, path):
    others = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} - {method}

    answers = [send(service, other, path) for other in others]

    assert {answer.status for answer in answers} == {405}
    assert {frozenset(answer.headers["Allow"].split(", "))
            for answer in answers} == {frozenset({"OPTIONS", method})}


@endpoints
@pytest.mark.parametrize("sent, too_large", [
    (bytes, [413]), (lambda body: iter([body[:9], body[9:]]), [400, 413])],
    ids=["with its length", "in chunks"])
def test_it_takes_4096_bytes_and_answers_413_to_one_more(
        service, method, path, sent, too_large):
    room = 4096 - len(good_body(x=""))

    accepted = ask(service, method, path, sent(good_body(x="x" * room)))
    refused = ask(service, method, path, sent(good_body(x="x" * (room + 1))))

    assert accepted.status in (202, 403)
    assert problem_in(refused) in too_large


@endpoints
@pytest.mark.parametrize("sent_as", [
    None, "", "text/json", "json", ";", "application/problem+json", "application/jsonp",
    "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_it_answers_415_to_what_is_not_sent_as_json(service, method, path, sent_as):
    answer = ask(service, method, path, good_body(), sent_as)

    assert problem_in(answer) == 415


def test_it_keeps_its_answers_out_of_caches(service):
    email, code = registered(service)
    asked = partial(ask, service, "POST", REGISTER)

    answers = [activate(service, email, *pair) for pair in (
        [code], [code], [code, "wrong one"], [""])]
    answers += [asked(good_body()), asked(b""), asked(b"x" * 4097), asked(b"{}", "x"),
                asked(b"{}"), send(service, "GET", REGISTER),
                send(service, "GET", ACTIVATE), send(service, "PATCH", ACTIVATE)]

    assert [answer.status for answer in answers] == [
        200, 409, 403, 422, 202, 400, 413, 415, 422, 405, 405, 401]
    assert {answer.headers["Cache-Control"] for answer in answers} == {"no-store"}


@pytest.mark.parametrize("host", ["[1:::::2]", "[", "a b", "xn--a.com", "/"])
def test_it_answers_as_ever_to_a_host_and_schemes_that_are_none(service, host):
    before = len(service.log.read_text())
    headers = {"Host": host, "X-Forwarded-Proto": "//a..a/", "X-Forwarded-Ssl": "on"}

    statuses = [send(service, "GET", path, headers=headers).status for path in (
        "/docs", "/docs/", "/docs//ann@example.com", "/users//register", "/healthz")]

    assert statuses == [308, 200, 404, 404, 200]
    assert "level=ERROR" not in service.log.read_text()[before:]


# -- 400: JSON -------------------------------------------------------------------------

TEXT = json.dumps({"email": "ann@example.com", "password": PASSWORD, "code": "0427"})
NOT_JSON = {
    "empty": b"", "truncated": b'{"e', "form": b"email=ann@example.com&password=x",
    "junk after": f"{TEXT}x".encode(), "NUL after": f"{TEXT}\0".encode(),
    "BOM": b"\xef\xbb\xbf{}", "Latin-1": f'{TEXT[:-1]}, "x": "é"}}'.encode("latin-1"),
    "UTF-16": TEXT.encode("utf-16"), "surrogate in UTF-8": b'{"code": "\xed\xa0\x80"}',
    "4,096 arrays open": b"[" * 4096, "819 objects open": b'{"a":' * 819}


@endpoints
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_it_answers_400_to_what_is_not_json_in_utf_8_however_its_type_is_written(
        service, method, path, body):
    answers = [ask(service, method, path, body, content_type) for content_type in (
        "application/json", "Application/JSON", "application/json; charset=utf-16")]

    assert [problem_in(answer) for answer in answers] == [400, 400, 400]


# -- 401: HTTP Basic -------------------------------------------------------------------

GOOD = basic("ann@example.com", PASSWORD)
TOKEN = GOOD.split()[1]


def encoded(credentials):
    """The header of any bytes."""
    return b"Basic " + base64.b64encode(credentials)


@pytest.mark.parametrize("value", [
    None, "", "Basic ", f"Bearer {TOKEN}", TOKEN, f"{GOOD} {TOKEN}", "Basic !!!!",
    b"Basic \xe9", encoded(b"ann@example.com"), encoded(b"ann@example.com:"),
    encoded(b":correct horse"), encoded(b"ann@example.com:caf\xe9 au lait")])
def test_it_asks_for_basic_in_utf_8_where_credentials_are_missing_or_malformed(
        service, value):
    headers = JSON if value is None else JSON | {"Authorization": value}

    answer = send(service, "PATCH", ACTIVATE, b'{"code": "0427"}', headers)

    assert problem_in(answer) == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="users", charset="UTF-8"'
    assert "Set-Cookie" not in answer.headers


def test_it_takes_the_scheme_in_any_case_and_more_spaces(service):
    token = basic(activated(service), PASSWORD).split()[1]

    statuses = [activate(service, "", "0427", Authorization=scheme + token).status
                for scheme in ("basic ", "BASIC ", "bAsIc ", "Basic   ")]

    assert statuses == [409] * 4


# -- 422: fields -----------------------------------------------------------------------

NO_TEXTS = None, 12345678, float("inf"), True, ["1234"], {"a": "b"}, "", "\ud800", "\0"


@endpoints
@pytest.mark.parametrize("body", [
    b"{}", b"[]", b"null", b"0", b'"email"', b'["email", "password", "code"]',
    b'{"Email": "a@b.example", "Code": "1234"}', b'{"\\ud800": "\\ud800"}',
    b'{"code": %b}' % (b"9" * 4000),
    *[good_body(email=each, password=each, code=each) for each in NO_TEXTS]],
    ids=lambda body: body[:40].decode())
def test_it_answers_422_if_fields_are_missing_or_no_text(service, method, path, body):
    answer = ask(service, method, path, body)

    assert named_by(answer) == (["code"] if path == ACTIVATE else ["email", "password"])


@pytest.mark.parametrize("email", [
    "ann", "ann@", "@example.com", "ann@example", "ann@[127.0.0.1]", ".ann@example.com",
    "ann@exa_mple.com", " ann@example.com", "ann@example.com.", '"a b"@example.com',
    "Ann <ann@example.com>", "ann@a.com, bob@a.com", "ann@a.com\n",
    "ann\r\nBcc: bob@example.com\r\n@a.com", "ann\0@example.com",
    "\ud800@example.com", "ann@\udc00.example", "änn@example.com",
    "ann@exa\u200bmple.com", "ann\uff20example.com", "ann@xn--0.example",
    f"ann@{'c' * 63}.{'d' * 63}.{'e' * 63}.{'f' * 51}.example",      # 255 characters
    "ann@" + "bücher." * 40 + "example", "a@" * 1000],
    ids=lambda email: ascii(email)[:40])
def test_it_refuses_what_is_not_an_address(service, email):
    answer = register(service, email)

    assert named_by(answer) == ["email"]


@pytest.mark.parametrize("password", [
    "7 chars", "x" * 129, "e\u0301" * 7, "😀" * 7, "\u0958" * 65, "nul \0 inside",
    "line\nbreak", "C1 control \x85", "lone \ud800 surrogate", "12345678", "ELIZABETH"],
    ids=lambda password: ascii(password)[:40])
def test_it_refuses_other_lengths_control_characters_and_common_passwords(
        service, password):
    answer = register(service, fresh_email(), password)

    assert named_by(answer) == ["password"]


@pytest.mark.parametrize("email, password", [
    ("ann.baker@example.com", "ANN.BAKER"), ("ANN.BAKER@example.com", "ann.baker"),
    ("ann@bücher.example", "ann@xn--bcher-kva.example"),
    ("ann@bücher.example", "Ann@BU\u0308CHER.example")])
def test_it_refuses_the_address_or_its_local_part_as_password(service, email, password):
    answer = register(service, email, password)

    assert named_by(answer) == ["password"]


@pytest.mark.parametrize("code", [
    1234, "123", "12345", "1234\n", "1234\0", "+123", "1_23", "١٢٣٤", "²²²²",
    "12\ud8004"], ids=ascii)
def test_it_answers_422_to_what_is_not_four_ascii_digits(service, code):
    answer = activate(service, fresh_email(), code)

    assert named_by(answer) == ["code"]


# -- Any input at all ------------------------------------------------------------------

hypothetically = hypothesis_settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck))
texts = some.text(some.characters(codec=None), max_size=40)      # lone surrogates too
values = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | texts,
    lambda inner: some.lists(inner) | some.dictionaries(texts, inner), max_leaves=10)
bodies = some.binary(max_size=200) | (values | some.fixed_dictionaries(
    {"email": values, "password": values, "code": values})
    ).map(lambda value: json.dumps(value).encode())
authorizations = some.binary(max_size=60).map(encoded) | some.text(
    some.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=60
    ).map(lambda text: f"Basic {text}".encode("latin-1"))


def is_answered(answer):
    """Any input is taken, or refused with a problem of its own making."""
    return answer.status < 400 or problem_in(answer) < 500


@endpoints
@hypothetically
@given(body=bodies)
@example(body=b"[" * 1000 + b"]" * 1000).via("deep nesting, a 400 or a 422")
@example(body=b'{"code": %b}' % (b"[" * 2040 + b"]" * 2040)).via("the same in a field")
def test_it_survives_any_body(service, method, path, body):
    assert is_answered(ask(service, method, path, body))


@hypothetically
@given(value=authorizations)
@example(value=encoded(b":")).via("an empty address and an empty password")
def test_it_survives_any_credentials(service, value):
    assert is_answered(activate(service, "", "1234", Authorization=value))


# -- What no HTTP library would send ---------------------------------------------------

POST = b"POST /users/register HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
PATCH = b"PATCH /users/activate HTTP/1.1\r\nHost: a\r\n"
HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"


def answer_to(service, request):
    """Sends bytes, closes the sending half, and reads until the service closes too."""
    with connect(service) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("request_", [
    POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde" + HIDDEN,
    POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Content-Length: -1\r\n\r\n", POST + b"Content-Length: 50\r\n\r\n{",
    CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n", CHUNKED + b"\r\n2\r\n{}XX0\r\n\r\n",
    CHUNKED + b"\r\n2\r\n{", PATCH + b"Authorization: \0\r\n\r\n",
    b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    PATCH + b"Authorization: Basic " + b"a" * 16384 + b"\r\n\r\n",
    PATCH + b"A: b\r\n" * 200 + b"\r\n"], ids=lambda request_: repr(request_[-40:]))
def test_it_refuses_ambiguous_broken_and_oversized_http(service, request_):
    answer = answer_to(service, request_)

    assert int(answer[9:12]) in (400, 414, 431, 501)
    assert answer.count(b"HTTP/1.1 ") == 1      # it takes no rest for a request


def test_it_does_not_wait_for_a_body_that_is_said_to_be_too_large(service):
    with connect(service) as caller:
        caller.sendall(POST + b"Content-Length: 100000\r\n\r\n")

        assert caller.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_it_does_not_log_what_it_cannot_parse(service):
    start = len(service.log.read_text())

    for head in (b"GET /x?hunter2secret FOO\r\n", b"GET /\0?hunter2secret HTTP/1.1\r\n",
                 b"GET /x HTTP/1.1\r\nAuthorization Basic hunter2secret\r\n"):
        answer_to(service, head + b"\r\n")

    logged = wait_until(lambda: service.log.read_text()[start:])
    assert "hunter2secret" not in logged
