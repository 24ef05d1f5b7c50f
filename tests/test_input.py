"""Input that no honest client sends: odd bodies, paths and headers, and random ones."""

import base64
import json

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
    basic,
    fresh_email,
    mailed_to,
    mails_to,
    problem_in,
    register,
    send,
    send_raw,
)


def send_body(service, method, path, body):
    """A body as it is, with credentials that nobody has."""
    headers = JSON | {"Authorization": basic(fresh_email(), PASSWORD)}
    return send(service, method, path, body, headers)


# -- Bodies ----------------------------------------------------------------------------

endpoints = pytest.mark.parametrize("method, path", [
    ("POST", REGISTER), ("PATCH", ACTIVATE)], ids=["register", "activate"])
FIELDS = '"email": "ann@example.com", "password": "correct horse", "code": "1234"'

NOT_JSON = {
    "empty": b"", "spaces": b"   ", "word": b"hello", "one brace": b"{",
    "truncated": b'{"e',
    "no value": b'{"email":}', "trailing comma": f"{{{FIELDS},}}".encode(),
    "single quotes": b"{'code': '1234'}", "comment": b'{} // "code"',
    "two values": b"{}{}",
    "junk after": f"{{{FIELDS}}}x".encode(),
    "form": b"email=ann@example.com&password=x",
    "NUL after": f"{{{FIELDS}}}\0".encode(), "NUL": b"\0",
    "newline in text": b'{"a": "\n"}',
    "leading zero": b'{"code": 0427}', "hexadecimal": b"0x1f", "BOM": b"\xef\xbb\xbf{}",
    "Latin-1": f'{{{FIELDS}, "x": "\xe9"}}'.encode("latin-1"),
    "UTF-16": f"{{{FIELDS}}}".encode("utf-16"),
    "UTF-32": f"{{{FIELDS}}}".encode("utf-32"),
    "UTF-16 without BOM": f"{{{FIELDS}}}".encode("utf-16-le"),
    "surrogate in UTF-8": b'{"code": "\xed\xa0\x80"}',
    "overlong": b'{"code": "\xc0\xb1"}',
    "1,000 arrays open": b"[" * 1000, "4,096 arrays open": b"[" * 4096,
    "819 objects open": b'{"a":' * 819, "gzip": b"\x1f\x8b\x08" + bytes(17)}


@endpoints
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_it_answers_400_to_a_body_that_is_not_json(service, method, path, body):
    answer = send_body(service, method, path, body)

    assert problem_in(answer) == 400


def test_it_takes_the_last_of_duplicate_fields(service):
    first, last = fresh_email(), fresh_email()
    body = f'{{"email": "{first}", "password": "{PASSWORD}", "email": "{last}"}}'

    answer = send(service, "POST", REGISTER, body.encode(), JSON)

    assert answer.status == 202
    assert mailed_to(service, last) and not mails_to(service, first)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_it_reads_numbers_that_only_python_writes(service, number):
    fields = json.dumps({"email": fresh_email(), "password": PASSWORD})
    body = f'{fields[:-1]}, "x": {number}}}'

    assert send(service, "POST", REGISTER, body.encode(), JSON).status == 202


NESTED = b"[" * 1000 + b"]" * 1000
ODD = {
    "1,000 arrays": NESTED, "2,048 arrays": b"[" * 2048 + b"]" * 2048,
    "1,000 arrays in a field": b'{"email": "", "code": %b}' % NESTED,
    "600 objects": b'{"a":' * 600 + b"0" + b"}" * 600,
    "huge float": b'{"code": 1e99999}',
    "huge number": b'{"code": ' + b"9" * 4000 + b"}",
    "tiny float": b'{"code": 1e-99999}',
    "surrogates": b'{"email": "\\ud800", "password": "\\udfff", "code": "\\ud83d"}',
    "NULs": json.dumps(dict.fromkeys(("email", "password", "code"), "\0" * 4)).encode(),
    "lone surrogate as key": b'{"\\ud800": "\\ud800"}', "empty key": b'{"": ""}',
    "300 keys": json.dumps(dict.fromkeys(map(str, range(300)))).encode()}


@endpoints
@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_it_answers_4xx_to_odd_json(service, method, path, body):
    answer = send_body(service, method, path, body)

    assert problem_in(answer) in (400, 422)     # 1,000 levels may be too deep for it


@pytest.mark.parametrize("host", ["[1:::::2]", "[::::]", "[", "a b", "xn--a.com", "/"])
@pytest.mark.parametrize("method, path", [
    ("GET", "/docs"), ("GET", "/docs/"), ("GET", "/docs//ann@example.com"),
    ("POST", "/users//register"), ("GET", "/healthz")])
def test_it_survives_a_host_and_a_scheme_that_are_none(strict, method, path, host):
    before = len(strict.log.read_text())

    answer = send(strict, method, path, headers={
        "Host": host, "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "//a..a/"})

    assert answer.status < 500
    assert "level=ERROR" not in strict.log.read_text()[before:]


@pytest.mark.parametrize("headers", [
    {"X-Forwarded-Proto": "https, http", "X-Forwarded-Ssl": "on"},
    {"X-Forwarded-Proto": "http", "X-Forwarded-Protocol": "ssl"}], ids=str)
def test_it_takes_what_proxies_say_of_the_scheme(service, headers):
    assert send(service, "GET", "/openapi.yaml", headers=headers).status == 200


@endpoints
def test_it_reads_a_body_as_utf_8_whatever_the_type_says(service, method, path):
    body = f"{{{FIELDS}}}".encode("utf-16")

    answer = send(service, method, path, body, {
        "Content-Type": "application/json; charset=utf-16",
        "Authorization": basic(fresh_email(), PASSWORD)})

    assert problem_in(answer) == 400


@pytest.mark.parametrize("path", ["/", "/users", "/users/", "/users/register/",
                                  "/users/nobody", "/%00", "/users/%ff", "//", "/.env"])
def test_it_answers_404_to_other_paths(service, path):
    answer = send(service, "GET", path)

    assert problem_in(answer) == 404


# -- Any input at all ------------------------------------------------------------------

hypothetically = hypothesis_settings(
    max_examples=100, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck))
texts = some.text(some.characters(codec=None), max_size=40)      # lone surrogates too
values = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | texts,
    lambda inner: (some.lists(inner, max_size=4)
                   | some.dictionaries(texts, inner, max_size=4)),
    max_leaves=10)
fields = some.fixed_dictionaries({}, optional={
    "email": values | some.emails(), "password": values, "code": values})
credentials = (some.binary(max_size=60)
               | texts.map(lambda text: text.encode(errors="replace"))
               | some.tuples(some.emails(), texts).map(
                   lambda pair: ":".join(pair).encode(errors="surrogatepass")))
headers = some.text(some.characters(max_codepoint=255, exclude_categories=["Cc"])
                    | some.just("\t"), max_size=60)          # what a header may hold


def check(answer):
    """Any input is taken, or refused with a problem of its own making."""
    assert answer.status < 500
    if answer.status >= 400:
        problem_in(answer)


@endpoints
@hypothetically
@given(value=values | fields)
def test_it_survives_any_json(service, method, path, value):
    check(send_body(service, method, path, json.dumps(value).encode()))


@endpoints
@hypothetically
@given(body=some.binary(max_size=200))
def test_it_survives_any_bytes(service, method, path, body):
    check(send_body(service, method, path, body))


@hypothetically
@given(email=texts | some.emails(), password=texts)
def test_it_survives_any_text_in_the_fields(service, email, password):
    check(register(service, email, password))


@hypothetically
@given(pair=credentials)
@example(pair=b":").via("an empty address and an empty password")
def test_it_survives_any_credentials(service, pair):
    value = b"Basic " + base64.b64encode(pair)

    check(activate(service, "", "1234", Authorization=value))


@hypothetically
@given(value=headers | headers.map("Basic {}".format))
def test_it_survives_any_authorization_header(service, value):
    check(activate(service, "", "1234", Authorization=value.encode("latin-1")))


@pytest.mark.parametrize("line", [
    b"Authorization: \0", b"Authorization: \x01", b"no colon", b"a b: c", b": x",
    b"Authorization: Basic " + b"x" * 9000, b"Content-Length: 1\r\nContent-Length: 2",
    b"Content-Length: -1", b"Content-Length: x", b"Transfer-Encoding: x",
    b"Transfer-Encoding: chunked\r\n\r\nx",
    b"\r\n".join(b"X-%d: x" % n for n in range(200))])
def test_it_answers_4xx_or_501_to_what_is_not_http(service, line):
    """By gunicorn itself, so without a problem."""
    request = b"PATCH /users/activate HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n"

    status = send_raw(service, request % line)

    assert 400 <= status < 500 or status == 501
