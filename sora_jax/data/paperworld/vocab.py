"""The words of Paperworld, their colours in RGB, and the pairs that training never shows."""

from typing import Final

RGB = tuple[int, int, int]

# Saturated and far apart; every place below is muted, so a subject stands out anywhere.
COLOURS: Final[dict[str, RGB]] = {
    "red": (222, 40, 44),
    "orange": (248, 134, 22),
    "yellow": (255, 216, 32),
    "green": (30, 158, 66),
    "blue": (34, 88, 218),
    "purple": (130, 54, 186),
    "pink": (246, 112, 182),
    "black": (34, 32, 38),
}
PAPER: Final[RGB] = (252, 247, 236)  # the rim and the details of every cut-out

SHAPES: Final[tuple[str, ...]] = (
    "ball",
    "box",
    "star",
    "heart",
    "boat",
    "bird",
    "fish",
    "tree",
)
# Largest extent of the silhouette, in units of the shorter side of the frame.
SIZES: Final[dict[str, float]] = {"small": 0.25, "medium": 0.34, "large": 0.44}

# How a sentence names each place.
PLACES: Final[dict[str, str]] = {
    "night": "at night",
    "meadow": "in the meadow",
    "snow": "in the snow",
    "sea": "by the sea",
    "desert": "in the desert",
    "forest": "in the forest",
    "city": "in the city",
}

DIRECTIONS: Final[tuple[str, ...]] = ("left", "right")  # as the viewer sees them
SOLO_VERBS: Final[tuple[str, ...]] = (
    "rolls",
    "slides",
    "flies",
    "falls",
    "bounces",
    "spins",
    "stays",
    "hides",
)
VERBS: Final[tuple[str, ...]] = (*SOLO_VERBS, "collides")
DIRECTED_VERBS: Final[frozenset[str]] = frozenset({"rolls", "slides", "flies", "collides"})
OCCLUDERS: Final[tuple[str, ...]] = ("wall", "rock")
CAMERAS: Final[tuple[str, ...]] = ("still", "pan left", "pan right", "zoom in", "zoom out")

# Each colour, shape and verb loses exactly one partner, so each keeps seven of eight in training.
HELD_OUT_COLOUR_SHAPE: Final[tuple[tuple[str, str], ...]] = (
    ("red", "star"),
    ("orange", "fish"),
    ("yellow", "boat"),
    ("green", "heart"),
    ("blue", "bird"),
    ("purple", "box"),
    ("pink", "tree"),
    ("black", "ball"),
)
HELD_OUT_SHAPE_VERB: Final[tuple[tuple[str, str], ...]] = (
    ("ball", "flies"),
    ("box", "rolls"),
    ("star", "slides"),
    ("heart", "stays"),
    ("boat", "bounces"),
    ("bird", "falls"),
    ("fish", "spins"),
    ("tree", "hides"),
)


def is_held_out(colour: str, shape: str, *, verb: str) -> bool:
    """Whether training must not show this combination."""
    return (colour, shape) in HELD_OUT_COLOUR_SHAPE or (shape, verb) in HELD_OUT_SHAPE_VERB
