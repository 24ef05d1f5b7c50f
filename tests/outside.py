"""The world outside, for bench.py: callers and the mail server that gets their mails.

One process, one thread, epoll and prepared bytes, so that it costs next to nothing, and
one clock for an answer and for the mail it announced. Takes commands from stdin and
gives results to stdout, a line of JSON each; first of all it prints its SMTP port.

    {"do": "closed", "what": "register", "port": 8000, "clients": 8, "seconds": 10}

Each request has a connection of its own, as behind nginx with its defaults.
"""

import base64
import heapq
import itertools
import json
import random
import re
import secrets
import select
import socket
import sys
import time
from collections import defaultdict, deque

PASSWORD = "correct horse battery"
WARM_UP = 0.5       # seconds that are not counted, until the callers are out of step
PATIENCE = 30       # seconds for the last answers and mails of a command
poll = select.epoll()
on_event = {}       # file number: function
agenda = []         # heap of (instant, number, function)
number = itertools.count()
run = secrets.token_hex(3)


def watch(sock, function):
    sock.setblocking(False)
    on_event[sock.fileno()] = function
    poll.register(sock, select.EPOLLIN)


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
example = b""       # the last mail


class Session:
    """One SMTP client; it may send several commands at once."""

    def __init__(self, sock):
        self.sock, self.buffer, self.in_data = sock, b"", False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watch(sock, self.read)
        sock.send(b"220 ready\r\n")

    def read(self):
        global example
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
                self.in_data, example = False, text
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


def upsert():
    """The route of bench_limit.py."""
    return "", request("POST /upsert", {})


def cheap():
    """Each in turn of what needs no hash: 401, 422, 404 and a health check."""
    return "", [request("PATCH /users/activate", {"code": "0000"}),
                request("POST /users/register", {"email": "a@b", "password": "short"}),
                request("GET /nowhere", {}),
                request("GET /healthz", {})][next(number) % 4]


class Phase:
    """The answers of a command: (status, seconds), and when mails were announced."""

    def __init__(self, what, port, seconds):
        self.make, self.port = globals()[what], port
        self.begin = time.monotonic()
        self.end = self.begin + WARM_UP + seconds
        self.seconds, self.cpu = seconds, time.process_time()
        self.answers = defaultdict(list)   # status: latencies of those in the window
        self.all = defaultdict(int)        # status: of all
        self.accepted = {}                 # address: when its 202 came
        self.under_way = 0

    def ask(self, then):
        """One request, then then(status, answer). False: there is none to make."""
        if not (made := self.make()):
            return False
        email, content = made
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        sock.sendall(content)
        began, chunks = time.monotonic(), []
        self.under_way += 1

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
            answer = b"".join(chunks)
            status = answer[9:12].decode() or "none"
            self.all[status] += 1
            if self.begin + WARM_UP <= now < self.end:
                self.answers[status].append(now - began)
            if status == "202":
                self.accepted[email] = now
                accepted.add(email)
            then(status, answer)

        watch(sock, read)
        return True

    def loop(self, patient):
        """A caller who asks again as soon as it is answered; if patient, after a 503 or
        429 as late as Retry-After says."""
        def then(status, answer):
            if time.monotonic() >= self.end:
                return
            after = re.search(rb"(?i)retry-after: ([0-9]+)", answer)
            if patient and after:
                at(time.monotonic() + int(after[1]), again)
            else:
                again()

        def again():
            if time.monotonic() < self.end and not self.ask(then):
                self.end = min(self.end, time.monotonic())   # no codes are left

        again()

    def arrive(self, rate):
        """Callers who come whether or not the ones before have been answered."""
        self.ask(lambda status, answer: None)
        following = time.monotonic() + random.expovariate(rate)
        if following < self.end:
            at(following, lambda: self.arrive(rate))

    def result(self, wait_for_mails):
        work(lambda: time.monotonic() >= self.end and not self.under_way,
             self.end + PATIENCE)
        if wait_for_mails:
            work(lambda: self.accepted.keys() <= mails.keys(),
                 time.monotonic() + PATIENCE)
        return {"seconds": self.end - self.begin - WARM_UP, "answers": self.answers,
                "all": self.all, "cpu": time.process_time() - self.cpu,
                "lost": sum(email not in mails for email in self.accepted)}


# -- The commands ----------------------------------------------------------------------


def closed(what, port, clients, seconds, patient=False, wait_for_mails=True):
    phase = Phase(what, port, seconds)
    for _ in range(clients):
        phase.loop(patient)
    return phase.result(wait_for_mails and what == "register")


def opened(what, port, rate, seconds):
    phase = Phase(what, port, seconds)
    phase.arrive(rate)
    return phase.result(what == "register")


def each(port, count, what="register"):
    """One at a time: its latency, and how long after it the mail was accepted."""
    latencies, delays = [], []
    for _ in range(count):
        phase = Phase(what, port, 60)
        phase.begin -= WARM_UP
        phase.ask(lambda status, answer: None)
        work(lambda: not phase.under_way, time.monotonic() + PATIENCE)
        for email, instant in phase.accepted.items():
            work(lambda: email in mails, time.monotonic() + PATIENCE)
            delays.append(mails[email] - instant)
        latencies += itertools.chain(*phase.answers.values())
    return {"latencies": latencies, "delays": delays}


def count_mails(count):
    """Waits for so many mails; how long they took from the first to the last."""
    arrivals.clear()
    cpu = time.process_time()
    work(lambda: len(arrivals) >= count, time.monotonic() + PATIENCE)
    return {"mails": len(arrivals), "seconds": arrivals[-1] - arrivals[0],
            "cpu": time.process_time() - cpu, "example": example.decode()}


def serve():
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
