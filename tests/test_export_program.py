"""trine.export.to_program and to_package: graphs of trine's operators, in Python and in C++."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.utils import cpp_extension
from trine.export import library, to_package, to_program
from trine.nn import pack_linear

BATCH = torch.export.Dim.DYNAMIC
SOURCE = Path(__file__).parent / "export" / "run_package.cpp"
# What costs the time of a compiler here, and changes no result.
QUICKLY = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "compile_threads": 1,
    "cpp.simdlen": 1,
}


def _model() -> nn.Sequential:
    layers = [pack_linear(nn.Linear(64, 48), "ternary"), nn.ReLU()]
    return nn.Sequential(*layers, pack_linear(nn.Linear(48, 33), "int8")).eval()


@pytest.mark.parametrize("choice", ["int8", "ternary", "sparse24", "sparse24-int8", "ternary24"])
def test_a_program_gives_equal_bits_for_other_shapes(choice, tmp_path):
    model = nn.Sequential(pack_linear(nn.Linear(64, 9), choice), nn.ReLU()).eval()
    program = to_program(model, torch.randn(2, 64), dynamic_shapes=({0: BATCH},))
    torch.export.save(program, tmp_path / "m.pt2")
    x = torch.randn(5, 64)
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), model(x))
    by_name = to_program(model, {"input": x})
    assert torch.equal(by_name.module()(input=x), model(x))


def test_a_package_runs_in_cpp_with_trines_library_alone(tmp_path):
    model, path = _model(), tmp_path / "m.pt2"
    with torch._inductor.config.patch(QUICKLY):
        to_package(model, path, torch.randn(2, 64), dynamic_shapes=({0: BATCH},))
    assert list(tmp_path.iterdir()) == [path]
    x = torch.randn(7, 64)
    expected = model(x)
    assert torch.equal(torch._inductor.aoti_load_package(str(path))(x), expected)

    program = _compiled(tmp_path)
    command = [program, library(), path, *map(str, x.shape)]
    run = subprocess.run(command, input=x.numpy().tobytes(), capture_output=True, check=True)
    y = torch.from_numpy(np.frombuffer(run.stdout, np.float32).copy()).reshape(7, 33)
    assert torch.equal(y, expected)


def _compiled(folder: Path) -> Path:
    program = folder / "run_package"
    libraries = cpp_extension.library_paths()
    subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), "-std=c++20", "-O0", SOURCE, "-o", program),
            *(f"-I{path}" for path in cpp_extension.include_paths()),
            *(f"-L{path}" for path in libraries),
            *(f"-Wl,-rpath,{path}" for path in libraries),
            *("-ltorch", "-ltorch_cpu", "-lc10", "-ldl"),
        ],
        check=True,
    )
    return program


def test_what_cannot_be_exported_is_said(tmp_path):
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="in training mode"):
        to_program(_model().train(), x)
    with pytest.raises(ValueError, match="got list"):
        to_program(_model(), [x])
    with pytest.raises(ValueError, match=r"must end with \.pt2"):
        to_package(_model(), tmp_path / "m.onnx", x)
    assert not list(tmp_path.iterdir())
