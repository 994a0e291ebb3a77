"""How to install the optional packages: the extras of pyproject.toml.

By their own names: `pip install lightship[timm]` needs an index that has lightship.
"""

INSTALL = {
    "parquet": "pip install pyarrow",
    "gcs": "pip install gcsfs",
    "obstore": "pip install obstore",
    "hf": "pip install huggingface_hub",
    "timm": "pip install timm",
    "onnx": "pip install onnx onnxscript onnxruntime",
    "tpu": "pip install 'torch_xla[tpu]==2.9.0' torch==2.9.0 torchvision==0.24.0",
}
"""Extra -> the command that installs its packages, for errors."""
