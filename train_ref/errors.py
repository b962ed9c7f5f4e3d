"""Mistakes of the user, told apart from mistakes of the program."""


class UsageError(Exception):
    """What was asked for cannot be done, and the message says why: the command line shows it alone."""
