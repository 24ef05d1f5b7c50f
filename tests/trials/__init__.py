"""Trials of the whole system: how fast it is, and what it keeps while things break.

    make bench       bench.py, ten minutes: how fast
    make clock       clock.py, two minutes: does the time of an answer tell anything?
    make chaos       chaos.py, ten minutes: servers and processes killed, paused, cut
    make failover    failover.py, four minutes: a cluster of brokers, a standby database

Options follow: make chaos OPTIONS="--rounds 4 --seed 11"; OPTIONS=--short takes a minute
or two, as CI does. The last two share load.py, the callers, and account.py, which
compares every answer with what was kept. Read these two first.
"""
