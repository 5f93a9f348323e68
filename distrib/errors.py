"""The one way to tell a user that they must change something."""


class UserError(Exception):
    """A user's mistake, said in one line: what, the value, the choices or the fix. Exit code 2, never a traceback."""


class Refused(UserError):
    """A combination that would not be exact, or is not supported; raised before anything is built."""


class OutOfMemory(UserError):
    """What was asked for does not fit the device."""


class Interrupted(Exception):
    """Stopped early with a checkpoint; the same command goes on. Exit code 75."""


class NotWritten(Exception):
    """What a run writes does not reach the disk; checkpoints that were whole still are. Exit code 1, in one line."""


class NotReached(Exception):
    """Rank 0 does not answer where the launcher says that it is. Exit code 1, in one line."""


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; raised before the weights are touched."""


class WrongGradients(Exception):
    """A strategy's gradients are not what it promises; raised before the weights are touched."""


def choose(what: str, value: object, choices: object) -> UserError:
    """An error that names the value and the choices, with the nearest choice first in mind."""
    from difflib import get_close_matches

    names = [str(choice) for choice in choices]  # type: ignore[attr-defined]
    near = get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return UserError(f"{what}={shown}: choose {', '.join(names)}{hint}")
