// The part of CUDA's runtime and driver that TVM calls, with this process's memory as that of the device.
//
// What is loaded as a module is the path of a library, whose kernels `cuda_on_host.h` runs. The variable
// CUDA_ON_HOST is the compute capability of the device, e.g. 8.7; where it is empty, there is none.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>

typedef int (*Launch)(const unsigned *grid, const unsigned *block, void **given);
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned attribute_count;
};
enum { OK = 0, INVALID = 1, NOT_FOUND = 500, LAUNCH_FAILED = 719 };
enum { MAJOR = 75, MINOR = 76 };  // of cudaDeviceAttr

// Of the device, or 0.
static int capability(int attribute) {
    const char *given = getenv("CUDA_ON_HOST"), *point = given ? strchr(given, '.') : nullptr;
    return point ? atoi(attribute == MAJOR ? given : point + 1) : 0;
}

extern "C" {
int launched_since_waiting = 0;  // kernels, of which nobody knows whether they are done

int cuModuleLoadData(void **module, const void *path) {
    *module = dlopen((const char *)path, RTLD_NOW | RTLD_LOCAL);
    return *module ? OK : INVALID;
}
int cuModuleUnload(void *) { return OK; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = dlsym(module, (std::string("launch_") + name).c_str());
    return *function ? OK : NOT_FOUND;
}
int cuFuncSetAttribute(void *, int, int) { return OK; }
int cuLaunchKernelEx(const LaunchConfig *how, void *function, void **given, void **) {
    if (how->block[0] * how->block[1] * how->block[2] > 1024 || how->shared)
        return INVALID;
    ++launched_since_waiting;
    return ((Launch)function)(how->grid, how->block, given) ? OK : LAUNCH_FAILED;
}
int cuGetErrorName(int, const char **text) { return *text = "error", OK; }
int cuGetErrorString(int, const char **text) { return *text = "error", OK; }
int cuDeviceGetName(char *text, int size, int) { return strncpy(text, "host", size), OK; }
int cuTensorMapEncodeTiled() { return INVALID; }

int cudaGetDeviceCount(int *count) { return *count = capability(MAJOR) > 0, OK; }
int cudaGetDevice(int *device) { return *device = 0, OK; }
int cudaSetDevice(int) { return OK; }
int cudaDeviceGetAttribute(int *value, int attribute, int) {
    return *value = attribute == MAJOR || attribute == MINOR ? capability(attribute) : 1024, OK;
}
int cudaGetDeviceProperties(void *, int) { return INVALID; }
int cudaMemGetInfo(size_t *free, size_t *all) { return *free = *all = (size_t)1 << 32, OK; }
int cudaMalloc(void **memory, size_t size) {
    *memory = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(*memory, 0xff, size);  // NaN
    return OK;
}
int cudaFree(void *memory) { return free(memory), OK; }
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int, void *) { return memcpy(to, from, size), OK; }
int cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, void *) { return memcpy(to, from, size), OK; }
int cudaStreamCreate(void **stream) { return *stream = nullptr, OK; }
int cudaStreamCreateWithFlags(void **stream, unsigned) { return *stream = nullptr, OK; }
int cudaStreamDestroy(void *) { return OK; }
int cudaStreamSynchronize(void *) { return launched_since_waiting = 0, OK; }
int cudaStreamWaitEvent(void *, void *, unsigned) { return OK; }
int cudaStreamBeginCapture(void *, int) { return INVALID; }
int cudaStreamEndCapture(void *, void **) { return INVALID; }
int cudaGraphInstantiate(void **, void *, uint64_t) { return INVALID; }
int cudaGraphLaunch(void *, void *) { return INVALID; }
int cudaGraphDestroy(void *) { return OK; }
int cudaGraphExecDestroy(void *) { return OK; }
int cudaEventCreate(void **event) { return *event = nullptr, OK; }
int cudaEventDestroy(void *) { return OK; }
int cudaEventRecord(void *, void *) { return OK; }
int cudaEventSynchronize(void *) { return OK; }
int cudaEventElapsedTime(float *milliseconds, void *, void *) { return *milliseconds = 0, OK; }
int cudaGetLastError() { return OK; }
int cudaPeekAtLastError() { return OK; }
const char *cudaGetErrorName(int) { return "error"; }
const char *cudaGetErrorString(int) { return "error"; }
}
