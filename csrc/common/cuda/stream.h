// CUDA's own declaration of a stream, so that a file that only passes one on needs no CUDA headers.
#pragma once

typedef struct CUstream_st* cudaStream_t;
