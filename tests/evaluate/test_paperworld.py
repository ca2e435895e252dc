"""A model that shows what is asked scores one; what it gets wrong, and only that, is counted."""

import dataclasses
import json

import numpy as np
import pytest

from sora_jax.data.paperworld import vocab
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.source import heldout_prompts, seen_prompts
from sora_jax.evaluate import paperworld, scores
from sora_jax.evaluate.paperworld import evaluate, psnr, score_prompts

PROMPTS = 5


@pytest.fixture(scope="module")
def run(fake_pipeline):
    """(pipeline, what `evaluate` returned, calls of on_progress, calls of on_video)."""
    pipeline, progress, videos = fake_pipeline(noise=0.02), [], []
    result = evaluate(
        pipeline,
        prompts=PROMPTS,
        batch_size=2,
        vae_clips=3,
        on_progress=lambda *call: progress.append(call),
        on_video=lambda *call: videos.append(call),
    )
    return pipeline, result, progress, videos


def test_true_renderings_score_one_in_everything(run):
    result = run[1]
    for split in ("heldout", "seen"):
        for scored in (result[split], result[split]["ceiling"]):
            for name in (*scores.ATTRIBUTES, "all"):
                rate = scored["attributes"][name]
                assert (rate["right"], rate["total"], rate["rate"]) == (PROMPTS, PROMPTS, 1.0), name
        assert result[split]["confusions"] == {
            name: [] for name in (*scores.ATTRIBUTES, *scores.EXTRAS)
        }
    assert result["passed"] and all(row["passed"] for row in result["targets"].values())
    assert result["vae"]["attributes"]["all"]["rate"] == 1.0


def test_vae_psnr_is_that_of_its_error(run):
    # .02 in [-1, 1] is 2.55 grey levels, so every byte is 3 too bright, save a few near white.
    assert run[1]["vae"]["psnr_mean"] == pytest.approx(20 * np.log10(255 / 3), abs=0.1)
    assert run[1]["vae"]["clips"] == 3


def test_only_prompts_and_seeds_differ_and_no_two_seeds_are_equal(run):
    pipeline, result = run[0], run[1]
    requests = list(dict.fromkeys(r for batch in pipeline.batches for r in batch))
    assert sorted(r.seed for r in requests) == list(range(2 * PROMPTS))
    defaults = pipeline.request("x")
    for request in requests:
        assert dataclasses.replace(request, prompt="x", seed=0) == defaults
    recorded = [(r["prompt"], r["seed"]) for s in ("heldout", "seen") for r in result[s]["records"]]
    assert recorded == [(r.prompt, r.seed) for r in requests]


def test_every_batch_has_one_size_so_that_nothing_compiles_twice(run):
    assert {len(batch) for batch in run[0].batches} == {2}
    assert len(run[3]) == 2 * PROMPTS  # and what fills the last one is not counted


def test_progress_ends_at_the_total_of_every_stage(run):
    last = {stage: (done, total) for stage, done, total in run[2]}
    full = (PROMPTS, PROMPTS)
    splits = {"heldout": full, "heldout ceiling": full, "seen": full, "seen ceiling": full}
    assert last == splits | {"vae": (3, 3)}


def test_result_is_json_and_says_what_made_it(run):
    result = json.loads(json.dumps(run[1], allow_nan=False))
    assert result == run[1]
    assert result["checkpoint_sha256"] == "0123456789abcdef"
    assert result["settings"]["steps"] == 30 and result["settings"]["batch_size"] == 2
    assert result["sora_jax"] and result["jax"] and result["device"]


def test_wrong_colour_is_counted_as_such_and_leaves_the_others_alone(fake_pipeline):
    colours = list(vocab.COLOURS)
    change = dict(zip(colours, colours[3:] + colours[:3], strict=True))
    pipeline = fake_pipeline(
        change=lambda subject: dataclasses.replace(subject, colour=change[subject.colour])
    )
    prompts = heldout_prompts(6)
    result = score_prompts(pipeline, prompts, first_seed=0, batch_size=4, options={})
    rate = {name: result["attributes"][name]["rate"] for name in (*scores.ATTRIBUTES, "all")}
    assert rate == {"colour": 0.0, "shape": 1.0, "place": 1.0, "verb": 1.0, "all": 0.0}
    asked = [prompt.scene.subject.colour for prompt in prompts]
    wrong = result["confusions"]["colour"]
    assert {(w["asked"], w["read"]) for w in wrong} == {(c, change[c]) for c in asked}
    assert sum(w["count"] for w in wrong) == 6
    assert result["confusions"]["shape"] == []


def _judgement(verb: str, read: str, *, shape: str = "ball"):
    names = (*scores.ATTRIBUTES, *scores.EXTRAS)
    asked = dict.fromkeys(names, "x") | {"verb": verb, "shape": shape}
    return {
        "asked": asked,
        "read": asked | {"verb": read},
        "right": dict.fromkeys(names, True) | {"verb": verb == read},
    }


def test_confusions_are_sorted_by_count_and_breakdowns_join_both_directions():
    wrong = [("rolls left", "slides left")] + 2 * [("rolls right", "rolls left")]
    right = [("falls", "falls"), ("rolls left", "rolls left")]
    judgements = [_judgement(*pair) for pair in wrong + right]
    summary = scores.summary(judgements)
    assert summary["confusions"]["verb"] == [
        {"asked": "rolls right", "read": "rolls left", "count": 2},
        {"asked": "rolls left", "read": "slides left", "count": 1},
    ]
    by_verb = summary["by"]["verb"]
    assert set(by_verb) == {"falls", "rolls"}
    assert (by_verb["rolls"]["verb"]["right"], by_verb["rolls"]["verb"]["total"]) == (1, 4)
    assert by_verb["rolls"]["shape"]["rate"] == 1.0
    assert summary["attributes"]["all"]["right"] == 2


def test_a_verb_in_the_wrong_direction_is_wrong(fake_pipeline):
    prompts = heldout_prompts(40)
    prompt = next(p for p in prompts if p.scene.subject.direction == "left")
    other = prompt.text.replace(" left ", " right ")
    pipeline = fake_pipeline()
    pipeline.scenes[prompt.text] = next(
        p.scene
        for p in prompts
        if p.scene.subject.verb == prompt.scene.subject.verb
        and p.scene.subject.direction == "right"
    )
    assert other != prompt.text
    result = score_prompts(pipeline, [prompt], first_seed=0, batch_size=1, options={})
    verb = prompt.scene.subject.verb
    assert result["confusions"]["verb"] == [
        {"asked": f"{verb} left", "read": f"{verb} right", "count": 1}
    ]


def test_what_is_read_of_a_verb_names_what_hides_and_is_nothing_where_the_place_changes():
    scene = next(p.scene for p in seen_prompts(8) if p.scene.subject.verb == "hides")
    shot = scene.shots[0]
    (other,) = set(vocab.OCCLUDERS) - {shot.occluder}

    def shown(**changes):
        return render(dataclasses.replace(scene, shots=(dataclasses.replace(shot, **changes),)))

    cut = np.concatenate([shown()[:9], shown(place="city")[9:]])
    for clip, verb in (
        (shown(), f"hides behind {shot.occluder}"),
        (shown(occluder=other), f"hides behind {other}"),
        (cut, "nothing"),
    ):
        judgement = scores.judge(clip, scene)
        assert judgement["asked"]["verb"] == f"hides behind {shot.occluder}"
        assert judgement["read"]["verb"] == verb
        assert judgement["right"]["verb"] == (verb == judgement["asked"]["verb"])
    assert list(scores.breakdown([judgement], "verb")) == ["hides"]


def _result(rates: dict[str, float], *, decibels: float):
    section = {
        split: {"attributes": {n: {"rate": rates.get(f"{split}/{n}", 1.0)} for n in "abc"}}
        for split in ("heldout", "seen")
    }
    for split in section:
        section[split]["attributes"] |= {
            n: {"rate": rates.get(f"{split}/{n}", 1.0)} for n in scores.ATTRIBUTES
        }
    return section | {"vae": {"psnr_mean": decibels}}


@pytest.mark.parametrize(
    ("rates", "decibels", "failed"),
    [
        ({}, 32.0, set()),
        ({"heldout/verb": 0.95, "seen/verb": 0.97}, 33.0, set()),
        ({"heldout/verb": 0.949}, 33.0, {"heldout/verb"}),
        ({"seen/place": 0.96}, 31.9, {"seen/place", "vae/psnr"}),
    ],
)
def test_each_target_is_passed_or_failed_by_itself(rates, decibels, failed):
    verdict = paperworld.verdict(_result(rates, decibels=decibels))
    assert {name for name, row in verdict["targets"].items() if not row["passed"]} == failed
    assert verdict["passed"] == (not failed)
    assert len(verdict["targets"]) == 9


def test_psnr_of_one_grey_level_is_48_decibels_and_of_equal_clips_finite():
    clip = np.full((2, 3, 4, 4, 3), 100, np.uint8)
    off = clip.copy()
    off[1] += 1
    assert psnr(clip, off) == pytest.approx([126.02, 48.13], abs=0.01)
    assert psnr(off, clip) == psnr(clip, off)  # bytes must not wrap around


@pytest.mark.parametrize(
    ("options", "frames", "words"),
    [
        ({"prompts": 0}, 17, "prompts 0 is out of range"),
        ({"batch_size": -1}, 17, "batch_size -1 is out of range"),
        ({"vae_clips": 0}, 17, "vae_clips 0 is out of range"),
        ({"steps": 0}, 17, "steps 0 is out of range"),
        ({}, 1, "makes 1 frames; the paperworld suite needs at least 8"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(fake_pipeline, options, frames, words):
    pipeline = fake_pipeline(frames=frames)
    with pytest.raises(ValueError, match=words) as error:
        evaluate(pipeline, **options)
    assert "\n" not in str(error.value) and pipeline.batches == []
