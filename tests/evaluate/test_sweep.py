"""The sweep finds the setting that reads best, and does so on equal terms."""

import dataclasses

import pytest

from sora_jax.evaluate.sweep import merit, sweep


def guided(base):
    """A pipeline class that shows the right colour from a guidance of 3 on."""

    def change(subject):
        wrong = "red" if subject.colour == "blue" else "blue"
        return dataclasses.replace(subject, colour=wrong)

    class Guided(base):
        def run(self, requests):
            self.change = change if requests[0].guidance < 3 else lambda subject: subject
            return super().run(requests)

    return Guided()


def test_best_row_comes_first_and_every_row_sees_the_same_prompts_and_seeds(fake_pipeline):
    pipeline, seen = guided(fake_pipeline), []
    rows = sweep(
        pipeline,
        guidance=[1.0, 4.0, 3.0],
        steps=[8],
        prompts=2,
        batch_size=2,
        seed=0,
        on_row=seen.append,
    )
    assert [(row["guidance"], row["steps"]) for row in rows] == [(3.0, 8), (4.0, 8), (1.0, 8)]
    assert rows[0]["attributes"]["all"]["rate"] == 1 and rows[2]["attributes"]["all"]["rate"] == 0
    assert [row["guidance"] for row in seen] == [1.0, 4.0, 3.0]
    asked = {tuple((r.prompt, r.seed) for r in batch) for batch in pipeline.batches}
    assert len(asked) == 1 and len(pipeline.batches) == 3


def test_blocks_are_swept_beside_the_rest(fake_pipeline):
    pipeline = fake_pipeline()
    rows = sweep(
        pipeline, guidance=[2.0], steps=[8], blocks=[(), [1, 2], None], prompts=1, batch_size=1
    )
    asked = [batch[0].guidance_blocks for batch in pipeline.batches]
    assert asked == [(), (1, 2), ()]  # the last are the checkpoint's
    assert [row["guidance_blocks"] for row in rows] == [(), (1, 2), None]


def _row(colour: float, verb: float, *, whole: float = 0.9, steps: int = 10, guidance: float = 2.0):
    rates = {"colour": colour, "shape": 1.0, "place": 1.0, "verb": verb, "all": whole}
    attributes = {name: {"rate": rate} for name, rate in rates.items()}
    return {"guidance": guidance, "steps": steps, "attributes": attributes}


def test_worst_attribute_decides_then_all_four_then_cost():
    assert merit(_row(0.9, 0.9)) > merit(_row(1.0, 0.8, whole=0.95))
    assert merit(_row(0.9, 0.9)) > merit(_row(0.9, 0.9, whole=0.8, steps=5))
    assert merit(_row(0.9, 0.9, steps=5, guidance=4.0)) > merit(_row(0.9, 0.9))
    assert merit(_row(0.9, 0.9, guidance=1.0)) > merit(_row(0.9, 0.9))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": [], "steps": [1]}, "nothing to sweep"),
        ({"guidance": [1], "steps": [5, 0]}, "steps 0 is out of range"),
        ({"guidance": [1], "steps": [1], "split": "train"}, "use one of heldout, seen"),
        ({"guidance": [1], "steps": [1], "prompts": 0}, "prompts 0 and batch_size 16"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_is_made(fake_pipeline, options, words):
    pipeline = fake_pipeline()
    with pytest.raises(ValueError, match=words):
        sweep(pipeline, **options)
    assert pipeline.batches == []
