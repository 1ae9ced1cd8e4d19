"""Weights of the real base model, as the tests of drift use them."""

import pytest
from safetensors import safe_open


@pytest.fixture(scope="module")
def real_weights(smollm2):
    with safe_open(smollm2.folder / "model.safetensors", "pt") as file:
        return {
            (layer, module): file.get_tensor(f"model.layers.{layer}.self_attn.{module}.weight")
            for layer in (0, 5, 29)
            for module in ("q_proj", "v_proj")
        }
