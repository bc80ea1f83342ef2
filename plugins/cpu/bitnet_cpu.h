/* Ternary matrix multiplication on a CPU: Y[M, N] = X[M, K] . W[N, K]^T * scale + bias.
 *
 * The C interface of the library; nothing of ONNX Runtime is in it. Weights are repacked once,
 * by bitnet_cpu_create, for the fastest instruction path this processor has. A product then runs
 * in two steps, so that the caller spreads each over its own threads: bitnet_cpu_prepare converts
 * (activation_bits 8: quantizes) rows of X into a workspace, bitnet_cpu_multiply fills a
 * rectangle of Y from it. The numbers are those of bitnet_export/op.py, exact in the integers.
 * Nothing here prints, throws or starts a thread.
 */
#ifndef BITNET_CPU_H_
#define BITNET_CPU_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define BITNET_CPU_API
#else
#define BITNET_CPU_API __attribute__((visibility("default")))
#endif

typedef enum bitnet_cpu_status {
  BITNET_CPU_OK = 0,
  BITNET_CPU_INVALID_ARGUMENT = 1, /* a null pointer, a size or an attribute out of its range */
  BITNET_CPU_BAD_SHAPE = 2,        /* packed_weight or scale does not have the size K, N ask for */
  BITNET_CPU_CORRUPT_WEIGHTS = 3,  /* packed_weight holds code 0, which stands for no trit */
  BITNET_CPU_OUT_OF_MEMORY = 4,
  BITNET_CPU_UNKNOWN_PATH = 5,     /* BITNET_CPU_PATH names no path of this build */
  BITNET_CPU_UNSUPPORTED_PATH = 6  /* BITNET_CPU_PATH names a path this processor cannot run */
} bitnet_cpu_status;

typedef enum bitnet_cpu_type { BITNET_CPU_FLOAT32 = 0, BITNET_CPU_FLOAT16 = 1 } bitnet_cpu_type;

/* One layer's weights as the model file has them; only read during bitnet_cpu_create. */
typedef struct bitnet_cpu_layer {
  int64_t K;               /* inputs, 1 to 2^23 */
  int64_t N;               /* outputs, >= 1 */
  int64_t group_size;      /* 0, or a divisor of K: one scale for so many consecutive inputs */
  int64_t activation_bits; /* 8: int8 by absmax of each row; 0: float activations */
  const uint8_t* packed_weight; /* [N, K'/4]: codes w + 2, K' = K rounded up to 64 */
  size_t packed_weight_bytes;
  const float* scale; /* [1], [N], or [N, K / group_size] when group_size is not 0 */
  size_t scale_count;
  const float* bias; /* [N] or NULL */
} bitnet_cpu_layer;

typedef struct bitnet_cpu_weights bitnet_cpu_weights;

/* Repacks a layer into *weights, to be freed with bitnet_cpu_destroy. The environment variable
 * BITNET_CPU_PATH (portable, avx2, avxvnni, avx512vnni, neon) forces an instruction
 * path. */
BITNET_CPU_API bitnet_cpu_status bitnet_cpu_create(const bitnet_cpu_layer* layer,
                                                   bitnet_cpu_weights** weights);
BITNET_CPU_API void bitnet_cpu_destroy(bitnet_cpu_weights* weights);

/* Outputs come in panels of so many columns; the last may be ragged. */
BITNET_CPU_API int64_t bitnet_cpu_panel_width(const bitnet_cpu_weights* weights);
BITNET_CPU_API int64_t bitnet_cpu_panels(const bitnet_cpu_weights* weights);

/* Bytes of repacked weights, scales and bias held; bytes of workspace for M rows. */
BITNET_CPU_API size_t bitnet_cpu_weight_bytes(const bitnet_cpu_weights* weights);
BITNET_CPU_API size_t bitnet_cpu_workspace_bytes(const bitnet_cpu_weights* weights, int64_t M);

/* x [M, K], contiguous; rows [row_begin, row_end) of it go into the workspace. Calls for
 * disjoint rows may run at the same time. The workspace needs no alignment. */
BITNET_CPU_API bitnet_cpu_status bitnet_cpu_prepare(const bitnet_cpu_weights* weights,
                                                    const void* x, bitnet_cpu_type type,
                                                    int64_t M, int64_t row_begin,
                                                    int64_t row_end, void* workspace);

/* y [M, N], contiguous; fills rows [row_begin, row_end) of the columns of panels
 * [panel_begin, panel_end). Calls for disjoint rectangles may run at the same time. */
BITNET_CPU_API bitnet_cpu_status bitnet_cpu_multiply(const bitnet_cpu_weights* weights,
                                                     const void* workspace, int64_t M,
                                                     int64_t row_begin, int64_t row_end,
                                                     int64_t panel_begin, int64_t panel_end,
                                                     void* y, bitnet_cpu_type type);

/* The instruction path these weights were repacked for. */
BITNET_CPU_API const char* bitnet_cpu_path(const bitnet_cpu_weights* weights);

/* The index-th path this processor can run, best first; NULL past the last. */
BITNET_CPU_API const char* bitnet_cpu_available_path(int index);

/* A sentence on a status, naming what to do. */
BITNET_CPU_API const char* bitnet_cpu_status_string(bitnet_cpu_status status);

#ifdef __cplusplus
}
#endif

#endif /* BITNET_CPU_H_ */
