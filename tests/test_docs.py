"""openapi.yaml against the running service, and the page that shows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import openapi_spec_validator
import pytest
import yaml
from openapi_schema_validator import OAS31Validator
from servers.process import TOP
from steps import (
    ACTIVATE,
    JSON,
    PASSWORD,
    REGISTER,
    activate,
    activated,
    basic,
    fresh_email,
    problem_in,
    register,
    registered,
    send,
    send_json,
    wrong,
)

DOCUMENT = yaml.safe_load((TOP / "openapi.yaml").read_text())
OPERATIONS = {operation["operationId"]: operation
              for path in DOCUMENT["paths"].values() for operation in path.values()}
BASIC = {"Authorization": basic("nobody@example.com", PASSWORD)}
CUT_OFF = b'{"code": "0427"'


def refused(service):
    email, code = registered(service)
    return activate(service, email, wrong(code))


# Each documented answer, and how to get it. "default" stands for 404, 405 and 500. No
# request is known that causes a 500.
ANSWERS = [
    ("register", "202", lambda api: register(api, fresh_email())),
    ("register", "400", lambda api: send(api, "POST", REGISTER, CUT_OFF, JSON)),
    ("register", "413", lambda api: send(api, "POST", REGISTER, b" " * 4097, JSON)),
    ("register", "415", lambda api: send(api, "POST", REGISTER, b"{}")),
    ("register", "422", lambda api: register(api, "nobody", "password")),
    ("register", "default", lambda api: send(api, "DELETE", REGISTER)),
    ("activate", "200", lambda api: activate(api, *registered(api))),
    ("activate", "400",
     lambda api: send(api, "PATCH", ACTIVATE, CUT_OFF, JSON | BASIC)),
    ("activate", "401",
     lambda api: send_json(api, "PATCH", ACTIVATE, {"code": "0427"})),
    ("activate", "403", lambda api: activate(api, fresh_email(), "0427")),
    ("activate", "403", refused),
    ("activate", "409", lambda api: activate(api, activated(api), "0427")),
    ("activate", "413",
     lambda api: send(api, "PATCH", ACTIVATE, b" " * 4097, JSON | BASIC)),
    ("activate", "415", lambda api: send(api, "PATCH", ACTIVATE, b"{}", BASIC)),
    ("activate", "422", lambda api: activate(api, fresh_email(), "five")),
    ("activate", "default", lambda api: send(api, "GET", ACTIVATE)),
    ("health", "200", lambda api: send(api, "GET", "/healthz")),
    ("health", "default", lambda api: send(api, "GET", "/healths")),
]
ANSWERS_OVER_THE_LIMIT = [
    ("register", "429", lambda api: register(api, fresh_email())),
    ("activate", "429", lambda api: activate(api, fresh_email(), "0427")),
]
ANSWERS_WITHOUT_DATABASE = [
    ("register", "503", lambda api: register(api, fresh_email())),
    ("activate", "503", lambda api: activate(api, fresh_email(), "0427")),
    ("health", "503", lambda api: send(api, "GET", "/healthz")),
]


def resolved(node):
    """What a {"$ref": "#/..."} stands for; anything else as it is."""
    for name in node.get("$ref", "").split("/")[1:]:
        node = DOCUMENT[name] if name == "components" else node[name]
    return node


def violations(schema, value):
    """What about a value is not as its schema says."""
    validator = OAS31Validator(schema | {"components": DOCUMENT["components"]})
    return [error.message for error in validator.iter_errors(value)]


def examples_in(content):
    """The examples of a media type, of which there are one or several."""
    several = [example["value"] for example in content.get("examples", {}).values()]
    return several or [content["example"]]


def assert_documented(answer, operation, status):
    """An answer's status, media type and headers are in the document, and so is its
    body, as an example."""
    documented = resolved(OPERATIONS[operation]["responses"][status])
    [(media_type, content)] = documented["content"].items()

    assert status in (str(answer.status), "default")
    assert answer.status < 400 or problem_in(answer) == answer.status
    assert answer.headers["Content-Type"] == media_type
    assert answer.json in examples_in(content)
    assert not violations(content["schema"], answer.json)
    for name, header in documented.get("headers", {}).items():
        header, text = resolved(header), answer.headers[name]
        if text is None:
            assert not header.get("required"), f"no {name}"
        else:
            is_number = header["schema"].get("type") == "integer"
            assert not violations(header["schema"], int(text) if is_number else text)


def with_examples(node):
    """(schema, example) for each example of each media type below a node."""
    if isinstance(node, dict):
        for child in node.values():
            yield from with_examples(child)
        if "schema" in node and ("example" in node or "examples" in node):
            yield from ((node["schema"], example) for example in examples_in(node))


# -- The document ----------------------------------------------------------------------


def test_it_is_valid():
    openapi_spec_validator.validate(DOCUMENT)


def test_its_examples_follow_its_own_schemas():
    examples = list(with_examples(DOCUMENT))

    assert len(examples) > 10
    assert not [violation for pair in examples for violation in violations(*pair)]


@pytest.mark.parametrize("operation", ["register", "activate"])
def test_it_names_exactly_the_statuses_of_the_docstring(operation):
    source = (TOP / "service.py").read_text()
    docstring = re.search(rf'\ndef {operation}\(.*?"""(.*?)"""', source, re.DOTALL)[1]

    promised = re.findall(r"  (\d{3})  ", docstring)

    assert {*promised, "default"} == OPERATIONS[operation]["responses"].keys()


# -- The document and the answers ------------------------------------------------------


def test_it_is_tried_here_in_every_documented_status():
    documented = {(name, status) for name, operation in OPERATIONS.items()
                  for status in operation["responses"]}
    tables = ANSWERS, ANSWERS_OVER_THE_LIMIT, ANSWERS_WITHOUT_DATABASE

    tried = {(name, status) for table in tables for name, status, _ in table}

    assert tried == documented


@pytest.mark.parametrize("operation, status, ask", ANSWERS,
                         ids=[" ".join(row[:2]) for row in ANSWERS])
def test_it_answers_as_documented(service, operation, status, ask):
    assert_documented(ask(service), operation, status)


def test_it_answers_as_documented_over_the_limit(start_service):
    api = start_service(IP_LIMIT="0")

    for operation, status, ask in ANSWERS_OVER_THE_LIMIT:
        assert_documented(ask(api), operation, status)


def test_it_answers_as_documented_without_a_database(start_service):
    api = start_service(DATABASE_URL="postgresql://127.0.0.1:1/nothing")

    for operation, status, ask in ANSWERS_WITHOUT_DATABASE:
        assert_documented(ask(api), operation, status)


def test_schemathesis_finds_no_answer_that_is_not_as_documented(service, tmp_path):
    """Some 300 requests, good and bad ones, that it makes from openapi.yaml."""
    email, code = registered(service)
    for _ in range(3):      # so that it cannot guess the code: it did, once
        activate(service, email, wrong(code))
    command = [Path(sys.executable).with_name("schemathesis"),
               "--config-file", TOP / "tests/schemathesis.toml",
               "run", TOP / "openapi.yaml", "--url", service.url,
               "--auth", f"{email}:{PASSWORD}", "--max-examples", "100", "--seed", "1"]

    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True,
                         text=True, env=os.environ | {"NO_PROXY": "*"})

    assert run.returncode == 0, run.stdout + run.stderr


# -- The page --------------------------------------------------------------------------


def test_it_serves_this_very_document(service):
    answer = send(service, "GET", "/openapi.yaml")

    assert answer.headers["Content-Type"] == "application/yaml"
    assert answer.body == (TOP / "openapi.yaml").read_bytes()


def test_it_leads_from_docs_to_the_page(service):
    answer = send(service, "GET", "/docs")

    assert (answer.status, answer.headers["Location"]) == (308, "/docs/")


def test_its_page_is_the_same_whatever_a_caller_claims(start_service):
    api = start_service(TRUSTED_PROXIES="2")
    plain = send(api, "GET", "/docs/")

    claimed = send(api, "GET", "/docs/", headers={
        "Host": "evil.example", "X-Forwarded-Proto": "<script>, https",
        "X-Forwarded-For": "1.2.3.4, 1.2.3.4"})

    assert claimed.body == plain.body     # the edge keeps it for everybody
    assert b"evil" not in claimed.body and b"<script>, " not in claimed.body


def test_its_page_loads_everything_from_this_server(service):
    page = send(service, "GET", "/docs/").body.decode()

    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)

    assert '"url": "/openapi.yaml"' in page
    assert len(loaded) >= 4
    for path in loaded:
        assert re.match("/[^/]", path) and send(service, "GET", path).status == 200
