//! Energy, where the device tells it: counters of processor packages, or sensors of power that are read again and again.
//!
//! In this order: RAPL through Linux's powercap (`intel-rapl:N/energy_uj`, also on AMD; often readable by root only), the
//! INA3221 sensors of NVIDIA Jetson boards (voltage times current of the whole board's input), a battery that discharges
//! (`power_supply`, as on Android). Where there is none of them, there is no meter, and no figure. A counter knows the
//! processor alone; sensors know the board or the whole device, with its screen.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Time between two readings of a sensor.
const PERIOD: Duration = Duration::from_millis(50);

/// Where energy is read.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// Counters in microjoules, each with the value at which it begins again.
    Counters(Vec<(PathBuf, u64)>),
    /// Millivolts and milliamperes.
    Board { millivolts: PathBuf, milliamperes: PathBuf },
    /// Microwatts; the sign differs between devices.
    BatteryPower(PathBuf),
    /// Microvolts and microamperes; the sign of the current differs between devices.
    Battery { microvolts: PathBuf, microamperes: PathBuf },
}

/// Measures energy from [`start`](Self::start) on.
#[derive(Debug)]
pub struct EnergyMeter {
    source: Source,
    reading: Reading,
}

#[derive(Debug)]
enum Reading {
    /// The last value of each counter, and microjoules so far.
    Counters { last: Vec<u64>, sum: u64 },
    /// Which a thread carries on until the meter is dropped.
    Sampled(Arc<Mutex<Integral>>),
}

/// Power over time, by the trapezoidal rule.
#[derive(Debug)]
struct Integral {
    /// `None` once the device stopped telling.
    watts: Option<f64>,
    time: Instant,
    joules: f64,
}

impl Integral {
    fn go_on(&mut self, watts: Option<f64>) {
        let now = Instant::now();
        if let (Some(before), Some(watts)) = (self.watts, watts) {
            self.joules += 0.5 * (before + watts) * (now - self.time).as_secs_f64();
        }
        (self.watts, self.time) = (self.watts.and(watts), now);
    }
}

impl EnergyMeter {
    /// Starts to measure; `None` where this device does not tell its energy, or not to this user.
    pub fn start() -> Option<Self> {
        Self::start_at(Path::new("/sys"))
    }

    fn start_at(root: &Path) -> Option<Self> {
        let source = find(root)?;
        let reading = match &source {
            Source::Counters(counters) => {
                let last = counters.iter().map(|(path, _)| number(path)).collect::<Option<_>>()?;
                Reading::Counters { last, sum: 0 }
            }
            Source::Board { .. } | Source::Battery { .. } | Source::BatteryPower(_) => {
                let integral = Integral { watts: Some(watts(&source)?), time: Instant::now(), joules: 0.0 };
                let integral = Arc::new(Mutex::new(integral));
                let (source, shared) = (source.clone(), Arc::downgrade(&integral));
                std::thread::spawn(move || sample(&source, &shared));
                Reading::Sampled(integral)
            }
        };
        Some(Self { source, reading })
    }

    /// What is measured: `processor`, `board` or `device`.
    pub fn scope(&self) -> &'static str {
        match self.source {
            Source::Counters(_) => "processor",
            Source::Board { .. } => "board",
            Source::Battery { .. } | Source::BatteryPower(_) => "device",
        }
    }

    /// Joules since the start; `None` if the device stopped telling meanwhile. Counters must be read before they begin
    /// again twice (minutes).
    pub fn joules(&mut self) -> Option<f64> {
        match (&mut self.reading, &self.source) {
            (Reading::Counters { last, sum }, Source::Counters(counters)) => {
                for (last, (path, range)) in last.iter_mut().zip(counters) {
                    let now = number(path)?;
                    *sum += since(*last, now, *range);
                    *last = now;
                }
                Some(*sum as f64 * 1e-6)
            }
            (Reading::Counters { .. }, _) => None,
            (Reading::Sampled(integral), source) => {
                let mut integral = lock(integral);
                integral.go_on(watts(source));
                integral.watts.map(|_| integral.joules)
            }
        }
    }
}

fn lock(integral: &Mutex<Integral>) -> MutexGuard<'_, Integral> {
    integral.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries an integral on while somebody has it and the device tells.
fn sample(source: &Source, integral: &Weak<Mutex<Integral>>) {
    loop {
        std::thread::sleep(PERIOD);
        let Some(integral) = integral.upgrade() else { return };
        let mut integral = lock(&integral);
        integral.go_on(watts(source));
        if integral.watts.is_none() {
            return;
        }
    }
}

/// The difference of two readings of a counter that goes up to `range`.
fn since(before: u64, after: u64, range: u64) -> u64 {
    if after >= before { after - before } else { range.saturating_sub(before).saturating_add(after) }
}

fn watts(source: &Source) -> Option<f64> {
    match source {
        Source::Counters(_) => None,
        Source::Board { millivolts, milliamperes } => {
            Some(number::<f64>(millivolts)? * number::<f64>(milliamperes)? * 1e-6)
        }
        Source::BatteryPower(microwatts) => Some(number::<f64>(microwatts)?.abs() * 1e-6),
        Source::Battery { microvolts, microamperes } => {
            Some(number::<f64>(microvolts)? * number::<f64>(microamperes)?.abs() * 1e-12)
        }
    }
}

fn number<T: std::str::FromStr>(path: &Path) -> Option<T> {
    text(path)?.parse().ok()
}

fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The entries of a folder, by name; none if it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

fn find(root: &Path) -> Option<Source> {
    counters(root).or_else(|| board(root)).or_else(|| battery(root))
}

/// Whole packages: `intel-rapl:0`, not their parts, `intel-rapl:0:0`, which they contain.
fn counters(root: &Path) -> Option<Source> {
    let is_package = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let package = text(&path.join("name")).is_some_and(|name| name.starts_with("package"));
        name.starts_with("intel-rapl:") && name.matches(':').count() == 1 && package
    };
    let packages = entries(&root.join("class/powercap")).into_iter().filter(is_package);
    let counter = |path: PathBuf| {
        let counter = path.join("energy_uj");
        number::<u64>(&counter)?;
        Some((counter, number(&path.join("max_energy_range_uj"))?))
    };
    let counters: Vec<_> = packages.map(counter).collect::<Option<_>>()?;
    (!counters.is_empty()).then_some(Source::Counters(counters))
}

/// The sensor of the whole board's input: `VDD_IN` of newer boards, `POM_5V_IN` of older ones.
fn board(root: &Path) -> Option<Source> {
    for device in entries(&root.join("class/hwmon")) {
        if text(&device.join("name")).is_none_or(|name| name != "ina3221") {
            continue;
        }
        for channel in 1..=3 {
            let label = text(&device.join(format!("in{channel}_label"))).unwrap_or_default();
            let millivolts = device.join(format!("in{channel}_input"));
            let milliamperes = device.join(format!("curr{channel}_input"));
            let source = Source::Board { millivolts, milliamperes };
            if ["VDD_IN", "POM_5V_IN"].contains(&label.as_str()) && watts(&source).is_some() {
                return Some(source);
            }
        }
    }
    None
}

/// A battery that nothing charges: otherwise its current is not what the device takes.
fn battery(root: &Path) -> Option<Source> {
    entries(&root.join("class/power_supply")).into_iter().find_map(|supply| {
        let is = |name: &str, value: &str| text(&supply.join(name)).is_some_and(|found| found == value);
        let power = Source::BatteryPower(supply.join("power_now"));
        let current =
            Source::Battery { microvolts: supply.join("voltage_now"), microamperes: supply.join("current_now") };
        let discharges = is("type", "Battery") && is("status", "Discharging");
        [power, current].into_iter().find(|source| discharges && watts(source).is_some())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, content) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{content}\n")).unwrap();
        }
    }

    #[test]
    fn a_device_that_tells_nothing_has_no_meter() {
        let root = tempfile::tempdir().unwrap();
        assert!(EnergyMeter::start_at(root.path()).is_none());
        let supply = "class/power_supply/BAT0";
        let files = [("type", "Battery"), ("status", "Charging"), ("voltage_now", "4000000"), ("current_now", "1")];
        write(
            root.path(),
            &files.map(|(name, value)| (format!("{supply}/{name}"), value)).each_ref().map(|(n, v)| (n.as_str(), *v)),
        );
        assert!(EnergyMeter::start_at(root.path()).is_none(), "a battery that is charged");
    }

    #[test]
    fn counters_of_packages_are_added_and_begin_again() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (zone, name, value) in
            [("0", "package-0", "1000000"), ("1", "package-1", "9000000"), ("0:0", "core", "5"), ("2", "psys", "5")]
        {
            let file = |file: &str| format!("class/powercap/intel-rapl:{zone}/{file}");
            write(
                root,
                &[(&file("name"), name), (&file("energy_uj"), value), (&file("max_energy_range_uj"), "10000000")],
            );
        }
        let mut meter = EnergyMeter::start_at(root).unwrap();
        assert_eq!(meter.scope(), "processor");
        let counter = |package| format!("class/powercap/intel-rapl:{package}/energy_uj");
        write(root, &[(&counter(0), "3500000"), (&counter(1), "500000")]);
        assert_eq!(meter.joules(), Some(2.5 + 1.5));
        // Sums go on from reading to reading.
        write(root, &[(&counter(0), "4000000")]);
        assert_eq!(meter.joules(), Some(2.5 + 1.5 + 0.5));
        fs::remove_file(root.join(counter(1))).unwrap();
        assert_eq!(meter.joules(), None);
    }

    #[test]
    fn sensors_are_read_while_time_passes() {
        let root = tempfile::tempdir().unwrap();
        let sensor = "class/hwmon/hwmon3";
        let file = |name: &str| format!("{sensor}/{name}");
        write(
            root.path(),
            &[
                (&file("name"), "ina3221"),
                (&file("in2_label"), "VDD_IN"),
                (&file("in2_input"), "5000"),
                (&file("curr2_input"), "2000"),
            ],
        );
        let start = Instant::now();
        let mut meter = EnergyMeter::start_at(root.path()).unwrap();
        assert_eq!(meter.scope(), "board");
        std::thread::sleep(Duration::from_millis(200));
        let joules = meter.joules().unwrap();
        let most = 10.0 * start.elapsed().as_secs_f64();
        assert!(joules > 1.9 && joules <= most, "{joules} of at most {most}");
        // What changes between two readings counts.
        write(root.path(), &[(&file("curr2_input"), "4000")]);
        std::thread::sleep(Duration::from_millis(200));
        assert!(meter.joules().unwrap() > joules + 3.0, "{:?} after {joules}", meter.joules());
        fs::remove_file(root.path().join(file("in2_input"))).unwrap();
        assert_eq!(meter.joules(), None);
    }

    #[test]
    fn a_battery_tells_power_while_it_discharges() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str| format!("class/power_supply/BAT0/{name}");
        let (kind, status) = (file("type"), file("status"));
        let (volts, amperes, power) = (file("voltage_now"), file("current_now"), file("power_now"));
        write(root.path(), &[(&kind, "Battery"), (&status, "Discharging"), (&volts, "4000000"), (&amperes, "-500000")]);
        let mut meter = EnergyMeter::start_at(root.path()).unwrap();
        assert_eq!((meter.scope(), watts(&meter.source)), ("device", Some(2.0)));
        std::thread::sleep(Duration::from_millis(20));
        assert!(meter.joules().unwrap() >= 0.04);
        write(root.path(), &[(&power, "7000000")]);
        assert_eq!(watts(&EnergyMeter::start_at(root.path()).unwrap().source), Some(7.0));
    }
}
