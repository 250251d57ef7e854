"""Converts checkpoints: published Hugging Face layouts to Orbax, back to the FP4-DFlash layout, and checks them.
Brings dense Llama-type models of llama.cpp into MiMo's form.

    scripts/convert.py to-orbax MiMo-V2.5-Pro-FP4-DFlash/ pro-orbax/
    scripts/convert.py to-hf    pro-orbax/ exported/
    scripts/convert.py quantize bf16/ fp4/ --calibrate texts/
    scripts/convert.py verify   exported/
    scripts/convert.py from-gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2/

Packed weights are carried bit for bit. A destination appears when it is complete, never before; a conversion that was
interrupted is simply run again. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.cli.values import output_folder, whole


def to_orbax_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.convert import to_orbax

    return _reported(args, to_orbax(Path(args.source), args.destination, args.overwrite))


def to_hf_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.convert import to_huggingface

    return _reported(args, to_huggingface(Path(args.source), args.destination, args.overwrite))


def from_gguf_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.gguf import from_gguf

    made = from_gguf(Path(args.source), args.destination, args.overwrite)
    experts = f"{made['experts']} experts in each of {made['layers']} layers, all chosen for every token"
    print(f"{args.destination}: complete. {experts}: MiMo's form, not MiMo's sparsity", file=sys.stderr)
    return {"destination": str(args.destination), **made}


def quantize_command(args: argparse.Namespace) -> dict:
    from mimo_jax.calibration.convert import quantize, quantize_calibrated

    source = Path(args.source)
    if not args.calibrate:
        return _reported(args, quantize(source, args.destination, args.overwrite))
    text = Path(args.calibrate)
    report = quantize_calibrated(source, args.destination, text, args.windows, args.overwrite)
    for name, error in report["error"].items():
        print(
            f"{name} windows: squared error of the experts' outputs {error['plain']:.2%} rounded plainly, "
            f"{error['calibrated']:.2%} calibrated",
            file=sys.stderr,
        )
    return _reported(args, report)


def verify_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.convert import verify

    return {"directory": args.directory, **verify(Path(args.directory))}


def _reported(args: argparse.Namespace, report: dict) -> dict:
    print(
        f"{args.destination}: complete. Peak memory {report['peak_over_base'] / 1e6:,.0f} MB above the interpreter's "
        f"base for {report['array_bytes'] / 1e6:,.0f} MB of arrays: {report['ratio']:.2f}x",
        file=sys.stderr,
    )
    return {"destination": str(args.destination), **report}


def parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command, text in (
        ("to-orbax", to_orbax_command, "a Hugging Face directory (FP8, FP4-DFlash or BF16) to Orbax"),
        ("to-hf", to_hf_command, "an Orbax directory to the published FP4-DFlash layout"),
        ("quantize", quantize_command, "BF16, F32 or FP8 experts to MXFP4, the whole to the FP4-DFlash layout"),
        ("from-gguf", from_gguf_command, "a dense Llama-type GGUF file to the FP4-DFlash layout, plainly rounded"),
    ):
        converter = commands.add_parser(name, help=text)
        converter.add_argument("source", help="the directory, or GGUF file, to read")
        converter.add_argument("destination", type=output_folder, help="the directory to create")
        converter.add_argument("--overwrite", action="store_true", help="replace the destination once the new is whole")
        converter.set_defaults(command=command)
    quantizer = commands.choices["quantize"]
    quantizer.add_argument("--calibrate", metavar="TEXT", help="text file, or folder of them, to round the experts for")
    quantizer.add_argument("--windows", type=whole(8), default=32, help="of 512 tokens to read of it, at most")
    verifier = commands.add_parser("verify", help="every file and tensor of a written directory against its manifest")
    verifier.add_argument("directory")
    verifier.set_defaults(command=verify_command)
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    print(json.dumps(args.command(args)))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bytes are mostly moved: an accelerator's memory would be in the way
    if sys.argv[1:2] == [
        "to-orbax"
    ]:  # for `convert._split_for`; a thread for each, where there is work to do, slows it
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    main_guard(lambda: main(sys.argv[1:]))
