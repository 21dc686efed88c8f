"""The bytes around a tensor."""

import pytest
import torch

from megatron_moellava.conversion.torch_file import frame


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "bool"])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, 1, 7)])
def test_framed_bytes_are_a_file_of_torch_save(tmp_path, shape, dtype):
    tensor = torch.randn(shape).to(getattr(torch, dtype))
    content = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    head, tail = frame(shape, dtype, tensor.numel(), len(content))
    (tmp_path / "file").write_bytes(head + content + tail)
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True), tensor)
