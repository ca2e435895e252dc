"""Damaged videos neither stop nor hang a build, and each is kept or named with a reason."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "fuzz_data_build.py"


def test_sixty_damaged_videos_are_each_accounted_for():
    command = [sys.executable, str(TOOL), "--count", "60", "--seed", "7", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["files"] == 60 and 6 < result["left_out"] < 60
