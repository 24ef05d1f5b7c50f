"""What the figures are divided by: an upsert, a hash, a mail, and nothing else.

    gunicorn bench.limit:app            a route that does one upsert
    python limit.py hash                hashes for as long as stdin tells it to
    python limit.py smtp PORT COUNT     sends the mail on stdin so many times
"""

import json
import os
import smtplib
import sys
import time

import psycopg2
from flask import Flask
from nacl import pwhash
from psycopg2.extensions import set_wait_callback

app = Flask(__name__)
db = None
set_wait_callback(None)     # gunicorn.conf.py has imported service.py, which sets one


@app.post("/upsert")
def upsert():
    global db
    if not db:      # once in a worker, after the fork
        db = psycopg2.connect(os.environ["DATABASE_URL"])
        db.autocommit = True
    cursor = db.cursor()
    cursor.execute("""
        INSERT INTO visits AS old (name, count)
        VALUES ('everybody', 1)
            ON CONFLICT (name) DO UPDATE
           SET count = old.count + 1
        RETURNING count""")
    return {"count": cursor.fetchone()[0]}, 429


def hash_password():
    """With the program's parameters: 12 MiB, 3 passes, 1 lane."""
    pwhash.argon2id.str(b"correct horse battery", 3, 12 << 20)


def hash_for(seconds):
    """(hashes a second, CPU seconds of one) on one core."""
    count, begin, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() < begin + seconds:
        hash_password()
        count += 1
    elapsed = time.monotonic() - begin
    return count / elapsed, (time.process_time() - cpu) / count


def hash_when_told():
    """Like outside.py: a line of JSON each way."""
    hash_password()     # warm up
    for line in sys.stdin:
        print(json.dumps(hash_for(**json.loads(line))), flush=True)


def smtp(port, count):
    mail = sys.stdin.buffer.read()
    with smtplib.SMTP("127.0.0.1", port) as session:
        for _ in range(count):
            session.sendmail("registration@example.com", ["ann@example.com"], mail)


if __name__ == "__main__":
    if sys.argv[1] == "hash":
        hash_when_told()
    else:
        smtp(*map(int, sys.argv[2:]))
