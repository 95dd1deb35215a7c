//! Speculation gives the text of plain decoding; confident exit with a threshold that nothing reaches does too.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use edgellm_kernels::{Format, PackedHost, PackedLayout};
use edgellm_model::ModelError;
use edgellm_model::adapter::{Adapter, LoraConfig};
use edgellm_model::decoder::{Activations, Decoder, Linear, LoadOptions, Weight};
use edgellm_model::files::ModelFiles;
use edgellm_model::generate::{
    ConfidentExit, DraftHead, Drafter, DrafterParts, Flow, Generator, NgramStore, Shortlist, Speculation,
};
use edgellm_model::sample::{Sampler, SamplingConfig};
use edgellm_model::traits::Voter;
use edgellm_model::values::Projection;

struct Last;

impl Voter for Last {
    fn name(&self) -> &'static str {
        "last"
    }
    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        out.copy_from_slice(exits[exits.len() - 1]);
    }
    fn needs_all_exits(&self) -> bool {
        false
    }
}

fn fixture(activations: Activations) -> Decoder {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/model");
    load(&path, activations)
}

fn load(path: &Path, activations: Activations) -> Decoder {
    let files = ModelFiles::open(path).unwrap();
    let options = LoadOptions { device: Device::flex(), expand: false, activations };
    Decoder::load(&files, &options).unwrap()
}

/// The same decoder with every projection in 4 bits, and the embedding, prepared for integer products or not.
fn quantized(decoder: &Decoder, activations: Activations) -> Decoder {
    let pack = |weight: &Weight| {
        let [rows, cols] = weight.shape();
        let values = edgellm_model::generate::to_vec(weight.dequantize()).unwrap();
        let layout = PackedLayout::new(rows, cols, Format::parse("q4g32s").unwrap()).unwrap();
        let host = PackedHost::quantize(&values, layout).unwrap();
        let host = if activations == Activations::Int8 { host.prepare().unwrap() } else { host };
        Weight::Packed(host.to_device(&Device::flex()))
    };
    let mut blocks = Vec::new();
    for index in 0..decoder.n_blocks() {
        let mut block = decoder.store().block(index).unwrap();
        block.linears.iter_mut().for_each(|linear| linear.weight = pack(&linear.weight));
        blocks.push(block);
    }
    let store = std::sync::Arc::new(edgellm_model::decoder::ResidentStore::new(blocks));
    decoder.clone().with_store(store).with_embedding(pack(decoder.embedding()))
}

/// An adapter that does something in every projection, with a norm for the exit after 2 blocks.
fn adapter(decoder: &Decoder) -> Adapter {
    let config = LoraConfig { rank: 8, alpha: 16.0, use_rslora: false, targets: Projection::ALL.to_vec().into() };
    let mut adapter = Adapter::new(decoder.config(), config, 7, decoder.device()).unwrap();
    for index in 0..decoder.n_blocks() {
        for projection in Projection::ALL {
            let Some(lora) = adapter.block_mut(index).unwrap().get_mut(projection) else { continue };
            let [rows, rank] = lora.b.dims();
            let values: Vec<f32> = (0..rows * rank).map(|i| (i as f32 * 0.7).sin() * 0.02).collect();
            lora.b = Tensor::<1>::from_floats(values.as_slice(), decoder.device()).reshape([rows, rank]);
        }
    }
    adapter.set_exit_norm(2, decoder.final_norm().clone());
    adapter
}

/// Prompts of 3 to 12 tokens, the same in every run.
fn prompts(vocab: usize, n: usize) -> Vec<Vec<u32>> {
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    (0..n).map(|_| (0..3 + next() % 10).map(|_| (next() % vocab) as u32).collect()).collect()
}

fn sampler(temperature: f64, seed: u64) -> Sampler {
    Sampler::new(SamplingConfig { temperature, seed, top_p: 0.95, ..SamplingConfig::default() }).unwrap()
}

fn all_ids(decoder: &Decoder) -> Vec<u32> {
    (0..decoder.config().vocab_size as u32).collect()
}

/// A head after `exit` blocks whose lens keeps the exit's own state.
fn lens_head(decoder: &Decoder, exit: usize) -> DraftHead {
    let d = decoder.config().hidden_size;
    let mut lens = vec![0.0; 2 * d * d];
    (0..d).for_each(|i| lens[i * 2 * d + i] = 1.0);
    let lens = Tensor::<1>::from_floats(lens.as_slice(), decoder.device()).reshape([d, 2 * d]);
    let shortlist = Shortlist::new(decoder, &all_ids(decoder)).unwrap();
    DraftHead::with_lens(decoder, exit, Linear::new(Weight::Dense(lens)), 1.0, shortlist).unwrap()
}

/// Texts of 64 tokens after every prompt, and the generator's next scores after each.
fn texts(mut generator: Generator<'_>, prompts: &[Vec<u32>], temperature: f64) -> (Vec<Vec<u32>>, Vec<Vec<f32>>) {
    let run = |(index, prompt): (usize, &Vec<u32>)| {
        generator.clear();
        let mut sampler = sampler(temperature, index as u64);
        let text = generator.generate(prompt, 64, &[0], &mut sampler, |_| Ok(Flow::Continue)).unwrap();
        // The caches hold what they would hold after plain decoding.
        (text, generator.advance(&[5, 6]).unwrap())
    };
    prompts.iter().enumerate().map(run).unzip()
}

fn plain<'a>(decoder: &'a Decoder, adapter: Option<&'a Adapter>) -> Generator<'a> {
    Generator::new(decoder, adapter, &Last, &[decoder.n_blocks()]).unwrap()
}

fn check(decoder: &Decoder, adapter: Option<&Adapter>, n: usize, what: &str) {
    let prompts = prompts(decoder.config().vocab_size, n);
    let shortlist = Shortlist::new(decoder, &all_ids(decoder)).unwrap();
    let normed = DraftHead::with_norm(decoder, adapter, 2, shortlist).unwrap();
    let (early, embedding) = (lens_head(decoder, 1), lens_head(decoder, 0));
    for temperature in [0.0, 0.8] {
        let expected = texts(plain(decoder, adapter), &prompts, temperature);
        let store = NgramStore::new(expected.0[..n / 2].iter().map(Vec::as_slice));
        for head in [None, Some(&normed), Some(&early), Some(&embedding)] {
            for (adaptive, max_draft) in [(true, 7), (false, 7), (false, 3)] {
                let speculation =
                    Speculation { head, store: Some(&store), lookup: max_draft != 3, max_draft, adaptive };
                let generator = plain(decoder, adapter).with_speculation(speculation).unwrap();
                let exit = head.map(DraftHead::exit);
                let found = texts(generator, &prompts, temperature);
                assert!(
                    found == expected,
                    "{what}, exit {exit:?}, up to {max_draft} drafts, adaptive {adaptive}, {temperature}"
                );
            }
        }
    }
}

#[test]
fn texts_are_those_of_plain_decoding() {
    let decoder = fixture(Activations::F32);
    let lora = adapter(&decoder);
    for activations in Activations::ALL {
        let decoder = quantized(&decoder, activations);
        check(&decoder, None, if activations == Activations::Int8 { 50 } else { 12 }, activations.name());
        check(&decoder, Some(&lora), 5, "an adapter");
    }
    check(&decoder, None, 4, "float weights");
}

#[test]
fn drafts_are_made_and_kept() {
    let decoder = quantized(&fixture(Activations::F32), Activations::Int8);
    let head = lens_head(&decoder, 3);
    let speculation = Speculation { head: Some(&head), adaptive: false, max_draft: 4, ..Speculation::default() };
    let mut generator = plain(&decoder, None).with_speculation(speculation).unwrap();
    generator.generate(&[5, 6, 7], 200, &[], &mut sampler(0.0, 0), |_| Ok(Flow::Continue)).unwrap();
    let report = generator.speculation_report().unwrap();
    assert!(report.text.right > 0.0 && report.exit.tried > 0.0, "{report:?}");
    assert!(report.tokens >= 199 && report.tokens_per_pass() > 1.0, "{report:?}");
}

/// Chi-square of the second and third tokens' counts under speculation against plain sampling, other seeds for each.
#[test]
fn sampled_tokens_have_the_same_distribution() {
    const RUNS: u64 = 4000;
    let decoder = quantized(&fixture(Activations::F32), Activations::Int8);
    let head = lens_head(&decoder, 3);
    let speculation = Speculation { head: Some(&head), adaptive: false, max_draft: 3, ..Speculation::default() };
    let prompt = [5, 6, 7, 5, 6];
    let counts = |mut generator: Generator<'_>, first_seed: u64| {
        let mut counts = std::collections::BTreeMap::<(usize, u32), f64>::new();
        for seed in first_seed..first_seed + RUNS {
            generator.clear();
            let mut sampler = sampler(1.0, seed);
            let text = generator.generate(&prompt, 3, &[], &mut sampler, |_| Ok(Flow::Continue)).unwrap();
            (1..3).for_each(|place| *counts.entry((place, text[place])).or_default() += 1.0);
        }
        counts
    };
    let expected = counts(plain(&decoder, None), 0);
    let found = counts(plain(&decoder, None).with_speculation(speculation).unwrap(), RUNS);
    let (mut statistic, mut cells) = (0.0, 0.0);
    for key in expected.keys().chain(found.keys()).collect::<std::collections::BTreeSet<_>>() {
        let (a, b) = (expected.get(key).unwrap_or(&0.0), found.get(key).unwrap_or(&0.0));
        if a + b >= 20.0 {
            statistic += (a - b).powi(2) / (a + b);
            cells += 1.0;
        }
    }
    // Mean `cells`, variance `2 cells`: four deviations above the mean.
    assert!(cells >= 5.0, "{cells} tokens to compare");
    assert!(statistic < cells + 4.0 * f64::sqrt(2.0 * cells), "chi-square {statistic:.1} over {cells} tokens");
}

#[test]
fn confident_exits_leave_when_they_are_sure() {
    let decoder = quantized(&fixture(Activations::F32), Activations::Int8);
    let prompts = prompts(decoder.config().vocab_size, 6);
    let (early, late) = (lens_head(&decoder, 1), lens_head(&decoder, 3));
    let expected = texts(plain(&decoder, None), &prompts, 0.0);
    let run = |threshold: f32| {
        let confident = ConfidentExit { heads: vec![&early, &late], threshold };
        let mut generator = plain(&decoder, None).with_confident_exit(confident).unwrap();
        let mut sampler = sampler(0.0, 0);
        let texts: Vec<Vec<u32>> = prompts
            .iter()
            .map(|prompt| {
                generator.clear();
                generator.generate(prompt, 64, &[0], &mut sampler, |_| Ok(Flow::Continue)).unwrap()
            })
            .collect();
        (texts, generator.confident_report().unwrap().tokens)
    };
    let (never, counts) = run(1.0);
    assert_eq!(counts[..2], [0, 0], "softmax over many tokens does not reach 1");
    assert_eq!(never, expected.0);
    let (_, counts) = run(0.0);
    assert!(counts[0] > 6 * counts[2], "every eighth token at least goes on: {counts:?}");
    assert!(counts[2] > 0);
}

#[test]
fn what_waits_at_exits_reaches_the_blocks_above() {
    let decoder = quantized(&fixture(Activations::F32), Activations::Int8);
    let (early, late) = (lens_head(&decoder, 1), lens_head(&decoder, 3));
    let confident = ConfidentExit { heads: vec![&early, &late], threshold: 0.0 };
    let mut generator = plain(&decoder, None).with_confident_exit(confident).unwrap();
    let text = generator.generate(&[5, 6, 7], 20, &[], &mut sampler(0.0, 0), |_| Ok(Flow::Continue)).unwrap();
    let found = generator.advance(&[9]).unwrap();
    let mut expected = plain(&decoder, None);
    expected.advance(&[5, 6, 7]).unwrap();
    let mut last = Vec::new();
    for &token in text[..text.len() - 1].iter().chain(&[9]) {
        last = expected.advance(&[token]).unwrap();
    }
    let error = found.iter().zip(&last).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(error < 1e-4, "{error}");
}

#[test]
fn drafters_are_written_and_read() {
    let decoder = fixture(Activations::Int8);
    let d = decoder.config().hidden_size;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("drafter.safetensors");
    let parts = DrafterParts {
        exit: 1,
        lens: (0..2 * d * d).map(|i| (i as f32).sin()).collect(),
        temperature: 0.7,
        shortlist: vec![3, 1, 4, 100],
        texts: vec![vec![1, 2, 3], vec![], vec![4]],
    };
    parts.save(&path).unwrap();
    assert_eq!(DrafterParts::load(&path).unwrap(), parts);
    let drafter = Drafter::new(&decoder, &parts).unwrap();
    assert_eq!(drafter.head.exit(), 1);
    assert_eq!(drafter.head.shortlist().id(3), 100);

    let refused = |change: &dyn Fn(&mut DrafterParts)| -> ModelError {
        let mut parts = parts.clone();
        change(&mut parts);
        Drafter::new(&decoder, &parts).unwrap_err()
    };
    let n_blocks = decoder.n_blocks();
    refused(&|parts| parts.lens.truncate(5));
    refused(&|parts| parts.exit = n_blocks);
    refused(&|parts| parts.temperature = 0.0);
    refused(&|parts| parts.shortlist = vec![u32::MAX]);
    refused(&|parts| parts.shortlist.clear());

    // Cut off anywhere, and with a wrong sum of lengths, it is an error.
    let bytes = std::fs::read(&path).unwrap();
    for cut in [0, 7, 60, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        assert!(DrafterParts::load(&path).is_err(), "{cut} bytes");
    }
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let decoder = fixture(Activations::Int8);
    for max_draft in [0, 8] {
        let speculation = Speculation { max_draft, ..Speculation::default() };
        assert!(plain(&decoder, None).with_speculation(speculation).is_err(), "{max_draft}");
    }
    let head = lens_head(&decoder, 1);
    for (heads, threshold) in [(vec![], 0.5), (vec![&head, &head], 0.5), (vec![&head], 1.5), (vec![&head], f32::NAN)] {
        assert!(plain(&decoder, None).with_confident_exit(ConfidentExit { heads, threshold }).is_err());
    }
    let shortlist = Shortlist::new(&decoder, &[1]).unwrap();
    for exit in [0, decoder.n_blocks()] {
        assert!(DraftHead::with_norm(&decoder, None, exit, shortlist.clone()).is_err(), "{exit}");
    }
}
