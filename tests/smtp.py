"""A mail server that answers what a test tells it, for what MailDev cannot say.

    smtp.replies["RCPT", address] = ["450 later", DROP, HANG]   # one a try, then 250
    smtp.replies["DATA", address] = ["554 spam", event]         # 250 when event is set
    smtp.replies["MAIL", sender] = ["550 no"]
    smtp.tries[address]        how often it was asked to take a mail for the address
    smtp.mails_to(address)     what it took: .sender, .recipients, .content, .client
"""

import base64
import collections
import socket
import socketserver
import threading
from contextlib import suppress
from types import SimpleNamespace

DROP = "drop"      # the connection, without a word
HANG = "hang"      # until the client has had enough


class SmtpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self, port, tls=None, implicit_tls=False, login=None):
        """tls: an SSLContext, for STARTTLS or implicit; login: (name, password)."""
        super().__init__(("127.0.0.1", port), Session)
        self.port = port
        self.tls, self.implicit_tls, self.login = tls, implicit_tls, login
        self.greetings = []      # other than 220, one a connection
        self.replies = {}
        self.tries = collections.Counter()
        self.mails, self.held, self.sessions = [], [], set()
        self.failed_handshakes, self.failed_logins = [], []
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def mails_to(self, address):
        return [mail for mail in self.mails if mail.recipients == [address]]

    def close(self):
        """Ends as a crash would: no more connections, and the open ones are cut."""
        self.shutdown()
        self.server_close()
        for connection in list(self.sessions):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """A client that hangs up is nothing to talk about."""


class Session(socketserver.BaseRequestHandler):
    """One client: just enough of RFC 5321, 3207 and 4954."""

    def handle(self):
        self.server.sessions.add(self.request)
        self.encrypted, self.user = False, None
        if self.server.implicit_tls:
            self.encrypt()
        self.file = self.request.makefile("rb")
        greetings = self.server.greetings
        self.say(greetings.pop(0) if greetings else "220 ready")
        while line := self.file.readline():
            verb, _, rest = line.decode().strip().partition(" ")
            if verb.upper() == "QUIT":
                return self.say("221 bye")
            getattr(self, verb.lower(), self.unknown)(rest)

    def finish(self):
        self.server.sessions.discard(self.request)

    def say(self, *lines):
        text = [line[:3] + ("-" if more else " ") + line[4:]
                for more, line in zip([True] * (len(lines) - 1) + [False], lines)]
        self.request.sendall("".join(f"{line}\r\n" for line in text).encode())

    def encrypt(self):
        try:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        except OSError as error:
            self.server.failed_handshakes.append(error)
            raise
        self.file, self.encrypted = self.request.makefile("rb"), True

    def unknown(self, rest):
        self.say("502 not here")

    def ehlo(self, rest):
        can = ["250 STARTTLS"] if self.server.tls and not self.encrypted else []
        can += ["250 AUTH PLAIN"] if self.server.login else []
        self.say("250 at your service", *can)

    def starttls(self, rest):
        self.say("220 go ahead")
        self.encrypt()

    def auth(self, rest):
        token = base64.b64decode(rest.partition(" ")[2]).decode()
        _, name, password = token.split("\0")
        if (name, password) == self.server.login:
            self.user = name
            return self.say("235 welcome")
        self.server.failed_logins.append(name)
        self.say("535 wrong password")

    def mail(self, rest):
        self.mail_from, self.recipients = address_in(rest), []
        if self.server.login and not self.user:
            return self.say("530 log in first")
        self.say_as_told("MAIL", self.mail_from)

    def rcpt(self, rest):
        recipient = address_in(rest)
        if not recipient:
            return self.say("501 to whom?")
        self.server.tries[recipient] += 1
        self.recipients.append(recipient)
        self.say_as_told("RCPT", recipient)

    def rset(self, rest):
        self.say("250 fine")

    def data(self, rest):
        self.say("354 go ahead")
        lines = iter(self.file.readline, b".\r\n")
        content = b"".join(line.removeprefix(b".") for line in lines)
        self.say_as_told("DATA", self.recipients[-1], SimpleNamespace(
            sender=self.mail_from, recipients=self.recipients, content=content,
            client=self.client_address, encrypted=self.encrypted, user=self.user))

    def say_as_told(self, verb, address, mail=None):
        replies = self.server.replies.get((verb, address))
        reply = replies.pop(0) if replies else "250 fine"
        if reply == DROP:
            return self.request.shutdown(socket.SHUT_RDWR)
        if reply == HANG:
            return self.file.read()
        if isinstance(reply, threading.Event):
            self.server.held.append(mail)
            while not reply.wait(1):
                self.request.sendall(b"250-wait\r\n")   # or the client would give up
            reply = "250 fine"
        if mail and reply.startswith("2"):
            self.server.mails.append(mail)
        self.say(reply)


def address_in(text):
    """a@b of "TO:<a@b> SIZE=1"."""
    return text.partition("<")[2].partition(">")[0]
