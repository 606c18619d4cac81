"""The one exception that the commands print as a line instead of a traceback."""


class StiefelError(Exception):
    """Something a user can put right: the message names the culprit and the remedy, in one line."""
