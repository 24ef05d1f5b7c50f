"""A coverage-guided fuzzer for what reads bytes from outside, by hand:

    .venv/bin/pip install atheris==3.0.0
    .venv/bin/python tests/fuzz.py read_fields -max_total_time=1200

Or read_credentials, client, on_message. Options are libFuzzer's. No server is needed:
the functions are called in this process, and what the consumer would send is kept. It
ends with an error, and the input, if a function breaks its promise.
"""

import base64
import io
import json
import os
import re
import sys
import tempfile
import unicodedata
from email import message_from_string
from pathlib import Path
from types import SimpleNamespace

import atheris
from kombu import Message
from servers.process import TOP
from servers.system import settings_for
from werkzeug.exceptions import HTTPException

sys.path.insert(0, str(TOP))
os.environ.update(settings_for(
    "postgresql://localhost/nobody", "amqp://localhost//", 1025,
    PYTHON_DOTENV_DISABLED="1", LOG_LEVEL="CRITICAL", TRUSTED_PROXIES="1"))

import consumer
import service


def context(**environ):
    return service.app.request_context({
        "REQUEST_METHOD": "POST", "PATH_INFO": "/users/register", "SERVER_NAME": "x",
        "SERVER_PORT": "80", "REMOTE_ADDR": "127.0.0.1", "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(), **environ})


def read_fields(data):
    """Two canonical values, or one of three statuses. The body is JSON, or anything."""
    if data[:1] == b"J":
        provider = atheris.FuzzedDataProvider(data[1:])
        email = provider.ConsumeUnicode(provider.ConsumeIntInRange(0, 300))
        data = json.dumps({"email": email, "password": provider.ConsumeUnicode(200)},
                          ensure_ascii=provider.ConsumeBool()).encode(
                              "utf-8", "surrogatepass")
    with context(**{"CONTENT_TYPE": "application/json", "wsgi.input": io.BytesIO(data),
                    "CONTENT_LENGTH": str(len(data))}):
        try:
            email, password = service.read_fields(
                email=service.canonical_email, password=service.acceptable_password)
        except HTTPException as error:
            assert error.code in (400, 413, 422), error.code
            return
    is_canonical(email, password)


def read_credentials(data):
    """A pair in its canonical forms, or 401. The header is a pair, or anything."""
    if data[:1] == b"J":
        data = b"Basic " + base64.b64encode(data[1:])
    with context(HTTP_AUTHORIZATION=data.decode("latin-1")):
        try:
            email, password = service.read_credentials()
        except HTTPException as error:
            assert error.code == 401, error.code
            return
    assert email == "" or service.canonical_email(email) == email, email
    assert unicodedata.is_normalized("NFC", password), password
    password.encode()


def is_canonical(email, password):
    assert email.isascii() and email == email.lower() and email.count("@") == 1, email
    assert len(email) <= 254 and not re.search("[\0-\x20\x7f]", email), email
    assert service.canonical_email(email) == email, email
    assert 8 <= len(password) <= 128, password
    assert unicodedata.is_normalized("NFC", password), password
    password.encode()


def client(data):
    """An address, a /64, or "unknown". What comes before it does not matter."""
    claim = data.decode("latin-1")
    with context(HTTP_X_FORWARDED_FOR=claim):
        subject = service.client()
    assert subject == "unknown" or re.fullmatch("[0-9.]+|[0-9a-f:]+/64", subject)
    with context(HTTP_X_FORWARDED_FOR=f"{claim}, 192.0.2.1"):
        assert service.client() == "192.0.2.1"


class Channel:
    """Notes how a message was settled."""

    no_ack_consumers = connection = None

    def __init__(self):
        self.settled = []

    def basic_ack(self, *_, **__):
        self.settled.append("ack")

    def basic_reject(self, *_, **__):
        self.settled.append("reject")


mails = []
consumer.open_session = lambda: None
consumer.smtp = SimpleNamespace(
    sendmail=lambda sender, addresses, mail: mails.append((addresses[0], mail)))


def on_message(data):
    """Settled once; and a mail, if there is one, goes to the job's address alone."""
    mails.clear()
    provider = atheris.FuzzedDataProvider(data)
    properties = {
        "message_id": provider.ConsumeUnicode(40) if provider.ConsumeBool() else "1-a"}
    content_type = provider.PickValueInList(
        ["application/json", "application/json", "text/plain", "application/data",
         "application/x-python-serialize", provider.ConsumeUnicode(20)])
    encoding = provider.PickValueInList(
        ["utf-8", "utf-8", "binary", "latin-1", provider.ConsumeUnicode(10)])
    redelivered, is_job = provider.ConsumeBool(), provider.ConsumeBool()
    body = provider.ConsumeBytes(provider.remaining_bytes())
    if is_job:      # but for one of its fields
        provider = atheris.FuzzedDataProvider(body)
        field = provider.PickValueInList([
            "template", "email", "code", "issued_at", "expires_at", "other"])
        value = provider.PickValueInList([
            provider.ConsumeUnicode(60), provider.ConsumeFloat(),
            provider.ConsumeInt(9), None, ["notice"], {"a": 1}])
        body = json.dumps({
            "template": "code", "email": "ann@example.com", "code": "0427",
            "issued_at": 1.0, "expires_at": 4e9} | {field: value}).encode()
    channel = Channel()
    message = Message(
        body, channel=channel, delivery_tag=1, content_type=content_type,
        content_encoding=encoding, properties=properties, accept={"application/json"},
        delivery_info={"redelivered": redelivered})
    consumer.on_message(message)
    assert len(channel.settled) == 1, channel.settled
    if channel.settled == ["reject"]:
        assert not mails
    for email, text in mails:
        mail = message_from_string(text)    # parses no header, unlike policy=default
        assert re.fullmatch("[!-~]+@[!-~]+", email), email
        assert mail.get_all("To") == [email], mail.get_all("To")
        assert sorted(set(mail.keys())) == [
            "Auto-Submitted", "Content-Transfer-Encoding", "Content-Type", "Date",
            "From", "MIME-Version", "Message-ID", "Subject", "To"], mail.keys()


SEEDS = {
    read_fields: [b'{"email": "ann@example.com", "password": "correct horse"}',
                  b"Jann@example.com", b'{"email": "\\ud800", "a": [[1e9]], "a": NaN}'],
    read_credentials: [b"Basic YW5uQGV4YW1wbGUuY29tOmNvcnJlY3QgaG9yc2U=",
                       b"Jann@example.com:correct horse", b'Bearer a="b", c'],
    client: [b"192.0.2.1", b"2001:db8::1", b"::ffff:192.0.2.1", b'", fe80::1%eth0'],
    on_message: [b"", b"\xff" * 100]}

if __name__ == "__main__":
    target = globals()[sys.argv.pop(1)]
    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS[target]):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], target)
        atheris.Fuzz()      # ends the process
