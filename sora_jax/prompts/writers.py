"""Writers: what makes a detailed prompt of a short one; which of them is chosen by a word.

- "paperworld": the rules of `sora_jax.prompts.paperworld`, for models of that world;
- "http://HOST/v1#MODEL" or "https://...": an OpenAI-compatible endpoint, asked for a chat
  completion, with the key in the environment variable OPENAI_API_KEY where that is set;
- a folder: a causal language model of `transformers`, run here (extra `prompts`).
"""

import functools
import http.client
import json
import os
import queue
import re
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sora_jax import __version__
from sora_jax.prompts import timed, weighted

Writer = Callable[[str], str]
T = TypeVar("T")

AUTO = "auto"
INSTRUCTION = (
    "You write prompts for a model that makes {what} from text. The user gives a short "
    "description. Rewrite it as one paragraph of detailed English, of {length}: the subject and "
    "its looks, the action, the place, the light, and the camera. Keep everything the user said as "
    "it is, names and quoted words too, and contradict none of it; invent only what is missing. "
    "Describe what is seen, not what it means. Answer with the paragraph alone: no title, no list, "
    "no quotation marks, no remarks."
)
VIDEO = INSTRUCTION.format(what="a video", length="80 to 120 words")
PICTURE = INSTRUCTION.format(what="a picture", length="50 to 80 words, with nothing that moves")
LONGEST = 2000  # characters of an answer
TIMEOUT = 60.0  # seconds for an answer
_PAUSE = 1.0  # seconds before the second try
_MOST_BYTES = 1 << 20  # of an answer, its JSON around it
_ASK_AGAIN = (408, 429, 500, 502, 503, 504)  # statuses of a server that may be well in a moment
_SENTENCES = re.compile(r".*[.!?][\"'\u201d\u2019*]*(?=\s|$)", re.DOTALL)  # whole ones
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_QUOTES = (
    *(('"', '"'), ("'", "'"), ("`", "`"), ("**", "**")),
    *(("\u201c", "\u201d"), ("\u2018", "\u2019"), ("\u00ab", "\u00bb")),
)


def make_writer(spec: str, *, checkpoint: str = "paperworld", picture: bool = False) -> Writer:
    """The writer that `spec` names.

    Args:
      spec: see this module; or "auto", the one that fits `checkpoint` without further ado.
      picture: asks for a picture's description instead of a video's.

    Raises:
      ValueError: no such writer, or one that cannot work here; one line.
    """
    if spec == AUTO:
        if Path(checkpoint).name != "paperworld":
            raise ValueError(
                f"no writer is built in for checkpoint {checkpoint}; name one: "
                "--expand-prompt http(s)://HOST/v1#MODEL, a folder of a language model, or "
                "paperworld for models of that world."
            )
        spec = "paperworld"
    if spec == "paperworld":
        from sora_jax.prompts import paperworld

        return functools.partial(paperworld.rewrite, picture=picture)
    instruction = PICTURE if picture else VIDEO
    if spec.startswith(("http://", "https://")):
        url, model = _endpoint(spec)
        ask = functools.partial(ask_endpoint, url, model, instruction)
    elif spec and Path(spec).is_dir():
        from sora_jax.prompts import causal

        ask = functools.partial(causal.load(spec), instruction)
    else:
        raise ValueError(
            f"--expand-prompt {spec}: neither paperworld, nor http(s)://HOST/v1#MODEL, nor a "
            "folder of a language model."
        )
    return lambda prompt: clean(ask(prompt))


def expand(prompt: str, writer: Writer) -> str:
    """`prompt` in the words of `writer`; of a time-stamped prompt, each segment in its own.

    What the writer puts in parentheses or brackets is text, no weights and no time stamps.

    Raises:
      ValueError: the prompt has weights, which belong to words that would go; or by the writer.
    """
    if timed.is_timed(prompt):
        segments = timed.split(prompt)
        return timed.render([s._replace(text=expand(s.text, writer)) for s in segments])
    if weighted.is_weighted(prompt):
        raise ValueError(
            f"{prompt!r} has weights, and expanding changes the words they belong to; leave out "
            "--expand-prompt, or weigh words of an expanded prompt."
        )
    text = "".join(span.text for span in weighted.parse(prompt))
    return weighted.literal(timed.without_stamps(writer(text)))


def clean(answer: str) -> str:
    """The paragraph in a language model's answer: no thoughts, quotation marks or line breaks.

    Raises:
      ValueError: nothing is left, too much, or what is no text; one line.
    """
    text = " ".join(_THOUGHTS.sub(" ", answer).split())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))
    for first, last in _QUOTES:
        inner = text.removeprefix(first).removesuffix(last)
        if len(text) - len(inner) == len(first) + len(last) and first not in inner:
            text = inner.strip()
    if not text:
        raise ValueError("the writer of prompts answered nothing; try again, or another writer.")
    if len(text) > LONGEST:
        raise ValueError(
            f"the writer of prompts answered {len(text):,} characters, allowed are {LONGEST:,}; it "
            "does not keep to a paragraph: try another model."
        )
    return text


def ask_endpoint(
    url: str, model: str, instruction: str, prompt: str, *, timeout: float = TIMEOUT
) -> str:
    """The answer of an OpenAI-compatible server to `prompt`; it is asked twice at most.

    Args:
      url: of the API, such as "http://localhost:8000/v1".
      timeout: seconds for an answer.

    Raises:
      ValueError: no answer, a refusal, or one that is no chat completion; one line.
    """
    messages = [
        {"role": "system", "content": instruction},
        {"role": "user", "content": prompt},
    ]
    body = json.dumps({"model": model, "messages": messages}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", data=body, method="POST")
    request.add_header("Content-Type", "application/json")
    request.add_header("User-Agent", f"sora_jax/{__version__}")  # some turn urllib's away
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        if not (key.isascii() and key.isprintable()):  # urllib's own error would show it
            raise ValueError("OPENAI_API_KEY holds characters that no key has; set it again.")
        # Unredirected: another host than the one that was named does not get the key.
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        data = _fetch(request, timeout)
    except urllib.error.HTTPError as error:
        try:
            detail = _within(timeout, functools.partial(_error_message, error))
        except TimeoutError:
            detail = _line(error.reason)
        raise ValueError(f"{url} refused, status {error.code}: {detail}.") from error
    except TimeoutError as error:
        raise ValueError(f"{url} gave no answer in {timeout:g} s, asked twice.") from error
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = _line(getattr(error, "reason", None) or error)
        raise ValueError(f"{url} cannot be reached ({reason}); is it running?") from error
    return _content(data, url)


def _endpoint(spec: str) -> tuple[str, str]:
    """(URL, model) of "http(s)://HOST/v1#MODEL"."""
    url, _, model = spec.partition("#")
    try:
        parts = urllib.parse.urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
        valid = valid and not parts.query and not any(c.isspace() for c in url)
    except ValueError:  # a port that is no number, a bracket without its partner
        valid = False
    if not (valid and model):
        raise ValueError(
            f"--expand-prompt {spec}: write http(s)://HOST/v1#MODEL, such as "
            "http://localhost:8000/v1#my-model; the key goes into OPENAI_API_KEY."
        )
    return url.rstrip("/"), model


def _fetch(request: urllib.request.Request, timeout: float) -> bytes:
    """The body of the answer; a second try where the first found nobody, or nobody ready."""
    for last in (False, True):
        try:
            return _within(timeout, functools.partial(_read, request, timeout))
        except urllib.error.HTTPError as error:
            if last or error.code not in _ASK_AGAIN:
                raise
            error.close()
        except (OSError, http.client.HTTPException) as error:
            if last:
                # urllib wraps what happens before the answer begins, and nothing later.
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    raise error.reason from error
                raise
        time.sleep(_PAUSE)
    raise AssertionError


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; it is left alone after `seconds`.

    A socket's own limit is of each piece that comes, and a server may send them for ever.

    Raises:
      TimeoutError: it took longer.
    """
    done: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:  # raised where it is waited for
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _read(request: urllib.request.Request, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    with urllib.request.urlopen(request, timeout=timeout) as response:
        data = b""
        while part := response.read1(1 << 16):
            data += part
            if len(data) > _MOST_BYTES:
                raise ValueError(f"{request.full_url} answered more than a mebibyte.")
            if time.monotonic() > deadline:  # nobody waits for it any more
                raise TimeoutError
        return data


def _content(data: bytes, url: str) -> str:
    """The text of a chat completion; of one that was broken off, its whole sentences."""
    try:
        choice = json.loads(data)["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        begin = _line(data[:80].decode("utf-8", errors="replace"))
        raise ValueError(
            f"{url} answered no chat completion but {begin!r}; give the URL that ends before "
            "/chat/completions."
        ) from error
    if refusal or choice.get("finish_reason") == "content_filter":
        raise ValueError(f"{url} refused to write the prompt: {_line(refusal or 'filtered')}.")
    if isinstance(content, list):
        parts = (part for part in content if isinstance(part, dict) and part.get("type") == "text")
        content = "".join(text for part in parts if isinstance(text := part.get("text"), str))
    if not isinstance(content, str) or not content:
        raise ValueError(f"{url} answered without text; try another model.")
    if choice.get("finish_reason") == "length":
        whole = _SENTENCES.match(content)
        if whole is None:
            raise ValueError(
                f"{url} broke off within its first sentence; allow it more tokens, or try another "
                "model."
            )
        return whole[0]
    return content


def _error_message(error: urllib.error.HTTPError) -> str:
    """What the body of an error says, or its status."""
    try:
        body = json.loads(error.read(1 << 16))
        detail = body["error"]
        return _line(detail["message"] if isinstance(detail, dict) else detail)
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError):
        return _line(error.reason)


def _line(reason: object) -> str:
    """In one line of printable characters, not too long."""
    text = " ".join(str(reason).split())
    return "".join(c for c in text if c.isprintable())[:200].rstrip(".") or "no reason given"
