# The runtime of detectors: images of many sizes, for each of which cuDNN would benchmark anew.
_base_ = 'default_runtime.py'
env_cfg = dict(cudnn_benchmark=False)
