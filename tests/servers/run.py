"""make run: everything on this machine until Ctrl-C, its data in .local/.

The settings come from the environment and .env. A server that they name is used;
PostgreSQL, RabbitMQ and MailDev are started here where they name none.
"""

import os
import secrets
import signal
import sys

from dotenv import load_dotenv

from servers.install import install_missing
from servers.maildev import MailDev
from servers.postgres import Postgres
from servers.process import LOCAL, TOP, interrupt, running, taken
from servers.program import Consumer, Gunicorn
from servers.rabbitmq import RabbitMQ
from servers.system import create_tables

WELCOME = """
API   http://localhost:8000/
docs  http://localhost:8000/docs/
mail  {mail}

curl -i http://localhost:8000/users/register -H 'Content-Type: application/json' \\
     -d '{{"email": "ann@example.com", "password": "correct horse battery"}}'
"""


def main():
    """Everything, until Ctrl-C; returns what went wrong otherwise."""
    load_dotenv(TOP / ".env", interpolate=False)
    setting = {Postgres: "DATABASE_URL", RabbitMQ: "BROKER_URL", MailDev: "SMTP_HOST"}
    private = [server for server in setting if not os.environ.get(setting[server])]
    for port in [8000, 1025, 1080] if MailDev in private else [8000]:
        if taken(port):
            return f"port {port} is taken: something else listens there"

    install_missing(*[server.name for server in private])
    LOCAL.mkdir(exist_ok=True)
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)  # tests/, for us and not for the program
    env["SECRET_KEY"] = env.get("SECRET_KEY") or kept_secret()
    env["MAIL_FROM"] = env.get("MAIL_FROM") or "registration@example.com"
    servers = []
    if Postgres in private:
        servers.append(postgres := Postgres(LOCAL))
        env["DATABASE_URL"] = postgres.api_url
    if RabbitMQ in private:
        servers.append(rabbitmq := RabbitMQ(LOCAL))
        env["BROKER_URL"] = rabbitmq.url
    if MailDev in private:
        servers.append(MailDev(LOCAL, 1025, 1080))
        env |= {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": "1025"}

    program = Gunicorn(LOCAL, env, 8000), Consumer(LOCAL, env)
    for process in program:
        process.log = None
    with running(*servers):
        if Postgres in private:
            create_tables(postgres)
        with running(*program):
            mail = "http://localhost:1080/" if MailDev in private else env["SMTP_HOST"]
            print(WELCOME.format(mail=mail), flush=True)
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # until one of them ends
            ended = [each.name for each in (*program, *servers) if not each.alive()]
            return f"{' and '.join(ended)} ended by itself, so all is stopped"


def kept_secret():
    """The same in every run, or the codes of the last one would be void."""
    path = LOCAL / "secret_key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32))
    return path.read_text()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)
    except RuntimeError as error:
        sys.exit(str(error))
