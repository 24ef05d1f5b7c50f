"""What bench.py divides by: a Flask route that does one upsert and nothing else."""

import os
import threading

import psycopg2
from flask import Flask

app = Flask(__name__)
mine = threading.local()


@app.post("/upsert")
def upsert():
    if not hasattr(mine, "db"):
        mine.db = psycopg2.connect(os.environ["DATABASE_URL"])
        mine.db.autocommit = True
    cursor = mine.db.cursor()
    cursor.execute("""
        INSERT INTO visits AS old (name, count)
        VALUES ('everybody', 1)
            ON CONFLICT (name) DO UPDATE
           SET count = old.count + 1
        RETURNING count""")
    return {"count": cursor.fetchone()[0]}, 429
