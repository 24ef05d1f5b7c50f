"""What the program logs, as dicts: one for each line."""

import json
import re
from pathlib import Path

FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')


def events(log, **fields):
    """The events of a log file in which these fields have these values."""
    found = [fields_of(line) for line in Path(log).read_text().splitlines()]
    return [event for event in found if fields.items() <= event.items()]


def fields_of(line):
    return {name: unquoted(value) for name, value in FIELD.findall(line)}


def unquoted(value):
    return json.loads(value) if value.startswith('"') else value
