"""What emulation cannot show: tiles and whole rounds on the GPU, held to what their emulation is (`make gpu`)."""

import pytest

from pallas_kernels.devices import on_hopper
from pallas_kernels.lanes import emulated
from tests.kernels.decode_step.hopper import device, threads
from tests.kernels.decode_step.hopper.test_attention import (  # noqa: F401
    test_a_block_that_no_query_sees_changes_no_bit,
    test_a_token_has_the_same_bits_alone_and_in_a_block,
    test_attention_is_softmax_in_float64,
    test_parts_without_keys_are_neutral,
    test_the_cache_holds_new_rows_and_nothing_else,
    test_warps_may_share_a_tile,
)
from tests.kernels.decode_step.hopper.test_products import (  # noqa: F401
    test_choices_add_in_their_order,
    test_down_of_experts_and_the_sum_of_choices,
    test_e4m3_decodes_as_ml_dtypes_does,
    test_every_code_is_its_number,
    test_gate_and_up_become_hidden_features,
    test_parts_add_in_their_order,
    test_products_are_those_of_the_numbers,
    test_rows_are_stored_where_they_belong,
)
from tests.kernels.decode_step.hopper.test_program import (  # noqa: F401
    test_a_round_may_be_several_launches,
    test_a_token_has_the_same_bits_in_any_block,
    test_it_is_the_flax_step,
    test_the_split_over_ctas_changes_little,
)
from tests.kernels.decode_step.hopper.test_routing import (  # noqa: F401
    test_active_experts_are_listed,
    test_large_logits_saturate,
    test_scores_are_those_of_float64,
    test_the_largest_logit_is_picked,
    test_top_k_is_that_of_jax,
)
from tests.kernels.decode_step.hopper.test_stream import (  # noqa: F401
    test_a_tap_shows_the_stream,
    test_embedding,
    test_factors,
    test_the_final_norm,
    test_the_stream_is_summed_and_scaled,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unchecked")]


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    if not on_hopper():
        pytest.skip("the decode step is compiled for Hopper alone")
    monkeypatch.setattr(emulated, "run", device.run)
    monkeypatch.setattr(threads, "run", device.launch)
