"""Rows that the tool puts together are those of `sora_jax.data.packing`."""

import numpy as np
import pytest

import sora_jax
from sora_jax.convert import folder
from sora_jax.data import packing
from sora_jax.data.packing import PackSettings
from sora_jax.train.batches import Segmenter

NAMES = ("positions", "segment_ids", "text_of_tokens", "ids", "text_segment_ids", "text_positions")


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("drawn_rows")


@pytest.mark.parametrize("of_clips", [True, False])
def test_rows_are_packed_as_the_loader_packs_them(tool, of_clips):
    tokenizer = folder.open_tokenizer(sora_jax.weights_folder("paperworld"))
    if of_clips:
        records = tool.Records(tool.CLIPS + tool.TURNED_CLIPS, 17, count=40, workers=2)
        rows = tool.Rows(records, 64, in_row=1, text=tool.WORDS)
    else:
        records = tool.Records(tool.IMAGES + tool.TURNED_IMAGES, 1, count=60, workers=2)
        rows = tool.Rows(records, 24, in_row=tool.IN_ROW, text=tool.IMAGE_TEXT)
    for worker in range(2):
        for _ in records.draw(worker, tokenizer):
            pass
    assert len(records.available()) == len(records.video)
    assert records.video.std(axis=(1, 2, 3, 4)).min() > 1
    rows.encoded = np.random.default_rng(1).permutation(records.available())[7:]
    made = rows(np.random.default_rng(0))
    segment = Segmenter(tokenizer, tool.WORDS, (1, 1, 1), 2)
    settings = PackSettings(tokens=576, text_tokens=rows.text, max_segments=rows.max_segments)
    timed = 0
    for row in range(rows.rows):
        latents = np.zeros((tool.LATENTS if of_clips else 1, tool.SIDE, tool.SIDE, 16), np.float32)
        segments, texts = [], 0
        for at in rows.encoded[made["chosen"][row]]:
            said = [
                segment({"latents": latents, "caption": caption, "fps": 8.0})
                for caption in captions_of(tool, records, int(at))
            ]
            place = made["text_segment_ids"][row]
            one = next(s for s in said if same(s.texts, made["ids"][row], place - texts))
            segments.append(one)
            texts += len(one.texts)
        timed += len(segments[0].texts) > 1
        packed = packing.pack(segments, settings)
        for name in NAMES:
            np.testing.assert_array_equal(made[name][row], packed[name], err_msg=name)
    assert bool(timed) == of_clips, "captions with time stamps are among those of clips"


def captions_of(tool, sort, at: int) -> list[str]:
    worker = at // sort.each
    shares = np.array([share for share, _ in sort.kinds], float)
    order = np.random.default_rng([tool.SEED, worker, len(shares)]).choice(
        len(shares), sort.each, p=shares / shares.sum()
    )
    kind = int(order[at % sort.each])
    source = tool.PaperworldSource(tool.SEED + kind, sort.kinds[kind][1])
    assert np.array_equal(source[at]["video"], sort.video[at])
    return source.captions(at, 8)


def same(texts, ids, place) -> bool:
    return all(np.array_equal(ids[place == i], text) for i, text in enumerate(texts))
