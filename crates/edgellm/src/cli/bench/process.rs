//! What this process has used so far: processor time and memory, as Linux tells it.

use std::fs;

/// Nanoseconds that the threads of this process have run on a processor, or `None` where the system does not tell.
///
/// The sum over the threads that are alive: those of the pool live as long as the process, so that a difference of two
/// readings is what the work between them took on all of them. The kernel counts at its ticks, every few milliseconds.
pub(crate) fn cpu_ns() -> Option<u64> {
    let mut sum = 0u64;
    for task in fs::read_dir("/proc/self/task").ok()? {
        // A thread that ended meanwhile has no file left.
        let Ok(text) = fs::read_to_string(task.ok()?.path().join("schedstat")) else { continue };
        sum += run_time(&text)?;
    }
    (sum > 0).then_some(sum)
}

/// The first of the three numbers in `schedstat`.
fn run_time(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().next()?.parse().ok()
}

/// Lets the peak of the resident memory start again from what is resident now. Where the system does not offer that,
/// the peak stays that of the whole process.
pub(crate) fn reset_peak_rss() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_time_is_the_first_number() {
        assert_eq!(run_time("50324 1200 7\n"), Some(50324));
        assert_eq!(run_time(""), None);
        assert_eq!(run_time("x 1 2"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn work_takes_processor_time() {
        let Some(before) = cpu_ns() else { return };
        let start = std::time::Instant::now();
        while start.elapsed().as_millis() < 60 {
            std::hint::black_box(start);
        }
        assert!(cpu_ns().unwrap() > before);
    }
}
