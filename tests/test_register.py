"""POST /users/register: what it answers, takes, keeps and replaces."""

import hashlib
from functools import partial

import argon2
import pytest
from steps import (
    PASSWORD,
    REGISTER,
    activate,
    activated,
    at_once,
    code_mailed_to,
    fresh_email,
    mailed_to,
    mails_to,
    register,
    registered,
    registered_anew,
    rows_of,
    send_json,
    shown,
    wait_until,
    wrong,
)

# -- 202 -------------------------------------------------------------------------------


def test_it_mails_a_code_of_four_digits_and_gives_it_a_minute(service, database):
    email = fresh_email()

    accepted = register(service, email)

    assert accepted.status == 202
    assert accepted.headers["Content-Type"] == "application/json"
    assert accepted.json["expires_in"] == 60
    assert rows_of(database, email, """
        activated_at, attempts, expires_at - registered_at = interval '60 s'
        """) == [(None, 0, True)]
    assert code_mailed_to(service, email)


def test_it_makes_codes_of_four_digits_some_with_leading_zeros(service):
    six = [partial(registered, service)] * 6

    email, code = wait_until(
        lambda: next((pair for pair in at_once(*six) if pair[1][0] == "0"), None), 60)

    assert activate(service, email, code).status == 200


def test_it_answers_all_addresses_alike_and_changes_no_active_one(service, database):
    new, active = fresh_email(), activated(service)
    before = rows_of(database, active)

    answers = [register(service, email, "the password of another")
               for email in (new, new, active)]

    assert answers[0].status == 202
    assert shown(answers[0]) == shown(answers[1]) == shown(answers[2])
    assert rows_of(database, active) == before
    assert mailed_to(service, active, 3)["subject"] == "You already have an account"


def test_it_ignores_other_fields_even_numbers_that_only_python_writes(
        service, database):
    email = fresh_email()
    others = {"activated_at": "now()", "a": {}, "b": [float("nan"), -float("inf")]}

    answer = send_json(service, "POST", REGISTER,
                       {"email": email, "password": PASSWORD} | others)

    assert answer.status == 202
    assert rows_of(database, email, "activated_at") == [(None,)]


# -- Addresses and passwords; test_input.py has those that it refuses ------------------


@pytest.mark.parametrize("kept, typed", [
    ("o'neil+tag.{}@example.com", "O'Neil+Tag.{}@EXAMPLE.Com"),
    ("{}!#$%&*/=?^_`|~-@xn--bcher-kva.example", "{}!#$%&*/=?^_`|~-@bücher.example"),
    ("{}@xn--bcher-kva.example", "{}@BU\u0308CHER.example"),
    ("{}@kelvin.example", "{}@\u212aelvin.example")],        # with the Kelvin sign
    ids=ascii)
def test_it_takes_every_usual_address_as_one_account_however_it_is_typed(
        service, database, kept, typed):
    name = fresh_email().partition("@")[0]
    kept, typed = kept.replace("{}", name), typed.replace("{}", name)

    accepted = [register(service, each).status for each in (typed, kept)]

    code = code_mailed_to(service, kept, 2)
    assert accepted == [202, 202]
    assert database("SELECT email FROM users WHERE email ILIKE %s",
                    [f"%{name}%"]) == [(kept,)]
    assert activate(service, typed, code).status == 200


def test_it_takes_an_address_of_254_characters(service, database):
    email = f"{'a' * 38}{fresh_email()}.{'c' * 63}.{'d' * 63}.{'e' * 63}"

    accepted = register(service, email)

    assert (len(email), accepted.status) == (254, 202)
    assert rows_of(database, email)


@pytest.mark.parametrize("typed, again", [
    ("7 chars ", None), ("😀" * 128, None), ("e\u0301" * 128, "é" * 128),
    ("crème brûlée", "cre\u0300me bru\u0302le\u0301e"), (" :colons: spaces : ", None),
    ("\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH SPACE}invisible", None),
    ("'; DROP TABLE users; -- 100%s %(email)s {}", None)],
    ids=lambda text: ascii(text)[:20])
def test_it_takes_any_text_of_8_to_128_characters_composed_or_decomposed(
        service, typed, again):
    email = fresh_email()

    accepted = register(service, email, typed)
    done = activate(service, email, code_mailed_to(service, email), again or typed)

    assert [accepted.status, done.status] == [202, 200]


# -- What is kept ----------------------------------------------------------------------


def test_it_keeps_a_salted_argon2id_hash_at_12_mib_3_passes_and_1_lane(
        service, database):
    emails, verify = [fresh_email(), fresh_email()], argon2.PasswordHasher().verify
    for email in emails:
        register(service, email, "café au lait")

    one, other = [rows_of(database, email, "password_hash")[0][0] for email in emails]

    assert one.startswith("$argon2id$v=19$m=12288,t=3,p=1$") and one != other
    assert verify(one, "café au lait") and verify(other, "café au lait")
    with pytest.raises(argon2.exceptions.VerifyMismatchError):
        verify(one, "cafe au lait")


def test_it_keeps_only_a_keyed_digest_of_the_code(service, database):
    email, code = registered(service)

    [kept] = rows_of(database, email)

    [digest] = [bytes(value) for value in kept if isinstance(value, memoryview)]
    plain = [hashlib.sha256(text.encode()).digest() for text in (
        code, email + code, f"{email} {code}")]
    assert len(digest) == 32 and digest not in plain
    assert code not in [str(value) for value in kept]


def test_it_keeps_nothing_of_what_it_refuses(service, database):
    email = fresh_email()

    register(service, email, "short")

    assert rows_of(database, email) == mails_to(service, email) == []


# -- One registration is one pair ------------------------------------------------------


def test_it_replaces_password_and_code_of_a_waiting_address(service):
    email, old = registered(service)
    new = registered_anew(service, email, old, "the new password")

    statuses = [activate(service, email, code, password).status
                for password in (PASSWORD, "the new password") for code in (old, new)]

    assert statuses == [403, 403, 403, 200]


def test_it_gives_a_new_minute_and_new_attempts_with_a_new_code(service, database):
    email, old = registered(service)
    for _ in range(3):
        activate(service, email, wrong(old))
    database("UPDATE users SET expires_at = now() WHERE email = %s", [email])

    new = registered_anew(service, email, old)

    assert activate(service, email, old).status == 403
    assert activate(service, email, new).status == 200
