"""Bad input, limits, guessing, tidying, and what the logs must not contain."""

import base64
import json
import re
import secrets
import socket
from contextlib import closing
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import psycopg2
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as some
from servers.program import Gunicorn
from steps import (
    ACTIVATE,
    PASSWORD,
    REGISTER,
    activate,
    activated,
    at_once,
    basic,
    code_mailed_to,
    fresh_email,
    mailed_to,
    problem_in,
    register,
    registered,
    registered_anew,
    send,
    wait_until,
    wrong,
)

JSON = {"Content-Type": "application/json"}
HOUR = 3600


def send_body(service, method, path, body):
    """A body as it is, with credentials that nobody has."""
    headers = JSON | {"Authorization": basic(fresh_email(), PASSWORD)}
    return send(service, method, path, body, headers)


def send_raw(service, request):
    """Any bytes at all; the status of the answer."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), 10) as peer:
        peer.sendall(request)
        return int(peer.makefile("rb").readline().split()[1])


def client():
    """The header of a client, behind a proxy, that no other test is."""
    network = f"{secrets.randbits(16):x}:{secrets.randbits(16):x}"
    return {"X-Forwarded-For": f"2001:db8:{network}::0"}


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
    "duplicate key": f'{{{FIELDS}, "email": "bob@example.com"}}'.encode(),
    "duplicate code": f'{{{FIELDS}, "code": "1234"}}'.encode(),
    "duplicate inside": f'{{{FIELDS}, "x": [{{"a": 1, "a": 1}}]}}'.encode(),
    "duplicate escaped": f'{{{FIELDS}, "c\\u006fde": "1234"}}'.encode(),
    "NaN": f'{{{FIELDS}, "x": NaN}}'.encode(), "Infinity": b"Infinity",
    "minus Infinity": f'{{{FIELDS}, "x": [-Infinity]}}'.encode(),
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


# -- Limits ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(servers, settings, service, tmp_path_factory):
    """An API behind a proxy, with limits so small that they are soon reached."""
    with Gunicorn(tmp_path_factory.mktemp("strict"), settings | {
            "TRUSTED_PROXIES": "1", "IP_LIMIT": "2", "EMAIL_LIMIT_HOUR": "2",
            "EMAIL_LIMIT_DAY": "3", "ACTIVATE_LIMIT_HOUR": "2"}) as api:
        api.maildev_url = service.maildev_url
        yield api


def test_it_limits_the_registrations_of_a_client(strict):
    here = client()

    answers = [register(strict, fresh_email(), **here) for _ in range(3)]
    elsewhere = register(strict, fresh_email(), **client())

    assert [answer.status for answer in [*answers, elsewhere]] == [202, 202, 429, 202]
    assert problem_in(answers[2]) == 429
    assert 500 < int(answers[2].headers["Retry-After"]) <= 600
    assert answers[2].headers["Cache-Control"] == "no-store"


def test_it_limits_the_activations_of_a_client_apart(strict):
    here = client()

    registrations = [register(strict, fresh_email(), **here).status for _ in range(3)]
    activations = [activate(strict, fresh_email(), "1234", **here) for _ in range(3)]

    assert registrations == [202, 202, 429]
    assert [answer.status for answer in activations] == [401, 401, 429]
    assert problem_in(activations[2]) == 429
    assert 500 < int(activations[2].headers["Retry-After"]) <= 600


def test_it_counts_nothing_against_an_address_that_a_refused_client_names(strict):
    email, greedy = fresh_email(), client()
    for _ in range(2):
        register(strict, fresh_email(), **greedy)

    refused = [register(strict, email, **greedy).status for _ in range(3)]

    assert refused == [429, 429, 429]
    assert register(strict, email, **client()).status == 202


def test_it_limits_the_registrations_of_an_address_in_an_hour(strict):
    email = fresh_email()

    answers = [register(strict, spelling, **client())
               for spelling in (email, email.upper(), email.title())]

    assert [answer.status for answer in answers] == [202, 202, 429]
    assert HOUR - 100 < int(answers[2].headers["Retry-After"]) <= HOUR


def test_it_limits_the_registrations_of_an_address_in_a_day(strict, database):
    email = fresh_email()
    statuses = [register(strict, email, **client()).status for _ in range(2)]
    database("""UPDATE limits SET expires_at = now()
                 WHERE subject = %s AND expires_at < now() + interval '1 h'""", [email])

    accepted, refused = [register(strict, email, **client()) for _ in range(2)]

    assert [*statuses, accepted.status, refused.status] == [202, 202, 202, 429]
    assert 24 * HOUR - 100 < int(refused.headers["Retry-After"]) <= 24 * HOUR


def test_it_limits_the_activations_of_an_address_the_right_one_too(strict):
    email = fresh_email()
    register(strict, email, **client())
    code = code_mailed_to(strict, email)

    guesses = [activate(strict, email, code, "wrong password", **client()).status
               for _ in range(2)]
    refused = activate(strict, email.upper(), code, **client())

    assert guesses == [401, 401]
    assert problem_in(refused) == 429
    assert HOUR - 100 < int(refused.headers["Retry-After"]) <= HOUR


def test_it_limits_known_and_unknown_addresses_alike(service, strict):
    active, unknown = activated(service), fresh_email()
    activate(service, unknown, "1234")                 # as often as the active one

    answers = [(activate(strict, active, "1234", "wrong password", **client()),
                activate(strict, unknown, "1234", "wrong password", **client()))
               for _ in range(2)]

    assert [known.status for known, _ in answers] == [401, 429]
    assert all(known.body == other.body for known, other in answers)


def test_it_changes_nothing_once_a_limit_is_reached(strict):
    email = fresh_email()
    for _ in range(2):
        register(strict, email, **client())
    newest = code_mailed_to(strict, email, 2)

    refused = register(strict, email, "the password of another", **client())

    assert refused.status == 429
    assert activate(strict, email, newest, **client()).status == 200


def test_it_counts_from_zero_when_the_window_is_over(strict, database):
    email, before = fresh_email(), client()
    first = [register(strict, email, **before).status for _ in range(3)]
    database("UPDATE limits SET expires_at = now() WHERE subject = %s", [email])

    again = [register(strict, email, **client()).status for _ in range(3)]

    assert first == again == [202, 202, 429]


def test_it_does_not_lengthen_a_window_by_counting(strict, database):
    email = fresh_email()
    ends = "SELECT name, expires_at FROM limits WHERE subject = %s ORDER BY name"
    register(strict, email, **client())
    before = database(ends, [email])

    for _ in range(3):
        register(strict, email, **client())

    assert database(ends, [email]) == before


def test_it_holds_its_limits_over_two_processes(strict, start_service):
    other = start_service(EMAIL_LIMIT_HOUR="2", ACTIVATE_LIMIT_HOUR="2")
    email = fresh_email()

    registrations = at_once(*[partial(register, api, email, **client())
                              for api in (strict, other) * 4])
    activations = at_once(*[partial(activate, api, email, "1234", "wrong one",
                                    **client())
                            for api in (strict, other) * 4])

    assert sorted(each.status for each in registrations) == [202] * 2 + [429] * 6
    assert sorted(each.status for each in activations) == [401] * 2 + [429] * 6


def test_it_counts_the_addresses_of_an_ipv6_network_together(strict):
    site = f"2001:db8:{secrets.randbits(16):x}"
    addresses = [f"{site}:7::1", f"{site}:7:ffff:ffff:ffff:ffff",
                 f"{site.upper()}:7::2", f"{site}:8::1"]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": address}).status
                for address in addresses]

    assert statuses == [202, 202, 429, 202]


def test_it_counts_an_ipv4_address_alone_mapped_or_not(strict):
    network = "10.%d.%d" % tuple(secrets.token_bytes(2))
    addresses = [f"{network}.1", f"::ffff:{network}.1", f"{network}.1", f"{network}.2",
                 f"::ffff:{network}.3"]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": address}).status
                for address in addresses]

    assert statuses == [202, 202, 429, 202, 202]


def test_it_trusts_only_what_its_proxy_has_appended(strict):
    real = client()["X-Forwarded-For"]
    chains = [f"{client()['X-Forwarded-For']}, {real}" for _ in range(3)]

    statuses = [register(strict, fresh_email(), **{"X-Forwarded-For": chain}).status
                for chain in chains]

    assert statuses == [202, 202, 429]


def test_it_counts_clients_without_a_proper_address_together(strict):
    garbage = ["unknown", "_hidden", "1.2.3.4.5", "::g", "999.1.1.1", "x" * 4000, "é",
               "1.2.3.4/0", "%", "a b=c", "0x7f000001", ", ,", "[::1]:80"]

    answers = [register(strict, fresh_email(),
                        **{"X-Forwarded-For": each.encode("latin-1")})
               for each in garbage]

    assert {answer.status for answer in answers[2:]} == {429}


def test_it_ignores_x_forwarded_for_without_a_proxy(start_service):
    api = start_service(IP_LIMIT="1", TRUSTED_PROXIES="0")
    register(api, fresh_email())

    statuses = [register(api, fresh_email(), **client()).status for _ in range(2)]

    assert statuses == [429, 429]


@pytest.mark.parametrize("allowed", [0, 1, 7, 60, 1000])
def test_it_names_the_shortest_pause_in_which_repeating_keeps_within_the_limit(
        start_service, allowed):
    nowhere = "postgresql://127.0.0.1:1/nothing"
    api = start_service(DATABASE_URL=nowhere, IP_LIMIT=str(allowed))

    refused = register(api, fresh_email())

    pause = int(refused.headers["Retry-After"])
    assert problem_in(refused) == 503
    assert len(range(0, 600, pause)) <= max(allowed, 1)     # requests in ten minutes
    assert pause == 1 or len(range(0, 600, pause - 1)) > allowed


# -- Guessing --------------------------------------------------------------------------


@pytest.fixture
def guesses(database):
    """Counts, in the database, the codes that were compared: guesses(email)."""
    database("""
        CREATE TABLE guesses (email text);
        CREATE FUNCTION count_guess() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO guesses VALUES (new.email); RETURN NULL; END $$;
        CREATE TRIGGER count_guess AFTER UPDATE ON users
            FOR EACH ROW WHEN (new.registered_at = old.registered_at)
            EXECUTE FUNCTION count_guess()""")
    yield lambda email: database("""
        SELECT count(*) FROM guesses WHERE email = %s""", [email])[0][0]
    database("DROP FUNCTION count_guess CASCADE; DROP TABLE guesses")


@pytest.fixture(scope="module")
def default(servers, settings, service, tmp_path_factory):
    """An API with the default limits: an empty setting is one that is not set."""
    with Gunicorn(tmp_path_factory.mktemp("default"), settings | {
            "CODE_LIFETIME": "", "CODE_ATTEMPTS": "", "EMAIL_LIMIT_HOUR": "",
            "EMAIL_LIMIT_DAY": "", "ACTIVATE_LIMIT_HOUR": "", "IP_LIMIT": "",
            "TRUSTED_PROXIES": "1"}) as api:
        api.maildev_url = service.maildev_url
        yield api


def test_it_compares_at_most_15_codes_of_an_address_in_an_hour(default, guesses):
    email = fresh_email()
    calls = [partial(activate, default, email, "1234", **client()) for _ in range(7)]

    statuses = [answer.status for _ in range(7)
                for answer in at_once(partial(register, default, email, **client()),
                                      *calls)]

    assert statuses.count(202) == 5
    assert 3 <= guesses(email) <= 15


def test_it_compares_all_15_where_each_registration_is_used_up(default, guesses):
    email = fresh_email()

    for count in range(1, 7):
        register(default, email, **client())
        code = code_mailed_to(default, email, min(count, 5))
        at_once(*[partial(activate, default, email, wrong(code), **client())] * 4)

    assert guesses(email) == 15


@pytest.mark.parametrize("window, allowed", [("1 h", 5), ("1 day", 20)])
def test_it_takes_5_registrations_an_hour_and_20_a_day(
        default, database, window, allowed):
    email = fresh_email()
    register(default, email, **client())
    database("""UPDATE limits SET count = %s WHERE subject = %s AND expires_at
                BETWEEN now() + interval %s * 0.9 AND now() + interval %s""",
             [allowed - 1, email, window, window])

    statuses = [register(default, email, **client()).status for _ in range(2)]

    assert statuses == [202, 429]


def test_it_takes_100_activations_an_hour_of_an_address(default, database):
    email = fresh_email()
    activate(default, email, "1234", **client())
    database("UPDATE limits SET count = 99 WHERE subject = %s", [email])

    statuses = [activate(default, email, "1234", **client()).status for _ in range(2)]

    assert statuses == [401, 429]


def test_it_takes_60_requests_of_a_client_in_10_minutes(default, database):
    here = client()
    register(default, fresh_email(), **here)
    database("UPDATE limits SET count = 59 WHERE subject LIKE %s",
             [here["X-Forwarded-For"].removesuffix("0") + "%"])

    statuses = [register(default, fresh_email(), **here).status for _ in range(2)]

    assert statuses == [202, 429]


def test_it_keeps_a_squatter_who_came_first_out(service):
    email, old = registered(service)                       # the squatter, with PASSWORD
    code = registered_anew(service, email, old, "the owner's password")

    before = [activate(service, email, each).status for each in (old, code)]
    owner = activate(service, email, code, "the owner's password")
    after = [activate(service, email, each).status for each in (old, code)]

    assert before == after == [401, 401]
    assert owner.status == 200


def test_it_keeps_a_squatter_who_came_second_out(service):
    email, old = registered(service)                       # the owner, with PASSWORD
    squatted = registered_anew(service, email, old, "the squatter's password")

    owner = [activate(service, email, each).status for each in (old, squatted)]
    code = registered_anew(service, email, squatted)
    squatter = [activate(service, email, each, "the squatter's password").status
                for each in (old, wrong(code), code)]
    at_last = activate(service, email, code)

    assert owner == [401, 401]
    assert squatter == [401, 401, 401]
    assert at_last.status == 200
    assert activate(service, email, code, "the squatter's password").status == 401


# -- Tidy ------------------------------------------------------------------------------


@pytest.fixture
def old_rows(database):
    """Inserts so many expired rows into each table; counts those left: (users, limits).

    They are the oldest rows of their tables, and each has a time of its own.
    """
    name = {"name": fresh_email().partition("@")[0]}

    def insert(count):
        database("""
            INSERT INTO users (email, password_hash, code_digest, expires_at,
                               registered_at)
            SELECT %(name)s || n || '@old.example', '', sha256(''), now(),
                   now() - interval '1 month' + n * interval '1 ms'
              FROM generate_series(1, %(count)s) AS n;
            INSERT INTO limits (name, subject, count, expires_at)
            SELECT 'old', %(name)s || n, 1,
                   now() - interval '1 month' + n * interval '1 ms'
              FROM generate_series(1, %(count)s) AS n""", name | {"count": count})

    def left():
        return database("""
            SELECT (SELECT count(*) FROM users WHERE email LIKE %(name)s || '%%'),
                   (SELECT count(*) FROM limits WHERE subject LIKE %(name)s || '%%')
            """, name)[0]

    yield SimpleNamespace(name=name, insert=insert, left=left)
    database("""
        DELETE FROM users WHERE email LIKE %(name)s || '%%';
        DELETE FROM limits WHERE subject LIKE %(name)s || '%%'""", name)


@pytest.fixture
def tidier(servers, start_service):
    """An API of one worker that refuses each request right after it may have tidied.

    Its sessions use the indexes, although the tables are small.
    """
    options = "enable_seqscan=off enable_bitmapscan=off enable_sort=off"
    options = quote(" ".join(f"-c {option}" for option in options.split()))
    url = f"{servers.postgres.url}?application_name=tidier&options={options}"
    return start_service(DATABASE_URL=url, WEB_CONCURRENCY="1", IP_LIMIT="0")


def tidies(tidier, old_rows, left=(0, 0), ask=register):
    """Sends requests until only so many old rows are left; gives all their counts."""
    counts = [old_rows.left()]

    def is_done():
        assert ask(tidier, fresh_email()).status == 429
        counts.append(old_rows.left())
        return counts[-1] == left

    wait_until(lambda: any(is_done() for _ in range(100)), 60)     # without pauses
    return counts


def test_it_takes_away_what_is_out_of_date_a_little_at_a_time(tidier, old_rows):
    old_rows.insert(1000)

    counts = tidies(tidier, old_rows)

    for of_one_table in zip(*counts):
        assert all(before - after <= 300 for before, after in pairwise(of_one_table))


def test_it_tidies_at_activations_too(tidier, old_rows):
    old_rows.insert(10)

    tidies(tidier, old_rows, ask=partial(activate, code="1234"))


def test_it_leaves_what_is_still_of_use(service, tidier, old_rows, database):
    active, (waiting, code) = activated(service), registered(service)
    both = [active, waiting]
    database("""
        UPDATE users SET registered_at = now() - interval '1 year' WHERE email = %s;
        UPDATE users SET registered_at = now() - interval '23 hours 59 minutes'
         WHERE email = %s;
        UPDATE limits SET expires_at = now() + interval '5 minutes'
         WHERE subject IN (%s, %s);
        DELETE FROM limits WHERE expires_at < now()""", [*both, *both])
    kept = ("""SELECT (SELECT count(*) FROM users WHERE email IN (%s, %s)),
                      (SELECT count(*) FROM limits WHERE subject IN (%s, %s))""",
            [*both, *both])
    before = database(*kept)
    old_rows.insert(10)

    tidies(tidier, old_rows)

    assert database(*kept) == before
    assert activate(service, waiting, code).status == 200


def test_it_does_not_wait_for_old_rows_that_are_in_use(servers, tidier, old_rows):
    old_rows.insert(10)
    with closing(psycopg2.connect(servers.postgres.url)) as session:
        session.cursor().execute("""
            SELECT FROM users, limits
             WHERE email = %(name)s || '1@old.example' AND subject = %(name)s || '1'
               FOR UPDATE""", old_rows.name)

        tidies(tidier, old_rows, left=(1, 1))


def test_it_does_not_pass_over_what_it_has_deleted_while_a_backup_runs(
        servers, tidier, old_rows, database):
    database("VACUUM users, limits")     # of what other tests have deleted
    old_rows.insert(3000)
    before = entries_read(database)
    with closing(psycopg2.connect(servers.postgres.url)) as backup:
        backup.set_session(isolation_level="REPEATABLE READ")
        backup.cursor().execute("SELECT count(*) FROM users")     # its snapshot

        tidies(tidier, old_rows)
        tidier.stop()

    # Only the end of a session brings its last figures into the statistics.
    wait_until(lambda: not database("""
        SELECT FROM pg_stat_activity WHERE application_name = 'tidier'"""))
    read = [after - was for was, after in zip(before, entries_read(database))]
    assert all(3000 <= count < 2 * 3000 for count in read)


def entries_read(database):
    """How many entries were read of the index by time of each table, ever."""
    return [count for count, in database("""
        SELECT idx_tup_read
          FROM pg_stat_user_indexes
         WHERE indexrelname IN ('users_waiting', 'limits_expired')
         ORDER BY indexrelname""")]


# -- Logs ------------------------------------------------------------------------------

LOGFMT = re.compile(r'time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ level=[A-Z]+'
                    r'( [a-z_]+=("([^"\\]|\\.)*"|[^\s"]*))+')


def told_by(path, offset=0):
    """What a log has told since it was so long, without times, which are digits too."""
    return re.sub(r"\b(time|ms)=\S*", r"\1=", path.read_text()[offset:])


def logged_by(service, before):
    """The (method, route, status, job) of each request that it has logged since."""
    return re.findall(
        r"event=request client=127\.0\.0\.1 method=(\S+) route=(\S+) status=(\d+)"
        r" job=(\S+) ms=\d+$", service.log.read_text()[before:], re.M)


def test_it_logs_each_request_in_a_line(service):
    before = len(service.log.read_text())

    activate(service, fresh_email(), "1234", "wrong password")
    register(service, "no address")
    send(service, "GET", "/nowhere")
    send(service, "GET", "/healthz")

    assert wait_until(lambda: len(logged_by(service, before)) == 4
                      and logged_by(service, before)) == [
        ("PATCH", ACTIVATE, "401", "-"), ("POST", REGISTER, "422", "-"),
        ("GET", "-", "404", "-"), ("GET", "/healthz", "200", "-")]


def test_it_logs_the_id_of_a_job_with_its_request_and_with_its_mail(service):
    before = len(service.log.read_text())

    email, code = registered(service)
    activate(service, email, code)
    register(service, email)

    requests = wait_until(lambda: len(logged_by(service, before)) == 3
                          and logged_by(service, before))
    jobs = [job for *_, job in requests]
    assert [status for _, _, status, _ in requests] == ["202", "200", "202"]
    assert len(set(jobs)) == 3
    for job in jobs:
        wait_until(lambda: f"event=job job={job} outcome=sent"
                   in service.consumer.log.read_text())


def test_it_logs_nothing_that_is_secret_or_personal(service):
    email, password = fresh_email(), "a passphrase of its own"
    offsets = {log: len(log.read_text()) for log in (service.log, service.consumer.log)}
    register(service, email, password)
    code = code_mailed_to(service, email)
    activate(service, email, wrong(code), password)
    activate(service, email, code, password)
    register(service, email, password)
    mailed_to(service, email, 3)

    def logs():
        return "".join(told_by(log, offset) for log, offset in offsets.items())

    # The last job is logged only after its mail has arrived.
    wait_until(lambda: logs().count("event=request") >= 4
               and logs().count("event=job") >= 3)
    personal = [email, email.partition("@")[0], password,
                basic(email, password).split()[1]]
    assert not [each for each in personal if each in logs()]
    assert not {code, wrong(code)} & set(re.findall(r"\w+", logs()))


def test_it_logs_nothing_of_what_a_stranger_sends(strict):
    word, before = secrets.token_hex(8), len(strict.log.read_text())

    send(strict, "GET", f"/{word}?{word}",
         headers={"Referer": word, "User-Agent": word})
    send(strict, "POST", REGISTER, word.encode(), JSON | {"X-Request-Id": word})
    register(strict, f"{word}@", word)
    activate(strict, word, word, word, Cookie=word)
    register(strict, fresh_email(), **{"X-Forwarded-For": f'{word} status=200 "'})

    wait_until(lambda: strict.log.read_text()[before:].count(" route=/users/") == 4)
    assert word not in strict.log.read_text()


def test_it_logs_an_error_that_it_did_not_expect_in_one_line(start_service, database):
    api = start_service()
    email, code = registered(api)
    database("""UPDATE users SET activated_at = '10000-01-01'
                 WHERE email = %s""", [email])     # a year that Python does not know
    before = len(api.log.read_text())

    failed = activate(api, email, code)

    def lines():
        return api.log.read_text()[before:].splitlines()

    assert problem_in(failed) == 500
    wait_until(lambda: any("event=request" in line for line in lines()))
    assert [line for line in lines() if not LOGFMT.fullmatch(line)] == []
    assert [line.split()[1] for line in lines()] == ["level=ERROR", "level=INFO"]
    assert "ValueError" in lines()[0]
    assert not {email, code} & set(re.findall(r"[\w@.]+", "".join(lines())))


def test_it_logs_in_logfmt_and_utc_whatever_came(service):
    for line in (b'GET /"quoted" HTTP/9.9', b'"GET" / level=INFO',
                 b"GET / HTTP/1.1\r\na b"):
        send_raw(service, line + b"\r\n\r\n")

    lines = [line for log in (service.log, service.consumer.log)
             for line in log.read_text().splitlines()]

    assert [line for line in lines if not LOGFMT.fullmatch(line)] == []
