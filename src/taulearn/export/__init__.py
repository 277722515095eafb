"""Models out of Python: ONNX, torch.export and safetensors, each checked against the model on random inputs.

arguments    inputs and outputs: names, the batch dimension, random ones like the examples
trace        the model's graph, as torch.export has it
onnx_file    that graph as ONNX
check        that file against the model
api          the public function
"""

from .api import FORMATS as FORMATS, Exported as Exported, Signature as Signature, export_model as export_model
