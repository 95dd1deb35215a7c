//! Perplexity, divergence and held-out loss on the tiny model, against direct computation from its logits.

use burn::tensor::{Device, Tensor};
use edgellm_eval::{
    Accuracy, ChoiceOption, EvalError, Measured, Question, QuestionFile, Scoring, heldout_loss, kl_divergence,
    multiple_choice, perplexity, ratio, read_questions, reliability, strided_perplexity,
};
use edgellm_model::adapter::{Adapter, LoraConfig};
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::files::ModelFiles;
use edgellm_model::generate::to_vec;
use edgellm_model::sample::log_softmax;
use edgellm_model::testing::{decoder_of, tiny_config, tiny_decoder, tiny_model_dir};
use edgellm_model::traits::Voter;
use edgellm_model::values::Projection;
use serde_json::json;

const VOCAB: usize = 288;

fn text() -> Vec<u32> {
    (0..100).map(|i| i * 53 % 288).collect()
}

fn adapter(decoder: &Decoder) -> Adapter {
    let lora = LoraConfig { rank: 2, alpha: 4.0, use_rslora: false, targets: vec![Projection::O].into() };
    let mut adapter = Adapter::new(decoder.config(), lora, 7, decoder.device()).unwrap();
    for index in 0..decoder.n_blocks() {
        let lora = adapter.block_mut(index).unwrap().get_mut(Projection::O).as_mut().unwrap();
        lora.b = Tensor::ones(lora.b.dims(), decoder.device()).mul_scalar(0.05);
    }
    adapter
}

/// Log-probabilities at every position, at the exit after `exit` blocks.
fn log_probs(decoder: &Decoder, adapter: Option<&Adapter>, ids: &[u32], exit: usize) -> Vec<Vec<f32>> {
    let x = decoder.run_blocks(decoder.embed(&[ids]).unwrap(), 0..exit, adapter, None).unwrap();
    let x = decoder.exit_norm(x.reshape([ids.len(), 64]), exit, adapter);
    let mut rows: Vec<Vec<f32>> = to_vec(decoder.logits(x)).unwrap().chunks(VOCAB).map(<[f32]>::to_vec).collect();
    rows.iter_mut().for_each(|row| log_softmax(row));
    rows
}

#[track_caller]
fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 2e-5 * expected.abs(), "found {found}, expected {expected}");
}

#[test]
fn perplexity_is_its_definition() {
    let decoder = tiny_decoder(1, &Device::flex());
    let adapter = adapter(&decoder);
    for adapter in [None, Some(&adapter)] {
        let (mut all, mut second) = (Vec::new(), Vec::new());
        for window in text().chunks_exact(33).take(2) {
            let rows = log_probs(&decoder, adapter, window, 4);
            let losses: Vec<f64> = (0..32).map(|i| -f64::from(rows[i][window[i + 1] as usize])).collect();
            second.extend_from_slice(&losses[16..]);
            all.extend(losses);
        }
        let mean = |v: &[f64]| (v.iter().sum::<f64>() / v.len() as f64).exp();
        let mut seen = Vec::new();
        let found = perplexity(&decoder, adapter, &text(), 33, Some(2), &mut |p| seen.push((p.done, p.total))).unwrap();
        close(found.all_targets, mean(&all));
        close(found.second_half, mean(&second));
        assert_eq!((found.tokens, found.windows), (64, 2));
        assert_eq!(seen, [(1, 2), (2, 2)]);
    }
}

#[test]
fn a_head_that_is_not_packed_scores_the_same() {
    let decoder = tiny_decoder(1, &Device::flex());
    let dense = decoder.clone().with_embedding(edgellm_model::decoder::Weight::Dense(decoder.embedding().dequantize()));
    // Longer than a chunk of the dense head.
    let text: Vec<u32> = text().into_iter().cycle().take(400).collect();
    let run = |d: &Decoder| perplexity(d, None, &text, 200, None, &mut |_| {}).unwrap();
    close(run(&dense).all_targets, run(&decoder).all_targets);
    close(run(&dense).second_half, run(&decoder).second_half);
}

#[test]
fn divergence_is_its_definition_and_zero_from_itself() {
    let base = tiny_decoder(1, &Device::flex());
    let adapter = adapter(&base);
    let (mut all, mut second, mut same) = (0.0, 0.0, 0);
    for window in text().chunks_exact(50) {
        let p = log_probs(&base, None, window, 4);
        let q = log_probs(&base, Some(&adapter), window, 4);
        for i in 0..49 {
            let term = |(p, q): (&f32, &f32)| f64::from(*p).exp() * (f64::from(*p) - f64::from(*q));
            let kl: f64 = p[i].iter().zip(&q[i]).map(term).sum();
            all += kl;
            second += if i >= 25 { kl } else { 0.0 };
            let top = |row: &[f32]| edgellm_model::sample::argmax(row);
            same += usize::from(top(&p[i]) == top(&q[i]));
        }
    }
    let found = kl_divergence(&base, &base, Some(&adapter), &text(), 50, None, &mut |_| {}).unwrap();
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-5 + 1e-3 * b, "found {a}, expected {b}");
    near(found.kl, all / 98.0);
    near(found.second_half_kl, second / 48.0);
    assert_eq!(found.top1_agreement, same as f64 / 98.0);
    assert!(found.kl > 1e-4 && found.tokens == 98 && found.windows == 2);
    let none = kl_divergence(&base, &base, None, &text(), 50, None, &mut |_| {}).unwrap();
    assert_eq!((none.kl, none.second_half_kl, none.top1_agreement), (0.0, 0.0, 1.0));
}

#[test]
fn vocabularies_must_agree() {
    let base = tiny_decoder(1, &Device::flex());
    let other = decoder_of(&tiny_config(json!({"vocab_size": 300})), 1, &Device::flex());
    let error = kl_divergence(&base, &other, None, &text(), 50, None, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("288"), "{error}");
}

/// The geometric mean, not normalised: enough to see what the voter is given.
struct Blend;

impl Voter for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        for (i, value) in out.iter_mut().enumerate() {
            *value = exits.iter().map(|e| e[i]).sum::<f32>() / exits.len() as f32;
        }
    }
}

fn examples() -> Vec<Example> {
    let long: Vec<u32> = (0..150).map(|i| i * 31 % 288).collect();
    vec![
        Example::new(&[1, 2, 3], &[4, 5, 6, 7, 256]),
        Example::new(&[9], &[8, 256]),
        Example::new(&long[..20], &long[20..]),
        Example::new(&[1, 2, 3], &[]),
        Example::new(&[], &[11, 12, 13]),
    ]
}

#[test]
fn heldout_loss_weighs_response_tokens_alike() {
    let decoder = tiny_decoder(1, &Device::flex());
    let adapter = adapter(&decoder);
    let exits = [1, 2, 4];
    let mut expected = [0.0; 4];
    let mut tokens = 0;
    for example in examples() {
        let rows = exits.map(|exit| log_probs(&decoder, Some(&adapter), &example.ids, exit));
        for position in 1..example.ids.len() {
            if !example.is_target(position) {
                continue;
            }
            tokens += 1;
            let scores = rows.each_ref().map(|r| f64::from(r[position - 1][example.ids[position] as usize]));
            for (sum, score) in expected.iter_mut().zip(scores) {
                *sum -= score;
            }
            expected[3] -= scores.iter().sum::<f64>() / 3.0;
        }
    }
    assert_eq!(tokens, 5 + 2 + 130 + 2);
    for voters in [&[][..], &[&Blend as &dyn Voter], &[&Blend, &Blend]] {
        let found = heldout_loss(&decoder, Some(&adapter), &exits, voters, &examples(), &mut |_| {}).unwrap();
        assert_eq!((found.tokens, found.examples), (tokens, 4));
        for ((exit, loss), sum) in exits.iter().zip(&found.by_exit).zip(expected) {
            assert_eq!(loss.exit, *exit);
            close(loss.loss, sum / tokens as f64);
        }
        assert_eq!(found.votes.len(), voters.len());
        for vote in found.votes {
            close(vote, expected[3] / tokens as f64);
        }
    }
}

#[test]
fn impossible_requests_are_errors() {
    let decoder = tiny_decoder(1, &Device::flex());
    let check = |exits: &[usize], examples: &[Example]| {
        heldout_loss(&decoder, None, exits, &[], examples, &mut |_| {}).unwrap_err()
    };
    for exits in [&[][..], &[0, 4], &[2, 2], &[4, 2], &[5]] {
        assert!(matches!(check(exits, &examples()), EvalError::Setting { what: "exits", .. }), "{exits:?}");
    }
    assert!(matches!(check(&[4], &[Example::new(&[1, 2], &[])]), EvalError::TooLittle { .. }));
    assert!(check(&[4], &[Example::new(&[1], &[999, 1])]).to_string().contains("999"));
    let short = perplexity(&decoder, None, &[1, 2, 3], 4, None, &mut |_| {}).unwrap_err();
    assert!(matches!(short, EvalError::TooLittle { needed: 4, found: 3, .. }), "{short}");
}

/// The pool of exits 1 and 4 with factors that do not sum to one.
struct Contrast;

impl Voter for Contrast {
    fn name(&self) -> &'static str {
        "contrast"
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        for (i, value) in out.iter_mut().enumerate() {
            *value = 1.4 * exits[1][i] - 0.3 * exits[0][i];
        }
        log_softmax(out);
    }

    fn pool(&self, _n_exits: usize) -> Option<Vec<f32>> {
        Some(vec![-0.3, 1.4])
    }
}

/// The same without saying that it is a pool.
struct Slow;

impl Voter for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        Contrast.vote(exits, out);
    }
}

#[test]
fn a_pool_scores_the_same_with_and_without_its_shortcut() {
    let decoder = tiny_decoder(1, &Device::flex());
    let adapter = adapter(&decoder);
    let voters: [&dyn Voter; 2] = [&Contrast, &Slow];
    let found = heldout_loss(&decoder, Some(&adapter), &[1, 4], &voters, &examples(), &mut |_| {}).unwrap();
    close(found.votes[0], found.votes[1]);
    assert!((found.votes[0] - found.by_exit[1].loss).abs() > 1e-3, "{found:?}");
    let alone = heldout_loss(&decoder, Some(&adapter), &[1, 4], &[], &examples(), &mut |_| {}).unwrap();
    assert_eq!(alone.by_exit, found.by_exit);
}

#[test]
fn options_are_scored_by_their_log_likelihood() {
    let decoder = tiny_decoder(1, &Device::flex());
    let adapter = adapter(&decoder);
    let exits = [1, 4];
    let option = |ids: &[u32], characters| ChoiceOption { ids: ids.to_vec(), characters };
    let question = |seed: u32, answer| Question {
        context: (0..7 + seed).map(|i| (i * 31 + seed * 7) % 256).collect(),
        options: vec![
            option(&[seed], 1),
            option(&[seed + 1, 9, 77, 3, 1], 30),
            option(&[4, seed], 2),
            option(&[5, 6, 7], 5),
        ],
        answer,
        subject: None,
    };
    let questions: Vec<Question> = (0..12).map(|seed| question(seed, usize::from(seed >= 8))).collect();
    // Exit 1, exit 4, and the vote: by sum and per character.
    let mut right = [[0.0; 2]; 3];
    for q in &questions {
        let mut scores = [vec![], vec![], vec![]];
        for option in &q.options {
            let ids = [q.context.as_slice(), &option.ids].concat();
            let rows = exits.map(|exit| log_probs(&decoder, Some(&adapter), &ids, exit));
            let mut sums = [0.0; 3];
            for (offset, &id) in option.ids.iter().enumerate() {
                let at = q.context.len() + offset - 1;
                let mut voted = vec![0.0; VOCAB];
                Contrast.vote(&[&rows[0][at], &rows[1][at]], &mut voted);
                let each = [rows[0][at][id as usize], rows[1][at][id as usize], voted[id as usize]];
                sums.iter_mut().zip(each).for_each(|(sum, value)| *sum += f64::from(value));
            }
            scores.iter_mut().zip(sums).for_each(|(scores, sum)| scores.push((sum, sum / option.characters as f64)));
        }
        for (right, scores) in right.iter_mut().zip(scores) {
            let best = |key: fn(&(f64, f64)) -> f64| {
                (0..4).max_by(|&a, &b| key(&scores[a]).total_cmp(&key(&scores[b]))).unwrap()
            };
            right[0] += f64::from(u8::from(best(|s| s.0) == q.answer)) / 12.0;
            right[1] += f64::from(u8::from(best(|s| s.1) == q.answer)) / 12.0;
        }
    }
    let voters: [&dyn Voter; 2] = [&Contrast, &Slow];
    let found = multiple_choice(&decoder, Some(&adapter), &exits, &voters, &questions, &mut |_| {}).unwrap();
    let near = |found: Accuracy, expected: [f64; 2]| {
        assert!((found.acc - expected[0]).abs() < 1e-9 && (found.acc_norm - expected[1]).abs() < 1e-9, "{found:?}");
    };
    near(found.by_exit[0], right[0]);
    near(found.by_exit[1], right[1]);
    near(found.votes[0], right[2]);
    near(found.votes[1], right[2]);
    assert!(right.iter().any(|r| r[0] != r[1]), "a setting in which normalizing matters: {right:?}");

    let refused = |q: Question| multiple_choice(&decoder, None, &exits, &[], &[q], &mut |_| {}).unwrap_err();
    assert!(refused(question(0, 4)).to_string().contains("answer 4"));
    let strange = Question { options: vec![option(&[1], 1), option(&[999], 1)], ..question(0, 1) };
    assert!(refused(strange).to_string().contains("999"));
    assert!(multiple_choice(&decoder, None, &exits, &[], &[], &mut |_| {}).is_err());
}

#[test]
fn questions_are_read_in_both_layouts_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    tiny_model_dir(&folder.path().join("model"), 0).unwrap();
    let tokenizer = ModelFiles::open(&folder.path().join("model")).unwrap().tokenizer().unwrap();
    let path = folder.path().join("q.jsonl");
    let read = |text: &str, limit| {
        std::fs::write(&path, text).unwrap();
        let file = QuestionFile { path: &path, limit, scoring: Scoring::Letter, shots: 0, shots_path: None };
        read_questions(&file, &tokenizer)
    };
    let good = "{\"context\": \"One two\", \"choices\": [\"three.\", \"fünf\"], \"answer\": 0}\n\n\
                {\"subject\": \"s\", \"input\": \"Which?\\nA. x\\nB. y\\nC. z\\nAnswer:\", \"output\": \"B\"}\n";
    let questions = read(good, 9).unwrap();
    assert_eq!(questions.len(), 2);
    assert_eq!(questions[0].options[1].characters, 5);
    assert_eq!(questions[0].options[0].ids, tokenizer.encode(" three.", false).unwrap());
    assert_eq!((questions[1].options.len(), questions[1].answer), (3, 1));
    assert_eq!(read(good, 1).unwrap().len(), 1);
    for bad in [
        "nonsense",
        "{}",
        "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 2}",
        "{\"context\": \"a\", \"choices\": [], \"answer\": 0}",
        "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": -1}",
        "{\"input\": \"Which?\\nA. x\\nB. y\", \"output\": \"C\"}",
    ] {
        let error = read(&format!("{good}{bad}\n"), 9).unwrap_err().to_string();
        assert!(error.contains("line 4"), "{bad}: {error}");
    }
}

#[test]
fn strided_windows_score_each_token_once() {
    let decoder = tiny_decoder(1, &Device::flex());
    let ids = &text()[..100];
    let run = |context, stride| strided_perplexity(&decoder, None, ids, (context, stride), None, &mut |_| {}).unwrap();
    // All but the first token are scored, however the windows overlap.
    for (context, stride, windows) in [(100, 50, 1), (32, 8, 10), (32, 20, 5), (40, 39, 3)] {
        let found = run(context, stride);
        assert_eq!((found.tokens, found.windows), (99, windows), "{context} {stride}");
    }
    // By hand: the second window of 32 begins at 8, and scores the tokens 32..40.
    let found = run(32, 8);
    let rows = log_probs(&decoder, None, &ids[8..40], decoder.n_blocks());
    let loss: f64 = (32..40).map(|place| -f64::from(rows[place - 9][ids[place] as usize])).sum();
    assert_eq!(found.items[1].weight, 8.0);
    assert!((found.items[1].sum - loss).abs() < 1e-3, "{} is not {loss}", found.items[1].sum);
    // Without overlap, the first token of a window has nothing before it: as the plain perplexity counts.
    let plain = perplexity(&decoder, None, ids, 50, None, &mut |_| {}).unwrap();
    let found = run(50, 50);
    assert_eq!(found.tokens, plain.tokens);
    assert!((found.perplexity / plain.all_targets - 1.0).abs() < 1e-5);
    assert!(strided_perplexity(&decoder, None, ids, (32, 33), None, &mut |_| {}).is_err());
    assert!(strided_perplexity(&decoder, None, ids, (32, 0), None, &mut |_| {}).is_err());
}

#[test]
fn figures_agree_with_results_and_have_intervals() {
    let (base, other) = (tiny_decoder(0, &Device::flex()), tiny_decoder(1, &Device::flex()));
    let mut measured = Measured::default();
    let divergence = kl_divergence(&base, &other, None, &text(), 20, None, &mut |_| {}).unwrap();
    measured.add_divergence(&divergence);
    let found = perplexity(&other, None, &text(), 20, None, &mut |_| {}).unwrap();
    measured.add_perplexity(&found);
    let adapter = adapter(&other);
    let held = heldout_loss(&other, Some(&adapter), &[1, 4], &[], &examples(), &mut |_| {}).unwrap();
    measured.add_heldout(&held, &[]);
    let value = |name: &str| measured.figures[name].value;
    assert_eq!(value("kl"), divergence.kl);
    assert_eq!(value("top1_agreement"), divergence.top1_agreement);
    assert_eq!(value("second_half_perplexity"), found.second_half);
    assert_eq!((value("heldout_loss"), value("heldout_loss_exit_1")), (held.by_exit[1].loss, held.by_exit[0].loss));
    let (low, high) = measured.figures["perplexity"].interval.unwrap();
    assert!(low < found.all_targets && found.all_targets < high);
    assert_eq!(measured.items["kl"].len(), divergence.windows);
    assert_eq!(held.items[0].iter().map(|item| item.weight).sum::<f64>(), held.tokens as f64);
    assert!((ratio(&held.items[1]) - held.by_exit[1].loss).abs() < 1e-12);
    // Each example alone has the loss that it has among others.
    let answered = examples().into_iter().filter(|example| example.n_targets() > 0);
    for (example, item) in answered.zip(&held.items[0]) {
        let alone =
            heldout_loss(&other, Some(&adapter), &[1], &[], std::slice::from_ref(&example), &mut |_| {}).unwrap();
        assert!((alone.by_exit[0].loss - item.sum / item.weight).abs() < 1e-4);
    }
}

#[test]
fn reliability_counts_every_response_token_of_exits_and_votes() {
    let decoder = tiny_decoder(1, &Device::flex());
    let adapter = adapter(&decoder);
    let held = heldout_loss(&decoder, Some(&adapter), &[1, 4], &[], &examples(), &mut |_| {}).unwrap();
    let voters: [&dyn Voter; 1] = [&Slow];
    let found = reliability(&decoder, Some(&adapter), &[1, 4], &voters, &examples(), &mut |_| {}).unwrap();
    assert_eq!(found.len(), 3);
    assert!(found.iter().all(|r| r.tokens() == held.tokens && (0.0..=1.0).contains(&r.error())));
    assert!(reliability(&decoder, None, &[4], &[], &[], &mut |_| {}).is_err());
}
