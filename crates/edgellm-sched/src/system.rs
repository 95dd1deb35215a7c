//! What the operating system says of the device, from its files: names, kinds of cores, memory.
//!
//! The texts are parsed by functions of their own, so that they are tested on every system.

use std::fs;
use std::path::{Path, PathBuf};

/// Number of CPUs for each distinct capacity, largest first, from `/sys/devices/system/cpu/cpu*/cpu_capacity` (Linux
/// on ARM). Empty where the system does not tell.
pub(crate) fn core_capacities() -> Vec<(u64, usize)> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
    let capacity = |path: PathBuf| fs::read_to_string(path.join("cpu_capacity")).ok()?.trim().parse::<u64>().ok();
    group(entries.flatten().filter_map(|entry| capacity(entry.path())).collect())
}

/// Distinct values with their counts, largest first.
fn group(mut capacities: Vec<u64>) -> Vec<(u64, usize)> {
    capacities.retain(|&c| c > 0);
    capacities.sort_unstable_by(|a, b| b.cmp(a));
    let mut groups: Vec<(u64, usize)> = Vec::new();
    for capacity in capacities {
        match groups.last_mut() {
            Some((last, count)) if *last == capacity => *count += 1,
            _ => groups.push((capacity, 1)),
        }
    }
    groups
}

/// A name for the device: the board's or the processor's, or else the instruction set.
pub fn device_name() -> String {
    let board = fs::read_to_string("/proc/device-tree/model").ok();
    let board = board.map(|text| text.trim_end_matches('\0').trim().to_owned()).filter(|name| !name.is_empty());
    let processor = || field(&fs::read_to_string("/proc/cpuinfo").ok()?, "model name").map(str::to_owned);
    board.or_else(processor).unwrap_or_else(|| format!("{} {}", std::env::consts::OS, std::env::consts::ARCH))
}

/// Bytes that this process may use: what the system has available, and what the control groups still allow. `None`
/// where neither is told.
pub fn usable_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok();
    let available = meminfo.as_deref().and_then(mem_available);
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let allowed = cgroup_folders(&cgroups).iter().filter_map(|folder| folder.left()).min();
    match (available, allowed) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The value of `name : value` in the style of `/proc`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim()).filter(|v| !v.is_empty())
    })
}

fn mem_available(meminfo: &str) -> Option<u64> {
    field(meminfo, "MemAvailable")?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A folder of a memory control group, version 1 or 2.
#[derive(Debug, PartialEq)]
struct CgroupFolder {
    path: PathBuf,
    v2: bool,
}

impl CgroupFolder {
    /// Limit minus use; pages of files count as free: the system takes them back when memory is wanted.
    fn left(&self) -> Option<u64> {
        let (limit, usage) =
            if self.v2 { ("memory.max", "memory.current") } else { ("memory.limit_in_bytes", "memory.usage_in_bytes") };
        let read = |name: &str| fs::read_to_string(self.path.join(name)).ok();
        cgroup_left(&read(limit)?, &read(usage)?, &read("memory.stat").unwrap_or_default())
    }
}

fn cgroup_left(limit: &str, usage: &str, stat: &str) -> Option<u64> {
    // "max" is no limit and no number.
    let limit: u64 = limit.trim().parse().ok()?;
    let usage: u64 = usage.trim().parse().ok()?;
    let files = |name: &str| {
        let value = |line: &str| line.strip_prefix(name)?.trim().parse::<u64>().ok();
        stat.lines().find_map(value).unwrap_or(0)
    };
    let cached = files("inactive_file ") + files("active_file ");
    Some(limit.saturating_sub(usage.saturating_sub(cached)))
}

/// The folders that limit this process, from its own group to the root, given `/proc/self/cgroup`.
fn cgroup_folders(text: &str) -> Vec<CgroupFolder> {
    let mut folders = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let v2 = id == "0" && controllers.is_empty();
        if !v2 && !controllers.split(',').any(|c| c == "memory") {
            continue;
        }
        let root = Path::new(if v2 { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/memory" });
        let inner = Path::new(path.trim_start_matches('/'));
        folders.extend(inner.ancestors().map(|part| CgroupFolder { path: root.join(part), v2 }));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24737384 kB\nMemFree:        1 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(mem_available(text), Some(23_000_000 * 1024));
        assert_eq!(mem_available("MemAvailable: x kB\n"), None);
        assert_eq!(mem_available("MemTotal: 5 kB\n"), None);
    }

    #[test]
    fn cgroups_limit_what_is_left() {
        let stat = "anon 5\ninactive_file 30\nactive_file 7\n";
        assert_eq!(cgroup_left("1000\n", "400\n", stat), Some(637));
        assert_eq!(cgroup_left("max\n", "400\n", stat), None);
        assert_eq!(cgroup_left("100\n", "400\n", ""), Some(0));
    }

    #[test]
    fn every_ancestor_may_limit() {
        let folders = cgroup_folders("0::/user.slice/job\n");
        let paths: Vec<_> = folders.iter().map(|f| f.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/sys/fs/cgroup/user.slice/job", "/sys/fs/cgroup/user.slice", "/sys/fs/cgroup/"]);
        let folders = cgroup_folders("5:cpu,cpuacct:/a\n4:memory:/b\n");
        assert_eq!(folders[0], CgroupFolder { path: "/sys/fs/cgroup/memory/b".into(), v2: false });
        assert_eq!(folders.len(), 2);
    }

    #[test]
    fn cores_are_grouped_by_capacity() {
        assert_eq!(group(vec![446, 1024, 446, 1024, 871, 446, 0]), [(1024, 2), (871, 1), (446, 3)]);
    }

    #[test]
    fn names_come_from_fields() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: other\n";
        assert_eq!(field(text, "model name"), Some("Some CPU @ 2 GHz"));
        assert_eq!(field(text, "bogomips"), None);
    }
}
