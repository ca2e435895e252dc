"""Writers are found by name; endpoints are asked as they expect; trouble with them is one line."""

import contextlib
import json
import socket
import threading
import time

import pytest

from sora_jax.prompts import writers
from sora_jax.prompts.writers import ask_endpoint, clean, expand, make_writer

LONG = "A red ball rolls left across a snowy field at dawn, low light, the camera stays still."


def one_line(error):
    text = str(error.value)
    return text if "\n" not in text and len(text) < 600 else pytest.fail(text)


def completion(content, finish="stop", **message):
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    return json.dumps({"choices": [choice]}).encode()


def test_an_endpoint_is_asked_for_a_chat_completion(server, monkeypatch):
    server.answers = [f' "{LONG}"\n']
    assert make_writer(f"{server.url}#tiny/model")("red ball") == LONG
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    make_writer(f"{server.url}/#m", picture=True)("x")
    (path, headers, body), (_, with_key, of_picture) = server.asked
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert headers["User-Agent"].startswith("sora_jax/")
    assert body["model"] == "tiny/model"
    assert body["messages"] == [
        {"role": "system", "content": writers.VIDEO},
        {"role": "user", "content": "red ball"},
    ]
    assert "Authorization" not in headers and with_key["Authorization"] == "Bearer secret"
    assert of_picture["messages"][0]["content"] == writers.PICTURE != writers.VIDEO


def test_the_instruction_asks_for_what_a_prompt_needs():
    for word in ("one paragraph", "subject", "action", "place", "light", "camera", "Keep"):
        assert word in writers.VIDEO
    assert "{" not in writers.VIDEO + writers.PICTURE


@pytest.mark.parametrize("trouble", [(503, b"busy"), (429, b"slow down"), (None, b""), 1.0])
def test_a_server_that_is_not_ready_is_asked_again_once(server, trouble):
    server.answers = [trouble, LONG]
    assert ask_endpoint(server.url, "m", "i", "p", timeout=0.5) == LONG
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("answer", "times", "words"),
    [
        ((500, b"<html>oh</html>"), 2, "refused, status 500: Internal Server Error"),
        ((401, b'{"error": {"message": "no such\\nkey."}}'), 1, "status 401: no such key."),
        ((404, b'{"error": "model \'m\' not found"}'), 1, "status 404: model 'm' not found."),
        ((404, b'{"error": {}}'), 1, "status 404: Not Found"),
        (0.7, 2, "gave no answer in 0.3 s, asked twice"),
        ((None, b""), 2, "cannot be reached (Remote end closed connection"),
        ((200, b"<html>\n\x1b[31mhello"), 1, "no chat completion but '<html> [31mhello'"),
        ((200, b""), 1, "no chat completion but 'no reason given'"),
        ((200, b"\xff\xfe"), 1, "no chat completion"),
        ((200, b"[]"), 1, "no chat completion"),
        ((200, b"[" * 100_000), 1, "no chat completion"),
        ((400, b"[" * 50_000), 1, "status 400: Bad Request"),
        ((200, b'{"choices": []}'), 1, "no chat completion"),
        ((200, b'{"choices": [{"message": "x"}]}'), 1, "no chat completion"),
        ((200, b'{"choices": [7]}'), 1, "no chat completion"),
        ((200, completion(None)), 1, "answered without text"),
        ((200, completion([{"text": "x"}])), 1, "answered without text"),
        ((200, completion([{"type": "text", "text": 7}, "x"])), 1, "answered without text"),
        ((200, completion("A red ball that rolls", finish="length")), 1, "broke off within its"),
        ((200, completion(None, refusal="I can't\nhelp.")), 1, "write the prompt: I can't help."),
        ((200, completion("x", finish="content_filter")), 1, "refused to write the prompt: filt"),
        ((200, b" " * (1 << 20) + b"{}"), 1, "answered more than a mebibyte"),
    ],
)  # fmt: skip
def test_trouble_with_an_endpoint_is_told_in_one_line(server, answer, times, words, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answers = [answer]
    with pytest.raises(ValueError) as error:
        ask_endpoint(server.url, "m", "i", "p", timeout=0.3 if answer == 0.7 else 20.0)
    text = one_line(error)
    assert words in text and server.url in text and "secret" not in text
    assert text.isprintable() and len(server.asked) == times


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (completion([{"type": "text", "text": "A red "}, {"type": "text", "text": "ball."},
                     {"type": "image_url", "text": "x"}]), "A red ball."),
        (completion("A ball of 1.5 m. It rolls! It rolls and", finish="length"),
         "A ball of 1.5 m. It rolls!"),
        (completion('"A red ball."', finish="length"), '"A red ball."'),
        (completion("A red ball", finish="stop"), "A red ball"),
    ],
)  # fmt: skip
def test_the_text_of_an_answer_is_found(server, answer, text):
    server.answers = [(200, answer)]
    assert ask_endpoint(server.url, "m", "i", "p", timeout=20.0) == text


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nA:",
                                   b"HTTP/1.1 400 No\r\n\r\n"])  # fmt: skip
def test_an_answer_in_drops_ends_at_the_timeout(server, begin):
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def drip():
        for _ in range(2):
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: nobody asks again
                return
            connection.recv(1 << 16)
            connection.sendall(begin)
            with connection, contextlib.suppress(OSError):  # of who asked and went away
                for _ in range(60):
                    connection.sendall(b" ")
                    time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"gave no answer in 0\.3 s|refused, status 400: No\."):
        ask_endpoint(f"http://127.0.0.1:{port}/v1", "m", "i", "p", timeout=0.3)
    assert time.monotonic() - started < 2.7  # two tries, the pause between them, and no 3 s
    listener.close()


def test_nobody_there_is_told(server):
    server.close()
    with pytest.raises(ValueError, match=r"cannot be reached .*refused.*is it running"):
        ask_endpoint(server.url, "m", "i", "p", timeout=1.0)
    with pytest.raises(ValueError, match="cannot be reached"):
        ask_endpoint("http://nobody.invalid/v1", "m", "i", "p", timeout=1.0)


def test_the_key_stays_with_the_host_that_was_named(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answers = [(302, server.url.replace("127.0.0.1", "localhost")), LONG]
    ask_endpoint(server.url, "m", "i", "p", timeout=5.0)
    first, second = (headers for _, headers, _ in server.asked)
    assert "secret" in str(first) and "secret" not in str(second)


def test_a_key_that_is_none_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as error:
        ask_endpoint(server.url, "m", "i", "p")
    assert "ret" not in str(error.value).replace("characters", "") and not server.asked


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("http://localhost:8000/v1", "write http(s)://HOST/v1#MODEL"),
        ("http://localhost:8000/v1#", "write http(s)://HOST/v1#MODEL"),
        ("https://#m", "write http(s)://HOST/v1#MODEL"),
        ("http://h:port/v1#m", "write http(s)://HOST/v1#MODEL"),
        ("http://[::1/v1#m", "write http(s)://HOST/v1#MODEL"),
        ("http://user:word@host/v1#m", "write http(s)://HOST/v1#MODEL"),
        ("http://host/v1?x=1#m", "write http(s)://HOST/v1#MODEL"),
        ("ftp://host/v1#m", "neither paperworld, nor http(s)://HOST/v1#MODEL, nor a folder"),
        ("paperwrld", "neither paperworld"),
        ("", "neither paperworld"),
    ],
)
def test_a_writer_that_does_not_exist_is_refused(spec, words):
    with pytest.raises(ValueError) as error:
        make_writer(spec)
    assert words in one_line(error)


def test_auto_is_the_built_in_writer_for_the_shipped_checkpoint_alone():
    sentence = "a red ball rolls left in the snow"
    for checkpoint in ("paperworld", "sora_jax/weights/paperworld"):
        assert make_writer("auto", checkpoint=checkpoint)("red ball rolling left, snow") == sentence
    assert make_writer("paperworld", checkpoint="x")("red ball rolling left, snow") == sentence
    with pytest.raises(ValueError) as error:
        make_writer("auto", checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert "no writer is built in for checkpoint Wan-AI" in one_line(error)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("  A red\n\nball.\t ", "A red ball."),
        ('"A red ball."', "A red ball."),
        ("\u201cA red ball.\u201d", "A red ball."),
        ("**'A red ball.'**", "'A red ball.'"),
        ('"Red" and "ball"', '"Red" and "ball"'),
        ("Tom's ball isn't red", "Tom's ball isn't red"),
        ("<think>hm,\nred?</think>\nA red ball.", "A red ball."),
        ("A \x1b[31mred\x00 ball\ud800.", "A [31mred ball."),
    ],
)
def test_answers_are_cleaned(answer, text):
    assert clean(answer) == text


@pytest.mark.parametrize("answer", ["", " \n", '""', "<think>and on and on", "x" * 2001])
def test_answers_that_are_no_paragraph_are_refused(answer):
    with pytest.raises(ValueError) as error:
        clean(answer)
    assert "the writer of prompts answered" in one_line(error)


def test_what_a_writer_puts_in_brackets_is_text():
    def written(text, prompt="x"):
        return expand(prompt, lambda _: text)

    assert written("a ball (orange)") == "a ball (orange)"
    assert written("a ball (red:2)") == r"a ball \(red:2\)"
    assert written("a ball (red:2") == r"a ball \(red:2"
    assert written("[0s-5s] a ball [5s] stays") == "a ball stays"
    asked = []
    expand(r"a \(small\) ball", lambda prompt: asked.append(prompt) or "x")
    assert asked == ["a (small) ball"]


def test_time_stamped_prompts_are_expanded_segment_by_segment():
    prompt = "[0s-1s] red ball rolls left, snow [1.5s-2s] red ball stays, snow"
    assert expand(prompt, make_writer("paperworld")) == (
        "[0s-1s] a red ball rolls left in the snow [1.5s-2s] a red ball stays still in the snow"
    )


def test_weights_are_not_lost_unsaid():
    with pytest.raises(ValueError) as error:
        expand("(red:1.4) ball", make_writer("paperworld"))
    assert "has weights, and expanding changes the words" in one_line(error)
