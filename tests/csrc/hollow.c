/* A library that obeys the interface of AOTInductor's runner and computes nothing: what loading,
 * keeping and closing kernels needs, without a minute of compiling. Making a model of it takes
 * HOLLOW_MILLISECONDS of the environment. */
#include <stdlib.h>
#include <unistd.h>

int AOTInductorModelContainerCreateWithDevice(void **handle, size_t models, const char *device,
                                              const char *folder) {
  const char *wait = getenv("HOLLOW_MILLISECONDS");
  if (wait) usleep(1000 * atoi(wait));
  *handle = handle;
  (void)models, (void)device, (void)folder;
  return 0;
}

#define HOLLOW(name) \
  int name(void) __attribute__((alias("hollow"))); /* arguments are the caller's to clean up */
int hollow(void) { return 0; }

HOLLOW(AOTInductorGetLastError)
HOLLOW(AOTInductorModelContainerDelete)
HOLLOW(AOTInductorModelContainerExtractConstantsMap)
HOLLOW(AOTInductorModelContainerFreeInactiveConstantBuffer)
HOLLOW(AOTInductorModelContainerGetCallSpec)
HOLLOW(AOTInductorModelContainerGetConstantDtype)
HOLLOW(AOTInductorModelContainerGetConstantName)
HOLLOW(AOTInductorModelContainerGetConstantOriginalFQN)
HOLLOW(AOTInductorModelContainerGetConstantsBlobSize)
HOLLOW(AOTInductorModelContainerGetNumConstants)
HOLLOW(AOTInductorModelContainerGetNumOutputs)
HOLLOW(AOTInductorModelContainerRun)
HOLLOW(AOTInductorModelContainerRunConstantFolding)
HOLLOW(AOTInductorModelContainerRunSingleThreaded)
HOLLOW(AOTInductorModelContainerSwapConstantBuffer)
HOLLOW(AOTInductorModelContainerUpdateConstantBuffer)
HOLLOW(AOTInductorModelContainerUpdateConstantBufferFromCpu)
HOLLOW(AOTInductorModelContainerUpdateInactiveConstantBuffer)
HOLLOW(AOTInductorModelContainerUpdateUserManagedConstantBuffer)
HOLLOW(AOTInductorModelUpdateConstantsFromBlob)
