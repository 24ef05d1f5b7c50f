"""What no HTTP library would send: smuggling, broken framing, clients that leave."""

import socket

import pytest
from steps import connect, fresh_email, register

POST = (b"POST /users/register HTTP/1.1\r\nHost: a\r\n"
        b"Content-Type: application/json\r\n")


def answer_to(service, *pieces):
    """Sends bytes, closes the sending half, and reads until the service closes too."""
    with connect(service) as connection:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def log_since(service, start):
    """What the service has logged after the first so many characters."""
    return service.log.read_text()[start:]


@pytest.mark.parametrize("framing", [
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"Content-Length: -1\r\n\r\n",
    b"Content-Length: +5\r\n\r\nabcde",
    b"Content-Length: 5, 5\r\n\r\nabcde",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{",
    b"Content-Length: 50\r\n\r\n{",
    b"Content-Length: 0\r\n Folded: yes\r\n\r\n"])
def test_it_refuses_ambiguous_or_broken_framing(service, framing):
    answer = answer_to(service, POST + framing)

    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
    assert answer.count(b"HTTP/1.1 ") == 1


def test_it_does_not_wait_for_a_body_that_is_said_to_be_too_large(service):
    with connect(service, receive=5) as caller:
        caller.sendall(POST + b"Content-Length: 100000\r\n\r\n")

        assert caller.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_it_does_not_take_the_rest_of_a_refused_body_for_a_request(service):
    hidden = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"

    answer = answer_to(
        service, POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n" + hidden)

    assert b" 200 " not in answer


@pytest.mark.parametrize("head", [
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Basic " + b"a" * 9000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 200 + b"\r\n"])
def test_it_refuses_oversized_heads(service, head):
    answer = answer_to(service, head)

    assert answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("head", [
    (b"GET /x?password=hunter2secret HTTP/1.1\r\nHost: a\r\n"
     b"Authorization Basic aGlkZGVu\r\n"),
    b"GET /x?password=hunter2secret FOO\r\n",
    b"GET /\x00?password=hunter2secret HTTP/1.1\r\nHost: a\r\n",
    b"GET /nothing/hunter2secret?password=hunter2secret HTTP/1.1\r\nHost: a\r\n"])
def test_it_does_not_log_what_it_cannot_parse(service, head):
    start = len(service.log.read_text())

    answer_to(service, head + b"\r\n")

    assert "hunter2secret" not in log_since(service, start)
    assert "aGlkZGVu" not in log_since(service, start)


def test_it_survives_clients_that_leave(service):
    for length in range(0, len(POST), 10):
        with connect(service) as connection:
            connection.sendall(POST[:length])

    assert register(service, fresh_email()).status == 202
