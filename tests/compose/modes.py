"""Development and production, as a new user starts them: `make compose`.

Each has a project name and ports of its own, so that nothing of yours is touched.
"""

import json
import os
import re
import shutil
import subprocess
import uuid

import pytest
from servers.process import TOP, free_port
from steps import activate, fresh_client, fresh_email, register, wait_until
from steps.readme import break_it, shape

PRODUCTION = {
    "SECRET_KEY": "only for the tests, $32 ${characters} # and more",
    "MAIL_FROM": "registration@example.com", "SMTP_HOST": "mail.example.com",
    "TRUSTED_PROXIES": "2",
    "POSTGRES_PASSWORD": uuid.uuid4().hex, "RABBITMQ_PASSWORD": uuid.uuid4().hex}


class Stack:
    """A project of Compose: in a folder, of some files, with settings of its own."""

    def __init__(self, folder, *files, **settings):
        self.folder, self.port, self.mail_port = folder, free_port(), free_port()
        self.files = [word for file in files for word in ("-f", file)]
        self.url = f"http://localhost:{self.port}"
        self.env = {
            name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST")
            if name in os.environ} | {
            "COMPOSE_PROJECT_NAME": f"tests-{uuid.uuid4().hex[:8]}",
            "EXPOSED_API_PORT": str(self.port),
            "EXPOSED_SMTP_WEB_PORT": str(self.mail_port), **settings}

    def compose(self, *words):
        """What `docker compose WORDS` did: .returncode, .stdout, .stderr."""
        return self.run(["docker", "compose", *self.files, *words])

    def run(self, command):
        return subprocess.run(command, check=False, cwd=self.folder, env=self.env,
                              text=True, capture_output=True)

    def containers(self):
        """Those of the project, as Compose describes them."""
        lines = self.compose("ps", "--all", "--format", "json").stdout.splitlines()
        return [json.loads(line) for line in lines]

    def up(self):
        done = self.compose("up", "--build", "--wait", "--detach")
        assert done.returncode == 0, done.stderr

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.compose("--profile", "tests", "down", "--volumes", "--rmi", "local")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone, with what is not committed yet, made with umask 027."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=TOP, text=True).splitlines()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / file, folder / file)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o750 if path.is_dir() else 0o640)
    return folder


@pytest.fixture(scope="module")
def development(clone):
    with Stack(clone) as stack:
        stack.up()
        yield stack


@pytest.fixture(scope="module")
def production(clone):
    """Production with the settings that it requires and no other."""
    with Stack(clone, "docker-compose.yml", **PRODUCTION) as stack:
        stack.up()
        yield stack


def published(stack):
    """The services with a port on this machine, and the address that it has there."""
    return {(container["Service"], port["URL"]) for container in stack.containers()
            for port in container["Publishers"] if port["PublishedPort"]}


# -- Development -----------------------------------------------------------------------


def test_one_command_starts_development(development):
    tried = development.compose("run", "--rm", "tests")

    assert tried.returncode == 0, tried.stdout


def test_development_is_published_on_this_machine_only(development):
    assert published(development) == {(name, "127.0.0.1")
                                      for name in ("edge", "maildev", "rabbitmq")}


def test_postgresql_logs_no_statement_that_fails(development):
    failed = development.compose(
        "exec", "postgres", "psql", "-U", "registration", "-c",
        "SET statement_timeout = 9", "-c", "SELECT pg_sleep(9), 'ann@example.com'")

    log = development.compose("logs", "postgres").stdout
    assert failed.returncode != 0
    assert "canceling statement due to statement timeout" in log
    assert "ann@example.com" not in log


@pytest.mark.parametrize("way", break_it()[1])
def test_it_prints_what_the_readme_shows(development, way):
    shortcuts, ways = break_it(f"localhost:{development.port}",
                               f"localhost:{development.mail_port}")

    done = development.run(["bash", "-c", f"{shortcuts}\n{ways[way].command}"])

    assert shape(done.stdout) == shape(ways[way].output)


# -- Production ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRODUCTION)
def test_production_names_a_setting_that_is_missing(clone, name):
    others = {key: value for key, value in PRODUCTION.items() if key != name}

    for settings in others, others | {name: ""}:
        with Stack(clone, "docker-compose.yml", **settings) as stack:
            done = stack.compose("up", "--build", "--wait", "--detach")
            stack.env |= PRODUCTION     # or Compose would refuse the next ones, too
            containers = stack.containers()

        assert done.returncode != 0
        assert len(done.stderr.splitlines()) == 1 and name in done.stderr
        assert not containers


def test_production_starts_with_the_settings_that_it_requires(production):
    assert register(production, fresh_email()).status == 202
    assert published(production) == {("edge", "127.0.0.1")}


def test_brokers_user_is_no_administrator(production):
    users = production.compose(
        "exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_users",
        "--formatter", "json").stdout

    assert [user["user"] for user in json.loads(users)] == ["registration"]
    assert "administrator" not in users


def test_it_becomes_healthy_where_containers_are_told_of_a_proxy(clone, tmp_path):
    """As ~/.docker/config.json can tell them; nothing listens at this one."""
    services = ["postgres", "rabbitmq", "api", "consumer", "edge", "maildev"]
    proxy = {"environment": {"http_proxy": "http://127.0.0.1:1",
                             "HTTP_PROXY": "http://127.0.0.1:1"}}
    (tmp_path / "proxy.yml").write_text(
        json.dumps({"services": dict.fromkeys(services, proxy)}))

    with Stack(clone, "docker-compose.yml", "docker-compose.override.yml",
               str(tmp_path / "proxy.yml")) as stack:
        stack.up()      # it waits until all of them are healthy


def test_edge_finds_a_second_api_and_does_without_the_first(production):
    production.compose("up", "--scale", "api=2", "--no-recreate", "--wait", "--detach")

    def asked():
        assert register(production, fresh_email()).status == 202
        log = production.compose("logs", "--no-color", "api").stdout
        return set(re.findall(r"^(api-\d) .*route=/users/register", log, re.MULTILINE))

    wait_until(lambda: asked() == {"api-1", "api-2"})
    project = production.env["COMPOSE_PROJECT_NAME"]
    production.run(["docker", "kill", f"{project}-api-1"])

    answers = [register(production, fresh_email()).status for _ in range(9)]

    production.compose("up", "--wait", "--detach")     # one API again
    assert answers == [202] * 9


def test_two_clients_of_a_tls_proxy_are_two(production):
    one, another = fresh_client(), fresh_client()    # as it tells them to the edge

    def guess(client):
        return activate(production, fresh_email(), "0427", **client).status

    assert [guess(one) for _ in range(21)] == [403] * 20 + [429]
    assert guess(another) == 403


def test_production_takes_its_settings_from_a_file(clone, tmp_path):
    file = tmp_path / "production"
    file.write_text("".join(f"{name}='{PRODUCTION[name]}'\n" for name in PRODUCTION))

    done = Stack(clone, "docker-compose.yml").compose(
        "--env-file", str(file), "config")

    assert done.returncode == 0
    assert PRODUCTION["SECRET_KEY"] in done.stdout.replace("$$", "$")


def test_over_the_network_only_the_apis_role_logs_in_and_to_its_database_only(
        production):
    def log_in(role, database):
        return production.compose(
            "exec", "api", "python", "-c", "import psycopg2; psycopg2.connect("
            f"host='postgres', user='{role}', dbname='{database}')")

    assert "authentication failed" in log_in("registration", "registration").stderr
    assert log_in("registration_api", "registration").returncode == 0
    for other in "postgres", "template1":
        assert "permission denied" in log_in("registration_api", other).stderr
