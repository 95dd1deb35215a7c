//! Heat and battery of a device, as far as its system shows them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::process::Failure;
use super::transport::Transport;

/// What the sensors said at one time.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(super) struct Reading {
    /// When: `start`, `end`, or minutes of the sustained run.
    pub(super) when: String,
    /// The hottest sensor and its degrees Celsius.
    pub(super) hottest: Option<(String, f64)>,
    /// Percent of the battery, and what it is doing.
    pub(super) battery: Option<(f64, String)>,
}

/// Linux's sensors, then Android's service, which apps' users may ask where the files are closed to them.
const SCRIPT: &str = "\
for z in /sys/class/thermal/thermal_zone*; do \
t=$(cat $z/temp 2>/dev/null) && echo \"temp $t $(cat $z/type 2>/dev/null)\"; done; \
for b in /sys/class/power_supply/*; do \
c=$(cat $b/capacity 2>/dev/null) && echo \"battery $c $(cat $b/status 2>/dev/null)\"; done; \
if command -v dumpsys >/dev/null 2>&1; then dumpsys battery 2>/dev/null; fi; true";

/// Asks a device; an emulated one has no sensors of its own.
pub(super) fn read(transport: &Transport, when: &str, limit: Duration) -> Result<Reading, Failure> {
    let text = if transport.own_sensors { transport.script(SCRIPT, limit)? } else { String::new() };
    Ok(Reading { when: when.to_owned(), ..parse(&text) })
}

fn parse(text: &str) -> Reading {
    let mut reading = Reading::default();
    let (mut level, mut service) = (None, None);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (first, number) = (words.next(), words.next().and_then(|n| n.parse::<f64>().ok()));
        let rest = words.collect::<Vec<_>>().join(" ");
        match (first, number) {
            // Files are in thousandths; sensors that are off say nonsense.
            (Some("temp"), Some(value)) if (-50_000.0..200_000.0).contains(&value) => {
                let celsius = value / 1000.0;
                if reading.hottest.as_ref().is_none_or(|(_, hottest)| celsius > *hottest) {
                    reading.hottest = Some((rest, celsius));
                }
            }
            (Some("battery"), Some(percent)) => reading.battery = Some((percent, rest.to_lowercase())),
            (Some("level:"), value) => level = value,
            // The service is in tenths.
            (Some("temperature:"), Some(value)) => service = Some(value / 10.0),
            _ => {}
        }
    }
    reading.hottest = reading.hottest.or(service.map(|celsius| ("battery".to_owned(), celsius)));
    reading.battery = reading.battery.or(level.map(|percent| (percent, String::new())));
    reading
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_the_service_are_read() {
        let text = "temp 41500 cpu-thermal\ntemp 52250 gpu thermal\ntemp -274000 off\nbattery 80 Discharging\n";
        let reading = parse(text);
        assert_eq!(reading.hottest, Some(("gpu thermal".to_owned(), 52.25)));
        assert_eq!(reading.battery, Some((80.0, "discharging".to_owned())));
        let reading = parse("Current Battery Service state:\n  level: 93\n  temperature: 274\n");
        assert_eq!(reading.hottest, Some(("battery".to_owned(), 27.4)));
        assert_eq!(reading.battery, Some((93.0, String::new())));
        assert_eq!(parse(""), Reading::default());
    }
}
