"""Starts real servers, privately: PostgreSQL, RabbitMQ, MailDev, nginx, the program.

conftest.py uses it for the tests; `make run`, chaos/ and bench/ use it, too. All of it
listens on 127.0.0.1 only, keeps its data below a folder of the caller's, and leaves
alone what the system runs. Only for Linux (/proc).

Read process.py first: what any server can do, as Server, and running(). Then
postgres.py, rabbitmq.py, maildev.py, edge.py and program.py, each a server or two;
install.py installs what they need. run.py is `make run`. faults.py breaks servers. The
rest stands in for the world: smtp.py and sink.py are mail servers that do as they are
told, silent_dns.py is a DNS server that never answers.
"""
