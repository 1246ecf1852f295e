import pytest
import torch

from megatron_cpt.evaluate.generation import continuations, side_by_side
from megatron_cpt.evaluate.models import loaded_model


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
