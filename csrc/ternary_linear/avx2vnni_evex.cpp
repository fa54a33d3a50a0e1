// For tests: see Isa::avx2vnni_evex.
#define ternary_linear_avx2vnni ternary_linear_avx2vnni_evex
#include "ternary_linear/avx2vnni.cpp"
