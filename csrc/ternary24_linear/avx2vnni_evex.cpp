// For tests: see Isa::avx2vnni_evex.
#define ternary24_linear_avx2vnni ternary24_linear_avx2vnni_evex
#include "ternary24_linear/avx2vnni.cpp"
