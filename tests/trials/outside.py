"""The world outside: the callers and the mail server for their mails.

One process, one thread, epoll and prepared bytes, so that it costs next to nothing, and
one clock for an answer and for the mail that it announced. It takes commands from stdin
and gives results to stdout, a line of JSON each; before all it prints its SMTP port.

    {"do": "closed", "what": "register", "port": 8000, "clients": 8, "seconds": 10}

Each request has a connection of its own, as behind nginx with its defaults. Nothing
here blocks, not even to connect: where the API's accept queue is full, one caller waits
for its place while all the others go on. Latencies count from the first SYN.
"""

import base64
import heapq
import ipaddress
import itertools
import json
import random
import re
import resource
import secrets
import select
import socket
import sys
import time
from collections import defaultdict, deque
from contextlib import suppress

from nacl import pwhash

PASSWORD = "correct horse battery"
WARM_UP = 0.5       # seconds that are not counted, until the callers are out of step
PATIENCE = 30       # seconds for the last answers and mails of a command
poll = select.epoll()
on_event = {}       # file number: function
agenda = []         # heap of (instant, number, function)
number = itertools.count()
run = secrets.token_hex(3)


def watch(sock, function, event=select.EPOLLIN):
    """Call the function when there is something to read; EPOLLOUT: room to write."""
    sock.setblocking(False)
    known = sock.fileno() in on_event
    on_event[sock.fileno()] = function
    (poll.modify if known else poll.register)(sock, event)


def close(sock):
    del on_event[sock.fileno()]
    sock.close()    # epoll forgets it, too


def at(instant, function):
    heapq.heappush(agenda, (instant, next(number), function))


def work(finished, deadline):
    """Serve events until finished() or the deadline; whether it was the former."""
    while not finished():
        now = time.monotonic()
        if now > deadline:
            return False
        while agenda and agenda[0][0] <= now:
            heapq.heappop(agenda)[2]()
        wait = min(agenda[0][0] if agenda else deadline, deadline) - time.monotonic()
        for file, _ in poll.poll(max(0, min(wait, 0.1))):
            if file in on_event:
                on_event[file]()
    return True


# -- The mail server -------------------------------------------------------------------

mails = {}          # address: when the last mail for it was accepted
codes = deque()     # (address, code), not activated yet
arrivals = []       # instants
accepted = set()    # addresses that were answered 202


class Session:
    """One SMTP client; it may send several commands at once."""

    def __init__(self, sock):
        self.sock, self.buffer, self.in_data = sock, b"", False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watch(sock, self.read)
        sock.send(b"220 ready\r\n")

    def read(self):
        try:
            data = self.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            return close(self.sock)
        self.buffer += data
        while True:
            end = b"\r\n.\r\n" if self.in_data else b"\r\n"
            text, found, rest = self.buffer.partition(end)
            if not found:
                return
            self.buffer = rest
            if self.in_data:
                self.in_data = False
                self.sock.send(b"250 taken\r\n")
                self.accept(text)
            elif text[:4].upper() == b"DATA":
                self.in_data = True
                self.sock.send(b"354 go ahead\r\n")
            else:
                if text[:4].upper() == b"RCPT":
                    self.address = text.partition(b"<")[2].partition(b">")[0].decode()
                self.sock.send(b"221 bye\r\n" if text[:4].upper() == b"QUIT" else
                               b"250 fine\r\n")

    def accept(self, text):
        now = time.monotonic()
        mails[self.address] = now
        arrivals.append(now)
        if code := re.search(rb"\r\n([0-9]{4})\r\n", text):
            codes.append((self.address, code[1].decode()))


# -- The callers -----------------------------------------------------------------------


def request(line, fields, *headers):
    body = json.dumps(fields).encode()
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", "Connection: close",
                        f"X-Forwarded-For: {ipaddress.IPv4Address(next(number))}",
                        "Content-Type: application/json", *headers,
                        f"Content-Length: {len(body)}", "", ""]).encode() + body


def register():
    """(address, bytes) of a registration nobody has made before."""
    email = f"{run}{next(number):x}@example.com"
    fields = {"email": email, "password": PASSWORD}
    return email, request("POST /users/register", fields)


def activate():
    """(address, bytes) of the activation of one that waits; None: there is none."""
    while codes and codes[0][0] not in accepted:   # its COMMIT failed, so it is void
        codes.popleft()
    if not codes:
        return None
    email, code = codes.popleft()
    token = base64.b64encode(f"{email}:{PASSWORD}".encode()).decode()
    return email, request("PATCH /users/activate", {"code": code},
                          f"Authorization: Basic {token}")


def cheap():
    """Each in turn of what needs no hash: 401, 422, 404 and a health check."""
    return "", [request("PATCH /users/activate", {"code": "0000"}),
                request("POST /users/register", {"email": "a@b", "password": "short"}),
                request("GET /nowhere", {}),
                request("GET /healthz", {})][next(number) % 4]


class Phase:
    """What a command learns: answers, their latencies, and what mails they announced.

    The window opens after WARM_UP. Answers count if they come in it, latencies if their
    request was made in it, so that the slowest ones are not cut off at its end.
    """

    def __init__(self, what, port, seconds, count=float("inf")):
        self.make, self.port, self.left = globals()[what], port, count
        self.begin = time.monotonic()
        self.end = self.begin + WARM_UP + seconds
        self.seconds = seconds
        self.answers = defaultdict(int)     # status: how many in the window
        self.latencies = defaultdict(list)  # status: seconds
        self.all = defaultdict(int)         # status: how many ever
        self.accepted = {}                  # address: when its 202 came
        self.under_way = 0

    def ask(self, then):
        """One request, and then() after its answer. False: there is none to make."""
        if not self.left or not (made := self.make()):
            return False
        self.left -= 1
        email, content = made
        sock, chunks, began = socket.socket(), [], time.monotonic()
        self.under_way += 1

        def write():
            with suppress(OSError):     # refused; read() finds nothing and says so
                sock.send(content)
            watch(sock, read)

        def read():
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            if data:
                return chunks.append(data)
            now = time.monotonic()
            close(sock)
            self.under_way -= 1
            status = b"".join(chunks)[9:12].decode() or "none"
            self.all[status] += 1
            self.answers[status] += self.in_window(now)
            if self.in_window(began):
                self.latencies[status].append(now - began)
            if status == "202":
                self.accepted[email] = now
                accepted.add(email)
            then()

        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", self.port))   # EINPROGRESS
        watch(sock, write, select.EPOLLOUT)
        return True

    def in_window(self, instant):
        return self.begin + WARM_UP <= instant < self.end

    def loop(self):
        """A caller who asks again as soon as it is answered."""
        if time.monotonic() < self.end and not self.ask(self.loop):
            self.end = min(self.end, time.monotonic())

    def arrive(self, rate, due):
        """Callers who come whether or not the ones before have been answered.

        Each is due a random time after the one before was due, not after it really
        came: epoll wakes up late by up to a millisecond, and that must not add up.
        """
        self.ask(lambda: None)
        following = due + random.expovariate(rate)
        if following < self.end:
            at(following, lambda: self.arrive(rate, following))

    def result(self, wait_for_mails):
        work(lambda: time.monotonic() >= self.end and not self.under_way,
             self.end + PATIENCE)
        if wait_for_mails:
            work(lambda: self.accepted.keys() <= mails.keys(),
                 time.monotonic() + PATIENCE)
        return {"seconds": self.end - self.begin - WARM_UP, "answers": self.answers,
                "latencies": self.latencies, "all": self.all,
                "unanswered": self.under_way,
                "lost": sum(email not in mails for email in self.accepted)}


# -- The commands ----------------------------------------------------------------------


def closed(what, port, clients, **bounds):
    """So many callers, each of whom waits for its answer."""
    phase = Phase(what, port, **bounds)
    for _ in range(clients):
        phase.loop()
    return phase.result(what == "register")


def opened(what, port, rate, seconds):
    """So many arrivals a second, whatever becomes of them."""
    phase = Phase(what, port, seconds)
    phase.arrive(rate, phase.begin)
    return phase.result(what == "register")


def each(port, count, what):
    """One at a time, each after the mail of the one before. Codes that nobody used go,
    so that activations which follow are of these registrations."""
    latencies, statuses = [], set()
    if what == "register":
        codes.clear()
    for _ in range(count):
        phase = Phase(what, port, 60)
        phase.begin -= WARM_UP      # there is none
        phase.ask(lambda: None)
        work(lambda phase=phase: not phase.under_way, time.monotonic() + PATIENCE)
        for email in phase.accepted:
            work(lambda email=email: email in mails, time.monotonic() + PATIENCE)
        latencies += itertools.chain(*phase.latencies.values())
        statuses |= phase.all.keys()
    return {"latencies": latencies, "statuses": sorted(statuses)}


def count_mails(count):
    """Waits for so many mails; how long they took from the first to the last."""
    arrivals.clear()
    work(lambda: len(arrivals) >= count, time.monotonic() + PATIENCE)
    return {"mails": len(arrivals), "seconds": arrivals[-1] - arrivals[0]}


def hash(seconds):
    """Nothing but hashes, with the program's parameters: 12 MiB, 3 passes, 1 lane."""
    count, begin, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() < begin + seconds:
        pwhash.argon2id.str(PASSWORD.encode(), 3, 12 << 20)
        count += 1
    return {"rate": count / (time.monotonic() - begin),
            "cpu": (time.process_time() - cpu) / count}


def serve():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = socket.create_server(("127.0.0.1", 0))
    watch(listener, lambda: Session(listener.accept()[0]))
    print(listener.getsockname()[1], flush=True)
    commands = []
    stdin = sys.stdin.fileno()
    on_event[stdin] = lambda: commands.append(sys.stdin.readline())
    poll.register(stdin, select.EPOLLIN)
    while work(lambda: commands, float("inf")) and (line := commands.pop(0)):
        command = json.loads(line)
        print(json.dumps(globals()[command.pop("do")](**command)), flush=True)


if __name__ == "__main__":
    serve()
