"""Where a cluster's log files go: the folder that was asked for, or a temporary one."""

import shutil
import tempfile
from pathlib import Path
from typing import Self

from pdserve.domain.errors import LocalFault


class LogDir:
    """A folder of log files; a temporary one goes when the cluster ended well."""

    def __init__(self, path: Path, *, is_temporary: bool) -> None:
        self.path = path
        self._is_temporary = is_temporary

    @classmethod
    def open(cls, given: str) -> Self:
        """Make the folder `given`, or one of its own if empty; raises `LocalFault`.

        The folder must take a file at the start. A disk that fills later costs log lines only.
        """
        if not given:
            try:
                return cls(Path(tempfile.mkdtemp(prefix="pdserve-")), is_temporary=True)
            except OSError as error:
                raise LocalFault(
                    f"no temporary folder for log files: {error.strerror}; name one with --log-dir"
                ) from None
        path = Path(given).expanduser().resolve()
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise LocalFault(f"log_dir {path}: {error.strerror}") from None
        return cls(path, is_temporary=False)

    def remove(self) -> None:
        """Nothing where the user named the folder."""
        if self._is_temporary:
            shutil.rmtree(self.path, ignore_errors=True)
