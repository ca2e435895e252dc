"""Runs the commands of docs/tasks.md and makes its pictures, at twice their size.

python tools/make_gallery.py [--checkpoint DIR] [--only NAME ...]

Commands run in order in a folder of their own, so that one may take what another wrote; the YAML
block is film.yaml. Pictures are docs/tasks/NAME.webp, by the name of the --out file.
"""

import argparse
import contextlib
import os
import re
import shlex
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tasks.md"
SCALE = 2


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every block of a page."""
    parts = re.split(r"^```(.*)\n", text, flags=re.M)
    return list(zip(parts[1::4], parts[2::4], strict=True))


def commands(text: str) -> list[list[str]]:
    """Arguments of every `sora-jax` line in a block without a language."""
    lines = "\n".join(content for language, content in blocks(text) if not language).split("\n")
    return [shlex.split(line)[1:] for line in lines if line.startswith("sora-jax ")]


def main() -> None:
    from sora_jax import cli, video_io

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld")
    parser.add_argument("--only", nargs="*", help="names of --out files to make pictures of")
    args = parser.parse_args()
    text = PAGE.read_text()
    checkpoint = args.checkpoint
    if Path(checkpoint).exists():
        checkpoint = str(Path(checkpoint).resolve())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("film.yaml").write_text(dict(blocks(text))["yaml"])
        for command in commands(text):
            begun = time.perf_counter()
            if status := cli.main([*command, "--checkpoint", checkpoint]):
                raise SystemExit(f"{shlex.join(command)}: exit status {status}")
            if "--out" not in command:
                continue
            made = Path(command[command.index("--out") + 1])
            if args.only and made.stem not in {Path(name).stem for name in args.only}:
                continue
            clip = video_io.read_video(made)
            scale = SCALE if clip.frames.shape[2] < 128 else 1
            target = ROOT / "docs" / "tasks" / f"{made.stem}.webp"
            target.parent.mkdir(exist_ok=True)
            video_io.write_video(target, video_io.enlarge(clip.frames, scale), fps=clip.fps or 1)
            size = os.path.getsize(target) / 1024
            print(f"{target.name}: {size:.0f} KiB, {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
