"""The README's section "Break it yourself": its commands print what it shows.

The commands run as they are, but for two ports and a shorter pause; instead of Compose,
they stop and pause the servers here. Seconds and codes may be others.
"""

from urllib.parse import urlsplit

import pytest
from steps.readme import break_it, run_with_compose, script_of, shape

SECTION = break_it()


@pytest.fixture
def compose(servers, service):
    """What a `docker compose` of the section does, by its words."""
    actions = {"kill consumer": service.consumer.kill,
               "up -d --no-deps consumer": service.consumer.start,
               "stop maildev": servers.mail_server.stop,
               "start maildev": servers.mail_server.start}
    for name in ("rabbitmq", "postgres"):
        server = getattr(servers, name)
        actions |= {f"pause {name}": server.pause, f"unpause {name}": server.resume}
    return lambda words: actions[words]()


def test_it_has_six_ways_to_break_it():
    assert len(SECTION.breaks) == 6


@pytest.mark.parametrize("way", SECTION.breaks)
def test_it_prints_what_the_readme_shows(service, compose, way):
    script = script_of(SECTION, way, urlsplit(service.url).netloc,
                       urlsplit(service.maildev_url).netloc)

    output = run_with_compose(script.replace("sleep 20", "sleep 4"), compose)

    assert shape(output) == shape(SECTION.breaks[way].output)
