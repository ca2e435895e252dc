"""True renderings are what is asked in every task; each planted defect is found, and it alone."""

import dataclasses
import io
import itertools
import json
import re

import numpy as np
import pytest
from rich.console import Console

from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.scene import sample_scene
from sora_jax.data.paperworld.settings import DEFAULT_SETTINGS
from sora_jax.diffusion.tasks import MASKS
from sora_jax.evaluate import chosen_tasks, report, run_suite, task_cases, task_report
from sora_jax.evaluate.task_cases import Made
from sora_jax.evaluate.tasks import GROUPS, TASKS, evaluate
from sora_jax.prompts import timed

CASES = 1


def case_of(task, *verbs):
    """The first case of a task in the meadow, as the inks of each place take a while."""
    scenes = TASKS[task].scenes(DEFAULT_SETTINGS, 0)
    return next(
        TASKS[task].case(scene, step=2)
        for scene in scenes
        if scene.shots[0].place == "meadow" and (not verbs or scene.subject.verb in verbs)
    )


def repainted(scene, **changes):
    """The true rendering of another subject that does the same in every shot."""
    shots = tuple(
        dataclasses.replace(shot, actors=(dataclasses.replace(shot.actors[0], **changes),))
        for shot in scene.shots
    )
    return render(dataclasses.replace(scene, shots=shots))


def other_colour(scene):
    return repainted(scene, colour="blue" if scene.subject.colour != "blue" else "pink")


def failed(task, case, frames, *, exact=True):
    """Names of the measures with which a case that came out as `frames` is not content."""
    outcome = TASKS[task].judge.outcome(case, Made(frames, frames, exact))
    assert set(outcome) == {measure.name for measure in TASKS[task].judge.measures}
    return {m.name for m in TASKS[task].judge.measures if m.failed(outcome[m.name])}


def recolour_last(case):
    return np.concatenate([case.truth[:-1], other_colour(case.scene)[-1:]])


def recolour_first(case):
    return np.concatenate([other_colour(case.scene)[:1], case.truth[1:]])


def recolour_end(case):
    return np.concatenate([case.truth[:9], other_colour(case.scene)[9:]])


def reshape_last(case):
    other = repainted(case.scene, shape="box" if case.scene.subject.shape != "box" else "ball")
    return np.concatenate([case.truth[:-1], other[-1:]])


def stand_still(case):
    return np.repeat(case.truth[:1], len(case.truth), axis=0)


def jump(case):
    """Two frames are left out at the first seam of the clip."""
    (at, *_) = np.flatnonzero(np.diff(case.canvas.known.all(axis=(1, 2)))) + 1
    later = case.truth[at + 2 :]
    return np.concatenate([case.truth[:at], later, np.repeat(later[-1:], 2, axis=0)])


def darken_gap(case):
    made = ~case.canvas.known.all(axis=(1, 2))
    return np.where(made[:, None, None, None], case.truth // 4 * 3, case.truth)


def forget_given(case):
    """What is given comes back seven grey levels darker: 31 dB."""
    darker = np.maximum(case.truth, 7) - 7
    return np.where(case.canvas.known[..., None], darker, case.truth)


def forget_a_keyframe(case):
    frames = case.truth.copy()
    frames[8] = np.maximum(frames[8], 7) - 7
    return frames


def elsewhere(case):
    """What is around is of another place."""
    shot = dataclasses.replace(case.scene.shots[0], place="city")
    other = render(dataclasses.replace(case.scene, shots=(shot,)))
    return np.where(case.canvas.known[..., None], case.truth, other)


def cut_away(case):
    shot = dataclasses.replace(case.scene.shots[0], place="city")
    other = render(dataclasses.replace(case.scene, shots=(shot,)))
    return np.concatenate([case.truth[:9], other[9:]])


def remove_what_hides(case):
    """The wall or the rock is gone, and the subject is out of sight for as long."""
    actor = case.scene.subject
    shots = [
        dataclasses.replace(case.scene.shots[0], occluder=None, actors=(each,))
        for each in (
            dataclasses.replace(actor, verb="spins", tempo=0.0),
            dataclasses.replace(actor, start=(9.0, 9.0)),
        )
    ]
    clip, empty = (render(dataclasses.replace(case.scene, shots=(shot,))) for shot in shots)
    return np.concatenate([clip[:7], empty[7:12], clip[12:]])


def stay_hidden(case):
    return np.concatenate([case.truth[:9], np.repeat(case.truth[8:9], 8, axis=0)])


def come_out_elsewhere(case):
    """Frames after the hiding from a scene that is shifted sideways."""
    x, y = case.scene.subject.start
    return np.concatenate([case.truth[:9], repainted(case.scene, start=(x + 0.2, y))[9:]])


def cut_late(case):
    first = case.scene.shots[0]
    longer = dataclasses.replace(first, frames=first.frames + 3)
    scene = dataclasses.replace(case.scene, shots=(longer, case.scene.shots[1]))
    return render(scene)[: len(case.truth)]


def no_cut(case):
    longer = dataclasses.replace(case.scene.shots[0], frames=len(case.truth))
    return render(dataclasses.replace(case.scene, shots=(longer,)))


def another_after_the_cut(case):
    return np.concatenate([case.truth[:8], other_colour(case.scene)[8:]])


def stutter(case):
    """The film stands still on the way up and hurries after."""
    times = np.arange(17)
    times[5:7], times[11:13] = 4, 10
    return case.truth[times]


def hurry(case):
    return np.concatenate([case.truth[:6], case.truth[7::2]])


def the_other_strikes(case):
    shot = case.scene.shots[0]
    colours = [actor.colour for actor in shot.actors[::-1]]
    actors = (
        dataclasses.replace(actor, colour=colour)
        for actor, colour in zip(shot.actors, colours, strict=True)
    )
    shot = dataclasses.replace(shot, actors=tuple(actors))
    return render(dataclasses.replace(case.scene, shots=(shot,)))


def mirror(case):
    """Left for right: as physics it is as good as it was."""
    return case.truth[:, :, ::-1].copy()


@pytest.mark.parametrize(
    ("task", "verbs", "defect", "wrong"),
    [
        ("animate", ["slides"], recolour_last, {"subject"}),
        ("animate", ["slides"], reshape_last, {"subject"}),
        ("animate", ["slides"], stand_still, {"motion"}),
        ("animate", ["slides"], cut_away, {"motion"}),
        ("animate", ["slides"], forget_given, {"kept"}),
        ("keyframes", ["slides"], forget_a_keyframe, {"met", "seamless"}),
        ("extend forward", ["slides"], jump, {"seam", "seamless", "speed change", "speed steady"}),
        ("extend forward", ["slides"], recolour_last, {"subject"}),
        ("extend backward", ["slides"], jump, {"seam", "seamless", "speed change", "speed steady"}),
        ("extend backward", ["slides"], recolour_first, {"subject"}),
        ("join", ["slides"], jump, {"seam", "seamless"}),
        ("join", ["slides"], darken_gap, {"seam", "seamless"}),
        ("loop", ["spins"], darken_gap, {"seam", "seamless"}),
        ("loop", ["spins"], jump, {"seam", "seamless"}),
        ("inpaint", ["slides"], forget_given, {"kept"}),
        ("inpaint", ["slides"], stand_still, {"prompt", "verb"}),
        ("outpaint", ["slides"], elsewhere, {"prompt", "place"}),
        ("permanence", [], recolour_end, {"subject"}),
        ("permanence", [], stay_hidden, {"hides", "subject", "place"}),
        ("permanence", [], remove_what_hides, {"hides", "subject", "place"}),
        ("permanence extended", [], come_out_elsewhere, {"place"}),
        ("shots", [], cut_late, {"cut"}),
        ("shots", [], no_cut, {"cut", "place", "motion"}),
        ("shots", [], another_after_the_cut, {"subject"}),
        ("physics bounce", [], stutter, {"parabola", "parabolic"}),
        ("physics collision", [], hurry, {"momentum"}),
        ("physics collision", [], the_other_strikes, {"roles"}),
        ("physics collision", [], mirror, {"motion"}),
    ],
)
def test_a_planted_defect_fails_its_measure_and_truth_none(task, verbs, defect, wrong):
    case = case_of(task, *verbs)
    assert failed(task, case, case.truth) == set()
    assert failed(task, case, defect(case)) == wrong


def test_changed_latents_fail_their_measure_and_nothing_is_said_of_none():
    case = case_of("inpaint", "slides")
    assert failed("inpaint", case, case.truth, exact=False) == {"latents"}
    assert failed("inpaint", case, case.truth, exact=None) == set()


def test_what_is_given_is_as_the_issue_has_it():
    frames = {
        "animate": [0],
        "keyframes": [0, 8, 16],
        "extend forward": range(9),
        "extend backward": range(9, 17),
        "join": [*range(5), *range(13, 17)],
        "loop": [*range(5), *range(13, 17)],
        "permanence extended": range(9),
    }
    for task, given in frames.items():
        known = case_of(task).canvas.known
        assert (known.all(axis=(1, 2)) == np.isin(np.arange(17), given)).all(), task
        assert (known.any(axis=(1, 2)) == known.all(axis=(1, 2))).all(), task
    assert {task for task in TASKS if case_of(task).canvas is None} == {
        *("permanence", "shots", "physics bounce", "physics collision")
    }


def test_box_hides_the_subject_and_the_middle_is_a_quarter():
    case = case_of("inpaint", "slides")
    hole = ~case.canvas.known
    assert (hole == hole[0]).all() and 0.1 < hole.mean() < 0.7
    moving = (np.diff(case.truth.astype(int), axis=0) != 0).any(axis=(0, 3))
    assert not (moving & ~hole[0]).any()
    known = case_of("outpaint", "slides").canvas.known
    assert known[:, 16:48, 16:48].all() and known.mean() == 0.25


def test_a_loop_is_a_whole_number_of_turns_without_a_seam():
    case = case_of("loop")
    change = np.abs(np.diff(case.truth.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert change.max() < 1.15 * np.median(change)  # nor where the beginning follows, at frame 13
    assert len(case.truth) == 17


def test_cuts_are_asked_for_at_their_time():
    scene = next(TASKS["shots"].scenes(DEFAULT_SETTINGS, 0))
    first, second = timed.split(TASKS["shots"].case(scene, step=2).prompt)
    assert first.end == second.start == scene.shots[0].frames / scene.fps
    assert second.end == scene.frames / scene.fps


def test_scenes_of_training_are_of_another_world():
    scene = next(task_cases.scenes("train")(DEFAULT_SETTINGS, 3))
    assert scene == sample_scene(3 + task_cases.OTHER_WORLD, 0)


@pytest.fixture(scope="module")
def run(fake_task_pipeline, tmp_path_factory):
    """(pipeline, what `run_suite` returned, calls of on_progress, folder)."""
    pipeline, progress = fake_task_pipeline(cases=CASES), []
    folder = tmp_path_factory.mktemp("tasks")
    result = run_suite(
        "tasks",
        pipeline,
        folder / "scores.json",
        prompts=CASES,
        batch_size=CASES,
        ceilings=1,
        on_progress=lambda *call: progress.append(call),
    )
    return pipeline, result, progress, folder


def test_true_renderings_pass_all_targets(run):
    result = run[1]
    assert set(result["tasks"]) == set(TASKS) and result["skipped"] == {}
    assert {name for name, row in result["targets"].items() if not row["passed"]} == set()
    assert result["passed"]
    for task, section in result["tasks"].items():
        assert section["cases"] == len(section["records"]) == CASES
        for name, row in section["measures"].items():
            if row["kind"] == "rate" and row["cases"]:
                assert row["value"] == 1 and row["interval"][1] == 1, (task, name)
                assert row["truth"] in (None, 1) and row["vae"] in (None, 1), (task, name)


def test_result_is_json_beside_its_sheets_and_says_what_made_it(run):
    _, result, _, folder = run
    assert json.loads((folder / "scores.json").read_text()) == result
    assert result["suite"] == "tasks" and result["settings"]["prompts"] == CASES
    assert result["checkpoint_sha256"] == "0123456789abcdef"
    sheets = {f"scores_{task.replace(' ', '_')}.png" for task in TASKS}
    assert {path.name for path in folder.iterdir()} == {"scores.json", *sheets}


def test_progress_ends_at_the_total_of_every_task(run):
    assert {name: (done, total) for name, done, total in run[2]} == dict.fromkeys(TASKS, (1, 1))


def test_printed_table_fits_into_80_columns(run):
    console = Console(file=io.StringIO(), width=80)
    report.print_table(run[1], console)
    printed = console.file.getvalue()
    for words in ("physics collision", "kept, dB", "126.0", ">= 0.93", "<= 1.2", "0.207 to 1.000"):
        assert words in printed
    assert re.search(r"seam +│ +\d\.\d+ │ +- │", printed)  # one case gives a median no interval
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80


def test_defects_fail_their_targets_and_leave_their_videos(fake_task_pipeline, tmp_path):
    def defect(frames, scene):
        """Frames are darker from the fourth on, a meadow like snow; the last has another colour."""
        frames = frames.copy()
        frames[4:] = frames[4:] // 8 * 7
        frames[-1:] = other_colour(scene)[-1:]
        return frames

    groups = ["animate", "inpaint"]
    pipeline = fake_task_pipeline(cases=3, of=groups, defect=defect, forget=0.01)
    out = tmp_path / "scores.json"
    stale = tmp_path / "scores_loop_failures.png"
    stale.touch()
    result = run_suite("tasks", pipeline, out, prompts=3, batch_size=2, ceilings=1, tasks=groups)
    wrong = {name for name, row in result["targets"].items() if not row["passed"]}
    assert wrong == {"animate/subject", "animate/motion", "inpaint/latents"}
    assert not result["passed"] and list(result["tasks"]) == groups
    row = result["tasks"]["animate"]["measures"]["subject"]
    assert (row["right"], row["cases"], row["truth"]) == (0, 3, 1)
    assert pipeline.encoded == [2] * len(groups)  # one case of each has its ceilings, filled up
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores.json",
        *(f"scores_{task}{kind}.png" for task in result["tasks"] for kind in ("", "_failures")),
    }
    # Every batch has one size, so that nothing compiles twice; what fills it is not counted.
    assert {len(batch) for batch in pipeline.batches} == {2}
    assert [record["seed"] for record in result["tasks"]["animate"]["records"]] == [0, 1, 2]


def test_what_the_checkpoint_was_not_trained_for_is_skipped_and_said(fake_task_pipeline):
    groups = ["animate", "extend", "permanence"]
    pipeline = fake_task_pipeline(of=["animate", "permanence"], tasks=("none", "first"))
    result = evaluate(pipeline, prompts=1, batch_size=1, ceilings=1, tasks=groups)
    assert list(result["tasks"]) == ["animate", "permanence"]
    assert set(result["skipped"]) == {"extend forward", "extend backward", "permanence extended"}
    assert "extend backward (--extend backward)" in result["skipped"]["extend backward"]
    console = Console(file=io.StringIO(), width=80)
    report.print_table(result, console)
    assert "Skipped: extend forward, not trained for" in " ".join(console.file.getvalue().split())


def test_gallery_keeps_few_and_says_what_is_wrong():
    gallery, blank = task_report.TaskGallery(), np.zeros((1, 2, 2, 3), np.uint8)
    fine = {"kept": 126.0, "decoded": 30.0, "subject": True, "motion": True}
    for outcome in (fine, fine | {"kept": 31.25, "motion": False}):
        for _ in range(12):
            gallery.add("animate", {"prompt": "a", "outcome": outcome}, blank)
    assert len(gallery.first["animate"]) == len(gallery.failures["animate"]) == task_report.MOST
    assert gallery.first["animate"][0][0] == "animate: a"
    assert gallery.failures["animate"][0][0] == "animate: a (kept 31.2, motion)"


def test_tasks_are_chosen_by_their_first_words_and_unknown_ones_refused():
    assert chosen_tasks("tasks", "extend, loop") == ("extend", "loop")
    assert set(GROUPS) == {task.split()[0] for task in TASKS}
    for suite, words, hint in (
        ("tasks", "anmiate", "unknown task 'anmiate'; did you mean 'animate'"),
        ("tasks", "animate,", "unknown task ''; use some of: animate, keyframes"),
        ("paperworld", "animate", "--tasks is for --suite tasks"),
    ):
        with pytest.raises(ValueError, match=hint) as error:
            chosen_tasks(suite, words)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "frames", "words"),
    [
        ({"prompts": 0}, 17, "prompts 0 is out of range"),
        ({"batch_size": 0}, 17, "batch_size 0 is out of range"),
        ({"ceilings": 0}, 17, "ceilings 0 is out of range"),
        ({"steps": 0}, 17, "steps 0 is out of range"),
        ({"tasks": ["jion"]}, 17, "did you mean 'join'"),
        ({}, 9, "makes 9 frames; the suite of tasks needs at least 16"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(fake_pipeline, options, frames, words):
    pipeline = fake_pipeline(frames=frames)
    with pytest.raises(ValueError, match=words) as error:
        evaluate(pipeline, **options)
    assert "\n" not in str(error.value) and pipeline.batches == []


def test_every_task_asks_for_a_mask_that_training_knows():
    assert {task.mask for task in TASKS.values()} <= set(MASKS)
    scenes = [list(itertools.islice(t.scenes(DEFAULT_SETTINGS, 0), 3)) for t in TASKS.values()]
    assert all(scene.frames == 17 for some in scenes for scene in some)


def test_what_is_known_is_kept_when_a_suite_is_cut_off(fake_task_pipeline, tmp_path):
    def stop(name, done, total):
        if name == "loop":
            raise KeyboardInterrupt

    groups, out = ["animate", "loop"], tmp_path / "scores.json"
    pipeline = fake_task_pipeline(cases=1, of=groups)
    with pytest.raises(KeyboardInterrupt):
        run_suite("tasks", pipeline, out, prompts=1, ceilings=1, tasks=groups, on_progress=stop)
    kept = json.loads((tmp_path / "scores.partial.json").read_text())
    assert list(kept["tasks"]) == ["animate"] and "animate/motion" in kept["targets"]
    assert kept["left"] == ["loop"] and not kept["passed"]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.partial.json"]
    pipeline = fake_task_pipeline(cases=1, of=groups)
    run_suite("tasks", pipeline, out, prompts=1, ceilings=1, tasks=groups)
    assert out.exists() and not (tmp_path / "scores.partial.json").exists()


def test_what_is_carried_over_a_cut_ends_before_it():
    case = case_of("shots carried")
    cut = case.scene.shots[0].frames
    given = case.canvas.known.all(axis=(1, 2))
    # Frames 1 and 2 share a latent frame, and so on: frame 7 does with the cut's, 8.
    assert cut == 8 and given.tolist() == [True] * 7 + [False] * 10
    assert ". Cut to: " in case.prompt
