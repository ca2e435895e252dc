"""What is read of motion is so of true renderings, and what is planted in them is found."""

import dataclasses
import itertools

import numpy as np
import pytest

from sora_jax.data.paperworld import physics, places
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.settings import DEFAULT_SETTINGS
from sora_jax.evaluate import motion
from sora_jax.evaluate.motion import MOST, Path
from sora_jax.evaluate.task_cases import scenes

DRAG = physics.DRAG * physics.GRAVITY / 64  # of frames an eighth of a second apart


def scene_of(verb, *, split="seen", **shares):
    """The first scene of a verb; in one place, as the inks of each take a while to tell apart."""

    def keep(scene):
        return scene.subject.verb == verb and scene.shots[0].place == "meadow"

    return next(scenes(split, keep=keep, **shares)(DEFAULT_SETTINGS, 0))


@pytest.fixture(scope="module")
def slide():
    return render(scene_of("slides"))


@pytest.fixture(scope="module")
def collision():
    scene = scene_of("collides", split="train", multi_shot=0.0, collisions=1.0, companions=0.0)
    return scene.shots[0].actors, render(scene)


def path_of(*, x=None, y=None):
    """A path with one coordinate as given and the other at rest."""
    given = np.asarray(x if y is None else y, float)
    rest = np.full(len(given), 0.5)
    return Path(np.stack([given, rest] if y is None else [rest, given], axis=1), rest)


def test_subject_path_is_that_of_the_simulation(slide):
    scene = scene_of("slides")
    true = physics.trajectories(scene)[0][0].position
    way = motion.subject_path(slide).centre - true
    # Ink lies beside the middle of an outline, everywhere by as much.
    assert np.abs(way - way.mean(axis=0)).max() < 0.01


def test_subject_path_goes_on_where_the_colour_changes(slide):
    scene = scene_of("slides")
    actor = dataclasses.replace(scene.subject, colour="purple")
    shot = dataclasses.replace(scene.shots[0], actors=(actor,))
    other = render(dataclasses.replace(scene, shots=(shot,)))
    mixed = motion.subject_path(np.concatenate([slide[:9], other[9:]]))
    assert scene.subject.colour != "purple"
    np.testing.assert_allclose(mixed.centre, motion.subject_path(slide).centre, atol=0.02)


def test_a_clip_without_a_subject_has_no_path():
    meadow = places.background("meadow", 0.0, width=64, height=64)
    path = motion.subject_path(np.stack([meadow] * 17))
    assert np.isnan(path.centre).all() and not path.area.any()
    assert motion.velocity_jump(path, 8) == motion.way(path) == MOST
    assert motion.parabola_fit(path) == 0 and motion.hidden(path) is None


def test_seams_are_where_given_frames_begin_and_end():
    known = np.zeros((17, 2, 2), bool)
    known[:5] = known[13:] = True
    assert motion.seams(known) == [5, 13]
    known[:] = True
    known[:, 0, 0] = False  # a hole in every frame is none
    assert motion.seams(known) == []


def test_a_steady_clip_has_no_seam_and_a_jump_or_a_tint_is_one(slide):
    assert motion.seam_ratio(slide, [9]) < 1.1
    jumped = np.concatenate([slide[:9], slide[11:], slide[-2:]])
    assert motion.seam_ratio(jumped, [9]) > 1.5
    tinted = slide.copy()
    tinted[9:] //= 2
    assert motion.seam_ratio(tinted, [9]) > 5
    assert motion.seam_ratio(tinted, [4]) < 1.2
    assert motion.seam_ratio(tinted, [4, 9]) == motion.seam_ratio(tinted, [9])


def test_seam_of_what_stands_still_is_none_or_without_end():
    still = np.full((5, 2, 2, 3), 7, np.uint8)
    assert motion.seam_ratio(still, [2]) == 0
    still[2:] = 9
    assert motion.seam_ratio(still, [2]) == MOST


def test_speed_over_a_seam_counts_a_jump_and_a_change():
    even = 0.05 * np.arange(17)
    assert motion.velocity_jump(path_of(x=even), 9) == pytest.approx(0, abs=1e-9)
    assert motion.velocity_jump(path_of(x=even + 0.02 * (np.arange(17) >= 9)), 9) == pytest.approx(
        0.4
    )
    faster = np.where(np.arange(17) > 9, even + 0.25 * (even - even[9]), even)
    assert motion.velocity_jump(path_of(x=faster), 9) == pytest.approx(0.25 / 1.125)
    assert motion.velocity_jump(path_of(x=-faster), 9) == pytest.approx(0.25 / 1.125)
    assert motion.velocity_jump(path_of(x=even), 3) == MOST  # too near to the edge to be told


def test_true_motion_keeps_its_speed_and_dropped_frames_do_not(slide):
    assert motion.velocity_jump(motion.subject_path(slide), 9) < 0.2
    dropped = np.concatenate([slide[:9], slide[10:], slide[-1:]])
    assert motion.velocity_jump(motion.subject_path(dropped), 9) > 0.5


def test_hiding_is_found_and_its_way_ends_where_it_began():
    clip = render(scene_of("hides"))
    path = motion.subject_path(clip)
    begin, end = motion.hidden(path)
    assert 5 <= begin <= 7 and 9 <= end <= 11
    assert motion.way(path) < 0.02
    assert motion.hidden(motion.subject_path(clip[:9])) is None  # it does not come out
    assert (
        motion.hidden(motion.subject_path(np.delete(clip, range(begin + 1, end + 1), axis=0)))
        is None
    )


def test_what_still_peeps_out_is_hidden_and_one_frame_is_not():
    seen = path_of(x=np.full(9, 0.5))
    assert motion.hidden(seen._replace(area=np.array([5, 5, 0.5, 0, 0.5, 5, 5, 5, 5.0]))) == (2, 4)
    assert motion.hidden(seen._replace(area=np.array([5, 5, 2.0, 0, 2.0, 5, 5, 5, 5.0]))) is None


def test_way_is_from_the_first_sight_to_the_last():
    path = path_of(x=[np.nan, 0.2, np.nan, 0.6, np.nan])
    assert motion.way(path) == pytest.approx(0.4)


def test_cut_is_the_first_frame_of_the_second_shot():
    shares = {"multi_shot": 1.0, "collisions": 0.0, "companions": 0.0}
    for scene in itertools.islice(scenes("train", **shares)(DEFAULT_SETTINGS, 0), 3):
        assert motion.cut(render(scene)) == scene.shots[0].frames == 8


def test_arcs_lie_strictly_between_impacts():
    t = np.arange(17)
    y = 0.9 - np.abs(np.sin(np.pi * (t - 2.4) / 7))  # impacts at 2.4 and 9.4, and 16.4
    assert motion.arcs(y) == [slice(3, 9), slice(10, 16)]
    assert motion.arcs(np.zeros(17)) == motion.arcs(t / 17) == []


def test_true_bounces_are_parabolas_and_triangles_are_not():
    path = motion.subject_path(render(scene_of("bounces")))
    assert motion.parabola_fit(path) > 0.98
    t = np.arange(17)
    fall = ((t - 3.2) % 5.9 - 2.95) / 2.95
    assert motion.parabola_fit(path_of(y=fall**2)) == pytest.approx(1)
    assert motion.parabola_fit(path_of(y=np.abs(fall))) < 0.95
    assert motion.parabola_fit(path_of(y=t / 17)) == 0  # it never bounces
    lost = path_of(y=fall**2)
    lost.centre[7] = np.nan
    assert motion.parabola_fit(lost) == 0


def change(clip, actors, *, masses=(1, 1), drag=DRAG):
    return motion.momentum_change(
        clip, tuple(actor.colour for actor in actors), masses=masses, drag=drag
    )


def test_momentum_is_kept_in_truth_and_not_where_the_film_hurries_on(collision):
    actors, clip = collision
    assert change(clip, actors) < 0.2
    assert change(clip, actors, masses=(1, 2)) > 0.5
    centre = {track.colour: track.centre[:, 0] for track in motion.tracks(clip)}
    struck = centre[actors[1].colour]
    impact = int((np.abs(struck - struck[0]) > 1).argmax())
    hurried = np.concatenate([clip[: impact + 1], clip[impact + 2 :: 2]])
    assert change(hurried, actors) > 0.5
    assert change(clip, actors, drag=0) > change(clip, actors)  # what the ground takes is lost


def test_momentum_says_nothing_without_a_collision(collision, slide):
    actors, clip = collision
    assert change(np.broadcast_to(clip[0], clip.shape), actors) is None  # nobody moves
    assert change(clip[6:], actors) is None  # the impact is not seen
    assert change(slide, actors) is None  # there are not two
