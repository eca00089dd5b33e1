"""What our processes do when they start."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOWERED = """
import resource
from llmstream.processes import open_more_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
open_more_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit may have no number")
def test_a_server_may_open_as_many_files_as_the_system_allows() -> None:
    """The limit that a shell starts programs with is not what ends the ten-thousandth stream."""
    done = subprocess.run([sys.executable, "-c", LOWERED], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "True"
