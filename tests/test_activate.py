"""PATCH /users/activate: HTTP Basic and the code, and how long a code lives."""

import base64
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import argon2
import pytest
from servers.faults import row_locked, statements_waiting
from steps import (
    ACTIVATE,
    JSON,
    PASSWORD,
    activate,
    activated,
    at_once,
    basic,
    code_mailed_to,
    fresh_client,
    fresh_email,
    mailed_to,
    problem_in,
    register,
    registered,
    registered_anew,
    send,
    send_json,
    shown,
    wait_until,
    wrong,
)


def attempts_at(database, email):
    """Wrong codes counted since the latest registration."""
    return database("SELECT attempts FROM users WHERE email = %s", [email])[0][0]


def encode(credentials):
    """Text or bytes as the token of a Basic header."""
    if isinstance(credentials, str):
        credentials = credentials.encode()
    return base64.b64encode(credentials).decode()


# -- 200 and 409 -----------------------------------------------------------------------


def test_it_activates_and_mails_a_confirmation(service):
    email, code = registered(service)

    done = activate(service, email, code)

    assert done.status == 200
    assert done.headers["Content-Type"] == "application/json"
    assert mailed_to(service, email, 2)["subject"] == "Your account is active"


def test_it_notes_when_an_account_became_active(service, database):
    email = activated(service)

    noted = database("""SELECT activated_at > registered_at
                          FROM users WHERE email = %s""", [email])

    assert noted == [(True,)]


def test_it_takes_a_code_once(service):
    email, code = registered(service)

    first, second = activate(service, email, code), activate(service, email, code)

    assert [first.status, second.status] == [200, 409]
    assert problem_in(second) == 409


def test_it_answers_409_to_the_second_of_two_clients_who_send_the_pair_at_once(
        servers, start_service):
    api = start_service(TRUSTED_PROXIES="1")
    email, code = registered(api)
    clients = [fresh_client(), fresh_client()]

    with ThreadPoolExecutor() as threads, row_locked(servers.postgres, email):
        answers = [threads.submit(activate, api, email, code, **client)
                   for client in clients]
        wait_until(lambda: statements_waiting(servers.postgres) == 2)

    assert sorted(answer.result().status for answer in answers) == [200, 409]


def test_it_answers_409_whatever_the_code_once_the_account_is_active(service):
    email = activated(service)

    statuses = {activate(service, email, code).status for code in ("0000", "9999")}

    assert statuses == {409}


def test_it_knows_an_account_however_its_address_is_typed(service):
    email, code = registered(service)

    done = activate(service, email.upper(), code)

    assert done.status == 200


def test_it_verifies_a_hash_made_at_another_cost(service, database):
    email, code = registered(service)
    database("UPDATE users SET password_hash = %s WHERE email = %s", [
        ("$argon2id$v=19$m=19456,t=2,p=1$9p8xMfujpcZJZVuO7ja/JQ"
         "$1Nj+bPHv2UMezGKMZ1Qbuivt077kV1HxgcMzd4d0wvs"), email])    # of PASSWORD

    other = activate(service, email, code, "another passphrase")
    done = activate(service, email, code, PASSWORD)

    assert [other.status, done.status] == [403, 200]


@pytest.mark.parametrize("lanes", [1, 4])
def test_it_verifies_a_hash_that_argon2_cffi_made(service, database, lanes):
    email, code = registered(service)
    other_library = argon2.PasswordHasher(
        time_cost=3, memory_cost=12 * 1024, parallelism=lanes)
    database("UPDATE users SET password_hash = %s WHERE email = %s",
             [other_library.hash("café au lait"), email])

    other = activate(service, email, code, "cafe au lait")
    done = activate(service, email, code, "café au lait")

    assert [other.status, done.status] == [403, 200]


def test_it_knows_a_password_that_has_become_common(service, database):
    email, code = registered(service)
    database("UPDATE users SET password_hash = %s WHERE email = %s",
             [argon2.PasswordHasher().hash("password"), email])

    done = activate(service, email, code, "password")

    assert done.status == 200


# -- 401 -------------------------------------------------------------------------------


def test_it_asks_for_basic_in_utf_8(service):
    answer = send_json(service, "PATCH", ACTIVATE, {"code": "0427"})

    assert problem_in(answer) == 401
    assert answer.headers["WWW-Authenticate"].startswith('Basic realm="')
    assert answer.headers["WWW-Authenticate"].endswith('", charset="UTF-8"')
    assert "Set-Cookie" not in answer.headers


EMAIL, GOOD = "ann@example.com", encode(f"ann@example.com:{PASSWORD}")


@pytest.mark.parametrize("value", [
    "", "Basic ", f"Bearer {GOOD}", GOOD, f"Basic{GOOD}", f"Basic {GOOD} {GOOD}",
    f"Basic {GOOD[:-1]}", "Basic !!!!", "Basic é",
    "Basic username=ann, password=correct",
    f"Basic {encode(EMAIL)}", f"Basic {encode(EMAIL + ':')}",
    f"Basic {encode(':' + PASSWORD)}",
    f"Basic {encode(EMAIL.encode() + b':caf' + bytes([0xE9]) + b' au lait')}"],
    ids=["empty", "no token", "other scheme", "no scheme", "no space", "two tokens",
         "no padding", "no Base64", "no ASCII", "parameters", "no colon",
         "empty password", "empty address", "no UTF-8"])
def test_it_answers_401_to_malformed_credentials(service, value):
    answer = send_json(service, "PATCH", ACTIVATE, {"code": "0427"}, {
        "Authorization": value.encode("latin-1")})

    assert problem_in(answer) == 401
    assert "WWW-Authenticate" in answer.headers


@pytest.mark.parametrize("scheme", ["basic ", "BASIC ", "bAsIc ", "Basic   "])
def test_it_takes_the_scheme_in_any_case_and_more_spaces(service, scheme):
    email, code = registered(service)
    value = scheme + encode(f"{email}:{PASSWORD}")

    done = activate(service, email, code, Authorization=value)

    assert done.status == 200


# -- 403 -------------------------------------------------------------------------------


def test_it_gives_one_answer_to_all_that_fails(service, database):
    (waiting, code), (late, late_code) = registered(service), registered(service)
    active, (worn, worn_code) = activated(service), registered(service)
    database("UPDATE users SET expires_at = now() WHERE email = %s", [late])
    database("UPDATE users SET attempts = 3 WHERE email = %s", [worn])
    newest = registered_anew(service, waiting, code)

    answers = {
        "unknown address": activate(service, fresh_email(), code),
        "wrong password": activate(service, waiting, newest, "another passphrase"),
        "wrong password, active": activate(service, active, code, "another passphrase"),
        "wrong code": activate(service, waiting, wrong(newest)),
        "superseded code": activate(service, waiting, code),
        "expired code": activate(service, late, late_code),
        "used-up code": activate(service, worn, worn_code),
        "no address": activate(service, "no address", code),
        "no password": activate(service, waiting, newest, "short")}

    assert {problem_in(answer) for answer in answers.values()} == {403}
    for what, answer in answers.items():
        assert shown(answer) == shown(answers["unknown address"]), what


def test_it_makes_no_browser_ask_for_credentials_after_a_failure(service):
    answer = activate(service, fresh_email(), "0427")

    assert answer.status == 403
    assert "WWW-Authenticate" not in answer.headers
    assert "errors" not in answer.json


def test_it_does_not_tell_who_registered_a_pair_whether_the_account_is_active(service):
    active, (waiting, _), new = activated(service), registered(service), fresh_email()
    for email in (active, waiting, new):
        assert register(service, email, "the stranger's password").status == 202
    codes = {active: "0000", waiting: wrong(code_mailed_to(service, waiting, 2)),
             new: wrong(code_mailed_to(service, new))}

    answers = [activate(service, email, code, "the stranger's password")
               for email, code in codes.items()]

    assert answers[0].status == 403
    assert shown(answers[0]) == shown(answers[1]) == shown(answers[2])


@pytest.mark.parametrize("credentials", [
    f"ann:{PASSWORD}", f" {EMAIL}:{PASSWORD}", f"ann@exa\0mple.com:{PASSWORD}",
    f"{EMAIL}:short", f"{EMAIL}:::", f"{EMAIL}:nul \0 inside", f"{EMAIL}:two\nlines",
    f"{EMAIL}:{'x' * 129}", f"{EMAIL}:12345678", f"{'a' * 5000}:{PASSWORD}"],
    ids=["no address", "space", "NUL in address", "short", "colons", "NUL", "newline",
         "long", "common", "long address"])
def test_it_answers_403_to_credentials_that_no_account_can_have(service, credentials):
    answer = activate(service, "", "0427", Authorization=f"Basic {encode(credentials)}")

    assert problem_in(answer) == 403
    assert shown(answer) == shown(activate(service, fresh_email(), "0427"))


def test_it_counts_no_attempt_for_a_wrong_password(service, database):
    email, code = registered(service)

    refused = [activate(service, email, each, "another passphrase").status
               for each in (code, code, wrong(code), wrong(code))]

    assert refused == [403] * 4
    assert attempts_at(database, email) == 0
    assert activate(service, email, code).status == 200


# -- 422: the code ---------------------------------------------------------------------


@pytest.mark.parametrize("code", [
    None, 1234, True, ["1234"], {"code": "1234"}, "", "123", "12345", " 123", "1234\n",
    "1234\0", "+123", "0x1f", "1_23", "abcd", "١٢٣٤", "１２３４", "②②②②", "²²²²",
    "12\ud8004", "1" * 4000], ids=lambda code: ascii(code)[:20])
def test_it_answers_422_to_what_is_not_four_ascii_digits(service, code):
    answer = activate(service, fresh_email(), code)

    assert problem_in(answer) == 422
    assert [error["field"] for error in answer.json["errors"]] == ["code"]


@pytest.mark.parametrize("body", [
    b"{}", b"[]", b"null", b"1234", b'"1234"', b'["code"]', b'{"Code": "1234"}'])
def test_it_answers_422_where_the_code_is_missing(service, body):
    headers = JSON | {"Authorization": basic(fresh_email(), PASSWORD)}

    answer = send(service, "PATCH", ACTIVATE, body, headers)

    assert answer.status == 422
    assert [error["field"] for error in answer.json["errors"]] == ["code"]


def test_it_counts_no_attempt_for_what_is_not_four_digits(service, database):
    email, code = registered(service)

    for malformed in (int(code), f"{code}\n", code[:3], None):
        activate(service, email, malformed)

    assert attempts_at(database, email) == 0
    assert activate(service, email, code).status == 200


# -- How long a code lives ------------------------------------------------------------


def test_it_refuses_the_right_code_after_three_wrong_ones(service, database):
    email, code = registered(service)
    for _ in range(3):
        activate(service, email, wrong(code))

    refused = activate(service, email, code)

    assert refused.status == 403
    assert attempts_at(database, email) == 3


def test_it_takes_the_right_code_after_two_wrong_ones(service, database):
    email, code = registered(service)
    for _ in range(2):
        activate(service, email, wrong(code))

    assert attempts_at(database, email) == 2
    assert activate(service, email, code).status == 200


def test_it_takes_no_code_that_was_mailed_to_another(service):
    email, code = registered(service)
    other, other_code = registered(service)
    while other_code == code:
        other, other_code = registered(service)

    assert activate(service, email, other_code).status == 403
    assert activate(service, other, code).status == 403


def test_it_refuses_a_code_that_is_too_old(service, database):
    email, code = registered(service)
    database("""UPDATE users SET expires_at = expires_at - interval '60 s'
                 WHERE email = %s""", [email])

    refused = activate(service, email, code)

    assert refused.status == 403


def test_it_lets_a_code_live_as_long_as_code_lifetime_says(start_service, database):
    api = start_service(CODE_LIFETIME="86400", CODE_ATTEMPTS="5")
    email, code = registered(api)

    for _ in range(4):
        activate(api, email, wrong(code))

    assert database("""SELECT expires_at - registered_at = interval '1 day'
                         FROM users WHERE email = %s""", [email]) == [(True,)]
    assert activate(api, email, code).status == 200


# -- All at once -----------------------------------------------------------------------


def test_it_takes_one_of_eight_right_codes_at_once(service):
    email, code = registered(service)

    answers = at_once(*[partial(activate, service, email, code)] * 8)

    statuses = [answer.status for answer in answers]
    assert statuses.count(200) == 1
    assert set(statuses) <= {200, 403, 409}
    assert mailed_to(service, email, 2)["subject"] == "Your account is active"


def test_it_counts_twelve_wrong_codes_at_once(service, database):
    email, code = registered(service)

    answers = at_once(*[partial(activate, service, email, wrong(code))] * 12)

    assert [answer.status for answer in answers] == [403] * 12
    assert attempts_at(database, email) == 3
    assert activate(service, email, code).status == 403


def test_it_activates_one_pair_or_the_other_never_a_mixture(service, database):
    email, code = registered(service)
    calls = [partial(activate, service, email, code),
             partial(register, service, email, "the new password")]

    answers = at_once(*calls * 4)

    active = database("SELECT activated_at FROM users WHERE email = %s", [email])[0][0]
    assert {answer.status for answer in answers} <= {200, 202, 403, 409}
    assert bool(active) == (activate(service, email, wrong(code)).status == 409)


def test_it_neither_takes_nor_counts_a_code_of_a_pair_that_was_just_replaced(
        service, database):
    email, code = registered(service)
    database("BEGIN")
    database("UPDATE users SET password_hash = 'of a newer pair' WHERE email = %s",
             [email])

    with ThreadPoolExecutor() as thread:
        answer = thread.submit(activate, service, email, code)
        wait_until(lambda: database("SELECT pid FROM pg_locks WHERE NOT granted"))
        database("COMMIT")

    assert answer.result().status == 403
    assert database("SELECT activated_at, attempts FROM users WHERE email = %s",
                    [email]) == [(None, 0)]


# -- The other statuses, and their headers ---------------------------------------------


def test_it_answers_400_to_what_is_not_json(service):
    headers = JSON | {"Authorization": basic(fresh_email(), PASSWORD)}

    answer = send(service, "PATCH", ACTIVATE, b'{"code": 0427}', headers)

    assert problem_in(answer) == 400


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_it_answers_405_to_other_methods_and_names_the_right_one(service, method):
    answer = send(service, method, ACTIVATE)

    assert answer.status == 405
    assert set(answer.headers["Allow"].split(", ")) == {"OPTIONS", "PATCH"}


def test_it_takes_4096_bytes_and_answers_413_to_one_more(service):
    email, code = registered(service)
    headers = JSON | {"Authorization": basic(email, PASSWORD)}
    body = f'{{"code": "{code}"}}'.encode()

    refused = send(service, "PATCH", ACTIVATE, body.ljust(4097), headers)
    accepted = send(service, "PATCH", ACTIVATE, body.ljust(4096), headers)

    assert problem_in(refused) == 413
    assert accepted.status == 200


@pytest.mark.parametrize("content_type",
                         ["", "text/plain", "application/merge-patch+json"])
def test_it_answers_415_to_what_is_not_sent_as_json(service, content_type):
    email, code = registered(service)

    answer = activate(service, email, code, **{"Content-Type": content_type})

    assert problem_in(answer) == 415


def test_it_keeps_its_answers_out_of_caches(service):
    email, code = registered(service)

    answers = [activate(service, email, ""),
               activate(service, email, code, "wrong one"),
               activate(service, email, wrong(code)), activate(service, email, code),
               activate(service, email, code), send(service, "GET", ACTIVATE),
               activate(service, email, code, **{"Content-Type": "text/plain"})]

    assert [answer.status for answer in answers] == [422, 403, 403, 200, 409, 405, 415]
    assert {answer.headers["Cache-Control"] for answer in answers} == {"no-store"}
