"""Two test processes share the cores: each computes on one thread, for OpenMP threads that wait for each
other on a busy machine are many times slower."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
