//! Heat and battery of a device with Linux, from the files under `/sys/class` (kernel documentation: "Generic Thermal Sysfs
//! driver How To" and "ABI/testing/sysfs-class-power").

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use edgellm_model::ModelError;

use super::{Command, Control};
use crate::TuneError;

/// What is kept between a run and the temperature at which the system itself acts (a "hot" or "critical" trip point).
const TRIP_MARGIN: f64 = 5.0;

/// Temperatures outside this range, in degrees Celsius, are no temperatures: a sensor that is off says -274.
const PLAUSIBLE: std::ops::Range<f64> = -60.0..200.0;

/// When a run pauses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerLimits {
    /// Pause when a zone is hotter, in degrees Celsius; or hotter than 5 degrees below its hot or critical trip point,
    /// where that is less.
    pub max_celsius: f64,
    /// Go on when all zones are cooler than their limit by this much.
    pub hysteresis: f64,
    /// Pause when a battery is discharging and has less, in percent; 0 never pauses.
    pub min_battery_percent: u8,
}

impl Default for PowerLimits {
    /// 85 degrees, on again below 75; 20 percent.
    fn default() -> Self {
        Self { max_celsius: 85.0, hysteresis: 10.0, min_battery_percent: 20 }
    }
}

struct Zone {
    /// Such as `thermal_zone0 (x86_pkg_temp)`.
    name: String,
    temp: PathBuf,
    /// Degrees Celsius.
    limit: f64,
}

/// Pauses while the device is too hot, or its battery is nearly empty and not charging.
pub struct PowerAndHeat {
    limits: PowerLimits,
    zones: Vec<Zone>,
    batteries: Vec<PathBuf>,
    /// Zones that were above their limit and have not yet cooled below the lower one.
    hot: BTreeSet<usize>,
}

impl PowerAndHeat {
    /// The sensors of this device.
    ///
    /// # Errors
    /// See [`PowerAndHeat::at`].
    pub fn new(limits: PowerLimits) -> Result<Self, TuneError> {
        Self::at(Path::new("/sys"), limits)
    }

    /// The sensors below `root`, which stands for `/sys`. Where there is none, see [`PowerAndHeat::is_blind`].
    ///
    /// # Errors
    /// Limits that are no temperatures or no percentage.
    pub fn at(root: &Path, limits: PowerLimits) -> Result<Self, TuneError> {
        let bad = |what: &str, expected: &str, found: String| {
            let (what, expected) = (what.into(), expected.into());
            Err(TuneError::Model(ModelError::Value { what, expected, found }))
        };
        if !PLAUSIBLE.contains(&limits.max_celsius) {
            let expected = "degrees Celsius from -60 to 200";
            return bad("temperature to pause at", expected, limits.max_celsius.to_string());
        }
        if !(0.0..100.0).contains(&limits.hysteresis) {
            return bad("degrees to cool down by", "a number from 0 to 100", limits.hysteresis.to_string());
        }
        if limits.min_battery_percent > 100 {
            return bad("battery to pause at", "a percentage", limits.min_battery_percent.to_string());
        }
        let mut zones = Vec::new();
        for folder in folders(&root.join("class/thermal")) {
            let (name, temp) = (file_name(&folder), folder.join("temp"));
            if name.starts_with("thermal_zone") && celsius(&temp).is_some() {
                let kind = read_line(&folder.join("type")).unwrap_or_else(|| "no type".into());
                let limit = trip(&folder).map_or(limits.max_celsius, |t| limits.max_celsius.min(t - TRIP_MARGIN));
                zones.push(Zone { name: format!("{name} ({kind})"), temp, limit });
            }
        }
        // A battery of scope "Device" is that of a mouse or a headset.
        let batteries = folders(&root.join("class/power_supply"))
            .into_iter()
            .filter(|folder| read_line(&folder.join("type")).is_some_and(|kind| kind == "Battery"))
            .filter(|folder| read_line(&folder.join("scope")).is_none_or(|scope| scope != "Device"))
            .filter(|folder| percent(folder).is_some())
            .collect();
        Ok(Self { limits, zones, batteries, hot: BTreeSet::new() })
    }

    /// Whether there is neither a temperature nor a battery to look at, so that it never pauses.
    pub fn is_blind(&self) -> bool {
        self.zones.is_empty() && self.batteries.is_empty()
    }

    /// The sensors and their limits, in one line.
    pub fn describe(&self) -> String {
        if self.is_blind() {
            return "no sensors here: neither a thermal zone nor a battery under /sys/class".into();
        }
        let mut text = String::new();
        for zone in &self.zones {
            let _ = write!(text, "{} up to {:.0} C, ", zone.name, zone.limit);
        }
        for battery in &self.batteries {
            let _ = write!(text, "{} from {}%, ", file_name(battery), self.limits.min_battery_percent);
        }
        text.truncate(text.len() - 2);
        text
    }

    fn heat(&mut self) -> Option<String> {
        let mut reason = None;
        for (index, zone) in self.zones.iter().enumerate() {
            let resume = zone.limit - self.limits.hysteresis;
            // A zone that can no longer be read holds nothing up.
            match celsius(&zone.temp) {
                Some(now) if now > zone.limit => self.hot.insert(index),
                Some(now) if now >= resume => false,
                _ => self.hot.remove(&index),
            };
            if self.hot.contains(&index) && reason.is_none() {
                reason = Some(format!("{} was above {:.0} C and must cool below {resume:.0} C", zone.name, zone.limit));
            }
        }
        reason
    }

    fn power(&self) -> Option<String> {
        let least = self.limits.min_battery_percent;
        self.batteries.iter().find_map(|battery| {
            let discharging = read_line(&battery.join("status")).is_some_and(|status| status == "Discharging");
            let low = discharging && percent(battery).is_some_and(|percent| percent < least);
            low.then(|| format!("{} is below {least}% and not charging", file_name(battery)))
        })
    }
}

impl Control for PowerAndHeat {
    fn poll(&mut self, _step: u64) -> Command {
        let reasons: Vec<String> = self.heat().into_iter().chain(self.power()).collect();
        if reasons.is_empty() { Command::Continue } else { Command::Pause { reason: reasons.join("; ") } }
    }
}

/// What is in a folder, in order of the names; nothing where there is no folder.
fn folders(path: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().escape_debug().to_string()).unwrap_or_default()
}

/// The first line of a small file; `None` if it cannot be read, as sensors of devices that sleep cannot.
fn read_line(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(256).read_to_string(&mut text).ok()?;
    text.lines().next().map(|line| line.trim().escape_debug().to_string())
}

/// A temperature file: thousandths of degrees Celsius.
fn celsius(path: &Path) -> Option<f64> {
    let degrees = f64::from(read_line(path)?.parse::<i32>().ok()?) / 1000.0;
    PLAUSIBLE.contains(&degrees).then_some(degrees)
}

/// The lowest trip point at which the system itself acts hard.
fn trip(zone: &Path) -> Option<f64> {
    let kind_of = |path: &Path| file_name(path).strip_prefix("trip_point_")?.strip_suffix("_type").map(str::to_owned);
    let trips = folders(zone).into_iter().filter_map(|path| {
        let index = kind_of(&path)?;
        let acts = matches!(read_line(&path)?.as_str(), "hot" | "critical");
        // Zero and less mean that the point is not set.
        let degrees = acts.then(|| celsius(&zone.join(format!("trip_point_{index}_temp"))))??;
        (degrees > 0.0).then_some(degrees)
    });
    trips.min_by(f64::total_cmp)
}

fn percent(battery: &Path) -> Option<u8> {
    read_line(&battery.join("capacity"))?.parse::<u8>().ok().filter(|percent| *percent <= 100)
}
