import hashlib
import io
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from sora_jax.data import records
from sora_jax.data.build.encode import ClipEncoder, png_bytes
from sora_jax.data.build.settings import WriteSettings

RECORD = records.ClipRecord(
    clip=b"\xff\x00\xfe\x00",
    key="a/b.mp4#00000012",
    source="a/b.mp4",
    captions=["a bike", "a bike in the café"],
    caption_kinds=["short", "detailed"],
    width=64,
    height=48,
    num_frames=21,
    fps=12.5,
    start=0.5,
    end=2.25,
    scores={"motion": 1.5, "luma": 100.25},
    phash="00ff00ff00ff00ff",
)

# TensorFlow may not even be looked for; `sys.modules["tensorflow"] = None` would be no such test,
# because TFDS takes any entry there for TensorFlow itself.
WITHOUT_TENSORFLOW = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError("no tensorflow here", name=name)
sys.meta_path.insert(0, Refuse())
import hashlib
from sora_jax.data import records
record = records.ClipRecord(**eval(sys.argv[1]))
data = records.serialize(record)
assert records.parse(data) == record
assert records.FEATURES.to_json()
print(hashlib.sha256(data).hexdigest())
"""


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(0)
    encoder = ClipEncoder((48, 64), Fraction(30000, 1001), WriteSettings(gop=8))
    for _ in range(30):
        encoder.add(np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (48, 64, 3)))
    return encoder.finish()


def test_a_record_reads_back_as_it_was():
    assert records.parse(records.serialize(RECORD)) == RECORD
    bare = RECORD._replace(captions=[], caption_kinds=[], scores={})
    assert records.parse(records.serialize(bare)) == bare


def test_a_record_has_the_same_bytes_in_another_process_without_tensorflow():
    reordered = RECORD._replace(scores=dict(reversed(RECORD.scores.items())))
    data = records.serialize(RECORD)
    assert records.serialize(reordered) == data
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, repr(RECORD._asdict())],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == hashlib.sha256(data).hexdigest()


def test_each_caption_has_a_kind():
    with pytest.raises(ValueError, match="2 captions of 1 kinds"):
        records.serialize(RECORD._replace(caption_kinds=["short"]))


@pytest.mark.parametrize(
    "start, num_frames, stride", [(0, 5, 1), (3, 4, 1), (8, 8, 1), (17, None, 1), (5, 6, 4)]
)
def test_a_stretch_of_a_clip_is_that_stretch_of_the_whole(clip, start, num_frames, stride):
    whole = records.decode_clip(clip)
    assert whole.shape == (30, 48, 64, 3)
    frames = records.decode_clip(clip, start=start, num_frames=num_frames, stride=stride)
    expected = whole[start::stride][:num_frames]
    np.testing.assert_array_equal(frames, expected)


def test_only_what_follows_the_key_frame_before_start_is_decoded(clip):
    with av.open(io.BytesIO(clip)) as container:
        first = [(p.pos, p.size) for p in container.demux(video=0) if p.size][:16]
    damaged = bytearray(clip)
    for position, size in first:  # the groups of frames 0-7 and 8-15
        damaged[position : position + size] = bytes(size)
    expected = records.decode_clip(clip)[18:25]
    np.testing.assert_array_equal(
        records.decode_clip(bytes(damaged), start=18, num_frames=7), expected
    )


def test_an_image_is_one_frame():
    frame = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(records.decode_clip(png_bytes(frame)), frame[None])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"start": 30}, "1 frames from 30 on with stride 1 asked for, but it has 30"),
        ({"start": 25, "num_frames": 6}, "6 frames from 25 on"),
        ({"num_frames": 20, "stride": 2}, "20 frames from 0 on with stride 2"),
        ({"start": -1}, "start must be at least 0"),
        ({"stride": 0}, "the others at least 1"),
    ],
)
def test_frames_that_are_not_there_are_told(clip, arguments, message):
    with pytest.raises(ValueError, match=message):
        records.decode_clip(clip, **arguments)


def test_damaged_bytes_are_told_in_one_line(clip):
    png = png_bytes(np.zeros((16, 16, 3), np.uint8))
    for data in (clip[:200], b"", b"nothing", png[:40]):
        with pytest.raises(ValueError, match=r"^clip: .*$"):
            records.decode_clip(data)
