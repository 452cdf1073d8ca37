/* A CUDA driver for a card that is not there: it runs nothing, and tells Python what it is asked.
   The functions are those that Triton's driver calls; cuda.h, which declares them, is Triton's. */
#include "cuda.h"

static void (*loaded)(const void *image, CUfunction);
static void (*launched)(const CUlaunchConfig *, CUfunction, void **parameters);
static const void *images[1 << 12];
static unsigned long modules;

void tell(void (*on_load)(const void *, CUfunction),
          void (*on_launch)(const CUlaunchConfig *, CUfunction, void **)) {
  loaded = on_load;
  launched = on_launch;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  images[++modules] = image;
  *module = (CUmodule)modules;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  loaded(images[(unsigned long)module], *function);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  launched(config, function, parameters);
  return CUDA_SUCCESS;
}

/* Host memory is the card's. */
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}
/* Plenty of shared memory; 1024 threads a block, no spills. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 232448;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return cuCtxGetCurrent(context);
}
CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "none";
  return CUDA_SUCCESS;
}

#define NOTHING(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuCtxGetLimit, size_t *value, CUlimit limit)
NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
