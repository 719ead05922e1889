"""Errors that end a training. The command line handles them without importing what raises them."""


class LeakError(RuntimeError):
    """A prediction of the model changes with later tokens."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient was NaN or infinite; no update was made."""


class StoppedError(RuntimeError):
    """A signal arrived: the run saved a checkpoint and stopped.

    Args:
        number: the signal.
        resume: the command that resumes the run.
    """

    def __init__(self, number: int, resume: str):
        super().__init__(f"stopped by signal {number} after saving a checkpoint. Resume with: {resume}")
        self.number, self.exit_code = number, 128 + number
