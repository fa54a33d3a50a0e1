// For tests: see Isa::avx2vnni_evex.
#define sparse24_int8_avx2vnni sparse24_int8_avx2vnni_evex
#include "sparse24_linear/avx2vnni.cpp"
