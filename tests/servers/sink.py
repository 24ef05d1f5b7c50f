"""A mail server that can be killed: a process of its own, whose record outlives it.

The record is a file with a line of JSON for each mail: when it arrived, to whom, its
subject and Message-ID, its code and when that was issued. trials/ use it.
"""

import calendar
import json
import re
import sys
import threading
import time
from email import message_from_bytes
from email.policy import default

from servers.process import TOP, Server, free_port, says
from servers.smtp import SmtpServer


class Sink(Server):
    """Started, killed and stopped like the other servers."""

    name = "mail server"
    cwd = TOP / "tests"     # where Python finds this package

    def __init__(self, folder):
        super().__init__(folder)
        self.smtp_port, self.record = free_port(), self.folder / "mails"
        self.record.touch()

    def command(self):
        return [sys.executable, "-m", "servers.sink", self.address,
                str(self.smtp_port), self.record]

    def answers(self):
        return says(self.smtp_port, address=self.address)


class Record:
    """Takes the place of SmtpServer's list of mails."""

    def __init__(self, path):
        self.path = path

    def append(self, mail):
        message = message_from_bytes(mail.content, policy=default)
        text = message.get_body(["plain"]).get_content().replace("\r", "")
        issued = re.search("[0-9:]{8} UTC on [0-9]+ [A-Z][a-z]+ [0-9]{4}", text)
        line = json.dumps({
            "arrived": time.time(), "to": mail.recipients[0],
            "subject": message["Subject"], "id": message["Message-ID"],
            "code": issued and re.search("^[0-9]{4}$", text, re.MULTILINE)[0],
            "issued": issued and calendar.timegm(
                time.strptime(issued[0], "%H:%M:%S UTC on %d %B %Y")),
        }).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line)    # at once, so that lines do not mix


if __name__ == "__main__":
    server = SmtpServer(int(sys.argv[2]), address=sys.argv[1])
    server.mails = Record(sys.argv[3])
    threading.Event().wait()
