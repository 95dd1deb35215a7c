//! A store of blocks of which some are read from storage each time.
//!
//! One thread reads ahead. The buffers are a fixed number; each is in use by whoever holds a block that lies in it, being
//! read into, or idle. An idle buffer still holds its block until it is overwritten, and what is overwritten is what will be
//! needed last.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use edgellm_kernels::PackedLayout;
use edgellm_model::ModelError;
use edgellm_model::decoder::{Block, BlockVectors};
use edgellm_model::io::StorageBuffer;
use edgellm_model::traits::WeightStore;

use super::{BlockSource, Placement};

/// How long a block waits for a buffer while all are in use by blocks that somebody holds.
const PATIENCE: Duration = Duration::from_secs(20);

/// What streaming has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Streamed {
    /// Bytes that were read after loading.
    pub bytes: u64,
    /// Seconds in which something was being read.
    pub reading: f64,
    /// Seconds for which a block was waited for.
    pub waiting: f64,
}

/// Blocks of which some stay in memory and the others are read from storage, ahead of their use.
pub struct StreamedStore {
    shared: Arc<Shared>,
    resident: Vec<Option<Block>>,
    vectors: Vec<BlockVectors>,
    reader: Option<JoinHandle<()>>,
}

struct Shared {
    source: BlockSource,
    state: Mutex<State>,
    changed: Condvar,
    bytes: AtomicU64,
    reading_ns: AtomicU64,
    waiting_ns: AtomicU64,
}

#[derive(Default)]
struct State {
    idle: Vec<Slot>,
    /// Blocks that somebody holds.
    out: Vec<(usize, Weak<Lease>)>,
    reading: Option<usize>,
    /// Streamed blocks in the order in which they are expected.
    plan: Vec<usize>,
    order: Order,
    failed: Option<(usize, ModelError)>,
    stop: bool,
}

/// A buffer, and the block that is in it.
struct Slot {
    buffer: StorageBuffer,
    holds: Option<usize>,
}

/// A buffer in use; dropped, it is idle again.
struct Lease {
    slot: Option<Slot>,
    shared: Arc<Shared>,
}

/// The bytes of a buffer in use.
struct Held(Arc<Lease>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.0.slot.as_ref().map_or(&[], |slot| slot.buffer.as_ref())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let mut state = self.shared.lock();
            state.out.retain(|(_, lease)| lease.strong_count() > 0);
            state.idle.push(slot);
            drop(state);
            self.shared.changed.notify_all();
        }
    }
}

/// In which order blocks are asked for: what came after each pair of blocks before.
#[derive(Default)]
struct Order {
    before: Option<usize>,
    last: Option<usize>,
    follows: HashMap<(Option<usize>, usize), usize>,
}

impl Order {
    fn visit(&mut self, index: usize) {
        if let Some(last) = self.last {
            self.follows.insert((self.before, last), index);
        }
        (self.before, self.last) = (self.last, Some(index));
    }

    /// What is expected after the last block, `steps` blocks of `n`.
    fn ahead(&self, n: usize, steps: usize) -> Vec<usize> {
        let (mut before, Some(mut last)) = (self.before, self.last) else { return Vec::new() };
        let mut found = Vec::with_capacity(steps);
        for _ in 0..steps {
            // Without experience: on in the same direction, and round.
            let down = before == Some(last + 1);
            let straight = if down { last.saturating_sub(1) } else { (last + 1) % n };
            let next = self.follows.get(&(before, last)).copied().unwrap_or(straight);
            found.push(next);
            (before, last) = (Some(last), next);
        }
        found
    }
}

impl State {
    /// An idle buffer, as an index, and the block to read into it.
    fn next_read(&self) -> Option<(usize, usize)> {
        if self.failed.is_some() {
            return None;
        }
        for (position, &block) in self.plan.iter().enumerate() {
            let is_there = self.idle.iter().any(|slot| slot.holds == Some(block));
            if is_there || self.out.iter().any(|(out, lease)| *out == block && lease.strong_count() > 0) {
                continue;
            }
            // When each idle buffer's block is needed again.
            let need = |slot: &Slot| match slot.holds {
                None => usize::MAX,
                Some(held) => self.plan.iter().position(|&b| b == held).unwrap_or(usize::MAX - 1),
            };
            let victim = (0..self.idle.len()).max_by_key(|&i| need(&self.idle[i]))?;
            return (need(&self.idle[victim]) > position).then_some((victim, block));
        }
        None
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what is expected next, until the store is dropped.
    fn read_ahead(&self) {
        // Nobody waits for a thread that is gone, however it ended.
        let _end = End(self);
        let mut state = self.lock();
        loop {
            if state.stop {
                return;
            }
            let Some((victim, block)) = state.next_read() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let mut slot = state.idle.swap_remove(victim);
            state.reading = Some(block);
            drop(state);
            slot.holds = None;
            let start = Instant::now();
            let span = tracing::debug_span!("stream_read", index = block, bytes = self.source.bytes(block)).entered();
            let result = self.source.fill(block, &mut slot.buffer);
            drop(span);
            add(&self.reading_ns, start);
            state = self.lock();
            state.reading = None;
            match result {
                Ok(()) => {
                    slot.holds = Some(block);
                    self.bytes.fetch_add(self.source.bytes(block) as u64, Ordering::Relaxed);
                }
                Err(error) => state.failed = Some((block, error)),
            }
            state.idle.push(slot);
            self.changed.notify_all();
        }
    }

    /// A filled buffer with block `index`.
    fn wait_for(self: &Arc<Self>, mut state: MutexGuard<'_, State>, index: usize) -> Result<Arc<Lease>, ModelError> {
        let start = Instant::now();
        loop {
            if let Some((block, error)) = state.failed.take() {
                if block == index {
                    return Err(error);
                }
                // It was read too early to matter; it is tried again when it is due.
                self.changed.notify_all();
            }
            let held = state.out.iter().find(|(block, _)| *block == index).and_then(|(_, lease)| lease.upgrade());
            if let Some(lease) = held {
                return Ok(lease);
            }
            if let Some(at) = state.idle.iter().position(|slot| slot.holds == Some(index)) {
                let slot = state.idle.swap_remove(at);
                let lease = Arc::new(Lease { slot: Some(slot), shared: self.clone() });
                state.out.push((index, Arc::downgrade(&lease)));
                drop(state);
                // A buffer less is idle, and another block is due.
                self.changed.notify_all();
                add(&self.waiting_ns, start);
                return Ok(lease);
            }
            if state.stop {
                return Err(ModelError::Value {
                    what: format!("block {index}, which is streamed from storage"),
                    expected: "a thread that reads it".into(),
                    found: "that it has ended".into(),
                });
            }
            if state.idle.is_empty() && state.reading.is_none() && start.elapsed() > PATIENCE {
                return Err(ModelError::Value {
                    what: format!("memory for block {index}, which is streamed from storage"),
                    expected: "a buffer that nobody uses".into(),
                    found: format!("all {} in use for {} s; give more memory", state.out.len(), PATIENCE.as_secs()),
                });
            }
            let waited = self.changed.wait_timeout(state, PATIENCE / 4);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Tells those who wait that the thread has ended.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.lock().stop = true;
        self.0.changed.notify_all();
    }
}

fn add(sum: &AtomicU64, start: Instant) {
    sum.fetch_add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

impl StreamedStore {
    /// Reads the blocks that stay, and starts the thread that reads the others.
    ///
    /// # Errors
    /// Something cannot be read, or the thread cannot be started.
    ///
    /// # Panics
    /// If the placement is for another number of blocks.
    pub fn new(source: BlockSource, placement: &Placement) -> Result<Self, ModelError> {
        assert_eq!(placement.resident.len(), source.n_blocks(), "a placement of this model's blocks");
        let (mut resident, mut vectors) = (Vec::new(), Vec::new());
        for (index, &stays) in placement.resident.iter().enumerate() {
            let of_block = source.vectors(index)?;
            let block = stays.then(|| {
                let mut buffer = StorageBuffer::new(source.bytes(index));
                source.fill(index, &mut buffer)?;
                Ok::<_, ModelError>(of_block.with(source.weights(index, &bytes::Bytes::from_owner(buffer))?))
            });
            resident.push(block.transpose()?);
            vectors.push(of_block);
        }
        let streamed = (0..source.n_blocks()).filter(|&index| !placement.resident[index]);
        let bytes = streamed.map(|index| source.bytes(index)).max();
        let slot = |bytes: usize| {
            let mut buffer = StorageBuffer::new(bytes);
            // Its memory is taken now, not little by little.
            buffer.as_mut().fill(1);
            Slot { buffer, holds: None }
        };
        let idle = bytes.into_iter().flat_map(|bytes| (0..placement.slots).map(move |_| slot(bytes))).collect();
        let plan = (0..source.n_blocks()).filter(|&index| !placement.resident[index]).collect();
        let shared = Arc::new(Shared {
            source,
            state: Mutex::new(State { idle, plan, ..State::default() }),
            changed: Condvar::new(),
            bytes: AtomicU64::new(0),
            reading_ns: AtomicU64::new(0),
            waiting_ns: AtomicU64::new(0),
        });
        let of_thread = shared.clone();
        let reader = std::thread::Builder::new().name("edgellm-storage".into()).spawn(move || of_thread.read_ahead());
        let reader = reader.map_err(|error| ModelError::Value {
            what: "thread that reads weights from storage".into(),
            expected: "one more".into(),
            found: error.to_string(),
        })?;
        Ok(Self { shared, resident, vectors, reader: Some(reader) })
    }

    /// What was read and waited for since the store was made.
    pub fn streamed(&self) -> Streamed {
        let seconds = |ns: &AtomicU64| ns.load(Ordering::Relaxed) as f64 * 1e-9;
        Streamed {
            bytes: self.shared.bytes.load(Ordering::Relaxed),
            reading: seconds(&self.shared.reading_ns),
            waiting: seconds(&self.shared.waiting_ns),
        }
    }
}

impl WeightStore for StreamedStore {
    fn n_blocks(&self) -> usize {
        self.resident.len()
    }

    fn block(&self, index: usize) -> Result<Block, ModelError> {
        let n = self.n_blocks();
        let Some(resident) = self.resident.get(index) else {
            return Err(ModelError::Value {
                what: "block index".into(),
                expected: format!("below {n}"),
                found: index.to_string(),
            });
        };
        let mut state = self.shared.lock();
        state.order.visit(index);
        // As far as a round goes, so that what is overwritten is what is needed last.
        let mut plan: Vec<usize> = std::iter::once(index).chain(state.order.ahead(n, 2 * n)).collect();
        plan.retain(|&block| self.resident[block].is_none());
        let mut seen = vec![false; n];
        plan.retain(|&block| !std::mem::replace(&mut seen[block], true));
        if let Some(block) = resident {
            // The reader goes on with what follows.
            state.plan = plan;
            drop(state);
            self.shared.changed.notify_all();
            return Ok(block.clone());
        }
        state.plan = plan;
        self.shared.changed.notify_all();
        let lease = self.shared.wait_for(state, index)?;
        let weights = self.shared.source.weights(index, &bytes::Bytes::from_owner(Held(lease)))?;
        Ok(self.vectors[index].with(weights))
    }

    fn layouts(&self, index: usize) -> Result<Vec<PackedLayout>, ModelError> {
        if index >= self.n_blocks() {
            self.block(index)?;
        }
        Ok(self.shared.source.layouts(index))
    }
}

impl Drop for StreamedStore {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(reader) = self.reader.take() {
            // A reader that panicked has nothing to say here: whoever waited for it has failed before.
            let _ = reader.join();
        }
    }
}
