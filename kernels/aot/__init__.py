"""Compile kernels for TPUs that are not here, and read what the compiler says about them.

`parent.run` is the call; everything that loads libtpu happens in child processes, because one of its estimators ends
the process it is in when it meets something it does not know.
"""
