"""A mail server that answers what a test tells it, for what MailDev cannot say.

    smtp.replies["RCPT", address] = ["450 later", DROP, HANG]   # one a try, then 250
    smtp.replies["MAIL", sender] = ["550 no"]
    smtp.replies["AUTH", user] = ["334 not Base64"]             # to the right password
    smtp.replies["DATA", address] = ["451 later"]               # to the command
    smtp.replies["CONTENT", address] = ["554 spam", 8, event]   # 250 after 8 seconds;
                                                                # 250 when event is set
    smtp.replies["CONTENT", address] = [LOST, GARBLED]          # it takes the mail
    smtp.replies["RCPT", address] = ["550 no, goodbye"]         # and it hangs up
    smtp.punishes = True       ten errors without a mail in between make a session slow
    smtp.tries[address]        how often it was asked to take a mail for the address
    smtp.tried_at[address]     when, by time.monotonic()
    smtp.mails_to(address)     what it took: .sender, .recipients, .content, .client
    smtp.clients               a client's address and port for each connection
    smtp.names                 what clients call themselves in EHLO
    smtp.failed_logins         when they were, by time.monotonic()
"""

import base64
import collections
import socket
import socketserver
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

DROP = "drop"      # the connection, without a word
HANG = "hang"      # until the client has had enough
LOST = "lost"      # it takes the mail and drops the connection: its 250 is lost
GARBLED = "garbled"     # it takes the mail, and says an empty line before its 250
ERRORS = 10        # the limit of Postfix, smtpd_soft_error_limit


class SmtpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self, port, tls=None, implicit_tls=False, login=None,
                 address="127.0.0.1"):
        """tls: an SSLContext, for STARTTLS or implicit; login: (name, password)."""
        super().__init__((address, port), Session)
        self.port = port
        self.tls, self.implicit_tls, self.login = tls, implicit_tls, login
        self.greetings = []      # other than 220, one a connection
        self.pauses = {}         # before "greeting" or "EHLO": until an Event
        self.replies = {}
        self.punishes = False
        self.tries = collections.Counter()
        self.tried_at = collections.defaultdict(list)
        self.clients, self.sessions = [], set()     # all of them; those that are open
        self.names = []
        self.mails, self.held = [], []
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
    """One client: just enough of RFC 5321, 3207 and 4954. Strict about the order."""

    def handle(self):
        self.server.clients.append(self.client_address)
        self.server.sessions.add(self.request)
        self.encrypted, self.user, self.errors = False, None, 0
        self.sender, self.recipients = None, []     # of the transaction under way
        if self.server.implicit_tls:
            self.encrypt()
        self.file = self.request.makefile("rb")
        greetings = self.server.greetings
        self.pause("greeting")
        self.say(greetings.pop(0) if greetings else "220 ready")
        while line := self.file.readline():
            verb, _, rest = line.decode().strip().partition(" ")
            if verb.upper() == "QUIT":
                return self.say("221 bye")
            getattr(self, verb.lower(), self.unknown)(rest)

    def finish(self):
        self.server.sessions.discard(self.request)

    def say(self, *lines):
        self.errors += lines[-1][0] in "45"
        if self.server.punishes and self.errors >= ERRORS:
            time.sleep(1)
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

    def pause(self, what):
        if what in self.server.pauses:
            self.server.pauses[what].wait()

    def ehlo(self, rest):
        self.server.names.append(rest)
        self.pause("EHLO")
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
            return self.say_as_told("AUTH", name, otherwise="235 welcome")
        self.server.failed_logins.append(time.monotonic())
        self.say("535 wrong password")

    def mail(self, rest):
        if self.server.login and not self.user:
            return self.say("530 log in first")
        if self.sender:
            return self.say("503 a transaction is under way: RSET first")
        sender = address_in(rest)
        if self.say_as_told("MAIL", sender):
            self.sender = sender

    def rcpt(self, rest):
        recipient = address_in(rest)
        if not self.sender:
            return self.say("503 MAIL first")
        if not recipient:
            return self.say("501 to whom?")
        self.server.tries[recipient] += 1
        self.server.tried_at[recipient].append(time.monotonic())
        if self.say_as_told("RCPT", recipient):
            self.recipients.append(recipient)

    def rset(self, rest):
        self.sender, self.recipients = None, []
        self.say("250 fine")

    def data(self, rest):
        if not self.recipients:
            return self.say("503 RCPT first")
        if not self.say_as_told("DATA", self.recipients[-1], otherwise="354 go ahead"):
            return
        lines = iter(self.file.readline, b".\r\n")
        content = b"".join(line.removeprefix(b".") for line in lines)
        mail = SimpleNamespace(
            sender=self.sender, recipients=self.recipients, content=content,
            client=self.client_address, encrypted=self.encrypted, user=self.user)
        self.sender, self.recipients = None, []
        self.say_as_told("CONTENT", mail.recipients[-1], mail)

    def say_as_told(self, verb, address, mail=None, otherwise="250 fine"):
        """Says the next of the replies, and returns whether it is a good one."""
        replies = self.server.replies.get((verb, address))
        reply = replies.pop(0) if replies else otherwise
        if reply == DROP:
            return self.hang_up()
        if reply == HANG:
            return self.file.read()     # returns when the client hangs up
        if isinstance(reply, threading.Event):
            self.server.held.append(mail)
            reply.wait()
            reply = otherwise
        if isinstance(reply, int):
            time.sleep(reply)
            reply = otherwise
        good = reply[0] in "23" or reply in (LOST, GARBLED)
        if mail and good:
            self.server.mails.append(mail)
            self.errors = 0
        if reply == LOST:
            return self.hang_up()
        if reply == GARBLED:
            self.request.sendall(b"\r\n")
            reply = otherwise
        self.say(reply)
        if reply.startswith("421") or reply.endswith("goodbye"):
            self.hang_up()
        return good

    def hang_up(self):
        self.request.shutdown(socket.SHUT_RDWR)


def address_in(text):
    """a@b of "TO:<a@b> SIZE=1"."""
    return text.partition("<")[2].partition(">")[0]
