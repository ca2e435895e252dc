"""The world is a pure function of (seed, index), keeps its held-out pairs, and moves as it says."""

import collections
import dataclasses
import json
import pickle

import numpy as np
import pytest

from sora_jax.data.paperworld import captions, vocab
from sora_jax.data.paperworld.captions import MAX_BYTES, caption, describe
from sora_jax.data.paperworld.physics import DRAG, GRAVITY, trajectories
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.scene import GROUND, sample_scene
from sora_jax.data.paperworld.settings import PaperworldSettings
from sora_jax.data.paperworld.shapes import silhouette
from sora_jax.data.paperworld.source import PaperworldSource, heldout_prompts, seen_prompts
from sora_jax.prompts import timed

SINGLE = PaperworldSettings(multi_shot=0, collisions=0, companions=0, moving_camera=0)


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(7, i) for i in range(5000)]


def actors(scenes):
    return [actor for scene in scenes for shot in scene.shots for actor in shot.actors]


def of_verb(verb, count=6, **changes):
    settings = dataclasses.replace(SINGLE, **changes)
    found = (sample_scene(3, i, settings=settings) for i in range(2000))
    found = [s for s in found if s.subject.verb == verb][:count]
    assert len(found) == count
    return found


def test_origin_tells_what_clips_depend_on():
    origin = PaperworldSource(3, SINGLE, "seen").origin
    assert json.loads(json.dumps(origin)) == origin
    assert (origin["kind"], origin["seed"], origin["split"]) == ("paperworld", 3, "seen")
    small = PaperworldSource(3, dataclasses.replace(SINGLE, small=0.5), "seen").origin
    assert {name for name in origin if origin[name] != small[name]} == {"small"}


def test_same_seed_and_index_give_identical_bytes():
    for i in range(5):
        first, second = PaperworldSource(seed=1)[i], PaperworldSource(seed=1)[i]
        assert first["caption"] == second["caption"]
        assert first["video"].tobytes() == second["video"].tobytes()
    other = PaperworldSource(seed=2)[0]
    assert other["video"].tobytes() != PaperworldSource(seed=1)[0]["video"].tobytes()


def test_splits_and_indices_draw_different_scenes():
    drawn = [sample_scene(1, i, split=s) for s in ("train", "heldout", "seen") for i in range(50)]
    assert len(set(drawn)) == 150
    assert len({scene.shots[0].layout for scene in drawn}) == 150


def test_training_never_shows_a_held_out_pair(scenes):
    for actor in actors(scenes):
        assert not vocab.is_held_out(actor.colour, actor.shape, verb=actor.verb), actor


def test_every_heldout_scene_has_a_held_out_pair_and_no_seen_scene_has():
    for i in range(256):
        held, seen = (sample_scene(0, i, split=s).subject for s in ("heldout", "seen"))
        assert vocab.is_held_out(held.colour, held.shape, verb=held.verb)
        assert not vocab.is_held_out(seen.colour, seen.shape, verb=seen.verb)


def test_each_word_keeps_seven_of_eight_partners_in_training():
    for position, words in enumerate((vocab.COLOURS, vocab.SHAPES)):
        held = [pair[position] for pair in vocab.HELD_OUT_COLOUR_SHAPE]
        assert sorted(held) == sorted(words)
    for position, words in enumerate((vocab.SHAPES, vocab.SOLO_VERBS)):
        held = [pair[position] for pair in vocab.HELD_OUT_SHAPE_VERB]
        assert sorted(held) == sorted(words)


def test_every_word_occurs_in_training(scenes):
    cast = actors(scenes)
    assert {a.colour for a in cast} == set(vocab.COLOURS)
    assert {a.shape for a in cast} == set(vocab.SHAPES)
    assert {a.size for a in cast} == set(vocab.SIZES)
    assert {a.verb for a in cast} == set(vocab.VERBS)
    shots = [shot for scene in scenes for shot in scene.shots]
    assert {s.place for s in shots} == set(vocab.PLACES)
    assert {s.camera.motion for s in shots} == set(vocab.CAMERAS)
    assert {s.occluder for s in shots} == {None, *vocab.OCCLUDERS}


def test_most_training_clips_are_one_object_before_a_still_camera(scenes):
    plain = [
        len(s.shots) == 1 and s.number == 1 and s.shots[0].camera.motion == "still" for s in scenes
    ]
    assert 0.7 < np.mean(plain) < 0.9


def test_evaluation_prompts_cover_attributes_evenly():
    for prompts in (heldout_prompts(256), seen_prompts(256)):
        for attribute, words in (
            ("colour", vocab.COLOURS),
            ("shape", vocab.SHAPES),
            ("verb", vocab.SOLO_VERBS),
        ):
            counts = collections.Counter(getattr(p.scene.subject, attribute) for p in prompts)
            assert set(counts) == set(words)
            assert min(counts.values()) > 0.6 * 256 / len(words), (attribute, counts)
        places = collections.Counter(p.scene.shots[0].place for p in prompts)
        assert set(places) == set(vocab.PLACES)
        assert min(places.values()) > 0.6 * 256 / len(vocab.PLACES), places
        sides = collections.Counter(p.scene.subject.direction for p in prompts)
        assert abs(sides["left"] - sides["right"]) < 0.2 * (sides["left"] + sides["right"])
        assert len({p.text for p in prompts}) > 200


def test_captions_name_colour_shape_verb_direction_and_place(scenes):

    for scene in scenes[:2000]:
        text = caption(scene)
        assert text.isascii() and len(text) <= MAX_BYTES
        for shot in scene.shots:
            for actor in shot.actors:
                assert any(w in text for w in captions.COLOUR_WORDS[actor.colour])
                assert actor.shape in text
            subject = shot.actors[0]
            stems = [w.split(" {")[0] for w in captions.VERB_WORDS[subject.verb]]
            noun = captions.NOUN_FORMS[subject.verb].split(" {")[0]
            assert any(w in text for w in (*stems, noun)), (text, subject.verb)
            assert subject.direction is None or subject.direction in text or "from the" in text
            places = (*captions.PLACE_WORDS[shot.place], shot.place)
            assert any(w in text for w in places), (text, shot.place)
            if shot.camera.motion != "still":
                assert captions.CAMERA_WORDS[shot.camera.motion] in text
        assert text.count("Cut to:") == len(scene.shots) - 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_captions_of_several_shots_say_when_each_is_seen(share):
    source = PaperworldSource(settings=PaperworldSettings(multi_shot=0.5, time_stamps=share))
    several = 0
    for index in range(60):
        scene, wordings = source.scene(index), source.captions(index)
        stamped = [words for words in wordings if timed.is_timed(words)]
        if len(scene.shots) == 1:
            assert not stamped
            continue
        several += 1
        assert len(stamped) == 8 * share
        for words in stamped:
            segments = timed.parse(words, duration=scene.frames / scene.fps)
            frames = [round((s.end - s.start) * scene.fps, 6) for s in segments]
            assert frames == [shot.frames for shot in scene.shots]
            for segment, shot in zip(segments, scene.shots, strict=True):
                assert any(place in segment.text for place in captions.PLACE_WORDS[shot.place])
                assert scene.subject.shape in segment.text and "Cut to" not in segment.text
    assert several > 20


def test_most_captions_are_short_and_plain(scenes):
    texts = [caption(s) for s in scenes[:2000]]
    assert np.mean([len(t) <= 120 for t in texts]) > 0.9
    plain = np.mean([t == describe(s) for t, s in zip(texts, scenes, strict=False)])
    assert 0.5 < plain < 0.8


def test_describe_is_the_plain_sentence():
    scene = of_verb("rolls")[0]
    actor = dataclasses.replace(
        scene.subject, colour="red", shape="ball", size="medium", direction="left"
    )
    shot = dataclasses.replace(scene.shots[0], place="meadow", actors=(actor,))
    scene = dataclasses.replace(scene, shots=(shot,))
    assert describe(scene) == "a red ball rolls left in the meadow"
    still = dataclasses.replace(scene, frames=1)
    assert describe(still) == "a red ball in the meadow"


@pytest.mark.parametrize("verb", ["rolls", "slides", "flies"])
def test_direction_in_world_matches_the_word(verb):
    for scene in of_verb(verb):
        ((path,),) = trajectories(scene)
        moved = path.position[-1, 0] - path.position[0, 0]
        assert np.sign(moved) == (1 if scene.subject.direction == "right" else -1)
        assert abs(moved) > 0.45


def test_direction_in_pixels_matches_the_word():
    for scene in of_verb("slides") + of_verb("flies"):
        video = render(scene).astype(np.int32)
        ink = np.abs(video - vocab.COLOURS[scene.subject.colour]).sum(-1) < 40
        columns = [np.nonzero(frame)[1].mean() for frame in ink[[2, -3]]]
        assert (columns[1] > columns[0]) == (scene.subject.direction == "right")


def test_rolling_turns_by_the_distance_over_the_radius():
    from sora_jax.data.paperworld.shapes import silhouette

    for scene in of_verb("rolls"):
        ((path,),) = trajectories(scene)
        radius = silhouette(scene.subject.shape).radius * scene.subject.scale
        moved = np.diff(path.position[:, 0]).sum()
        assert path.angle[-1] - path.angle[0] == pytest.approx(moved / radius, rel=0.02)


def test_falling_ends_on_the_ground_and_accelerates():
    for scene in of_verb("falls"):
        ((path,),) = trajectories(scene)
        steps = np.diff(path.position[:6, 1])
        assert (np.diff(steps) > 0).all()
        assert path.position[-1, 1] == pytest.approx(path.position[-2, 1], abs=2e-3)


def test_bouncing_meets_the_ground_at_least_twice():
    for scene in of_verb("bounces"):
        ((path,),) = trajectories(scene)
        speed = np.sign(np.diff(path.position[:, 1]))
        assert ((speed[:-1] > 0) & (speed[1:] < 0)).sum() >= 2


def test_spinning_turns_in_place_and_staying_does_not():
    for scene in of_verb("spins"):
        ((path,),) = trajectories(scene)
        assert np.ptp(path.position, axis=0).max() < 1e-6
        assert path.angle[-1] > 2 * np.pi
    for scene in of_verb("stays"):
        ((path,),) = trajectories(scene)
        assert np.ptp(path.position, axis=0).max() < 2e-3 and np.ptp(path.angle) < 1e-6


def test_a_hidden_object_vanishes_and_returns():
    for scene in of_verb("hides"):
        video = render(scene).astype(np.int32)
        ink = (np.abs(video - vocab.COLOURS[scene.subject.colour]).sum(-1) < 40).sum((1, 2))
        assert ink[0] > 30 and ink[-1] > 30
        assert ink[7:9].max() == 0


def test_collision_conserves_momentum_and_sets_the_other_in_motion():
    settings = PaperworldSettings(multi_shot=0, collisions=1, companions=0, moving_camera=0)
    for i in range(12):
        scene = sample_scene(5, i, settings=settings)
        first, second = trajectories(scene)[0]
        mass = [a.scale**2 for a in scene.shots[0].actors]
        speed = np.stack([np.diff(p.position[:, 0]) for p in (first, second)])
        hit = int(np.argmax(np.abs(speed[1]) > 0.25 * np.abs(speed[0]).max()))
        assert 2 <= hit <= 12
        before, after = mass @ speed[:, hit - 1], mass @ speed[:, hit + 1]
        # Friction with the ground is the only other force along the way: at most two frames of it.
        sign = 1 if scene.subject.direction == "right" else -1
        loss = 2 * sum(mass) * DRAG * GRAVITY / scene.fps**2
        assert -1e-6 < sign * (before - after) < loss
        assert abs(speed[1, hit + 1]) > abs(speed[0, hit + 1])


def test_multi_shot_keeps_the_subject_and_changes_place_and_verb():
    settings = PaperworldSettings(frames=33, multi_shot=1, collisions=0, companions=0)
    counts = set()
    for i in range(40):
        scene = sample_scene(0, i, settings=settings)
        subjects = [(s.actors[0].colour, s.actors[0].shape, s.actors[0].size) for s in scene.shots]
        assert len(set(subjects)) == 1
        assert len({s.place for s in scene.shots}) == len(scene.shots)
        assert len({s.actors[0].verb for s in scene.shots}) == len(scene.shots)
        assert sum(s.frames for s in scene.shots) == 33
        counts.add(len(scene.shots))
    assert counts == {2, 3}


@pytest.mark.parametrize(
    "size", [(64, 64), (96, 64), (64, 96), (32, 32), (128, 72), (128, 128)], ids=str
)
@pytest.mark.parametrize("frames", [1, 5, 9, 33])
def test_sizes_and_durations_render(size, frames):
    settings = PaperworldSettings(width=size[0], height=size[1], frames=frames)
    for i in range(4):
        record = PaperworldSource(0, settings)[i]
        assert record["video"].shape == (frames, size[1], size[0], 3)
        assert record["video"].dtype == np.uint8
        assert record["fps"] == 8.0
    if frames == 1:
        assert not any(
            sample_scene(0, i, settings=settings).subject.verb == "hides" for i in range(200)
        )


def test_a_near_clip_is_a_part_of_the_picture_at_twice_the_size_and_says_so():
    far = PaperworldSettings(frames=3, width=128, height=128)
    near = PaperworldSettings(frames=3, near=1.0)
    for i in range(6):
        scene = sample_scene(2, i, settings=near)
        x, y = (round(64 * part) for part in scene.near)
        whole = render(dataclasses.replace(scene, near=None, width=128, height=128))
        np.testing.assert_array_equal(render(scene), whole[:, y : y + 64, x : x + 64])
        assert caption(scene).startswith("close view: ") and len(caption(scene)) <= MAX_BYTES
        assert describe(scene) == "close view: " + describe(sample_scene(2, i, settings=far))


def test_shares_of_turning_falling_and_small_subjects_are_as_asked():
    several = {"multi_shot": 0.0, "collisions": 0.0, "companions": 0.0}
    settings = PaperworldSettings(turning=0.6, falling=0.5, small=0.7, **several)
    subjects = [sample_scene(2, i, settings=settings).subject for i in range(2000)]
    chance = (1 - settings.occlusion) * 2 / 7
    turning = np.mean([actor.verb in ("rolls", "spins") for actor in subjects])
    assert abs(turning - (0.6 + 0.4 * 0.5 * chance)) < 0.04
    falling = np.mean([actor.verb == "falls" for actor in subjects])
    assert abs(falling - (0.4 * 0.5 + 0.4 * 0.5 * chance / 2)) < 0.04
    assert abs(np.mean([actor.size == "small" for actor in subjects]) - (0.7 + 0.3 / 3)) < 0.04
    assert not any(vocab.is_held_out(a.colour, a.shape, verb=a.verb) for a in subjects)


def test_tilted_subjects_lean_where_they_stand_move_and_begin_to_turn():
    settings = dataclasses.replace(SINGLE, tilted=0.8)
    scenes = [sample_scene(7, i, settings=settings) for i in range(400)]
    tilted = [scene.subject.tilt != 0 for scene in scenes if scene.subject.verb != "hides"]
    assert abs(np.mean(tilted) - 0.8) < 0.06
    assert not any(s.subject.tilt for s in scenes if s.subject.verb == "hides")
    assert {s.subject.verb for s in scenes if s.subject.tilt} == {*vocab.SOLO_VERBS} - {"hides"}
    assert not any(
        vocab.is_held_out(s.subject.colour, s.subject.shape, verb=s.subject.verb) for s in scenes
    )
    for scene in scenes[:60]:
        actor, path = scene.subject, trajectories(scene)[0][0]
        assert (" tilted " in describe(scene)) == (actor.tilt != 0 and actor.turn == 0)
        assert (" turning " in describe(scene)) == (actor.turn != 0)
        assert path.angle[0] == pytest.approx(actor.tilt)
        turns = np.ptp(path.angle) > 0.5
        assert turns == (actor.verb in ("rolls", "spins") or actor.turn != 0)
        if actor.tilt and actor.verb in ("slides", "stays", "rolls"):
            # On the circle around it, which touches the ground at any angle.
            height = 1 - GROUND - path.position[:, 1]
            radius = silhouette(actor.shape).radius * actor.scale
            np.testing.assert_allclose(height, radius, rtol=0.02)
    tumbling = [
        s for s in scenes if s.subject.tilt and s.subject.verb in ("falls", "bounces", "flies")
    ]
    assert abs(np.mean([s.subject.turn != 0 for s in tumbling]) - 0.5) < 0.12
    assert not any(s.subject.turn for s in scenes if s not in tumbling)
    for scene in [s for s in tumbling if s.subject.turn][:8]:
        # At an even rate, through every impact.
        path, turn = trajectories(scene)[0][0], scene.subject.turn
        seconds = np.arange(scene.frames) / scene.fps * scene.shots[0].rate
        np.testing.assert_allclose(path.angle, scene.subject.tilt + turn * seconds, atol=0.01)
    drawn = next(s for s in scenes if s.subject.tilt and s.subject.verb == "stays")
    straight = dataclasses.replace(drawn.subject, tilt=0.0)
    shot = dataclasses.replace(drawn.shots[0], actors=(straight,))
    assert (render(drawn) != render(dataclasses.replace(drawn, shots=(shot,)))).any()


def test_scraps_are_cut_anew_for_every_clip_and_stay_themselves_within_it():
    settings = dataclasses.replace(SINGLE, scraps=0.5)
    scenes = [sample_scene(7, i, settings=settings) for i in range(400)]
    scraps = [scene for scene in scenes if scene.subject.shape not in vocab.SHAPES]
    assert abs(len(scraps) / len(scenes) - 0.5) < 0.08
    assert len({scene.subject.shape for scene in scraps}) == len(scraps)
    assert {scene.subject.verb for scene in scraps} == {*vocab.SOLO_VERBS}
    assert all((" scrap " in describe(s)) == (s in scraps) for s in scenes)
    # What is not a scrap is as without them, but for what is drawn after.
    plain = [sample_scene(7, i, settings=SINGLE).subject.verb for i in range(400)]
    assert [scene.subject.verb for scene in scenes] == plain
    assert silhouette("scrap 5") is silhouette("scrap 5")
    for number in range(200):
        cut = silhouette(f"scrap {number}")
        (outline,) = cut.outline
        assert np.ptp(outline, axis=0).max() == pytest.approx(1)
        assert len(outline) >= 5, "none has the four corners of a box"
    assert len({silhouette(f"scrap {n}").outline[0].tobytes() for n in range(200)}) == 200
    spun = next(s for s in scraps if s.subject.verb == "spins")
    path, video = trajectories(spun)[0][0], render(spun).astype(int)
    # The frame after one turn, or up to 14 degrees from it.
    turn = int(np.argmin(np.abs(path.angle - path.angle[0] - 2 * np.pi)))
    change = np.abs(video - video[0]).mean(axis=(1, 2, 3))
    assert change[turn] < 0.7 * change[turn // 2]


def test_source_survives_pickling_and_knows_its_length():
    source = PaperworldSource(4, SINGLE, "seen", length=10)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == 10 and repr(copy) == repr(source)
    np.testing.assert_array_equal(copy[3]["video"], source[3]["video"])
    with pytest.raises(IndexError):
        source[10]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PaperworldSettings(width=60), "multiple of 8 >= 32; use 64"),
        (lambda: PaperworldSettings(frames=0), "use 1 for an image"),
        (lambda: PaperworldSettings(multi_shot=1.5), r"not in \[0, 1\]"),
        (lambda: PaperworldSettings(multi_shot=0.9, collisions=0.9), "lower one"),
        (lambda: PaperworldSettings(fps=0.0), "fps 0.0 is not > 0"),
        (lambda: PaperworldSettings(width=512, height=64), "longer than 4:1"),
        (lambda: sample_scene(0, 0, split="test"), "use one of train, heldout, seen"),
        (lambda: sample_scene(-1, 0), "must both be >= 0"),
        (lambda: PaperworldSource(length=0), "length >= 1"),
    ],
)
def test_bad_settings_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
