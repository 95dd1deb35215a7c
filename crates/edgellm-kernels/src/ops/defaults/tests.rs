//! The default bodies on several chunks (unit tests make chunks small) against the overrides of `Flex`.

use burn::backend::Flex;
use burn::tensor::TensorData;

use super::*;
use crate::{Format, PackedHost};

type Float = FloatTensor<Flex>;
type Int = IntTensor<Flex>;

fn float(shape: impl Into<Shape>, seed: f32) -> Float {
    let shape = shape.into();
    let values = (0..shape.num_elements()).map(|i| (i as f32 * 0.731 + seed).sin()).collect();
    Float::from_data(TensorData::new(values, shape))
}

fn packed(rows: usize, cols: usize, format: Format) -> (Int, Int, PackedLayout) {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.377).sin()).collect();
    let layout = PackedLayout::new(rows, cols, format).unwrap();
    let host = PackedHost::quantize(&values, layout).unwrap();
    let tensor = |bytes: &[u8], width: usize| {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
        if width == 0 {
            Int::from_data(TensorData::new(vec![0u32], [1, 1]))
        } else {
            Int::from_data(TensorData::new(words, [rows, width]))
        }
    };
    let (words, scales) = (&host.words, &host.scales);
    (tensor(words, layout.row_words()), tensor(scales, layout.row_scale_words()), layout)
}

fn assert_same(name: &str, format: Format, found: Float, expected: Float) {
    assert_eq!(found.shape(), expected.shape());
    let values = |t: Float| t.into_data().try_into_vec::<f32>().unwrap();
    let (found, expected) = (values(found), values(expected));
    let scale = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (f, e) in found.iter().zip(&expected) {
        assert!((f - e).abs() <= 3e-6 * scale, "{name} {format}: {f} instead of {e}");
    }
}

#[test]
fn chunks_cover_every_row_once() {
    for (rows, per_row) in [(1, 1), (23, 37), (256, 1), (257, 1), (5, 10_000)] {
        let all: Vec<usize> = chunks(rows, per_row, CHUNK).flatten().collect();
        assert_eq!(all, (0..rows).collect::<Vec<_>>());
        assert!(chunks(rows, per_row, CHUNK).all(|c| c.len() == 1 || c.len() * per_row <= CHUNK));
    }
    assert!(chunks(23, 37, CHUNK).count() > 1, "the tests below use several chunks");
}

#[test]
fn default_bodies_agree_with_the_overrides() {
    let (tokens, rows, cols) = (3, 23, 37);
    for format in Format::all() {
        let (w, s, layout) = packed(rows, cols, format);
        let (x, dy) = (float([tokens, cols], 0.1), float([tokens, rows], 0.2));
        let ids = Int::from_data(TensorData::new(vec![22i32, 0, 7], [tokens]));
        let p = || (w.clone(), s.clone());

        let found = dequantize::<Flex>(p().0, p().1, layout);
        assert_same("dequantize", format, found, Flex::edge_dequantize(p().0, p().1, layout));
        let found = packed_embedding::<Flex>(p().0, p().1, ids.clone(), layout);
        let expected = Flex::edge_packed_embedding(p().0, p().1, ids.clone(), layout);
        assert_same("packed_embedding", format, found, expected);
        let found = packed_linear::<Flex>(x.clone(), p().0, p().1, layout);
        assert_same("packed_linear", format, found, Flex::edge_packed_linear(x.clone(), p().0, p().1, layout));
        let found = packed_linear_backward::<Flex>(dy.clone(), p().0, p().1, layout);
        let expected = Flex::edge_packed_linear_backward(dy, p().0, p().1, layout);
        assert_same("packed_linear_backward", format, found, expected);

        let normalizer = log_normalizer::<Flex>(x.clone(), p().0, p().1, layout);
        let expected = Flex::edge_log_normalizer(x.clone(), p().0, p().1, layout);
        assert_same("log_normalizer", format, normalizer.clone(), expected);
        let factor = float([tokens], 0.3);
        let found = cross_entropy_backward::<Flex>(
            x.clone(),
            p().0,
            p().1,
            ids.clone(),
            factor.clone(),
            normalizer.clone(),
            layout,
        );
        let expected = Flex::edge_cross_entropy_backward(x, p().0, p().1, ids, factor, normalizer, layout);
        assert_same("cross_entropy_backward", format, found, expected);
    }
}
