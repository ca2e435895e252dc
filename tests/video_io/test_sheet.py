"""Contact sheets and grids hold every frame where it belongs."""

import numpy as np
import pytest
from PIL import Image

from sora_jax import video_io


def flat(colour, num_frames=4, height=32, width=32):
    return np.full((num_frames, height, width, 3), colour, np.uint8)


def holds(sheet, tile):
    """Whether `tile` occurs in `sheet`, pixel for pixel."""
    height, width, _ = tile.shape
    corners = np.argwhere((sheet[: 1 - height, : 1 - width] == tile[0, 0]).all(-1))
    return any((sheet[y : y + height, x : x + width] == tile).all() for y, x in corners)


def noise(num_frames, size=32, seed=0):
    shape = (num_frames, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_sheet_of_one_clip_shows_every_frame_enlarged():
    clip = noise(11)
    sheet = video_io.contact_sheet(clip, columns=4)
    for frame in clip:
        assert holds(sheet, np.repeat(np.repeat(frame, 4, 0), 4, 1))


def test_sheet_of_clips_spreads_frames_from_first_to_last():
    clips = [noise(9, seed=1), noise(17, seed=2)]
    sheet = video_io.contact_sheet(clips, columns=5, scale=1, labels=["one", "two"])
    for clip, step in zip(clips, (2, 4), strict=True):
        assert [holds(sheet, frame) for frame in clip] == [i % step == 0 for i in range(len(clip))]


def test_labels_are_drawn_and_wrapped():
    clip = flat(128, 3, 64, 64)
    bare = video_io.contact_sheet([clip], scale=1)
    short = video_io.contact_sheet([clip], scale=1, labels=["a red ball"])
    long = video_io.contact_sheet([clip], scale=1, labels=["a red ball rolls left " * 5])
    unbroken = video_io.contact_sheet([clip], scale=1, labels=["x" * 200])
    assert bare.shape[0] < short.shape[0] < long.shape[0]
    assert bare.shape[1] == long.shape[1] == unbroken.shape[1]
    assert short[16:34].min() < 60  # ink
    with pytest.raises(ValueError, match="2 labels for 1 clips"):
        video_io.contact_sheet([clip], labels=["a", "b"])


def test_grid_plays_clips_side_by_side_and_holds_last_frames():
    red, blue, small = flat((255, 0, 0), 6), flat((0, 0, 255), 3), flat((0, 255, 0), 2, 16, 16)
    blue[-1] = 7
    grid = video_io.tile_videos([red, blue, small], gap=2)
    assert grid.shape == (6, 2 + 2 * 34, 2 + 2 * 34, 3)
    assert (grid[:, 2:34, 2:34] == (255, 0, 0)).all()
    assert (grid[:2, 2:34, 36:68] == (0, 0, 255)).all()
    assert (grid[2:, 2:34, 36:68] == 7).all()
    assert (grid[:, 44:60, 10:26] == (0, 255, 0)).all()


def test_nothing_to_show_is_refused():
    for show in (video_io.contact_sheet, video_io.tile_videos):
        with pytest.raises(ValueError, match="at least one"):
            show([])


def test_save_image_is_exact_and_atomic(tmp_path, monkeypatch):
    image = noise(1)[0]
    path = video_io.save_image(tmp_path / "x.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    before = path.read_bytes()

    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        video_io.save_image(path, image[::-1])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
