"""The Triton kernels against the reference, in Triton's interpreter: in a process of its own, because the variable that turns
it on is read when triton is imported."""

from tests.triton.processes import python


def test_kernels_in_the_interpreter(tmp_path):
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton/interpreted")
    assert " passed" in python(*tests, folder=tmp_path, interpreted=True).stdout
