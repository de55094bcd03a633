"""Rows as people have them, to chats: a format is a row of `FORMATS`, found by its columns."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from upcycle.errors import UpcycleError, nearest
from upcycle.reading import brief, parse_json
from upcycle.records.record import ALL
from upcycle.settings import COLUMNS, Source

MISSPELT = 0.75
"""How alike a column must be to one of ours to be taken for a slip."""
ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTS = ("system", "developer")
CALL = "function_call"
"""ShareGPT's speaker and OpenAI's former field, to a call of a tool."""
SAID_BY = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", CALL), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""ShareGPT's speakers, with LLaMA-Factory's and axolotl's, to roles."""

Message = dict[str, Any]
"""`role` and `content`; of an answer perhaps `weight` or `train`, which say whether it is learned."""
SPELL = json.JSONEncoder(ensure_ascii=False).encode
Values = Mapping[str, Any]
"""A row as it was read."""


class UnusableError(UpcycleError):
    """A row that cannot be trained on."""

    def __init__(self, where: str, reason: str, detail: str) -> None:
        """
        Args:
            reason: what it is counted under.
            detail: what was found in this row, and what was expected.
        """
        super().__init__(f"{where}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Row:
    """A chat: its messages, its domain label, and where it was read."""

    messages: tuple[Message, ...]
    domain: str
    where: str
    tools: tuple[Any, ...] = ()
    """Schemas that the chat template shows to the model."""
    unread: frozenset[str] = frozenset()
    """Further fields, which mean nothing here."""

    @cached_property
    def spelt(self) -> str:
        """The messages as JSON."""
        return SPELL(self.messages)

    @property
    def question(self) -> str:
        """Everything before the first answer to a user: what training and held-out rows must not share.

        System messages do not count where a user asks: others ask the same thing without them.
        """
        before, asked = [], False
        for message in self.messages:
            if message["role"] == "assistant" and asked:
                break
            asked = asked or message["role"] == "user"
            before.append(message)
        said = [message for message in before if message["role"] not in INSTRUCTS] if asked else before
        return "\n".join(message["content"] or "" for message in said)

    @property
    def has_answer(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Format:
    """How a chat is spelt."""

    title: str
    needs: tuple[str, ...]
    """Columns that it is known by."""
    messages: Callable[[Values], list[Any]]
    also: tuple[str, ...] = ()
    """Columns that it may have."""

    @property
    def expected(self) -> str:
        named = " and ".join(f"'{column}'" for column in self.needs)
        return "an object with a non-empty 'messages' list" if self.needs == ("messages",) else named


def _chat(values: Values) -> list[Any]:
    turns = _listed(values["messages"], "messages")
    return _with_system(values, [_of_former_role(turn) for turn in turns])


def _of_former_role(turn: Any) -> Any:
    """OpenAI's results of `function_call` have a role of their own."""
    return {**turn, "role": "tool"} if isinstance(turn, dict) and turn.get("role") == "function" else turn


def _sharegpt(values: Values) -> list[Any]:
    """`from` and `value`, or `role` and `content`, or as some have it, one of each."""
    turns = _listed(values["conversations"], "conversations")
    return _with_system(values, [_turn(turn) if isinstance(turn, dict) else turn for turn in turns])


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    said_by, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if said_by == CALL and isinstance(said, str) and isinstance(_parsed(said), dict | list):
        return {"role": "assistant", CALL: said, **rest}
    return {"role": SAID_BY.get(str(said_by).lower(), said_by), "content": said, **rest}


def _prompt_completion(values: Values) -> list[Any]:
    """Texts, or lists of messages, as TRL documents them."""
    asked, said = values["prompt"], values["completion"]
    return _with_system(values, [*_side(asked, "user", "prompt"), *_side(said, "assistant", "completion")])


def _side(value: Any, role: str, column: str) -> list[Any]:
    if isinstance(value, str) and value.startswith('[{"'):  # messages in a CSV cell, or a text that is JSON
        if value.startswith(('[{"role"', '[{"from"')):
            return _listed(value, column)
        found = _parsed(value)
        if isinstance(found, list) and all(isinstance(turn, dict) and "role" in turn for turn in found):
            return found
    return _listed(value, column) if isinstance(value, list) else [{"role": role, "content": value}]


def _parsed(value: Any) -> Any:
    """What a text spells, if that is JSON."""
    try:
        return parse_json(value, "") if isinstance(value, str) else value
    except UpcycleError:
        return value


def _alpaca(values: Values) -> list[Any]:
    """Instruction and input on lines of their own; `history` has pairs of earlier turns (LLaMA-Factory)."""
    given = {name: values.get(name) for name in ("instruction", "input")}
    if odd := next((name for name, text in given.items() if not isinstance(text, str | None)), None):
        raise UpcycleError(f"'{odd}' is {brief(given[odd])}, expected a text")
    asked = "\n".join(text for text in given.values() if text)
    pairs = _listed(values.get("history") or [], "history")
    if odd_pair := next((pair for pair in pairs if not isinstance(pair, list) or len(pair) != 2), None):
        raise UpcycleError(f"'history' holds {brief(odd_pair)}, expected pairs [question, answer]")
    earlier = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    last = [{"role": "user", "content": asked}, {"role": "assistant", "content": values["output"]}]
    return _with_system(values, [*earlier, *last])


def _with_system(values: Values, turns: list[Any]) -> list[Any]:
    """The turns behind the `system` column's message, if they have none.

    Raises:
        UpcycleError: they have another.
    """
    if not (system := values.get("system")):
        return turns
    said = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "system"]
    if said and system not in said:
        raise UpcycleError("the chat has a system message, and the column 'system' another; keep one")
    return turns if said else [{"role": "system", "content": system}, *turns]


def _listed(value: Any, column: str) -> list[Any]:
    """A list, which a CSV cell spells as JSON."""
    found = parse_json(value, column) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise UpcycleError(f"'{column}' is {brief(found)}, expected a list")
    return found


FORMATS: dict[str, Format] = {
    "messages": Format("messages", ("messages",), _chat, ("system",)),
    "sharegpt": Format("ShareGPT", ("conversations",), _sharegpt, ("system",)),
    "prompt_completion": Format("prompt and completion", ("prompt", "completion"), _prompt_completion, ("system",)),
    "alpaca": Format("Alpaca", ("instruction", "output"), _alpaca, ("input", "history", "system")),
}
"""The first one whose columns a row has is its format."""
ALWAYS = ("domain", "tools")
"""Columns of every format."""


def to_row(value: Any, where: str, source: Source | None = None) -> Row:
    """Check and convert one decoded row.

    Args:
        source: what a recipe says of its format, columns and domain.

    Raises:
        UnusableError: it has no format that is known, or a message is not a role with text.
    """
    if isinstance(value, UnusableError):  # not even a row
        raise value
    source = source or Source(path="")
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UnusableError(where, "is no object", f"expected an object with a non-empty 'messages' list, found {kind}")
    values = renamed(value, source)
    form = FORMATS[format_of(values, where, source)]
    try:
        turns = form.messages(values)
    except (UpcycleError, ValueError, TypeError) as error:
        raise UnusableError(where, f"columns of {form.title} that do not hold a chat", str(error)) from None
    messages = tuple(_message(turn, f"messages[{i}]", where) for i, turn in enumerate(turns))
    if not messages:
        raise UnusableError(where, "has no message", "expected an object with a non-empty 'messages' list, found []")
    tools = _tools(values.get("tools"), where)
    domain = values.get("domain") if source.domain is None else source.domain
    ours = {*form.needs, *form.also, *ALWAYS}
    unread = frozenset(map(str, value)) - ours - {source.columns[name] for name in ours & source.columns.keys()}
    row = Row(messages, _domain(domain, where), where, tools, unread)
    _check_characters(f"{row.spelt}{row.domain}{SPELL(tools) if tools else ''}", where)
    return row


def renamed(values: Values, source: Source) -> Values:
    """A row with our names for the columns that the source calls otherwise."""
    if not source.columns:
        return values
    return {**values, **{ours: values.get(theirs) for ours, theirs in source.columns.items()}}


def format_of(values: Values, where: str, source: Source) -> str:
    """The name of a row's format, by its columns.

    Args:
        values: `renamed` ones.

    Raises:
        UnusableError: the row has not the columns of the chosen one, or of any.
    """
    there = {column for column, value in values.items() if value is not None}
    names = list(FORMATS) if source.format == "auto" else [source.format]
    for name in names:
        if there.issuperset(FORMATS[name].needs):
            return name
    expected = ", or ".join(FORMATS[name].expected for name in names)
    if "text" in there:
        reason = "holds 'text', which does not say what is an answer"
        raise UnusableError(where, reason, f"{reason}; expected {expected}")
    if there >= {"role", "content"}:
        reason = "is a message and not a row"
        raise UnusableError(where, reason, f'{reason}; a row has all messages of a chat: {{"messages": [...]}}')
    theirs = sorted(there - {ours for ours, column in source.columns.items() if ours != column})
    gone = next(((ours, column) for ours, column in source.columns.items() if column not in values), None)
    if gone is not None:
        hint = f"data.columns calls '{gone[0]}' '{gone[1]}', which is not there{nearest(gone[1], theirs)}"
    else:
        near = (nearest(column, COLUMNS, MISSPELT) for column in theirs if column not in COLUMNS)
        hint = f"data.columns says what ours are called there{next(filter(None, near), '')}"
    raise UnusableError(where, "has no format that is known", f"expected {expected}, found fields {theirs} ({hint})")


def _message(turn: Any, name: str, where: str) -> Message:
    found = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    if found.get("role") not in ROLES:
        raise UnusableError(
            where,
            "a message has no known role",
            f"{name} is {brief(turn)}, expected a 'role' ({', '.join(ROLES)}) and a text 'content'",
        )
    if calls := _calls(found, name, where):
        found["tool_calls"] = calls
    found["content"] = _content(found, name, where)
    _check_learned(found, name, where)
    return found


def _calls(message: Message, name: str, where: str) -> list[Any]:
    """The calls of tools that a message makes, in either of OpenAI's fields: a list or one, as objects or as JSON.

    Raises:
        UnusableError: a call without the name of what it calls.
    """
    given, former = (_all_of(message.pop(field, None)) for field in ("tool_calls", CALL))
    calls = given or [{"type": "function", "function": call} for call in former]
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            detail = f"{name} calls {brief(call)}, expected an object with a 'name' and 'arguments'"
            raise UnusableError(where, "a call of a tool has no name", detail)
    return [with_arguments(_with_all_fields(call), _as_object) for call in calls]


def _all_of(value: Any) -> list[Any]:
    """One or several, as they are or as JSON; of those that hold nothing, as tables fill columns up, none."""
    found = _parsed(value)
    some = map(_parsed, found if isinstance(found, list) else [found])
    return [one for one in some if without_nulls(one) not in (None, "", {}, {"function": {}}, [])]


def _with_all_fields(call: dict[str, Any]) -> dict[str, Any]:
    """With `arguments`, which templates print: some call them `parameters`, or leave them out where there are none."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_all_fields(call["function"])}
    if call.get("arguments") is not None:
        return call
    rest = {name: value for name, value in call.items() if name not in ("arguments", "parameters")}
    return {**rest, "arguments": call.get("parameters") or {}}


def called(message: Message) -> list[dict[str, Any]]:
    """The functions that an answer calls, each with `name` and `arguments`."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


def with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """A call of a tool with its arguments changed, which it has itself or in its `function`."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    """Templates spell objects; OpenAI's format has them as JSON."""
    found = _parsed(arguments)
    return found if isinstance(found, dict) else arguments


LEARNED = (("weight", (int, float), "0 or 1"), ("train", bool, "true or false"))
"""Fields that say whether an answer is learned, their types and what is expected."""


def _check_learned(message: Message, name: str, where: str) -> None:
    """A share, or the text "0", would be taken for a 1 without a word."""
    for field, kinds, expected in LEARNED:
        if field in message and (not isinstance(value := message[field], kinds) or value not in (0, 1)):
            detail = f"{name}.{field} is {brief(value)}, expected {expected}"
            raise UnusableError(where, f"a message has another '{field}' than is known", detail)


def _content(message: Message, name: str, where: str) -> str | None:
    """Text; of several text parts, all of it; None where an answer calls tools and says nothing."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return None
    if isinstance(content, list) and content:
        kinds = [part.get("type", "text") if isinstance(part, dict) else type(part).__name__ for part in content]
        odd = next((kind for kind in kinds if kind != "text"), None)
        if odd is not None:
            raise UnusableError(
                where, f"a message holds {odd}", f"{name} holds a part of type {odd}; only text is read"
            )
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise UnusableError(
        where,
        "a message has no text",
        f"{name} is {brief(message)}, expected a 'role' ({', '.join(ROLES)}) and a text 'content'",
    )


def _tools(value: Any, where: str) -> tuple[Any, ...]:
    """A list of schemas, or its JSON text; fields that are null are left out, as table formats fill them in."""
    try:
        found = _listed(value or [], "tools")
    except UpcycleError as error:
        detail = str(error).replace("expected a list", "expected a list of schemas")
        raise UnusableError(where, "'tools' is no list", detail) from None
    return tuple(map(without_nulls, found))


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _domain(label: object, where: str) -> str:
    """A label as text; `all`, as all rows are called, for a row that has none: null, no text, or not a number."""
    if label is None or label == "" or label != label:
        return ALL
    if not isinstance(label, (str, int, float)):
        raise UnusableError(where, "'domain' is no text", f"'domain' is {brief(label)}, expected a text or a number")
    return f"{label} (domain)" if label == ALL else str(label)


def check_encodable(value: Any, where: str) -> None:
    """Raises UnusableError for half of a surrogate pair, which JSON may spell and no text can hold."""
    _check_characters(SPELL(value), where)  # quicker than to look at every text


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        detail = f"holds {half}, half of a surrogate pair: no character; repair the row"
        raise UnusableError(where, "holds half of a surrogate pair", detail) from None
