"""The nginx of docker-compose.yml, as it is configured there, before local APIs."""

import os

import yaml

from servers.process import TOP, Server, free_port, responds

EDGE = yaml.safe_load((TOP / "docker-compose.yml").read_text())["services"]["edge"]


class Edge(Server):
    """nginx. The first API gets every request; the others get what it does not take."""

    name = "nginx"

    def __init__(self, folder, *apis):
        super().__init__(folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.management = free_port()
        self.log = self.folder / "edge.log"
        first, *others = [f"server 127.0.0.1:{api.port} max_fails=0" for api in apis]
        self.apis = "; ".join([first, *(f"{other} backup" for other in others)])
        self.env = {"PATH": f"{os.environ['PATH']}:/usr/sbin",
                    "NGINX_CONF": self.moved(EDGE["environment"]["NGINX_CONF"])}

    def moved(self, text):
        """What Compose makes of a text, but with this folder, these ports and APIs."""
        for there, here in [
                ("$$", "$"), ("/tmp/", f"{self.folder}/"),
                ("listen 8080 ", f"listen 127.0.0.1:{self.port} "),
                ("listen 15672;", f"listen 127.0.0.1:{self.management};"),
                ("http://api:8000;", "http://apis;"),
                ("http://rabbitmq:15672;", "http://apis;"),
                ("http {", f"http {{\n  upstream apis {{ {self.apis}; }}")]:
            text = text.replace(there, here)
        return text

    def command(self):
        return [self.moved(word) for word in EDGE["command"]]

    def answers(self):
        return responds(self.port, "/edge")


