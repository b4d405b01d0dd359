// Kernels of probe_faults.py: fill and checksum memory, keep writing for a stated time, and break in
// each way that a serving kernel can. Built with `nvcc -cubin -arch=sm_90`.

#include <cassert>
#include <cstdint>

typedef unsigned long long u64;

__device__ inline u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

extern "C" __global__ void fill(u64* words, u64 count, u64 seed) {
  u64 stride = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    u64 x = (i + seed) * 0x9E3779B97F4A7C15ull;
    words[i] = x ^ (x >> 29);
  }
}

// A position-sensitive sum (Fletcher's within a thread, weighted by the thread across them). The
// same bytes give the same sum for one grid only, so callers never vary the grid.
extern "C" __global__ void checksum(const ulonglong2* data, u64 count, u64* sum) {
  u64 stride = (u64)gridDim.x * blockDim.x;
  u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  u64 a = 0, b = 0, i = thread;
  for (; i + 7 * stride < count; i += 8 * stride) {
    ulonglong2 v[8];
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = __ldcs(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      a += v[k].x; b += a;
      a += v[k].y; b += a;
    }
  }
  for (; i < count; i += stride) {
    ulonglong2 v = data[i];
    a += v.x; b += a;
    a += v.y; b += a;
  }
  u64 total = a + b * (2 * thread + 1);
  for (int offset = 16; offset; offset /= 2) total += __shfl_down_sync(~0u, total, offset);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, total);
}

// Every block increments a counter of its own, 128 bytes apart, for `ns` of wall time.
extern "C" __global__ void write_counters(u64* counters, u64 ns) {
  if (threadIdx.x) return;
  volatile u64* counter = counters + blockIdx.x * 16;
  u64 start = nanoseconds();
  do {
    *counter = *counter + 1;
    __threadfence_system();
  } while (nanoseconds() - start < ns);
}

extern "C" __global__ void spin(u64 ns) {
  u64 start = nanoseconds();
  while (nanoseconds() - start < ns) {}
}

extern "C" __global__ void store_word(u64* target, u64 value) { *(volatile u64*)target = value; }

extern "C" __global__ void fault_misaligned(char* target, u64) { *(volatile u64*)(target + 1) = 7; }

extern "C" __global__ void fault_trap(char*, u64) { asm volatile("trap;"); }

extern "C" __global__ void fault_assert(char*, u64 value) { assert(value == 0x5eed); }

// A bulk tensor copy (TMA) through a descriptor of zeros: the field's usual "illegal instruction".
extern "C" __global__ void fault_tensor_map(char* descriptor, u64) {
  __shared__ alignas(128) char tile[1024];
  __shared__ alignas(8) u64 barrier;
  uint32_t to = (uint32_t)__cvta_generic_to_shared(tile);
  uint32_t bar = (uint32_t)__cvta_generic_to_shared(&barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar));
  asm volatile("fence.proxy.async.shared::cta;");
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(descriptor), "r"(0), "r"(0), "r"(bar) : "memory");
  u64 start = nanoseconds();
  while (nanoseconds() - start < 1000000) {}
}
