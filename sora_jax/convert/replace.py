"""What an export does with a folder that holds something already.

A folder that holds an earlier export gets the new one in its place once all of it is written; what
no export wrote stays as it is, or is a reason to write nothing.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sora_jax.convert.folder import COMPONENTS
from sora_jax.convert.rewrite import (
    COMFYUI,
    Tensors,
    copy_companions,
    official_stem,
    write_diffusers,
)
from sora_jax.text.tokenizer import FILES as TOKENIZER_FILES

INDEX = "model_index.json"
# A row of the card that `export` writes: who fills it in has made the card their own.
UNFILLED = "| Licence | say yours here |"


def check(out: Path, parts: Mapping[str, Tensors], *, official: bool) -> None:
    """Raises ValueError where `parts` in `out` would mix with, or replace, what they are not."""
    where = out.resolve()
    for part in parts.values():
        for path in part.paths:
            if path.resolve().is_relative_to(where):
                raise ValueError(
                    f"out {out} holds {path}, which is read here and would be replaced; name "
                    "another folder."
                )
    if not (out / INDEX).is_file():
        return
    others = [
        f"{component.folder}/"
        for name, component in COMPONENTS.items()
        if (official or name not in parts) and (out / component.folder).is_dir()
    ]
    if others:
        raise ValueError(
            f"out {out} holds a pipeline with {', '.join(others)}, which this export does not "
            "write: two models would be mixed; name another folder, or remove it first."
        )


def write_changed(source: Path, out: Path, parts: Mapping[str, Tensors], *, dtype: str) -> None:
    """Writes `parts` as the folder `out`, with what lies beside the weights of `source`.

    Raises:
      ValueError: as `check`; nothing is written then.
    """
    check(out, parts, official=False)
    with staged(out) as made:
        write_diffusers(made, parts, dtype=dtype)
        copy_companions(source, made)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder whose files go into `out` once all are written; if not, `out` stays as it was."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        # In `out` itself: another folder could lie on another disk.
        with tempfile.TemporaryDirectory(dir=out, prefix=".export.") as temporary:
            yield Path(temporary)
            _move(Path(temporary), out)
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()


def _move(made: Path, out: Path) -> None:
    files = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    stale = _earlier(out, files) - files
    kept = [Path(name) for name in ("README.md", "sampling.json") if _is_kept(out, name)]
    for path in kept:
        if path in files and (out / path).read_bytes() != (made / path).read_bytes():
            print(f"{out / path}: kept as it was; the export's own is left out.", file=sys.stderr)
    # Gone first and written last: files of two exports must not load as a pipeline.
    (out / INDEX).unlink(missing_ok=True)
    for path in stale:
        (out / path).unlink()
    for path in sorted(files.difference(kept), key=lambda path: (path.name == INDEX, path)):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).replace(out / path)


def _earlier(out: Path, files: set[Path]) -> set[Path]:
    """The files in `out` that an export of the same parts wrote, under whatever names."""
    folders = {path.parent for path in files}
    patterns = []
    for component in COMPONENTS.values():
        weights = Path(component.folder) / f"{component.stem}.safetensors"
        if Path(component.folder) / "config.json" in files:
            shards = weights.with_name(f"{component.stem}-*-of-*.safetensors")
            patterns += [weights, shards, weights.with_name(f"{weights.name}.index.json")]
    if Path("tokenizer") in folders:
        patterns += [Path("tokenizer") / name for name in TOKENIZER_FILES]
    if Path(COMFYUI["dit"]) in folders:  # one transformer in place of two, or two of one
        patterns += [path for path in _official(out) if path.parent == Path(COMFYUI["dit"])]
    found = (path for pattern in patterns for path in out.glob(str(pattern)))
    return {path.relative_to(out) for path in found if path.is_file()}


def _official(out: Path) -> list[Path]:
    """Every name that a model has among the official files of an export."""
    return [
        Path(COMFYUI[name]) / f"{official_stem(out, name, experts=experts)}.safetensors"
        for experts in (False, True)
        for name in COMPONENTS
    ]


def _is_kept(out: Path, name: str) -> bool:
    """Whether a file that lies in `out` is none that an export wrote."""
    path = out / name
    if not path.is_file():
        return False
    if name == "README.md":
        return UNFILLED not in path.read_text(errors="replace")
    # Of an earlier export, these are the settings of the model that goes.
    return not any((out / file).is_file() for file in (INDEX, *_official(out)))
