"""The program's files agree: topology, settings, and who imports whom."""

import re
import sys

import pytest
import yaml
from dotenv import dotenv_values
from servers.process import TOP
from steps.commands import GOOD, PROGRAM, run

COMPOSE = ["docker-compose.yml", "docker-compose.override.yml"]


def section(file, title):
    """The lines of a file between one banner and the next."""
    text = (TOP / file).read_text()
    return re.search(rf"\n# -- {title}.*\n((?:(?!# -- ).*\n)*)", text)[1].strip()


def settings_of(file):
    """The names of the settings that a file reads, in its order."""
    return re.findall(r"^[^#\n]*(?:setting|number)\(\s*\"([A-Z_]+)\"",
                      (TOP / file).read_text(), re.MULTILINE)


def documented_settings():
    text = (TOP / ".env.example").read_text()
    return re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE)


def test_it_declares_the_mail_queue_with_the_same_lines_in_both_files():
    in_service, in_consumer = [section(file, "The queue") for file in PROGRAM[:2]]

    assert "MAIL_QUEUE = Queue(" in in_service
    assert in_consumer.startswith(in_service)


def test_it_explains_each_setting_in_env_example_and_no_other():
    read = {name for file in PROGRAM for name in settings_of(file)}
    of_compose = {name for file in COMPOSE
                  for name in re.findall(r"\$\{([A-Z_]+)", (TOP / file).read_text())}

    assert sorted(documented_settings()) == sorted(read | of_compose)


def test_a_copy_of_env_example_sets_nothing():
    assert not dotenv_values(TOP / ".env.example")


@pytest.mark.parametrize("service, file", [
    ("api", "service.py"), ("consumer", "consumer.py")])
def test_compose_passes_each_setting_on(service, file):
    compose = yaml.safe_load((TOP / "docker-compose.yml").read_text())
    passed = compose["services"][service]["environment"]

    assert {*settings_of(file)} <= passed.keys()


@pytest.mark.parametrize("file", ["service.py", "consumer.py"])
def test_it_reads_the_settings_in_the_order_of_env_example(file):
    names = settings_of(file)

    assert len(names) > 1
    assert names == [name for name in documented_settings() if name in names]


def test_each_test_that_the_documents_name_is_there():
    documents = [TOP / "README.md", TOP / "SECURITY.md", *TOP.glob("docs/*.md")]
    files = {path.stem: path.read_text() for path in TOP.glob("tests/test_*.py")}
    there = {*files, *re.findall(r"\ndef (test_\w+)", "".join(files.values()))}

    named = {name for path in documents
             for name in re.findall(r"\btest_\w+", path.read_text())}

    assert len(named) > 20
    assert named <= there


def test_it_imports_no_third_module():
    code, modules = run([sys.executable, "-c", """if True:
        import sys, service, consumer
        for module in list(sys.modules.values()):
            if str(getattr(module, "__file__", "")).rpartition("/")[0] == sys.argv[1]:
                print(module.__name__)
        """, str(TOP)], **GOOD)

    assert code == 0
    assert sorted(modules) == ["consumer", "service"]
    assert sorted(file.name for file in TOP.glob("*.py")) == sorted(PROGRAM)
