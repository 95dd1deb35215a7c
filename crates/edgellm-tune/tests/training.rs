//! What a tuning step changes, what it leaves alone, and that it learns.

use burn::tensor::{Device, Tensor};
use edgellm_model::adapter::{Adapter, LoraConfig, Targets, even_exits};
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::testing::tiny_decoder;
use edgellm_model::values::Projection;
use edgellm_tune::exits::{Cyclic, ExitScale, exit_schedule};
use edgellm_tune::optimizer::{AdamWConfig, LrSchedule};
use edgellm_tune::order::Order;
use edgellm_tune::{Keep, Trainer, TuneConfig, TuneError};

fn config(exits: Vec<usize>, window: usize) -> TuneConfig {
    TuneConfig {
        steps: 40,
        batch_size: 2,
        order: Order::File,
        micro_tokens: 8,
        keep: Keep::Last(1),
        exits,
        window,
        lora: LoraConfig { rank: 4, alpha: 8.0, use_rslora: false, targets: Targets::all_linear() },
        lora_dropout: 0.0,
        train_exit_norms: true,
        learning_rate: 1e-2,
        exit_scale: ExitScale::Equal,
        lr_schedule: LrSchedule::Constant,
        warmup_steps: 0,
        adamw: AdamWConfig::default(),
        max_grad_norm: 1.0,
        seed: 1,
    }
}

fn examples() -> Vec<Example> {
    let first = Example::new(&[1, 2, 3], &[4, 5, 6, 7]);
    let second = Example::new(&[8, 9], &[10, 11]);
    vec![first, second]
}

/// Blocks whose `A` or `B` differ between two adapters.
fn changed_blocks(before: &Adapter, after: &Adapter) -> Vec<usize> {
    let values = |t: &Tensor<2>| to_vec(t.clone()).unwrap();
    (0..before.n_blocks())
        .filter(|&index| {
            Projection::ALL.iter().any(|&p| {
                let old = before.block(index).unwrap().get(p).unwrap();
                let new = after.block(index).unwrap().get(p).unwrap();
                values(&old.a) != values(&new.a) || values(&old.b) != values(&new.b)
            })
        })
        .collect()
}

fn decoder() -> Decoder {
    tiny_decoder(3, &Device::flex())
}

#[test]
fn a_step_changes_its_window_and_nothing_else() {
    let decoder = decoder();
    let n = decoder.n_blocks();
    let exits = even_exits(n, 2).unwrap();
    let mut trainer = Trainer::new(&decoder, config(exits.clone(), 1), Box::new(Cyclic)).unwrap();
    for step in 0..4 {
        let before = trainer.adapter().clone();
        let report = trainer.train_step(&examples()).unwrap();
        let exit = exits[step % 2];
        assert_eq!(report.exit, exit);
        assert_eq!(report.response_tokens, 6);
        assert_eq!(changed_blocks(&before, trainer.adapter()), [exit - 1], "step {step}");
        let norm = |a: &Adapter, e: usize| to_vec(a.exit_norm(e).unwrap().clone()).unwrap();
        for &e in &exits {
            let same = norm(&before, e) == norm(trainer.adapter(), e);
            assert_eq!(same, e != exit || e == n, "norm of exit {e} in step {step}");
        }
    }
}

#[test]
fn tuning_lowers_the_loss_of_every_exit() {
    let decoder = decoder();
    let exits = even_exits(decoder.n_blocks(), 2).unwrap();
    let data = examples();
    let mut trainer = Trainer::new(&decoder, config(exits.clone(), 2), Box::new(Cyclic)).unwrap();
    let mut losses: Vec<(usize, f64)> = Vec::new();
    trainer
        .run(&data, |_, report| {
            assert!(!report.skipped);
            losses.push((report.exit, report.loss));
            Ok(true)
        })
        .unwrap();
    assert_eq!(trainer.steps_done(), 40);
    for exit in exits {
        let of_exit: Vec<f64> = losses.iter().filter(|l| l.0 == exit).map(|l| l.1).collect();
        let (first, last) = (of_exit[0], of_exit[of_exit.len() - 1]);
        assert!(last < 0.6 * first, "exit {exit}: {first} to {last}");
    }
}

#[test]
fn calibrated_exits_start_better_than_with_the_final_norm() {
    let decoder = decoder();
    let n = decoder.n_blocks();
    let exits: Vec<usize> = (1..=n).collect();
    let one_step = |calibrated: bool| {
        let mut trainer = Trainer::new(&decoder, config(exits.clone(), 1), Box::new(Cyclic)).unwrap();
        if calibrated {
            let mut loss = f64::NAN;
            trainer
                .run(&examples(), |_, report| {
                    loss = report.loss;
                    Ok(false)
                })
                .unwrap();
            (loss, to_vec(trainer.adapter().exit_norm(n).unwrap().clone()).unwrap())
        } else {
            let loss = trainer.train_step(&examples()).unwrap().loss;
            (loss, to_vec(decoder.final_norm().clone()).unwrap())
        }
    };
    let ((plain, final_norm), (calibrated, last_norm)) = (one_step(false), one_step(true));
    assert!(calibrated < plain, "{calibrated} with calibrated norms, {plain} with the final norm");
    assert_eq!(last_norm, final_norm, "the last exit keeps the final norm");
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let run = |seed: u64| {
        let decoder = decoder();
        let exits = even_exits(decoder.n_blocks(), 2).unwrap();
        let schedule = exit_schedule("uniform", 6, seed).unwrap();
        let mut trainer = Trainer::new(&decoder, TuneConfig { steps: 6, seed, ..config(exits, 2) }, schedule).unwrap();
        let mut losses = Vec::new();
        trainer
            .run(&examples(), |_, report| {
                losses.push(report.loss.to_bits());
                Ok(true)
            })
            .unwrap();
        losses
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

#[test]
fn buffers_do_not_grow_from_step_to_step() {
    let decoder = decoder();
    let exits = even_exits(decoder.n_blocks(), 2).unwrap();
    let mut trainer = Trainer::new(&decoder, config(exits, 2), Box::new(Cyclic)).unwrap();
    let mut after = |steps: usize| {
        for _ in 0..steps {
            trainer.train_step(&examples()).unwrap();
        }
        trainer.buffer_bytes()
    };
    let first = after(4);
    assert!(first > 0);
    assert_eq!(after(20), first);
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    let decoder = decoder();
    let config = config(even_exits(decoder.n_blocks(), 2).unwrap(), 1);
    let trainer = Trainer::new(&decoder, config, Box::new(Cyclic)).unwrap();
    let ids = [1, 5, 9, 2];
    let plain = to_vec(decoder.forward(&ids, None, None).unwrap()).unwrap();
    let adapted = to_vec(decoder.forward(&ids, Some(trainer.adapter()), None).unwrap()).unwrap();
    assert_eq!(plain, adapted);
}

#[test]
fn a_loss_that_is_not_finite_is_skipped_then_refused() {
    let decoder = decoder();
    let d = decoder.config().hidden_size;
    let broken = decoder.with_final_norm(Tensor::full([d], f32::NAN, &Device::flex()));
    let mut trainer = Trainer::new(&broken, config(vec![broken.n_blocks()], 1), Box::new(Cyclic)).unwrap();
    let before = trainer.adapter().clone();
    let report = trainer.train_step(&examples()).unwrap();
    assert!(report.skipped);
    assert_eq!(changed_blocks(&before, trainer.adapter()), Vec::<usize>::new());
    let error = trainer.run(&examples(), |_, _| Ok(true)).unwrap_err();
    assert!(matches!(error, TuneError::Diverged { steps: 10, step: 9 }), "{error}");
}

#[test]
fn settings_and_batches_that_make_no_sense_are_refused() {
    let decoder = decoder();
    let n = decoder.n_blocks();
    for bad in [
        config(vec![], 1),
        config(vec![n - 1], 1),
        config(vec![0, n], 1),
        config(vec![n, n], 1),
        config(vec![n], 0),
        TuneConfig { batch_size: 0, ..config(vec![n], 1) },
        TuneConfig { learning_rate: f64::NAN, ..config(vec![n], 1) },
        TuneConfig { max_grad_norm: -1.0, ..config(vec![n], 1) },
        TuneConfig { lora_dropout: 1.0, ..config(vec![n], 1) },
    ] {
        assert!(Trainer::new(&decoder, bad, Box::new(Cyclic)).is_err());
    }
    let mut trainer = Trainer::new(&decoder, config(vec![n], 1), Box::new(Cyclic)).unwrap();
    let error = trainer.train_step(&[Example::new(&[1, 2, 3], &[])]).unwrap_err();
    assert!(error.to_string().contains("no response token"), "{error}");
    assert!(exit_schedule("best", 1, 0).is_err());
}
