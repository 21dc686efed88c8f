"""The error of one row."""

from megatron_moellava.config import DataError


class BadSample(DataError):
    """One unusable sample. `reason` is the counter it goes to."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # crosses process boundaries with its reason
        return type(self), (self.reason, str(self))
