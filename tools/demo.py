"""A few sentences become videos with the shipped weights: what `make demo` runs.

python tools/demo.py --out demo
"""

import argparse
import sys
import tempfile
from pathlib import Path

from sora_jax import cli

PROMPTS = (
    "a red ball rolls left in the meadow",
    "a yellow fish bounces by the sea",
    "a green star spins at night",
    "a large purple boat slides right in the snow",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder for the videos")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        prompts = Path(directory) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        target = out / "paperworld.mp4"
        return cli.main(["sample", "--prompts-file", str(prompts), "--out", str(target), "--sheet"])


if __name__ == "__main__":
    sys.exit(main())
