# Finds the TensorRT headers and defines the interface library tensorrt_headers.
#
# Order: TENSORRT_INCLUDE_DIR; an SDK under TENSORRT_ROOT (variable or environment) or in the
# usual system folders; the folder that tools/fetch_tensorrt_headers.py unpacks into. Headers
# are all that is needed: the plugin links no TensorRT library.

include_guard(GLOBAL)

if(NOT TENSORRT_INCLUDE_DIR)
  find_path(BITNET_FOUND_TENSORRT NvInferRuntime.h
    HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES include
    PATHS /usr/local/tensorrt /opt/tensorrt)
  if(NOT BITNET_FOUND_TENSORRT)
    unset(BITNET_FOUND_TENSORRT CACHE)  # look again next time
    find_path(BITNET_FOUND_TENSORRT NvInferRuntime.h
      PATHS ${CMAKE_CURRENT_SOURCE_DIR}/.headers/tensorrt/include NO_DEFAULT_PATH)
  endif()
  set(bitnet_tensorrt_include ${BITNET_FOUND_TENSORRT})
else()
  set(bitnet_tensorrt_include ${TENSORRT_INCLUDE_DIR})
endif()

if(NOT EXISTS "${bitnet_tensorrt_include}/NvInferRuntime.h")
  message(FATAL_ERROR
    "TensorRT headers not found (looked for NvInferRuntime.h in '${bitnet_tensorrt_include}', "
    "TENSORRT_ROOT and the system folders).\n"
    "  -> run: python tools/fetch_tensorrt_headers.py   (or pass -DTENSORRT_INCLUDE_DIR=DIR)")
endif()

# "10.14.1" from NvInferVersion.h, whose macros were renamed within TensorRT 10.
set(BITNET_TENSORRT_VERSION "")
foreach(part MAJOR MINOR PATCH)
  file(STRINGS "${bitnet_tensorrt_include}/NvInferVersion.h" line
       REGEX "^#define (NV_TENSORRT_${part}|TRT_${part}_ENTERPRISE) [0-9]+" LIMIT_COUNT 1)
  string(REGEX MATCH "[0-9]+" number "${line}")
  string(APPEND BITNET_TENSORRT_VERSION ".${number}")
endforeach()
string(SUBSTRING "${BITNET_TENSORRT_VERSION}" 1 -1 BITNET_TENSORRT_VERSION)
if(BITNET_TENSORRT_VERSION VERSION_LESS 10.0)
  message(FATAL_ERROR
    "${bitnet_tensorrt_include} holds TensorRT ${BITNET_TENSORRT_VERSION}; the plugin interface "
    "used here (IPluginV3) needs 10.0.\n"
    "  -> install TensorRT 10 or 11, or run: python tools/fetch_tensorrt_headers.py")
endif()
message(STATUS "TensorRT headers ${BITNET_TENSORRT_VERSION}: ${bitnet_tensorrt_include}")

# The TensorRT headers include <cuda_runtime_api.h> for the type cudaStream_t. Without a CUDA
# toolkit (emulated build only) a few declarations stand in for it.
if(BITNET_BUILD_CUDA)
  set(bitnet_cuda_include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
else()
  find_path(BITNET_CUDA_INCLUDE cuda_runtime_api.h
    HINTS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda PATH_SUFFIXES include)
  set(bitnet_cuda_include ${BITNET_CUDA_INCLUDE})
  if(NOT bitnet_cuda_include OR BITNET_FORCE_CUDA_SHIM)
    set(bitnet_cuda_include ${CMAKE_CURRENT_SOURCE_DIR}/tensorrt/cuda_shim)
    message(STATUS "No CUDA toolkit: cudaStream_t comes from ${bitnet_cuda_include}")
  endif()
endif()

add_library(tensorrt_headers INTERFACE)
target_include_directories(tensorrt_headers SYSTEM INTERFACE
  ${bitnet_tensorrt_include} ${bitnet_cuda_include})
