"""Which instruction sets tests run on."""

from trine import _C, backends


def isas_to_test(op: str | None = None) -> list[str]:
    """All that this machine can run; where `op` begins with an operator's name, those that it has
    kernels for.

    AVX2-VNNI's sources are tested in AVX-512's encoding where the processor lacks AVX-VNNI.
    """
    isas = backends.cpu_isas()
    if "avx2vnni" not in isas:
        isas += _C.test_isas()
    tables = [
        table for name, table in _C.kernels().items() if (op or "").startswith(name.split(" ")[0])
    ]
    kernels = {isa for table in tables for isa in table}
    return [isa for isa in isas if not kernels or isa.removesuffix("_evex") in kernels]
