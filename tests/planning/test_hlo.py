"""A compiled program's text, in miniature: what counts, how often, and how large it is."""

from mimo_jax.planning.hlo import array_bytes, executed, is_collective, parameter_shapes

TEXT = """\
HloModule jit_round

%fused (p: u8[4,4]) -> bf16[4,4] {
  %p = u8[4,4]{1,0} parameter(0)
  ROOT %c = bf16[4,4]{1,0} convert(%p)
}

%inner (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %wide = bf16[1000,1000]{1,0} fusion(%t), calls=%fused, metadata={op_name="jit(f)/layers_3/moe/while/body/convert"}
  ROOT %r = (s32[], f32[8]{0}) tuple(%t, %wide)
}

%outer (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  %sum = f32[8,64]{1,0} all-reduce-start(%t.1), to_apply=%fused, metadata={op_name="jit(f)/layers_3/psum"}
  %done = f32[8,64]{1,0} all-reduce-done(%sum)
  %experts = (s32[], f32[8]{0}) while(%t.1), condition=%cond, body=%inner
  ROOT %r.1 = (s32[], f32[8]{0}) tuple(%t.1, %sum)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %copied = f32[8]{0} copy(%a)
  %rounds = (s32[], f32[8]{0}) while(%copied), condition=%cond, body=%outer
  ROOT %out = f32[8]{0} get-tuple-element(%rounds), index=1
}
"""


def test_instructions_are_found_with_the_loops_around_them():
    """What is fused counts as one kernel; views and tuples are nothing; loops are walked into."""
    found = {step.instruction.name: len(step.loops) for step in executed(TEXT)}
    assert found == {"copied": 0, "sum": 1, "done": 1, "wide": 2}


def test_sizes_and_collectives():
    """Bytes are those of the result, of a pair of (input, output) the larger; a transfer counts once, at its start."""
    steps = {step.instruction.name: step.instruction for step in executed(TEXT)}
    assert steps["wide"].nbytes == 2_000_000
    assert steps["wide"].source.endswith("moe/while/body/convert")
    assert array_bytes("(f32[8,48], f32[8,384])") == 8 * 384 * 4
    assert parameter_shapes(TEXT) == {"f32[8]"}
    assert [name for name, instruction in steps.items() if is_collective(instruction)] == ["sum"]
