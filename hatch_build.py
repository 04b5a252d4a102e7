"""The build hook: puts the native kernels into a wheel, or beside the sources of an editable install.

Where they cannot be compiled, the package is built without them, and says why when it is asked (`ernie45 doctor`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.wheel import WheelBuilder, WheelBuilderConfig

REASON_NAME = "not-built.txt"
MOST_REASON_LINES = 10


class NativeKernels(BuildHookInterface[WheelBuilderConfig]):
    """Runs csrc/build.py. A wheel with a library is for one platform, but for every Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is packed; `version` is "standard" or "editable"."""
        if version == "editable":
            self._compile(Path(self.root, "src", "ernie45", "kernels"))
            return
        self._scratch = tempfile.TemporaryDirectory()
        is_built = self._compile(Path(self._scratch.name))
        for path in Path(self._scratch.name).iterdir():
            build_data["force_include"][str(path)] = f"ernie45/kernels/{path.name}"
        if is_built:
            builder = self.build_config.builder
            assert isinstance(builder, WheelBuilder)
            platform = builder.get_best_matching_tag().rpartition("-")[2]
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is there."""
        if version != "editable":
            self._scratch.cleanup()

    def _compile(self, folder: Path) -> bool:
        """Put the library into `folder`, or the reason why there is none, and say whether it is there."""
        command = [sys.executable, str(Path(self.root, "csrc", "build.py")), "--out", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode == 0:
            return True
        for outdated in folder.glob("libernie45.*"):
            outdated.unlink()
        reason = "\n".join(result.stderr.splitlines()[:MOST_REASON_LINES])
        (folder / REASON_NAME).write_text(reason, encoding="utf-8")
        self.app.display_warning(f"ernie45 is built without its native kernels: {reason}")
        return False
