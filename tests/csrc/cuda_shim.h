#pragma once

#include <cstdint>

// Enough of CUDA's language for a host compiler to build and run a kernel whose threads do not
// talk to each other: one after the other, so that what is tested is the arithmetic and the
// indices, not the races. (Threads of these kernels share no element; see blend_device.h.)

#define __global__
#define __device__

struct ShimIndex {
  unsigned x = 0;
};

inline ShimIndex blockIdx, threadIdx, blockDim, gridDim;

struct ShimStream {
  int launches = 0;
  int blocks = 0;  // of the last launch
};

template <typename Kernel, typename... Arguments>
void ShimLaunch(Kernel kernel, int blocks, int threads, ShimStream* stream,
                Arguments... arguments) {
  ++stream->launches;
  stream->blocks = blocks;
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
  }
}

#define ESPER_LAUNCH(kernel, blocks, threads, stream, ...) \
  ShimLaunch(kernel, blocks, threads, stream, __VA_ARGS__)
