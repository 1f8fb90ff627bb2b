# The runtime of detectors.
_base_ = 'default_runtime.py'
env_cfg = dict(cudnn_benchmark=False)  # images come in many sizes, and cuDNN would benchmark each
visualizer = dict(type='DetLocalVisualizer')
