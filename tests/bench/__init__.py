"""How fast the program is, and whether its speed tells a stranger anything.

    make bench      __main__.py, a quarter of an hour: each figure, divided by a limit
    make clock      clock.py, five minutes: does the time of an answer tell who is
                    registered

Options follow: make bench OPTIONS="--only mails"; --help lists them. Read __main__.py,
then outside.py, the callers and their mail server, as a process of its own, limit.py,
what the figures are divided by, and draw.py, the picture in docs/.
"""
