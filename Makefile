# For a machine without Docker. tests/servers/ starts the servers privately.

# env, since make would start a shell for a bare assignment, and that keeps signals back.
PYTHON = env PYTHONPATH=tests .venv/bin/python

help:
	@echo "make run        everything on this machine until Ctrl-C, data in .local/"
	@echo "make test       all tests, with servers of their own; OPTIONS='-k test_mails'"
	@echo "make quick      the flow, registering, activating, limits"
	@echo "make compose    both modes of Docker Compose, three minutes"
	@echo "make bench      how fast it is, ten minutes; nothing else should run"
	@echo "make chaos      ten minutes of load while servers and processes are killed"
	@echo "make clock      whether the time of an answer tells who is registered"
	@echo "make lint       ruff's default rules, and the order of imports"
	@echo "make lock       write the locks after a change of a requirements.txt"
	@echo "make upgrade    the same, with the newest versions that they allow"
	@echo "make common-passwords   write the block list anew, from Django's"
	@echo "OPTIONS go to each of the programs: make chaos OPTIONS='--rounds 4 --seed 11'"

run: .venv/complete
	@$(PYTHON) -m servers.run

# Four processes, each with servers of its own: most tests wait most of the time.
PYTEST = .venv/bin/python -m pytest -n 4 --dist worksteal

test: .venv/complete
	$(PYTEST) tests $(OPTIONS)

# Two processes, since starting servers takes most of the time, and no other plugin.
quick: .venv/complete
	env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PYTEST) -p xdist -n 2 tests/test_flow.py \
		tests/test_register.py tests/test_activate.py tests/test_limits.py $(OPTIONS)

compose: .venv/complete
	$(PYTHON) -m pytest tests/compose/modes.py $(OPTIONS)

bench chaos clock: .venv/complete
	$(PYTHON) -m trials $@ $(OPTIONS)

# No formatter: the margins of the two program files are aligned by hand. No type checker:
# what could be wrong here is SQL, JSON and AMQP, of which it sees nothing.
lint: .venv/complete
	.venv/bin/ruff check --extend-select I --ignore BLE001   # consumer.py says why it catches all

common-passwords: .venv/complete
	.venv/bin/python -m pip install -qq --disable-pip-version-check django==5.2.19
	.venv/bin/python tests/common_passwords.py > common-passwords.txt

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

# Every package, with its version and its hashes, for Python 3.11 and later.
lock upgrade: .venv/complete
	.venv/bin/python -m pip install -qq --disable-pip-version-check uv
	$(LOCK) -o requirements.lock requirements.txt
	$(LOCK) -c requirements.lock -o tests/requirements.lock tests/requirements.txt

LOCK = .venv/bin/uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --custom-compile-command "make lock" $(NEWEST)
upgrade: NEWEST = --upgrade

.PHONY: help run test quick compose bench chaos clock lint \
	common-passwords venv lock upgrade
