//! Double-precision references, written from the formulas, on plain vectors.

/// `x [t, k] * w [n, k]^T`.
pub(crate) fn matmul_t(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w))).collect()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let d = weight.len();
    x.chunks(d)
        .flat_map(|row| {
            let rms = (dot(row, row) / d as f64 + eps).sqrt();
            row.iter().zip(weight).map(move |(x, w)| x / rms * w)
        })
        .collect()
}

/// `x [rows of d]`, row `r` at position `r % tokens`; `cos`, `sin` `[tokens, half]`.
pub(crate) fn rope(x: &[f64], cos: &[f64], sin: &[f64], tokens: usize, d: usize) -> Vec<f64> {
    let half = cos.len() / tokens;
    let mut out = x.to_vec();
    for (r, row) in out.chunks_mut(d).enumerate() {
        for i in 0..half {
            let at = (r % tokens) * half + i;
            let (a, b) = (row[i], row[i + half]);
            row[i] = a * cos[at] - b * sin[at];
            row[i + half] = b * cos[at] + a * sin[at];
        }
    }
    out
}

pub(crate) struct Heads {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub tokens: usize,
    pub dim: usize,
    pub offset: usize,
    pub window: Option<usize>,
    pub scale: f64,
}

impl Heads {
    pub(crate) fn keys(&self) -> usize {
        self.offset + self.tokens
    }
}

pub(crate) fn attention(q: &[f64], k: &[f64], v: &[f64], h: &Heads) -> Vec<f64> {
    let (d, keys) = (h.dim, h.keys());
    let mut out = Vec::new();
    for b in 0..h.batch {
        for head in 0..h.heads {
            let kv = b * h.kv_heads + head / (h.heads / h.kv_heads);
            for t in 0..h.tokens {
                let at = ((b * h.heads + head) * h.tokens + t) * d;
                let query = &q[at..at + d];
                let key = |j: usize| &k[(kv * keys + j) * d..(kv * keys + j + 1) * d];
                let position = h.offset + t;
                let sees = |j: usize| j <= position && h.window.is_none_or(|w| position - j < w);
                let scores: Vec<f64> =
                    (0..keys).map(|j| if sees(j) { (h.scale * dot(query, key(j))).exp() } else { 0.0 }).collect();
                let total: f64 = scores.iter().sum();
                for i in 0..d {
                    out.push((0..keys).map(|j| scores[j] / total * v[(kv * keys + j) * d + i]).sum());
                }
            }
        }
    }
    out
}

pub(crate) fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

pub(crate) fn cross_entropy(hidden: &[f64], head: &[f64], targets: &[usize], weights: &[f64], d: usize) -> Vec<f64> {
    let vocabulary = head.len() / d;
    let logits = matmul_t(hidden, head, d);
    let loss = |(row, (&target, weight)): (&[f64], (&usize, &f64))| {
        let max = row.iter().copied().fold(f64::MIN, f64::max);
        let normalizer = max + row.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        weight * (normalizer - row[target])
    };
    vec![logits.chunks(vocabulary).zip(targets.iter().zip(weights)).map(loss).sum()]
}
