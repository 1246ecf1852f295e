"""Chat templates written for the tests, each with the features of a family of public training templates.

Every one marks what the assistant says with `{% generation %}`. `HEADER_OUTSIDE` are those whose marks begin where the prompt
for an answer ends and stop at a special token, so that the same template without its marks has to give the same mask.
"""

SPECIAL = (
    "<|end_of_text|>",
    *("<bos>", "<|start|>", "<|end|>", "<|stop|>", "<|more|>", "<|call|>", "<|return|>", "<|message|>", "<|channel|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "[INST]", "[/INST]", "[CALLS]", "[RESULTS]", "[/RESULTS]"),
    *(
        "<calls>",
        "</calls>",
        "<sep>",
        "<outputs>",
        "</outputs>",
        "<chatbot>",
        "<answer>",
        "</answer>",
        "<turn>",
        "</turn>",
    ),
)

# ChatML: tools in the system prompt, calls as JSON in tags, several results in one user turn
CHATML = r"""{%- if tools %}{{ '<|start|>system\n' }}{{ messages[0].content if messages[0].role == 'system' else 'Help.' }}
{{- '\nTools:' }}{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}{{ '<|end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|start|>system\n' ~ messages[0].content ~ '<|end|>\n' }}
{%- else %}{{ '<|start|>system\nHelp.<|end|>\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|start|>user\n' ~ m.content ~ '<|end|>\n' }}
    {%- elif m.role == 'assistant' %}{{ '<|start|>assistant\n' }}{% generation %}{{ m.content if m.content is string else '' }}
        {%- for call in m.tool_calls or [] %}{% set call = call.function or call %}
            {{- '\n' if m.content or not loop.first }}{{ '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}{{ '<|end|>' }}{% endgeneration %}{{ '\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""

# Reasoning of its own field or in the text, left out before the last question; the head of the turn is marked as well
THINKING = r"""{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|start|>system\n' ~ (tools | tojson) ~ '<|end|>\n' }}{% endif %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- generation %}{{ '<|start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' ~ thought ~ '\n</think>\n\n' }}{% endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}{{ '\n<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' }}{% endfor %}
        {{- '<|end|>\n' }}{% endgeneration %}
    {%- else %}{{ '<|start|>' ~ m.role ~ '\n' ~ content ~ '<|end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

# Llama 3: trimmed, one call as a bare object under other names, results from `ipython`
TRIMMED = r"""{{- bos_token }}{% for m in messages %}
    {%- if m.role == 'assistant' %}{{ '<|start|>assistant<|message|>\n\n' }}{% generation %}
        {%- if m.tool_calls %}{% set call = m.tool_calls[0].function %}
            {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}' }}
        {%- else %}{{ m.content | trim }}{% endif %}{{ '<|end|>' }}{% endgeneration %}
    {%- elif m.role == 'tool' or m.role == 'ipython' %}{{ '<|start|>ipython<|message|>\n\n' ~ (m.content | tojson) ~ '<|end|>' }}
    {%- else %}{{ '<|start|>' ~ m.role ~ '<|message|>\n\n' ~ (m.content | trim) ~ '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>\n\n' }}{% endif %}"""

# Phi 3: the newline after each turn is marked, and a second block at the end of the conversation
TWO_BLOCKS = r"""{%- for m in messages %}
    {%- if m.role == 'system' and m.content %}{{ '<|system|>\n' ~ m.content ~ '<|end|>\n' }}
    {%- elif m.role == 'user' %}{{ '<|user|>\n' ~ m.content ~ '<|end|>\n' }}
    {%- elif m.role == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}{{ m.content ~ '<|end|>\n' }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}
{%- elif messages[-1]['role'] == 'assistant' %}{% generation %}{{ '<|stop|>' }}{% endgeneration %}
{%- else %}{{ '<|stop|>' }}{% endif %}"""

# Gemma: the assistant is called model, the system prompt goes before the first question, text or parts of it
MODEL = r"""{{- bos_token }}{% set ns = namespace(first='') %}{% set talk = messages %}
{%- if messages[0].role == 'system' %}
    {%- set ns.first = (messages[0].content if messages[0].content is string else messages[0].content[0].text) ~ '\n\n' %}
    {%- set talk = messages[1:] %}
{%- endif %}
{%- for m in talk %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if m.role == 'assistant' %}{{ '<turn>model\n' }}{% generation %}
        {%- if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}
        {{- '</turn>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}{{ '<turn>' ~ m.role ~ '\n' ~ (ns.first if loop.first else '') }}
        {%- if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}
        {{- '</turn>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""

# DeepSeek V3: system prompts first, calls between special tokens, an answer after results without a head of its own
OUTPUTS = r"""{% set ns = namespace(is_output=false, is_first=true) %}{{ bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|user|>' ~ m.content }}
    {%- elif m.role == 'assistant' and 'tool_calls' in m %}
        {%- generation %}{{ '<|assistant|>' ~ (m.content or '') ~ '<calls>' }}{% set ns.is_output = false %}
        {%- for call in m.tool_calls %}
            {{- ('' if loop.first else '\n') ~ call.type ~ '<sep>' ~ call.function.name ~ '\n```json\n' }}
            {{- call.function.arguments | tojson }}{{ '\n```' }}
        {%- endfor %}{{ '</calls><|end|>' }}{% endgeneration %}
    {%- elif m.role == 'assistant' %}
        {%- if ns.is_output %}{% generation %}{{ '</outputs>' ~ m.content ~ '<|end|>' }}{% endgeneration %}{% set ns.is_output = false %}
        {%- else %}{% generation %}{{ '<|assistant|>' ~ m.content.split('</think>')[-1] ~ '<|end|>' }}{% endgeneration %}{% endif %}
    {%- elif m.role == 'tool' %}{{ ('' if ns.is_output else '<outputs>') ~ m.content }}{% set ns.is_output = true %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '' if ns.is_output else '<|assistant|>' }}{% endif %}"""

# gpt-oss: channels, the thought of the last answer only, another end for the last turn than for the earlier ones
CHANNELS = r"""{{- '<|start|>system<|message|>Reasoning: ' ~ (reasoning_effort if reasoning_effort is defined else 'medium') }}
{{- '\nDate: ' ~ strftime_now('%Y') ~ '<|end|>' }}
{%- set talk = messages[1:] if messages[0].role in ['system', 'developer'] else messages %}
{%- if talk | length < messages | length or tools %}{{ '<|start|>developer<|message|>' }}
    {{- messages[0].content if talk | length < messages | length else '' }}
    {%- for tool in tools or [] %}{{ '\ntype ' ~ tool.function.name ~ ' = () => any;' }}{% endfor %}{{ '<|end|>' }}
{%- endif %}
{%- set call_of = namespace(name=none) %}
{%- for m in talk %}
    {%- if m.role == 'assistant' %}{% generation %}
        {%- if 'tool_calls' in m %}
            {%- set later = namespace(found=false) %}
            {%- for other in talk[loop.index:] %}{% if other.role == 'assistant' and 'tool_calls' not in other %}{% set later.found = true %}{% endif %}{% endfor %}
            {%- if m.thinking and not later.found %}{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{% endif %}
            {%- set call = m.tool_calls[0].function %}{% set call_of.name = call.name %}
            {{- '<|start|>assistant to=' ~ call.name ~ '<|channel|>commentary json<|message|>' ~ (call.arguments | tojson) ~ '<|call|>' }}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if 'thinking' in m %}{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{% endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ '<|return|>' }}
        {%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}
    {%- endgeneration %}
    {%- elif m.role == 'tool' %}{{ '<|start|>' ~ call_of.name ~ ' to=assistant<|message|>' ~ m.content ~ '<|end|>' }}
    {%- else %}{{ '<|start|>user<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# Mistral: no prompt for an answer, a space before it, call ids of nine letters, the system prompt in the last question
BRACKETS = r"""{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set talk = messages[1:] if messages[0].role == 'system' else messages %}
{%- set asked = talk | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}
{%- for m in talk %}
    {%- if m.role == 'user' %}
        {%- if tools and m == asked[-1] %}{{ '[RESULTS]' ~ (tools | tojson) }}{% endif %}
        {{- '[INST] ' ~ (system ~ '\n\n' if system and m == asked[-1] else '') ~ m.content ~ '[/INST]' }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}{% generation %}{{ '[CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
            {{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' ~ (']<|end|>' if loop.last else ', ') }}
        {%- endfor %}{% endgeneration %}
    {%- elif m.role == 'assistant' %}{% generation %}{{ ' ' ~ (m.content | trim) ~ '<|end|>' }}{% endgeneration %}
    {%- elif m.role == 'tool' %}{{ '[RESULTS]{"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id ~ '"}[/RESULTS]' }}{% endif %}
{%- endfor %}"""

# GLM: an answer ends with the name of who speaks next, which the template looks up
NEXT_SPEAKER = r"""{{- '[INST]' }}{% if tools %}{{ '<|system|>\n' ~ (tools | tojson) }}{% endif %}
{%- macro visible(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|user|>' if loop.first or messages[loop.index0 - 1].role != 'assistant' else '' }}{{ '\n' ~ visible(m.content) }}
    {%- elif m.role == 'system' %}{{ '<|system|>\n' ~ visible(m.content) }}
    {%- elif m.role == 'tool' %}{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
    {%- else %}{{ '<|assistant|>' }}{% set content = visible(m.content or '') %}
        {%- generation %}{{ '\n<think>' ~ (m.reasoning_content or '') ~ '</think>' }}{{ '\n' ~ content.strip() if content.strip() else '' }}
        {%- if m.tool_calls %}{% for call in m.tool_calls %}{% set call = call.function or call %}
            {{- '\n<tool_call>' ~ call.name }}{% for key, value in call.arguments.items() %}{{ '\n' ~ key ~ '=' ~ (value | tojson) }}{% endfor %}{{ '\n</tool_call>' }}
        {%- endfor %}{{ '<|tool|>' }}
        {%- elif loop.last %}{{ '<|user|>' }}
        {%- elif messages[loop.index0 + 1].role == 'system' %}{{ '<|system|>' }}
        {%- else %}{{ '<|user|>' }}{% endif %}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# Granite: documents and options of the record in the system prompt
DOCUMENTS = r"""{{- '<turn>system<sep>' ~ (messages[0].content if messages[0].role == 'system' else 'Help.') }}
{%- if controls is defined %}{{ ' Length: ' ~ controls.length }}{% endif %}{{ '</turn>\n' }}
{%- for document in documents or [] %}{{ '<turn>document ' ~ document.doc_id ~ '<sep>' ~ document.text ~ '</turn>\n' }}{% endfor %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'assistant' %}{{ '<turn>assistant<sep>' }}{% generation %}{{ m.content }}{{ '</turn>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}{{ '<turn>' ~ m.role ~ (' ' ~ m.name if m.name else '') ~ '<sep>' ~ m.content ~ '</turn>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant<sep>' }}{% endif %}"""

# Cohere: two tokens end an answer, the first system prompt is looked up, loop controls
TWO_ENDS = r"""{{- bos_token }}{% set ns = namespace(system=false) %}
{%- for m in messages %}{% if m['role'] | lower == 'system' %}{% set ns.system = m['content'] %}{% break %}{% endif %}{% endfor %}
{{- '<turn><|system|># Preamble\n' ~ (ns.system or 'Help.') ~ '</turn>' }}
{%- for m in messages %}{% set role = m['role'] | lower %}
    {%- if role == 'system' and m['content'] == ns.system %}{% continue %}{% endif %}
    {%- if role == 'user' %}{{ '<turn><|user|>' ~ m['content'] ~ '</turn>' }}
    {%- elif role == 'assistant' %}{{ '<turn><chatbot><answer>' }}{% generation %}{{ m['content'] }}{{ '</answer></turn>' }}{% endgeneration %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn><chatbot><answer>' }}{% endif %}"""

# Gemma 4: two blocks an answer, one of them often empty; results stand within the assistant's turn, found by looking ahead
WITHIN = r"""{{- bos_token }}{% for m in messages if m.role != 'tool' %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{%- set ns = namespace(at=-1, went_on=false) %}
{%- for other in messages %}{% if other == m %}{% set ns.at = loop.index0 %}{% endif %}{% endfor %}
{%- set ns.went_on = ns.at > 1 and messages[ns.at - 1].role == 'tool' %}
{{- '' if ns.went_on else '<turn>' ~ role ~ '\n' }}
{%- if role == 'model' %}
    {%- generation %}{% for call in m.get('tool_calls') or [] %}{{ '<calls>' ~ call.function.name ~ (call.function.arguments | tojson) ~ '</calls>' }}{% endfor %}{% endgeneration %}
    {%- if m.get('tool_calls') %}
        {%- for other in messages[ns.at + 1:] %}{% if other.role != 'tool' %}{% break %}{% endif %}{{ '<outputs>' ~ other.content ~ '</outputs>' }}{% endfor %}
    {%- else %}{% generation %}{{ m.content | trim }}{{ '</turn>\n' }}{% endgeneration %}{% endif %}
{%- else %}{{ m.content | trim ~ '</turn>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""

# Models of images and text: only parts are read
PARTS = r"""{%- for m in messages %}{{ '<turn>' ~ m.role ~ '\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{{ '</turn>' }}{% endgeneration %}
    {%- else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '</turn>' }}{% endif %}{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"""

FAMILIES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "trimmed": TRIMMED,
    "two-blocks": TWO_BLOCKS,
    "model": MODEL,
    "outputs": OUTPUTS,
    "channels": CHANNELS,
    "brackets": BRACKETS,
    "next-speaker": NEXT_SPEAKER,
    "documents": DOCUMENTS,
    "two-ends": TWO_ENDS,
    "within": WITHIN,
    "parts": PARTS,
}
HEADER_OUTSIDE = ("chatml", "trimmed", "model", "brackets", "documents", "two-ends", "parts")
WITH_TOOLS = ("chatml", "thinking", "trimmed", "outputs", "channels", "brackets", "next-speaker", "within")
WITH_REASONING = ("thinking", "channels", "next-speaker")
