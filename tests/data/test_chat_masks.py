"""What the assistant says, by the template: several styles of templates, and templates that change their mind."""

import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_cpt.data.chat.encode import ChatEncoder, ChatJob
from megatron_cpt.data.chat.masks import Rendered, Said, UnclearTemplate, render_with_spans
from megatron_cpt.data.chat.template import BUILT_IN, ChatTemplate, TemplateRefusal, load_template
from megatron_cpt.data.chat.tokens import Learned, tokens_of
from megatron_cpt.data.shards.masked import LEARNED, PIECE, PROMPT
from megatron_cpt.errors import DataError

LLAMA3 = """{{ bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
CHATML = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN = "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}{% endif %}" + CHATML
MISTRAL = """{%- set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}
{%- set talk = messages[1:] if system else messages %}
{{- '<s>' }}
{%- for m in talk %}
    {%- if (m.role == 'user') != (loop.index0 is even) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if m.role == 'user' %}
        {#- the system prompt goes into the last user turn -#}
        {%- set is_last = talk[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}
        {{- '[INST]' ~ (system if is_last else '') ~ m.content ~ '[/INST]' }}
    {%- else %}{{ m.content ~ '</s>' }}{% endif %}
{%- endfor %}"""
SPACED = """<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- else %}{{ ' ' ~ m.content | trim ~ ' </s>' }}{% endif %}{% endfor %}"""
REASONING = """{%- for m in messages %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\n') %}
{%- if m.role == 'assistant' and loop.last %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}
{{- '<|im_start|>assistant\n<think>\n' ~ thought ~ '\n</think>\n\n' ~ answer ~ '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ answer ~ '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
MARKED = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ m.content ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"""

ANSWERS = ["Good day to you!", "It is\n- a fox\n- 人工知能の研究 🦊"]
TURNS = [
    {"role": "user", "content": "Hello, assistant"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "Good day to you! What is it?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
SYSTEM = {"role": "system", "content": "Speak briefly."}


@pytest.fixture(scope="session")
def encode(chat_dir, tmp_path_factory):
    """Return a function: (template, turns) -> (learned texts, tokens)."""
    folder = tmp_path_factory.mktemp("templates")

    def run(source, turns, train_on_eos="turn", **more):
        path = folder / f"{abs(hash(source))}.jinja"
        path.write_text(source)
        encoder = ChatEncoder(ChatJob(tokenizer_path=chat_dir, template_path=path, **more))
        page = render_with_spans(encoder.template, turns, special=encoder.special)
        encoding = encoder.tokenizer.backend.encode(page.text, add_special_tokens=False)
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        learned = Learned(turns=answers, details={}, train_on_eos=train_on_eos)
        tokens = tokens_of(page, encoding, encoder.tokenizer.eod_id, learned)
        runs = np.split(tokens.ids, np.flatnonzero(np.diff(tokens.mask & LEARNED)) + 1)
        texts = [encoder.tokenizer.decode(ids) for ids in runs]
        return texts[1 - (tokens.mask[0] & LEARNED) :: 2], tokens, encoder.tokenizer

    return run


@pytest.mark.parametrize(
    ("style", "end"),
    [(LLAMA3, "<|eot_id|>"), (CHATML, "<|im_end|>"), (QWEN, "<|im_end|>"), (MISTRAL, "</s>"), (MARKED, "<|im_end|>")],
    ids=["llama3", "chatml", "qwen", "mistral", "generation-blocks"],
)
@pytest.mark.parametrize("with_system", [False, True])
def test_learned_are_exactly_the_answers_and_their_ends(encode, style, end, with_system):
    turns = [SYSTEM, *TURNS] if with_system else TURNS
    learned, tokens, tokenizer = encode(style, turns)
    assert learned == [answer + end for answer in ANSWERS]
    assert tokens.mask[0] == PIECE | PROMPT and not (tokens.mask[1:] & PIECE).any()
    assert tokens.ids[-1] == tokenizer.eod_id and (tokens.ids == tokenizer.eod_id).sum() == 1
    assert tokens.mask[-1] == 0
    assert encode(style, turns, "none")[0] == ANSWERS
    assert encode(style, turns, "last")[0] == [ANSWERS[0], ANSWERS[1] + end]
    begin = tokenizer.backend.token_to_id("<|begin_of_text|>")
    assert (tokens.ids == begin).sum() == (1 if style is LLAMA3 else 0)


def test_a_space_that_the_template_puts_before_an_answer_is_the_models_to_write(encode):
    assert encode(SPACED, TURNS)[0] == [f" {answer} </s>" for answer in ANSWERS]


def test_reasoning_that_a_template_drops_from_earlier_turns_is_not_looked_for(encode):
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "<think>\nPolite.\n</think>\n\nGood day to you!"
    turns[3]["content"] = "<think>\nAn animal.\n</think>\n\nA fox."
    assert encode(REASONING, turns)[0] == [
        "Good day to you!<|im_end|>",
        "<think>\nAn animal.\n</think>\n\nA fox.<|im_end|>",
    ]


def test_an_empty_block_of_reasoning_is_learned_unless_it_is_part_of_the_prompt(encode):
    assert encode(REASONING, TURNS)[0][1] == f"<think>\n\n</think>\n\n{ANSWERS[1]}<|im_end|>"
    variables = (("enable_thinking", False),)
    assert encode(REASONING, TURNS, template_variables=variables)[0] == [f"{answer}<|im_end|>" for answer in ANSWERS]


def test_a_template_without_a_generation_prompt_has_its_headers_left_out(encode):
    silent = CHATML.partition("{%- if add")[0]
    assert encode(silent, TURNS)[0] == [f"{answer}<|im_end|>" for answer in ANSWERS]


def test_the_same_words_from_user_and_assistant_are_told_apart(encode):
    turns = [TURNS[0] | {"content": "Ja"}, TURNS[1] | {"content": "Ja"}] * 2
    learned, tokens, tokenizer = encode(CHATML, turns)
    assert learned == ["Ja<|im_end|>"] * 2
    assert tokenizer.decode(tokens.ids).count("Ja") == 4


def test_an_answer_that_the_template_trims_is_found(encode):
    turns = [TURNS[0], {"role": "assistant", "content": "  Good day!\n"}]
    assert encode(LLAMA3, turns)[0] == ["Good day!<|eot_id|>"]
    assert encode(CHATML, turns)[0][0].endswith("  Good day!\n<|im_end|>")


def test_a_token_across_a_boundary_counts_with_the_assistant():
    """`user:a. |bot:yes|.</s>`: the answer is `yes`, in a token with `bot:` before it and one with `.` after it."""
    page = Rendered(TURNS[:2], "user:a. bot:yes.</s>", [Said(1, [(12, 15)], [(15, 20)])])
    encoding = SimpleNamespace(ids=[5, 6, 7, 9], offsets=[(0, 7), (7, 13), (13, 16), (16, 20)])
    for train_on_eos, mask in (("turn", [2, 1, 1, 1]), ("none", [2, 1, 1, 0])):
        tokens = tokens_of(page, encoding, 9, Learned(turns=[1], details={}, train_on_eos=train_on_eos))
        assert (tokens.mask & (LEARNED | PIECE)).tolist() == mask
    assert tokens.ids.tolist() == [5, 6, 7, 9] and tokens.turn_ends == [4]


def test_without_a_special_token_after_the_answer_the_end_of_document_is_the_end_of_the_turn(encode):
    plain = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [text.strip() for text in encode(plain, turns)[0]] == ["b", "<|end_of_text|>"]
    assert [text.strip() for text in encode(plain, turns, "none")[0]] == ["b"]


def test_an_end_of_document_token_that_the_template_writes_is_not_doubled(encode):
    ends = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '<|end_of_text|>' }}{% endfor %}"
    _, tokens, tokenizer = encode(ends, TURNS)
    assert (tokens.ids == tokenizer.eod_id).sum() == 4
    assert tokens.ids[-2] != tokenizer.eod_id and tokens.mask[-1] == LEARNED


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[-1].content ~ messages[-1].content }}", "writes turn 2 2 times|writes turn 2 0 times"),
        ("{{ messages[-1].content | length }}: {{ messages[-1].content }}", "otherwise according to what turn 2 says"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "2 generation blocks",
        ),
    ],
)
def test_a_template_that_does_not_tell_is_refused(source, message):
    with pytest.raises(UnclearTemplate, match=message):
        render_with_spans(ChatTemplate(source, {}, "t"), TURNS[:2])


def test_a_template_has_what_transformers_gives_it(tmp_path, chat_dir):
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ extra }}"
    )
    path = tmp_path / "t.jinja"
    path.write_text(source)
    template = load_template(chat_dir, path, {"extra": "é"}, datetime.date(2026, 11, 5))
    assert template.render(TURNS) == ('{"role": "user", "content": "Hello, assistant"}<|begin_of_text|>05 Nov 2026é')
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        ChatTemplate(MISTRAL, {}, "m").render(TURNS[1:])
    with pytest.raises(TemplateRefusal, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}, "m").render(TURNS)


def test_marked_templates_are_masked_as_transformers_masks_them(encode, chat_dir):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(chat_dir / "tokenizer.json"))
    _, tokens, _ = encode(MARKED, TURNS)
    expected = theirs.apply_chat_template(
        TURNS, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.ids[:-1].tolist() == expected["input_ids"]
    assert (tokens.mask[:-1] & LEARNED).tolist() == expected["assistant_masks"]


def test_templates_render_as_transformers_renders_them(chat_dir):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(chat_dir / "tokenizer.json"), bos_token="<|begin_of_text|>")
    for source in (LLAMA3, CHATML, QWEN, MISTRAL, SPACED, REASONING):
        template = ChatTemplate(source, {"bos_token": "<|begin_of_text|>"}, "t")
        for turns, prompt in ((TURNS, False), (TURNS[:3], True)):
            expected = theirs.apply_chat_template(
                turns, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            assert template.render(turns, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_template_that_is_built_in_ends_turns_with_a_token(chat_dir, name):
    encoder = ChatEncoder(ChatJob(tokenizer_path=chat_dir, template_path=Path(name)))
    assert encoder.turn_end() == {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[name]
    assert encoder.template.render(TURNS).count("\n") > 4


def test_a_folder_without_a_template_says_what_to_do(chat_dir, tmp_path):
    with pytest.raises(DataError, match=r"has no chat template.*--template FILE\.jinja"):
        load_template(chat_dir)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"bad\.jinja:1: .*Jinja chat template is needed"):
        load_template(chat_dir, tmp_path / "bad.jinja")
