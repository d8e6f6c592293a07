"""Every error a user can cause. The class says who must act; the message says what was given, what is
allowed and what to do.

    MorewardError                exit code 2
    ├── ConfigError              the configuration or the command line
    ├── DataError                the data: unreadable, or too much of it bad (exit code 3)
    ├── BackboneError            a pretrained model directory
    ├── RunError                 a run folder: missing, damaged, of another configuration
    ├── NonFiniteError           training met NaN or Inf and stopped before the step
    ├── AbstainedError           no reward was given where one is needed; only where abstaining was asked for
    ├── JudgeError               the judge of labels cannot be asked; what it said is kept
    ├── ServerError              a reward server cannot be reached, is too busy or fails; what is asked may be right
    ├── SpaceError               the disk is full (exit code 4)
    └── MissingExtraError        an optional dependency is not installed
"""


class MorewardError(Exception):
    """Printed as one message without a traceback. Anything else that escapes is our own bug."""

    exit_code = 2


class ConfigError(MorewardError):
    """All faults of a configuration at once, one a line."""

    def __init__(self, faults: str | list[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class DataError(MorewardError):
    exit_code = 3


class BackboneError(MorewardError):
    pass


class RunError(MorewardError):
    pass


class NonFiniteError(MorewardError):
    pass


class AbstainedError(MorewardError):
    pass


class JudgeError(MorewardError):
    pass


class ServerError(MorewardError):
    pass


class SpaceError(MorewardError):
    exit_code = 4


class MissingExtraError(MorewardError):
    """An optional dependency is needed; the message holds the exact `pip install`."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs an extra: pip install "moreward[{extra}]"')
