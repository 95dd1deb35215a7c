//! Policy solvers on made-up measurements: by hand, and against brute force.

use edgellm_luc::{Paper, Solve, Uniform, allocate_sparsity, option_grid, policy_cost};
use edgellm_model::traits::PolicySolver;
use edgellm_model::values::{
    Budget, CompressionPolicy, Granularity, LayerFormat, MatrixShape, Measurement, Unit, UnitMeasurement, Value,
};
use proptest::prelude::*;

/// Blocks of one 32 x 64 matrix and a larger embedding, with these sensitivities (embedding first).
fn measurement(options: Vec<LayerFormat>, sensitivity: &[&[f64]]) -> Measurement {
    let unit = |index: usize| if index == 0 { Unit::Embedding } else { Unit::Block(index - 1) };
    let rows = |index: usize| if index == 0 { 96 } else { 32 };
    let units = sensitivity.iter().enumerate().map(|(i, s)| UnitMeasurement {
        unit: unit(i),
        matrices: vec![MatrixShape { name: format!("w{i}"), rows: rows(i), cols: 64 }],
        local: s.to_vec(),
        kl: s.to_vec(),
    });
    Measurement {
        format_version: Measurement::VERSION,
        model: "made up".into(),
        model_digest: String::new(),
        compressor: "rtn".into(),
        granularity: Granularity::Block,
        calibration_tokens: 1,
        compared_tokens: 1,
        calibration_digest: String::new(),
        options,
        units: units.collect(),
    }
}

fn bits(bits_per_weight: f64) -> Budget {
    Budget { bits_per_weight: Some(bits_per_weight), ..Budget::default() }
}

fn widths(policy: &CompressionPolicy) -> Vec<u8> {
    policy.units.iter().map(|u| u.format.bit_width).collect()
}

/// Options 2, 4, 8 bits with groups of 32, that is 3, 5 and 9 bits per weight.
fn example() -> Measurement {
    let options = option_grid(&[2, 4, 8], &[32], &[0.5]).unwrap();
    measurement(
        options,
        &[&[0.5, 0.05, 0.0001, 0.3], &[0.9, 0.08, 0.0002, 0.2], &[0.2, 0.01, 0.0001, 0.1], &[0.1, 0.01, 0.0001, 0.6]],
    )
}

#[test]
fn uniform_takes_the_widest_that_fits() {
    let m = example();
    let solve = |budget| Uniform::default().solve(&m, &bits(budget)).map(|p| widths(&p));
    assert_eq!(solve(9.0).unwrap(), [8; 4]);
    assert_eq!(solve(8.99).unwrap(), [4; 4]);
    assert_eq!(solve(5.0).unwrap(), [4; 4]);
    assert_eq!(solve(3.0).unwrap(), [2; 4]);
    // 192 rows of 64 columns at 3 bits: 4608 bytes.
    let error = solve(2.9).unwrap_err().to_string();
    assert!(error.contains("4608 bytes (3.000 bits per weight)"), "{error}");
    assert!(Uniform::default().solve(&m, &Budget::default()).unwrap_err().to_string().contains("none of them"));
}

#[test]
fn uniform_may_be_told_the_format() {
    let m = example();
    let format = LayerFormat::quantized(3, 64, true);
    let policy = Uniform { format: Some(format), ..Uniform::default() }.solve(&m, &Budget::default()).unwrap();
    assert!(policy.units.iter().all(|u| u.format == format));
    assert_eq!(policy_cost(&m, &policy).unwrap().sensitivity, None);
    assert!(Uniform { format: Some(format), ..Uniform::default() }.solve(&m, &bits(3.0)).is_err());
}

#[test]
fn both_budgets_hold_together() {
    let m = example();
    let budget = Budget { bits_per_weight: Some(9.0), bytes: Some(7680), ..Budget::default() };
    for solver in [&Uniform::default() as &dyn PolicySolver, &Paper::default(), &Solve::default()] {
        let policy = solver.solve(&m, &budget).unwrap();
        assert!(policy_cost(&m, &policy).unwrap().bytes <= 7680, "{}", solver.name());
        assert_eq!(policy.budget, budget);
    }
}

#[test]
fn the_paper_widens_what_is_above_the_mean() {
    let m = example();
    // At 4 bits: blocks 0.08, 0.01, 0.01, mean 0.0333; the embedding's 0.05 is above it too.
    let policy = Paper { base: Some(4), ..Paper::default() }.solve(&m, &Budget::default()).unwrap();
    assert_eq!(widths(&policy), [5, 5, 4, 4]);
    // 4 + 3 is no width; the next is 8. 8 + 1 is f16.
    let policy = Paper { base: Some(4), step: 3, ..Paper::default() }.solve(&m, &Budget::default()).unwrap();
    assert_eq!(widths(&policy), [8, 8, 4, 4]);
    let policy = Paper { base: Some(8), ..Paper::default() }.solve(&m, &Budget::default()).unwrap();
    assert_eq!(widths(&policy), [8, 16, 8, 8]);
    assert!(Paper { base: Some(6), ..Paper::default() }.solve(&m, &Budget::default()).is_err());
}

#[test]
fn the_paper_takes_the_largest_base_that_fits() {
    let m = example();
    // Base 4 needs (128 * 6 + 64 * 5) / 192 = 5.667 bits per weight, base 2 (3 and 2 bits) 3.667.
    assert_eq!(widths(&Paper::default().solve(&m, &bits(5.7)).unwrap()), [5, 5, 4, 4]);
    assert_eq!(widths(&Paper::default().solve(&m, &bits(5.6)).unwrap()), [3, 3, 2, 2]);
    assert!(Paper::default().solve(&m, &bits(3.6)).unwrap_err().to_string().contains("3.667"));
}

#[test]
fn the_paper_takes_coarser_groups_before_a_narrower_base() {
    let options = option_grid(&[2, 3, 4], &[32, 64], &[]).unwrap();
    let s: [&[f64]; 3] = [&[0.1; 6], &[0.3; 6], &[0.1; 6]];
    let m = measurement(options, &s);
    let formats = |budget| {
        let policy = Paper::default().solve(&m, &bits(budget)).unwrap();
        policy.units.iter().map(|u| u.format.to_string()).collect::<Vec<_>>()
    };
    // Of 160 rows, 32 get one bit more: 4.2 bits per weight with base 3 and groups of 32, 3.7 with groups of 64.
    assert_eq!(formats(4.2), ["q3g32a", "q4g32a", "q3g32a"]);
    assert_eq!(formats(4.1), ["q3g64a", "q4g64a", "q3g64a"]);
    assert_eq!(formats(3.6), ["q2g32a", "q3g32a", "q2g32a"]);
    assert_eq!(formats(3.1), ["q2g64a", "q3g64a", "q2g64a"]);
}

#[test]
fn the_paper_prunes_blocks_to_the_mean() {
    let m = example();
    let paper = Paper { base: Some(4), target_sparsity: 0.3, p_max: 0.5, ..Paper::default() };
    let policy = paper.solve(&m, &Budget::default()).unwrap();
    // s = (0.2, 0.1, 0.6) scaled: 0.2, 0, 1. Shares 0.8, 1, 0 of 3 * 0.3: 0.4 and 0.5.
    let sparsity: Vec<f64> = policy.units.iter().map(|u| u.format.sparsity).collect();
    for (found, expected) in sparsity.iter().zip([0.0, 0.4, 0.5, 0.0]) {
        assert!((found - expected).abs() < 1e-12, "{sparsity:?}");
    }
    assert!(policy.units.iter().all(|u| u.format.symmetric == (u.format.sparsity > 0.0)));
    // Pruned units are stored sparse, and cost what that costs.
    let names: Vec<String> = policy.units.iter().map(|u| u.format.packed().unwrap().name()).collect();
    assert!(names[1].ends_with("-b60") && names[2].ends_with("-b50"), "{names:?}");
    let dense = Paper { target_sparsity: 0.0, ..paper }.solve(&m, &Budget::default()).unwrap();
    assert!(policy_cost(&m, &policy).unwrap().bytes < policy_cost(&m, &dense).unwrap().bytes);
    let unmeasured = measurement(option_grid(&[4], &[32], &[]).unwrap(), &[&[0.1], &[0.2]]);
    assert!(paper.solve(&unmeasured, &Budget::default()).unwrap_err().to_string().contains("sparsity"));
}

#[test]
fn what_is_cut_goes_to_the_others() {
    let check = |s: &[f64], target: f64, p_max: f64, expected: &[f64]| {
        let p = allocate_sparsity(s, &vec![1.0; s.len()], target, p_max).unwrap();
        for (p, e) in p.iter().zip(expected) {
            assert!((p - e).abs() < 1e-12, "{s:?} {target} {p_max}: {p}, expected {e}");
        }
    };
    check(&[1.0, 1.0, 1.0], 0.4, 0.9, &[0.4, 0.4, 0.4]);
    // Shares 1 and 0: the first is full at 0.7, the rest goes to a unit that has no share.
    check(&[0.0, 1.0], 0.5, 0.7, &[0.7, 0.3]);
    check(&[0.0, 1.0], 0.7, 0.7, &[0.7, 0.7]);
    check(&[0.0, 0.5, 1.0], 0.0, 0.7, &[0.0, 0.0, 0.0]);
    assert!(allocate_sparsity(&[1.0], &[1.0], 0.8, 0.7).is_err());
    assert!(allocate_sparsity(&[f64::NAN], &[1.0], 0.1, 0.7).is_err());
    assert!(allocate_sparsity(&[1.0], &[], 0.1, 0.7).is_err());
    assert!(allocate_sparsity(&[1.0], &[1.0], 0.1, 1.0).is_err());
}

#[test]
fn solve_is_no_worse_than_the_others_under_their_budget() {
    let m = example();
    let mut compared = 0;
    // With a step of 4, a base of 4 makes 8, which is measured; a base of 2 makes 6, which is not.
    for other in [&Uniform::default() as &dyn PolicySolver, &Paper { step: 4, ..Paper::default() }] {
        for budget in [3.0, 4.0, 5.0, 7.0, 8.0, 9.0] {
            let Ok(policy) = other.solve(&m, &bits(budget)) else { continue };
            let Some(theirs) = policy_cost(&m, &policy).unwrap().sensitivity else { continue };
            let ours = Solve::default().solution(&m, &bits(budget)).unwrap();
            assert!(ours.sensitivity <= theirs && ours.gap == 0.0, "{} at {budget}", other.name());
            compared += 1;
        }
    }
    assert!(compared >= 8, "{compared} comparisons");
}

#[test]
fn policies_are_the_same_bytes_every_time() {
    let m = example();
    let text = |p: &CompressionPolicy| serde_json::to_string(p).unwrap();
    for solver in [&Uniform::default() as &dyn PolicySolver, &Paper::default(), &Solve::default()] {
        let first = solver.solve(&m, &bits(6.0)).unwrap();
        assert_eq!(text(&first), text(&solver.solve(&m.clone(), &bits(6.0)).unwrap()));
        assert_eq!(first.solver, solver.name());
        assert_eq!(
            first.units.iter().map(|u| u.unit).collect::<Vec<_>>(),
            m.units.iter().map(|u| u.unit).collect::<Vec<_>>()
        );
        assert_eq!(serde_json::from_str::<CompressionPolicy>(&text(&first)).unwrap(), first);
    }
}

#[test]
fn broken_measurements_are_refused() {
    let refused = |change: &dyn Fn(&mut Measurement), expected: &str| {
        let mut m = example();
        change(&mut m);
        for solver in [&Uniform::default() as &dyn PolicySolver, &Paper::default(), &Solve::default()] {
            let error = solver.solve(&m, &bits(6.0)).unwrap_err().to_string();
            assert!(error.contains(expected), "{}: {error}", solver.name());
        }
    };
    refused(&|m| m.options.clear(), "at least one option");
    refused(&|m| m.units.clear(), "one unit");
    refused(&|m| m.units[1].kl.truncate(1), "one per option");
    refused(&|m| m.units[1].local[0] = f64::NAN, "finite");
    refused(&|m| m.units[1].matrices.clear(), "matrices of block.0");
    refused(&|m| m.units[1].matrices[0].rows = usize::MAX, "counted");
    refused(&|m| m.options[0].bit_width = 7, "7");
    let m = example();
    assert!(Solve::default().solve(&m, &bits(f64::NAN)).is_err());
    assert!(Solve::default().solve(&m, &Budget::default()).is_err());
}

#[test]
fn the_grid_has_every_format_once() {
    let options = option_grid(&[2, 16], &[32, 128], &[0.5]).unwrap();
    let names: Vec<String> = options.iter().map(LayerFormat::to_string).collect();
    assert_eq!(names, ["q2g32a", "q2g128a", "f16", "f32+50%"]);
    assert!(option_grid(&[7], &[32], &[]).is_err());
    assert!(option_grid(&[4], &[33], &[]).is_err());
    assert!(option_grid(&[64], &[32], &[]).is_err());
    assert!(option_grid(&[4, 4], &[32], &[]).is_err());
    assert!(option_grid(&[4], &[32], &[1.0]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn sparsities_meet_the_mean_within_their_limits(
        units in prop::collection::vec((0.0f64..10.0, 1u32..1000), 1..20),
        p_max in 0.05f64..0.99,
        share in 0.0f64..=1.0,
    ) {
        let s: Vec<f64> = units.iter().map(|u| u.0).collect();
        let w: Vec<f64> = units.iter().map(|u| f64::from(u.1)).collect();
        let target = share * p_max;
        let p = allocate_sparsity(&s, &w, target, p_max).unwrap();
        prop_assert!(p.iter().all(|&p| (0.0..=p_max * (1.0 + 1e-12)).contains(&p)), "{p:?}");
        let mean = p.iter().zip(&w).map(|(p, w)| p * w).sum::<f64>() / w.iter().sum::<f64>();
        prop_assert!((mean - target).abs() < 1e-9, "{mean} is not {target}");
        for i in 0..s.len() {
            for j in 0..s.len() {
                prop_assert!(s[i] < s[j] || p[i] <= p[j] + 1e-9, "more sensitive, more pruned");
            }
        }
    }
}
