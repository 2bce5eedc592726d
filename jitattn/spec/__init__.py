"""The facts that a kernel is compiled for, and the structs that it is launched with."""
