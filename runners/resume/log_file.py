"""The run's log file, on a disk that may be full: a line that is not taken ends no run."""

import logging
import sys


class LogFile(logging.FileHandler):
    """A `FileHandler` that says once, on stderr, that it cannot write; later lines are tried again."""

    _refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._refused:
            self._refused = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({error.strerror}): lines are lost\n")
