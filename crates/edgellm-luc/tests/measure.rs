//! Sensitivities on the tiny model: against direct computation, and their properties.

use burn::tensor::Device;
use edgellm_luc::{LucError, Rtn, Trials, compress_decoder, measure, option_grid, uniform_policy};
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::testing::{decoder_of, tiny_config, tiny_decoder};
use edgellm_model::values::{Granularity, LayerFormat, Measurement, Projection, Unit, UnitPolicy, Value};
use serde_json::json;

fn windows() -> Vec<Vec<u32>> {
    (0..3).map(|w| (0..20 + w).map(|i| (i * 53 + w * 11) % 288).collect()).collect()
}

fn trials<'a>(options: &'a [LayerFormat], granularity: Granularity, calibration: &'a [Vec<u32>]) -> Trials<'a> {
    Trials { options, granularity, compressor: &Rtn, calibration, compared_windows: 9, compared_length: 99 }
}

fn run_trials(decoder: &Decoder, trials: &Trials<'_>) -> Result<Measurement, LucError> {
    measure(decoder, trials, &[], &mut |_| Ok(()), &mut |_| {})
}

fn run(decoder: &Decoder, options: &[LayerFormat], granularity: Granularity) -> Measurement {
    run_trials(decoder, &trials(options, granularity, &windows())).unwrap()
}

fn of(measurement: &Measurement, unit: Unit, option: usize) -> f64 {
    measurement.units.iter().find(|u| u.unit == unit).unwrap().local[option]
}

#[track_caller]
fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-3 * expected.abs(), "found {found}, expected {expected}");
}

/// The definition, in f64: mean over tokens of MSE over features by variance over features.
fn relative_error(found: &[f32], expected: &[f32], features: usize) -> f64 {
    let tokens = expected.len() / features;
    let mut sum = 0.0;
    for (found, expected) in found.chunks(features).zip(expected.chunks(features)) {
        let n = features as f64;
        let mean = expected.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = expected.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        let mse = found.iter().zip(expected).map(|(&f, &e)| (f64::from(f) - f64::from(e)).powi(2)).sum::<f64>() / n;
        sum += mse / variance;
    }
    sum / tokens as f64
}

/// Values of the hidden states behind `blocks` blocks, all windows one after the other.
fn hidden(decoder: &Decoder, blocks: usize) -> Vec<f32> {
    let run = |w: &Vec<u32>| decoder.run_blocks(decoder.embed(&[w]).unwrap(), 0..blocks, None, None).unwrap();
    windows().iter().flat_map(|w| to_vec(run(w)).unwrap()).collect()
}

/// The model with only one unit in `format`.
fn only(decoder: &Decoder, unit: Unit, format: LayerFormat) -> Decoder {
    let mut policy = uniform_policy(decoder.n_blocks(), LayerFormat::float(32)).unwrap();
    policy.units.retain(|u| u.unit != unit);
    policy.units.push(UnitPolicy { unit, format });
    compress_decoder(decoder, &policy, &Rtn, &[]).unwrap()
}

#[test]
fn a_block_s_sensitivity_is_the_definition() {
    let decoder = tiny_decoder(5, &Device::flex());
    let options = option_grid(&[2, 4], &[32], &[0.5]).unwrap();
    let measurement = run(&decoder, &options, Granularity::Block);
    for block in [0, 2] {
        for (index, option) in options.iter().enumerate() {
            // With one compressed block, its input is the uncompressed model's.
            let compressed = hidden(&only(&decoder, Unit::Block(block), *option), block + 1);
            let expected = relative_error(&compressed, &hidden(&decoder, block + 1), 64);
            close(of(&measurement, Unit::Block(block), index), expected);
        }
    }
}

/// Log-probabilities of the tokens of the second half of every window.
fn log_probabilities(decoder: &Decoder) -> Vec<Vec<f64>> {
    let of_window = |w: &Vec<u32>| {
        let logits = to_vec(decoder.forward(w, None, None).unwrap()).unwrap();
        let rows = logits.chunks(288).skip(w.len() / 2).map(|row| {
            let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
            row.iter().map(|&v| f64::from(v) - sum.ln()).collect()
        });
        rows.collect::<Vec<Vec<f64>>>()
    };
    windows().iter().flat_map(of_window).collect()
}

#[test]
fn the_end_to_end_sensitivity_is_the_divergence_of_the_predictions() {
    let decoder = tiny_decoder(5, &Device::flex());
    let options = option_grid(&[2, 4], &[32], &[]).unwrap();
    let measurement = run(&decoder, &options, Granularity::Block);
    let base = log_probabilities(&decoder);
    for unit in [Unit::Embedding, Unit::Block(0), Unit::Block(3)] {
        for (index, option) in options.iter().enumerate() {
            let other = log_probabilities(&only(&decoder, unit, *option));
            let of_token =
                |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            let expected = base.iter().zip(&other).map(of_token).sum::<f64>() / base.len() as f64;
            let found = measurement.units.iter().find(|u| u.unit == unit).unwrap().kl[index];
            assert!(
                (found - expected).abs() <= 2e-2 * expected + 1e-7,
                "{unit} {option}: {found}, expected {expected}"
            );
        }
    }
}

#[test]
fn a_run_goes_on_where_another_was_stopped() {
    let decoder = tiny_decoder(5, &Device::flex());
    let options = option_grid(&[2, 4], &[32], &[]).unwrap();
    let windows = windows();
    let trials = trials(&options, Granularity::Block, &windows);
    let whole = run_trials(&decoder, &trials).unwrap();
    let mut written = Vec::new();
    let stopped = measure(
        &decoder,
        &trials,
        &[],
        &mut |units| {
            written = units.to_vec();
            if units.len() == 3 { Err(LucError::Nothing { expected: "a stop" }) } else { Ok(()) }
        },
        &mut |_| {},
    );
    assert!(stopped.is_err() && written.len() == 3);
    let mut new = 0;
    let mut count = |_: &[_]| {
        new += 1;
        Ok(())
    };
    let resumed = measure(&decoder, &trials, &written, &mut count, &mut |_| {}).unwrap();
    assert_eq!((resumed, new), (whole, 2));
}

#[test]
fn a_projection_s_sensitivity_is_that_of_its_block_s_output() {
    let decoder = tiny_decoder(5, &Device::flex());
    let options = option_grid(&[3], &[32], &[]).unwrap();
    let measurement = run(&decoder, &options, Granularity::Linear);
    for projection in Projection::ALL {
        let unit = Unit::Linear(1, projection);
        let compressed = hidden(&only(&decoder, unit, options[0]), 2);
        close(of(&measurement, unit, 0), relative_error(&compressed, &hidden(&decoder, 2), 64));
    }
}

#[test]
fn the_embedding_counts_as_lookup_and_as_tied_head() {
    let options = option_grid(&[3], &[32], &[]).unwrap();
    let ids = windows().concat();
    let lookup = |decoder: &Decoder| to_vec(decoder.embed(&[&ids]).unwrap()).unwrap();
    let logits = |decoder: &Decoder, hidden: &Decoder| {
        let x = windows()
            .iter()
            .map(|w| hidden.run_blocks(hidden.embed(&[w]).unwrap(), 0..4, None, None).unwrap())
            .collect::<Vec<_>>();
        let rows = x.into_iter().flat_map(|x| {
            let [_, tokens, d] = x.dims();
            to_vec(decoder.logits(hidden.exit_norm(x.reshape([tokens, d]), 4, None))).unwrap()
        });
        rows.collect::<Vec<f32>>()
    };
    for tied in [true, false] {
        let decoder = decoder_of(&tiny_config(json!({"tie_word_embeddings": tied})), 5, &Device::flex());
        let measurement = run(&decoder, &options, Granularity::Block);
        let compressed = only(&decoder, Unit::Embedding, options[0]);
        let rows = relative_error(&lookup(&compressed), &lookup(&decoder), 64);
        let head = if tied { compressed } else { only(&decoder, Unit::Head, options[0]) };
        let scores = relative_error(&logits(&head, &decoder), &logits(&decoder, &decoder), 288);
        if tied {
            close(of(&measurement, Unit::Embedding, 0), rows + scores);
            assert!(measurement.units.iter().all(|u| u.unit != Unit::Head));
        } else {
            close(of(&measurement, Unit::Embedding, 0), rows);
            close(of(&measurement, Unit::Head, 0), scores);
        }
    }
}

#[test]
fn wider_is_better_f32_is_perfect_and_every_unit_comes_once() {
    let decoder = tiny_decoder(2, &Device::flex());
    let options = option_grid(&[2, 3, 4, 6, 8, 16, 32], &[32], &[]).unwrap();
    for granularity in [Granularity::Block, Granularity::Linear] {
        let m = run(&decoder, &options, granularity);
        for unit in &m.units {
            assert!(unit.local.windows(2).all(|pair| pair[0] > pair[1]), "{}: {:?}", unit.unit, unit.local);
            assert_eq!(*unit.local.last().unwrap(), 0.0, "{}", unit.unit);
        }
        let weights: u64 = m.units.iter().flat_map(|u| &u.matrices).map(|s| s.weights()).sum();
        assert_eq!(weights, 288 * 64 + 4 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 160));
        let units: Vec<Unit> = m.units.iter().map(|u| u.unit).collect();
        let blocks: Vec<Unit> = match granularity {
            Granularity::Block => (0..4).map(Unit::Block).collect(),
            Granularity::Linear => (0..4).flat_map(|b| Projection::ALL.map(|p| Unit::Linear(b, p))).collect(),
        };
        assert_eq!(units, [vec![Unit::Embedding], blocks].concat());
    }
}

#[test]
fn a_measurement_is_reproducible_and_progress_adds_up() {
    let decoder = tiny_decoder(2, &Device::flex());
    let options = option_grid(&[2, 4], &[64], &[]).unwrap();
    let mut seen = Vec::new();
    let windows = windows();
    let trials = trials(&options, Granularity::Block, &windows);
    let first = measure(&decoder, &trials, &[], &mut |_| Ok(()), &mut |p| seen.push((p.done, p.total))).unwrap();
    assert_eq!(first, run(&decoder, &options, Granularity::Block));
    assert_eq!(first.calibration_tokens, 63);
    let total = seen.last().unwrap().1;
    assert_eq!(seen, (1..=total).map(|done| (done, total)).collect::<Vec<_>>());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.json");
    edgellm_model::values::write_value(&path, &first).unwrap();
    assert_eq!(edgellm_model::values::read_value::<Measurement>(&path).unwrap(), first);
    assert_eq!(first.format_version, Measurement::VERSION);
}

#[test]
fn nothing_to_measure_is_an_error() {
    let decoder = tiny_decoder(2, &Device::flex());
    let options = option_grid(&[4], &[32], &[]).unwrap();
    let check = |options: &[LayerFormat], windows: &[Vec<u32>]| {
        run_trials(&decoder, &trials(options, Granularity::Block, windows)).unwrap_err()
    };
    assert!(matches!(check(&[], &windows()), LucError::Nothing { .. }));
    assert!(matches!(check(&options, &[vec![]]), LucError::Nothing { .. }));
    assert!(check(&options, &[vec![288]]).to_string().contains("288"));
    assert!(check(&[LayerFormat::quantized(7, 32, false)], &windows()).to_string().contains('7'));
}

#[test]
fn an_overflowing_model_is_an_error_that_names_the_unit() {
    let decoder = tiny_decoder(2, &Device::flex());
    let mut block = decoder.store().block(1).unwrap();
    block.attn_norm = block.attn_norm.mul_scalar(1e38);
    let mut blocks: Vec<_> = (0..4).map(|i| decoder.store().block(i).unwrap()).collect();
    blocks[1] = block;
    let store = std::sync::Arc::new(edgellm_model::decoder::ResidentStore::new(blocks));
    let options = option_grid(&[4], &[32], &[]).unwrap();
    let windows = windows();
    let trials = trials(&options, Granularity::Block, &windows);
    let error = run_trials(&decoder.with_store(store), &trials).unwrap_err();
    assert!(matches!(&error, LucError::NotFinite { .. }), "{error}");
}
