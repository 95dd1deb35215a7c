//! Error feedback and search, on whole models.

use burn::tensor::Device;
use edgellm_luc::{
    Gptq, Rtn, Search, Searched, Solve, Trials, beginnings, compress_decoder, measure, option_grid, uniform_policy,
};
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::testing::tiny_decoder;
use edgellm_model::traits::Compressor;
use edgellm_model::values::{Budget, Granularity, LayerFormat, Measurement};

fn windows(n: u32, start: u32) -> Vec<Vec<u32>> {
    (0..n).map(|w| (0..24).map(|i| (i * i * 7 + (w + start) * 31 + i * (w + 3)) % 288).collect()).collect()
}

/// Mean KL divergence over all tokens of some windows.
fn divergence(base: &Decoder, other: &Decoder, windows: &[Vec<u32>]) -> f64 {
    let log_p = |decoder: &Decoder, w: &Vec<u32>| -> Vec<f64> {
        let logits = to_vec(decoder.forward(w, None, None).unwrap()).unwrap();
        let rows = logits.chunks(288).flat_map(|row| {
            let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
            row.iter().map(move |&v| f64::from(v) - sum.ln())
        });
        rows.collect()
    };
    let (mut sum, mut tokens) = (0.0, 0);
    for w in windows {
        let pairs = log_p(base, w).into_iter().zip(log_p(other, w));
        sum += pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        tokens += w.len();
    }
    sum / tokens as f64
}

#[test]
fn error_feedback_beats_rounding_to_nearest_on_text_it_has_not_seen() {
    let decoder = tiny_decoder(3, &Device::flex());
    let (calibration, held_out) = (windows(40, 0), windows(10, 100));
    let dense = LayerFormat::quantized(3, 32, false);
    for (format, share) in [(dense, 0.9), (LayerFormat::quantized(4, 32, true).with_sparsity(0.5), 1.0)] {
        let policy = uniform_policy(decoder.n_blocks(), format).unwrap();
        let of = |compressor: &dyn Compressor| {
            let compressed = compress_decoder(&decoder, &policy, compressor, &calibration).unwrap();
            divergence(&decoder, &compressed, &held_out)
        };
        let (nearest, feedback) = (of(&Rtn), of(&Gptq::default()));
        assert!(feedback < share * nearest, "{format}: {feedback} against {nearest}");
    }
}

fn measured(decoder: &Decoder, calibration: &[Vec<u32>]) -> Measurement {
    let options = option_grid(&[2, 3, 4, 6, 8], &[32], &[]).unwrap();
    let (compressor, compared_windows, compared_length) = (&Gptq::default(), 2, 16);
    let granularity = Granularity::Block;
    let trials = Trials { options: &options, granularity, compressor, calibration, compared_windows, compared_length };
    measure(decoder, &trials, &[], &mut |_| Ok(()), &mut |_| {}).unwrap()
}

#[test]
fn a_search_keeps_the_budget_and_is_never_worse_than_its_start() {
    let decoder = tiny_decoder(3, &Device::flex());
    let calibration = windows(16, 0);
    let measurement = measured(&decoder, &calibration);
    let budget = Budget { bits_per_weight: Some(4.0), ..Budget::default() };
    let start = Solve::default().solution(&measurement, &budget).unwrap();
    let compared = beginnings(&calibration, 8, 24);
    let run = |seed| -> Searched {
        let (compressor, calibration, compared) = (&Gptq::default(), &calibration, &compared);
        let search = Search { compressor, calibration, compared, candidates: 60, seed };
        search.run(&decoder, &measurement, &start.policy, &budget, &mut |_| {}).unwrap()
    };
    let found = run(1);
    assert!(found.kl <= found.kl_before, "{found:?}");
    assert_eq!(found.candidates, 60);
    assert_eq!(found, run(1));
    let bits = found.bytes as f64 * 8.0
        / measurement.units.iter().flat_map(|u| &u.matrices).map(|m| m.weights()).sum::<u64>() as f64;
    assert!(bits <= 4.0, "{bits} bits per weight");
    // Some seed finds something better than adding up sensitivities did.
    assert!((1..4).any(|seed| run(seed).kl < found.kl_before));
}
