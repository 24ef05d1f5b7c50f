# For a machine without Docker. tests/servers.py starts the servers privately.

help:
	@echo "make run     everything on this machine until Ctrl-C, data in .local/"
	@echo "make test    the tests, with servers of their own"

run: .venv/complete
	@.venv/bin/python tests/servers.py

test: .venv/complete
	.venv/bin/python -m pytest tests

# Made anew when the requirements change. Debian ships venv without what it needs.
.venv/complete: requirements.txt tests/requirements.txt
	@python3 -c "import ensurepip" 2>/dev/null || $(MAKE) --no-print-directory venv
	python3 -m venv .venv
	.venv/bin/python -m pip install -qq --disable-pip-version-check \
		-r requirements.txt -r tests/requirements.txt
	@touch $@

venv:
	@test "$$(id -u)" = 0 && command -v apt-get >/dev/null || \
		{ echo "python3-venv is missing: sudo apt-get install python3-venv"; exit 1; }
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --no-install-recommends python3-venv >/dev/null

.PHONY: help run test venv
