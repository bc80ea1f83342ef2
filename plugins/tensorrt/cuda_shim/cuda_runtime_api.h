// What the TensorRT headers need of CUDA when no toolkit is there: two handle types. Only the
// emulated build of the plugin uses this file; the shipped library is compiled with the real one.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
