"""A mail server that answers what a test tells it, for what MailDev cannot say.

    smtp.replies["RCPT", address] = ["450 later", DROP]         # one a try, then 250
    smtp.replies["MAIL", sender] = ["550 no"]
    smtp.replies["EHLO", name] = [event]                        # 250 when event is set
    smtp.replies["AUTH", user] = ["334 not Base64"]
    smtp.replies["DATA", address] = ["451 later"]               # to the command
    smtp.replies["CONTENT", address] = ["554 spam", 8, event]   # 8: 250 after 8 seconds
    smtp.tries[address]        when it was asked to take a mail for the address
    smtp.mails_to(address)     what it took: .sender, .recipients, .content, .client
    smtp.names                 what clients call themselves in EHLO
    smtp.logins                when somebody tried to log in

Times are by time.monotonic(). Ten errors without a mail in between make a session slow.
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
ERRORS = 10        # the limit of Postfix, smtpd_soft_error_limit


class SmtpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self, port, tls=None, login=None, address="127.0.0.1"):
        """tls: an SSLContext, for STARTTLS or implicit; login: (name, password)."""
        super().__init__((address, port), Session)
        self.port = port
        self.tls, self.implicit_tls, self.login = tls, False, login
        self.replies = {}
        self.tries = collections.defaultdict(list)
        self.sessions = set()     # those that are open
        self.names, self.mails, self.held = [], [], []
        self.failed_handshakes, self.logins = [], []
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def mails_to(self, address):
        return [mail for mail in self.mails if mail.recipients == [address]]

    def __exit__(self, *error):
        """Ends as a crash would: no more connections, and the open ones are cut."""
        self.shutdown()
        self.server_close()
        for session in list(self.sessions):
            with suppress(OSError):
                session.request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """A client that hangs up is nothing to talk about."""


class Session(socketserver.BaseRequestHandler):
    """One client: just enough of RFC 5321, 3207 and 4954."""

    def handle(self):
        self.server.sessions.add(self)
        self.encrypted, self.user, self.errors = False, None, 0
        self.sender, self.recipients = None, []     # of the transaction under way
        if self.server.implicit_tls:
            self.encrypt()
        self.file = self.request.makefile("rb")
        self.say("220 ready")
        while line := self.file.readline():
            verb, _, rest = line.decode().strip().partition(" ")
            if verb.upper() == "QUIT":
                return self.say("221 bye")
            getattr(self, verb.lower())(rest)

    def finish(self):
        self.server.sessions.discard(self)

    def say(self, reply):
        self.errors += reply[0] in "45"
        if self.errors >= ERRORS:
            time.sleep(1)
        self.request.sendall(f"{reply}\r\n".encode())

    def encrypt(self):
        try:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        except OSError as error:
            self.server.failed_handshakes.append(error)
            raise
        self.file, self.encrypted = self.request.makefile("rb"), True

    def ehlo(self, rest):
        self.server.names.append(rest)
        can = ["STARTTLS"] if self.server.tls and not self.encrypted else []
        can += ["AUTH PLAIN"] if self.server.login else []
        lines = [f"250-{line}\r\n" for line in ("at your service", *can)]
        self.say_as_told("EHLO", rest, otherwise="".join(lines) + "250 HELP")

    def starttls(self, rest):
        self.say("220 go ahead")
        self.encrypt()

    def auth(self, rest):
        self.server.logins.append(time.monotonic())
        token = base64.b64decode(rest.partition(" ")[2]).decode()
        _, name, password = token.split("\0")
        good = (name, password) == self.server.login
        verdict = "235 welcome" if good else "535 wrong password"
        if self.say_as_told("AUTH", name, otherwise=verdict):
            self.user = name

    def mail(self, rest):
        if self.server.login and not self.user:
            return self.say("530 log in first")
        sender = address_in(rest)
        if self.say_as_told("MAIL", sender):
            self.sender = sender

    def rcpt(self, rest):
        recipient = address_in(rest)
        self.server.tries[recipient].append(time.monotonic())
        if self.say_as_told("RCPT", recipient):
            self.recipients.append(recipient)

    def rset(self, rest):
        self.sender, self.recipients = None, []
        self.say("250 fine")

    def data(self, rest):
        if not (self.sender and self.recipients):
            return self.say("503 MAIL and RCPT first")
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
        if isinstance(reply, threading.Event):
            self.server.held.append(mail)
            reply.wait()
            reply = otherwise
        if isinstance(reply, int):
            time.sleep(reply)
            reply = otherwise
        good = reply[0] in "23"
        if mail and good:
            self.server.mails.append(mail)
            self.errors = 0
        self.say(reply)
        if reply.startswith("421"):
            self.hang_up()
        return good

    def hang_up(self):
        self.request.shutdown(socket.SHUT_RDWR)


def address_in(text):
    """a@b of "TO:<a@b> SIZE=1"."""
    return text.partition("<")[2].partition(">")[0]
