"""Inputs: what is found and what it is called, captions of every form, one line for mistakes."""

import json
import os
from pathlib import Path

import pytest

from sora_jax.data.build.inputs import InputFile, check_captions, find_inputs


@pytest.fixture
def videos(tmp_path):
    root = tmp_path / "videos"
    for name in ("b.mp4", "a/z.MKV", "a/p.png", "a/notes.doc", ".hidden.mp4", ".cache/x.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def keys(source, **options):
    return [file.key for file in find_inputs(str(source), **options)]


def test_a_folder_a_pattern_and_a_file_name_the_same_keys(videos):
    assert keys(videos) == ["a/p.png", "a/z.MKV", "b.mp4"]
    assert keys(f"{videos}/**/*") == keys(videos)
    assert keys(f"{videos}/**/**/*") == keys(videos)
    assert keys(f"{videos}/*/z*") == ["a/z.MKV"]
    assert keys(videos / "a" / "z.MKV") == ["z.MKV"]


def test_a_list_names_files_relative_to_itself_or_anywhere(videos, tmp_path):
    chosen = videos / "chosen.txt"
    chosen.write_text(f"# mine\n\na/z.MKV\n{videos}/b.mp4\n")
    assert keys(chosen) == ["a/z.MKV", "b.mp4"]
    (tmp_path / "other").mkdir()
    elsewhere = tmp_path / "other" / "list.txt"
    elsewhere.write_text(f"../videos/a/z.MKV\n{videos}/b.mp4\n")
    assert keys(elsewhere) == ["a/z.MKV", "b.mp4"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_manifest_gives_captions_and_stretches(videos, suffix):
    (videos / "b.txt").write_text("from the sidecar")
    rows = [
        {"path": "b.mp4", "caption": "one, two", "captions": None, "start": None, "end": 2.5},
        {"path": "b.mp4", "caption": "three", "captions": None, "start": 2.5, "end": None},
        {"path": "b.mp4", "caption": "four", "captions": None, "start": 2.5, "end": None},
        {"path": "b.mp4", "caption": None, "captions": None, "start": None, "end": None},
        {"path": "a/z.MKV", "caption": None, "captions": ["x", "y"], "start": None, "end": None},
    ]
    path = videos / f"set{suffix}"
    if suffix == ".csv":
        lines = ["path,caption,captions,start,end"]
        lines += ['b.mp4,"one,\n two",,,2.5', "b.mp4,three,,2.5,", "b.mp4,four,,2.5,", "b.mp4,,,,"]
        path.write_text("\n".join([*lines, 'a/z.MKV,,"[""x"", ""y""]",,']), "utf-8-sig")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    b, z = str(videos / "b.mp4"), str(videos / "a" / "z.MKV")
    assert find_inputs(str(path)) == [
        InputFile(z, "a/z.MKV", (("manifest", "x"), ("manifest", "y"))),
        InputFile(b, "b.mp4", (("sidecar", "from the sidecar"),)),
        InputFile(b, "b.mp4@0-2.5", (("manifest", "one, two"),), None, 2.5),
        InputFile(b, "b.mp4@2.5-", (("manifest", "three"), ("manifest", "four")), 2.5, None),
    ]


@pytest.mark.parametrize(
    ("name", "text", "captions"),
    [
        ("b.txt", " a  dog\nruns ", [("sidecar", "a dog runs")]),
        ("b.txt", " \n", []),
        ("b.json", '{"caption": "a dog"}', [("sidecar", "a dog")]),
        (
            "b.json",
            '{"captions": {"short": "dog", "detailed": "a dog runs"}}',
            [("short", "dog"), ("detailed", "a dog runs")],
        ),
        ("b.json", '{"captions": ["x", "y"]}', [("sidecar", "x"), ("sidecar", "y")]),
        ("b.json", '["x", "", "y"]', [("sidecar", "x"), ("sidecar", "y")]),
        ("b.json", '{"prompt": "another program\'s"}', []),
        *(("b.json", value, []) for value in ("null", "5", "true")),
        ("b.txt", "\ufeffa dog", [("sidecar", "a dog")]),
        ("b.json", '\ufeff{"caption": "a dog"}', [("sidecar", "a dog")]),
        ("b.json", '{"captions": {"k\\ud83d": "half \\ude00 a face"}}', [("k", "half a face")]),
    ],
)
def test_sidecars_hold_captions_in_every_form(videos, name, text, captions):
    (videos / name).write_text(text, "utf-8")
    assert find_inputs(str(videos))[-1].captions == tuple(captions)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("b.json", "{", r"b\.json: Expecting .*; write \{\"caption\": TEXT\}"),
        ("b.json", '{"captions": [3]}', r"b\.json: a caption is int, not text"),
        ("b.txt", b"\xff\xfe\x00", r"b\.txt: the caption is not UTF-8"),
    ],
)
def test_a_damaged_sidecar_is_named(videos, name, text, line):
    (videos / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=line) as error:
        find_inputs(str(videos))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("m.csv", "path\nb.mp4\ngone.mp4\n", r"row 2: no such file .*gone\.mp4 \(1 of 2 rows\)"),
        ("m.csv", "file\nb.mp4\n", r"row 1 has no path \(columns: file\)"),
        ("m.csv", "path,start,end\nb.mp4,3,2\n", "row 1: end 2 is not after start 3"),
        ("m.csv", "path,start\nb.mp4,-1\n", "row 1: start '-1' is not a number of seconds"),
        ("m.csv", "path\na/notes.doc\n", r"notes\.doc is no video or image \(1 of 1 rows\)"),
        ("m.csv", "path\n", "no readable video found"),
        ("m.csv", "path,caption\nb.mp4,A dog, running\n", "row 1 has more fields than .* quotes"),
        ("m.csv", f"path,caption\nb.mp4,x\nb.mp4,{'x' * 140_000}", "row 2: field larger than"),
        ("m.csv", "path\nhttps://example.com/b.mp4\n", "https://.*: no files are read .* gs://"),
        ("m.jsonl", '{"path": "b.mp4"}\n{', "line 2 is not JSON"),
        ("m.jsonl", "[1]", "line 1 is not a JSON object"),
        ("m.jsonl", '{"path": "b.mp4", "caption": 3}', "row 1: a caption is int"),
        ("m.parquet", "PAR", "not a Parquet file"),
        ("m.txt", "gone.mp4", r"line 1: no such file .*gone\.mp4"),
    ],
)
def test_a_mistake_in_a_manifest_is_one_line_that_names_its_row(videos, name, text, line):
    (videos / name).write_text(text)
    with pytest.raises(ValueError, match=line) as error:
        find_inputs(str(videos / name))
    assert "\n" not in str(error.value)
    assert name in str(error.value) or "https" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.jsonl", '{"path": "b.mp4", "caption": "one\u2028two\u0085three"}\r\n'),
        ("m.csv", " path , caption\r\nb.mp4,one two three,\r\n"),
    ],
)
def test_lines_end_where_their_program_ends_them_and_columns_may_have_blanks(videos, name, text):
    (videos / name).write_bytes(text.encode())
    (file,) = find_inputs(str(videos / name))
    assert (file.key, file.captions) == ("b.mp4", (("manifest", "one two three"),))


def test_a_name_with_a_line_separator_is_one_name_in_a_list(videos):
    (videos / "one\u2028two.mp4").touch()
    (videos / "m.txt").write_text("one\u2028two.mp4\n# b.mp4\n", "utf-8")
    assert keys(videos / "m.txt") == ["one\u2028two.mp4"]


def test_a_name_that_is_not_utf8_is_told(videos):
    Path(os.fsdecode(bytes(videos) + b"/caf\xe9.mp4")).touch()
    with pytest.raises(ValueError, match=r"caf\\xe9\.mp4: its name is not UTF-8; rename it\.$"):
        find_inputs(str(videos))


def test_nothing_to_read_is_one_line(tmp_path):
    (tmp_path / "notes.doc").touch()
    for source, line in [
        (tmp_path, "no readable video found"),
        (tmp_path / "*.mp4", "no readable video found"),
        (tmp_path / "notes.doc", "no readable video found"),
        (tmp_path / "gone", "no such file or folder"),
        ("https://example.com/b.mp4", "no files are read or written there"),
    ]:
        with pytest.raises(ValueError, match=line):
            find_inputs(str(source))


def test_folders_that_are_links_are_told(videos, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "videos").symlink_to(videos)
    with pytest.raises(ValueError, match="folders that are links are not entered"):
        find_inputs(str(tmp_path / "links"))


def test_an_input_never_takes_in_the_output(videos, tmp_path):
    with pytest.raises(ValueError, match="takes in the output folder"):
        find_inputs(str(videos), out=str(videos / "out"))
    with pytest.raises(ValueError, match="lies in the output folder"):
        find_inputs(f"{tmp_path}/*/*.mp4", out=str(videos))
    (tmp_path / "link").symlink_to(videos)
    with pytest.raises(ValueError, match="lies in the output folder"):
        find_inputs(str(videos / "b.mp4"), out=str(tmp_path / "link"))
    assert find_inputs(str(videos), out=str(tmp_path / "videos2"))


def test_missing_captions_are_counted_unless_allowed(videos):
    (videos / "b.txt").write_text("a dog")
    files = find_inputs(str(videos))
    with pytest.raises(ValueError, match=r"2 of 3 files have no caption .*--captions drop"):
        check_captions(files, "error")
    check_captions(files, "drop")
    check_captions(files, "allow")
    check_captions(files[-1:], "error")
    with pytest.raises(ValueError, match="use one of error, drop, allow"):
        check_captions(files, "skip")
