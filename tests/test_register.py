"""POST /users/register: what it accepts, what it refuses, and what it keeps."""

import hashlib
import json
import re
from functools import partial

import argon2
import pytest
from steps import (
    JSON,
    PASSWORD,
    REGISTER,
    activate,
    activated,
    at_once,
    code_mailed_to,
    fresh_email,
    mailed_to,
    mails_to,
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


def row_of(database, email):
    """All that is kept of an address."""
    return database("SELECT * FROM users WHERE email = %s", [email])


def body_of(size):
    """A good registration of a fresh address in so many bytes: (the address, bytes)."""
    email = fresh_email()
    body = json.dumps({"email": email, "password": PASSWORD}).encode()
    return email, body.ljust(size)


# -- 202 -------------------------------------------------------------------------------


def test_it_accepts_and_mails_a_code_of_four_digits(service):
    email = fresh_email()

    accepted = register(service, email)

    assert accepted.status == 202
    assert accepted.headers["Content-Type"] == "application/json"
    assert re.search(r"^[0-9]{4}$", mailed_to(service, email)["text"], re.MULTILINE)


def test_it_says_how_many_seconds_the_code_lives(service, start_service):
    longer = start_service(CODE_LIFETIME="600")

    answers = [register(api, fresh_email()) for api in (service, longer)]

    assert [answer.json["expires_in"] for answer in answers] == [60, 600]


def test_it_keeps_a_waiting_account_for_a_minute(service, database):
    email, _ = registered(service)

    kept = database("""
        SELECT activated_at, attempts, expires_at - registered_at = interval '60 s'
          FROM users WHERE email = %s""", [email])

    assert kept == [(None, 0, True)]


def test_it_answers_a_new_a_waiting_and_an_active_address_alike(service):
    new, active = fresh_email(), activated(service)

    answers = [register(service, email) for email in (new, new, active)]

    assert answers[0].status == 202
    assert shown(answers[0]) == shown(answers[1]) == shown(answers[2])


def test_it_only_sends_a_notice_to_the_owner_of_an_active_account(service, database):
    email = activated(service)
    before = row_of(database, email)

    register(service, email, "the password of another")

    assert mailed_to(service, email, 3)["subject"] == "You already have an account"
    assert row_of(database, email) == before
    assert activate(service, email, "0000").status == 409


def test_it_ignores_other_fields(service):
    email = fresh_email()
    fields = {"email": email, "password": PASSWORD, "activated_at": "now()", "a": {}}

    answer = send_json(service, "POST", REGISTER, fields)

    assert answer.status == 202
    assert activate(service, email, code_mailed_to(service, email)).status == 200


@pytest.mark.parametrize("content_type", [
    "application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_it_takes_json_however_its_type_is_written(service, content_type):
    _, body = body_of(100)

    answer = send(service, "POST", REGISTER, body, {"Content-Type": content_type})

    assert answer.status == 202


# -- 400, 405, 413, 415 and their headers; more bodies in test_input.py ----------------


def test_it_answers_400_to_what_is_not_json(service):
    answer = send(service, "POST", REGISTER, b"{", JSON)

    assert problem_in(answer) == 400


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE"])
def test_it_answers_405_to_other_methods_and_names_the_right_one(service, method):
    answer = send(service, method, REGISTER)

    assert answer.status == 405
    assert set(answer.headers["Allow"].split(", ")) == {"OPTIONS", "POST"}


def test_it_takes_4096_bytes_and_answers_413_to_one_more(service):
    (_, body), (_, longer) = body_of(4096), body_of(4097)

    accepted = send(service, "POST", REGISTER, body, JSON)
    refused = send(service, "POST", REGISTER, longer, JSON)

    assert accepted.status == 202
    assert problem_in(refused) == 413


def test_it_counts_the_bytes_of_a_chunked_body_too(service):
    _, body = body_of(4096)
    fields = {"email": fresh_email(), "password": PASSWORD, "x": "x" * 4096}
    longer = json.dumps(fields).encode()

    # http.client sends what an iterator gives as chunks, without a Content-Length.
    accepted = send(service, "POST", REGISTER, iter([body[:10], body[10:]]), JSON)
    refused = send(service, "POST", REGISTER, iter([longer[:10], longer[10:]]), JSON)

    assert accepted.status == 202
    assert problem_in(refused) in (400, 413)


@pytest.mark.parametrize("content_type", [
    None, "", "text/plain", "text/json", "application/problem+json", "json", ";",
    "application/jsonp", "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x"])
def test_it_answers_415_to_what_is_not_sent_as_json(service, content_type):
    _, body = body_of(100)
    headers = {} if content_type is None else {"Content-Type": content_type}

    answer = send(service, "POST", REGISTER, body, headers)

    assert problem_in(answer) == 415


@pytest.mark.parametrize("method, body, headers, status", [
    ("POST", b'{"email": "%s", "password": "long enough"}', JSON, 202),
    ("POST", b"", JSON, 400), ("GET", b"", {}, 405), ("POST", b"x" * 4097, JSON, 413),
    ("POST", b"{}", {}, 415), ("POST", b"{}", JSON, 422)])
def test_it_keeps_its_answers_out_of_caches(service, method, body, headers, status):
    body = body.replace(b"%s", fresh_email().encode())

    answer = send(service, method, REGISTER, body, headers)

    assert (answer.status, answer.headers["Cache-Control"]) == (status, "no-store")


# -- 422: fields -----------------------------------------------------------------------


def test_it_names_each_field_that_is_not_acceptable(service):
    answer = register(service, "ann", "short")

    assert problem_in(answer) == 422
    assert [error["field"] for error in answer.json["errors"]] == ["email", "password"]
    assert all(error["detail"] for error in answer.json["errors"])
    assert answer.json["detail"] == "Some fields are invalid."


@pytest.mark.parametrize("value", [None, 12345678, 1.5, True, ["a"], {"a": "b"}, ""],
                         ids=repr)
@pytest.mark.parametrize("field", ["email", "password"])
def test_it_answers_422_to_a_field_that_is_not_text(service, field, value):
    fields = {"email": fresh_email(), "password": PASSWORD} | {field: value}

    answer = send_json(service, "POST", REGISTER, fields)

    assert answer.status == 422
    assert [error["field"] for error in answer.json["errors"]] == [field]


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b"0", b"true", b'"email"',
                                  b'["email", "password"]',
                                  b'{"Email": "a@b.example"}'])
def test_it_answers_422_where_the_fields_are_missing(service, body):
    answer = send(service, "POST", REGISTER, body, JSON)

    assert answer.status == 422
    assert [error["field"] for error in answer.json["errors"]] == ["email", "password"]


# -- Addresses -------------------------------------------------------------------------

LONG_DOMAIN = f"{'b' * 63}.{'c' * 63}.{'d' * 53}.example"            # 189 characters


@pytest.mark.parametrize("typed, kept", [
    ("o'neil.{}@example.com", "o'neil.{}@example.com"),
    ("{}+tag@example.com", "{}+tag@example.com"),
    ("{}@bücher.example", "{}@xn--bcher-kva.example"),
    ("{}@B\u0055\u0308CHER.example", "{}@xn--bcher-kva.example"),
    ("{}@XN--BCHER-KVA.example", "{}@xn--bcher-kva.example"),
    ("Ann.{}@Example.COM", "ann.{}@example.com"),
    ("{}@\u212aelvin.example", "{}@kelvin.example"),                 # the Kelvin sign
    ("{}!#$%&*/=?^_`|~-@example.com", "{}!#$%&*/=?^_`|~-@example.com"),
], ids=["apostrophe", "tag", "IDN", "IDN-upper-decomposed", "A-label", "upper-case",
        "Kelvin-sign", "punctuation"])
def test_it_takes_every_usual_address(service, typed, kept):
    name = fresh_email().partition("@")[0]
    typed, kept = typed.replace("{}", name), kept.replace("{}", name)

    accepted = register(service, typed)
    done = activate(service, typed, code_mailed_to(service, kept))

    assert [accepted.status, done.status] == [202, 200]


@pytest.mark.parametrize("one, other", [
    ("{}@example.com", "{}@EXAMPLE.Com"), ("a{}@example.com", "A{}@example.com"),
    ("{}@bücher.example", "{}@xn--bcher-kva.example"),
    ("{}@straße.example", "{}@xn--strae-oqa.example")])
def test_it_has_one_account_per_address_however_it_is_typed(
        service, database, one, other):
    name = fresh_email().partition("@")[0]
    one, other = one.replace("{}", name), other.replace("{}", name)
    register(service, one, "the first password")

    register(service, other, "the second password")

    rows = database("SELECT email FROM users WHERE email ILIKE %s", [f"%{name}%"])
    code = code_mailed_to(service, rows[0][0], 2)
    assert len(rows) == 1
    assert activate(service, one, code, "the first password").status == 403
    assert activate(service, one, code, "the second password").status == 200


def test_it_takes_an_address_of_254_characters_but_none_of_255(service, database):
    name = fresh_email().partition("@")[0].ljust(63, "a")

    accepted = register(service, f"{name}b@{LONG_DOMAIN}")
    too_long = register(service, f"{name}b@b{LONG_DOMAIN}")

    assert [accepted.status, too_long.status] == [202, 422]
    assert row_of(database, f"{name}b@{LONG_DOMAIN}")


BAD_ADDRESSES = [
    "ann", "@", "ann@", "@example.com", "ann@example", "ann@localhost",
    "ann example.com", "ann@@example.com", "ann@bob@example.com", "ann@[127.0.0.1]",
    "ann@.example.com",
    "ann@example..com", "ann@-a.example", "ann@example.com.", "ann@exa_mple.com",
    ".ann@example.com", "ann.@example.com", "an..n@example.com", "a,b@example.com",
    " ann@example.com", "ann@example.com ", "an n@example.com", "ann@exam ple.com",
    '"ann"@example.com', '"a b"@example.com', "Ann <ann@example.com>",
    "ann@example.com, bob@example.com", "ann@example.com;bob@example.com",
    "ann@example.com\n", "ann@example.com\r\nBcc: bob@example.com",
    "ann\r\nBcc: bob@example.com\r\n@example.com", "ann\t@example.com",
    "ann\0@example.com", "ann@example.com\0", "ann@exa\0mple.com",
    "ann\x7f@example.com",
    "\ud800@example.com", "ann@\udc00.example", "änn@example.com", "用户@example.com",
    "\u212aate@example.com", "ann\u200b@example.com", "ann@exa\u200bmple.com",
    "ann\uff20example.com", "ann\u0661@example.com", "ann@xn--0.example",
    "a" * 255 + "@example.com", "ann@" + "b" * 64 + ".example",
    "ann@" + "bücher." * 40 + "example",
    "a@" * 1000, "." * 2000, "\\" * 900]


@pytest.mark.parametrize("email", BAD_ADDRESSES, ids=lambda email: ascii(email)[:40])
def test_it_refuses_what_is_not_an_address(service, email):
    answer = register(service, email)

    assert problem_in(answer) == 422
    assert [error["field"] for error in answer.json["errors"]] == ["email"]


# -- Passwords -------------------------------------------------------------------------


@pytest.mark.parametrize("password", [
    "8 chars.", "x" * 128, "é" * 128, "e\u0301" * 128, "😀" * 8,
    "👩\u200d👩\u200d👧" * 25, " " * 8, " spaces around ", "colons:in:it:",
    "٠١٢٣٤٥٦٧", "'; DROP TABLE users; --",
    "\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH SPACE}invisible", "100%s %(email)s {}"],
    ids=lambda password: ascii(password)[:40])
def test_it_takes_any_text_of_8_to_128_characters(service, password):
    email = fresh_email()

    accepted = register(service, email, password)
    done = activate(service, email, code_mailed_to(service, email), password)

    assert [accepted.status, done.status] == [202, 200]


@pytest.mark.parametrize("password", [
    "7 chars", "x" * 129, "é" * 7, "e\u0301" * 7, "😀" * 7, "😀" * 129, "x" * 3000,
    "\u0958" * 65, "nul \0 inside", "line\nbreak", "a tab\tinside",
    "delete \x7f inside", "C1 control \x85", "lone \ud800 surrogate", "\udfff" * 8],
    ids=lambda password: ascii(password)[:40])
def test_it_refuses_other_lengths_and_control_characters(service, password):
    answer = register(service, fresh_email(), password)

    assert problem_in(answer) == 422
    assert [error["field"] for error in answer.json["errors"]] == ["password"]


@pytest.mark.parametrize("typed, again", [
    ("crème brûlée", "cre\u0300me bru\u0302le\u0301e"),
    ("cre\u0300me bru\u0302le\u0301e", "crème brûlée"), ("\u212b" * 8, "\u00c5" * 8)])
def test_it_takes_a_password_composed_or_decomposed(service, typed, again):
    email = fresh_email()

    register(service, email, typed)

    code = code_mailed_to(service, email)
    assert activate(service, email, code, again).status == 200


@pytest.mark.parametrize("other", [
    "Some passphrase", " some passphrase", "some passphrase ", "some  passphrase",
    "some passphras", "some passphrase\u200b", "ſome passphrase"], ids=ascii)
def test_it_takes_no_password_that_differs(service, other):
    email = fresh_email()

    register(service, email, "some passphrase")

    code = code_mailed_to(service, email)
    assert activate(service, email, code, other).status == 403


@pytest.mark.parametrize("password", [
    "password", "12345678", "123456789", "1234567890", "87654321", "00000000",
    "88888888", "123123123", "qwertyuiop", "1q2w3e4r", "1qaz2wsx", "abcd1234",
    "password1", "iloveyou", "sunshine", "football", "princess", "trustno1", "jennifer",
    "michelle", "elizabeth",
    "alexander", "basketball", "chocolate", "friend of emily", "friend of gerly",
    "friend of joan"])
def test_it_refuses_a_common_password_in_any_case(service, password):
    spellings = password, password.upper(), password.title()

    answers = [register(service, fresh_email(), each) for each in spellings]

    assert [answer.status for answer in answers] == [422, 422, 422]
    assert answers[0].json["errors"][0]["field"] == "password"


@pytest.mark.parametrize("email, password", [
    ("ann.baker@example.com", "ann.baker@example.com"),
    ("ann.baker@example.com", "ann.baker"),
    ("ann.baker@example.com", "Ann.Baker@EXAMPLE.com"),
    ("ann.baker@example.com", "ANN.BAKER"), ("ANN.BAKER@example.com", "ann.baker"),
    ("ann@bücher.example", "ann@xn--bcher-kva.example"),
    ("ann@bücher.example", "ann@bücher.example"),
    ("ann@bücher.example", "Ann@BU\u0308CHER.example")])
def test_it_refuses_the_address_or_its_local_part_as_password(
        service, email, password):
    answer = register(service, email, password)

    assert answer.status == 422
    assert [error["field"] for error in answer.json["errors"]] == ["password"]


# -- What is kept ----------------------------------------------------------------------


def test_it_keeps_an_argon2id_hash_at_12_mib_3_passes_and_1_lane(service, database):
    email, _ = registered(service)

    [(kept,)] = database("SELECT password_hash FROM users WHERE email = %s", [email])

    assert kept.startswith("$argon2id$v=19$m=12288,t=3,p=1$")


def test_it_keeps_a_hash_that_argon2_cffi_verifies(service, database):
    email = fresh_email()
    register(service, email, "café au lait")

    [(kept,)] = database("SELECT password_hash FROM users WHERE email = %s", [email])

    assert argon2.PasswordHasher().verify(kept, "café au lait")
    with pytest.raises(argon2.exceptions.VerifyMismatchError):
        argon2.PasswordHasher().verify(kept, "cafe au lait")


def test_it_salts_every_hash(service, database):
    email, other = registered(service)[0], registered(service)[0]

    hashes = database("""
        SELECT DISTINCT password_hash FROM users WHERE email IN (%s, %s)""",
        [email, other])

    assert len(hashes) == 2


def test_it_keeps_only_a_keyed_digest_of_the_code(service, database):
    email, code = registered(service)

    [kept] = row_of(database, email)

    [digest] = [bytes(value) for value in kept if isinstance(value, memoryview)]
    plain = [hashlib.sha256(text.encode()).digest() for text in (
        code, email + code, code + email, f"{email} {code}", f"{email}:{code}")]
    assert len(digest) == 32 and digest not in plain
    assert code not in [str(value) for value in kept]


def test_it_makes_codes_that_another_key_does_not_know(service, start_service):
    other = start_service(SECRET_KEY="another key, also of 32 characters",
                          IP_LIMIT="9999")
    email, code = registered(service)

    assert activate(other, email, code).status == 403
    assert activate(service, email, code).status == 200


def test_it_keeps_nothing_of_what_it_refuses(service, database):
    email = fresh_email()

    register(service, email, "short")

    assert row_of(database, email) == []
    assert mails_to(service, email) == []


# -- One registration is one pair ------------------------------------------------------


def test_it_replaces_password_and_code_of_a_waiting_address(service):
    email, old = registered(service)
    new = registered_anew(service, email, old, "the new password")

    statuses = [activate(service, email, old, PASSWORD).status,
                activate(service, email, new, PASSWORD).status,
                activate(service, email, old, "the new password").status,
                activate(service, email, new, "the new password").status]

    assert statuses == [403, 403, 403, 200]


def test_it_replaces_the_code_where_the_password_stays(service):
    email, old = registered(service)
    new = registered_anew(service, email, old, PASSWORD)

    assert activate(service, email, old).status == 403
    assert activate(service, email, new).status == 200


def test_it_gives_new_attempts_with_a_new_code(service):
    email, code = registered(service)
    for _ in range(4):
        activate(service, email, wrong(code))

    code = registered_anew(service, email, code)

    assert activate(service, email, wrong(code)).status == 403
    assert activate(service, email, code).status == 200


def test_it_gives_a_new_minute_with_a_new_code(service, database):
    email, code = registered(service)
    database("UPDATE users SET expires_at = now() WHERE email = %s", [email])

    code = registered_anew(service, email, code)

    assert activate(service, email, code).status == 200


def test_it_leaves_one_pair_of_six_registrations_at_once(start_service, database):
    api = start_service(CODE_ATTEMPTS="1000")
    email, passwords = fresh_email(), [f"password number {n}" for n in range(6)]

    answers = at_once(*[partial(register, api, email, each) for each in passwords])

    assert [answer.status for answer in answers] == [202] * 6
    assert len(row_of(database, email)) == 1
    codes = [code_mailed_to(api, email, n) for n in range(1, 7)]
    tried = [(password, activate(api, email, code, password).status)
             for password in passwords for code in dict.fromkeys(codes)]
    statuses = [status for _, status in tried]
    assert statuses.count(200) == 1 and set(statuses) <= {200, 403, 409}
    assert len({password for password, status in tried if status in (200, 409)}) == 1


def test_it_makes_codes_of_four_digits_some_with_leading_zeros(service):
    def codes():
        emails = [fresh_email() for _ in range(8)]
        at_once(*[partial(register, service, email) for email in emails])
        return [(email, code_mailed_to(service, email)) for email in emails]

    with_zero = wait_until(lambda: [pair for pair in codes() if pair[1][0] == "0"], 60)

    assert activate(service, *with_zero[0]).status == 200
