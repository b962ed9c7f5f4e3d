// Marks functions that compilers of the host and of devices read alike.
#pragma once

#ifdef __CUDACC__
#define CONTRASTIVE_OPS_HOST_DEVICE __host__ __device__
#else
#define CONTRASTIVE_OPS_HOST_DEVICE
#endif
