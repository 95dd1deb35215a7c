//! Default decoding of packed words, in Burn primitives.
//!
//! Sparse rows: the bits of the mask are summed along the row, in blocks first and then over blocks; a kept column takes
//! the code whose number is the sum up to it.
//!
//! Codes: the words of a block of 32 columns are spread over its 32 columns by index, shifted and masked; codes that
//! cross a word boundary take their upper bits from the next word. Floats are decoded arithmetically from their bits
//! (sign, exponent, mantissa), because not every device has 16-bit floats and no backend offers a bit cast. With `e`
//! the exponent field, `m` the mantissa field and `M` its width, the value is
//! `(m 2^-M + [e > 0]) * 2^(max(e, 1) - bias)`: exact, subnormals included (a GPU may flush subnormal *results* to
//! zero). The largest exponent field decodes to an infinity.

use burn::backend::tensor::{BoolTensor, Device, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{DType, FloatDType, IntDType, Shape, Slice, TensorData};

use crate::format::{BLOCK, Format, PackedLayout, QuantFormat, ScaleType};

/// Decodes `n` rows: `[n, row_words]` and `[n, row_scale_words]` to `[n, cols]`.
pub(crate) fn rows<B: Backend>(words: IntTensor<B>, scales: IntTensor<B>, layout: PackedLayout) -> FloatTensor<B> {
    match layout.format {
        Format::F32 => float_bits::<B>(words, 8, 23),
        Format::F16 => float_bits::<B>(halves::<B>(words, layout.cols), 5, 10),
        Format::BF16 => float_bits::<B>(halves::<B>(words, layout.cols), 8, 7),
        Format::Quantized(format) => {
            let device = words.device();
            let (codes, dropped) = if format.is_sparse() {
                let (codes, dropped) = sparse_codes::<B>(words, format, layout.cols);
                (codes, Some(dropped))
            } else {
                (codes::<B>(words, usize::from(format.bit_width), layout.cols), None)
            };
            let codes = B::int_into_float(codes, FloatDType::F32);
            let groups: Vec<i32> = (0..layout.cols).map(|col| (col / usize::from(format.group_size)) as i32).collect();
            let groups = indices::<B>(groups, &device);
            let (scale, min) = group_scales::<B>(scales, format, layout.cols);
            let scale = B::float_select(scale, 1, groups.clone());
            let values = match min {
                Some(min) => B::float_add(B::float_mul(codes, scale), B::float_select(min, 1, groups)),
                None => B::float_mul(B::float_add_scalar(codes, (-f64::from(format.zero_point())).into()), scale),
            };
            match dropped {
                Some(dropped) => B::float_mask_fill(values, dropped, 0.0.into()),
                None => values,
            }
        }
    }
}

/// `[n, row_words]` words of a sparse format to `[n, cols]` codes, and which columns have none.
fn sparse_codes<B: Backend>(words: IntTensor<B>, format: QuantFormat, cols: usize) -> (IntTensor<B>, BoolTensor<B>) {
    let device = words.device();
    let (n, blocks, kept) = (words.shape()[0], cols.div_ceil(BLOCK), format.pattern.kept(cols));
    let columns = |t: IntTensor<B>, columns| B::int_slice(t, &[Slice::from(0..n), Slice::from(columns)]);
    let row_words = words.shape()[1];
    let mask = B::int_reshape(columns(words.clone(), 0..blocks), Shape::new([n, blocks, 1]));
    let bits = B::bitwise_right_shift(mask, u32s::<B>((0..BLOCK as u32).collect(), [1, 1, BLOCK], &device));
    let bits = B::int_cast(B::bitwise_and_scalar(bits, 1i64.into()), IntDType::I32);
    // The kept columns up to each one. Some devices sum in quadratic time, so blocks are summed on their own.
    let inside = B::int_cumsum(bits.clone(), 2);
    let totals = B::int_reshape(B::int_sum_dim(bits.clone(), 2), Shape::new([n, blocks]));
    let before = B::int_sub(B::int_cumsum(totals.clone(), 1), totals);
    let number = B::int_add(inside, B::int_reshape(before, Shape::new([n, blocks, 1])));
    let row = |t: IntTensor<B>| columns(B::int_reshape(t, Shape::new([n, blocks * BLOCK])), 0..cols);
    let (bits, number) = (row(bits), row(number));
    // A mask may keep more columns than there are codes.
    let bool_dtype = get_or_init_device_settings::<B>(&device).bool_dtype;
    let dropped = B::bool_or(
        B::int_equal_elem(bits, 0i64.into(), bool_dtype),
        B::int_greater_elem(number.clone(), (kept as i64).into(), bool_dtype),
    );
    let number = B::int_clamp(B::int_sub_scalar(number, 1i64.into()), 0i64.into(), (kept as i64 - 1).into());
    let codes = codes::<B>(columns(words, blocks..row_words), usize::from(format.bit_width), kept);
    (B::int_gather(1, codes, number), dropped)
}

/// `[n, blocks * bit_width]` words to `[n, cols]` codes.
fn codes<B: Backend>(words: IntTensor<B>, bits: usize, cols: usize) -> IntTensor<B> {
    let device = words.device();
    let n = words.shape()[0];
    let blocks = cols.div_ceil(BLOCK);
    let words = B::int_reshape(words, Shape::new([n, blocks, bits]));
    let first: Vec<i32> = (0..BLOCK).map(|i| (i * bits / 32) as i32).collect();
    let shift: Vec<u32> = (0..BLOCK).map(|i| (i * bits % 32) as u32).collect();
    let low = B::int_select(words.clone(), 2, indices::<B>(first.clone(), &device));
    let low = B::bitwise_right_shift(low, u32s::<B>(shift.clone(), [1, 1, BLOCK], &device));
    let crosses = |i: usize| shift[i] as usize + bits > 32;
    let joined = if (0..BLOCK).any(crosses) {
        // Upper bits: masked first, so that the shift never leaves 32 bits.
        let next = (0..BLOCK).map(|i| first[i] + i32::from(crosses(i))).collect();
        let mask = (0..BLOCK).map(|i| if crosses(i) { (1u32 << (shift[i] as usize + bits - 32)) - 1 } else { 0 });
        let left = (0..BLOCK).map(|i| if crosses(i) { 32 - shift[i] } else { 0 });
        let high = B::int_select(words, 2, indices::<B>(next, &device));
        let high = B::bitwise_and(high, u32s::<B>(mask.collect(), [1, 1, BLOCK], &device));
        B::bitwise_or(low, B::bitwise_left_shift(high, u32s::<B>(left.collect(), [1, 1, BLOCK], &device)))
    } else {
        low
    };
    let codes = B::bitwise_and_scalar(joined, ((1i64 << bits) - 1).into());
    let codes = B::int_reshape(codes, Shape::new([n, blocks * BLOCK]));
    B::int_slice(codes, &[Slice::from(0..n), Slice::from(0..cols)])
}

/// Scales `[n, groups]`, and minima if the format has them.
fn group_scales<B: Backend>(
    scales: IntTensor<B>,
    format: QuantFormat,
    cols: usize,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let groups = format.groups(cols);
    match (format.scale_type, format.symmetric) {
        (ScaleType::F16, true) => (float_bits::<B>(halves::<B>(scales, groups), 5, 10), None),
        (ScaleType::F32, true) => (float_bits::<B>(scales, 8, 23), None),
        (ScaleType::F16, false) => interleaved::<B>(float_bits::<B>(halves::<B>(scales, 2 * groups), 5, 10), groups),
        (ScaleType::F32, false) => interleaved::<B>(float_bits::<B>(scales, 8, 23), groups),
        (ScaleType::U8, symmetric) => two_levels::<B>(scales, groups, symmetric),
    }
}

/// Scales and minima of bytes and a row's units: `[n, words]` to twice `[n, groups]`.
fn two_levels<B: Backend>(
    scales: IntTensor<B>,
    groups: usize,
    symmetric: bool,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let device = scales.device();
    let n = scales.shape()[0];
    let units = float_bits::<B>(halves::<B>(scales.clone(), 2), 8, 7);
    let column = |t: FloatTensor<B>, i| B::float_slice(t, &[Slice::from(0..n), Slice::from(i..i + 1)]);
    let codes = |first: usize, signed: bool| {
        let index = indices::<B>((0..groups).map(|g| (first + g / 4) as i32).collect(), &device);
        let shift = u32s::<B>((0..groups).map(|g| 8 * (g as u32 % 4)).collect(), [1, groups], &device);
        let codes = B::bitwise_right_shift(B::int_select(scales.clone(), 1, index), shift);
        let codes = B::bitwise_and_scalar(codes, 0xff_i64.into());
        if !signed {
            return B::int_into_float(codes, FloatDType::F32);
        }
        // The sign's bit turned, a byte is the code and 128.
        let codes = B::int_into_float(B::bitwise_xor_scalar(codes, 0x80_i64.into()), FloatDType::F32);
        B::float_add_scalar(codes, (-128.0).into())
    };
    let scale = B::float_mul(codes(1, symmetric), column(units.clone(), 0));
    let min = (!symmetric).then(|| B::float_mul(codes(1 + groups.div_ceil(4), true), column(units, 1)));
    (scale, min)
}

/// Splits `[n, 2 groups]` into its even and odd columns.
fn interleaved<B: Backend>(pairs: FloatTensor<B>, groups: usize) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let device = pairs.device();
    let every_second = |first: usize| indices::<B>((0..groups).map(|g| (2 * g + first) as i32).collect(), &device);
    let scale = B::float_select(pairs.clone(), 1, every_second(0));
    (scale, Some(B::float_select(pairs, 1, every_second(1))))
}

/// `[n, words]` to `[n, count]` 16-bit halves, low half first.
fn halves<B: Backend>(words: IntTensor<B>, count: usize) -> IntTensor<B> {
    let device = words.device();
    let index = indices::<B>((0..count).map(|i| (i / 2) as i32).collect(), &device);
    let shift = u32s::<B>((0..count).map(|i| 16 * (i as u32 % 2)).collect(), [1, count], &device);
    B::bitwise_and_scalar(B::bitwise_right_shift(B::int_select(words, 1, index), shift), 0xffff_i64.into())
}

/// The floats with these bits: `exponent` bits above `mantissa` bits, and a sign above both.
fn float_bits<B: Backend>(bits: IntTensor<B>, exponent: u32, mantissa: u32) -> FloatTensor<B> {
    let device = bits.device();
    let shape = bits.shape();
    let to_float = |t: IntTensor<B>| B::int_into_float(t, FloatDType::F32);
    let sign = B::bitwise_right_shift_scalar(bits.clone(), i64::from(exponent + mantissa).into());
    let sign = B::float_add_scalar(B::float_mul_scalar(to_float(sign), (-2.0).into()), 1.0.into());
    let field = B::bitwise_right_shift_scalar(bits.clone(), i64::from(mantissa).into());
    let field = B::bitwise_and_scalar(field, ((1i64 << exponent) - 1).into());
    let field = B::int_reshape(B::int_cast(field, IntDType::I32), Shape::new([shape.num_elements()]));

    let bias = (1i32 << (exponent - 1)) - 1;
    let fields = 1i32 << exponent;
    let power = |e: i32| {
        if e == fields - 1 { f32::INFINITY } else { 2f32.powi(e.max(1) - bias) }
    };
    let implicit: Vec<f32> = (0..fields).map(|e| if e == 0 { 0.0 } else { 1.0 }).collect();
    let table = |values: Vec<f32>| {
        let table = B::float_from_data(TensorData::new(values, [fields as usize]), &device);
        B::float_reshape(B::float_select(table, 0, field.clone()), shape.clone())
    };
    let powers = table((0..fields).map(power).collect());
    let fraction = to_float(B::bitwise_and_scalar(bits, ((1i64 << mantissa) - 1).into()));
    let fraction = B::float_mul_scalar(fraction, 2f64.powi(-(mantissa as i32)).into());
    let fraction = B::float_add(fraction, table(implicit));
    B::float_mul(B::float_mul(fraction, sign), powers)
}

fn indices<B: Backend>(values: Vec<i32>, device: &Device<B>) -> IntTensor<B> {
    let n = values.len();
    B::int_from_data(TensorData::new(values, [n]), device)
}

fn u32s<B: Backend>(values: Vec<u32>, shape: impl Into<Shape>, device: &Device<B>) -> IntTensor<B> {
    let data = TensorData::new(values, shape.into());
    debug_assert_eq!(data.dtype(), DType::U32);
    B::int_from_data(data, device)
}
