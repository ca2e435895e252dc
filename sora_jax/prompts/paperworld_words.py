"""What people call the colours, shapes, verbs and places of Paperworld; computes nothing."""

from typing import Final

# The kind of a word or phrase, what it stands for, and the words, apart by commas.
_COLOURS: Final = {
    "red": "red, reddish, crimson, scarlet, ruby, vermilion, maroon",
    "orange": "orange, orangey, amber, tangerine, apricot, coral",
    "yellow": "yellow, yellowish, gold, golden, lemon, canary, mustard",
    "green": "green, greenish, emerald, lime, olive, mint, jade",
    "blue": "blue, bluish, azure, navy, cyan, turquoise, teal, cobalt, sapphire, sky blue",
    "purple": "purple, violet, lilac, lavender, mauve, indigo",
    "pink": "pink, pinkish, rose, rosy, magenta, fuchsia, salmon",
    "black": "black, blackish, ebony, charcoal, jet-black",
}
_SHAPES: Final = {
    "ball": "ball, balls, sphere, orb, circle, marble, balloon, football, soccer ball, snowball",
    "box": "box, boxes, gift box, cube, crate, parcel, package, present, gift, square",
    "star": "star",
    "heart": "heart, hearts",
    "boat": "boat, boats, sailboat, sailing boat, ship, yacht, vessel, dinghy, canoe",
    "bird": "bird, birds, sparrow, robin, pigeon, dove, gull, seagull, parrot, eagle, birdie",
    "fish": "fish, fishes, goldfish, trout, carp, shark",
    "tree": "tree, fir tree, fir, pine, pine tree, spruce, christmas tree, oak",
}
_SIZES: Final = {
    "small": "small, little, tiny, mini, miniature, wee, minuscule",
    "medium": "medium, medium-sized, mid-sized, normal-sized",
    "large": "big, large, huge, giant, gigantic, enormous, massive",
}
_POSES: Final = {"tilted": "tilted, slanted, at an angle"}
_VERBS: Final = {
    "rolls": "roll, rolls, rolling, rolled, tumble, tumbles, tumbling",
    "slides": "slide, slides, sliding, slid, glide, glides, gliding, skid, skids, skidding, "
    "skate, skates, skating",
    "flies": "fly, flies, flying, flew, soar, soars, soaring, hover, hovers, hovering, "
    "flutter, flutters, fluttering",
    "falls": "fall, falls, falling, fell, drop, drops, dropping, dropped, plunge, plunges",
    "bounces": "bounce, bounces, bouncing, bounced, hop, hops, hopping, jump, jumps, jumping, "
    "leap, leaps, leaping, bob, bobs, bobbing",
    "spins": "spin, spins, spinning, spun, rotate, rotates, rotating, twirl, twirls, twirling, "
    "whirl, whirls, whirling, turn, turns, turning, twist, twists, revolve, revolves",
    "stays": "stay, stays, staying, still, stand, stands, standing, stood, rest, rests, resting, "
    "sit, sits, sitting, motionless, unmoving, static, stationary, wait, waits, waiting, "
    "does not move, doesn't move, do not move, not moving, stays where it is",
    "hides": "hide, hides, hiding, hid, hidden, disappear, disappears, disappearing, vanish, "
    "vanishes, vanishing, hide and seek, behind",
    "collides": "collide, collides, colliding, hit, hits, hitting, bump, bumps, bumping, crash, "
    "crashes, crashing, strike, strikes, striking, knock, knocks, runs into, running into, "
    "rams, slams",
    # Any that has a direction; the shape says which.
    "moves": "move, moves, moving, moved, go, goes, going, went, travel, travels, travelling, "
    "traveling, come, comes, coming, head, heads, heading, drift, drifts, drifting, float, "
    "floats, floating, sail, sails, sailing, swim, swims, swimming, run, runs, running, walk, "
    "walks, walking, drive, drives, driving, crosses, crossing, rush, rushes, rushing",
}
_PLACES: Final = {
    "night": "night, nighttime, midnight, moon, moonlight, moonlit, starry, stars, starlight, "
    "evening, night sky, in the dark, after dark",
    "meadow": "meadow, meadows, grass, lawn, field, fields, pasture, grassland, countryside, "
    "garden, park",
    "snow": "snow, snowy, winter, snowfield, ice, icy, winter snow, arctic",
    "sea": "sea, seaside, ocean, beach, shore, coast, seashore, water, waves, lake, "
    "harbour, harbor",
    "desert": "desert, sand, sandy, dunes, dune, sahara, sandy desert",
    "forest": "forest, forests, woods, woodland, jungle, trees, pine forest, pinewood",
    "city": "city, cities, city square, town, street, streets, downtown, urban, skyline, "
    "buildings, city street",
}
_DIRECTIONS: Final = {
    "left": "left, leftwards, leftward, from the right, from right",
    "right": "right, rightwards, rightward, from the left, from left",
}
_OCCLUDERS: Final = {
    "wall": "wall, walls, fence, bricks",
    "rock": "rock, rocks, stone, boulder, stones",
}
_NOTHING: Final = {  # would be read as something else
    "": "comes back, comes out, coming out, up and down, of cut paper, to the ground, "
    "on the ground",
}
_KINDS: Final = {
    "colour": _COLOURS,
    "shape": _SHAPES,
    "size": _SIZES,
    "pose": _POSES,
    "verb": _VERBS,
    "place": _PLACES,
    "direction": _DIRECTIONS,
    "occluder": _OCCLUDERS,
    "nothing": _NOTHING,
}
# Words and phrases, in lower case, to (kind, what they stand for).
MEANINGS: Final[dict[str, tuple[str, str]]] = {
    word.strip().replace("-", " "): (kind, value)
    for kind, table in _KINDS.items()
    for value, words in table.items()
    for word in words.split(",")
}
LONGEST: Final = max(len(phrase.split()) for phrase in MEANINGS)  # words in a phrase

# Many of them stand in a place, unless nothing else is said to be there.
PLURALS: Final = {"stars": "star", "trees": "tree"}

# Slips of the pen are read as one of these: the words of captions, and their forms.
SPELT: Final = (
    *("red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "black"),
    *("ball", "box", "star", "heart", "boat", "sailboat", "bird", "fish", "tree"),
    *("small", "little", "tiny", "large", "huge", "left", "right", "wall", "rock"),
    *("roll", "rolls", "rolling", "slide", "slides", "sliding", "flies", "flying", "falls"),
    *("falling", "bounce", "bounces", "bouncing", "spins", "spinning", "stays", "stands"),
    *("standing", "still", "hides", "hiding", "behind", "disappears", "moves", "moving"),
    *("collide", "collides", "bumps", "night", "moon", "meadow", "snow", "winter", "beach"),
    *("desert", "forest", "city", "street"),
)
# English words that are one slip from these and yet no slip.
NO_SLIPS: Final = frozenset(
    (
        *("back", "batch", "beech", "bench", "blank", "bleach", "bloat", "block", "boast"),
        *(
            "bounding",
            "breach",
            "denser",
            "fails",
            "failing",
            "false",
            "files",
            "filing",
            "filling",
        ),
        *("fills", "fires", "fixes", "flips", "forces", "forget", "fries", "frying", "greed"),
        *("greek", "greet", "hear", "heard", "hears", "hearth", "heat", "heath", "hertz", "hikes"),
        *("hires", "hives", "litter", "modes", "moles", "mono", "movie", "movies", "neigh", "read"),
        *(
            "roles",
            "says",
            "sending",
            "shading",
            "shall",
            "side",
            "sided",
            "sides",
            "signs",
            "silly",
        ),
        *("sinks", "skill", "slice", "slices", "slicing", "slider", "smell", "solid", "spanning"),
        *("spans", "spill", "spine", "spines", "staging", "stair", "stall", "stare", "stark"),
        *("start", "stash", "stating", "stats", "stilt", "strand", "stray", "striding", "three"),
        *("violent", "waiter", "winner", "wither", "writer"),
    )
)

# Of what is not said, what goes well together; pairs that training never shows are not here.
LIKELY_COLOURS: Final = {
    "ball": ("red", "blue", "yellow", "orange"),
    "box": ("red", "blue", "yellow", "green"),
    "star": ("yellow", "orange", "pink", "blue"),
    "heart": ("red", "pink", "purple"),
    "boat": ("red", "blue", "orange"),
    "bird": ("red", "yellow", "black", "green"),
    "fish": ("red", "blue", "yellow", "pink"),
    "tree": ("green", "orange", "yellow"),
}
LIKELY_VERBS: Final = {
    "ball": ("rolls", "bounces"),
    "box": ("slides", "falls"),
    "star": ("spins", "falls"),
    "heart": ("bounces", "spins"),
    "boat": ("slides",),
    "bird": ("flies", "bounces"),
    "fish": ("slides", "bounces"),
    "tree": ("stays", "falls"),
}
LIKELY_MOVES: Final = {
    "ball": "rolls",
    "bird": "flies",
    "star": "flies",
}  # with a direction; others slide
LIKELY_PLACES: Final = {
    "ball": ("meadow", "snow", "city"),
    "box": ("city", "meadow", "desert"),
    "star": ("night",),
    "heart": ("meadow", "night", "city"),
    "boat": ("sea",),
    "bird": ("meadow", "forest", "sea"),
    "fish": ("sea",),
    "tree": ("forest", "meadow", "snow"),
}
