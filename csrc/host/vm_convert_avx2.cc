#define JAX_MPK_VM_ISA avx2
#include "host/vm_convert.h"
