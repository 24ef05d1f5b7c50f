"""What the documents say: openapi.yaml, the page that shows it, .env.example, Compose's
files, and the README's section "Break it yourself"."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import openapi_spec_validator
import pytest
import yaml
from dotenv import dotenv_values
from openapi_schema_validator import OAS31Validator
from servers.faults import crowded
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
    shown,
    wait_until_at_rest,
    wrong,
)
from steps.readme import break_it, shape

DOCUMENT = yaml.safe_load((TOP / "openapi.yaml").read_text())
OPERATIONS = {operation["operationId"]: operation
              for path in DOCUMENT["paths"].values() for operation in path.values()}
SIGNED = JSON | {"Authorization": basic("nobody@example.com", PASSWORD)}
LONG = b" " * 4097

# Each documented answer, and how to get it. "default" stands for 404, 405 and 500. No
# request is known that causes a 500.
BUSY = fresh_email()     # it is over its limits
ANSWERS = [
    ("register", "202", lambda api: register(api, fresh_email())),
    ("register", "400", lambda api: send(api, "POST", REGISTER, b"{", JSON)),
    ("register", "413", lambda api: send(api, "POST", REGISTER, LONG, JSON)),
    ("register", "415", lambda api: send(api, "POST", REGISTER, b"{}")),
    ("register", "422", lambda api: register(api, "nobody", "password")),
    ("register", "429", lambda api: register(api, BUSY)),
    ("register", "503", lambda api: register(api, fresh_email())),
    ("register", "default", lambda api: send(api, "DELETE", REGISTER)),
    ("activate", "200", lambda api: activate(api, *registered(api))),
    ("activate", "400", lambda api: send(api, "PATCH", ACTIVATE, b"{", SIGNED)),
    ("activate", "401", lambda api: send(api, "PATCH", ACTIVATE, b"{}", JSON)),
    ("activate", "403", lambda api: activate(api, fresh_email(), "0427")),
    ("activate", "409", lambda api: activate(api, activated(api), "0427")),
    ("activate", "413", lambda api: send(api, "PATCH", ACTIVATE, LONG, SIGNED)),
    ("activate", "415", lambda api: send(
        api, "PATCH", ACTIVATE, b"{}", SIGNED | {"Content-Type": "text/plain"})),
    ("activate", "422", lambda api: activate(api, fresh_email(), "five")),
    ("activate", "429", lambda api: activate(api, BUSY, "0427")),
    ("activate", "503", lambda api: activate(api, fresh_email(), "0427")),
    ("activate", "default", lambda api: send(api, "GET", ACTIVATE)),
    ("health", "200", lambda api: send(api, "GET", "/healthz")),
    ("health", "503", lambda api: send(api, "GET", "/healthz")),
    ("health", "default", lambda api: send(api, "GET", "/healths"))]


def resolved(node):
    """What a {"$ref": "#/..."} stands for; anything else as it is."""
    for name in node.get("$ref", "").split("/")[1:]:
        node = DOCUMENT[name] if name == "components" else node[name]
    return node


def violations(schema, value):
    """What about a value is not as its schema says."""
    validator = OAS31Validator(schema | {"components": DOCUMENT["components"]})
    return [error.message for error in validator.iter_errors(value)]


# -- openapi.yaml ----------------------------------------------------------------------


def test_its_document_is_valid():
    openapi_spec_validator.validate(DOCUMENT)


def test_it_is_tried_here_in_every_documented_status():
    documented = [(name, status) for name, operation in OPERATIONS.items()
                  for status in operation["responses"]]

    assert sorted(row[:2] for row in ANSWERS) == sorted(documented)


@pytest.mark.parametrize("operation, status, ask", ANSWERS,
                         ids=[" ".join(row[:2]) for row in ANSWERS])
def test_it_answers_as_documented(service, servers, database, operation, status, ask):
    """Status, media type, headers, and as body one of the examples."""
    documented = resolved(OPERATIONS[operation]["responses"][status])
    [(media_type, content)] = documented["content"].items()
    examples = [each["value"] for each in content.get("examples", {}).values()]
    examples = examples or [content["example"]]
    database("""
        INSERT INTO limits (name, subject, count, expires_at)
        VALUES ('register address hour', %(email)s, 1000000, now() + interval '1 hour'),
               ('activate address hour', %(email)s, 1000000, now() + interval '1 hour')
            ON CONFLICT DO NOTHING""", {"email": BUSY})

    with crowded(servers.postgres) if status == "503" else nullcontext():
        answer = ask(service)

    assert status in (str(answer.status), "default")
    assert answer.status < 400 or problem_in(answer) == answer.status
    assert answer.headers["Content-Type"] == media_type
    assert answer.json in examples
    assert not any(violations(content["schema"], example) for example in examples)
    for name, header in documented.get("headers", {}).items():
        header, text = resolved(header), answer.headers[name]
        assert text or not header.get("required"), f"no {name}"
        assert not text or not violations(header["schema"], yaml.safe_load(text))


def test_schemathesis_finds_no_answer_that_is_not_as_documented(service, tmp_path):
    """Some hundred requests, good and bad ones, that it makes from openapi.yaml."""
    email, code = registered(service)
    for _ in range(3):      # so that it cannot guess the code: it did, once
        activate(service, email, wrong(code))
    command = [Path(sys.executable).with_name("schemathesis"),
               "--config-file", TOP / "tests/schemathesis.toml",
               "run", TOP / "openapi.yaml", "--url", service.url,
               "--auth", f"{email}:{PASSWORD}", "--max-examples", "15", "--seed", "1"]

    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True,
                         text=True, env=os.environ | {"NO_PROXY": "*"})

    assert run.returncode == 0, run.stdout + run.stderr


# -- The page --------------------------------------------------------------------------


def test_it_serves_this_very_document(service):
    answer = send(service, "GET", "/openapi.yaml")

    assert answer.headers["Content-Type"] == "application/yaml"
    assert answer.body == (TOP / "openapi.yaml").read_bytes()


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_its_page_is_the_same_whatever_a_caller_claims(service, path):
    plain = send(service, "GET", path)

    claimed = send(service, "GET", path, headers={
        "Host": "evil.example", "X-Forwarded-Proto": "<script>, https",
        "X-Forwarded-For": "1.2.3.4, 1.2.3.4"})

    assert plain.status == (200 if path == "/docs/" else 308)
    assert shown(claimed) == shown(plain)     # the edge keeps it for everybody


# -- .env.example, Compose, and the tests that the documents name ----------------------


def settings_of(file):
    """The names of the settings that a file of the program reads."""
    return {*re.findall(r"^[^#\n]*(?:setting|number)\(\s*\"([A-Z_]+)\"",
                        (TOP / file).read_text(), re.MULTILINE)}


def test_env_example_explains_each_setting_that_compose_passes_on_and_sets_none():
    compose = yaml.safe_load((TOP / "docker-compose.yml").read_text())["services"]
    of_compose = {name for file in TOP.glob("docker-compose*.yml")
                  for name in re.findall(r"\$\{([A-Z_]+)", file.read_text())}

    explained = re.findall(r"^#?([A-Z_]+)=", (TOP / ".env.example").read_text(),
                           re.MULTILINE)

    program = map(settings_of, ["service.py", "consumer.py", "gunicorn.conf.py"])
    assert sorted(explained) == sorted(of_compose.union(*program))
    assert not dotenv_values(TOP / ".env.example")
    for name, file in ("api", "service.py"), ("consumer", "consumer.py"):
        assert settings_of(file) <= compose[name]["environment"].keys()


def test_each_test_that_the_documents_name_is_there():
    documents = [TOP / "README.md", TOP / "SECURITY.md", *TOP.glob("docs/*.md")]
    files = {path.stem: path.read_text() for path in TOP.glob("tests/test_*.py")}
    there = {*files, *re.findall(r"\ndef (test_\w+)", "".join(files.values()))}

    named = {name for path in documents
             for name in re.findall(r"\btest_\w+", path.read_text())}

    assert len(named) > 20
    assert named <= there


# -- "Break it yourself": the commands print what the README shows ---------------------


@pytest.mark.parametrize("way", break_it()[1])
def test_it_prints_what_the_readme_shows(servers, service, way):
    """They run as they are, but for two ports and shorter pauses. What they ask of
    Compose happens to the servers here."""
    things = {"consumer": service.consumer, "maildev": servers.mail_server,
              "rabbitmq": servers.rabbitmq, "postgres": servers.postgres}
    verbs = {"up": "start", "unpause": "resume"}
    shortcuts, ways = break_it(urlsplit(service.url).netloc,
                               urlsplit(service.maildev_url).netloc)
    command, output = ways[way].command.replace("sleep 20", "sleep 1"), ""

    wait_until_at_rest(service)     # after the way before, which may have been a stall
    for part in re.split("(docker compose [^;]+); ", command):
        if part.startswith("docker compose "):
            verb, *_, name = part.removeprefix("docker compose ").split()
            getattr(things[name], verbs.get(verb, verb))()
        else:
            output += subprocess.check_output(
                ["bash", "-c", f"{shortcuts}\n{part}"], text=True, timeout=60)

    assert shape(output) == shape(ways[way].output)
