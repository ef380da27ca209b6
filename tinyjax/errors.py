"""The one exception that means "your input, not our bug": shown as a single line, exit code 2."""


class UserError(Exception):
    """Bad input. The message is one line that names the file, field or row and the way out."""


class ConfigError(UserError):
    """A config field holds a bad value; `path` is its dotted path, `reason` says what would be right."""

    def __init__(self, path: str, reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


def nearest(name: str, known, what: str = "") -> str:
    """Return ", did you mean ...?" for the closest of `known`, or a list of all of them when none is close."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known{' ' + what if what else ''}: {', '.join(known)}" if known else ""
