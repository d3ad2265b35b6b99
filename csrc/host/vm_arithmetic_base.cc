#define JAX_MPK_VM_ISA base
#include "host/vm_arithmetic.h"
