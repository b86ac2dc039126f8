"""Further keys of lora are fields of peft.LoraConfig."""

import pytest
from good_recipe import GOOD, problems


@pytest.mark.parametrize("values", ["pissa_niter_4", "eva", "lora_ga"])
def test_initial_weights_that_peft_draws_anew_or_leaves_out_are_refused(load, values):
    [problem] = problems(load, GOOD, f"lora.init_lora_weights={values}")
    assert f"{values} is refused: gaussian, orthogonal, pissa, olora give" in problem


def test_further_lora_keys_are_those_of_peft_and_typed(load):
    recipe = load(GOOD + "lora: {use_rslora: true, init_lora_weights: pissa}\n")
    assert recipe.lora.model_extra == {"use_rslora": True, "init_lora_weights": "pissa"}
    assert "valid boolean" in problems(load, GOOD + "lora: {use_rslora: 'on'}\n")[0]
    assert "lora.alpha" in problems(load, GOOD + "lora: {lora_alpha: 4}\n")[0]
