//! Which blocks stay in memory.
//!
//! A token runs all blocks in order, then the next token does. With `S` buffers, the streamed blocks are read one after the
//! other, each as soon as a buffer is free: one that was read `S` streamed blocks earlier and has been computed. A block is
//! computed when the one before it is done and it is there. [`round_seconds`] plays this until it repeats itself.
//!
//! A time for all reads is the least that any placement of the same blocks reaches. What keeps the reader busy is that
//! streamed blocks lie apart: it reads while the blocks between them compute. So for every number of buffers as few blocks as
//! fit are streamed, evenly spread, and then exchanged one by one for as long as that helps.

/// How a model's blocks are kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Whether each block stays in memory.
    pub resident: Vec<bool>,
    /// Buffers for those that do not.
    pub slots: usize,
    /// Bytes that blocks and buffers take.
    pub bytes: u64,
    /// Bytes that are read in a pass through all blocks.
    pub read_bytes: u64,
    /// Predicted seconds of a pass through all blocks.
    pub seconds: f64,
}

impl Placement {
    /// Whether anything is read after loading.
    pub fn streams(&self) -> bool {
        self.slots > 0
    }
}

/// The budget is too small for any placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacementError {
    /// The least that would do.
    pub least: u64,
}

/// Buffers at most: more of them only take memory from blocks that could stay.
const MAX_SLOTS: usize = 4;

/// Chooses the blocks that stay in `budget` bytes. `seconds` is what each block computes; `read_rate` is the storage's, in
/// bytes per second.
///
/// # Errors
/// Not even one buffer fits.
///
/// # Panics
/// If there are not as many times as sizes, or there is no block.
pub fn place(sizes: &[u64], seconds: &[f64], read_rate: f64, budget: u64) -> Result<Placement, PlacementError> {
    assert_eq!(sizes.len(), seconds.len(), "a time for each block");
    let total: u64 = sizes.iter().sum();
    let all = |resident, slots| Candidate { resident, slots };
    if total <= budget {
        let resident = all(vec![true; sizes.len()], 0);
        return Ok(resident.placement(sizes, seconds, read_rate));
    }
    let mut best: Option<Placement> = None;
    for slots in 1..=MAX_SLOTS {
        let fits = |c: &Candidate| c.bytes(sizes) <= budget;
        let Some(start) = (1..=sizes.len()).map(|n| Candidate::even(sizes.len(), n, slots)).find(fits) else {
            continue;
        };
        let found = start.improved(sizes, seconds, read_rate, budget).placement(sizes, seconds, read_rate);
        if best.as_ref().is_none_or(|best| found.seconds < best.seconds) {
            best = Some(found);
        }
    }
    best.ok_or_else(|| PlacementError { least: sizes.iter().copied().max().expect("a block") })
}

struct Candidate {
    resident: Vec<bool>,
    slots: usize,
}

impl Candidate {
    /// `streamed` of `n` blocks, as far from each other as can be.
    fn even(n: usize, streamed: usize, slots: usize) -> Self {
        let mut resident = vec![true; n];
        for i in 0..streamed {
            resident[(2 * i + 1) * n / (2 * streamed)] = false;
        }
        Candidate { resident, slots: slots.min(streamed) }
    }

    fn streamed<'a>(&'a self, sizes: &'a [u64]) -> impl Iterator<Item = u64> + 'a {
        sizes.iter().zip(&self.resident).filter(|(_, resident)| !**resident).map(|(size, _)| *size)
    }

    fn bytes(&self, sizes: &[u64]) -> u64 {
        let kept: u64 = sizes.iter().sum::<u64>() - self.streamed(sizes).sum::<u64>();
        kept + self.slots as u64 * self.streamed(sizes).max().unwrap_or(0)
    }

    fn seconds(&self, sizes: &[u64], seconds: &[f64], read_rate: f64) -> f64 {
        round_seconds(sizes, seconds, &self.resident, self.slots, read_rate)
    }

    /// Exchanges single blocks, or keeps one more, for as long as that makes a pass faster.
    fn improved(mut self, sizes: &[u64], seconds: &[f64], read_rate: f64, budget: u64) -> Self {
        let mut time = self.seconds(sizes, seconds, read_rate);
        loop {
            let (mut best, mut best_time) = (None, time * (1.0 - 1e-9));
            for out in (0..sizes.len()).filter(|&i| !self.resident[i]) {
                for into in std::iter::once(None).chain((0..sizes.len()).map(Some)) {
                    if into.is_some_and(|i| !self.resident[i]) {
                        continue;
                    }
                    let mut resident = self.resident.clone();
                    resident[out] = true;
                    into.into_iter().for_each(|i| resident[i] = false);
                    let other = Candidate { resident, slots: self.slots };
                    if other.bytes(sizes) <= budget {
                        let time = other.seconds(sizes, seconds, read_rate);
                        if time < best_time {
                            (best, best_time) = (Some(other), time);
                        }
                    }
                }
            }
            match best {
                Some(other) => (self, time) = (other, best_time),
                None => return self,
            }
        }
    }

    fn placement(self, sizes: &[u64], seconds: &[f64], read_rate: f64) -> Placement {
        let (bytes, read_bytes) = (self.bytes(sizes), self.streamed(sizes).sum());
        let seconds = self.seconds(sizes, seconds, read_rate);
        Placement { resident: self.resident, slots: self.slots, bytes, read_bytes, seconds }
    }
}

/// A block in a pass: when it is read and when it is computed, in seconds since the pass before it ended. What was read ahead
/// has times below 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The block.
    pub block: usize,
    /// From when to when it is read, if it is.
    pub read: Option<(f64, f64)>,
    /// From when to when it computes.
    pub compute: (f64, f64),
}

/// A pass through all blocks, once the passes repeat themselves.
///
/// # Panics
/// If there are not as many sizes and times as blocks.
pub fn timeline(placement: &Placement, sizes: &[u64], seconds: &[f64], read_rate: f64) -> Vec<Step> {
    assert_eq!((sizes.len(), seconds.len()), (placement.resident.len(), placement.resident.len()), "blocks");
    let mut steps = Vec::new();
    let start = play(sizes, seconds, &placement.resident, placement.slots, read_rate, |step| steps.push(step)).0;
    let mut last = steps.split_off(steps.len() - sizes.len());
    let shift = |(from, to): (f64, f64)| (from - start, to - start);
    for step in &mut last {
        (step.read, step.compute) = (step.read.map(shift), shift(step.compute));
    }
    last
}

/// Seconds of a pass through all blocks, once the passes repeat themselves.
fn round_seconds(sizes: &[u64], seconds: &[f64], resident: &[bool], slots: usize, read_rate: f64) -> f64 {
    if resident.iter().all(|stays| *stays) {
        return seconds.iter().sum();
    }
    let (start, end) = play(sizes, seconds, resident, slots, read_rate, |_| {});
    end - start
}

/// Plays four passes; tells when the last one starts and ends.
fn play(
    sizes: &[u64],
    seconds: &[f64],
    resident: &[bool],
    slots: usize,
    read_rate: f64,
    mut see: impl FnMut(Step),
) -> (f64, f64) {
    // When the streamed blocks of all passes so far were computed, and when the reader was done.
    let (mut done, mut reader, mut now, mut last) = (Vec::new(), 0.0f64, 0.0f64, 0.0);
    for _ in 0..4 {
        last = now;
        for (block, compute) in seconds.iter().enumerate() {
            let read = (!resident[block]).then(|| {
                let free = if done.len() < slots { 0.0 } else { done[done.len() - slots] };
                let start = reader.max(free);
                reader = start + sizes[block] as f64 / read_rate;
                now = now.max(reader);
                (start, reader)
            });
            see(Step { block, read, compute: (now, now + compute) });
            now += compute;
            if read.is_some() {
                done.push(now);
            }
        }
    }
    (last, now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_stays() {
        let placement = place(&[10, 20, 30], &[1.0; 3], 1.0, 60).unwrap();
        assert_eq!((placement.resident.as_slice(), placement.streams()), (&[true; 3][..], false));
        assert_eq!((placement.bytes, placement.read_bytes, placement.seconds), (60, 0, 3.0));
        assert_eq!(place(&[10, 20, 30], &[1.0; 3], 1.0, 29), Err(PlacementError { least: 30 }));
        assert!(place(&[10, 20, 30], &[1.0; 3], 1.0, 30).is_ok());
    }

    #[test]
    fn a_pass_takes_what_reading_takes_where_that_is_slower() {
        // Half of the blocks are read, each in 4 s, while others compute 1 s each.
        let resident = [true, false, true, false];
        assert_eq!(round_seconds(&[4; 4], &[1.0; 4], &resident, 2, 1.0), 8.0);
        // With one buffer, a block is read only after the one before it in the buffer was computed: 4 + 1 s each.
        assert_eq!(round_seconds(&[4; 4], &[1.0; 4], &resident, 1, 1.0), 10.0);
        // Where computing is slower, it is all there is.
        assert_eq!(round_seconds(&[4; 4], &[9.0; 4], &resident, 2, 1.0), 36.0);
    }

    #[test]
    fn a_timeline_is_the_pass_that_was_counted() {
        let (sizes, seconds) = ([4, 6, 4, 4], [1.0, 2.0, 1.0, 1.0]);
        let placement = place(&sizes, &seconds, 1.0, 14).unwrap();
        let steps = timeline(&placement, &sizes, &seconds, 1.0);
        assert_eq!(steps.iter().map(|s| s.block).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!((steps[3].compute.1 - placement.seconds).abs() < 1e-9, "{steps:?}");
        for (step, stays) in steps.iter().zip(&placement.resident) {
            assert_eq!(step.read.is_none(), *stays);
            assert!(step.read.is_none_or(|read| read.1 <= step.compute.0 + 1e-9), "{step:?}");
        }
        assert!(steps.windows(2).all(|pair| pair[0].compute.1 <= pair[1].compute.0 + 1e-9));
    }

    /// Against all placements with all numbers of buffers.
    #[test]
    fn nothing_is_much_better() {
        let (mut worst, mut sum, mut cases) = (1.0f64, 0.0, 0.0);
        for seed in 0..60u64 {
            let value = |i: u64| (seed * 31 + i * 17 + 7) * 2_654_435_761 % 1009;
            let n = 6 + seed as usize % 4;
            let sizes: Vec<u64> = (0..n as u64).map(|i| if seed % 3 == 0 { 100 } else { 60 + value(i) % 80 }).collect();
            let seconds: Vec<f64> = sizes.iter().map(|size| *size as f64 / (30.0 + (seed % 7 * 40) as f64)).collect();
            let budget = sizes.iter().sum::<u64>() * (45 + seed % 5 * 10) / 100;
            let found = place(&sizes, &seconds, 100.0, budget).unwrap();
            assert!(found.bytes <= budget);
            let mut best = f64::INFINITY;
            for mask in 0..(1u32 << n) - 1 {
                let resident: Vec<bool> = (0..n).map(|i| mask >> i & 1 == 1).collect();
                for slots in 1..=MAX_SLOTS {
                    let candidate = Candidate { resident: resident.clone(), slots };
                    if candidate.bytes(&sizes) <= budget {
                        best = best.min(candidate.seconds(&sizes, &seconds, 100.0));
                    }
                }
            }
            worst = worst.max(found.seconds / best);
            sum += found.seconds / best;
            cases += 1.0;
        }
        assert!(worst <= 1.15 && sum / cases <= 1.02, "{worst} times the best, {} in the mean", sum / cases);
    }
}
