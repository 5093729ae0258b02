"""The kernels compile for an H100 where there is none: finds type errors that the interpreter hides, and spills.

In a process of its own, since this one may interpret kernels. On a machine without a GPU, Triton's own ptxas runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SCRIPT = """
import json, os, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dowser_peft.scoring import triton_backend as backend, triton_kernels as kernels

TYPES = {"weight": "*bf16", "activation": "*fp32", "sensitivity": "*fp32", "state": "*i64", "histogram": "*i32",
         "ties_of_row": "*i32", "ties_before_row": "*i64", "mask": "*i32"}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

def usage(name, **constants):
    kernel = getattr(kernels, name)
    constants |= {"stride_wi": 1, "stride_ai": 1, "stride_so": 1}
    names = kernel.arg_names
    types = TYPES | ({"mask": "*u8"} if constants.get("WHOLE_BYTES") else {})
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in names}
    values = {(names.index(a),): value for a, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names)
               if a not in constants and (a in types or a in ("in_features", "stride_wo", "stride_an", "stride_sn"))}
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": backend._NUM_WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    fields = dict(part.split(":") for line in text.splitlines() if "REG:" in line for part in line.split()
                  if part.startswith(("REG:", "STACK:")))
    return {"registers": int(fields["REG"]), "stack_bytes": int(fields["STACK"])}

tile = {"BLOCK_R": backend._BLOCK_R, "BLOCK_C": backend._BLOCK_C}
print(json.dumps({
    "count": usage("count_kernel", LOG2_BINS=backend._LOG2_BINS, **tile),
    "emit": usage("emit_kernel", WHOLE_BYTES=True, **tile),
    "emit shared bytes": usage("emit_kernel", WHOLE_BYTES=False, **tile),
    "ties": usage("ties_kernel", BLOCK_R=backend._TIES_BLOCK_R, BLOCK_C=backend._BLOCK_C),
}))
"""


def test_kernels_compile_for_sm_90_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    usage = json.loads(result.stdout)
    assert all(kernel["stack_bytes"] == 0 for kernel in usage.values()), usage
    assert usage["count"]["registers"] <= 128 and usage["emit"]["registers"] <= 128, usage
