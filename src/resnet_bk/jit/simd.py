"""Vectors of a whole SIMD register as a type of numba kernels.

LLVM vectorizes simple loops by itself, but not loops over small matrices that it cannot prove to be apart: there it
checks their addresses again in each loop, which takes longer than the loop. Code with ``Lanes`` says what goes into a
register: ``load``, arithmetic, ``total``, ``store``. A register has LANE_BYTES bytes, on every machine with AVX-512 a
real one; on others LLVM uses several.

    for c in range(0, width, lanes):
        store(y, c, splat(a) * load(x, c))

Indices count elements of the flattened array, which must be contiguous. Nothing checks that they are inside.
"""

import math
import operator

import numba
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic, models, overload, register_model

LANE_BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32
_FLAGS = ("contract",)  # fused multiply-add


class Lanes(types.Type):
    """LANE_BYTES bytes of numbers of one dtype."""

    def __init__(self, dtype: types.Float):
        self.dtype, self.count = dtype, LANE_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype}, {self.count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        element = ir.FloatType() if lanes.dtype.bitwidth == 32 else ir.DoubleType()
        super().__init__(manager, lanes, ir.VectorType(element, lanes.count))


def _address(context, builder, array_type, array, index):
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    vector = context.get_value_type(Lanes(array_type.dtype))
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic
def load(typing_context, array, index):
    """Return the lanes of a contiguous array from the element `index` on."""

    def codegen(context, builder, signature, args):
        address = _address(context, builder, array, *args)
        return builder.load(address, align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype)(array, types.intp), codegen


@intrinsic
def load_bytes(typing_context, array, index, like):
    """Return int8 numbers of a contiguous array from the element `index` on, as lanes of the dtype of `like`."""
    lanes = Lanes(like)

    def codegen(context, builder, signature, args):
        data = cgutils.create_struct_proxy(array)(context, builder, args[0]).data
        kind = ir.VectorType(ir.IntType(8), lanes.count)
        numbers = builder.load(builder.bitcast(builder.gep(data, [args[1]]), kind.as_pointer()), align=1)
        return builder.sitofp(numbers, context.get_value_type(lanes))

    return lanes(array, types.intp, like), codegen


@intrinsic
def store(typing_context, array, index, x):
    """Write lanes into a contiguous array from the element `index` on."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _address(context, builder, array, *args[:2]), align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, x), codegen


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


@intrinsic
def splat(typing_context, x):
    """Return lanes that are all x."""
    lanes = Lanes(x)

    def codegen(context, builder, signature, args):
        return _spread(context, builder, lanes, args[0])

    return lanes(x), codegen


def _spread(context, builder, lanes, value):
    vector, int32 = context.get_value_type(lanes), ir.IntType(32)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, int32(0))
    return builder.shuffle_vector(first, undefined, _constant(ir.VectorType(int32, lanes.count), 0))


@intrinsic
def spread(typing_context, array, index):
    """Return lanes that are all the element `index` of a contiguous array."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, args):
        data = cgutils.create_struct_proxy(array)(context, builder, args[0]).data
        return _spread(context, builder, lanes, builder.load(builder.gep(data, [args[1]])))

    return lanes(array, types.intp), codegen


@intrinsic
def total(typing_context, x):
    """Return the sum over the lanes."""

    def codegen(context, builder, signature, args):
        element = args[0].type.element
        kind = ir.FunctionType(element, [element, args[0].type])
        name = f"llvm.vector.reduce.fadd.v{x.count}f{x.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [element(-0.0), args[0]], fastmath=("reassoc", "nsz"))

    return x.dtype(x), codegen


def _operate(function, instruction: str) -> None:
    @intrinsic
    def run(typing_context, x, y):
        def codegen(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=_FLAGS)

        return x(x, y), codegen

    @overload(function)
    def implementation(x, y):
        return (lambda x, y: run(x, y)) if isinstance(x, Lanes) and x == y else None


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.imul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operate(_function, _instruction)


@intrinsic
def exp(typing_context, x):
    """Return e^x of lanes, with a relative error of 2 units in the last place.

    x counts as at least -86 and at most 88 in float32, -708 and 709 in float64.

    With the nearest integer n to x / ln 2, ``e^x = 2^n e^(x - n ln 2)``: a Taylor polynomial, and n added to the bits
    of the exponent.
    """
    single = x.dtype.bitwidth == 32
    mantissa, degree = (23, 7) if single else (52, 13)
    least, most = (-86.0, 88.0) if single else (-708.0, 709.0)
    high, low = 0.693359375, -2.121944400546905827679e-4  # their sum is ln 2, and n * high is exact

    def codegen(context, builder, signature, args):
        vector = args[0].type
        whole = ir.VectorType(ir.IntType(x.dtype.bitwidth), x.count)

        def number(value):
            return _constant(vector, value)

        value = args[0]
        for sign, bound in (("<", least), (">", most)):
            outside = builder.fcmp_ordered(sign, value, number(bound))
            value = builder.select(outside, number(bound), value)
        rint = f"llvm.rint.v{x.count}f{x.dtype.bitwidth}"
        rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), rint)
        n = builder.call(rint, [builder.fmul(value, number(1 / math.log(2)))])
        for part in (high, low):
            value = builder.fsub(value, builder.fmul(n, number(part), flags=_FLAGS), flags=_FLAGS)
        sums = number(1 / math.factorial(degree))
        for k in range(degree - 1, -1, -1):
            sums = builder.fadd(builder.fmul(sums, value, flags=_FLAGS), number(1 / math.factorial(k)), flags=_FLAGS)
        n = builder.select(builder.fcmp_ordered("ord", n, n), n, number(0.0))  # a NaN is no whole number; `sums` is it
        bits = builder.shl(builder.fptosi(n, whole), _constant(whole, mantissa))
        return builder.bitcast(builder.add(builder.bitcast(sums, whole), bits), vector)

    return x(x), codegen


@numba.njit(forceinline=True)
def sigmoid(x, one):
    """Return the sigmoid of lanes; `one` are lanes of 1."""
    return one / (one + exp(one - one - x))
