"""What the README shows, so that a test can run it."""

import re
from types import SimpleNamespace

from servers.process import TOP


def code_in(title):
    """The blocks of code in a section."""
    text = (TOP / "README.md").read_text()
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [block for block in section.rstrip().split("\n\n")
            if block.startswith("    ")]


def break_it(api="localhost:8000", maildev="localhost:1080"):
    """The section's shortcuts, and its six ways by their titles, with these servers.

    Each of the ways has a .command and the .output that the README shows.
    """
    shortcuts, *blocks = [
        block.replace("localhost:8000", api).replace("localhost:1080", maildev)
        for block in code_in("Break it yourself")]
    ways = {}
    for block in blocks:
        title, command, *output = block.replace("\n    ", "\n").strip().split("\n")
        ways[title.partition(":")[0].strip("# ")] = SimpleNamespace(
            command=command, output="\n".join(output))
    assert len(ways) == 6
    return shortcuts, ways


def shape(output):
    """An output without what differs from run to run: seconds, the digits of a code."""
    output = re.sub(r"[0-9]+\.[0-9]+ s", "SECONDS", output.rstrip())
    return re.sub(r"\b[0-9]{4}\b", "CODE", output)
