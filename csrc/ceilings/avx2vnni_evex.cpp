// For tests: see Isa::avx2vnni_evex.
#define dot_int8_avx2vnni dot_int8_avx2vnni_evex
#include "ceilings/avx2vnni.cpp"
