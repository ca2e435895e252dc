"""Official (ComfyUI) files, which lie loose: no folder for each model, and no index of them.

What a file is follows from its tensors. The two experts of Wan 2.2 A14B hold the same ones, and
nothing but a name tells them apart: that for little noise has "low noise" in that of its file, or
of the folder in which it lies.
"""

import re
from pathlib import Path

from sora_jax.convert.recognize import Naming, recognize
from sora_jax.convert.weights import INDEX, PICKLES, Weights, open_weights
from sora_jax.text.tokenizer import UNIGRAM_FILES

LOW_NOISE = re.compile(r"low[ _-]?noise|(?<![a-z])low(?![a-z])", re.IGNORECASE)
Model = tuple[Naming, Weights]


def models(path: Path) -> list[Model]:
    """The models in a single file, or in the files of a folder and of the folders in it.

    Raises:
      ValueError: there is none, or one that is damaged or nothing known.
    """
    if not path.is_dir():
        return [recognize(open_weights(path))]
    indexes = [*path.glob(f"*{INDEX}"), *path.glob(f"*/*{INDEX}")]
    covered = {file for index in indexes for file in open_weights(index).paths}
    alone = [file for file in files(path) if file not in covered]
    if not indexes and not alone:
        if found := pickles(path):
            open_weights(found[0])  # says why not
        if (path / "checkpoints").is_dir():
            raise ValueError(
                f"{path}: a training run, whose weights are exported first: sora-jax convert "
                f"export --checkpoint {path} --out DIR."
            )
        raise ValueError(f"{path}: holds no .safetensors file; give a folder of weights.")
    return [recognize(open_weights(file)) for file in sorted([*indexes, *alone])]


def files(path: Path) -> list[Path]:
    """The safetensors files in a folder and in the folders in it."""
    return [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]


def pickles(path: Path) -> list[Path]:
    """Files that would be read, were they no pickles."""
    return sorted(p for p in path.rglob("*") if p.suffix in PICKLES)


def components(path: Path) -> dict[str, list[Model]]:
    """`models` by the component that each can be, "dit_2" being the expert for little noise.

    A well-made folder has one of each; it is for the caller to say which one it lacks.
    """
    found: dict[str, list[Model]] = {}
    for model in models(path):
        found.setdefault(model[0].component, []).append(model)
    transformers = found.get("dit", [])
    low = [model for model in transformers if LOW_NOISE.search(_name(model[1], path))]
    if len(transformers) == 2 and len(low) == 1:
        found["dit"] = [model for model in transformers if model is not low[0]]
        found["dit_2"] = low
    return found


def _name(weights: Weights, path: Path) -> str:
    source = Path(weights.source)
    return str(source.relative_to(path)) if source.is_relative_to(path) else source.name


def tokenizer_file(path: Path) -> Path | None:
    """A Unigram tokenizer's file, at most three folders down: official ones have it two down."""
    places = (f"{'*/' * depth}{name}" for depth in range(4) for name in UNIGRAM_FILES)
    return next((file for place in places for file in sorted(path.glob(place))), None)
