"""What nvcc made of each CUDA kernel: the instructions meant, no spills, a bound on registers.

Kernels are compiled again for GPUs beside those that the library holds code for, as the library's
own build compiles them.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_kernels
import pytest
from cuda_kernels import BUILD, ROOT
from trine import _C

pytestmark = pytest.mark.skipif(not _C.cuda_kernels, reason=f"the CUDA library is {_C.cuda_build}")

# What a source must compile for. Every file but those of one generation: what is sold today and
# what comes after; the newest only has to compile.
TARGETS = {"cuda": ("80", "89", "90a", "120"), "cuda_sm80": ("80", "89"), "cuda_sm90a": ("90a",)}
FLAGS = ("-std=c++20", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", "-cubin")


@dataclass(frozen=True)
class Gate:
    """What each kernel whose name matches must be made of."""

    kernel: str
    instructions: tuple[str, ...]
    registers: int
    variants: int  # of the kernel in its source: one that is missing is no kernel


PIPELINE_INSTRUCTIONS = (
    r"UTMALDG\.2D ",
    r"UTMALDG\.2D\.MULTICAST",
    "SYNCS",
    "UCGABAR_WAIT",
    "USETMAXREG",
    r"STG\.E\.128",
)
SM90A_INSTRUCTIONS = (r"IGMMA\.64x256x32\.S8\.S8", *PIPELINE_INSTRUCTIONS)
# Weight tiles, batch tiles, warps. Two blocks of 256 threads, or one of 512, fit an SM with 128
# registers a thread; more rows have more sums.
FEW_ROWS = tuple(
    Gate(
        f"few_rows_kernel.*{tiles}",
        (r"IMMA\.16832\.S8\.S8", r"LDG\.E\.NA\.128"),
        registers,
        variants,
    )
    for tiles, registers, variants in (
        ("ELi[14]ELi1ELi", 128, 3),
        ("ELi[14]ELi2ELi", 160, 3),
        ("ELi[12]ELi4ELi8E", 160, 2),
        ("ELi1ELi8ELi8E", 200, 1),
    )
)
SPARSE_PRODUCTS = {"Int8": r"IMMA\.SP\.16864\.S8\.S8", "Float16": r"HMMA\.SP\.16832\.F32"}
# Of int8 values, or of 16-bit ones of two types.
SPARSE24 = tuple(
    Gate(
        f"sparse24_{kernel}.*{values}Values.*{sizes}",
        (product, *others),
        registers,
        variants * types,
    )
    for (values, product), types in zip(SPARSE_PRODUCTS.items(), (1, 2), strict=True)
    for kernel, sizes, others, registers, variants in (
        # Two blocks of 256 threads, or one of 512, fit an SM, but for four tiles of sums.
        ("few_rows_kernel", "ELi(1ELi[12]|2ELi1)ELi", (r"LDG\.E\.NA\.128",), 128, 7),
        ("few_rows_kernel", "ELi2ELi2ELi", (r"LDG\.E\.NA\.128",), 176, 1),
        # One block of 256 threads fits; of the smaller tiles, two where shared memory allows.
        ("tiles_kernel", "Li64ELi64E", ("LDGSTS", "LDSM"), 255, 1),
        ("tiles_kernel", "Li(16|32)ELi32E", ("LDGSTS", "LDSM"), 128, 2),
    )
)
# Each tile of y for values of 16 bits, and for int8 with outputs of 16 bits, which stmatrix
# transposes, and of 32.
SPARSE24_SM90A = tuple(
    gate
    for blocks, width in ((2, 192), (2, 176), (2, 128), (1, 64))
    for gate in (
        Gate(
            f"Weight16.*TileOfYILi{blocks}ELi{width}E",
            (rf"HGMMA\.SP\.64x{width}x32\.F32", r"STSM\.16\.MT88\.4", *PIPELINE_INSTRUCTIONS),
            168,
            2,
        ),
        Gate(
            f"Weight8.*float16.*TileOfYILi{blocks}ELi{width}E",
            (rf"IGMMA\.SP\.64x{width}x64\.S8", r"STSM\.16\.MT88\.4", *PIPELINE_INSTRUCTIONS),
            168,
            2,
        ),
        Gate(
            f"Weight8Ef.*TileOfYILi{blocks}ELi{width}E",
            (rf"IGMMA\.SP\.64x{width}x64\.S8", *PIPELINE_INSTRUCTIONS),
            168,
            1,
        ),
    )
)
ROWS_OF_LOGITS = (r"LDG\.E\.128", "FFMA")
GRADIENT = (*ROWS_OF_LOGITS, r"STG\.E\.128")
# Rows go to shared memory past the registers; LD.E.64 is a read from another block.
ONE_PASS = (r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128", r"STG\.E\.128", r"LD\.E\.64", "UCGABAR_WAIT")
GATES = {
    "quantize_rows/cuda": (
        # Beyond 64 registers an SM holds fewer than 1024 threads, too few loads in flight.
        Gate("quantize_rows_kernel.*Lb1E", (r"LDG\.E\.128", r"STG\.E"), 64, 15),
        Gate("quantize_rows_kernel.*Lb0E", ("LDG", "STG"), 64, 15),
        Gate("quantize_rows_static_kernel", ("LDG", r"STG\.E"), 40, 1),
    ),
    "norm_quantize_rows/cuda": (
        # MUFU.RSQ begins the square root; a norm needs what the quantiser does, and its parameters.
        # LayerNorm looks at a row once more, and knows its centre. Beyond 64 registers an SM holds
        # one block of 512 threads, with 32 KB of loads in flight.
        Gate("norm_q.*NormE0E.*Lb1E", (r"LDG\.E\.128", r"STG\.E", r"MUFU\.RSQ"), 64, 12),
        Gate("norm_q.*NormE1E.*Lb1E", (r"LDG\.E\.128", r"STG\.E", r"MUFU\.RSQ"), 80, 12),
        Gate("norm_q.*Lb0E", ("LDG", "STG", r"MUFU\.RSQ"), 96, 24),
    ),
    "int8_embedding/cuda": (
        # A chunk of y from 4 codes of a lane, or from 8 for 16-bit types, and one store.
        Gate("kernelIfLb1E", (r"LDG\.E ", "I2F", r"STG\.E\.128"), 40, 1),
        Gate("kernelIN.*Lb1E", (r"LDG\.E\.64", "I2F", "F2F", r"STG\.E\.128"), 40, 2),
        Gate("int8_embedding_kernel.*Lb0E", ("LDG", "I2F", "STG"), 40, 3),
    ),
    "softmax_kl/cuda": (
        # Of 16-bit logits: a plain KL, of which three blocks (forward) or two fit an SM, and the
        # rest. Exponentials are the multi-function unit's; of fp32 they are polynomials.
        Gate("softmax_kl_kernelILb0ELb0E", (*ROWS_OF_LOGITS, r"MUFU\.EX2"), 80, 1),
        Gate("softmax_kl_backward_kernelILb0ELb0E", (*GRADIENT, r"MUFU\.EX2"), 128, 1),
        Gate("softmax_kl_kernelILb1ELb0E", (*ROWS_OF_LOGITS, r"MUFU\.(EX2|LG2|RCP)"), 128, 1),
        Gate("softmax_kl_backward_kernelILb1ELb0E", (*GRADIENT, r"MUFU\.(EX2|LG2|RCP)"), 128, 1),
        Gate("softmax_kl_kernelILb[01]ELb1E", ROWS_OF_LOGITS, 128, 2),
        Gate("softmax_kl_backward_kernelILb[01]ELb1E", GRADIENT, 128, 2),
        Gate("softmax_kl_scale_kernel", (r"LDG\.E\.128", r"STG\.E\.128"), 64, 1),
        Gate("softmax_kl_top_k_kernel", (*ROWS_OF_LOGITS, r"ATOMS\.OR"), 128, 2),
        Gate("softmax_kl_top_k_backward_kernel", GRADIENT, 128, 2),
    ),
    "softmax_kl/cuda_sm90a": (
        # Three blocks fit an SM, of the rest two.
        Gate("one_pass_kernelILb0ELb0E", (*ONE_PASS, r"MUFU\.EX2"), 80, 1),
        Gate("one_pass_kernelILb1ELb0E", (*ONE_PASS, r"MUFU\.(EX2|LG2|RCP)"), 128, 1),
        Gate("one_pass_kernelILb[01]ELb1E", ONE_PASS, 128, 2),
    ),
    "int8_linear/cuda": (
        *FEW_ROWS,
        # One block of 256 threads has at least 128 registers a thread; one fits an SM.
        Gate("many_rows_kernel", (r"IMMA\.16832\.S8\.S8", "LDGSTS", r"LDSM"), 168, 1),
        Gate("zero_point_kernel", (r"IDP\.4A\.S8\.S8", r"LDG\.E\.128"), 64, 1),
    ),
    "int8_conv2d/cuda": (
        # Units of 16 bytes, and words, of which a thread gathers four times as many.
        *(
            Gate(
                f"conv_kernel.*{kernel}",
                (r"IMMA\.16832\.S8\.S8", copy, "LDSM"),
                registers,
                variants,
            )
            for kernel, copy, registers, variants in (
                ("Li16E", r"LDGSTS\.E\.BYPASS\.128", 168, 3),
                ("Li2ELi4ELi4EEELi4E", r"LDGSTS\.E ", 224, 1),
                ("(Li2ELi2ELi2E|Li4ELi1ELi2E)EELi4E", r"LDGSTS\.E ", 168, 2),
            )
        ),
        Gate("depthwise_kernel", (r"IDP\.4A\.S8\.S8", "LDG"), 80, 1),
        Gate("fill_images_kernel", ("LDG", r"STG\.E "), 48, 12),
        Gate("largest_kernel.*Lb1E", (r"LDG\.E\.128",), 48, 3),
        Gate("largest_kernel.*Lb0E", ("LDG",), 48, 3),
        Gate("conv_zero_point_kernel", ("LDG", r"STG\.E "), 40, 2),
    ),
    "int8_weight_linear/cuda": (
        # Two blocks of 256 threads fit an SM, one with two tiles of rows; of 128 x 128 tiles one.
        Gate("few_rows_kernel", (r"HMMA\.16816\.F32", r"LDG\.E\.NA\.128"), 144, 8),
        Gate("many_rows_kernel", (r"HMMA\.16816\.F32", "LDGSTS", "LDSM"), 168, 6),
        Gate("float_kernel", ("FFMA", "LDS"), 80, 2),
    ),
    "int8_linear/cuda_sm90a": (
        # Of the launch; setmaxnreg shares them out anew.
        Gate(
            "wgmma_kernel",
            SM90A_INSTRUCTIONS,
            168,
            3,
        ),
    ),
    "sparse24_linear/cuda": SPARSE24,
    "sparse24_linear/cuda_sm90a": SPARSE24_SM90A,
    "ternary_linear/cuda": (
        *FEW_ROWS,
        Gate("many_rows_kernel", (r"IMMA\.16832\.S8\.S8", "LDGSTS", r"LDSM"), 168, 1),
        Gate("grouped_kernel", (r"IMMA\.16832\.S8\.S8", r"LDG\.E\.128"), 64, 1),
    ),
    "ternary24_linear/cuda": (
        # Two blocks fit an SM; beyond 16 rows of x, one.
        *(
            Gate(
                f"few_rows_kernel.*{tiles}",
                (r"IMMA\.16832\.S8\.S8", r"LDG\.E\.NA\.128", r"LDS "),
                registers,
                variants,
            )
            for tiles, registers, variants in (
                ("ELi(1ELi[12]|2ELi1)ELi", 128, 5),
                ("ELi1ELi4ELi", 176, 1),
            )
        ),
        Gate("unpack_kernel", (r"STG\.E\.128", "LDS"), 40, 1),
    ),
    "ternary_linear/cuda_sm90a": (
        Gate(
            "wgmma_kernel",
            SM90A_INSTRUCTIONS,
            168,
            3,
        ),
    ),
}


def build_tool(name: str) -> str:
    """The path of a program: beside this Python, on the PATH, or in one of NVIDIA's wheels."""
    site_packages = Path(sysconfig.get_path("purelib"))
    places = [
        sysconfig.get_path("scripts"),
        os.environ.get("PATH", ""),
        *map(str, site_packages.glob("nvidia/*/bin")),
        str(site_packages / "triton/backends/nvidia/bin"),
        "/usr/local/cuda/bin",
    ]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"{name} was not found (for NVIDIA's tools: pip install nvidia-cuda-{name})")
    return found


def compiled(source: str, target: str) -> Path:
    """The machine code of a source of csrc for one GPU, compiled once."""
    op = source.split("/")[0]
    digest = cuda_kernels.sources_digest(ROOT / "csrc" / op, ROOT / "csrc" / "quantize_rows")
    cubin = BUILD / "sass" / f"{source.replace('/', '-')}-{target}-{digest}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        for outdated in cubin.parent.glob(f"{source.replace('/', '-')}-{target}-*"):
            outdated.unlink()
        partial = cubin.with_suffix(".partial")
        architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [build_tool("nvcc"), *FLAGS, architecture, ROOT / "csrc" / f"{source}.cu"]
        command += ["-Xptxas=-v", "-o", partial]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        # ptxas waits after each wgmma where it cannot prove that nothing touches its registers.
        assert "serialized" not in said, said
        partial.rename(cubin)
    return cubin


def by_kernel(cubin: Path, what: str, pattern: str) -> dict[str, str]:
    """What cuobjdump says of each kernel, by its name."""
    tool = build_tool("cuobjdump")
    directory = Path(build_tool("nvdisasm")).parent  # cuobjdump calls it
    environment = {**os.environ, "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
    dump = subprocess.run(
        [tool, what, cubin], check=True, capture_output=True, text=True, env=environment
    ).stdout
    parts = re.split(pattern, dump)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module", autouse=True)
def _compiled_on_all_cores(request):
    asked = [
        item.callspec.params
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    pairs = {(params["source"], params["target"]) for params in asked if "source" in params}
    with ThreadPoolExecutor(cuda_kernels.CORES) as pool:
        list(pool.map(lambda pair: compiled(*pair), sorted(pairs)))


def test_every_source_has_gates():
    assert set(_C.cuda_kernels.split()) == set(GATES)


@pytest.mark.parametrize(
    ("source", "target"),
    [(source, target) for source in GATES for target in TARGETS[source.split("/")[1]]],
)
def test_kernels_are_made_of_what_is_meant(source, target):
    cubin = compiled(source, target)
    usage = by_kernel(cubin, "--dump-resource-usage", r"Function (\S+):\n")
    code = by_kernel(cubin, "--dump-sass", r"Function : (\S+)")
    assert usage.keys() == code.keys()
    gates = GATES[source]
    for gate in gates:
        matched = [name for name in usage if re.search(gate.kernel, name)]
        assert len(matched) == gate.variants, (gate, matched)
    for name, used in usage.items():
        matching = [gate for gate in gates if re.search(gate.kernel, name)]
        assert len(matching) == 1, f"{name} needs one gate, it has {len(matching)}"
        (gate,) = matching
        # STACK is memory for spilled registers and for arrays that were not kept in registers.
        counts = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+) ", used)
        assert counts is not None, used
        registers, stack, local = map(int, counts.groups())
        assert (stack, local) == (0, 0), f"{name} spills"
        if target == "120":
            continue
        assert registers <= gate.registers, f"{name}: {registers} registers"
        assert not re.search(r"\b(LDL|STL)\b", code[name]), f"{name} uses local memory"
        for instruction in gate.instructions:
            assert re.search(rf"\b{instruction}", code[name]), f"{name} lacks {instruction}"


@pytest.mark.parametrize("target", ["90a"])
@pytest.mark.parametrize("source", [source for source in GATES if source.endswith("r/cuda_sm90a")])
def test_wgmma_loops_wait_for_tiles_alone(source, target):
    """Not for all of memory, but where clusters begin and end; not for every product."""
    code = by_kernel(compiled(source, target), "--dump-sass", r"Function : (\S+)")
    for name, text in code.items():
        assert text.count("MEMBAR.ALL.GPU") == text.count("UCGABAR_ARV") == 2, name
        products = [at.start() for at in re.finditer("GMMA", text)]
        assert text[products[0] : products[-1]].count("WARPGROUP.DEPBAR") <= 1, name


@pytest.mark.parametrize("target", ["80", "90a"])
def test_quantize_rows_has_all_loads_in_flight(target):
    """The four chunks that a thread holds are on their way before it waits for one."""
    code = by_kernel(compiled("quantize_rows/cuda", target), "--dump-sass", r"Function : (\S+)")
    wide = {name: text for name, text in code.items() if "Lb1E" in name}
    assert len(wide) == 15
    for name, text in wide.items():
        loads = [at.start() for at in re.finditer(r"LDG\.E\.128", text)]
        assert not re.search(r"\b(BRA|SHFL|FMUL)\b", text[loads[0] : loads[3]]), name
        assert ("STG.E.64" if "float16" in name else "STG.E ") in text, name


@pytest.mark.parametrize("target", ["80", "90a"])
def test_sparse24_few_rows_keep_memory_busy(target):
    """A lane has all of its loads of values on their way before it uses one."""
    code = by_kernel(compiled("sparse24_linear/cuda", target), "--dump-sass", r"Function : (\S+)")
    few = {name: text for name, text in code.items() if "few_rows" in name}
    assert len(few) == 24
    for name, text in few.items():
        loads = [at.start() for at in re.finditer(r"LDG\.E\.NA\.128", text)]
        first_use = re.search("MMA", text)
        assert first_use is not None
        expected = 4 if re.search("ELi1ELi2ELi(8|16)E", name) else 8
        assert len(loads) == sum(at < first_use.start() for at in loads) == expected, name


@pytest.mark.parametrize("target", ["80", "90a"])
@pytest.mark.parametrize(
    ("op", "kernel"), [("int8_linear", "ELi[124]ELi[12]ELi"), ("ternary_linear", "ELi[14]ELi1ELi")]
)
def test_few_rows_keep_memory_busy(op, kernel, target):
    """A lane has most of its eight loads on their way before it uses one, and decodes frugally."""
    code = by_kernel(compiled(f"{op}/cuda", target), "--dump-sass", r"Function : (\S+)")
    few = {name: text for name, text in code.items() if re.search(f"few_rows.*{kernel}", name)}
    assert len(few) == (6 if op == "int8_linear" else 3)
    for name, text in few.items():
        loads = [at.start() for at in re.finditer(r"LDG\.E\.NA\.128", text)]
        assert len(loads) == 8, name
        first_use = re.search("IMMA|0x3030303|0xc0c0c0c", text)
        assert first_use is not None
        assert sum(at < first_use.start() for at in loads) >= 5, name
        if op == "ternary_linear":
            # 20 for each of eight chunks of 16 bytes, and what is outside of the loop.
            decoding = len(re.findall(r"\b(?:LOP3|SHF)\b", text))
            assert decoding <= 8 * 20 + 70, f"{name}: {decoding} shifts and masks"


@pytest.mark.parametrize("target", ["80", "90a"])
def test_softmax_kl_has_its_loads_in_flight(target):
    """Of both rows two chunks are on their way before an exponential; each takes one instruction.

    A chunk is eight classes: 32 exponentials for the four, and those of single classes and labels.
    """
    code = by_kernel(compiled("softmax_kl/cuda", target), "--dump-sass", r"Function : (\S+)")
    plain = {name: text for name, text in code.items() if re.search("_kernelILb0ELb0E", name)}
    assert len(plain) == 2
    for name, text in plain.items():
        loads = [at.start() for at in re.finditer(r"LDG\.E\.128", text)]
        assert len(loads) == 4, name
        assert not re.search(r"MUFU|SHFL", text[loads[0] : loads[3]]), name
        assert 32 <= len(re.findall(r"MUFU\.EX2", text)) <= 32 + 16 + 3, name


def test_softmax_kl_reads_rows_once():
    """To shared memory alone; eight chunks of both are on their way while a thread waits for one.

    Exponentials: of a chunk in the sums and in the gradient 16 and, of labels, 8 more, and those of
    single classes. A thread waits for its cluster once more than it exchanges sums.
    """
    code = by_kernel(compiled("softmax_kl/cuda_sm90a", "90a"), "--dump-sass", r"Function : (\S+)")
    assert len(code) == 4
    for name, text in code.items():
        assert not re.search(r"LDG\.E\.128", text), name
        precise = "ELb1E" in name
        assert len(re.findall(r"LDGSTS", text)) == (8 if precise else 4), name
        assert set(re.findall(r"DEPBAR\.LE SB0, (\w+)", text)) == {"0x7"}, name
        exchanges = 1 if "ILb0" in name else 2
        assert text.count("UCGABAR_ARV") == text.count("UCGABAR_WAIT") == exchanges + 1, name
    (plain,) = (text for name, text in code.items() if "ILb0ELb0E" in name)
    assert 2 * 16 <= len(re.findall(r"MUFU\.EX2", plain)) <= 2 * 24 + 6


@pytest.mark.parametrize("target", ["80", "90a"])
def test_ternary24_few_rows_keep_memory_busy(target):
    """A lane has all of its loads on their way before it uses one. A group takes one look-up, and
    of shifts and masks two; beside them is what is outside of the loop."""
    code = by_kernel(compiled("ternary24_linear/cuda", target), "--dump-sass", r"Function : (\S+)")
    few = {name: text for name, text in code.items() if "few_rows" in name}
    assert len(few) == 6
    for name, text in few.items():
        tiles, parts = (2, 2) if "ELi2ELi1E" in name else (1, 4 if "ELi1ELi4E" in name else 1)
        loads = [at.start() for at in re.finditer(r"LDG\.E\.NA\.128", text)]
        first_use = re.search("IMMA", text)
        assert first_use is not None
        assert len(loads) == sum(at < first_use.start() for at in loads) == 6 * tiles, name
        groups = 2 * tiles * 64 // parts
        assert len(re.findall(r"\bLDS ", text)) >= groups, name
        assert len(re.findall(r"\b(?:LOP3|SHF)\b", text)) <= 2 * groups + 80, name
