"""MailDev: a mail server with a page and an HTTP API that show the mails."""

from servers.install import find
from servers.process import LOCAL, Server, free_port, responds, says


class MailDev(Server):
    name = "MailDev"

    def __init__(self, folder, smtp_port=None, web_port=None):
        super().__init__(folder)
        self.smtp_port = smtp_port or free_port()
        self.web_port = web_port or free_port()
        self.web_url = f"http://127.0.0.1:{self.web_port}"
        self.log = self.folder / "maildev.log"

    def command(self):
        return [find("node"), LOCAL / "maildev/node_modules/.bin/maildev",
                "--ip", "127.0.0.1", "--smtp", str(self.smtp_port),
                "--web", str(self.web_port), "--mail-directory", self.folder / "mail"]

    def answers(self):
        return responds(self.web_port) and says(self.smtp_port)
