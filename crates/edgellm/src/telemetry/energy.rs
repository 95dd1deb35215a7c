//! Energy that this device has used, where it tells: processors' counters, or the power of its supply.
//!
//! Linux's powercap has a counter of microjoules for each processor package (`intel-rapl:N/energy_uj`), which begins again
//! at 0 behind `max_energy_range_uj`. Boards have sensors of power in microwatts (`hwmon*/power1_input`), and phones
//! tell the battery's while it discharges; power is integrated from reading to reading.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Reads the energy used between two readings.
#[derive(Debug)]
pub(super) struct EnergyMeter {
    counters: Vec<Counter>,
    power: Vec<Power>,
    last: Instant,
    last_watts: f64,
}

#[derive(Debug)]
struct Counter {
    path: PathBuf,
    range: u64,
    last: u64,
}

#[derive(Debug)]
enum Power {
    /// Microwatts.
    Sensor(PathBuf),
    /// A folder of a power supply.
    Battery(PathBuf),
}

impl EnergyMeter {
    /// The meter of the system below `root` (`/sys`); `None` where nothing tells.
    pub(super) fn open(root: &Path) -> Option<Self> {
        let counters: Vec<Counter> = entries(&root.join("class/powercap"))
            .filter(|path| is_package(path))
            .filter_map(|path| {
                let range = number(&path.join("max_energy_range_uj"))?;
                let path = path.join("energy_uj");
                Some(Counter { last: number(&path)?, path, range })
            })
            .collect();
        let mut power = Vec::new();
        // Counters are exact; sensors would count the same energy twice.
        if counters.is_empty() {
            let sensors = entries(&root.join("class/hwmon")).map(|path| path.join("power1_input"));
            power.extend(sensors.filter(|path| number(path).is_some()).map(Power::Sensor));
        }
        if counters.is_empty() && power.is_empty() {
            let batteries = entries(&root.join("class/power_supply")).map(Power::Battery);
            power.extend(batteries.filter(|battery| battery.watts().is_some()));
        }
        let mut meter = Self { counters, power, last: Instant::now(), last_watts: 0.0 };
        meter.last_watts = meter.watts();
        (!meter.counters.is_empty() || !meter.power.is_empty()).then_some(meter)
    }

    /// Joules since the last reading.
    pub(super) fn read(&mut self) -> f64 {
        let mut microjoules = 0.0;
        for counter in &mut self.counters {
            let Some(now) = number(&counter.path) else { continue };
            let used =
                if now >= counter.last { now - counter.last } else { counter.range.saturating_sub(counter.last) + now };
            microjoules += used as f64;
            counter.last = now;
        }
        let (now, watts) = (Instant::now(), self.watts());
        let from_power = (watts + self.last_watts) / 2.0 * (now - self.last).as_secs_f64();
        (self.last, self.last_watts) = (now, watts);
        microjoules * 1e-6 + from_power
    }

    fn watts(&self) -> f64 {
        self.power.iter().filter_map(Power::watts).sum()
    }
}

impl Power {
    fn watts(&self) -> Option<f64> {
        match self {
            Power::Sensor(path) => Some(number(path)? as f64 * 1e-6),
            Power::Battery(folder) => {
                let status = fs::read_to_string(folder.join("status")).ok()?;
                if status.trim() != "Discharging" {
                    return None;
                }
                let volts = || Some(number(&folder.join("voltage_now"))? as f64 * 1e-6);
                // Some drivers give the current of a discharge a sign.
                let amperes = || Some(signed(&folder.join("current_now"))?.unsigned_abs() as f64 * 1e-6);
                let direct = signed(&folder.join("power_now")).map(|p| p.unsigned_abs() as f64 * 1e-6);
                direct.or_else(|| Some(volts()? * amperes()?))
            }
        }
    }
}

/// Whether a powercap zone is a whole package: `intel-rapl:0`, but not its part `intel-rapl:0:0`.
fn is_package(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("intel-rapl:") && name.matches(':').count() == 1
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths.into_iter()
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn signed(path: &Path) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, value: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{value}\n")).unwrap();
    }

    #[test]
    fn counters_are_summed_over_packages_and_wrap() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (zone, energy) in [("intel-rapl:0", "900"), ("intel-rapl:1", "5"), ("intel-rapl:0:0", "77")] {
            write(root, &format!("class/powercap/{zone}/energy_uj"), energy);
            write(root, &format!("class/powercap/{zone}/max_energy_range_uj"), "1000");
        }
        let mut meter = EnergyMeter::open(root).unwrap();
        write(root, "class/powercap/intel-rapl:0/energy_uj", "100");
        write(root, "class/powercap/intel-rapl:1/energy_uj", "25");
        assert!((meter.read() - 220e-6).abs() < 1e-12);
        assert_eq!(meter.read(), 0.0);
    }

    #[test]
    fn a_battery_tells_power_while_it_discharges() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert!(EnergyMeter::open(root).is_none());
        write(root, "class/power_supply/BAT0/status", "Charging");
        write(root, "class/power_supply/BAT0/voltage_now", "4000000");
        write(root, "class/power_supply/BAT0/current_now", "-500000");
        assert!(EnergyMeter::open(root).is_none());
        write(root, "class/power_supply/BAT0/status", "Discharging");
        let mut meter = EnergyMeter::open(root).unwrap();
        assert!((meter.watts() - 2.0).abs() < 1e-9);
        let before = meter.last;
        std::thread::sleep(std::time::Duration::from_millis(5));
        let joules = meter.read();
        assert!((joules - 2.0 * (meter.last - before).as_secs_f64()).abs() < 1e-9 && joules > 0.0);
    }
}
