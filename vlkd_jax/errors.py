"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave (file, field, flag): one line naming it and the mend.

    Entry points print `error: <message>` and exit with status 2; everything else keeps its traceback.
    """
