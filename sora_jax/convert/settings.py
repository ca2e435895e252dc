"""Whether the settings in a checkpoint's JSON files are of the types that they must be."""

import json
from collections.abc import Collection, Mapping
from typing import Any

_SHOWN = 60  # characters of a wrong value
# By the type of an example; bool is before int, which it is one of.
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "a number or null",
}


def checked(
    values: Mapping[str, Any],
    example: Mapping[str, Any],
    *,
    source: Any,
    nullable: Collection[str] = (),
) -> dict[str, Any]:
    """`values`, having checked that each is of the type that it has in `example`.

    A whole number in place of another becomes one. None in `example` is a number that there may
    be; an empty list is one of numbers. What `example` lacks stays as it is.

    Args:
      source: the file, for the message.
      nullable: what may be null too.

    Raises:
      ValueError: one line: the file, the setting, what is there, what may be.
    """
    made = dict(values)
    for name in example.keys() & values.keys():
        value, like = values[name], example[name]
        if value is None and name in nullable:
            continue
        if not _fits(value, like):
            what = (
                f"a list with {_words(like[0])} each" if _is_list(like) and like else _words(like)
            )
            raise ValueError(
                f"{source}: {name} is {json.dumps(value)[:_SHOWN]}; give {what}, or copy or export "
                "the file again."
            )
        if isinstance(like, float):
            made[name] = float(value)
    return made


def _words(like: Any) -> str:
    return "a list of numbers" if _is_list(like) else _WORDS[type(like)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _fits(value: Any, like: Any) -> bool:
    if _is_list(like):
        first = like[0] if len(like) else 0.0
        return _is_list(value) and all(_fits(item, first) for item in value)
    if isinstance(like, bool | str):
        return isinstance(value, type(like))
    number = isinstance(value, int if isinstance(like, int) else int | float)
    return (number and not isinstance(value, bool)) or (like is None and value is None)
