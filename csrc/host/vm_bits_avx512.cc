#define JAX_MPK_VM_ISA avx512
#include "host/vm_bits.h"
