"""nginx with nginx.conf, before APIs on this machine."""

from servers.install import find
from servers.process import TOP, Server, free_port, responds


class Edge(Server):
    """The first API gets every request; the others get what it does not take."""

    name = "nginx"

    def __init__(self, folder, *apis):
        super().__init__(folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "edge.log"
        first, *others = [f"server 127.0.0.1:{api.port} max_fails=0" for api in apis]
        apis = "; ".join([first, *(f"{other} backup" for other in others)])
        self.conf = self.folder / "nginx.conf"
        self.conf.write_text(changed((TOP / "nginx.conf").read_text(), {
            "/tmp/": f"{self.folder}/", "8080 ": f"127.0.0.1:{self.port} ",
            "http://api:8000;": "http://apis;",
            "http {": f"http {{\n    upstream apis {{ {apis}; }}"}))

    def command(self):
        return [find("nginx"), "-e", "stderr", "-c", self.conf, "-g", "daemon off;"]

    def answers(self):
        return responds(self.port, "/edge")


def changed(text, words):
    """The text with other words. Each of them must be there."""
    for word, other in words.items():
        assert word in text, word
        text = text.replace(word, other)
    return text
