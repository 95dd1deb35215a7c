use edgellm_model::values::Pattern;

use super::*;
use crate::Rtn;

const ROWS: usize = 12;
const COLS: usize = 128;

fn weights() -> Vec<f32> {
    (0..ROWS * COLS).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0 + (i as f32 * 0.3).sin()).collect()
}

/// Inputs whose neighbours resemble each other, some columns ten times louder.
fn inputs() -> InputGram {
    let mut gram = vec![0.0f32; COLS * COLS];
    for i in 0..COLS {
        for j in 0..COLS {
            let loud = |c: usize| if c % 13 == 5 { 10.0 } else { 1.0 };
            gram[i * COLS + j] = 0.9f32.powi(i.abs_diff(j) as i32) * loud(i) * loud(j);
        }
    }
    InputGram::new(COLS, gram, 0.01).unwrap()
}

fn error(compressor: &dyn Compressor, format: &LayerFormat) -> f64 {
    let (w, inputs) = (weights(), inputs());
    let packed = compressor.compress(&w, ROWS, COLS, format, Some(&inputs)).unwrap();
    assert_eq!(packed.layout.format, format.packed().unwrap());
    let errors: Vec<f32> = w.iter().zip(packed.dequantize()).map(|(w, q)| w - q).collect();
    inputs.output_error(&errors)
}

#[test]
fn what_knows_more_loses_less() {
    for format in [LayerFormat::quantized(3, 32, false), LayerFormat::quantized(4, 64, true)] {
        let (rtn, search, gptq) =
            (error(&Rtn, &format), error(&ScaleSearch, &format), error(&Gptq::default(), &format));
        assert!(gptq < 0.7 * search && search < rtn, "{format}: rtn {rtn}, search {search}, gptq {gptq}");
    }
    let half = LayerFormat::quantized(4, 32, true);
    for format in
        [half.with_n_of_m(Pattern::TwoFour), half.with_sparsity(0.5), LayerFormat::float(32).with_sparsity(0.5)]
    {
        let (rtn, wanda, gptq) = (error(&Rtn, &format), error(&Wanda, &format), error(&Gptq::default(), &format));
        assert!(gptq < wanda && wanda < rtn, "{format}: rtn {rtn}, wanda {wanda}, sparsegpt {gptq}");
    }
}

#[test]
fn zeros_are_as_many_as_asked_for_in_formats_that_store_all() {
    let w = weights();
    let format = LayerFormat::quantized(2, 32, true).with_sparsity(0.3);
    assert!(!format.packed().unwrap().quantized().unwrap().is_sparse(), "a mask would cost more than the codes");
    for compressor in [&Gptq::default() as &dyn Compressor, &Wanda, &ScaleSearch] {
        let packed = compressor.compress(&w, ROWS, COLS, &format, Some(&inputs())).unwrap();
        for row in packed.dequantize().chunks(COLS) {
            let zeros = row.iter().filter(|v| **v == 0.0).count();
            assert!(zeros >= COLS - (COLS * 70).div_ceil(100), "{}: {zeros}", compressor.name());
        }
    }
}

#[test]
fn inputs_are_needed_and_must_fit() {
    let format = LayerFormat::quantized(4, 32, false);
    for compressor in [&Gptq::default() as &dyn Compressor, &Wanda, &ScaleSearch] {
        assert!(compressor.needs_inputs());
        let error = compressor.compress(&weights(), ROWS, COLS, &format, None).unwrap_err().to_string();
        assert!(error.contains("calibration text"), "{error}");
        assert!(compressor.compress(&weights()[..64], 1, 64, &format, Some(&inputs())).is_err());
        let mut asymmetric = LayerFormat::quantized(2, 32, false);
        asymmetric.sparsity = 0.3;
        if !asymmetric.packed().unwrap().quantized().unwrap().is_sparse() {
            assert!(compressor.compress(&weights(), ROWS, COLS, &asymmetric, Some(&inputs())).is_err());
        }
    }
}
