"""Which tokens are learned, against transformers' own masks and against renderings of the chat's beginnings."""

import re
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from upcycle.data.chat import Sample, encode, encode_rows
from upcycle.data.formats import Row
from upcycle.data.skeletons import behind_thoughts
from upcycle.errors import UpcycleError
from upcycle.routing.batch import IGNORED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant named Smol<|im_end|>\n"
    "{% endif %}" + CHATML
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + CHATML
TO_THE_MICROSECOND = DATED.replace("%d %B %Y", "%H:%M:%S.%f")
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + '</s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
    "{% endif %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}" + CHATML
)
# Phi-3 and Phi-4-mini: an end of text behind the last turn alone
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# gpt-oss: another end for the last answer, unless an answer is asked for
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}<|start|>{{ m.role }}"
    "<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant"
    "{% endif %}"
)
# GLM: a turn ends where the next one begins
GLM = (
    "<s>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# the loop, the thoughts and the calls of the template that Qwen3 comes with
QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
        (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' +
                    content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {{- tool_call.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# DeepSeek-R1: no turn keeps its thoughts, and the generation prompt opens them
R1 = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% else %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# SmolLM3's way: the whole turn in one expression, nothing learned of the white space around it
MARKED_TRIMMED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant<|end|>' }}{%- generation -%}"
    "{{ m.content | trim ~ '</s>' }}{%- endgeneration -%}{% else %}{{ '<|start|>' ~ m.role ~ '<|end|>' ~ "
    "m.content ~ '</s>' }}{% endif %}{% endfor %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|User|>", "<|Assistant|>", "[/INST]"]
TRAINED_ON = "the answer is an assistant user system <think> </think> \n\n  tool 42 héllo wörld 日本語 naïve " * 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level pairs: one character may be several tokens, and one token several words' borders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TRAINED_ON], trainer)
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **ends, additional_special_tokens=SPECIAL[2:])


def chat(*messages: tuple[str, str | None] | dict[str, Any], tools: Any = ()) -> Row:
    given = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return Row(tuple(given), "all", "here:1", tuple(tools))


def talk(*texts: str, system: str | None = None) -> Row:
    """User and assistant in turn."""
    said = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return chat(*([("system", system)] if system is not None else []), *said)


def learned(tokenizer: Any, row: Row, template: str, **options: Any) -> str:
    tokenizer.chat_template = template
    return text_of(tokenizer, encode(row, tokenizer, **options))


def text_of(tokenizer: Any, sample: Sample) -> str:
    """The learned tokens, a bar between those that do not follow each other."""
    places = [i for i, label in enumerate(sample.labels) if label != IGNORED]
    starts = places[:1] + [b for a, b in pairwise(places) if b > a + 1]
    runs = [[sample.labels[i] for i in places if a <= i < b] for a, b in pairwise([*starts, len(sample.labels)])]
    return "|".join(tokenizer.decode(run) for run in runs)


# --- two truths


def by_beginnings(row: Row, tokenizer: Any) -> Sample:
    """Spans from renderings of the chat's beginnings, and a label for every token in one."""

    def render(count: int, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(row.messages[:count]), tools=list(row.tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        )

    text, spans = render(len(row.messages)), {}
    for turn, message in enumerate(row.messages):
        if message["role"] == "assistant":
            before, until = render(turn, prompt=True), render(turn + 1)
            assert until.startswith(before)
            assert text.startswith(until)
            spans[turn] = (len(before), len(until.rstrip()))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        token if any(begin <= first and last <= end for begin, end in spans.values()) else IGNORED
        for token, (first, last) in zip(ids, offsets, strict=True)
    ]
    start = next((i for i, (first, _) in enumerate(offsets) if first >= spans[max(spans)][0]), len(ids))
    answer = row.messages[max(spans)]["content"].strip()
    return Sample(ids, labels, row.domain, row.question, answer, start, row.where)


def by_transformers(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(list(row.messages), return_assistant_tokens_mask=True, return_dict=True)
    ids = encoded["input_ids"]
    return ids, [token if kept else IGNORED for token, kept in zip(ids, encoded["assistant_masks"], strict=True)]


WORDS = [
    "a",
    "the",
    "user",
    "assistant",
    "answer",
    " ",
    "\n",
    "  ",
    "é",
    "日本",
    "👩‍🔬",
    "\u200b",
    "\xa0",
    "x.",
    *SPECIAL[:6],
]
TEXTS = st.one_of(st.lists(st.sampled_from(WORDS), max_size=6).map("".join), st.text(max_size=8))
TEXTS = TEXTS.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))


@st.composite
def talks(draw: Any) -> tuple[list[str], str | None]:
    """Texts and perhaps a system message, drawn from few, so that one often says what another has said."""
    said = st.sampled_from(draw(st.lists(TEXTS, min_size=1, max_size=4)))
    exchanges = draw(st.integers(1, 3))
    return [draw(said) for _ in range(2 * exchanges)], draw(st.one_of(st.none(), said))


quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, DATED, LLAMA3, GEMMA])
@given(batch=st.lists(talks(), min_size=1, max_size=4))
@example(batch=[(["a", ""], None)])
@example(batch=[(["a a", "a", "a", " a "], "a"), (["a", "a\n", "", "\n"], None)])
@quick
def test_labels_are_those_of_renderings_of_the_beginnings(
    template: str, batch: list[tuple[list[str], str | None]], tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    rows = [talk(*texts, system=system) for texts, system in batch]
    assert encode_rows(rows, tokenizer) == [by_beginnings(row, tokenizer) for row in rows]


@given(said=talks())
@quick
def test_a_template_that_asks_for_a_system_message_gets_it(said: tuple[list[str], str | None], tokenizer: Any) -> None:
    row = talk(*said[0], system=said[1])
    tokenizer.chat_template = NEEDS_SYSTEM
    if row.messages[0]["role"] == "system":
        assert encode(row, tokenizer) == by_beginnings(row, tokenizer)
        return
    with pytest.raises(UpcycleError, match="here:1: the chat template cannot render this chat: a system message comes"):
        encode(row, tokenizer)


@pytest.mark.parametrize("template", [MARKED, MARKED_TRIMMED])
@given(said=talks())
@quick
def test_labels_are_transformers_own_where_the_template_marks_answers(
    template: str, said: tuple[list[str], str | None], tokenizer: Any
) -> None:
    row = talk(*said[0], system=said[1])
    tokenizer.chat_template = template
    sample = encode(row, tokenizer)
    ids, labels = by_transformers(row, tokenizer)
    assert sample.input_ids == ids
    for i, (ours, theirs) in enumerate(zip(sample.labels, labels, strict=True)):
        # theirs has the token that begins in the prompt, where the template's line break meets the answer's
        straddles = labels[i - 1] == ours == IGNORED and tokenizer.decode([ids[i]]).startswith("\n\n")
        assert ours == theirs or straddles


@given(said=talks())
@quick
def test_mistrals_answers_are_those_of_the_beginnings(said: tuple[list[str], str | None], tokenizer: Any) -> None:
    row = talk(*said[0], system=said[1])
    tokenizer.chat_template = MISTRAL.replace("system if loop.last else ''", "system if loop.first else ''")
    assert encode(row, tokenizer) == by_beginnings(row, tokenizer)


# --- templates that look at the texts


@given(said=talks())
@example(said=(["a", "</think>"], "a"))
@example(said=(["a", "<think>\nhm</think> a"], "a"))
@quick
def test_a_system_message_that_moves_to_the_last_turn(said: tuple[list[str], str | None], tokenizer: Any) -> None:
    """Mistral's own: no beginning of such a chat renders as the chat begins."""
    row = talk(*said[0], system=said[1])
    assume(all(m["content"].strip() for m in row.messages))
    assume(not any(word in m["content"] for m in row.messages for word in SPECIAL))
    last, *_ = (m["content"].strip() for m in row.messages[::-1])
    assert learned(tokenizer, row, MISTRAL, turns="last") == f" {last}</s>"


@given(
    texts=st.lists(st.sampled_from(["a", "say a", "hm", "b b", "<think>"]), min_size=2, max_size=2),
    more=st.lists(st.tuples(*[st.sampled_from(["a", "hm", "b b", "You"])] * 3), max_size=3),
    glue=st.sampled_from([("", "", ""), ("\n", "\n", "\n\n"), ("\n", "", " \n")]),
)
@quick
def test_deepseeks_answers_are_what_is_left_behind_the_thoughts(
    texts: list[str], more: list[tuple[str, str, str]], glue: tuple[str, str, str], tokenizer: Any
) -> None:
    opened, closed, after = glue
    said = [texts[0], texts[1]]
    for question, thought, answer in more:
        said += [question, f"<think>{opened}{thought}{closed}</think>{after}{answer}"]
    row = talk(*said)
    tokenizer.chat_template = R1
    sample = encode(row, tokenizer)
    left = [texts[1], *(answer for *_, answer in more)]
    assert text_of(tokenizer, sample).split("|") == [f"{answer}</s>" for answer in left] or after
    assert [t.strip() for t in text_of(tokenizer, sample).split("|")] == [f"{answer}</s>" for answer in left]
    assert sample.answer == left[-1]
    assert sample.dropped == len(more)


THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("said", "expected", "dropped"),
    [
        (("a", "b"), "<think>\n\n</think>\n\nb<|im_end|>", 0),
        (("a", f"{THOUGHT}b"), f"{THOUGHT}b<|im_end|>", 0),
        (("a", "<think>hm</think>b"), f"{THOUGHT}b<|im_end|>", 0),
        (("a", f"{THOUGHT}b", "c", f"{THOUGHT}d"), f"b<|im_end|>|{THOUGHT}d<|im_end|>", 1),
        (("a", "b", "c", f"{THOUGHT}d"), f"b<|im_end|>|{THOUGHT}d<|im_end|>", 0),
        ((f"{THOUGHT}b", f"{THOUGHT}b", "b", f"{THOUGHT}b"), f"b<|im_end|>|{THOUGHT}b<|im_end|>", 1),
        (("a", f"{THOUGHT}\n b \n", "c", "d"), " b \n<|im_end|>|<think>\n\n</think>\n\nd<|im_end|>", 1),
        (("a", "<think>b</think>b</think>b", "c", "d"), "b<|im_end|>|<think>\n\n</think>\n\nd<|im_end|>", 1),
        (("a", THOUGHT, "c", "d"), "<|im_end|>|<think>\n\n</think>\n\nd<|im_end|>", 1),
        (("a", "", "c", "d"), "<|im_end|>|<think>\n\n</think>\n\nd<|im_end|>", 0),
        # looks like a tool's answer: Qwen3 takes the earlier question for the last one
        (
            ("a", f"{THOUGHT}b", "<tool_response>c</tool_response>", "d"),
            f"{THOUGHT}b<|im_end|>|<think>\n\n</think>\n\nd<|im_end|>",
            0,
        ),
    ],
)
def test_qwen3_drops_earlier_thoughts(said: tuple[str, ...], expected: str, dropped: int, tokenizer: Any) -> None:
    for system in (None, "b", "hm"):
        row = talk(*said, system=system)
        assert learned(tokenizer, row, QWEN3) == expected
        sample = encode(row, tokenizer)
        assert sample.dropped == dropped
        assert sample.answer == said[-1].rpartition("</think>")[2].strip()


def test_thoughts_in_a_field_of_their_own_are_found_and_counted(tokenizer: Any) -> None:
    first, last = ({"role": "assistant", "content": c, "reasoning_content": f"so {c}"} for c in "bd")
    row = chat(("user", "a"), first, ("user", "c"), last)
    assert learned(tokenizer, row, QWEN3) == "b<|im_end|>|<think>\nso d\n</think>\n\nd<|im_end|>"
    assert encode(row, tokenizer).dropped == 1
    assert learned(tokenizer, row, CHATML) == "b<|im_end|>|d<|im_end|>"
    assert encode(row, tokenizer).dropped == 2


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize("content", [None, ""])
def test_a_call_of_a_tool_is_learned_as_it_is_rendered(content: str | None, tokenizer: Any) -> None:
    call = CALL | {"content": content}
    row = chat(("user", "a"), call, ("tool", "a"), ("tool", "1"), ("assistant", "1"), tools=[{"name": "f"}])
    empty = "<think>\n\n</think>\n\n"
    assert learned(tokenizer, row, QWEN3) == f"{CALLED}<|im_end|>|{empty}1<|im_end|>"
    assert encode(row, tokenizer).answer == "1"
    assert learned(tokenizer, chat(("user", "a"), call), QWEN3) == f"{empty}{CALLED}<|im_end|>"
    assert encode(chat(("user", "a"), call), tokenizer).answer == CALLED


def test_a_call_with_words_ahead_of_it_is_one_turn(tokenizer: Any) -> None:
    row = chat(("user", "a"), CALL | {"content": "let me see"}, ("tool", "1"), ("assistant", "1"))
    assert learned(tokenizer, row, QWEN3).split("|<think>")[0] == f"let me see\n{CALLED}<|im_end|>"


def published(name: str) -> str:
    """A template that TRL ships."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


QWEN35_CALL = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"


def test_qwen35_learns_calls_of_the_past_and_a_greeting(tokenizer: Any) -> None:
    """Its generation prompt opens thoughts that turns of the past have not, and it renders no chat without a user."""
    asked = chat(("user", "a"), CALL, ("tool", "1"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    last = "\n</think>\n\nd<|im_end|>"
    assert learned(tokenizer, asked, published("qwen3_5_think")) == f"{QWEN35_CALL}<|im_end|>|b<|im_end|>|{last}"
    greeted = chat(("assistant", "hi"), ("user", "c"), ("assistant", "d"))
    assert learned(tokenizer, greeted, published("qwen3_5_think")) == f"hi<|im_end|>|{last}"


def test_words_that_a_template_leaves_out_beside_a_call_are_counted(tokenizer: Any) -> None:
    row = chat(("user", "a"), CALL | {"content": "let me see"}, ("tool", "1"), ("assistant", "b"))
    assert (
        learned(tokenizer, row, published("llama3_1")) == '{"name": "f", "parameters": {"x": 1}}<|eot_id|>|b<|eot_id|>'
    )
    assert encode(row, tokenizer).dropped == 1


@pytest.mark.parametrize("said", ["I call f.", "fine", "one moment", ""])
def test_a_call_that_the_template_leaves_out_is_refused_whatever_is_said_beside_it(said: str, tokenizer: Any) -> None:
    row = chat(("user", "a"), CALL | {"content": said}, ("tool", "1"), ("assistant", "b"))
    for template in (CHATML, published("llama3")):
        with pytest.raises(UpcycleError, match=r"leaves out the tool calls of message 1 \(f\)"):
            learned(tokenizer, row, template)
    both = CALL | {"tool_calls": [*CALL["tool_calls"], {"function": {"name": "g", "arguments": {}}}]}
    first = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{{ (m.tool_calls or []) | map(attribute='function') | first }}"
    )
    with pytest.raises(UpcycleError, match=r"leaves out the tool calls of message 1 \(f, g\)"):
        learned(tokenizer, chat(("user", "a"), both | {"content": said}), first)


HEADED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", [None, "qwen2_5", "qwen3", "qwen3_5_think", "glm4moe"])
@pytest.mark.parametrize("said", ["d", "<think>\nhm\n</think>\n\nd", CALL, CALL | {"content": "see"}])
def test_an_answer_is_asked_for_as_users_do_and_its_own_words_match(
    said: Any, name: str | None, tokenizer: Any
) -> None:
    """The prompt is what the template writes for generation, also where marks hold the header (SmolLM3)."""
    row = chat(
        ("user", "a"), ("assistant", "b"), ("user", "c"), said if isinstance(said, dict) else ("assistant", said)
    )
    tokenizer.chat_template = HEADED if name is None else published(name)
    try:
        sample = encode(row, tokenizer)
    except UpcycleError as error:
        assert (isinstance(said, dict) and "tool calls" in str(error)) or "render" in str(error)  # noqa: PT017
        return
    prompt = tokenizer.apply_chat_template(list(row.messages[:3]), add_generation_prompt=True, tokenize=False)
    rest = tokenizer.decode(sample.input_ids[sample.answer_start :], skip_special_tokens=True)
    asked = tokenizer.decode(sample.input_ids[: sample.answer_start])
    assert asked.rstrip() == prompt.rstrip() or prompt.startswith(asked)
    assert behind_thoughts(rest) == sample.answer
    assert "think" not in sample.answer


@pytest.mark.parametrize(
    ("template", "roles", "expected"),
    [
        ("qwen3", ("developer",), "developer"),
        ("qwen3", ("system",), ""),
        ("phi3", ("developer", "system"), "developer"),
        ("llama3", ("developer", "system"), ""),
    ],
)
def test_messages_and_tools_that_the_template_does_not_show_are_counted(
    template: str, roles: tuple[str, ...], expected: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = published(template)
    said = [*((role, "be brief") for role in roles), ("user", "a"), ("assistant", "b")]
    assert encode(chat(*said), tokenizer).ignored == expected
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    shown = encode(chat(*said, tools=tools), tokenizer).ignored.split(", ")
    assert ("tools" in shown) == (template in ("phi3", "llama3"))


def test_neither_a_default_system_message_nor_a_question_is_taken_for_an_answer(tokenizer: Any) -> None:
    for template in (DEFAULT_SYSTEM, TO_THE_MICROSECOND + "{# You are a helpful assistant #}", R1, QWEN3):
        row = talk("You are", "a helpful", "a helpful", "You are")
        texts = learned(tokenizer, row, template).replace("</s>", "<|im_end|>").split("|<think>")
        assert "".join(texts).replace("\n\n</think>\n\n", "") in (
            "a helpful<|im_end|>|You are<|im_end|>",
            "a helpful<|im_end|>You are<|im_end|>",
        )
        prompt = tokenizer.decode(encode(row, tokenizer).input_ids[: encode(row, tokenizer).answer_start])
        assert prompt.count("a helpful") >= 2


def test_a_template_that_prints_the_time_between_renderings(tokenizer: Any, monkeypatch: Any) -> None:
    row = talk("10", "10", "12:00", "10")
    assert learned(tokenizer, row, TO_THE_MICROSECOND) == "10<|im_end|>|10<|im_end|>"
    from transformers.utils import chat_template_utils

    days = iter(range(1, 29))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, next(days))

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    assert learned(tokenizer, row, DATED) == "10<|im_end|>|10<|im_end|>"


def test_an_answer_that_the_template_changes_is_refused(tokenizer: Any) -> None:
    row = talk("a", "b b", "c", "dd")
    for change in ("| upper", "| replace('d', '')", "| length | string"):
        with pytest.raises(UpcycleError, match=r"here:1: the chat template rewrites message [13],"):
            learned(tokenizer, row, CHATML.replace("m.content", f"m.content {change}"))
    unmarked = MARKED.replace("m.content }}<|im_end|>{% endgen", "'ok' }}{% endgen")
    with pytest.raises(UpcycleError, match="here:1: the chat template rewrites message 1,"):
        learned(tokenizer, row, unmarked)


def test_an_answer_that_the_template_leaves_out_is_refused(tokenizer: Any) -> None:
    only_last = "{% for m in messages[-2:] %}" + CHATML.split("%}", 1)[1]
    with pytest.raises(UpcycleError, match="rewrites message 1,"):
        learned(tokenizer, talk("a", "b", "b", "b"), only_last)


@pytest.mark.parametrize(
    ("template", "header", "end", "last"),
    [
        (PHI3, "", "<|end|>", "<|end|>\n</s>"),
        (GPT_OSS, "<|channel|>final<|message|>", "<|end|>", "<|return|>"),
        (GLM, "", "", "</s>"),
    ],
)
def test_a_turn_ends_before_the_next_whatever_stands_behind_the_last(
    template: str, header: str, end: str, last: str, tokenizer: Any
) -> None:
    row = talk("a", "b c", "secret", "b c")
    assert learned(tokenizer, row, template) == f"{header}b c{end}|{header}b c{last}"
    assert learned(tokenizer, chat(*row.messages[:3]), template) == f"{header}b c{end}"
    assert learned(tokenizer, talk("a", "b c"), template) == f"{header}b c{last}"
    if end:
        assert learned(tokenizer, talk("a", "", "secret", "b"), template) == f"{header}{end}|{header}b{last}"


def test_an_empty_greeting_at_the_very_begin(tokenizer: Any) -> None:
    bare = "{% for m in messages %}{{ m.content }}{{ '</s>' if loop.last else '' }}{% endfor %}"
    row = chat(("assistant", ""), ("user", "a"), ("assistant", "b"))
    tokenizer.chat_template = bare
    with pytest.raises(UpcycleError, match="rewrites message 0,"):
        encode(row, tokenizer)


def test_a_call_that_the_template_does_not_write_is_refused(tokenizer: Any) -> None:
    row = chat(("user", "a"), CALL | {"content": "let me see"}, ("tool", "1"), ("assistant", "1"))
    with pytest.raises(UpcycleError, match=r"here:1: the chat template leaves out the tool calls of message 1 \(f\)"):
        learned(tokenizer, row, CHATML)
    silent = chat(row.messages[0], row.messages[1] | {"weight": 0}, *row.messages[2:])
    assert learned(tokenizer, silent, CHATML) == "1<|im_end|>"
    assert learned(tokenizer, row, CHATML, turns="last") == "1<|im_end|>"


def test_arguments_are_objects_or_texts_as_the_template_has_them(tokenizer: Any) -> None:
    joined = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}",
    )
    row = chat(("user", "a"), CALL | {"content": None}, ("tool", "1"), ("assistant", "1"))
    printed = joined.replace("+ c.f", "~ c.f")  # as Python spells it
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}<|im_end|>"
    marked = MARKED.replace("<|im_end|>{% endgen", calls + "{% endgen")
    for template in (joined, printed, marked):
        assert 'f{"x": 1}<|im_end|>' in learned(tokenizer, row, template)


def test_a_greeting_is_learned_too(tokenizer: Any) -> None:
    row = chat(("assistant", "hi"), ("user", "hi"), ("assistant", "hi"))
    assert learned(tokenizer, row, CHATML) == "hi<|im_end|>|hi<|im_end|>"


# --- what the row and the caller choose


@pytest.mark.parametrize("template", [CHATML, QWEN3, R1, MARKED])
def test_the_last_turn_alone_may_be_learned(template: str, tokenizer: Any) -> None:
    row = talk("a", "b", "c", "d")
    last = learned(tokenizer, row, template, turns="last")
    assert re.fullmatch(r"(<think>\n\n</think>\n\n)?d(<\|im_end\|>|</s>)", last)
    first = chat(*row.messages[:3], row.messages[3] | {"weight": 0})
    assert re.fullmatch(r"b(<\|im_end\|>|</s>)", learned(tokenizer, first, template))
    sample = encode(first, tokenizer, turns="last")
    assert sample.num_answer_tokens == 0
    assert sample.answer == "d"


def test_marks_of_several_kinds_go_to_their_turns(tokenizer: Any) -> None:
    calls = MARKED.replace(
        "<|im_end|>{% endgeneration %}",
        "<|im_end|>{% endgeneration %}{% for c in m.tool_calls or [] %}{{ '\n' }}{% generation %}"
        "{{ c.function | tojson }}{% endgeneration %}{% endfor %}",
    )
    both = CALL | {"content": "b", "tool_calls": CALL["tool_calls"] * 2, "train": False}
    row = chat(("user", "a"), both, ("tool", "b"), ("assistant", "d"))
    assert learned(tokenizer, row, calls) == "d<|im_end|>"
    row = chat(("user", "a"), both | {"train": True}, ("tool", "b"), ("assistant", "d"))
    called = '{"name": "f", "arguments": {"x": 1}}'
    assert learned(tokenizer, row, calls) == f"b<|im_end|>|{called}|{called}|d<|im_end|>"
    assert learned(tokenizer, row, calls, turns="last") == "d<|im_end|>"


def test_a_developer_may_speak(tokenizer: Any) -> None:
    row = chat(("developer", "d"), ("user", "d"), ("assistant", "d"))
    assert learned(tokenizer, row, CHATML) == "d<|im_end|>"


def test_a_row_is_rendered_once(tokenizer: Any, monkeypatch: Any) -> None:
    count, render = 0, tokenizer.apply_chat_template

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return render(*args, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    tokenizer.chat_template = CHATML
    encode_rows([talk(f"{i}+{i}?", str(2 * i), "sure?", "yes") for i in range(100)], tokenizer)
    assert count <= 100 + 5
    tokenizer.chat_template, count = QWEN3, 0
    encode_rows([talk("a", f"{THOUGHT}{i}", "sure?", f"{THOUGHT}{i}") for i in range(100)], tokenizer)
    assert count <= 100 + 6


def test_what_was_asked_of_the_tokenizer_before_changes_nothing(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    rows = [talk("a", "<|im_end|>b"), talk("a" * 40, "b")]
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "b c"], padding="max_length", max_length=8, truncation=True, split_special_tokens=True)
    samples = encode_rows(rows, tokenizer)
    assert samples == [by_beginnings(row, tokenizer) for row in rows]


def test_a_slow_tokenizer_and_a_row_without_answer_are_refused(tokenizer: Any, monkeypatch: Any) -> None:
    with pytest.raises(UpcycleError, match="here:1: no assistant turn"):
        encode(chat(("user", "a")), tokenizer)
    assert encode_rows([], tokenizer) == []
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UpcycleError, match="is not a fast tokenizer"):
        encode(talk("a", "b"), tokenizer)
