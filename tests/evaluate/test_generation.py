import pytest
import torch

from megatron_cpt.evaluate.models.generation import continuations, side_by_side
from megatron_cpt.evaluate.models.language_model import loaded_model


def test_greedy_continuations_are_the_most_likely_tokens_also_beyond_the_context(tiny_model):
    with loaded_model("tiny", tiny_model) as model:
        (text,) = continuations(model, ["the cat sat on the mat"], num_tokens=40, temperature=0.0, seed=1)
        tokens = [model.start_id, *model.encode(["the cat sat on the mat"])[0]]
        prompt = len(tokens)
        with torch.inference_mode():
            for _ in range(40):
                tokens.append(int(model.model(torch.tensor([tokens[-32:]])).logits[0, -1].argmax()))
        expected = model.tokenizer.decode(tokens[prompt:])
    assert expected.startswith(text) and text


def test_samples_follow_from_the_seed(tiny_model):
    with loaded_model("tiny", tiny_model) as model:
        one, again, other = (
            continuations(model, ["a"], num_tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)
        )
    assert one == again
    assert one != other


def test_continuations_stand_under_their_prompt_by_model():
    text = side_by_side(["Hello"], {"base": [" world"], "longer name": ["\nx"]})
    assert text.split("\n")[:3] == ["prompt: Hello", "  base          world", "  longer name  \\nx"]


def test_a_prompt_without_tokens_is_no_reason_to_fail(tiny_model):
    with loaded_model("tiny", tiny_model) as model:
        assert len(continuations(model, [""], num_tokens=2, temperature=0.0, seed=1)) == 1


@pytest.mark.parametrize("arguments", [["a=1", "a=2"], ["=x"], ["a="]])
def test_models_need_a_name_of_their_own(arguments):
    from megatron_cpt.errors import ConfigError
    from megatron_cpt.verbs.evaluate import named_paths

    with pytest.raises(ConfigError, match="NAME=PATH"):
        named_paths(arguments, "--model")


TEMPLATE = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|stop|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def chat_model(tiny_model, tmp_path):
    """Return a folder of the tiny model whose tokenizer has control tokens for turns; nothing names their meaning."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "chat"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|stop|>", "<|im_end|>", "<|other|>"]}
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def scripted(model, script: str):
    """Let a model write the tokens of a text, whatever it is given; return what it is given first."""
    tokens, given = iter(model.encode([script])[0]), []

    def logits(window):
        given.append(window[0].tolist())
        scores = torch.zeros(1, window.shape[1], len(model.tokenizer))
        scores[0, -1, next(tokens)] = 1.0
        return scores

    model.logits = logits
    return given


def answer(folder, script: str, **options):
    with loaded_model("chat", folder) as model:
        given = scripted(model, script)
        (text,) = continuations(model, ["Hi"], num_tokens=30, temperature=0.0, seed=1, **options)
        return text, model.tokenizer.decode(given[0])


def test_a_usual_end_of_turn_ends_a_continuation_and_another_control_token_does_not(chat_model):
    assert answer(chat_model, "yes<|other|>so<|im_end|>\nmore and more and more and more")[0] == "yes<|other|>so"
    assert answer(chat_model, "yes<|stop|>" + "o" * 40)[0] == "yes<|stop|>" + "o" * 26


def test_the_ends_of_generation_config_count(chat_model):
    from transformers import AutoTokenizer, GenerationConfig

    stop = AutoTokenizer.from_pretrained(chat_model).convert_tokens_to_ids("<|stop|>")
    GenerationConfig(eos_token_id=[0, stop]).save_pretrained(chat_model)
    assert answer(chat_model, "yes<|stop|>" + "o" * 40)[0] == "yes"


def test_the_own_templates_end_of_turn_counts(chat_model):
    (chat_model / "chat_template.jinja").write_text(TEMPLATE)
    assert answer(chat_model, "yes<|stop|>" + "o" * 40)[0] == "yes"


def test_a_prompt_becomes_a_users_turn_by_the_template_alone(chat_model, tmp_path):
    from megatron_cpt.data.chat.template import load_template

    (tmp_path / "t.jinja").write_text(TEMPLATE)
    template = load_template(chat_model, tmp_path / "t.jinja")
    text, given = answer(chat_model, "Hi yes<|stop|>" + "o" * 40, template=template)
    assert (text, given) == ("Hi yes", "<|user|>Hi<|stop|>\n<|assistant|>")


def test_the_verb_answers_a_user(chat_model, tmp_path, capsys):
    from megatron_cpt.cli import main

    words = ["evaluate", "generate", "--model", f"m={chat_model}", "--prompt", "Hi", "--tokens", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--chat", "chatml"])
    assert ended.value.code == 0 and "prompt: Hi" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*words, "--chat"])
    assert ended.value.code == 2 and "has no chat template" in capsys.readouterr().err
