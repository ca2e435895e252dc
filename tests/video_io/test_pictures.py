"""Both readers show files as players do: upright, square pixels, the right colours, no more."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax import video_io
from sora_jax.data.build.media import Media
from tests.data.build.conftest import write_covered, write_matrix, write_trimmed, write_video


def all_frames(path):
    with Media(path) as media:
        return [frame.rgb() for frame in media.frames()]


def by_build(path):
    frames = np.stack(all_frames(path))
    with Media(path) as media:
        assert (media.info.height, media.info.width) == frames.shape[1:3]
        assert media.info.is_image == (len(frames) == 1)
    return frames


def by_video_io(path):
    info = video_io.probe(path)
    frames = video_io.read_video(path, info=info).frames
    assert (info.num_frames, info.height, info.width) == frames.shape[:3]
    height, width = max(2, info.height // 4), max(2, info.width // 4)
    small = video_io.read_video(path, size=(height, width)).frames
    fitted = np.stack([video_io.fit(frame, (height, width)) for frame in frames])
    assert np.abs(small.astype(int) - fitted).mean() < 3
    return frames


@pytest.fixture(params=[by_build, by_video_io])
def shown(request):
    return request.param


def corners():
    """Red at the top left, green at the top right, blue at the bottom left, then black."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32, 0] = picture[:24, 32:, 1] = picture[24:, :32, 2] = 240
    return picture


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    ],
    ids=["as it is", "clockwise", "upside down", "anticlockwise", "mirrored", "flipped", "both"],
)
def test_turned_and_mirrored_videos_stand_upright(tmp_path, shown, matrix, upright):
    path = write_video(tmp_path / "x.mp4", [corners()] * 2, crf="8", pix_fmt="yuv444p")
    write_matrix(path, *matrix)
    expected = upright(corners()).astype(int)
    frames = shown(path)
    assert frames.shape[1:] == expected.shape
    assert np.abs(frames - expected).mean() < 6


def test_wide_pixels_become_square(tmp_path, shown):
    # PAL at 16:9: a circle of 100 pixels is stored 100 high and 70 wide.
    y, x = np.mgrid[:144, :180]
    disc = ((x - 90) * 64 / 45) ** 2 + (y - 72) ** 2 < 50**2
    frame = np.where(disc[..., None], 255, 0).repeat(3, 2).astype(np.uint8)
    path = write_video(tmp_path / "x.mp4", [frame] * 2, aspect=Fraction(64, 45))
    light = shown(path)[0, ..., 0] > 128
    assert light.shape == (101, 180)
    assert light.any(0).sum() == pytest.approx(light.any(1).sum(), abs=2)


@pytest.mark.parametrize(
    ("size", "red", "blue"),
    [((96, 160), 0.299, 0.114), ((720, 960), 0.2126, 0.0722), ((544, 1280), 0.2126, 0.0722)],
    ids=["BT.601", "BT.709", "BT.709 wide"],
)
def test_untagged_videos_have_the_colours_of_their_size(tmp_path, shown, size, red, blue):
    colour = np.array([200, 60, 30])
    luma = colour @ [red, 1 - red - blue, blue] / 255
    planes = (
        16 + 219 * luma,
        128 + 224 * (colour[2] / 255 - luma) / (2 - 2 * blue),
        128 + 224 * (colour[0] / 255 - luma) / (2 - 2 * red),
    )
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.height, stream.width = size
        for index in range(2):
            frame = av.VideoFrame(stream.width, stream.height, "yuv420p")
            frame.pts = index
            for plane, value in zip(frame.planes, planes, strict=True):
                plane.update(bytes([round(value)]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    middle = shown(tmp_path / "x.mp4")[0, size[0] // 2, size[1] // 2]
    assert np.abs(middle - colour).max() <= 3


def test_a_cover_is_none_of_the_frames(tmp_path, shown):
    plain = write_video(tmp_path / "plain.mp4", [corners()] * 3)
    path = write_covered(tmp_path / "x.mp4", plain)
    with av.open(str(path)) as container:
        assert [s.codec_context.name for s in container.streams.video] == ["png", "h264"]
    np.testing.assert_array_equal(shown(path), shown(plain))
    with pytest.raises(ValueError, match="holds no video") as error:
        shown(write_covered(tmp_path / "cover.mp4", None))
    assert "\n" not in str(error.value)


def test_words_that_are_not_utf_8_are_no_error(tmp_path, shown):
    frames = np.stack([corners()] * 3)
    video_io.write_video(tmp_path / "x.mp4", frames, fps=8, metadata={"prompt": "two words"})
    data = (tmp_path / "x.mp4").read_bytes()
    assert data.count(b"two words") == 1
    path = tmp_path / "latin.mp4"
    path.write_bytes(data.replace(b"two words", b"caf\xe9 noir"))
    np.testing.assert_array_equal(shown(path), shown(tmp_path / "x.mp4"))
    assert video_io.read_metadata(path)["prompt"].startswith("caf")


def test_a_picture_hidden_in_a_jpeg_is_none_of_its_frames(tmp_path, shown):
    picture, gain_map = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (32, 24), "blue")
    picture.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[gain_map])
    frames = shown(tmp_path / "x.jpg")
    assert len(frames) == 1 and frames[..., 0].min() > 240 > 20 > frames[..., 2].max()


def test_the_poster_of_an_animated_png_is_none_of_its_frames(tmp_path, shown):
    poster = Image.new("RGB", (16, 16), "blue")
    frames = [Image.new("RGB", (16, 16), (red, 0, 0)) for red in (50, 100, 150)]
    for count in (3, 1):
        options = {"append_images": frames[:count], "default_image": True, "duration": 100}
        poster.save(tmp_path / "x.png", save_all=True, **options)
        assert shown(tmp_path / "x.png")[:, 0, 0].tolist() == [
            [red, 0, 0] for red in (50, 100, 150)[:count]
        ]


def test_sixteen_bits_of_grey_become_eight(tmp_path, shown):
    grey = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    Image.fromarray(grey).save(tmp_path / "x.png")
    expected = np.rint(grey / 257)[..., None].repeat(3, axis=-1)
    np.testing.assert_array_equal(shown(tmp_path / "x.png")[0], expected)
    Image.fromarray(grey).save(tmp_path / "x.png", transparency=int(grey[5, 7]))
    expected[5, 7] = 255
    np.testing.assert_array_equal(shown(tmp_path / "x.png")[0], expected)


@pytest.mark.parametrize("start", [1.2, 1.22, 0.4])
def test_what_an_edit_list_hides_is_not_shown(tmp_path, shown, start):
    frames = [np.full((48, 64, 3), 2 * i, np.uint8) for i in range(100)]
    whole = write_video(tmp_path / "whole.mp4", frames, fps=25, gop=50)
    first = math.ceil(start * 25)
    left = shown(write_trimmed(whole, tmp_path / "x.mp4", start))
    assert len(left) == 100 - first
    assert np.abs(left.mean((1, 2, 3)) - 2 * np.arange(first, 100)).max() < 2
    part = video_io.read_video(tmp_path / "x.mp4", start=1.0, num_frames=3).frames
    np.testing.assert_array_equal(part, by_video_io(tmp_path / "x.mp4")[25:28])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of what it can pass over
@pytest.mark.parametrize("read", [all_frames, video_io.read_video])
@pytest.mark.parametrize("name", ["x.gif", "x.jpg", "x.png", "x.webp"])
def test_whatever_is_damaged_is_told_in_one_line(tmp_path, read, name):
    rng = np.random.default_rng(0)
    first, *others = (Image.fromarray(f) for f in rng.integers(0, 256, (3, 24, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a picture", {0x9003: "2020:01:01"}
    moving = {"save_all": True, "append_images": others, "duration": 50}
    first.save(tmp_path / name, **({"exif": exif} if name == "x.jpg" else moving))
    whole = (tmp_path / name).read_bytes()
    for _ in range(80):
        data = bytearray(whole)
        for at in rng.integers(4, rng.choice([200, len(data)]), rng.integers(1, 9)):
            data[at] = rng.choice([0, 1, 255, rng.integers(256)])
        (tmp_path / name).write_bytes(data[: rng.choice([len(data), rng.integers(5, len(data))])])
        try:
            read(tmp_path / name)
        except ValueError as error:
            assert "\n" not in str(error)
