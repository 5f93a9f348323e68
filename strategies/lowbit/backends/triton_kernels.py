"""Quantizers and the scaling of sums in Triton's language, with float32 arithmetic in the order of tensor.py and
formats.py: nothing is fused or approximated, so that codes and scales are the same. `fused.py` calls them.

Names in capitals are known when a kernel is built; MANTISSA and WHOLE_BY are -1 where the format has none."""

import triton
import triton.language as tl

NEAREST = tl.constexpr(0)
GIVEN_BITS = tl.constexpr(1)
DRAWN_BITS = tl.constexpr(2)
FLOAT32 = tl.constexpr(0)
E4M3 = tl.constexpr(1)
E8M0 = tl.constexpr(2)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _loaded(x_ptr, by_ptr, m, k, M, K, stride_m, stride_k, BY_K: tl.constexpr):
    """Zero outside."""
    inside = (m[:, None] < M) & (k[None, :] < K)
    x = tl.load(x_ptr + m[:, None] * stride_m + k[None, :] * stride_k, inside, 0.0).to(tl.float32)
    if BY_K:
        x = x * tl.load(by_ptr + k, k < K, 0.0)[None, :]
    return x


@triton.jit
def _size(x):
    """The bits of |x|, in whose order not a number is beyond infinity, and that beyond the rest."""
    return _bits(x) & 0x7FFFFFFF


@triton.jit
def _largest(size):
    """The number; where it is not finite, not a number."""
    return _float(tl.where(size < 0x7F800000, size, 0x7FC00000))


@triton.jit
def _reciprocal(scale):
    """Zero where it would not be finite."""
    there = scale >= 1.1754943508222875e-38
    return tl.where(there, tl.div_rn(tl.where(there, 1.0, 0.0), tl.where(there, scale, 1.0)), 0.0)


@triton.jit
def _whole(x):
    """The nearest whole number, of two the even one, with the sign of x."""
    size = (tl.abs(x) + 8388608.0) - 8388608.0
    return _float(_bits(size) | (_bits(x) & -0x80000000))


@triton.jit
def _drawn(seed, m, k, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """16 bits a number, eight of a call: a function of the seed and the place. `k` begins at a multiple of 8."""
    eighth = tl.min(k, 0) // 8 + tl.arange(0, COLUMNS // 8)
    a, b, c, d = tl.randint4x(seed, m[:, None] * tl.cdiv(K, 8) + eighth[None, :])
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    return tl.join((words << 16) >> 16, words >> 16).reshape(ROWS, COLUMNS)


@triton.jit
def _sixteen(bits_ptr, seed, m, k, M, K, DRAW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if DRAW == DRAWN_BITS:
        bits = _drawn(seed, m, k, K, ROWS, COLUMNS)
    else:
        inside = (m[:, None] < M) & (k[None, :] < K)
        bits = tl.load(bits_ptr + m[:, None] * K + k[None, :], inside, 0).to(tl.int32)
    return bits


@triton.jit
def _on_grid(x, bits, DRAW: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """NumberFormat.nearest and .stochastic."""
    step, steps = 1.0, x
    if MANTISSA >= 0:
        power = tl.maximum(_bits(x) & 0x7F800000, (LEAST + 127) << 23)
        step = _float(power - (MANTISSA << 23))
        steps = x * _float((254 << 23) - tl.minimum(power, 254 << 23)) * (1 << MANTISSA)
    if DRAW == NEAREST:
        steps = _whole(steps)
    else:
        steps = tl.floor(steps + (bits.to(tl.float32) + 32768.5) * 0.0000152587890625)
    number = steps * step
    bounded = tl.minimum(tl.maximum(number, -LARGEST), LARGEST)
    return tl.where(number == number, bounded, number)


@triton.jit
def _float_code(number, SIGN: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """Of a number on the grid: sign, exponent and mantissa."""
    size = _size(number)
    normal = (size >> (23 - MANTISSA)) - ((LEAST + 126) << MANTISSA)
    small = (_float(size) * (1 << (MANTISSA - LEAST))).to(tl.int32)
    code = tl.where(size < (LEAST + 127) << 23, small, normal)
    return code | ((_bits(number) >> 31) & SIGN)


@triton.jit
def _code(number, MANTISSA: tl.constexpr, LEAST: tl.constexpr, WHOLE_BY: tl.constexpr):
    """What `Quantized.codes` holds."""
    known = tl.where(number == number, number, 0.0)
    if WHOLE_BY > 0:
        code = (known * WHOLE_BY).to(tl.int8)
    else:
        code = tl.where(number == number, _float_code(known, 0x80, MANTISSA, LEAST), 0x7F).to(tl.uint8)
    return code


@triton.jit
def _nibble(number):
    """E2M1, whose zero has no sign."""
    known = tl.where(number == number, number, 0.0)
    return tl.where(known == 0, 0, _float_code(known, 8, 1, 0))


@triton.jit
def _e4m3(wanted, UP: tl.constexpr):
    """The scale that is nearest, at least the smallest; `UP` says not below what is wanted."""
    bounded = tl.minimum(wanted, 448.0)
    made = _on_grid(bounded, 0, NEAREST, 3, -6, 448.0)
    made = tl.where((wanted > 0) & (made == 0), 0.001953125, made)
    if UP:
        power = tl.maximum(_bits(made) & 0x7F800000, 121 << 23)
        made = tl.where(made < wanted, tl.minimum(made + _float(power - (3 << 23)), 448.0), made)
    return tl.where(wanted == wanted, made, wanted)


@triton.jit
def _off(x, scale, of_tensor, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """Squared errors of blocks of 16 numbers in a row, added up in the reference's order."""
    number = _on_grid(x * _reciprocal(scale * of_tensor)[:, :, None], 0, NEAREST, MANTISSA, LEAST, LARGEST)
    error = number * scale[:, :, None] - x * _reciprocal(of_tensor)
    error = error * error
    for _half in tl.static_range(4):
        one, other = tl.split(error.reshape(error.shape[0], error.shape[1], error.shape[2] // 2, 2))
        error = one + other
    return error.reshape(error.shape[0], error.shape[1])


@triton.jit
def _e8m0(wanted, largest, UP: tl.constexpr, BINADE: tl.constexpr):
    """The exponent's byte of a power of two; 255 says not a number."""
    if UP:
        bits = _bits(wanted)
        # Up to 2^-127, the byte is zero.
        code = tl.where(bits <= 0x400000, 0, (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32))
    else:
        code = tl.maximum((_bits(largest) >> 23) - BINADE, 0)
    return tl.where(wanted == wanted, tl.minimum(code, 254), 255)


@triton.jit
def largest_kernel(
    x_ptr, by_ptr, partial_ptr, M, K, stride_m, stride_k,
    BY_K: tl.constexpr, FINITE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest `_size` of every tile; with `FINITE`, of its blocks that are."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    size = _size(_loaded(x_ptr, by_ptr, m, k, M, K, stride_m, stride_k, BY_K))
    size = tl.max(tl.max(size.reshape(ROWS // HEIGHT, HEIGHT, COLUMNS // WIDTH, WIDTH), 3), 1)
    if FINITE:
        size = tl.where(size < 0x7F800000, size, 0)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(tl.max(size, 1), 0))


@triton.jit
def _multiple(largest, LARGEST: tl.constexpr, MOST: tl.constexpr):
    """The least that keeps the largest number of a part within the format; 1 where that is none."""
    wanted = tl.ceil(tl.div_rn(largest, LARGEST + tl.zeros_like(largest)))
    return tl.minimum(tl.maximum(tl.where(wanted == wanted, wanted, 1.0), 1.0), MOST * 1.0)


@triton.jit(do_not_specialize=["seed"])
def rows_kernel(
    x_ptr, by_ptr, bits_ptr, seed, codes_ptr, scales_ptr, multiples_ptr, M, K, K_codes, stride_m, stride_k,
    BY_K: tl.constexpr, DRAW: tl.constexpr, OF_TENSOR: tl.constexpr, PART: tl.constexpr, MOST: tl.constexpr,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, WHOLE_BY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One scale a row, found in a first walk along it, whose second finds it in the cache; or the one of the tensor,
    which is given. Each `PART` of a row, where there are parts, has a multiple of it, up to `MOST`."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if OF_TENSOR:
        scale = tl.load(scales_ptr) + tl.zeros((ROWS,), tl.float32)
    else:
        size = tl.zeros((ROWS,), tl.int32)
        for begin in range(0, K, COLUMNS):
            k = begin + tl.arange(0, COLUMNS).to(tl.int64)
            here = _size(_loaded(x_ptr, by_ptr, m, k, M, K, stride_m, stride_k, BY_K))
            size = tl.maximum(size, tl.max(here, 1))
        scale = tl.div_rn(_largest(size), LARGEST * MOST + tl.zeros((ROWS,), tl.float32))
        tl.store(scales_ptr + m, scale, m < M)
    reciprocal = _reciprocal(scale)
    for begin in range(0, K_codes, COLUMNS):
        k = begin + tl.arange(0, COLUMNS).to(tl.int64)
        x = _loaded(x_ptr, by_ptr, m, k, M, K, stride_m, stride_k, BY_K)
        if PART > 0:
            x = x.reshape(ROWS, COLUMNS // PART, PART)
            multiple = _multiple(_float(tl.max(_size(x), 2)) * reciprocal[:, None], LARGEST, MOST)
            part = begin // PART + tl.arange(0, COLUMNS // PART).to(tl.int64)
            parts = tl.cdiv(K_codes, PART)
            there = (m[:, None] < M) & (part[None, :] < parts)
            tl.store(multiples_ptr + m[:, None] * parts + part[None, :], multiple.to(tl.uint8), there)
            factor = tl.div_rn(reciprocal[:, None] + tl.zeros_like(multiple), multiple)
            x = (x * factor[:, :, None]).reshape(ROWS, COLUMNS)
        else:
            x = x * reciprocal[:, None]
        bits = 0
        if DRAW != NEAREST:
            bits = _sixteen(bits_ptr, seed, m, k, M, K, DRAW, ROWS, COLUMNS)
        code = _code(_on_grid(x, bits, DRAW, MANTISSA, LEAST, LARGEST), MANTISSA, LEAST, WHOLE_BY)
        tl.store(codes_ptr + m[:, None] * K_codes + k[None, :], code, (m[:, None] < M) & (k[None, :] < K_codes))


@triton.jit(do_not_specialize=["seed"])
def blocks_kernel(
    x_ptr, by_ptr, bits_ptr, seed, of_tensor_ptr, codes_ptr, scales_ptr,
    M, K, M_codes, K_codes, stride_m, stride_k,
    BY_K: tl.constexpr, DRAW: tl.constexpr, SCALE: tl.constexpr, UP: tl.constexpr, EITHER: tl.constexpr,
    BINADE: tl.constexpr, PACKED: tl.constexpr,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, WHOLE_BY: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of whole blocks; two numbers of E2M1 share a byte where `PACKED`."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    x = _loaded(x_ptr, by_ptr, m, k, M, K, stride_m, stride_k, BY_K)
    x = x.reshape(ROWS // HEIGHT, HEIGHT, COLUMNS // WIDTH, WIDTH)
    largest = _largest(tl.max(tl.max(_size(x), 3), 1))
    wanted = tl.div_rn(largest, LARGEST + tl.zeros((ROWS // HEIGHT, COLUMNS // WIDTH), tl.float32))
    if SCALE == E4M3:
        of_tensor = tl.load(of_tensor_ptr)
        made = _e4m3(wanted * _reciprocal(of_tensor), UP)
        if EITHER and DRAW == NEAREST:
            four = _e4m3(largest * 0.25 * _reciprocal(of_tensor), UP)
            rows = x.reshape(ROWS, COLUMNS // WIDTH, WIDTH)
            off = _off(rows, made, of_tensor, MANTISSA, LEAST, LARGEST)
            made = tl.where(_off(rows, four, of_tensor, MANTISSA, LEAST, LARGEST) < off, four, made)
        known = tl.where(made == made, made, 0.0)
        stored = tl.where(made == made, _float_code(known, 0x80, 3, -6), 0x7F)
        scale = made * of_tensor
    elif SCALE == E8M0:
        stored = _e8m0(wanted, largest, UP, BINADE)
        scale = tl.where(stored == 255, wanted, _float(stored << 23))
    else:
        stored = wanted
        scale = wanted
    bm = tl.program_id(0).to(tl.int64) * (ROWS // HEIGHT) + tl.arange(0, ROWS // HEIGHT)
    bk = tl.program_id(1).to(tl.int64) * (COLUMNS // WIDTH) + tl.arange(0, COLUMNS // WIDTH)
    there = (bm[:, None] * HEIGHT < M_codes) & (bk[None, :] * WIDTH < K_codes)
    at = scales_ptr + bm[:, None] * (K_codes // WIDTH) + bk[None, :]
    tl.store(at, stored.to(scales_ptr.dtype.element_ty), there)
    x = (x * _reciprocal(scale)[:, None, :, None]).reshape(ROWS, COLUMNS)
    bits = 0
    if DRAW != NEAREST:
        bits = _sixteen(bits_ptr, seed, m, k, M, K, DRAW, ROWS, COLUMNS)
    number = _on_grid(x, bits, DRAW, MANTISSA, LEAST, LARGEST)
    if PACKED:
        low, high = tl.split(_nibble(number).reshape(ROWS, COLUMNS // 2, 2))
        pair = tl.program_id(1).to(tl.int64) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        there = (m[:, None] < M_codes) & (pair[None, :] < K_codes // 2)
        tl.store(codes_ptr + m[:, None] * (K_codes // 2) + pair[None, :], (low | high << 4).to(tl.uint8), there)
    else:
        there = (m[:, None] < M_codes) & (k[None, :] < K_codes)
        tl.store(codes_ptr + m[:, None] * K_codes + k[None, :], _code(number, MANTISSA, LEAST, WHOLE_BY), there)


@triton.jit
def scale_kernel(
    sums_ptr, rows_ptr, columns_ptr, out_ptr, M, N, stride_m,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums times their row's scale, then their column's, in float32 or (`WIDE`) float64."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (m[:, None] < M) & (n[None, :] < N)
    sums = tl.load(sums_ptr + m[:, None] * stride_m + n[None, :], inside, 0)
    sums = sums.to(tl.float64 if WIDE else tl.float32)
    scaled = sums * tl.load(rows_ptr + m, m < M, 0.0)[:, None] * tl.load(columns_ptr + n, n < N, 0.0)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], scaled.to(out_ptr.dtype.element_ty), inside)
