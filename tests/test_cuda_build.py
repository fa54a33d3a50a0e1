"""libtrine_cuda: when it is built and loaded, and what the compiler made of its kernels."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trine
from test_cuda_sass import build_tool
from trine import _C, _library, backends
from trine.ops import _triton_kernels

ROOT = Path(__file__).parents[1]
LIBRARY = Path(trine.__file__).with_name("libtrine_cuda.so")

needs_library = pytest.mark.skipif(
    not _C.cuda_kernels, reason=f"the CUDA library is {_C.cuda_build}"
)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_library
class TestCompiledKernels:
    def test_has_code_for_each_target(self):
        cuobjdump = build_tool("cuobjdump")
        alone = re.search(r"for (sm_\d+) alone", _C.cuda_build)
        machine_code = {alone[1]} if alone else {"sm_80", "sm_90"}
        ptx = set() if alone else {"sm_90"}
        for kind, targets in {"--list-elf": machine_code, "--list-ptx": ptx}.items():
            listed = run(cuobjdump, kind, str(LIBRARY))
            assert targets <= set(re.findall(r"sm_\d+a?", listed))


class TestLoadRules:
    @pytest.fixture
    def built(self, monkeypatch) -> None:
        """As if this build had made the library."""
        monkeypatch.setattr(_C, "cuda_kernels", " quantize_rows/cuda")
        monkeypatch.setattr(_C, "cuda_build", "built with nvcc 13.0")

    def test_not_built(self, tmp_path, monkeypatch):
        (tmp_path / "libtrine_cuda.so").write_bytes(b"left by an older build")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(_C, "cuda_kernels", "")
        monkeypatch.setattr(_C, "cuda_build", "not built: no nvcc was found")
        library = _library.load_cuda_library(tmp_path / "libtrine_cuda.so")
        assert (library.loaded, library.status) == (False, "not built: no nvcc was found")
        monkeypatch.setattr(_library, "cuda_library", library)
        monkeypatch.setattr(_triton_kernels, "available", lambda: True)
        for op in backends.describe().ops:
            if op.op in _triton_kernels.OPS.values():
                assert op.cuda_kernels == ("triton",)
                assert "the CUDA library is not built: no nvcc was found" in op.cuda_reason
        monkeypatch.setattr(_triton_kernels, "available", lambda: False)
        for op in backends.describe().ops:
            assert op.cuda_kernels == ()
            assert op.cuda_reason == "the CUDA library is not built: no nvcc was found"

    def test_lost_library(self, built, tmp_path):
        lost = tmp_path / "libtrine_cuda.so"
        library = _library.load_cuda_library(lost)
        assert not library.loaded
        assert library.status == f"built with nvcc 13.0, but {lost} is missing: install trine again"

    def test_torch_without_cuda(self, built, tmp_path, monkeypatch):
        (tmp_path / "libtrine_cuda.so").write_bytes(b"would not load")
        monkeypatch.setattr(torch.version, "cuda", None)
        library = _library.load_cuda_library(tmp_path / "libtrine_cuda.so")
        assert not library.loaded
        assert library.status.endswith(
            f"not loaded: this torch ({torch.__version__}) has no CUDA support"
        )

    def test_failed_load_shows_the_loaders_words(self, built, tmp_path, monkeypatch):
        (tmp_path / "libtrine_cuda.so").write_bytes(b"this is no ELF file")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        with pytest.warns(RuntimeWarning, match="failed to load: .*(file too short|invalid ELF)"):
            library = _library.load_cuda_library(tmp_path / "libtrine_cuda.so")
        assert not library.loaded
        assert re.search("file too short|invalid ELF", library.status)

    @needs_library
    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
    def test_only_cuda_symbols_of_torch_are_missing(self, monkeypatch):
        """The library itself is whole: all that a CPU-only torch lacks is torch's own CUDA part."""
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        with pytest.warns(RuntimeWarning, match="undefined symbol: aoti_torch_get_current_cuda"):
            _library.load_cuda_library(LIBRARY)

    @needs_library
    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
    def test_registers_its_kernels_once_it_loads(self, tmp_path):
        """In a process of its own, with the one symbol that torch's CUDA part would bring."""
        (tmp_path / "torch_cuda.c").write_text(
            "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
        )
        stand_in = tmp_path / "torch_cuda.so"
        run(build_tool("cc"), "-shared", "-fPIC", f"{tmp_path}/torch_cuda.c", "-o", str(stand_in))
        program = f"""
import ctypes, pathlib, torch
ctypes.CDLL("{stand_in}", mode=ctypes.RTLD_GLOBAL)
torch.version.cuda = "13.0"
import trine
print(trine._library.cuda_library.status)
print(torch._C._dispatch_has_kernel_for_dispatch_key("trine::quantize_rows", "CUDA"))
print([op.cuda_reason for op in trine.backends.describe().ops if op.cuda_kernels])
"""
        status, registered, reasons = run(sys.executable, "-c", program).splitlines()
        assert status == f"{_C.cuda_build}, loaded"
        assert registered == "True"
        assert "torch sees no GPU" in reasons

    def test_describe_has_a_cuda_line_for_each_op(self):
        found = backends.describe()
        for op in found.ops:
            assert bool(op.cuda_kernels) == (f" {op.op.split()[0]}/" in _C.cuda_kernels)
        text = str(found)
        assert text.count("cuda: ") == len(found.ops)
        assert _C.cuda_build in text
        if not torch.cuda.is_available():
            assert "runs on" not in text

    @needs_library
    def test_describe_names_the_kernels(self):
        (entry,) = (op for op in backends.describe().ops if op.op == "quantize_rows")
        assert entry.cuda_kernels == ("cuda",)


class TestBuildOption:
    """TRINE_CUDA, tried on a project that has nothing but EnableCuda.cmake."""

    def configure(self, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
        (folder / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.28)\nproject(trial LANGUAGES NONE)\n"
            f'set(CMAKE_CXX_COMPILER "c++")\ninclude("{ROOT}/third_party/cmake/EnableCuda.cmake")\n'
        )
        command = [build_tool("cmake"), "-S", str(folder), "-B", str(folder / "build")]
        return subprocess.run([*command, *options], capture_output=True, text=True)

    def broken_nvcc(self, folder: Path) -> str:
        nvcc = folder / "nvcc"
        words = 'host_config.h:156: #error -- unsupported GNU version! later than 12 "x"; see'
        nvcc.write_text(f"#!{sys.executable}\nprint({words!r})\nraise SystemExit(1)\n")
        nvcc.chmod(0o755)
        return f"-DTRINE_NVCC={nvcc}"

    def test_off(self, tmp_path):
        result = self.configure(tmp_path, "-DTRINE_CUDA=OFF", self.broken_nvcc(tmp_path))
        assert result.returncode == 0
        assert "CUDA library: not built: trine was built with TRINE_CUDA=OFF" in result.stdout

    def test_auto_with_an_unusable_nvcc_says_so_and_builds_for_the_cpu(self, tmp_path):
        result = self.configure(tmp_path, self.broken_nvcc(tmp_path))
        assert result.returncode == 0
        assert (
            "cannot compile with c++: host_config.h:156: ,error -- unsupported GNU version! "
            "later than 12 ,x, see\n"
        ) in result.stdout
        assert "CMake Warning" in result.stderr

    @pytest.mark.parametrize("nvcc", ["broken", "missing"])
    def test_on_without_a_usable_nvcc_is_an_error(self, tmp_path, nvcc):
        missing = f"-DTRINE_NVCC={tmp_path / 'no_such_nvcc'}"
        option = self.broken_nvcc(tmp_path) if nvcc == "broken" else missing
        result = self.configure(tmp_path, "-DTRINE_CUDA=ON", option)
        assert result.returncode != 0
        words = " ".join(result.stderr.split())
        assert "TRINE_CUDA=ON, but" in words
        assert "cannot compile with c++" in words

    @pytest.mark.parametrize("architecture", ["9.0", "sm_90", "90a"])
    def test_an_architecture_is_a_number(self, tmp_path, architecture):
        result = self.configure(tmp_path, f"-DTRINE_CUDA_ARCHITECTURE={architecture}")
        assert result.returncode != 0
        assert f"without its dot, as 90; it is '{architecture}'" in " ".join(result.stderr.split())

    def test_other_values_are_errors(self, tmp_path):
        result = self.configure(tmp_path, "-DTRINE_CUDA=perhaps")
        assert result.returncode != 0
        assert "TRINE_CUDA must be AUTO, ON or OFF; it is 'perhaps'" in result.stderr
