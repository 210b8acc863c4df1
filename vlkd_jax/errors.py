"""The exceptions that mean "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave (file, field, flag): one line naming it and the mend.

    Entry points print `error: <message>` and exit with status 2; everything else keeps its traceback. What a library
    says over several lines, and is told within the message, is joined.
    """

    def __init__(self, message: str = ""):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class RecordError(UserError):
    """One record that cannot be used. Training passes it over and counts it under `reason`, a few words."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return RecordError, (self.reason, str(self))  # from a worker process


def few(phrases: list[str], separator: str = ", ") -> str:
    """At most five of what is to be said, and how many more there are."""
    return separator.join(phrases[:5]) + (f" and {len(phrases) - 5:,} more" if len(phrases) > 5 else "")
