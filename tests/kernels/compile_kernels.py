"""Compile every kernel for a GPU that need not be there: `python compile_kernels.py 90`. Prints one line per kernel.

Run in a process of its own, with the interpreter off; Triton brings the assembler along.
"""

from __future__ import annotations

import sys

import triton
from ross_kernels.adaln import triton_impl as adaln
from ross_kernels.noise_mse import triton_impl as noise_mse
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {"shift": "fp32", "scaling": "fp32", "eps": "fp32", "seed_low": "i64"}
INT64_POINTERS = {"t_out", "keys", "t_in"}
FLOAT32_POINTERS = {"signal", "sigma", "eps", "posterior", "row_grad"}
FLOAT_POINTERS = {"x_t", "mean", "logvar", "predicted", "result", "out", "x", "shift", "scale", "gate", "y"}
FLOAT_POINTERS |= {"grad", "grad_x", "grad_scale", "grad_gate", "grad_y"}


def signature(kernel: triton.runtime.JITFunction, constants: dict[str, object]) -> dict[str, str]:
    """Triton's type of every argument, by its name."""
    is_adaln = kernel.__module__ == adaln.__name__
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INT64_POINTERS:
            types[name] = "*i64"
        elif name in FLOAT_POINTERS and (is_adaln or name != "shift"):
            types[name] = "*bf16"
        elif name in FLOAT32_POINTERS and not is_adaln:
            types[name] = "*fp32"
        else:
            types[name] = TYPES.get(name, "i32")
    return types


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    block = noise_mse.DEFAULT_BLOCK
    jobs: list[tuple[triton.runtime.JITFunction, dict[str, object]]] = []
    for is_explicit in (True, False):
        tile = {"EXPLICIT": is_explicit, "BLOCK": block, "BLOCK_C": 64}
        jobs.append((noise_mse._noise_kernel, tile))
        jobs += [(noise_mse._mse_kernel, {**tile, "BACKWARD": is_backward}) for is_backward in (False, True)]
    kernels = (adaln._modulate_kernel, adaln._modulate_backward_kernel)
    kernels += (adaln._gate_kernel, adaln._gate_backward_kernel)
    # 2048: published denoisers are up to 1536 wide, and blocks are powers of two.
    jobs += [(kernel, {"BLOCK": block}) for kernel in kernels for block in (1024, 2048)]
    # Triton makes constants of arguments that are 1: one image, one draw, one patch, one column.
    jobs.append(
        (noise_mse._noise_kernel, {**tile, "num_images": 1, "num_draws": 1, "grid_size": 1, "num_timesteps": 1})
    )
    jobs += [(noise_mse._mse_kernel, {**tile, "BACKWARD": b, "num_images": 1, "tokens": 1}) for b in (False, True)]
    jobs += [(kernel, {"BLOCK": 1, "width": 1}) for kernel in kernels]
    for kernel, constants in jobs:
        source = ASTSource(fn=kernel, signature=signature(kernel, constants), constexprs=constants)
        compiled = triton.compile(source, target=target)
        print(kernel.fn.__name__, constants, f"{len(compiled.asm['cubin'])} bytes")


if __name__ == "__main__":
    main()
