"""How a command ends: the exit statuses that stages, launchers and people agree on."""


class Stop(Exception):
    """Ends a command with one line on standard error and `status` as its exit status."""

    status = 1


class UserError(Stop):
    """Something the user can mend. The message says what is wrong and what to do, in one line."""

    status = 2


class NoProgress(Stop):
    """The stage gave up: running it again as it is would not get further. The message says why."""

    status = 70


class RunAgain(Stop):
    """The state is saved; the same command continues from it."""

    status = 75
