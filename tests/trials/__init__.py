"""Trials of the whole system: how fast it is, and what it keeps while things break.

    make bench    bench.py, ten minutes: how fast; bench.lua has its callers
    make clock    clock.py, three minutes: does the time of an answer tell anything?
    make chaos    chaos.py, ten minutes: servers and processes killed, paused, cut

Options follow: make chaos OPTIONS="--rounds 4 --seed 11"; OPTIONS=--short takes a
minute or two, as CI does. chaos.py has its callers from load.py; account.py compares
every answer with what was kept. Read these two first.
"""
