"""Machine code for this CPU, made by LLVM, as functions that JAX's compiled programs call.

A function shares its work out over XLA's own threads: it is a number of parts, which the calling
thread and those that are free take one by one. It is called by XLA's foreign function interface,
whose structures are laid out in ``xla/ffi/api/c_api.h``; their offsets are those of version 0.1 and
later ones of major version 0.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

_MINOR = 3  # of the interface that the offsets below were checked with
_BYTES = 64  # of a vector register; LLVM uses two where they are smaller
_MOST_PARTS = 16
_FREE = "reassoc nsz contract"  # orders of sums; not-a-number stays that


@functools.cache
def available() -> bool:
    """Whether JAX computes on the CPU, and there is llvmlite."""
    return _computes_on_cpu() and importlib.util.find_spec("llvmlite") is not None


def require_llvm() -> None:
    """Raises ``ValueError`` on a CPU without llvmlite."""
    if _computes_on_cpu() and not available():
        raise ValueError(
            "Machine code of our own is made by llvmlite, which is not installed: "
            'pip install "equizoo[native]", or leave it to XLA (kernels=xla).'
        )


def _computes_on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def num_parts() -> int:
    """Parts of a function: as many as there are cores to use."""
    here = hasattr(os, "sched_getaffinity")  # not on every system
    return min(len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1, _MOST_PARTS)


class Code:
    """Text of a function of one part: ``pointers`` to its arrays, of which the first has a row for
    every node.

    Numbers, addresses and vectors along the channels are named by what their methods return.
    """

    def __init__(self, dtype: str, channels: int, num_arrays: int):
        self.scalar, self._bytes = {"float32": ("float", 4), "float64": ("double", 8)}[dtype]
        self.channels = channels
        self.width = next(w for w in (16, 8, 4, 2, 1) if w <= _BYTES // self._bytes
                          and channels % w == 0)  # fmt: skip
        self.vector = f"<{self.width} x {self.scalar}>"
        self._suffix = f"v{self.width}f{8 * self._bytes}"
        self._lines: list[str] = []
        self._count, self._loops = 0, 0
        self._label("entry")
        self.nodes = self._data(0, "i64")
        self.pointers = [self._data(1 + k, "ptr") for k in range(num_arrays)]
        after = self.sum("%part", 1)
        self.first_node = self._new(f"sdiv i64 {self.times('%part', self.nodes)}, %parts")
        self.last_node = self._new(f"sdiv i64 {self.times(after, self.nodes)}, %parts")

    def finish(self) -> str:
        """The function as LLVM's text."""
        vector, scalar, suffix = self.vector, self.scalar, self._suffix
        head = (
            f"declare {vector} @llvm.fmuladd.{suffix}({vector}, {vector}, {vector})\n"
            f"declare {scalar} @llvm.vector.reduce.fadd.{suffix}({scalar}, {vector})\n"
            "define internal void @part(ptr noalias %data, i64 %part, i64 %parts) "
            f'"prefer-vector-width"="{8 * _BYTES}" "min-legal-vector-width"="{8 * _BYTES}" {{\n'
        )
        return head + "\n".join([*self._lines, "  ret void", "}"])

    def _do(self, text: str) -> None:
        self._lines.append("  " + text)

    def _new(self, text: str) -> str:
        self._count += 1
        self._do(f"%v{self._count} = {text}")
        return f"%v{self._count}"

    def _label(self, name: str) -> None:
        self._lines.append(name + ":")

    def _data(self, place: int, kind: str) -> str:
        return self._new(f"load {kind}, ptr {self.address('%data', place, 'i64')}")

    # Whole numbers and addresses.

    def sum(self, a: str | int, b: str | int) -> str:
        return self._new(f"add i64 {a}, {b}")

    def times(self, a: str | int, b: str | int) -> str:
        return self._new(f"mul i64 {a}, {b}")

    def address(self, pointer: str, index: str | int, kind: str | None = None) -> str:
        return self._new(f"getelementptr {kind or self.scalar}, ptr {pointer}, i64 {index}")

    def integer(self, pointer: str, index: str) -> str:
        """An int32 of an array."""
        number = self._new(f"load i32, ptr {self.address(pointer, index, 'i32')}")
        return self._new(f"sext i32 {number} to i64")

    # Scalars and vectors.

    def number(self, value: float) -> str:
        value = float(np.float32(value)) if self.scalar == "float" else value
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"

    def vector_of(self, value: float) -> str:
        return f"<{', '.join([f'{self.scalar} {self.number(value)}'] * self.width)}>"

    def load_scalar(self, pointer: str, index: int) -> str:
        return self._new(f"load {self.scalar}, ptr {self.address(pointer, index)}")

    def store_scalar(self, value: str, pointer: str, index: int) -> None:
        self._do(f"store {self.scalar} {value}, ptr {self.address(pointer, index)}")

    def weighted_sum(self, terms: Sequence[tuple[str, float]]) -> str:
        """Of scalars times constants."""
        kind = f"{_FREE} {self.scalar}"
        parts = [self._new(f"fmul {kind} {x}, {self.number(value)}") for x, value in terms]
        return functools.reduce(lambda a, b: self._new(f"fadd {kind} {a}, {b}"), parts)

    def spread(self, scalar: str) -> str:
        """A vector of equal numbers."""
        one = self._new(f"insertelement {self.vector} poison, {self.scalar} {scalar}, i64 0")
        return self._new(
            f"shufflevector {self.vector} {one}, {self.vector} poison, "
            f"<{self.width} x i32> zeroinitializer"
        )

    def load(self, pointer: str) -> str:
        return self._new(f"load {self.vector}, ptr {pointer}, align {self._bytes}")

    def store(self, value: str, pointer: str) -> None:
        self._do(f"store {self.vector} {value}, ptr {pointer}, align {self._bytes}")

    def product(self, a: str, b: str) -> str:
        return self._new(f"fmul {_FREE} {self.vector} {a}, {b}")

    def plus(self, a: str, b: str, total: str | None) -> str:
        """``a * b + total``, or the product alone."""
        if total is None:
            return self.product(a, b)
        kind = self.vector
        return self._new(
            f"call {_FREE} {kind} @llvm.fmuladd.{self._suffix}"
            f"({kind} {a}, {kind} {b}, {kind} {total})"
        )

    def total(self, vector: str) -> str:
        """The sum of a vector's numbers."""
        zero = self.number(0.0)
        return self._new(
            f"call {_FREE} {self.scalar} @llvm.vector.reduce.fadd.{self._suffix}"
            f"({self.scalar} {zero}, {self.vector} {vector})"
        )

    def scratch(self, number: int, kind: str) -> str:
        """Memory of the part's own; to be asked for before any loop."""
        return self._new(f"alloca [{number} x {kind}], align {_BYTES}")

    # Control.

    def loop(self, first: str | int, last: str | int, step: int, body: Callable[[str], None]):
        self._loops += 1
        name = f"loop{self._loops}"
        i = f"%{name}.i"
        self._do(f"br label %{name}.before")
        self._label(f"{name}.before")
        self._do(f"br label %{name}")
        self._label(name)
        self._do(f"{i} = phi i64 [ {first}, %{name}.before ], [ {i}.next, %{name}.step ]")
        self._do(f"{i}.in = icmp slt i64 {i}, {last}")
        self._do(f"br i1 {i}.in, label %{name}.body, label %{name}.end")
        self._label(f"{name}.body")
        body(i)
        self._do(f"br label %{name}.step")
        self._label(f"{name}.step")
        self._do(f"{i}.next = add i64 {i}, {step}")
        self._do(f"br label %{name}")
        self._label(f"{name}.end")

    def if_true(
        self, pointer: str, index: str, then: Callable[[], None], otherwise: Callable[[], None]
    ) -> None:
        """Depending on an element of an array of booleans."""
        self._loops += 1
        name = f"if{self._loops}"
        byte = self._new(f"load i8, ptr {self.address(pointer, index, 'i8')}")
        true = self._new(f"icmp ne i8 {byte}, 0")
        self._do(f"br i1 {true}, label %{name}.then, label %{name}.else")
        self._label(f"{name}.then")
        then()
        self._do(f"br label %{name}.end")
        self._label(f"{name}.else")
        otherwise()
        self._do(f"br label %{name}.end")
        self._label(f"{name}.end")

    def clear(self, pointer: str, number: str | int) -> None:
        """Sets numbers, a multiple of the channels, to zero."""
        self.loop(
            0, number, self.width, lambda c: self.store("zeroinitializer", self.address(pointer, c))
        )


class Total:
    """A vector that products are added to."""

    def __init__(self, code: Code, start: str | None = None):
        self._code, self._value = code, start

    def add(self, a: str, b: str) -> None:
        self._value = self._code.plus(a, b, self._value)

    @property
    def empty(self) -> bool:
        return self._value is None

    @property
    def value(self) -> str:
        assert self._value is not None, "nothing was added"
        return self._value


@functools.cache
def registered(part: str, operands: int, results: int, parts: int) -> str:
    """The name under which ``jax.ffi.ffi_call`` finds the function with this text.

    Raises ``RuntimeError`` where LLVM cannot make it.
    """
    import llvmlite.binding as llvm  # type: ignore[import-untyped]

    text = part + _handler(operands, results, parts)
    name = f"equizoo_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(module.triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module.data_layout = str(machine.target_data)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    address = ctypes.c_void_p(engine.get_function_address("handler"))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")
    return name


_ENGINES: list = []  # own the code, which programs may call as long as the process lives


def _minor_version() -> int:
    """That of the installed XLA, or ours if it is older: it has all that is used here."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = re.search(r"XLA_FFI_API_MINOR (\d+)", header.read_text())
    return min(_MINOR, int(found[1])) if found else _MINOR


def _handler(operands: int, results: int, parts: int) -> str:
    """What XLA calls. All that the parts need is in memory of its own, which the last of those who
    know of it frees: a thread that XLA finds for a part may come when all has been done."""
    lines = []
    for k in range(operands + results):
        frame, place = ("args", k) if k < operands else ("rets", k - operands)
        lines += [
            f"  %pp{k} = getelementptr ptr, ptr %{frame}, i64 {place}",
            f"  %b{k} = load ptr, ptr %pp{k}",
            f"  %dp{k} = getelementptr i8, ptr %b{k}, i64 24",
            f"  %d{k} = load ptr, ptr %dp{k}",
            f"  %s{k} = getelementptr i8, ptr %data, i64 {40 + 8 * k}",
            f"  store ptr %d{k}, ptr %s{k}",
        ]
        if k == 0:
            lines += [
                f"  %lp{k} = getelementptr i8, ptr %b{k}, i64 40",
                f"  %l{k} = load ptr, ptr %lp{k}",
                f"  %n{k} = load i64, ptr %l{k}",
                f"  %np{k} = getelementptr i8, ptr %data, i64 32",
                f"  store i64 %n{k}, ptr %np{k}",
            ]
    return _HANDLER.format(
        minor=_minor_version(),
        size=40 + 8 * (operands + results),
        parts=parts,
        pointers="\n".join(lines),
    )


# Of %data: next part, parts that are done, references, parts in all, nodes, arrays.
_HANDLER = """
declare ptr @malloc(i64)
declare void @free(ptr)

define internal void @work(ptr %data) {{
entry:
  %done = getelementptr i8, ptr %data, i64 8
  %parts.p = getelementptr i8, ptr %data, i64 24
  %parts = load i64, ptr %parts.p
  %arrays = getelementptr i8, ptr %data, i64 32
  br label %next
next:
  %part = atomicrmw add ptr %data, i64 1 seq_cst
  %left = icmp slt i64 %part, %parts
  br i1 %left, label %do, label %end
do:
  call void @part(ptr %arrays, i64 %part, i64 %parts)
  %before = atomicrmw add ptr %done, i64 1 seq_cst
  br label %next
end:
  ret void
}}

define internal void @release(ptr %data) {{
entry:
  %references = getelementptr i8, ptr %data, i64 16
  %before = atomicrmw sub ptr %references, i64 1 seq_cst
  %last = icmp eq i64 %before, 1
  br i1 %last, label %free, label %end
free:
  call void @free(ptr %data)
  br label %end
end:
  ret void
}}

define internal void @task(ptr %data) {{
entry:
  call void @work(ptr %data)
  call void @release(ptr %data)
  ret void
}}

define ptr @handler(ptr %frame) {{
entry:
  %call = alloca [5 x i64], align 8
  %destroy.call = alloca [3 x i64], align 8
  %extension.p = getelementptr i8, ptr %frame, i64 8
  %extension = load ptr, ptr %extension.p
  %extended = icmp ne ptr %extension, null
  br i1 %extended, label %which, label %stage
which:
  %type.p = getelementptr i8, ptr %extension, i64 8
  %type = load i32, ptr %type.p
  %asked = icmp eq i32 %type, 1
  br i1 %asked, label %metadata, label %stage
metadata:
  %about.p = getelementptr i8, ptr %extension, i64 24
  %about = load ptr, ptr %about.p
  %major = getelementptr i8, ptr %about, i64 24
  store i32 0, ptr %major
  %minor = getelementptr i8, ptr %about, i64 28
  store i32 {minor}, ptr %minor
  %traits = getelementptr i8, ptr %about, i64 32
  store i32 0, ptr %traits
  ret ptr null
stage:
  %stage.p = getelementptr i8, ptr %frame, i64 32
  %now = load i32, ptr %stage.p
  %execute = icmp eq i32 %now, 3
  br i1 %execute, label %run, label %skip
skip:
  ret ptr null
run:
  %data = call ptr @malloc(i64 {size})
  store i64 0, ptr %data
  %done = getelementptr i8, ptr %data, i64 8
  store i64 0, ptr %done
  %references = getelementptr i8, ptr %data, i64 16
  store i64 {parts}, ptr %references
  %parts.p = getelementptr i8, ptr %data, i64 24
  store i64 {parts}, ptr %parts.p
  %args.p = getelementptr i8, ptr %frame, i64 72
  %args = load ptr, ptr %args.p
  %rets.p = getelementptr i8, ptr %frame, i64 112
  %rets = load ptr, ptr %rets.p
{pointers}
  %api.p = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api.p
  %context.p = getelementptr i8, ptr %frame, i64 24
  %context = load ptr, ptr %context.p
  %schedule.p = getelementptr i8, ptr %api, i64 136
  %schedule = load ptr, ptr %schedule.p
  %destroy.p = getelementptr i8, ptr %api, i64 64
  %destroy = load ptr, ptr %destroy.p
  store i64 40, ptr %call
  %call.1 = getelementptr i8, ptr %call, i64 8
  store ptr null, ptr %call.1
  %call.2 = getelementptr i8, ptr %call, i64 16
  store ptr %context, ptr %call.2
  %call.3 = getelementptr i8, ptr %call, i64 24
  store ptr @task, ptr %call.3
  %call.4 = getelementptr i8, ptr %call, i64 32
  store ptr %data, ptr %call.4
  br label %helpers
helpers:
  %helper = phi i64 [ 1, %run ], [ %helper.next, %asked.for ]
  %more = icmp slt i64 %helper, {parts}
  br i1 %more, label %help, label %mine
help:
  %error = call ptr %schedule(ptr %call)
  %refused = icmp ne ptr %error, null
  br i1 %refused, label %alone, label %asked.for
alone:
  store i64 24, ptr %destroy.call
  %destroy.1 = getelementptr i8, ptr %destroy.call, i64 8
  store ptr null, ptr %destroy.1
  %destroy.2 = getelementptr i8, ptr %destroy.call, i64 16
  store ptr %error, ptr %destroy.2
  call void %destroy(ptr %destroy.call)
  call void @release(ptr %data)
  br label %asked.for
asked.for:
  %helper.next = add i64 %helper, 1
  br label %helpers
mine:
  call void @work(ptr %data)
  br label %wait
wait:
  %count = load atomic i64, ptr %done seq_cst, align 8
  %all = icmp sge i64 %count, {parts}
  br i1 %all, label %over, label %wait
over:
  call void @release(ptr %data)
  ret ptr null
}}
"""
