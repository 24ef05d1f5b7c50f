"""Tries both modes of Compose with a real Docker: `make compose`, a few minutes.

modes.py has the tests. They are apart from the others, which need no Docker.
"""
