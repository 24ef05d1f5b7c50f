"""What the README shows, so that a test can run it."""

import re
import socket
import subprocess
from types import SimpleNamespace

from servers.process import TOP


def break_it():
    """The section: its .shortcuts, and its .breaks by their titles.

    Each of these has a .command and the .output that the README shows.
    """
    text = (TOP / "README.md").read_text()
    section = text.split("\n## Break it yourself\n")[1].split("\n## ")[0]
    shortcuts, *breaks = [part for part in section.rstrip().split("\n\n")
                          if part.startswith("    ")]
    found = {}
    for lines in (part.split("\n") for part in breaks):
        title, command, *output = [line.removeprefix("    ") for line in lines]
        found[title.partition(":")[0].strip("# ")] = SimpleNamespace(
            command=command, output="\n".join(output))
    return SimpleNamespace(shortcuts=shortcuts, breaks=found)


def page_functions():
    """The JavaScript of the section "From a web page"."""
    text = (TOP / "README.md").read_text()
    section = text.split("\n## From a web page\n")[1].split("\n## ")[0]
    return "\n".join(line.removeprefix("    ") for line in section.split("\n")
                     if line.startswith("    "))


def script_of(section, way, api, maildev):
    """The shortcuts and the command of a way, with these as its two servers."""
    script = f"{section.shortcuts}\n{section.breaks[way].command}"
    return script.replace("localhost:8000", api).replace("localhost:1080", maildev)


def run_with_compose(script, compose):
    """What a script prints. Each `docker compose WORDS` in it calls compose(WORDS)."""
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    docker = f'docker() {{ echo "$*" >&{number}; read -r <&{number}; }}\n'
    with ours, subprocess.Popen(
            ["bash", "-c", docker + script], stdout=subprocess.PIPE, text=True,
            pass_fds=[number]) as process:
        theirs.close()
        for line in ours.makefile():
            compose(line.strip().removeprefix("compose "))
            ours.sendall(b"\n")
        return process.stdout.read().rstrip()


def shape(output):
    """An output without what differs from run to run: seconds, the digits of a code."""
    output = re.sub(r"[0-9]+\.[0-9]+ s", "SECONDS", output)
    return re.sub(r"\b[0-9]{4}\b", "CODE", output)
