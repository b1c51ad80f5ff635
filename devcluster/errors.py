"""The one error that a user of devcluster sees; the command line prints it without a traceback."""


class DevclusterError(Exception):
    """Something that the user can mend: the message says what and how."""
