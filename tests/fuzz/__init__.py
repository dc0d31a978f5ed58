"""Mutated inputs of every kind that a user can bring: each ends in an error that is explained, at once and in little
memory, or in a result.

    python -m tests.fuzz                              # 200 of each surface, and a table
    python -m tests.fuzz --count 2000                 # minutes
    python -m tests.fuzz --surface recipe --number 17 # one again, in this process, with its traceback

A surface is a file in surfaces/: how the sound input is made, and how it is mutated and used. Cases are numbered, and a
number always gives the same case.
"""
