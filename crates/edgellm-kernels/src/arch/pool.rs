//! Threads for many small parallel regions: decoding a token takes hundreds, of a few microseconds each.
//!
//! A region is a number of items that the caller and the helpers take one by one, so that fast and slow cores
//! (big.LITTLE) each do what they can. A helper that has nothing to do spins for [`SPIN`] and then sleeps; the caller
//! publishes a region with one store, wakes sleepers only if there are any, and at the end waits only for helpers that
//! joined: one that is still asleep costs nothing. With one thread, or inside another region, items run where they
//! are, without any of this.
//!
//! The state is one word: a region's number, whether helpers may join it, and how many are in it.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long a helper waits awake for the next region.
const SPIN: Duration = Duration::from_micros(100);
/// Helpers in the region.
const ACTIVE: u64 = 0xffff;
/// Helpers may join.
const OPEN: u64 = 1 << 16;
/// One region.
const REGION: u64 = 1 << 17;

/// The items of a region: calls `run(i)` for each `i` it takes.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// A region, as helpers see it.
#[derive(Clone, Copy)]
struct Region {
    run: Work<'static>,
    items: usize,
}

struct Pool {
    state: AtomicU64,
    region: UnsafeCell<Option<Region>>,
    /// The next item.
    next: AtomicUsize,
    panicked: AtomicBool,
    /// The first panic of a helper.
    payload: Mutex<Option<Box<dyn Any + Send>>>,
    /// Held by the caller of a region.
    turn: Mutex<()>,
    /// Threads that may work, the caller included; 0 before the first use.
    threads: AtomicUsize,
    /// Helpers that were started.
    started: Mutex<usize>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `region` is written only by the holder of `turn` while no helper is in a region and none may join, and read
// by helpers that joined; joining and leaving synchronize through `state`.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool {
    state: AtomicU64::new(0),
    region: UnsafeCell::new(None),
    next: AtomicUsize::new(0),
    panicked: AtomicBool::new(false),
    payload: Mutex::new(None),
    turn: Mutex::new(()),
    threads: AtomicUsize::new(0),
    started: Mutex::new(0),
    sleepers: AtomicUsize::new(0),
    sleep: Mutex::new(()),
    wake: Condvar::new(),
};

/// Threads that the CPU kernels use, the calling one included: what [`set_threads`] chose, else the number of
/// processors that this process may use.
pub fn threads() -> usize {
    match POOL.threads.load(Ordering::Relaxed) {
        0 => {
            static AVAILABLE: OnceLock<usize> = OnceLock::new();
            *AVAILABLE.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
        }
        n => n,
    }
}

/// Uses so many threads from now on, at least one, in the whole process.
pub fn set_threads(threads: usize) {
    POOL.threads.store(threads.clamp(1, ACTIVE as usize), Ordering::Relaxed);
}

/// Calls `f(i, item)` for every item, on several threads.
///
/// # Panics
/// If `f` does, after all threads have stopped.
pub(crate) fn for_each_mut<T: Send>(items: &mut [T], f: impl Fn(usize, &mut T) + Sync) {
    struct Start<T>(*mut T);
    // SAFETY: only used to hand out each item to one thread; items are `Send`.
    unsafe impl<T: Send> Sync for Start<T> {}
    impl<T> Start<T> {
        fn get(&self) -> *mut T {
            self.0
        }
    }
    let (start, count) = (Start(items.as_mut_ptr()), items.len());
    for_each(count, |i| {
        // SAFETY: `i < count`, and every `i` is taken once.
        f(i, unsafe { &mut *start.get().add(i) });
    });
}

/// Calls `f(i)` for every `i` below `items`, on several threads.
///
/// # Panics
/// If `f` does, after all threads have stopped.
pub(crate) fn for_each(items: usize, f: impl Fn(usize) + Sync) {
    let threads = threads().min(items);
    let turn = match threads {
        0 | 1 => None,
        _ => match POOL.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        },
    };
    let Some(_turn) = turn else {
        (0..items).for_each(f);
        return;
    };
    POOL.start_helpers(threads - 1);
    POOL.run(&f, items);
}

impl Pool {
    /// Runs a region. The caller holds `turn`.
    fn run(&self, f: Work<'_>, items: usize) {
        // SAFETY: helpers call `run` only while they are in the region, and this function returns only when none is
        // in it and none may join any more.
        let run: Work<'static> = unsafe { core::mem::transmute::<Work<'_>, Work<'static>>(f) };
        // SAFETY: the region before was closed and left by all; this thread holds `turn`.
        unsafe { *self.region.get() = Some(Region { run, items }) };
        self.next.store(0, Ordering::Relaxed);
        let number = (self.state.load(Ordering::Relaxed) & !(OPEN | ACTIVE)).wrapping_add(REGION);
        self.state.store(number | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| self.take_items(run, items)));
        if own.is_err() {
            self.next.store(items, Ordering::Relaxed);
        }
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.state.load(Ordering::Acquire) & ACTIVE != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { core::hint::spin_loop() }
        }
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if self.panicked.swap(false, Ordering::AcqRel) {
            let payload = self.payload.lock().unwrap_or_else(PoisonError::into_inner).take();
            resume_unwind(payload.unwrap_or_else(|| Box::new("a helper thread panicked")));
        }
    }

    fn take_items(&self, run: Work<'_>, items: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= items {
                return;
            }
            run(i);
        }
    }

    fn start_helpers(&'static self, wanted: usize) {
        // Without the lock: the number only grows, and a stale one is corrected below.
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        if STARTED.load(Ordering::Relaxed) >= wanted {
            return;
        }
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        while *started < wanted {
            let index = *started;
            let thread = std::thread::Builder::new().name(format!("edgellm-{}", index + 1));
            // A system without another thread to give computes with those that there are.
            if thread.spawn(move || self.help(index)).is_err() {
                break;
            }
            *started += 1;
        }
        STARTED.store((*started).max(wanted), Ordering::Relaxed);
    }

    /// A helper's life.
    fn help(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(index, seen);
            // SAFETY: this helper joined the region, so it is not replaced until it leaves.
            let region = unsafe { *self.region.get() };
            if let Some(Region { run, items }) = region {
                let result = catch_unwind(AssertUnwindSafe(|| self.take_items(run, items)));
                if let Err(panic) = result {
                    self.next.store(items, Ordering::Relaxed);
                    self.payload.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
                    self.panicked.store(true, Ordering::Release);
                }
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for a region other than `seen` and joins it; returns its number.
    fn wait(&self, index: usize, seen: u64) -> u64 {
        loop {
            let start = Instant::now();
            let mut spins = 0u32;
            loop {
                if let Some(number) = self.join(index, seen) {
                    return number;
                }
                core::hint::spin_loop();
                spins += 1;
                if spins.is_multiple_of(64) && start.elapsed() > SPIN {
                    break;
                }
            }
            let guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let joined = self.join(index, seen);
            if joined.is_none() {
                drop(self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner));
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            if let Some(number) = joined {
                return number;
            }
        }
    }

    /// Joins the open region, if there is one that this helper has not seen and may work in.
    fn join(&self, index: usize, seen: u64) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        let number = state & !(OPEN | ACTIVE);
        if state & OPEN == 0 || number == seen || index + 1 >= threads() {
            return None;
        }
        let joined = self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
        joined.is_ok().then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once_whatever_the_threads() {
        for n in [1, 2, 3, 8] {
            set_threads(n);
            assert_eq!(threads(), n);
            for items in [0, 1, 2, 7, 1000] {
                for _ in 0..20 {
                    let mut counts = vec![0u32; items];
                    for_each_mut(&mut counts, |i, count| *count += 1 + i as u32);
                    assert!(counts.iter().enumerate().all(|(i, &count)| count == 1 + i as u32));
                }
            }
            // After a pause the helpers are asleep.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn regions_inside_and_beside_each_other() {
        set_threads(3);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let add = |i| _ = sum.fetch_add(i, Ordering::Relaxed);
                        for_each(5, |_| for_each(4, add));
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 50 * 5 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        set_threads(4);
        for _ in 0..10 {
            let result = catch_unwind(|| for_each(100, |i| assert_ne!(i, 57, "item")));
            assert!(result.is_err());
            let done = AtomicUsize::new(0);
            for_each(100, |_| _ = done.fetch_add(1, Ordering::Relaxed));
            assert_eq!(done.into_inner(), 100);
        }
    }
}
