# base and program make the image that runs. tests is for trying what runs; suite has servers
# of its own and runs all tests. database and edge are public images with a file or two of
# ours: a mounted file would have the mode that it has in your clone, and perhaps nobody but
# you may read it.

FROM postgres:17-alpine AS database
COPY --chmod=444 sql/schema.sql /docker-entrypoint-initdb.d/1-schema.sql
COPY --chmod=444 sql/api_password.sql /docker-entrypoint-initdb.d/2-api_password.sql

FROM nginxinc/nginx-unprivileged:1.28 AS edge
COPY --chmod=444 nginx.conf /etc/nginx/nginx.conf

FROM python:3.13-slim AS base
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A DNS server that is silent costs a second, instead of ten.
ENV RES_OPTIONS="timeout:1 attempts:1"
# Packages first: a change of the program leaves this layer alone.
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
# Root's and read-only: the program cannot change itself.
COPY --chmod=444 service.py consumer.py gunicorn.conf.py openapi.yaml common-passwords.txt ./

FROM base AS packages
COPY tests/requirements.lock tests/
RUN pip install --no-cache-dir --require-hashes -r tests/requirements.lock

FROM packages AS tests
COPY --chmod=755 tests tests
USER 10001:10001
CMD ["pytest", "-p", "no:cacheprovider", "tests/test_flow.py"]

FROM packages AS suite
COPY tests/servers tests/servers
RUN PYTHONPATH=tests python -m servers.install
# An ordinary user. initdb wants one that has a name.
RUN useradd --create-home suite && chown -R suite /app
COPY --chown=suite . .
USER suite
CMD ["pytest", "-p", "no:cacheprovider", "-n", "4", "--dist", "worksteal", "tests"]

# Last, so that a plain `docker build .` makes it and skips the tests.
FROM base AS program
USER 10001:10001
EXPOSE 8000
CMD ["gunicorn", "--bind", "0.0.0.0:8000", "service:app"]
