"""The whole system under load while something in it is killed, paused, cut or full.

    make chaos      __main__.py, ten minutes: servers and processes killed, paused, ...
    make chaos OPTIONS="--network --rounds 1"   network.py, half an hour: packets lost;
                                                as root
    make chaos OPTIONS=--disks      disks.py, four minutes: disks full; as root
    make soak       soak.py, an hour: a fault every three minutes; what grows?
    make failover   failover.py, four minutes: a cluster of brokers, a standby database

Options follow: make chaos OPTIONS="--rounds 4 --seed 11". Read __main__.py, then
load.py, the callers, and account.py, which compares every answer with what was kept.
"""
