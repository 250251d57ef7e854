"""What speeds of the native step are measured with: prompts that the model takes, and the bytes that a token reads."""

import mimo_jax as mimo
from mimo_jax.checkpoint.huggingface import read_hf_config
from mimo_jax.evaluation.native_speed import active_bytes, cache_bytes, prompt_of
from mimo_jax.generation import check_ids
from tests.checkpoint.samples import load_file


def test_prompts_are_taken_and_end_no_text():
    """Of any seed, and as long as asked for, though some ids stand for media."""
    model = mimo.load(draft="none")
    assert model.config.media is not None
    for seed in range(20):
        ids = prompt_of(model, 512, seed)
        check_ids(model.config, ids)
        assert len(ids) == 512 and not set(ids) & set(model.stop_ids)


def test_a_token_reads_the_text_model_and_its_experts():
    """Counted in the file: all but the embedding and the tower, and of the experts an eighth."""
    held = load_file(mimo.BUNDLED / "model-00001-of-00001.safetensors")
    expected = 0.0
    for name, (_, _, content) in held.items():
        share = 2 / 16 if ".experts." in name else 1
        expected += 0 if name.startswith(("visual.", "model.embed_tokens.")) else share * len(content)
    assert active_bytes(mimo.BUNDLED) == expected


def test_bytes_of_the_cache_are_counted():
    """Two global layers see all 256 positions, four sliding ones 64 of them: 8 heads of 36 + 24 float32 in each."""
    config = read_hf_config(mimo.BUNDLED)[0]
    assert cache_bytes(config, 256) == 2 * 256 * 8 * 60 * 4 + 4 * 64 * 8 * 60 * 4
