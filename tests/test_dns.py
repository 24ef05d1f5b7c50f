"""A DNS server that never answers: the API refuses in time, the consumer stops."""

import contextlib
import http.client
import json
import re
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

from servers.process import TOP
from servers.program import Consumer, Gunicorn, resolver_options
from steps import refused_in_time, timed

# Names that only that server could know.
NAMES = {"DATABASE_URL": "postgresql://registration@database.test/registration",
         "BROKER_URL": "amqp://guest:guest@broker.test//"}
WITH_SILENT_DNS = ["unshare", "--map-root-user", "--mount", "--net",
                   sys.executable, str(TOP / "tests/servers/silent_dns.py")]


class ApiWithSilentDns(Gunicorn):
    """In a network of its own, so it is reached over a socket in the file system."""

    def command(self):
        return [*WITH_SILENT_DNS, *super().command(), "--bind", f"unix:{self.socket}"]

    def answers(self):
        return self.alive() and self.socket.exists()

    def get(self, path):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(15)
            client.connect(str(self.socket))
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            response = http.client.HTTPResponse(client)
            response.begin()
            return SimpleNamespace(status=response.status, headers=response.headers,
                                   json=json.loads(response.read()))


class ConsumerWithSilentDns(Consumer):
    """Has started when it waits for the address of its broker."""

    def command(self):
        return [*WITH_SILENT_DNS, *super().command()]

    def answers(self):
        with contextlib.suppress(OSError):     # it has ended
            table = Path(f"/proc/{self.process.pid}/net/udp").read_text()
            unread = re.search(r":0035 \S+ \S+ [0-9A-F]+:([0-9A-F]+)", table)
            return unread and int(unread[1], 16) > 0


def test_it_answers_503_in_time_while_the_dns_server_is_silent(servers, settings):
    folder = servers.folder / "dns"     # a short name, as a socket needs
    api = ApiWithSilentDns(
        folder, settings | NAMES | {"RES_OPTIONS": resolver_options()})
    api.socket = folder / "socket"

    with api:
        answer = timed(lambda: api.get("/healthz"))

    assert refused_in_time(answer)


def test_it_stops_while_the_dns_server_is_silent(settings, tmp_path):
    consumer = ConsumerWithSilentDns(
        tmp_path, settings | NAMES | {"RES_OPTIONS": resolver_options()})

    with consumer:
        consumer.process.send_signal(signal.SIGTERM)

        assert consumer.process.wait(10) == 0
