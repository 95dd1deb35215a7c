use super::*;
use crate::format::Format;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

/// Moments of correlated inputs: a random walk over the columns, some columns louder.
fn correlated(cols: usize) -> InputGram {
    let tokens = 3 * cols;
    let mut values = vec![0.0f32; cols * cols];
    for t in 0..tokens {
        let steps = noise(cols, t as u32 + 77);
        let mut walk = 0.0;
        let x: Vec<f32> = steps
            .iter()
            .enumerate()
            .map(|(c, step)| {
                walk = 0.7 * walk + step;
                walk * if c % 17 == 3 { 4.0 } else { 1.0 }
            })
            .collect();
        for i in 0..cols {
            for j in 0..cols {
                values[i * cols + j] += x[i] * x[j];
            }
        }
    }
    InputGram::new(cols, values, 0.01).unwrap()
}

fn loss(gram: &InputGram, values: &[f32], packed: &PackedHost) -> f64 {
    let errors: Vec<f32> = values.iter().zip(packed.dequantize()).map(|(w, q)| w - q).collect();
    gram.output_error(&errors)
}

/// Outputs change clearly less than with grids searched for the weights alone, in every quantized format.
#[test]
fn feedback_lessens_the_outputs_error() {
    let (rows, cols) = (21, 160);
    let (values, gram) = (noise(rows * cols, 3), correlated(cols));
    for format in Format::all().into_iter().filter(|f| f.quantized().is_some_and(|q| q.bit_width < 8)) {
        let layout = PackedLayout::new(rows, cols, format).unwrap();
        let plain = PackedHost::requantize(&values, layout, None, &crate::RoundingGoal::new(cols)).unwrap();
        let found = PackedHost::quantize_compensated(&values, layout, &gram, Compensation::default()).unwrap();
        assert_eq!(found.layout, layout);
        found.check().unwrap();
        let (ours, theirs) = (loss(&gram, &values, &found), loss(&gram, &values, &plain));
        assert!(ours < 0.8 * theirs, "{format}: {ours} against {theirs}");
        let panels = PackedHost::quantize_compensated(&values, layout.prepared(), &gram, Compensation::default());
        assert_eq!(panels.unwrap(), found.prepare().unwrap(), "{format}");
    }
}

/// With uncorrelated inputs of equal energy there is nothing to feed back: the result is rounding to nearest on the
/// grids that were found.
#[test]
fn without_correlation_it_is_rounding_to_nearest() {
    let (rows, cols) = (5, 64);
    let values = noise(rows * cols, 11);
    let identity = (0..cols * cols).map(|i| if i / cols == i % cols { 1.0 } else { 0.0 }).collect();
    let gram = InputGram::new(cols, identity, 0.01).unwrap();
    for name in ["q4g32a", "q3g64s", "q2g32a"] {
        let layout = PackedLayout::new(rows, cols, Format::parse(name).unwrap()).unwrap();
        let how = Compensation { by_energy: false, refits: 0, ..Compensation::default() };
        let found = PackedHost::quantize_compensated(&values, layout, &gram, how).unwrap();
        let back = found.dequantize();
        let format = layout.format.quantized().unwrap();
        let scales: &[u32] = bytemuck::cast_slice(&found.scales);
        for row in 0..rows {
            for col in 0..cols {
                let group = col / usize::from(format.group_size);
                let (scale, min) = format.scale_and_min(&scales[row * layout.row_scale_words()..], group);
                let w = values[row * cols + col];
                let nearest = (0..1u32 << format.bit_width).map(|q| q as f32 * scale + min);
                let best = nearest.map(|v| (v - w).abs()).fold(f32::INFINITY, f32::min);
                assert!(((back[row * cols + col] - w).abs() - best).abs() < 1e-5, "{name}: {row}, {col}");
            }
        }
    }
}

/// Values on a grid of the format are found again, whatever the inputs.
#[test]
fn values_on_a_grid_stay() {
    let (rows, cols) = (3, 96);
    let gram = correlated(cols);
    let layout = PackedLayout::new(rows, cols, Format::parse("q4g32a").unwrap()).unwrap();
    let on_grid = PackedHost::quantize(&noise(rows * cols, 5), layout).unwrap().dequantize();
    let again = PackedHost::quantize_compensated(&on_grid, layout, &gram, Compensation::default()).unwrap();
    for (a, b) in on_grid.iter().zip(again.dequantize()) {
        assert!((a - b).abs() < 2e-3, "{a} became {b}");
    }
}

#[test]
fn more_refits_are_never_worse() {
    let (rows, cols) = (16, 128);
    let (values, gram) = (noise(rows * cols, 23), correlated(cols));
    for name in ["q2g32a", "q4g64s", "q3g32s-4:8", "q4g32a-b60"] {
        let layout = PackedLayout::new(rows, cols, Format::parse(name).unwrap()).unwrap();
        let of = |refits| {
            let how = Compensation { refits, ..Compensation::default() };
            loss(&gram, &values, &PackedHost::quantize_compensated(&values, layout, &gram, how).unwrap())
        };
        let (none, two) = (of(0), of(2));
        assert!(two <= none * 1.001, "{name}: {two} after refits, {none} without");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let gram = correlated(32);
    let layout = PackedLayout::new(2, 64, Format::parse("q4g32a").unwrap()).unwrap();
    let of = |values: &[f32]| PackedHost::quantize_compensated(values, layout, &gram, Compensation::default());
    assert!(of(&[0.5; 128]).unwrap_err().to_string().contains("columns of inputs"));
    assert!(of(&[f32::NAN; 128]).is_err());
    assert!(of(&[0.5; 3]).is_err());
}

/// Pruning with feedback changes outputs less than dropping the same share by magnitude, in floats and in codes that
/// store their zeros.
#[test]
fn pruning_is_made_up_for() {
    let (rows, cols) = (9, 96);
    let (values, gram) = (noise(rows * cols, 41), correlated(cols));
    let pattern = SparsePattern::Bitmask { percent: 60 };
    let mut dropped = values.clone();
    for row in dropped.chunks_mut(cols) {
        let kept = pattern.kept_columns(row);
        (0..cols).filter(|col| !kept.contains(col)).for_each(|col| row[col] = 0.0);
    }
    let loss_of = |v: &[f32]| gram.output_error(&values.iter().zip(v).map(|(a, b)| a - b).collect::<Vec<_>>());
    let pruned = prune_compensated(&values, pattern, &gram).unwrap();
    for row in pruned.chunks(cols) {
        assert_eq!(row.iter().filter(|v| **v != 0.0).count(), pattern.kept(cols));
    }
    assert!(loss_of(&pruned) < 0.6 * loss_of(&dropped), "{} {}", loss_of(&pruned), loss_of(&dropped));

    let layout = PackedLayout::new(rows, cols, Format::parse("q8g32s").unwrap()).unwrap();
    let how = Compensation { pruned: pattern, ..Compensation::default() };
    let codes = PackedHost::quantize_compensated(&values, layout, &gram, how).unwrap().dequantize();
    for row in codes.chunks(cols) {
        assert!(row.iter().filter(|v| **v == 0.0).count() >= cols - pattern.kept(cols));
    }
    assert!(loss_of(&codes) < 1.1 * loss_of(&pruned));
    let layout = PackedLayout::new(rows, cols, Format::parse("q8g32a").unwrap()).unwrap();
    assert!(PackedHost::quantize_compensated(&values, layout, &gram, how).is_err());
}
