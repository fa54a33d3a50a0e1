// For tests: see Isa::avx2vnni_evex.
#define int8_linear_avx2vnni int8_linear_avx2vnni_evex
#include "int8_linear/avx2vnni.cpp"
