"""How programs are run on a GPU, on a stand-in for the driver: what is called when, and what is said when it fails."""

import ctypes
import gc
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jax_mpk import _native, config
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.runtime import cuda
from tests.cuda_programs import kernel

ROOT = Path(__file__).resolve().parents[2]
STREAM, OTHER_STREAM, CAPTURE = 1001, 1002, 1003
VALUES = ((3, "%8"), (5, "%12"))
LABELS = ((0, "norm"), (100, "contract at model.py:41"), (121, "argmax"))


class Fake:
    """The stand-in."""

    def __init__(self, path: Path):
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_calls.restype = ctypes.c_char_p
        self.library.fake_live_bytes.restype = ctypes.c_longlong
        self.library.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_longlong)

    def set(self, **fields: int) -> None:
        for name, value in fields.items():
            self.library.fake_set(name.encode(), value)

    def calls(self, work: Callable[[], object]) -> list[str]:
        """What the driver is asked for meanwhile."""
        self.library.fake_forget()
        work()
        return self.library.fake_calls().decode().splitlines()

    def live(self) -> tuple[int, int]:
        """Bytes and modules that are still held."""
        return self.library.fake_live_bytes(), self.library.fake_live_modules()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = ROOT / "tests" / "runtime" / "fake_cuda.cc"
    subprocess.run(["c++", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", path], check=True)
    return Fake(path)


@pytest.fixture
def driver(built: Fake) -> Iterator[Fake]:
    built.library.fake_reset()
    before = built.live()
    yield built
    gc.collect()  # exceptions keep frames, and what is in them
    assert built.live() == before  # whatever a test made is gone with it


def program(**fields: object) -> CudaProgram:
    tables = np.array([77], np.uint32).tobytes()
    known = {"workers": 132, "threads": 384, "shared_bytes": 200_000, "tables": tables, "state_bytes": 512}
    return kernel("", arguments=1, results=1, labels=LABELS, values=VALUES, **(known | fields))


class Call:
    """An executable, and buffers to run it on."""

    def __init__(self, driver: Fake, beside: "Call | None" = None, **fields: object):
        blob = cuda.pack(program(**fields), b"cubin\0")
        other = beside.native if beside is not None else None
        self.native = _native.CudaExecutable(blob, driver.path, other)

    def initialize(self, stream: int = STREAM, ordinal: int = 0) -> None:
        self.native.initialize(ordinal, stream)

    def launch(self, value: int = 5, kind: int = 0, stream: int = STREAM, ordinal: int = 0) -> list[int]:
        argument, result = np.array([value, kind], np.uint32), np.zeros(4, np.uint32)
        self.native.launch(ordinal, stream, [argument.ctypes.data, result.ctypes.data])
        return result.tolist()

    def run(self, value: int = 5, **options: int) -> list[int]:
        """Like a run of XLA's: both stages."""
        at = {k: v for k, v in options.items() if k != "kind"}
        self.initialize(**at)
        return self.launch(value, **options)


def test_launches_of_a_stream_share_a_state(driver) -> None:
    call = Call(driver)
    assert [call.run(value)[:2] for value in (5, 6, 7)] == [[5, 0], [6, 1], [7, 2]]
    assert call.run(8, stream=OTHER_STREAM)[1] == 0
    assert call.run(8)[1] == 3
    assert call.run()[3] == 77  # the tables are there


def test_devices_have_states_of_their_own(driver) -> None:
    call = Call(driver)
    assert [call.run(ordinal=ordinal)[1] for ordinal in (0, 1, 0, 1)] == [0, 0, 1, 1]


def test_everything_is_made_before_the_first_launch(driver) -> None:
    call = Call(driver)
    made = driver.calls(call.initialize)
    assert made[:3] == ["load cubin", "function entry", "attribute 8 = 200000"]
    assert "upload 4" in made and "fill 512 stream 999" in made
    assert not [c for c in made if f"synchronize stream {STREAM}" in c]
    launch = f"launch 132x384 shared 200000 stream {STREAM}"
    assert driver.calls(call.launch) == [launch]
    # A later run is the launch and nothing else.
    assert driver.calls(call.run) == [launch]
    again = driver.calls(lambda: call.initialize(OTHER_STREAM))
    assert not [c for c in again if c.startswith(("load", "upload"))]


def test_captured_launches_use_the_state_of_the_run(driver) -> None:
    call, unprepared = Call(driver), Call(driver)
    call.run()
    assert driver.calls(lambda: call.launch(stream=CAPTURE))[0].endswith(f"stream {CAPTURE}")
    assert call.run()[1] == 2
    with pytest.raises(RuntimeError, match="not prepared"):
        unprepared.launch(stream=CAPTURE)


def test_captures_of_two_threads(driver) -> None:
    call = Call(driver)
    counts = {}

    def work(stream: int, launches: int) -> None:
        call.initialize(stream)
        barrier.wait()
        counts[stream] = [call.launch(stream=CAPTURE)[1] for _ in range(launches)]

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=args) for args in ((STREAM, 2), (OTHER_STREAM, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {STREAM: [0, 1], OTHER_STREAM: [0, 1, 2, 3]}


def test_a_thousand_executables(driver) -> None:
    before = driver.live()
    for _ in range(1000):
        Call(driver).run()
    assert driver.live() == before


def test_deadline_reaches_the_kernel(driver) -> None:
    call = Call(driver)
    with config.override(deadline_ms=2):
        assert call.run()[2] == 2_000_000
    with config.override(deadline_ms=0):
        assert call.run()[2] == 0


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (0, "event 5"),
        (1, "tag of value %12[7]"),
        (2, "bulk load 5"),
        (3, "barrier 5"),
        (4, "predicate or branch index 5"),
    ],
)
def test_failures_are_raised_by_the_next_call(driver, kind, text) -> None:
    call = Call(driver)
    call.run()
    assert call.run(0, kind=kind)[0] == 0xFFFFFFFF
    # What was launched before anybody looked gives up too.
    assert call.launch()[0] == 0xFFFFFFFF
    with pytest.raises(RuntimeError) as error:
        call.run()
    said = f"SM 17 at task 120 (contract at model.py:41), {text}: expected 132, seen 131"
    assert said in str(error.value)
    # The one after that is right: the state starts anew, in the order of the stream.
    assert driver.calls(call.initialize) == [f"fill 512 stream {STREAM}"]
    assert call.launch()[:2] == [5, 0]
    assert call.native.check() == []


def test_failures_are_raised_by_another_executable(driver) -> None:
    first = Call(driver)
    second = Call(driver, beside=first)
    elsewhere = Call(driver, beside=first)
    first.run(0)
    elsewhere.initialize(ordinal=1)  # another device
    with pytest.raises(RuntimeError, match="SM 17"):
        second.run()
    assert second.run()[0] == 5
    assert first.run()[:2] == [5, 0]


def test_check_waits_and_tells(driver) -> None:
    call = Call(driver)
    call.run(0)
    call.run(0, stream=OTHER_STREAM, ordinal=1)
    texts: list[str] = []
    calls = driver.calls(lambda: texts.extend(call.native.check()))
    assert calls == [f"synchronize stream {STREAM}", f"synchronize stream {OTHER_STREAM}"]
    assert len(texts) == 2 and all("SM 17" in text for text in texts)
    assert call.native.check() == []
    assert call.run()[:2] == [5, 0]


def test_failure_outlives_its_executable(driver) -> None:
    call = Call(driver)
    other = Call(driver, beside=call)
    call.run(0)
    del call
    with pytest.raises(RuntimeError, match="SM 17"):
        other.run()
    assert other.run()[0] == 5


def test_synchronous_launches(driver) -> None:
    call = Call(driver)
    with config.override(sync=True):
        assert driver.calls(call.run)[-1] == f"synchronize stream {STREAM}"
        with pytest.raises(RuntimeError, match="SM 17"):
            call.run(0)
        assert call.run()[:2] == [5, 0]
        driver.set(capturing=1)
        assert not [c for c in driver.calls(call.launch) if "synchronize" in c]


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ({"minor": 1}, "the program is for sm_90a, and Fake GPU is sm_91"),
        ({"multiprocessors": 114}, "planned for 132 SMs, and Fake GPU has 114"),
        ({"shared_bytes": 100_000}, "needs 200000 bytes of shared memory per SM, and Fake GPU has 100000"),
        ({"cooperative": 0}, "no cooperative launches"),
        ({"max_threads": 256}, "384 threads with 168 registers each"),
        ({"unreadable": 1}, r"a driver of CUDA 12\.4"),
        ({"occupancy": 0}, "cannot hold one worker"),
        ({"memory": 600}, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_refusals(driver, device, text) -> None:
    driver.set(**device)
    call = Call(driver, state_bytes=1024)
    with pytest.raises(RuntimeError, match=text):
        call.initialize()
    # Nothing stays behind, and another attempt is possible.
    driver.library.fake_reset()
    assert call.run()[0] == 5


def test_wrong_number_of_buffers(driver) -> None:
    call = Call(driver, workspace_bytes=64)
    call.initialize()
    with pytest.raises(RuntimeError, match="the call has 2 buffers, the program 3"):
        call.launch()


def test_programs_that_cannot_be_read(driver) -> None:
    blob = cuda.pack(program(), b"cubin\0")
    for broken, text in [
        (blob[:-1], "ends early"),
        (blob + b"x", "left over"),
        (b"x" + blob[1:], "no program"),
        (blob[:8] + b"\x63" + blob[9:], "version 99"),
        (cuda.pack(program(workers=0), b""), "no workers"),
        (cuda.pack(program(state_bytes=16), b""), "no room for its header"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            _native.CudaExecutable(broken, driver.path)
    too_many = kernel("", arguments=5000, results=1)
    with pytest.raises(RuntimeError, match="5001 buffers"):
        _native.CudaExecutable(cuda.pack(too_many, b""), driver.path)


def test_no_driver(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        _native.CudaExecutable(cuda.pack(program(), b""), str(tmp_path / "libcuda.so.1"))


def test_labels(driver) -> None:
    call = Call(driver)
    assert [call.native.label(task) for task in (0, 99, 100, 120, 121, 10**6)] == [
        " (norm)",
        " (norm)",
        " (contract at model.py:41)",
        " (contract at model.py:41)",
        " (argmax)",
        " (argmax)",
    ]
