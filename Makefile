# For a machine without Docker. tests/servers/ starts the servers privately.

# env, since make would start a shell for a bare assignment, and that keeps signals back.
PYTHON = env PYTHONPATH=tests .venv/bin/python

help:
	@echo "make run     everything on this machine until Ctrl-C, data in .local/"
	@echo "make test    the tests, with servers of their own"
	@echo "make bench   how fast it is, a quarter of an hour; nothing else should run"
	@echo "make chaos   ten minutes of load while servers and processes are killed"
	@echo "make failover   the same with a cluster of brokers and a standby database"
	@echo "make clock   whether the time of an answer tells who is registered"
	@echo "make common-passwords   write the block list anew, from Django's"
	@echo "Options go into OPTIONS: make chaos OPTIONS='--rounds 4 --seed 11'"

run: .venv/complete
	@$(PYTHON) -m servers.run

test: .venv/complete
	.venv/bin/python -m pytest tests $(OPTIONS)

chaos: .venv/complete
	$(PYTHON) -m chaos $(OPTIONS)

failover: .venv/complete
	$(PYTHON) -m chaos.failover $(OPTIONS)

clock: .venv/complete
	$(PYTHON) -m bench.clock $(OPTIONS)

bench: .venv/complete
	$(PYTHON) -m bench $(OPTIONS)

common-passwords: .venv/complete
	$(PYTHON) tests/test_passwords.py > common-passwords.txt

# Made anew when the locks change. Debian ships venv without what it needs.
.venv/complete: requirements.lock tests/requirements.lock
	@python3 -c "import ensurepip" 2>/dev/null || $(MAKE) --no-print-directory venv
	python3 -m venv .venv
	.venv/bin/python -m pip install -qq --disable-pip-version-check \
		--require-hashes -r requirements.lock -r tests/requirements.lock
	@touch $@

venv:
	@test "$$(id -u)" = 0 && command -v apt-get >/dev/null || \
		{ echo "python3-venv is missing: sudo apt-get install python3-venv"; exit 1; }
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --no-install-recommends python3-venv >/dev/null

# After a change of a requirements.txt: every package, with its version and its hashes.
lock: export CUSTOM_COMPILE_COMMAND = make lock
lock: .venv/complete
	.venv/bin/python -m pip install -qq --disable-pip-version-check pip-tools
	.venv/bin/pip-compile $(LOCK) -o requirements.lock requirements.txt
	.venv/bin/pip-compile $(LOCK) -c requirements.lock -o tests/requirements.lock \
		tests/requirements.txt

LOCK = --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url \
	--no-emit-find-links

.PHONY: help run test chaos failover clock bench common-passwords venv lock
