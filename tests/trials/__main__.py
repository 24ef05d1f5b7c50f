"""python -m trials bench, chaos, ...: one of them, from its options to its failures."""

import argparse
import random
import signal
import sys

from servers.process import interrupt

from trials import bench, chaos, clock


def main():
    parser = argparse.ArgumentParser("trials")
    commands = parser.add_subparsers(required=True, metavar="TRIAL")
    for trial in bench, clock, chaos:
        name = trial.__name__.rpartition(".")[2]
        title = trial.__doc__.partition("\n")[0]
        command = commands.add_parser(name, help=title, description=title)
        command.add_argument("--short", action="store_true", help="a minute or two")
        command.add_argument("--seed", type=int, default=random.randrange(10_000))
        trial.add_options(command)
        command.set_defaults(main=trial.main)
    options = parser.parse_args()
    return "\n".join(options.main(options))


if __name__ == "__main__":
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, interrupt)
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit("stopped")
