//! Measuring a device: half a minute of reading memory, multiplying matrices and starting threads.
//!
//! - **Bandwidth**: a buffer far larger than the caches is summed by 1, 2, ... threads, each its own part; best of
//!   three. Reads only, as in decoding a token.
//! - **Multiply-adds**: a square f32 matrix product on one thread, with the same matrix kernels that a prefill uses; best
//!   of several. Cores of a slower kind are scaled by the system's figure for their capacity, since a portable
//!   program cannot choose the core it runs on.
//! - **Hand-over**: the median time of an empty parallel region on all threads.
//! - **Storage**: a file of 256 MB is written and read past the system's cache, with 1, 2, 4 and 8 requests at once.
//! - **Decoding**: products with matrices of every packed format, and decoders of two sizes, with 1, 2, ... threads.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use edgellm_model::generate::to_vec;
use edgellm_model::values::{CoreKind, DeviceProfile, Value};

use crate::error::{Result, SchedError};
use crate::{decode, storage, system};

/// Bytes that are read to measure the bandwidth: larger than the caches of any device that this is for.
const BUFFER_BYTES: usize = 256 << 20;
/// Rows and columns of the matrices.
const MATRIX: usize = 384;
/// How long matrices are multiplied.
const MATRIX_TIME: Duration = Duration::from_millis(400);
/// Parallel regions that are timed.
const HANDOVERS: usize = 400;

/// What to measure, and what is known already.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProfileRequest {
    /// Name of the device; `None` for what the system calls it.
    pub name: Option<String>,
    /// Memory that a process may use; `None` to ask the system.
    pub usable_bytes: Option<u64>,
    /// Threads at most; `None` for all.
    pub threads: Option<NonZeroUsize>,
    /// A folder on the storage that holds models, in which a file is written and removed again; `None` for no figure.
    pub storage: Option<PathBuf>,
}

/// Measures the device that this runs on. Takes about half a minute, in which nothing else should run. `on_step` gets the
/// parts that are done and how many there are.
///
/// # Errors
/// The system does not tell how much memory there is and `request` neither, threads cannot be started, or a clock
/// did not move.
pub fn measure_profile(request: &ProfileRequest, on_step: &mut dyn FnMut(usize, usize)) -> Result<DeviceProfile> {
    let usable_bytes = match request.usable_bytes.or_else(system::usable_bytes) {
        Some(bytes) => bytes,
        None => return Err(SchedError::Unknown { what: "how much memory there is" }),
    };
    let available = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = request.threads.map_or(available, |t| t.get().min(available));
    let buffer = BUFFER_BYTES.min((usable_bytes / 4) as usize).max(1 << 20);
    Ok(DeviceProfile {
        format_version: DeviceProfile::VERSION,
        name: request.name.clone().unwrap_or_else(system::device_name),
        source: DeviceProfile::MEASURED.into(),
        measured_on: Some(system::device_name()),
        cores: core_kinds(gmacs_of_one_thread()?, threads, &system::core_capacities()),
        read_gbps: read_gbps(buffer, threads)?,
        handover_us: handover_us(threads)?,
        usable_bytes,
        decode: decode::measure(threads, buffer as u64, on_step)?,
        storage: request.storage.as_deref().map(storage::measure).transpose()?.unwrap_or_default(),
    })
}

/// Kinds of cores for a rate measured on the fastest; one kind where the system tells no capacities. Of more cores than
/// threads, the fastest count.
fn core_kinds(gmacs: f64, threads: usize, capacities: &[(u64, usize)]) -> Vec<CoreKind> {
    let Some(&(top, _)) = capacities.first() else {
        return vec![CoreKind { name: "cores".into(), count: threads, gmacs_f32: gmacs }];
    };
    let mut left = threads;
    let mut kinds = Vec::new();
    for (index, &(capacity, count)) in capacities.iter().enumerate() {
        let count = count.min(left);
        if count == 0 {
            break;
        }
        left -= count;
        let name = match (index, capacities.len()) {
            (0, _) => "performance".into(),
            (i, n) if i + 1 == n => "efficiency".into(),
            (i, _) => format!("middle {i}"),
        };
        kinds.push(CoreKind { name, count, gmacs_f32: (gmacs * capacity as f64 / top as f64 * 1e3).round() / 1e3 });
    }
    kinds
}

/// Read bandwidth in GB/s with 1, 2, ... `threads` threads.
fn read_gbps(bytes: usize, threads: usize) -> Result<Vec<f64>> {
    // Not zeros, which the system might back with one shared page.
    let buffer: Vec<u64> = (0..bytes as u64 / 8).collect();
    let expected = checksum(&buffer);
    let mut rates = Vec::with_capacity(threads);
    for count in 1..=threads {
        let part = buffer.len().div_ceil(count);
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            let sum = std::thread::scope(|scope| {
                let workers: Vec<_> = buffer.chunks(part).map(|part| scope.spawn(move || checksum(part))).collect();
                workers.into_iter().map(|w| w.join().unwrap_or(0)).fold(0u64, u64::wrapping_add)
            });
            best = best.min(start.elapsed().as_secs_f64());
            if sum != expected {
                return Err(SchedError::Threads { threads: count, reason: "a part of the memory was not read".into() });
            }
        }
        rates.push(rate("the read bandwidth", bytes as f64 / best / 1e9)?);
    }
    Ok(rates)
}

/// The wrapping sum, in eight lanes, which compilers turn into vector code.
fn checksum(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 8];
    let mut chunks = values.chunks_exact(8);
    for chunk in &mut chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    let rest = chunks.remainder().iter().copied().fold(0u64, u64::wrapping_add);
    black_box(lanes.into_iter().fold(rest, u64::wrapping_add))
}

/// f32 multiply-adds per second of one thread, in units of 1e9.
fn gmacs_of_one_thread() -> Result<f64> {
    pool(1)?.install(|| {
        let device = Device::flex();
        let x = Tensor::<2>::ones([MATRIX, MATRIX], &device);
        let start = Instant::now();
        let mut best = f64::INFINITY;
        while start.elapsed() < MATRIX_TIME {
            let one = Instant::now();
            let product = x.clone().matmul(x.clone());
            black_box(to_vec(product.narrow(0, 0, 1))?);
            best = best.min(one.elapsed().as_secs_f64());
        }
        rate("the multiply-add rate", (MATRIX as f64).powi(3) / best / 1e9)
    })
}

/// Microseconds to start and join a parallel region on `threads` threads.
fn handover_us(threads: usize) -> Result<f64> {
    let pool = pool(threads)?;
    let mut times: Vec<f64> = (0..HANDOVERS)
        .map(|_| {
            let start = Instant::now();
            pool.broadcast(|context| black_box(context.index()));
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    rate("the hand-over time", times[times.len() / 2])
}

fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    let built = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    built.map_err(|e| SchedError::Threads { threads, reason: e.to_string() })
}

/// A measured figure to three decimals, which is more than repeated measurements agree on.
pub(crate) fn rate(what: &'static str, value: f64) -> Result<f64> {
    let rounded = (value * 1e3).round() / 1e3;
    if rounded.is_finite() && rounded > 0.0 { Ok(rounded) } else { Err(SchedError::Measurement { what, found: value }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Roofline;

    #[test]
    fn this_machine_has_a_profile_that_the_cost_model_takes() {
        let folder = tempfile::tempdir().unwrap();
        let request = ProfileRequest {
            name: Some("here".into()),
            usable_bytes: Some(1 << 30),
            threads: NonZeroUsize::new(2),
            storage: Some(folder.path().to_owned()),
        };
        let profile = measure_profile(&request, &mut |_, _| {}).unwrap();
        assert_eq!((profile.name.as_str(), profile.usable_bytes), ("here", 1 << 30));
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(2);
        assert_eq!(profile.read_gbps.len(), threads);
        assert_eq!(profile.cores.iter().map(|c| c.count).sum::<usize>(), threads);
        assert_eq!(profile.decode.len(), threads);
        for rates in &profile.decode {
            assert!(rates.formats.iter().all(|f| f.ns_per_weight > 0.0), "{rates:?}");
            let rate = |name: &str| rates.formats.iter().find(|f| f.format == name).unwrap().ns_per_weight;
            assert!(rate("f32") > rate("q2g32s"), "{rates:?}");
        }
        assert!(profile.storage.iter().all(|rate| rate.gbps > 0.0), "{:?}", profile.storage);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file is removed");
        Roofline::new(profile.clone()).unwrap();
        let text = serde_json::to_string(&profile).unwrap();
        assert_eq!(serde_json::from_str::<DeviceProfile>(&text).unwrap(), profile);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_its_memory_and_a_name() {
        assert!(system::usable_bytes().unwrap() > 1 << 20);
        assert!(!system::device_name().is_empty());
    }

    #[test]
    fn kinds_follow_capacities_fastest_first() {
        let kinds = core_kinds(8.0, 7, &[(1024, 2), (512, 4), (256, 4)]);
        let found: Vec<_> = kinds.iter().map(|k| (k.name.as_str(), k.count, k.gmacs_f32)).collect();
        assert_eq!(found, [("performance", 2, 8.0), ("middle 1", 4, 4.0), ("efficiency", 1, 2.0)]);
        assert_eq!(core_kinds(8.0, 3, &[])[0].count, 3);
        assert_eq!(core_kinds(8.0, 1, &[(1024, 4), (512, 4)]).len(), 1);
    }

    #[test]
    fn the_checksum_reads_everything() {
        for len in [0u64, 1, 7, 8, 9, 100] {
            let values: Vec<u64> = (0..len).collect();
            assert_eq!(checksum(&values), len * len.saturating_sub(1) / 2);
        }
    }
}
