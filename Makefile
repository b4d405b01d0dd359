# Holdfast's two commands, on a fresh Linux machine with make and Python 3.11 or later:
#
#   make serve            set up .venv, then serve the bundled model on port 8000
#   make test             the same set-up, then the whole test suite
#
# ARGS passes options on:  make serve ARGS='--max-rows 128'   make test ARGS='tests/cli -k help'
# PYTHON picks the interpreter that makes .venv:  make serve PYTHON=python3.13
# Set-up runs again only when pyproject.toml, constraints.txt or the installer changes.

VENV   ?= .venv
PYTHON ?=
ARGS   ?=
PORT   ?= 8000
# Two test processes, whatever the machine: each one starts real servers with their own threads.
JOBS   ?= 2

STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup serve test soak lint clean

help:
	@echo 'make serve   set up, then serve the bundled model on port $(PORT)   (ARGS=... passes options)'
	@echo 'make test    set up, then run the test suite                     (ARGS=... passes options)'
	@echo 'make soak    set up, then saturate a server; nothing may restart (ARGS=--minutes 45 for longer)'
	@echo 'make lint    set up, then check style'
	@echo 'make clean   remove $(VENV)'

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/install.sh
	@PYTHON='$(PYTHON)' bash tools/install.sh '$(VENV)'
	@touch $@

serve: $(STAMP)
	@$(VENV)/bin/holdfast serve --port $(PORT) $(ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -q -m 'not gpu' -n $(JOBS) --dist loadfile $(ARGS)

soak: $(STAMP)
	$(VENV)/bin/python tools/soak.py --minutes 5 $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf '$(VENV)' .resolve.json
