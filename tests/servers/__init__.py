"""Starts real servers, privately: PostgreSQL, RabbitMQ, MailDev, nginx, the program.

conftest.py uses it for the tests; `make run` and trials/ use it, too. All of it
listens on 127.0.0.1 only, keeps its data below a folder of the caller's, and leaves
alone what the system runs. Only for Linux (/proc).

    process.py      what any server can do, Server and running(): read it first
    postgres.py, pgbouncer.py, rabbitmq.py, maildev.py, edge.py (nginx)
    program.py      the API and the consumer
    system.py       all of it together, with the settings: read it second
    install.py      finds and installs what the servers need
    run.py          make run
    faults.py       what can go wrong with a server
    smtp.py         a mail server that answers what a test tells it
    sink.py         a mail server that can be killed, and whose record outlives it
"""
