"""Random JAX programs and what they are compared with.

* :mod:`~tests.random_programs.values`: what the generator knows about a value (shape, type, bounds).
* :mod:`~tests.random_programs.program`: a program as a printable list of instructions.
* :mod:`~tests.random_programs.generator`: the state of a program under construction.
* ``ops_*.py``: one generating function per kind of instruction.
* :mod:`~tests.random_programs.generate`: puts instructions together to programs.
* :mod:`~tests.random_programs.check`: runs a program and judges the results; :mod:`~tests.random_programs.shrink`
  makes a failing one small.
* :mod:`~tests.random_programs.coverage`: which primitives and element types occur.
"""
