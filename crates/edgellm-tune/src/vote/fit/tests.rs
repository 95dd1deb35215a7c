use burn::tensor::{Device, Tensor};
use edgellm_model::adapter::{Adapter, LoraConfig};
use edgellm_model::testing::tiny_decoder;
use edgellm_model::values::Projection;

use super::*;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1013) as f32 / 100.0 - 5.0).collect()
}

#[test]
fn derivatives_are_those_of_the_loss() {
    let (a, b) = (values(700, 1), values(700, 2));
    let z = [a.as_slice(), b.as_slice()];
    let at = |c: &[f64]| Moments::of(&z, c, 33, &mut Vec::new()).0;
    let c = [0.3, 0.4];
    let found = at(&c);
    let score = |v: usize| c[0] * f64::from(a[v]) + c[1] * f64::from(b[v]);
    let direct = (0..700).map(|v| score(v).exp()).sum::<f64>().ln() - score(33);
    assert!((found.value - direct).abs() < 1e-4, "{} is not {direct}", found.value);
    let h = 1e-2;
    for i in 0..2 {
        let moved = |by: f64| at(&[c[0] + if i == 0 { by } else { 0.0 }, c[1] + if i == 1 { by } else { 0.0 }]);
        let (more, less) = (moved(h), moved(-h));
        let slope = (more.value - less.value) / (2.0 * h);
        assert!((found.gradient[i] - slope).abs() < 5e-3, "{} is not {slope}", found.gradient[i]);
        for j in 0..2 {
            let curve = (more.gradient[j] - less.gradient[j]) / (2.0 * h);
            assert!((found.hessian[i * 2 + j] - curve).abs() < 2e-2, "{} is not {curve}", found.hessian[i * 2 + j]);
        }
    }
}

/// A model whose exits differ, and responses that its second exit likes.
fn setting() -> (Decoder, Adapter, Vec<Example>) {
    let decoder = tiny_decoder(5, &Device::flex());
    let lora = LoraConfig { rank: 2, alpha: 4.0, use_rslora: false, targets: vec![Projection::O].into() };
    let mut adapter = Adapter::new(decoder.config(), lora, 7, decoder.device()).unwrap();
    for (exit, scale) in [(2, 3.0), (4, 6.0)] {
        adapter.set_exit_norm(exit, Tensor::ones([64], decoder.device()).mul_scalar(scale));
    }
    let mut examples = Vec::new();
    for start in 0..12u32 {
        let mut ids = vec![start * 17 % 256, start];
        for step in 0..12 {
            let x = decoder.embed(&[&ids]).unwrap();
            let x = decoder.run_blocks(x, 0..2, Some(&adapter), None).unwrap();
            let x: Tensor<2> = x.reshape([ids.len(), 64]).narrow(0, ids.len() - 1, 1);
            let logits = decoder.logits(decoder.exit_norm(x, 2, Some(&adapter)));
            let row = edgellm_model::generate::to_vec(logits).unwrap();
            // One token in three is another than the exit's.
            let best = edgellm_model::sample::argmax(&row) as u32;
            ids.push(if step % 3 == 2 { (best + start) % 256 } else { best });
        }
        examples.push(Example::new(&ids[..2], &ids[2..]));
    }
    (decoder, adapter, examples)
}

#[test]
fn a_fitted_pool_is_at_least_as_good_as_every_exit() {
    let (decoder, adapter, examples) = setting();
    let mut passes = 0;
    let on_step = &mut |step| passes = if let FitProgress::Passes(n) = step { n } else { 0 };
    let fit = fit_vote(&decoder, Some(&adapter), &[2, 4], &examples, 4096, on_step).unwrap();
    assert_eq!((fit.vote.tokens, fit.passes), (144, passes));
    assert!(fit.by_exit.iter().all(|loss| fit.loss <= loss + 1e-6), "{fit:?}");
    // The data follow the first exit, and one token in three is noise: it must dominate, and be cooled down or warmed.
    let [first, last] = fit.vote.factors()[..] else { panic!("two exits") };
    assert!(first > 2.0 * last.abs(), "{fit:?}");
    // Minimal: every neighbour is worse. The loss is that of the vote, by the pool's own head product.
    let states = States::collect(&decoder, Some(&adapter), &[2, 4], &examples, 4096, &mut |_| {}).unwrap();
    let loss = |factors: [f64; 2]| {
        let mut problems = vec![Problem { exits: vec![0, 1], newton: Newton::new(factors.to_vec()) }];
        pass(&decoder, &states, states.len(), &mut problems).unwrap();
        problems[0].newton.best().unwrap().1
    };
    let (a, b) = (f64::from(first), f64::from(last));
    assert!(fit.confidence > 0.99 && (loss([a, b]) - fit.loss).abs() < 1e-3, "{fit:?}");
    for (da, db) in [(0.05, 0.0), (-0.05, 0.0), (0.0, 0.05), (0.0, -0.05)] {
        assert!(loss([a + da, b + db]) > fit.loss, "{da} {db}");
    }
    let again = fit_vote(&decoder, Some(&adapter), &[2, 4], &examples, 4096, &mut |_| {}).unwrap();
    assert_eq!(again, fit);
}

#[test]
fn gains_that_may_be_chance_are_not_trusted() {
    assert_eq!(shrinkage(3, 1500, 0.0), 0.0);
    assert_eq!(shrinkage(3, 1500, 0.001), 0.0);
    assert!((shrinkage(3, 1500, 0.002) - 0.5).abs() < 1e-12);
    assert!(shrinkage(3, 1500, 0.1) > 0.98);
    assert_eq!(shrinkage(0, 1500, -1e-9), 0.0);
}

#[test]
fn impossible_fits_are_errors() {
    let (decoder, adapter, examples) = setting();
    let fit = |exits: &[usize], examples: &[Example]| {
        fit_vote(&decoder, Some(&adapter), exits, examples, 4096, &mut |_| {}).unwrap_err().to_string()
    };
    for exits in [&[][..], &[0, 4], &[4, 2], &[2]] {
        assert!(fit(exits, &examples).contains("exits: expected"), "{exits:?}");
    }
    assert!(fit(&[2, 4], &examples[..1]).contains("at least 64, found 12"));
}
