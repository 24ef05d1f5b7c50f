# base and program make the image that runs; tests is base with the tests on top.

FROM python:3.13-slim AS base
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A DNS server that is silent costs a second, instead of ten.
ENV RES_OPTIONS="timeout:1 attempts:1"
RUN useradd --system --no-log-init app
# Packages first: a change of the program leaves this layer alone.
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
# Root's and read-only: the program cannot change itself.
COPY --chmod=444 service.py consumer.py gunicorn.conf.py openapi.yaml common-passwords.txt ./

FROM base AS tests
COPY tests/requirements.lock tests/
RUN pip install --no-cache-dir --require-hashes -r tests/requirements.lock
COPY tests tests
USER app
CMD ["pytest", "-p", "no:cacheprovider", "tests/test_flow.py"]

# Last, so that a plain `docker build .` makes it and skips the tests.
FROM base AS program
USER app
EXPOSE 8000
CMD ["gunicorn", "--bind", "0.0.0.0:8000", "service:app"]
