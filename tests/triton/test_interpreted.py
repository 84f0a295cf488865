"""The Triton kernels against the reference, in Triton's interpreter: in one process of their own, because the variable that
turns it on is read when triton is imported."""


def test_kernels_in_the_interpreter(background):
    status, out, err = background("test_kernels_in_the_interpreter").wait()
    assert status == 0, out[-8000:] + err[-2000:]
    assert " passed" in out
